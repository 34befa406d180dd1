"""What a sweep goes by is measured by some trial of its grid, or that is told before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import small_sweep

from orchestrator.growth import plan_with
from orchestrator.spec import SpecError, load

BY_AN_AXIS = {"prune.depth.keep": [0.5, 0.75]}
BY_VARIANTS = {"cut": {"variants": {"shallow": {"prune.depth.keep": 2}, "deep": {"prune": None}}}}
AGREEMENT = {"kind": "generated", "name": "agreement", "limit": 40}
ASKED = {"evaluate.tasks": [[], [AGREEMENT]]}
RANKING = {"first": "lm_los.after", "then": "x.y", "agreement_below": 0.5}
LOADS = {"lengths": [{"input": 8, "output": 8}], "batch_sizes": [1]}
RUNGS = [{"name": "first", "keep": 1, "set": {"evaluate": {"tasks": []}}}, {"name": "last"}]


def sweep(folder: Path, axes: dict[str, Any], **keys: Any) -> Path:
    """A sweep whose shared settings make no trial without an axis: they lack what to keep."""
    whole = "prune.depth.keep" not in axes and "cut" not in axes
    depth = {"criterion": "perplexity", **({"keep": 0.5} if whole else {})}
    trial = {"prune": {"depth": depth}}
    what = {"name": "s", "question": "?", "profile": "micro", "trial": trial, "axes": axes, **keys}
    return small_sweep.write(folder, what)


@pytest.mark.parametrize(
    "axes", [BY_AN_AXIS, BY_VARIANTS, ASKED], ids=["axis", "variants", "asked"]
)
@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"select": {"metric": "accuracy.meen"}}, "did you mean 'accuracy.mean'"),
        ({"select": {"metric": "accuracy_report.mean"}}, "kept for the report"),
        ({"select": {"metric": "throughput.mean"}}, "there is no trial.benchmark"),
        (
            {"claims": [{"text": "?", "ranking": RANKING}]},
            "claims.0.ranking.first: 'lm_los.after' is not measured, did you mean 'lm_loss.after'",
        ),
        ({"scheduler": {"method": "asha", "floor_tokens": 9}}, "set trial.distill.heldout_every"),
        (
            {"search": {"method": "tpe", "trials": 1, "objectives": [{"metric": "lm_los.after"}]}},
            "search.objectives.0.metric: 'lm_los.after' is not measured",
        ),
        (
            {"scheduler": {"method": "race", "metric": "lm_los.after", "rungs": RUNGS}},
            "scheduler.metric: 'lm_los.after' is not measured",
        ),
        (
            {
                "search": {"method": "tpe", "trials": 1},
                "scheduler": {"method": "race", "rungs": RUNGS},
            },
            "search.method: a race runs the whole grid",
        ),
    ],
)  # fmt: skip
def test_what_no_trial_measures_is_told_whatever_the_axes_set(
    tmp_path: Path, axes: dict[str, Any], keys: dict[str, Any], words: str
) -> None:
    with pytest.raises(SpecError) as error:
        plan_with(load(sweep(tmp_path, axes, **keys)), {})
    assert words in str(error.value)
    assert all(f"{tmp_path}/small.yaml:" in message for message in error.value.messages)


def test_a_metric_that_decides_a_rung_is_measured_in_that_rung(tmp_path: Path) -> None:
    race = {"method": "race", "metric": "accuracy.mean", "rungs": RUNGS}
    with pytest.raises(SpecError, match=r"scheduler.metric: .*evaluate.tasks is empty"):
        plan_with(load(sweep(tmp_path, BY_AN_AXIS, scheduler=race)), {})
    by_loss = {**race, "metric": "lm_loss.after"}
    plan_with(load(sweep(tmp_path, BY_AN_AXIS, scheduler=by_loss)), {})  # the last has the tasks


def test_the_winner_of_a_race_is_chosen_by_what_its_last_rung_measures(tmp_path: Path) -> None:
    rungs = [{"name": "first", "keep": 1}, {"name": "last", "set": {"evaluate": {"tasks": []}}}]
    asked = {"scheduler": {"method": "race", "rungs": rungs}}
    by_accuracy = {**asked, "select": {"metric": "accuracy.mean"}}
    with pytest.raises(SpecError, match=r"select.metric: .*evaluate.tasks is empty"):
        plan_with(load(sweep(tmp_path, BY_AN_AXIS, **by_accuracy)), {})
    plan_with(load(sweep(tmp_path, BY_AN_AXIS, **asked, select={"metric": "lm_loss.after"})), {})


def test_a_mistake_in_a_later_rung_is_told_before_the_first(tmp_path: Path) -> None:
    rungs = [RUNGS[0], {"name": "last", "set": {"distill.training.steps": "two"}}]
    path = sweep(tmp_path, BY_AN_AXIS, scheduler={"method": "race", "rungs": rungs})
    with pytest.raises(SpecError, match=r"small.yaml:\d+: distill.training.steps: is 'two'"):
        plan_with(load(path), {})


@pytest.mark.parametrize(
    ("axes", "metric"),
    [
        (ASKED, "accuracy.agreement"),
        ({"distill.heldout_every": [5, 10]}, "lm_loss.after"),
        ({"timed": {"variants": {"no": {}, "yes": {"benchmark": LOADS}}}}, "throughput.mean"),
    ],
)
def test_what_some_trials_measure_may_be_gone_by(
    tmp_path: Path, axes: dict[str, Any], metric: str
) -> None:
    stops = {"method": "asha", "floor_tokens": 9} if "distill.heldout_every" in axes else {}
    path = sweep(tmp_path, axes, select={"metric": metric}, scheduler=stops)
    assert plan_with(load(path), {}).trials
