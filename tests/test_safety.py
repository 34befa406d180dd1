"""What a sweep file of unknown origin cannot do: run code of its own, or leave the results."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import small_sweep
import test_engine
import torch
from conftest import MakeContext
from jinja2.exceptions import SecurityError
from test_engine import Bigram, StopAt, settings_of

from orchestrator.spec import SpecError, load
from trainers import acquire, checkpoints, prune, questions
from trainers.config import AcquireConfig, ByList, DepthCut, FolderModel, PruneConfig
from trainers.contract import Interrupted, StageError

ROOT = Path(__file__).parent.parent


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What would be there had anything been run."""
    mark = tmp_path / "it ran"
    pickle.loads(pickle.dumps(Trap(mark)))
    assert mark.exists(), "the trap does not work"
    mark.unlink()
    return mark


@pytest.fixture
def pickled(artifact: Path, tmp_path: Path, mark: Path) -> Path:
    """A checkpoint whose weights are a pickle."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(artifact / "model", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({"model.embed_tokens.weight": Trap(mark)}, folder / "pytorch_model.bin")
    return folder


def test_a_checkpoint_of_pickles_is_refused_and_runs_nothing(
    pickled: Path, mark: Path, make_context: MakeContext
) -> None:
    source = FolderModel(path=pickled)
    acquired = make_context(AcquireConfig(source=source), out="acquired")
    cut = DepthCut(num_hidden_layers=2, choice=ByList(drop=(1, 2)))
    with pytest.raises((StageError, OSError, pickle.UnpicklingError)):
        acquire.run(acquired)
        prune.run(make_context(PruneConfig(depth=cut), model=acquired.out))
    with pytest.raises((OSError, pickle.UnpicklingError)):
        checkpoints.load_model(pickled)
    assert not mark.exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_that_comes_with_a_checkpoint_is_not_run_and_nobody_is_asked(
    artifact: Path, tmp_path: Path, mark: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(artifact / "model", folder)
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w').close()\nOwn = OwnConfig = None\n")
    config = json.loads((folder / file).read_text())
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    if file == "config.json":
        config |= {"model_type": "own", "auto_map": classes}
    else:
        config |= {
            "tokenizer_class": "OwnTokenizer",
            "auto_map": {"AutoTokenizer": ["own.Own", None]},
        }
    (folder / file).write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks whether to run it"))
    read = checkpoints.load_model if file == "config.json" else checkpoints.load_tokenizer
    with pytest.raises(ValueError, match="trust_remote_code"):
        read(folder)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "random0.pt"])
def test_a_checkpoint_of_a_half_done_distillation_runs_nothing(
    tmp_path: Path, mark: Path, name: str
) -> None:
    """It lies in the folder of artifacts, which a profile names and others may write to."""
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        test_engine.train(Bigram(), settings_of(), out, StopAt(4, Interrupted()))
    shard = out / "checkpoints" / "step4" / name
    assert shard.exists()
    torch.save({"module": Trap(mark), "python": Trap(mark)}, shard)
    with suppress(Exception):
        test_engine.train(Bigram(), settings_of(), out)
    assert not mark.exists()


def test_the_template_of_a_prompt_reads_its_question_and_nothing_else() -> None:
    asked = {"query": "Which?", "choices": ["a", "b"]}
    assert questions.harness.apply_template("{{query.strip()}} {{choices[1]}}", asked) == "Which? b"
    for template in (
        "{{query.__class__.__mro__[1].__subclasses__()}}",
        "{{query.__init__.__globals__}}",
        "{% for x in ().__class__.__base__.__subclasses__() %}{{x}}{% endfor %}",
    ):
        with pytest.raises(SecurityError):
            questions.harness.apply_template(template, asked)


def test_no_module_of_ours_can_run_what_it_reads() -> None:
    """Neither pickles nor code: by name, so that a new one is noticed."""
    found = {
        f"{path.relative_to(ROOT)}:{node.lineno}: {what}"
        for folder in ("orchestrator", "trainers")
        for path in (ROOT / folder).glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for what in _unsafe(node)
    }
    assert not found


READERS_OF_PICKLES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def _unsafe(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [a.name for a in node.names if a.name.split(".")[0] in READERS_OF_PICKLES]
    if isinstance(node, ast.ImportFrom):
        return [node.module] if node.module in READERS_OF_PICKLES else []
    if not isinstance(node, ast.Call):
        return []
    called = ast.unparse(node.func)
    given = {word.arg: ast.unparse(word.value) for word in node.keywords}
    if called in ("eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load"):
        return [called]
    if called == "torch.load" and given.get("weights_only") != "True":
        return [called]
    return [
        f"{called}({k}=True)"
        for k in ("allow_pickle", "trust_remote_code")
        if given.get(k) == "True"
    ]


@pytest.mark.parametrize("name", ["../out", "/etc", "a/b", "..", ".", "", "a\x00b", "artifacts"])
def test_a_sweep_cannot_be_named_out_of_its_folder(tmp_path: Path, name: str) -> None:
    sweep = small_sweep.write(tmp_path / "sweeps", {**small_sweep.SWEEP, "name": name})
    with pytest.raises(SpecError, match="name"):
        load(sweep, results=tmp_path / "results")


@pytest.mark.parametrize("name", ["../profiles/micro", "a/../micro", "/etc/passwd", "..", "x/.."])
def test_a_profile_cannot_be_named_out_of_its_folder(tmp_path: Path, name: str) -> None:
    """A file elsewhere may be read, but its results lie under a plain name."""
    sweep = small_sweep.write(tmp_path / "sweeps")
    try:
        loaded = load(sweep, name)
    except SpecError as error:
        assert "profile" in str(error)
        return
    assert loaded.profile == "micro"


def test_a_profile_file_of_another_name_than_a_plain_one_is_refused(tmp_path: Path) -> None:
    sweep = small_sweep.write(tmp_path / "sweeps")
    odd = tmp_path / "sweeps" / "profiles" / "...yaml"
    shutil.copyfile(tmp_path / "sweeps" / "profiles" / "micro.yaml", odd)
    with pytest.raises(SpecError, match="is not a name for a profile"):
        load(sweep, "..")


@pytest.mark.parametrize("key", ["sweep", "profile"])
@pytest.mark.parametrize("name", ["../../elsewhere", "/etc", ".."])
def test_a_winner_cannot_be_looked_for_outside_the_results(
    tmp_path: Path, key: str, name: str
) -> None:
    source = {"kind": "winner", "sweep": "small", "profile": "micro", key: name}
    sweep = {**small_sweep.SWEEP, "trial": {"source": source}}
    path = small_sweep.write(tmp_path / "sweeps", sweep)
    with pytest.raises(SpecError, match="is not the name of a sweep or profile"):
        load(path, results=tmp_path / "results")
