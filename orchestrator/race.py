"""A race: every candidate runs the first rung, the best of each rung run the next (practice 9).

A rung is a set of settings laid over the trial's, such as the length of its distillation. Which
trials there are depends on what the earlier ones measured, so `settled` is asked again and again.
Imports neither torch nor, before a rung is decided, scipy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from orchestrator.asked import key_of, lower_is_better
from orchestrator.space import Space, Trial, next_rung
from orchestrator.spec import Sweep

if TYPE_CHECKING:
    from orchestrator.records import TrialRecord


def settled(sweep: Sweep, space: Space, ended: Mapping[str, TrialRecord]) -> Space:
    """The space with the trials of every later rung that `ended` decides: those that completed or
    failed, by id. A rung is decided when all its trials have ended."""
    rungs = sweep.scheduler.rungs
    trials = list(space.trials)
    current = [trial for trial in trials if trial.rung == 0]
    for number, rung in enumerate(rungs[:-1]):
        if not current or any(trial.trial_id not in ended for trial in current):
            break
        assert rung.keep is not None
        best = survivors(current, ended, sweep.scheduler.metric, rung.keep)
        current = list(next_rung(sweep, best, number + 1))
        known = {trial.trial_id for trial in trials}
        trials += [trial for trial in current if trial.trial_id not in known]
    return Space(tuple(trials), space.left_out)


def survivors(
    trials: Sequence[Trial], ended: Mapping[str, TrialRecord], metric: str, keep: int
) -> list[Trial]:
    """All seeds of the `keep` configurations with the best mean of the metric, as if all had been
    measured with all seeds; a configuration without a single measurement never survives, and the
    earlier of equals does."""
    from orchestrator.inference import adjusted_means  # scipy, which a plan seldom needs

    sign = 1.0 if lower_is_better(metric) else -1.0
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(key_of(trial.axes), []).append(trial)
    measured = [(_by_seed(group, ended, metric), group) for group in groups.values()]
    measured = [(values, group) for values, group in measured if values]
    means = adjusted_means([values for values, _ in measured]) if measured else []
    order = sorted(range(len(means)), key=lambda place: sign * means[place])
    return [trial for place in order[:keep] for trial in measured[place][1]]


def _by_seed(
    group: Sequence[Trial], ended: Mapping[str, TrialRecord], metric: str
) -> dict[int, float]:
    values = {trial.seed: ended[trial.trial_id].metrics.get(metric) for trial in group}
    return {s: value for s, value in values.items() if value is not None and math.isfinite(value)}
