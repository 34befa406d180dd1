"""Which configuration is best, which are as good, and which of them wins. Pure.

A configuration is what trials share that differ in nothing but the seed. Accuracies are compared
on the questions of the `select` half: the interval is a percentile bootstrap over the questions
(resampled within each task, since `accuracy.mean` is the plain mean over tasks), and two
configurations are compared on the same resamples, so that questions which are hard for both cancel.
Other metrics have no questions; their intervals are Student's t over the seeds.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

from orchestrator.asked import key_of, keys_meant
from orchestrator.records import TEACHER, Records, TrialRecord
from orchestrator.wording import shortest_names

Mode = Literal["max", "min"]
Array = npt.NDArray[np.float64]

CONFIDENCE = 0.95
RESAMPLES = 2000
ROUNDING = 1e-12
"""Differences of means below this are rounding."""
SEED = 0


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval, where one can be given."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def half_width(self) -> float | None:
        """Half of the interval's length."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


@dataclass(frozen=True)
class Configuration:
    """Trials that differ in nothing but the seed, with what the metric is over those seeds.

    `trials` are those that completed with a value; `unfinished` counts the others.
    `spread` is the standard deviation over seeds (n - 1), None for a single seed. `behind` is how
    much worse than the best this one is (0 or more unless the interval says otherwise), and `tied`
    says that the interval of that difference contains 0.
    """

    label: str
    baseline: str | None
    axes: Mapping[str, Any]
    trials: tuple[TrialRecord, ...]
    unfinished: int
    estimate: Estimate
    spread: float | None
    behind: Estimate
    tied: bool

    @property
    def parameters(self) -> int | None:
        """Parameters of the largest student among the seeds."""
        return max((t.parameters for t in self.trials if t.parameters is not None), default=None)

    @property
    def tokens_trained(self) -> int | None:
        """Most tokens that a seed was trained on."""
        tokens = (t.tokens_trained for t in self.trials)
        return max((count for count in tokens if count is not None), default=None)


@dataclass(frozen=True)
class Ranking:
    """Configurations by the metric's mean over seeds, best first. The teacher is not among them."""

    metric: str
    mode: Mode
    configurations: tuple[Configuration, ...]
    records: Records = field(repr=False)

    @property
    def tied(self) -> tuple[Configuration, ...]:
        """The best configuration and those that cannot be told from it."""
        return tuple(each for each in self.configurations if each.tied)


@dataclass(frozen=True)
class Winner:
    """The chosen configuration and, within it, the trial (seed) with the best selected value.

    `selected` is what it was chosen by, `reported` the accuracy of the chosen trial on the other
    half of the questions. The teacher's values stand beside them, None where it was not measured.
    """

    configuration: Configuration
    trial: TrialRecord
    selected: Estimate
    reported: Estimate | None
    teacher_selected: Estimate | None
    teacher_reported: Estimate | None
    tied: tuple[Configuration, ...]
    """Other configurations that cannot be told from the best."""


# --- groups and names ------------------------------------------------------------------------


def canonical(value: Any) -> str:
    """One text per axis value: 1 and 1.0 are the same value, 1 and true are not."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def configuration_key(trial: TrialRecord) -> tuple[str, ...]:
    """Equal for trials that differ in nothing but the seed."""
    axes = (f"{name}={canonical(trial.axes[name])}" for name in sorted(trial.axes))
    return (trial.baseline or "", *axes)


def groups(trials: Iterable[TrialRecord]) -> list[list[TrialRecord]]:
    """Trials by configuration, in the order in which configurations first appear."""
    found: dict[tuple[str, ...], list[TrialRecord]] = {}
    for trial in trials:
        found.setdefault(configuration_key(trial), []).append(trial)
    return list(found.values())


def axis_names(records: Records) -> dict[str, str]:
    """Dotted axis -> the shortest end of its name that no other axis shares."""
    return shortest_names({name for trial in records.trials for name in trial.axes})


def labels(records: Records) -> dict[str, str]:
    """Trial id -> a short name of its configuration: the axes that vary, or the baseline."""
    short = axis_names(records)
    grid = [trial for trial in records.trials if trial.baseline is None]
    values = {
        name: {canonical(t.axes[name]) if name in t.axes else None for t in grid} for name in short
    }

    def label(trial: TrialRecord) -> str:
        shown = [name for name in sorted(trial.axes) if len(values[name]) > 1 or trial.baseline]
        axes = ", ".join(f"{short[name]}={canonical(trial.axes[name])}" for name in shown)
        if trial.baseline is None:
            return axes or "trial"
        return f"{trial.baseline} ({axes})" if axes else trial.baseline

    return {trial.trial_id: label(trial) for trial in records.trials}


# --- intervals -------------------------------------------------------------------------------


class Questions:
    """The answers of one half of the questions, and bootstrap means over them.

    `task` is a task's name or `mean`. Every group is seen on the same questions (those that all
    of them answered) and the same resamples, so differences between groups are paired.
    """

    def __init__(self, records: Records, task: str, split: Literal["select", "report"]) -> None:
        # A trial that was stopped may have fewer answers, which must not narrow the comparison.
        completed = {trial.trial_id for trial in records.trials if trial.status == "completed"}
        self._answers: dict[str, dict[tuple[str, str], float]] = {}
        for item in records.items:
            wanted = item.split == split and task in ("mean", item.task)
            if wanted and item.trial_id in completed:
                answers = self._answers.setdefault(item.trial_id, {})
                answers[item.task, item.item_id] = item.correct

    @cached_property
    def common(self) -> list[tuple[str, str]]:
        """The questions that every trial with answers has, by task and id."""
        sets = [set(answers) for answers in self._answers.values()]
        return sorted(set.intersection(*sets)) if sets else []

    def resampled(self, trial_ids: Sequence[str]) -> Array | None:
        """Bootstrap means of the group's accuracy, None where a trial has no answers."""
        if not self.common or not trial_ids or not self._answers.keys() >= set(trial_ids):
            return None
        # Whole answers are added up exactly and divided once, so that the last bit of a sum does
        # not depend on the order in which a machine adds.
        mine = [self._answers[trial_id] for trial_id in trial_ids]
        total = np.array([math.fsum(each[key] for each in mine) for key in self.common])
        means = [counts @ total[rows] / (len(rows) * len(mine)) for rows, counts in self._resamples]
        return np.asarray(np.mean(means, axis=0), dtype=np.float64)

    def estimate(self, value: float, trial_ids: Sequence[str]) -> Estimate:
        """`value` with the percentile interval of the group's accuracy."""
        return _percentiles(value, self.resampled(trial_ids))

    @cached_property
    def _resamples(self) -> list[tuple[npt.NDArray[np.int64], Array]]:
        """For every task: its rows in `common`, and how often each resample drew each of them."""
        random = np.random.default_rng(SEED)
        tasks = np.array([task for task, _ in self.common])
        found = []
        for task in sorted(set(tasks.tolist())):
            rows = np.flatnonzero(tasks == task)
            found.append((rows, _draws(random, len(rows))))
        return found


def _draws(random: np.random.Generator, questions: int) -> Array:
    drawn = np.empty((RESAMPLES, questions), dtype=np.float64)
    for row in range(RESAMPLES):
        picked = random.integers(0, questions, questions)
        drawn[row] = np.bincount(picked, minlength=questions)
    return drawn


def _percentiles(value: float, means: Array | None) -> Estimate:
    if means is None:
        return Estimate(value)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Estimate(value, float(low), float(high))


def over_seeds(values: Sequence[float]) -> Estimate:
    """The mean with Student's t interval; no interval for a single value."""
    value = statistics.fmean(values)
    if len(values) < 2:
        return Estimate(value)
    error = statistics.stdev(values) / math.sqrt(len(values))
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * error
    return Estimate(value, value - reach, value + reach)


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation (n - 1); None for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def task_of(metric: str) -> tuple[str, Literal["select", "report"]] | None:
    """`accuracy.<task>` and `accuracy_report.<task>` -> the task (or `mean`) and the half."""
    kind, _, task = metric.partition(".")
    if kind == "accuracy":
        return task, "select"
    return (task, "report") if kind == "accuracy_report" else None


def value_of(trial: TrialRecord, metric: str) -> float | None:
    """The trial's metric where it completed and has a finite value."""
    value = trial.metrics.get(metric)
    known = trial.status == "completed" and value is not None and math.isfinite(value)
    return value if known else None


# --- ranking ---------------------------------------------------------------------------------


def rank(
    records: Records,
    metric: str = "accuracy.mean",
    mode: Mode = "max",
    among: Mapping[str, Any] | None = None,
) -> Ranking | None:
    """Configurations by the metric's mean over seeds; None where no trial completed with a value.

    Stopped and failed trials and values that are no number are left out, and so is the teacher, and
    so are trials of the grid whose axes are not `among` the values meant.
    """
    sign = 1.0 if mode == "max" else -1.0
    names = labels(records)
    candidates = []
    for group in groups(trial for trial in records.trials if _may_win(trial, among or {})):
        measured = tuple(trial for trial in group if value_of(trial, metric) is not None)
        if measured:
            candidates.append((measured, len(group) - len(measured)))
    if not candidates:
        return None
    measure = Measure(records, metric)
    # Sorting is stable: equal means stay in the order of the sweep file.
    candidates.sort(key=lambda pair: -sign * measure.mean(pair[0]))
    best = candidates[0][0]
    return Ranking(
        metric=metric,
        mode=mode,
        records=records,
        configurations=tuple(
            _configuration(names[trials[0].trial_id], trials, unfinished, measure, best, sign)
            for trials, unfinished in candidates
        ),
    )


def _may_win(trial: TrialRecord, among: Mapping[str, Any]) -> bool:
    if trial.baseline is not None:
        return trial.baseline != TEACHER
    keys = {name: key_of(value) for name, value in trial.axes.items()}
    return all(
        name in keys and keys[name] in keys_meant(wanted, {keys[name]})
        for name, wanted in among.items()
    )


def _configuration(
    label: str,
    trials: tuple[TrialRecord, ...],
    unfinished: int,
    measure: Measure,
    best: tuple[TrialRecord, ...],
    sign: float,
) -> Configuration:
    behind = measure.difference(best, trials, sign)
    known = behind.low is not None and behind.high is not None
    contains_zero = known and (behind.low or 0.0) <= ROUNDING and (behind.high or 0.0) >= -ROUNDING
    return Configuration(
        label=label,
        baseline=trials[0].baseline,
        axes=trials[0].axes,
        trials=trials,
        unfinished=unfinished,
        estimate=measure.estimate(trials),
        spread=spread(measure.values(trials)),
        behind=behind,
        tied=trials is best or contains_zero or (not known and abs(behind.value) <= ROUNDING),
    )


class Measure:
    """Means, intervals and paired differences of one metric over groups of completed trials."""

    def __init__(self, records: Records, metric: str) -> None:
        self._metric = metric
        about = task_of(metric)
        self._questions = Questions(records, *about) if about else None

    def values(self, trials: Sequence[TrialRecord]) -> list[float]:
        """The values of the trials that have one."""
        values = (value_of(trial, self._metric) for trial in trials)
        return [value for value in values if value is not None]

    def mean(self, trials: Sequence[TrialRecord]) -> float:
        """Mean over the trials, at least one of which has a value."""
        return statistics.fmean(self.values(trials))

    def estimate(self, trials: Sequence[TrialRecord]) -> Estimate:
        """The mean with its interval over questions, or over seeds where there are none."""
        if self._questions is None:
            return over_seeds(self.values(trials))
        return self._questions.estimate(self.mean(trials), _ids(trials))

    def difference(
        self, best: Sequence[TrialRecord], other: Sequence[TrialRecord], sign: float
    ) -> Estimate:
        """How much better `best` is, paired by question, or by seed where there are none."""
        value = sign * (self.mean(best) - self.mean(other))
        if best is other:
            return Estimate(0.0, 0.0, 0.0)
        if self._questions is None:
            return self._over_common_seeds(value, best, other, sign)
        first, second = (self._questions.resampled(_ids(group)) for group in (best, other))
        if first is None or second is None:
            return Estimate(value)
        return _percentiles(value, sign * (first - second))

    def _over_common_seeds(
        self, value: float, best: Sequence[TrialRecord], other: Sequence[TrialRecord], sign: float
    ) -> Estimate:
        first, second = (
            dict(zip((t.seed for t in group), self.values(group), strict=True))
            for group in (best, other)
        )
        common = [sign * (first[seed] - second[seed]) for seed in sorted(first.keys() & second)]
        if len(common) < 2:
            return Estimate(value)
        paired = over_seeds(common)
        return Estimate(value, paired.low, paired.high)


def _ids(trials: Sequence[TrialRecord]) -> list[str]:
    return [trial.trial_id for trial in trials]


# --- the winner ------------------------------------------------------------------------------


def winner(ranking: Ranking | None) -> Winner | None:
    """The cheapest configuration among those tied with the best: fewest parameters, then fewest
    tokens trained, then the better mean. None where there is no ranking."""
    if ranking is None:
        return None
    sign = 1.0 if ranking.mode == "max" else -1.0
    chosen = min(ranking.tied, key=_cost)
    # Seeds with equal values: the lowest seed, so that the choice does not hang on row order.
    trial = max(chosen.trials, key=lambda t: (sign * (value_of(t, ranking.metric) or 0.0), -t.seed))
    teacher = [t for t in ranking.records.trials if t.baseline == TEACHER]
    report = report_metric(ranking.metric)
    return Winner(
        configuration=chosen,
        trial=trial,
        selected=_required(estimate(ranking.records, [trial], ranking.metric)),
        reported=estimate(ranking.records, [trial], report),
        teacher_selected=estimate(ranking.records, teacher, ranking.metric),
        teacher_reported=estimate(ranking.records, teacher, report),
        tied=tuple(each for each in ranking.tied if each is not chosen),
    )


def _cost(configuration: Configuration) -> tuple[float, float]:
    # `min` keeps the first of equals, and the ranking lists better means first.
    unknown = math.inf
    parameters, tokens = configuration.parameters, configuration.tokens_trained
    return (
        unknown if parameters is None else parameters,
        unknown if tokens is None else tokens,
    )


def _required(value: Estimate | None) -> Estimate:
    assert value is not None, "a ranked trial has a value"
    return value


def report_metric(metric: str) -> str:
    """The accuracy on the half of the questions that took no part in choosing by `metric`."""
    about = task_of(metric)
    return f"accuracy_report.{about[0]}" if about else "accuracy_report.mean"


def estimate(records: Records, trials: Sequence[TrialRecord], metric: str) -> Estimate | None:
    """A metric's mean over the trials that have it, with its interval; None where none has."""
    measured = [trial for trial in trials if value_of(trial, metric) is not None]
    return Measure(records, metric).estimate(measured) if measured else None
