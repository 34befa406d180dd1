"""A race: which trials the next rung has, given what the rung before measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import made_up
import pytest
import small_sweep

from orchestrator.plan import plan_sweep
from orchestrator.race import settled
from orchestrator.records import TrialRecord
from orchestrator.space import Space, Trial, enumerate_trials, origin_of
from orchestrator.spec import SpecError, Sweep, load

RUNGS: list[dict[str, Any]] = [
    {"name": "zero_shot", "set": {"distill": None}, "keep": 2},
    {"name": "short", "set": {"distill.training.steps": 5}, "keep": 1},
    {"name": "full"},
]
SWEEP: dict[str, Any] = {
    "name": "small",
    "question": "Which shape?",
    "profile": "micro",
    "trial": {"prune": {"depth": {"keep": 1.0, "criterion": "random"}}},
    "axes": {"prune.depth.keep": [1, 2, 3], "seed": [0, 1]},
    "baselines": {"wide": {"prune": {"depth": {"keep": 4}}}},
    "scheduler": {"method": "race", "metric": "lm_loss.after", "rungs": RUNGS},
}


def sweep(folder: Path, **scheduler: Any) -> Sweep:
    race = {**SWEEP["scheduler"], **scheduler}
    return load(small_sweep.write(folder, {**SWEEP, "scheduler": race}))


def ended(trial: Trial, loss: float | None) -> TrialRecord:
    status, reason = ("completed", None) if loss is not None else ("failed", "NaN")
    metrics = {} if loss is None else {"lm_loss.after": loss}
    record = made_up.trial("perplexity", trial.seed, 0, metrics)
    return replace(record, trial_id=trial.trial_id, status=status, reason=reason, metrics=metrics)


def in_rung(space: Space, number: int) -> list[Trial]:
    return [t for t in space.trials if t.rung == number and t.baseline is None]


def measured(space: Space, number: int, losses: dict[int, float | None]) -> dict[str, TrialRecord]:
    """What the trials of a rung came to, by how many layers they keep."""
    return {
        t.trial_id: ended(t, losses[t.axes["prune.depth.keep"]]) for t in in_rung(space, number)
    }


def test_the_first_rung_has_every_candidate_and_its_settings(tmp_path: Path) -> None:
    space = enumerate_trials(sweep(tmp_path))
    first = in_rung(space, 0)
    assert len(first) == 3 * 2 and all(t.config.distill is None for t in first)
    assert {t.axes["rung"] for t in first} == {"zero_shot"}


def test_a_baseline_runs_the_last_rung(tmp_path: Path) -> None:
    space = enumerate_trials(sweep(tmp_path))
    (one, two) = [t for t in space.trials if t.baseline == "wide"]
    assert one.config.distill is not None and one.config.distill.training.steps == 30
    assert (one.seed, two.seed) == (0, 1)


def test_nothing_is_decided_before_all_of_a_rung_have_ended(tmp_path: Path) -> None:
    loaded = sweep(tmp_path)
    space = enumerate_trials(loaded)
    done = measured(space, 0, {1: 3.0, 2: 1.0, 3: 2.0})
    done.popitem()
    assert settled(loaded, space, done).trials == space.trials


def test_the_best_go_on_with_all_their_seeds_until_the_last_rung(tmp_path: Path) -> None:
    loaded = sweep(tmp_path)
    space = enumerate_trials(loaded)
    done = measured(space, 0, {1: 3.0, 2: 1.0, 3: 2.0})
    second = settled(loaded, space, done)
    assert [(t.axes["prune.depth.keep"], t.seed) for t in in_rung(second, 1)] == [
        (2, 0),
        (2, 1),
        (3, 0),
        (3, 1),
    ]
    assert all(t.config.distill.training.steps == 5 for t in in_rung(second, 1))  # type: ignore[union-attr]
    done |= measured(second, 1, {2: 0.9, 3: 0.8})
    third = settled(loaded, space, done)
    assert {t.axes["prune.depth.keep"] for t in in_rung(third, 2)} == {3}
    assert {t.config.distill.training.steps for t in in_rung(third, 2)} == {30}  # type: ignore[union-attr]
    done |= measured(third, 2, {3: 0.7})
    assert settled(loaded, space, done).trials == third.trials


def test_a_failed_candidate_does_not_go_on_and_does_not_stop_the_others(tmp_path: Path) -> None:
    loaded = sweep(tmp_path)
    space = enumerate_trials(loaded)
    later = settled(loaded, space, measured(space, 0, {1: None, 2: None, 3: 2.0}))
    assert {t.axes["prune.depth.keep"] for t in in_rung(later, 1)} == {3}


def test_where_all_failed_the_race_ends(tmp_path: Path) -> None:
    loaded = sweep(tmp_path)
    space = enumerate_trials(loaded)
    done = measured(space, 0, {1: None, 2: None, 3: None})
    assert settled(loaded, space, done).trials == space.trials


def test_the_pruned_model_of_one_rung_is_the_artifact_of_the_next(tmp_path: Path) -> None:
    loaded = sweep(tmp_path)
    space = enumerate_trials(loaded)
    later = settled(loaded, space, measured(space, 0, {1: 3.0, 2: 1.0, 3: 2.0}))
    planned = {each.trial.trial_id: each for each in plan_sweep(loaded, later).trials}
    for trial in in_rung(later, 1):
        (before,) = [
            t
            for t in in_rung(space, 0)
            if (t.axes["prune.depth.keep"], t.seed) == (trial.axes["prune.depth.keep"], trial.seed)
        ]
        steps, earlier = planned[trial.trial_id].steps, planned[before.trial_id].steps
        assert steps["prune"].stage_id == earlier["prune"].stage_id


def test_the_origin_of_a_rungs_setting_is_its_line(tmp_path: Path) -> None:
    loaded = sweep(tmp_path)
    space = enumerate_trials(loaded)
    later = settled(loaded, space, measured(space, 0, {1: 3.0, 2: 1.0, 3: 2.0}))
    origin = origin_of(loaded, in_rung(later, 1)[0], "distill.training.steps")
    line = int(origin.rpartition(":")[2])
    assert "steps: 5" in (tmp_path / "small.yaml").read_text().splitlines()[line - 1]


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        ({"rungs": RUNGS[:1]}, "at least two rungs"),
        ({"rungs": [RUNGS[0], {"name": "zero_shot"}]}, "a name of its own"),
        ({"rungs": [{"name": "a"}, {"name": "b"}]}, "how many configurations to keep"),
        ({"method": "none"}, "rungs are for the method race"),
        ({"method": "rase"}, "did you mean 'race'"),
        ({"floor_tokens": 5}, "floor_tokens, reduction and at_least are for asha and median"),
        ({"reduction": 4.0}, "floor_tokens, reduction and at_least are for asha and median"),
    ],
)
def test_a_mistake_in_the_scheduler_is_told(
    tmp_path: Path, scheduler: dict[str, Any], words: str
) -> None:
    with pytest.raises(SpecError, match=words):
        sweep(tmp_path, **scheduler)


def test_a_rung_that_sets_what_is_no_setting_is_told_with_its_line(tmp_path: Path) -> None:
    rungs = [{"name": "a", "set": {"distill.training.step": 5}, "keep": 1}, {"name": "b"}]
    with pytest.raises(SpecError, match=r"small\.yaml:\d+: .*did you mean"):
        enumerate_trials(sweep(tmp_path, rungs=rungs))
