"""Records -> which configurations nothing else beats in both of two objectives. Pure.

An objective is a metric (`accuracy.mean`, `lm_loss.after`, `throughput.<combo>`) or a size or cost
of a trial (`COSTS`); its name says whether less or more of it is better.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from orchestrator.asked import lower_is_better
from orchestrator.records import TEACHER, Records, TrialRecord
from orchestrator.selection import Estimate, Measure, adjusted_means, groups, labels, value_of

COSTS = (
    "parameters",
    "parameters_non_embedding",
    "tokens_trained",
    "cpu_s",
    "gpu_s",
    "wall_s",
)
"""What a trial is recorded with beside its metrics. Less is better."""


@dataclass(frozen=True)
class Point:
    """A configuration: both objectives' means over those seeds that have both, as they would be
    with the seeds of all (`adjusted_means`), so that nobody is ahead for having had the easy ones.

    `efficient`: no other configuration is as good in both objectives and better in one. Never true
    of the teacher, which is there for comparison.
    """

    label: str
    baseline: str | None
    x: Estimate
    y: Estimate
    trials: tuple[TrialRecord, ...]
    efficient: bool


def front(records: Records, x: str, y: str) -> tuple[Point, ...]:
    """The efficient configurations in the order of `x`; empty where no trial has both."""
    return tuple(point for point in points(records, x, y) if point.efficient)


def points(records: Records, x: str, y: str) -> tuple[Point, ...]:
    """Every configuration, and the teacher, that has both objectives, in the order of `x`."""
    names = labels(records)
    objectives = _Objective(records, x), _Objective(records, y)
    measured = [
        trials
        for group in groups(records.trials)
        if (trials := [t for t in group if all(o.of(t) is not None for o in objectives)])
    ]
    first, second = (objective.estimates(measured) for objective in objectives)
    found = [
        Point(names[trials[0].trial_id], trials[0].baseline, one, other, tuple(trials), False)
        for trials, one, other in zip(measured, first, second, strict=True)
    ]
    rivals = [point for point in found if point.baseline != TEACHER]
    marked = (replace(p, efficient=_efficient(p, rivals, x, y)) for p in found)
    return tuple(sorted(marked, key=lambda point: (point.x.value, point.y.value, point.label)))


def _efficient(point: Point, rivals: Sequence[Point], x: str, y: str) -> bool:
    if point.baseline == TEACHER:
        return False
    return not any(_dominates(other, point, x, y) for other in rivals)


def _dominates(one: Point, other: Point, x: str, y: str) -> bool:
    gains = (_gain(x, one.x, other.x), _gain(y, one.y, other.y))
    return min(gains) >= 0 and max(gains) > 0


def _gain(objective: str, one: Estimate, other: Estimate) -> float:
    """How much better `one` is."""
    difference = one.value - other.value
    return -difference if objective in COSTS or lower_is_better(objective) else difference


class _Objective:
    """Values of one objective."""

    def __init__(self, records: Records, name: str) -> None:
        self._name = name
        self._measure = None if name in COSTS else Measure(records, name)

    def of(self, trial: TrialRecord) -> float | None:
        """The trial's value, where it completed and has a finite one."""
        if self._measure is not None:
            return value_of(trial, self._name)
        value = getattr(trial, self._name)
        known = trial.status == "completed" and value is not None and math.isfinite(value)
        return float(value) if known else None

    def estimates(self, measured: Sequence[Sequence[TrialRecord]]) -> list[Estimate]:
        """Of every group of trials that have a value, the mean; a metric's with its interval. The
        teacher, which may have no seeds, adjusts nothing."""
        plain = [self._plain(trials) for trials in measured]
        students = [i for i, trials in enumerate(measured) if trials[0].baseline != TEACHER]
        by_seed = [{t.seed: self._required(t) for t in measured[i]} for i in students]
        varies = any(len(set(values.values())) > 1 for values in by_seed)  # a size does not
        means = dict(zip(students, adjusted_means(by_seed), strict=True)) if varies else {}
        return [_moved(each, means.get(i, each.value)) for i, each in enumerate(plain)]

    def _plain(self, trials: Sequence[TrialRecord]) -> Estimate:
        if self._measure is not None:
            return self._measure.estimate(trials)
        return Estimate(statistics.fmean(map(self._required, trials)))

    def _required(self, trial: TrialRecord) -> float:
        value = self.of(trial)
        assert value is not None, "only trials with a value are asked"
        return value


def _moved(estimate: Estimate, value: float) -> Estimate:
    by = value - estimate.value
    if estimate.low is None or estimate.high is None:
        return Estimate(value)
    return Estimate(value, estimate.low + by, estimate.high + by)
