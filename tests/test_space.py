"""Trials made of axes: which there are, in what order, and by what name they are known."""

# ruff: noqa: E501 (a table of mistakes is read a line at a time)

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.space import Space, Trial, enumerate_trials, make_trial, origin_of
from orchestrator.spec import SpecError, Sweep, load

TRAINING = {"steps": 100, "batch_size": 8, "learning_rate": 0.001}
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TRIAL: dict[str, Any] = {
    "source": {"kind": "scratch", "shape": SHAPE, "training": TRAINING, "seed": 0},
    "corpus": {"kind": "generated"},
    "importance": {"samples": 32, "tasks": [{"kind": "generated", "name": "agreement"}]},
    "prune": {"depth": {"keep": 0.5, "criterion": "perplexity"}},
    "distill": {"training": {"steps": 20, "batch_size": 8, "learning_rate": 0.0005}},
    "evaluate": {"tasks": [{"kind": "generated", "name": "knowledge"}]},
}

Make = Callable[..., Sweep]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes and loads a sweep whose base is `TRIAL`; YAML text or more keys may be given."""
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "tiny.yaml").write_text("description: nothing\n")

    def write(text: str = "", *overrides: str, **keys: Any) -> Sweep:
        start = {"name": "s", "question": "?", "profile": "tiny"}
        more = keys if "trial" in keys else {"trial": TRIAL, **keys}
        path = tmp_path / "sweep.yaml"
        path.write_text(f"{text}\n{yaml.safe_dump({**start, **more}, sort_keys=False)}")
        return load(path, overrides=overrides)

    return write


def _grid(space: Space) -> list[Trial]:
    return [trial for trial in space.trials if trial.baseline is None]


def _axes(space: Space) -> list[tuple[Any, ...]]:
    return [(*trial.axes.values(), trial.seed) for trial in _grid(space)]


# --- which trials there are ------------------------------------------------------------------


def test_a_sweep_without_axes_has_the_teacher_and_one_trial(make):
    teacher, trial = enumerate_trials(make()).trials
    assert (teacher.baseline, teacher.seed, teacher.axes) == ("teacher", 0, {})
    assert teacher.config.prune is None
    assert teacher.config.distill is None
    assert (trial.baseline, trial.axes) == (None, {})
    assert trial.config.prune is not None


def test_the_grid_is_in_file_order_with_seeds_innermost_then_the_baselines(make):
    space = enumerate_trials(
        make(
            axes={
                "prune.depth.criterion": ["block_influence", "perplexity"],
                "seed": [3, 1],
                "prune.depth.keep": [4, 0.5],
            },
            baselines={"chance": {"prune": {"depth": {"criterion": "random"}}}},
        )
    )
    assert _axes(space) == [
        (criterion, keep, seed)
        for criterion in ("block_influence", "perplexity")
        for keep in (4, 0.5)
        for seed in (3, 1)
    ]
    assert [(t.baseline, t.seed) for t in space.trials if t.baseline] == [
        ("teacher", 3),
        ("chance", 3),
        ("chance", 1),
    ]
    assert [t.baseline for t in space.trials] == ["teacher", *[None] * 8, "chance", "chance"]
    assert space.left_out == ()


def test_linked_axes_move_together(make):
    sweep = make(
        axes={"prune.depth.keep": [2, 4]},
        linked=[{"distill.training.steps": [10, 20], "distill.training.learning_rate": [0.1, 0.2]}],
    )
    space = enumerate_trials(sweep)
    assert _axes(space) == [(2, 10, 0.1, 0), (2, 20, 0.2, 0), (4, 10, 0.1, 0), (4, 20, 0.2, 0)]
    assert space.trials[2].config.distill.training.learning_rate == 0.2


def test_linked_axes_may_repeat_one_value_but_not_a_whole_row(make):
    linked = {"distill.training.steps": [10, 10], "prune.depth.keep": [2, 4]}
    assert len(_grid(enumerate_trials(make(linked=[linked])))) == 2


def test_a_conditional_axis_is_absent_where_its_condition_fails(make):
    space = enumerate_trials(
        make(
            axes={
                "prune.depth.contiguous": {
                    "values": [True, False],
                    "when": {"prune.depth.criterion": "perplexity"},
                },
                "prune.depth.criterion": ["perplexity", "random"],
            }
        )
    )
    assert [dict(trial.axes) for trial in _grid(space)] == [
        {"prune.depth.contiguous": True, "prune.depth.criterion": "perplexity"},
        {"prune.depth.criterion": "random"},
        {"prune.depth.contiguous": False, "prune.depth.criterion": "perplexity"},
    ]
    assert space.left_out == (), "that the two trials of `random` are one is as expected"


def test_a_condition_on_an_axis_that_is_itself_off_fails(make):
    axes = {
        "prune.depth.keep": [2, 4],
        "distill.training.steps": {"values": [10, 20], "when": {"prune.depth.keep": 4}},
        "distill.loss.temperature": {"values": [1.5], "when": {"distill.training.steps": [20]}},
    }
    space = enumerate_trials(make(axes=axes))
    assert _axes(space) == [(2, 0), (4, 10, 0), (4, 20, 1.5, 0)]


def test_exclusions_are_left_out_with_the_place_that_says_so(make):
    space = enumerate_trials(
        make(
            axes={
                "prune.depth.criterion": ["perplexity", "random"],
                "prune.depth.keep": [2, 4],
                "seed": [0, 1],
            },
            exclude=[
                {"prune.depth.criterion": {"kind": "random"}, "prune.depth.keep": [2, 4.0]},
                {"seed": 1, "prune.depth.keep": 4},
            ],
        )
    )
    assert _axes(space) == [("perplexity", 2, 0), ("perplexity", 2, 1), ("perplexity", 4, 0)]
    assert [len(each.assignment) for each in space.left_out] == [3, 2, 2]
    assert all("sweep.yaml:" in each.reason for each in space.left_out)


def test_trials_with_the_same_settings_are_one_and_it_is_said(make):
    sweep = make(
        axes={"prune.depth.criterion": ["random", "perplexity"]},
        baselines={"chance": {"prune.depth.criterion": {"kind": "random"}}},
    )
    space = enumerate_trials(sweep)
    assert len({trial.trial_id for trial in space.trials}) == len(space.trials) == 3
    (left_out,) = space.left_out
    assert left_out.assignment == {"baseline": "chance", "seed": 0}
    assert "the trial with criterion=random" in left_out.reason


def test_a_value_may_be_a_whole_variant_or_a_list(make):
    tasks = [[{"kind": "generated", "name": name}] for name in ("agreement", "reference")]
    axes = {
        "prune.depth.criterion": [{"kind": "layers", "drop": [1, 2, 3]}, "perplexity"],
        "evaluate.tasks": tasks,
    }
    exclude = [{"evaluate.tasks": tasks[0], "prune.depth.criterion": "perplexity"}]
    space = enumerate_trials(make(axes=axes, exclude=exclude, select={"metric": "lm_loss.after"}))
    names = [trial.config.evaluate.tasks[0].name for trial in _grid(space)]
    assert names == ["agreement", "reference", "reference"]


def test_an_axis_inside_another_is_laid_over_it_in_either_order(make):
    axes = {
        "distill.loss.temperature": [2.0],
        "distill.loss": [{"logits_weight": 0.5, "temperature": 1.0}],
    }
    for each in (axes, dict(reversed(axes.items()))):
        loss = _grid(enumerate_trials(make(axes=each)))[0].config.distill.loss
        assert (loss.temperature, loss.logits_weight) == (2.0, 0.5)


# --- one trial at a time ---------------------------------------------------------------------


def test_a_searcher_makes_the_same_trials_one_at_a_time(make):
    sweep = make(
        axes={"prune.depth.keep": [2, 4], "seed": [0, 1]},
        baselines={"chance": {"prune.depth.criterion": "random"}},
    )
    for trial in enumerate_trials(sweep).trials:
        assert make_trial(sweep, trial.axes, trial.baseline, trial.seed) == trial
    assert make_trial(sweep, {"prune.depth.keep": 3}).config.prune.depth.keep == 3
    assert pickle.loads(pickle.dumps(trial)) == trial


def test_a_searcher_may_name_axes_that_do_not_apply(make):
    when = {"prune.depth.criterion": "perplexity"}
    axes = {
        "prune.depth.criterion": ["perplexity", "random"],
        "prune.depth.contiguous": {"values": [True], "when": when},
    }
    given = {"prune.depth.criterion": "random", "prune.depth.contiguous": True}
    trial = make_trial(make(axes=axes), given)
    assert trial.axes == {"prune.depth.criterion": "random"}
    assert not trial.config.prune.depth.contiguous


@pytest.mark.parametrize(
    ("assignment", "baseline", "words"),
    [
        ({"prune.depth.kep": 3}, None, ["no axis 'prune.depth.kep'", "prune.depth.keep"]),
        ({}, "chanse", ["no baseline 'chanse'", "did you mean 'chance'"]),
        ({"prune.depth.keep": 0}, None, ["sweep.yaml:", "prune.depth.keep", "at least 1"]),
    ],
)
def test_a_trial_that_cannot_be_is_told(make, assignment, baseline, words):
    sweep = make(axes={"prune.depth.keep": [2, 4]}, baselines={"chance": {}})
    with pytest.raises(SpecError) as error:
        make_trial(sweep, assignment, baseline)
    assert all(word in str(error.value) for word in words)


def test_the_origin_of_a_setting(make, tmp_path):
    profile = {"trial": {key: TRIAL[key] for key in ("source", "corpus", "importance")}}
    (tmp_path / "profiles" / "tiny.yaml").write_text(yaml.safe_dump(profile))
    sweep = make(
        "",
        "evaluate.precision=bf16",
        trial={key: TRIAL[key] for key in ("prune", "distill", "evaluate")},
        axes={"prune.depth.criterion": ["perplexity", "random"], "seed": [0, 1]},
        baselines={"chance": {"prune": {"depth": {"keep": 2}}}},
    )
    lines = (tmp_path / "sweep.yaml").read_text().splitlines()
    first, last = enumerate_trials(sweep).trials[3], enumerate_trials(sweep).trials[-1]

    def told(trial: Trial, dotted: str) -> str:
        file, _, line = origin_of(sweep, trial, dotted).rpartition(":")
        return lines[int(line) - 1].strip() if file.endswith("sweep.yaml") else Path(file).name

    assert told(first, "prune.depth.criterion") == "- random"
    assert told(first, "prune.depth.criterion.kind") == "- random"
    assert told(first, "prune.depth.keep") == "keep: 0.5"
    assert told(last, "prune.depth.keep") == "keep: 2"
    assert told(first, "evaluate.tasks.0.name") == "name: knowledge"
    assert told(first, "source.shape.hidden_size") == "tiny.yaml"
    assert told(first, "seed") == "seed:"
    assert origin_of(sweep, first, "evaluate.precision") == "--set evaluate.precision=bf16"


# --- ids -------------------------------------------------------------------------------------


def _id(sweep: Sweep) -> str:
    return enumerate_trials(sweep).trials[-1].trial_id


def test_an_id_is_the_same_everywhere_and_forever(make):
    # Changes with every setting that is added: then no earlier result is found again. Say so.
    assert _id(make()) == "393343ae44b9"


def test_names_defaults_and_the_order_of_keys_do_not_enter_an_id(make):
    plain = _id(make())
    assert _id(make(trial=dict(reversed(TRIAL.items())))) == plain
    spelt_out = {**TRIAL, "corpus": {"kind": "generated", "block_length": 96}, "seed": 0}
    assert _id(make(trial=spelt_out)) == plain
    assert _id(make("", "name=other", "question=why", "resources.cpus_per_trial=2")) == plain
    keep = {"prune.depth.keep": [4, 0.5]}
    assert _id(make(axes=keep)) == plain


def test_the_order_of_axes_does_not_enter_ids(make):
    axes = {
        "prune.depth.criterion": ["perplexity", "random"],
        "prune.depth.keep": [2, 4],
        "distill.loss.temperature": [1.0, 2.0],
    }
    forwards = enumerate_trials(make(axes=axes)).trials
    backwards = enumerate_trials(make(axes=dict(reversed(axes.items())))).trials
    assert {t.trial_id for t in forwards} == {t.trial_id for t in backwards}


@pytest.mark.parametrize(
    "override",
    [
        "source.shape.hidden_size=64",
        "source.shape.initializer_range=0.12",
        "source.training.steps=101",
        "source.seed=1",
        "source={kind: hub, repository: a/b}",
        "corpus.language_seed=1",
        "corpus.block_length=64",
        "corpus.training_blocks=100",
        "corpus.calibration_blocks=64",
        "corpus.heldout_blocks=64",
        "importance.samples=16",
        "importance.tasks=[]",
        "importance.extra_block_lengths=[1]",
        "prune=null",
        "prune.depth.keep=3",
        "prune.depth.criterion=random",
        "prune.depth.criterion={kind: layers, drop: [1, 2, 3]}",
        "prune.depth.contiguous=true",
        "prune.initialise=random",
        "distill=null",
        "distill.loss.logits_weight=0.5",
        "distill.loss.temperature=2",
        "distill.loss.cross_entropy_weight=1",
        "distill.training.steps=21",
        "distill.training.batch_size=4",
        "distill.training.micro_batch_size=4",
        "distill.training.learning_rate=1e-3",
        "distill.training.minimum_learning_rate=1e-5",
        "distill.training.warmup_steps=2",
        "distill.training.weight_decay=0.1",
        "distill.training.gradient_clip=2",
        "distill.training.precision=bf16",
        "evaluate.tasks=[{kind: generated, name: knowledge, limit: 10}]",
        "evaluate.tasks=[{kind: generated, name: knowledge, shots: 1}]",
        "evaluate.tasks_before=true",
        "evaluate.precision=bf16",
        "seed=1",
    ],
)
def test_every_setting_enters_the_id(make, override):
    assert _id(make("", override)) != _id(make())


def test_files_enter_an_id_by_what_they_hold_and_not_by_where_they_are(make, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    for name in ("train.txt", "heldout.txt", "tasks.jsonl"):
        (here / name).write_text(f"{name}\n")
    shutil.copytree(here, there)
    corpus = {"kind": "text", "train": "train.txt", "heldout": "heldout.txt"}
    task = {"kind": "choices", "name": "own", "path": "tasks.jsonl"}
    trial = {**TRIAL, "corpus": corpus, "evaluate": {"tasks": [task]}}

    def id_at(folder: Path) -> str:
        return _id(make(trial=trial | {"data_folder": str(folder)}))

    before = id_at(here)
    assert id_at(there) == before
    written_out = {**corpus, "train": str(here / "train.txt"), "heldout": "there/heldout.txt"}
    own = {"tasks": [{**task, "path": "there/tasks.jsonl"}]}
    assert _id(make(trial={**trial, "corpus": written_out, "evaluate": own})) == before
    (there / "train.txt").write_text("something else\n")
    assert id_at(there) != before


# --- mistakes --------------------------------------------------------------------------------

AXES = """\
axes:
  prune.depth.criterion: [perplexity, random]
  prune.depth.keep:
    values: [2, 4]
    when: {prune.depth.criterion: perplexity}
linked:
  - distill.training.steps: [10, 20]
    distill.training.batch_size: [8, 4]
exclude:
  - {prune.depth.keep: 2, distill.training.steps: 20}
baselines:
  chance: {prune: {depth: {criterion: random}}}
"""

MISTAKES = [
    ("unknown axis", "  prune.depth.keep:\n", "  prune.depht.keep:\n", 3, ["unknown setting", "did you mean 'prune.depth.keep'", "allowed under prune: depth, initialise"]),
    ("axis below a setting", "  prune.depth.keep:\n", "  prune.depth.keep.all:\n", 3, ["unknown setting", "nothing"]),
    ("axis inside a list", "distill.training.steps:", "evaluate.tasks.0.limit:", 7, ["one by one"]),
    ("axis on a folder", "  prune.depth.keep:\n", "  data_folder:\n", 3, ["unknown setting"]),
    ("no values", "[perplexity, random]", "[]", 2, ["no value"]),
    ("values are one value", "[perplexity, random]", "perplexity", 2, ["must be a list"]),
    ("values missing", "    values: [2, 4]\n", "", 3, ["axes.prune.depth.keep.values", "must be a list"]),
    ("unknown key of an axis", "    when:", "    were:", 5, ["did you mean 'when'"]),
    ("value twice", "values: [2, 4]", "values: [2, 4, 2.0]", 4, ["2.0", "twice"]),
    ("variant twice", "[perplexity, random]", "[perplexity, {kind: perplexity}]", 2, ["twice"]),
    ("value not allowed", "values: [2, 4]", "values: [2, half]", 4, ["prune.depth.keep", "whole number"]),
    ("variant not allowed", "[perplexity, random]", "[perplexity, randon]", 2, ["prune.depth.criterion", "did you mean 'random'"]),
    ("value that contradicts another", "exclude:", "  - importance.samples: [1, 400]\nexclude:", 9, ["importance.samples", "calibration_blocks"]),
    ("axis that is linked too", "distill.training.steps: [10, 20]", "prune.depth.keep: [2, 3]", 7, ["prune.depth.keep", "elsewhere"]),
    ("linked in two groups", "exclude:\n", "  - distill.training.steps: [1, 2]\nexclude:\n", 9, ["elsewhere"]),
    ("linked of unequal length", "[8, 4]", "[8, 4, 2]", 7, ["distill.training.steps has 2", "batch_size has 3"]),
    ("linked with nothing", "  - distill.training.steps: [10, 20]\n    distill.training.batch_size: [8, 4]\n", "  - {}\n", 7, ["must be a mapping"]),
    ("linked row twice", "[10, 20]\n    distill.training.batch_size: [8, 4]", "[10, 10]\n    distill.training.batch_size: [8, 8]", 7, ["twice"]),
    ("linked seeds", "distill.training.steps:", "seed:", 7, ["seeds cannot be linked"]),
    ("linked value not allowed", "[8, 4]", "[8, 0]", 8, ["distill.training.batch_size", "greater than 0"]),
    ("condition on an unknown axis", "when: {prune.depth.criterion", "when: {prune.depth.criterium", 5, ["not an axis", "did you mean 'prune.depth.criterion'"]),
    ("condition on a value that is not tried", "criterion: perplexity}", "criterion: task}", 5, ["task", "not a value of that axis"]),
    ("condition is no mapping", "when: {prune.depth.criterion: perplexity}", "when: perplexity", 5, ["must be a mapping"]),
    ("condition on itself", "when: {prune.depth.criterion: perplexity}", "when: {prune.depth.keep: 2}", 5, ["depends on itself"]),
    ("conditions in a circle", "[perplexity, random]\n", "{values: [perplexity, random], when: {prune.depth.keep: 2}}\n", 2, ["depends on itself"]),
    ("exclusion of an unknown axis", "{prune.depth.keep: 2,", "{prune.depth.kep: 2,", 10, ["not an axis", "did you mean 'prune.depth.keep'"]),
    ("exclusion of a value that is not tried", "{prune.depth.keep: 2,", "{prune.depth.keep: 5,", 10, ["5", "not a value"]),
    ("empty exclusion", "{prune.depth.keep: 2, distill.training.steps: 20}", "{}", 10, ["must be a mapping"]),
    ("everything excluded", "{prune.depth.keep: 2, distill.training.steps: 20}", "{distill.training.steps: [10, 20]}", 9, ["no trial is left"]),
    ("too many", "[perplexity, random]", f"[perplexity, random]\n  source.seed: {[*range(400)]}\n  corpus.language_seed: {[*range(400)]}", 1, ["at most 100000"]),
    ("baseline named teacher", "chance:", "teacher:", 12, ["has this baseline already"]),
    ("baseline that is no name", "chance:", "by chance:", 12, ["is not a name"]),
    ("baseline is text", "{prune: {depth: {criterion: random}}}", "random", 12, ["must be a mapping"]),
    ("unknown key in a baseline", "{criterion: random}", "{criterium: random}", 12, ["prune.depth.criterium", "did you mean 'criterion'", "in the baseline chance"]),
    ("seed in a baseline", "{prune: {", "{seed: 1, prune: {", 12, ["the same for all trials"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [each[1:] for each in MISTAKES],
    ids=[each[0] for each in MISTAKES],
)
def test_a_mistake_in_the_axes_is_told_with_its_line(make, tmp_path, old, new, line, words):
    assert AXES.count(old) >= 1
    with pytest.raises(SpecError) as error:
        enumerate_trials(make(AXES.replace(old, new, 1)))
    about = [m for m in error.value.messages if m.startswith(f"{tmp_path}/sweep.yaml:{line}: ")]
    assert any(all(word in message for word in words) for message in about), str(error.value)


def test_the_axes_without_a_mistake(make):
    assert len(_grid(enumerate_trials(make(AXES)))) == 5


def test_all_mistakes_of_all_trials_are_told_at_once_and_each_once(make):
    sweep = make(
        axes={"prune.depth.keep": [0, 2, 1.5], "distill.training.steps": [-1, 5], "seed": [0, 1]}
    )
    with pytest.raises(SpecError) as error:
        enumerate_trials(sweep)
    assert len(error.value.messages) == 3


# --- variants --------------------------------------------------------------------------------

VARIANTS = {
    "cut": {
        "variants": {
            "shallow": {"prune.depth.keep": 2},
            "narrow": {"prune": {"width": {"hidden_size": 0.5}}, "distill.training.steps": 7},
            "as_is": {},
        }
    }
}


def test_a_variant_lays_its_settings_over_the_trial_and_is_told_by_its_name(make):
    shallow, narrow, as_is = _grid(enumerate_trials(make(axes=VARIANTS)))
    assert [t.axes for t in (shallow, narrow, as_is)] == [
        {"cut": "shallow"},
        {"cut": "narrow"},
        {"cut": "as_is"},
    ]
    assert shallow.config.prune.depth.keep == 2
    assert narrow.config.prune.width.hidden_size == 0.5
    assert narrow.config.distill.training.steps == 7
    assert as_is.config.prune.depth.keep == 0.5
    assert shallow.label == "cut=shallow, seed=0"


def test_a_variant_can_be_excluded_be_a_condition_and_be_made_by_name(make):
    axes = {
        **VARIANTS,
        "distill.loss.temperature": {"values": [1.0, 2.0], "when": {"cut": "narrow"}},
    }
    sweep = make(axes=axes, exclude=[{"cut": "as_is"}])
    assert [t.axes for t in _grid(enumerate_trials(sweep))] == [
        {"cut": "shallow"},
        {"cut": "narrow", "distill.loss.temperature": 1.0},
        {"cut": "narrow", "distill.loss.temperature": 2.0},
    ]
    assert make_trial(sweep, {"cut": "shallow"}).config.prune.depth.keep == 2


def test_the_origin_of_a_variants_setting_is_its_line(make, tmp_path):
    sweep = make(axes=VARIANTS)
    trial = _grid(enumerate_trials(sweep))[0]
    line = int(origin_of(sweep, trial, "prune.depth.keep").rpartition(":")[2])
    assert "keep: 2" in (tmp_path / "sweep.yaml").read_text().splitlines()[line - 1]


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"cut": {"variants": {"a": {"prune.depth.kep": 2}}}}, "did you mean 'keep'"),
        ({"cut": {"variants": {"a": 3}}}, "must be a mapping of settings"),
        ({"cut": {"variants": []}}, "must map names to settings"),
        ({"prune.depth.keep": {"variants": {"a": {}}}}, "a name of its own"),
        ({"cut": {"variants": {"a": {}}, "wen": {}}}, "did you mean 'when'"),
    ],
)
def test_a_mistake_in_a_variant_is_told(make, axes, words):
    with pytest.raises(SpecError, match=words):
        enumerate_trials(make(axes=axes))


def test_a_resolved_sweep_with_variants_makes_the_same_trials(make, tmp_path):
    sweep = make(axes=VARIANTS)
    again = tmp_path / "again.yaml"
    again.write_text(sweep.dump_yaml(relative_to=tmp_path))
    first = [trial.trial_id for trial in enumerate_trials(sweep).trials]
    assert [trial.trial_id for trial in enumerate_trials(load(again)).trials] == first
