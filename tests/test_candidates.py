"""A search space of shapes, narrowed by constraints from configs alone."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import small_sweep
import yaml

from orchestrator.candidates import Constraints, served_bytes
from orchestrator.plan import plan_sweep
from orchestrator.space import enumerate_trials
from orchestrator.spec import SpecError, load
from trainers.shapes import shape_of

ROOT = Path(__file__).parent.parent

SWEEP: dict[str, Any] = {
    "name": "small",
    "question": "Which shape?",
    "profile": "micro",
    "trial": {"prune": {"depth": {"keep": 1.0, "criterion": "random"}, "width": {}}},
    "axes": {
        "prune.depth.keep": {"from": 1, "to": 4},
        "prune.width.intermediate_size": {"from": 0.25, "to": 1.0, "step": 0.25},
    },
    "constraints": {"parameters": {"target": 0.6, "within": 0.1}},
}

LLAMA_SPACE: dict[str, Any] = {
    "prune.depth.keep": {"from": 16, "to": 32},
    "prune.width.num_attention_heads": [24, 32],
    "prune.width.intermediate_size": {"from": 6144, "to": 14336, "step": 512},
    "prune.width.hidden_size": {"from": 2304, "to": 4096, "step": 96},
}


def write(folder: Path, **changes: Any) -> Path:
    return small_sweep.write(folder, {**SWEEP, **changes})


def test_every_trial_meets_the_constraints_and_every_other_combination_is_told(
    tmp_path: Path,
) -> None:
    sweep = load(write(tmp_path))
    planned = plan_sweep(sweep, enumerate_trials(sweep))
    source = planned.trials[0].shape.parameters
    sizes = [each.shape.parameters for each in planned.trials[1:]]
    assert sizes and all(0.54 * source <= size <= 0.66 * source for size in sizes)
    assert len(sizes) + len(planned.left_out) == 4 * 4
    assert all("target of" in left.reason for left in planned.left_out)


def test_the_quick_count_equals_that_of_the_planned_trials(tmp_path: Path) -> None:
    """The search space is counted without typing each trial; nothing may be lost by it."""
    free = load(write(tmp_path, constraints={}))
    met = [
        each.trial.trial_id
        for each in plan_sweep(free, enumerate_trials(free)).trials[1:]
        if abs(each.shape.parameters / (0.6 * _source(tmp_path)) - 1) <= 0.1
    ]
    narrowed = enumerate_trials(load(write(tmp_path)))
    assert [trial.trial_id for trial in narrowed.trials[1:]] == met


def _source(folder: Path) -> int:
    sweep = load(write(folder))
    return plan_sweep(sweep, enumerate_trials(sweep)).trials[0].shape.parameters


def test_only_the_nearest_shapes_stay_where_so_many_are_asked_for(tmp_path: Path) -> None:
    budget = {"target": 0.6, "within": 0.3}
    every = enumerate_trials(load(write(tmp_path, constraints={"parameters": budget})))
    sweep = load(write(tmp_path, constraints={"parameters": budget, "nearest": 3}))
    planned = plan_sweep(sweep, enumerate_trials(sweep))
    assert len(planned.trials) == 1 + 3 < len(every.trials)
    target = 0.6 * planned.trials[0].shape.parameters
    worst = max(abs(each.shape.parameters - target) for each in planned.trials[1:])
    left_out = [left for left in planned.left_out if "nearer the target" in left.reason]
    assert len(left_out) == len(every.trials) - 1 - 3
    assert worst < 0.3 * target


def test_an_empty_space_says_how_near_the_nearest_came(tmp_path: Path) -> None:
    path = write(tmp_path, constraints={"parameters": {"target": 0.01, "within": 0.01}})
    with pytest.raises(SpecError) as raised:
        enumerate_trials(load(path))
    (message,) = raised.value.messages
    assert "small.yaml:" in message and "none of 16 candidates" in message
    assert "prune.depth.keep=1, prune.width.intermediate_size=0.25" in message
    assert "above the target" in message


def test_non_embedding_parameters_and_memory_are_constraints_too(tmp_path: Path) -> None:
    shape = shape_of(
        {
            "model_type": "llama",
            **small_sweep.PROFILE["trial"]["source"]["shape"],
            "vocab_size": 100,
        }
    )
    inner = Constraints.model_validate({"parameters_non_embedding": {"target": 1.0, "within": 0.0}})
    assert inner.unmet(shape, shape) is None
    memory = Constraints.model_validate({"memory": {"at_most": 1000.0}})
    assert "bytes of memory" in (memory.unmet(shape, shape) or "")
    assert memory.memory is not None
    cache = 2 * shape.num_key_value_heads * shape.head_dim * shape.num_hidden_layers * 4096
    assert served_bytes(shape, memory.memory) == 2 * (shape.parameters + cache)


@pytest.mark.parametrize(
    ("constraints", "words"),
    [
        ({"nearest": 3}, "nearest needs a target"),
        ({"parameters": {"target": 0.0}}, "constraints.parameters.target"),
        ({"parameter": {"target": 0.5}}, "did you mean 'parameters'"),
        ({"memory": {"at_most": -1.0}}, "constraints.memory.at_most"),
    ],
)
def test_a_mistake_in_the_constraints_is_told(
    tmp_path: Path, constraints: dict[str, Any], words: str
) -> None:
    with pytest.raises(SpecError, match=words):
        load(write(tmp_path, constraints=constraints))


@pytest.mark.parametrize(
    "broken",
    [{"from": 4, "to": 1}, {"from": 1, "to": 4, "step": 0}, {"from": 1}, {"from": 1, "too": 4}],
)
def test_a_range_that_goes_nowhere_is_told_with_its_line(
    tmp_path: Path, broken: dict[str, Any]
) -> None:
    with pytest.raises(SpecError, match=r"small\.yaml:\d+: axes\.prune\.depth\.keep"):
        enumerate_trials(load(write(tmp_path, axes={"prune.depth.keep": broken})))


def test_steps_of_a_range_are_the_numbers_a_person_would_write(tmp_path: Path) -> None:
    axes = {"distill.loss.temperature": {"from": 0.1, "to": 0.5, "step": 0.1}}
    space = enumerate_trials(load(write(tmp_path, axes=axes, constraints={})))
    given = [trial.axes["distill.loss.temperature"] for trial in space.trials[1:]]
    assert given == [0.1, 0.2, 0.3, 0.4, 0.5]


def test_over_ten_thousand_shapes_of_llama_3_1_8b_are_searched_in_under_five_seconds(
    tmp_path: Path,
) -> None:
    profile = yaml.safe_load((ROOT / "sweeps" / "profiles" / "llama31_8b.yaml").read_text())
    path = write(
        tmp_path,
        profile="llama",
        trial={"prune": {"depth": {"keep": 32, "criterion": "block_influence"}, "width": {}}},
        axes=LLAMA_SPACE,
        constraints={"parameters": {"target": 4.5e9, "within": 0.05}, "nearest": 20},
    )
    (tmp_path / "profiles" / "llama.yaml").write_text(yaml.safe_dump(profile))
    started = time.process_time()
    sweep = load(path)
    space = enumerate_trials(sweep)
    spent = time.process_time() - started
    assert len(space.trials) == 1 + 20
    assert len(space.trials) - 1 + len(space.left_out) > 10_000
    assert spent < 5
