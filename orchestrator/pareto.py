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
from orchestrator.selection import Estimate, Measure, groups, labels, value_of

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
    """A configuration: both objectives' means over those seeds that have both.

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
    first, second = _Objective(records, x), _Objective(records, y)
    found = []
    for group in groups(records.trials):
        trials = [t for t in group if first.of(t) is not None and second.of(t) is not None]
        if trials:
            about = trials[0]
            estimates = first.estimate(trials), second.estimate(trials)
            name = names[about.trial_id]
            found.append(Point(name, about.baseline, *estimates, tuple(trials), False))
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

    def estimate(self, trials: Sequence[TrialRecord]) -> Estimate:
        """The mean over trials that have a value; a metric's with its interval."""
        if self._measure is not None:
            return self._measure.estimate(trials)
        return Estimate(statistics.fmean(getattr(trial, self._name) for trial in trials))
