"""Early stopping: who is stopped, when, and on what grounds."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from orchestrator.records import CurvePoint
from orchestrator.scheduling import Scheduler
from orchestrator.spec import load
from orchestrator.stopping import HELDOUT, Judge, judge_of

ASHA = Scheduler(method="asha", floor_tokens=100, reduction=3)
MEDIAN = Scheduler(method="median", floor_tokens=100, at_least=2)
BOTH = pytest.mark.parametrize("scheduler", [ASHA, MEDIAN], ids=lambda each: each.method)


@pytest.mark.parametrize("method", ["none", "asha", "median"])
def test_one_sweep_file_can_be_run_under_either_rule_and_without(method: str) -> None:
    settings = [f"scheduler.method={method}", "scheduler.at_least=2"]
    asked = load(Path(__file__).parent.parent / "sweeps" / "early_stopping.yaml", None, settings)
    assert (asked.scheduler.reduction, asked.scheduler.at_least) == (5, 2)


def told(judge: Judge, losses: dict[str, float], tokens: int, seed: int = 0) -> set[str]:
    """Who is to stop, of those that measured these losses in this order."""
    return {name for name, loss in losses.items() if judge.stops(name, seed, tokens, loss)}


@BOTH
def test_nobody_is_stopped_before_the_floor(scheduler: Scheduler) -> None:
    judge = judge_of(scheduler, 1000)
    for tokens in (20, 60, 99):
        assert told(judge, {"a": 1.0, "b": 2.0, "c": 3.0, "d": 90.0}, tokens) == set()


@BOTH
def test_the_worst_is_stopped_and_the_best_never(scheduler: Scheduler) -> None:
    judge = judge_of(scheduler, 1000)
    losses = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0, "e": 5.0, "f": 6.0}
    stopped = told(judge, losses, 100)
    assert "f" in stopped
    for tokens in (200, 300, 600, 900, 1000):
        assert not judge.stops("a", 0, tokens, 0.5)


@pytest.mark.parametrize("reduction", [2, 3, 5])
def test_halving_lets_one_in_reduction_pass_each_rung(reduction: int) -> None:
    scheduler = Scheduler(method="asha", floor_tokens=100, reduction=reduction)
    order = list(range(30))
    random.Random(0).shuffle(order)

    def passes(loss: int, tokens: int) -> bool:
        """Of one that comes last: who comes early is judged by few."""
        judge = judge_of(scheduler, 900)
        told(judge, {f"t{i}": float(i) for i in order}, tokens)
        return not judge.stops("last", 0, tokens, float(loss))

    for rung in (100, 100 * reduction):
        assert [loss for loss in range(30) if passes(loss, rung)] == list(range(30 // reduction))


@BOTH
def test_a_judge_remembers_what_earlier_runs_measured(scheduler: Scheduler) -> None:
    names = {"a": 1.0, "b": 1.1, "c": 1.2, "d": 1.3}
    curves = [
        CurvePoint(trial_id=name, step=t, tokens=t, name=HELDOUT, value=loss, time_ms=t)
        for name, loss in names.items()
        for t in (50, 100)
    ]
    seeds = dict.fromkeys(names, 0)
    fresh, taught = judge_of(scheduler, 1000), judge_of(scheduler, 1000, curves, seeds)
    assert not fresh.stops("new", 0, 100, 9.0)
    assert taught.stops("new", 0, 100, 9.0)


@BOTH
def test_a_trial_is_held_against_those_of_its_own_seed(scheduler: Scheduler) -> None:
    judge = judge_of(scheduler, 1000)
    hard = {f"hard {name}": 10.0 + loss for name, loss in enumerate((1.0, 1.1, 1.2))}
    easy = {f"easy {name}": loss for name, loss in enumerate((1.0, 1.1, 1.2))}
    told(judge, easy, 100, seed=0)
    assert "hard 0" not in told(judge, hard, 100, seed=1)
    assert judge.stops("easy worst", 0, 100, 1.3)


@BOTH
def test_a_loss_that_is_no_number_is_left_to_the_stage(scheduler: Scheduler) -> None:
    judge = judge_of(scheduler, 1000)
    told(judge, {"a": 1.0, "b": 2.0, "c": 3.0}, 100)
    assert not judge.stops("d", 0, 100, math.nan)


def test_without_early_stopping_nobody_is_stopped() -> None:
    judge = judge_of(Scheduler(), 1000)
    assert told(judge, {"a": 1.0, "b": 99.0}, 1000) == set()
