"""Which configuration is best, which are as good, and which of them wins. Pure.

A configuration is what trials share that differ in nothing but the seed. Accuracies are compared
on the questions of the `select` half; other metrics have no questions. Intervals are over questions
and seeds as far as there are several of them (`orchestrator.inference`), and a comparison of two
configurations is paired in both: the same questions, the same seeds.

Every configuration is tested against the best. With one seed that is McNemar's exact test; with
several, what noise the seeds make is estimated from all configurations together and, lest a pair
that is far noisier than the others passes by their lack of noise, from the two alone. Those that
the tests, the first corrected after Holm for their number, do not both tell from the best are tied
with it: the truly best one is then among the tied with 95% confidence (Hsu, 1984, Annals of
Statistics 12).

Where configurations have different seeds, as trials failed or were stopped, they are ranked by the
means that they would have with all of them, and who is no worse than the best on the seeds that
both have is tied with it. Where nothing was repeated, no seed is shared or no seed changes
anything, there is no test: the best is the best of one draw, and nobody was found to be worse.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np

from orchestrator.answers import Questions, task_of, value_of
from orchestrator.asked import key_of, keys_meant, lower_is_better
from orchestrator.inference import (
    CONFIDENCE,
    ROUNDING,
    Array,
    Estimate,
    QuestionNoise,
    SeedNoise,
    adjusted_means,
    holm,
    interval,
    over_seeds,
    p_value,
    pooled_noise,
    seed_noise,
    welch_noise,
)
from orchestrator.records import TEACHER, Records, TrialRecord
from orchestrator.wording import shortest_names

__all__ = [
    "Comparison",
    "Configuration",
    "Estimate",
    "Measure",
    "Mode",
    "Ranking",
    "Winner",
    "adjusted_means",
    "axis_names",
    "canonical",
    "configuration_key",
    "estimate",
    "groups",
    "labels",
    "over_seeds",
    "rank",
    "report_metric",
    "spread",
    "task_of",
    "value_of",
    "winner",
]

Mode = Literal["max", "min"]


@dataclass(frozen=True)
class Configuration:
    """Trials that differ in nothing but the seed, with what the metric is over those seeds.

    `trials` are those that completed with a value; `unfinished` counts the others, which failed or
    were stopped.
    `spread` is the standard deviation over seeds (n - 1), None for a single seed. `behind` is how
    much worse than the best this one is, with the seeds that both have, and its interval.
    `p_value` is that of the test that it is no worse, after Holm's correction; None where nothing
    was repeated, and of the best itself. `tied`: it is no worse, or the test does not tell it from
    the best.
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
    p_value: float | None = None

    @property
    def untested(self) -> bool:
        """Whether it only came out worse: nothing was repeated that would tell luck from merit."""
        return not self.tied and self.p_value is None

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
    half of the questions, and `over_seeds` that of the configuration: a trial that was chosen as
    the best of several seeds is better than its configuration mostly is. Beside them stand the
    values of the trial's own teacher and of the teachers of all seeds, None where not measured.
    """

    configuration: Configuration
    trial: TrialRecord
    selected: Estimate
    reported: Estimate | None
    over_seeds: Estimate | None
    teacher_selected: Estimate | None
    teacher_reported: Estimate | None
    teacher_over_seeds: Estimate | None
    tied: tuple[Configuration, ...]
    """Other configurations that cannot be told from the best."""
    untested: tuple[Configuration, ...]
    """Those that came out worse, and were not tested."""


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


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation (n - 1); None for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


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
    means = adjusted_means([measure.by_seed(trials) for trials, _ in candidates])
    # Sorting is stable: equal means stay in the order of the sweep file.
    order = sorted(range(len(means)), key=lambda place: -sign * means[place])
    candidates = [candidates[place] for place in order]
    measured_all = [trials for trials, _ in candidates]
    comparisons = measure.against_best(measured_all, sign)
    return Ranking(
        metric=metric,
        mode=mode,
        records=records,
        configurations=tuple(
            _configuration(names[trials[0].trial_id], trials, unfinished, measure, comparison)
            for (trials, unfinished), comparison in zip(candidates, comparisons, strict=True)
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
    comparison: Comparison,
) -> Configuration:
    return Configuration(
        label=label,
        baseline=trials[0].baseline,
        axes=trials[0].axes,
        trials=trials,
        unfinished=unfinished,
        estimate=measure.estimate(trials),
        spread=spread(measure.values(trials)),
        behind=comparison.difference,
        tied=comparison.equal,
        p_value=comparison.p_value,
    )


@dataclass(frozen=True)
class Comparison:
    """A difference, and the p-value of there being none; None where nothing was repeated."""

    difference: Estimate
    p_value: float | None

    @property
    def equal(self) -> bool:
        """Whether the other is no worse, or the two cannot be told apart."""
        if self.difference.value <= ROUNDING:
            return True
        return self.p_value is not None and self.p_value >= 1 - CONFIDENCE


class Measure:
    """Means, intervals and paired comparisons of one metric over groups of completed trials."""

    def __init__(self, records: Records, metric: str) -> None:
        self._records, self._metric = records, metric
        about = task_of(metric)
        self._questions = Questions(records, *about) if about else None

    @cached_property
    def sign(self) -> float:
        """-1 for a metric that is better low, 1 for any other."""
        about = task_of(self._metric)
        apart = Questions(self._records, "mean", about[1]).apart if about else ()
        low = lower_is_better(self._metric) or (about is not None and about[0] in apart)
        return -1.0 if low else 1.0

    @property
    def has_questions(self) -> bool:
        """Whether the metric is a mean over questions."""
        return self._questions is not None

    def values(self, trials: Sequence[TrialRecord]) -> list[float]:
        """The values of the trials that have one."""
        values = (value_of(trial, self._metric) for trial in trials)
        return [value for value in values if value is not None]

    def by_seed(self, trials: Sequence[TrialRecord]) -> dict[int, float]:
        """The values of the trials that have one, by seed."""
        values = {trial.seed: value_of(trial, self._metric) for trial in trials}
        return {seed: value for seed, value in values.items() if value is not None}

    def mean(self, trials: Sequence[TrialRecord]) -> float:
        """Mean over the trials, at least one of which has a value."""
        return statistics.fmean(self.values(trials))

    def estimate(self, trials: Sequence[TrialRecord]) -> Estimate:
        """The mean with its interval over the seeds, and over the questions where there are any."""
        answers = self.answers(trials)
        questions = self.noise(list(answers.values())) if answers is not None else None
        found = interval(self.mean(trials), seed_noise(self.values(trials)), questions)
        return _share(found) if self.is_share(trials) else found

    def is_share(self, trials: Sequence[TrialRecord]) -> bool:
        """Whether the trials' values are shares of questions, which lie between 0 and 1."""
        of_shares = self._questions is not None and self._questions.are_shares
        return of_shares and all(0 <= value <= 1 for value in self.values(trials))

    def answers(self, trials: Iterable[TrialRecord]) -> dict[str, Array] | None:
        """By trial, the answers to the questions that all trials answered, in one order; None
        where there are none."""
        if self._questions is None:
            return None
        return self._questions.answers(trial.trial_id for trial in trials)

    def value_on(self, trial: TrialRecord, answers: Mapping[str, Array]) -> float:
        """The trial's mean over the questions of `answers`: as recorded, to the last bit, where it
        answered no others."""
        assert self._questions is not None, "answers are of questions"
        recorded = value_of(trial, self._metric)
        if recorded is not None and not self._questions.answered_more(trial.trial_id):
            return recorded
        return self._questions.resamples.mean(answers[trial.trial_id])

    def noise(self, rows_SQ: Sequence[Array]) -> QuestionNoise:
        """What the questions do to a mean over seeds of sums or differences of `answers`."""
        assert self._questions is not None, "answers are of questions"
        return self._questions.resamples.noise(np.stack(rows_SQ))

    def compare(
        self,
        best: Sequence[TrialRecord],
        other: Sequence[TrialRecord],
        sign: float = 1.0,
        pooled: SeedNoise | None = None,
    ) -> Comparison:
        """How much better `best` is, question by question and seed by seed.

        Only seeds that both have count; where there are none, the groups are compared as wholes,
        after Welch. `pooled`: what the seeds do to such a difference, known from more than these.
        """
        pairs = _pairs_by_seed(best, other)
        wholes = pairs or [(best, other)]
        answers = self.answers([*best, *other])

        def mean(trials: Sequence[TrialRecord]) -> float:
            if answers is None:
                return self.mean(trials)
            return statistics.fmean(self.value_on(trial, answers) for trial in trials)

        effects = [sign * (mean(first) - mean(second)) for first, second in wholes]
        if not pairs:
            seeds = welch_noise(self.values(best), self.values(other))
        else:
            seeds = _of_mean(pooled, len(pairs)) if pooled else seed_noise(effects)
        # Seeds that change nothing are no repetitions.
        if seeds is not None and math.sqrt(seeds.variance) <= ROUNDING:
            seeds = None
        value = statistics.fmean(effects)
        if answers is None:
            test = None if seeds is None else p_value(value, seeds, None)
            return Comparison(interval(value, seeds), test)
        rows = [sign * (_mean(first, answers) - _mean(second, answers)) for first, second in wholes]
        questions = self.noise(rows)
        test = self._sign_test(rows) if seeds is None else p_value(value, seeds, questions)
        return Comparison(interval(value, seeds, questions), test)

    def _sign_test(self, rows_SQ: Sequence[Array]) -> float:
        assert self._questions is not None, "answers are of questions"
        return self._questions.resamples.sign_test(np.mean(rows_SQ, axis=0))

    def against_best(
        self, ranked: Sequence[Sequence[TrialRecord]], sign: float
    ) -> list[Comparison]:
        """Each group against the first, with p-values after Holm's correction."""
        best, pooled = ranked[0], self._pooled(ranked)
        means = adjusted_means([self.by_seed(trials) for trials in ranked])
        found = [
            self.compare(best, other, sign, pooled)
            if _pairs_by_seed(best, other)
            # What the seeds make easier or harder is known, but not how much noise there is.
            else Comparison(Estimate(sign * (means[0] - mean)), None)
            for other, mean in zip(ranked[1:], means[1:], strict=True)
        ]
        tested = [each.p_value for each in found if each.p_value is not None]
        adjusted = iter(holm(tested))
        corrected = (
            each if each.p_value is None else Comparison(each.difference, next(adjusted))
            for each in found
        )
        both = (
            each if pooled is None else _less_sure(each, self.compare(best, other, sign))
            for each, other in zip(corrected, ranked[1:], strict=True)
        )
        return [Comparison(Estimate(0.0, 0.0, 0.0), None), *both]

    def _pooled(self, found: Sequence[Sequence[TrialRecord]]) -> SeedNoise | None:
        """From the groups that have all of the seeds that the largest has."""
        by_seed = [self.by_seed(trials) for trials in found]
        most = max(len(values) for values in by_seed)
        seeds = next(sorted(values) for values in by_seed if len(values) == most)
        whole = [each for each in by_seed if each.keys() >= set(seeds)]
        return pooled_noise([[each[seed] for seed in seeds] for each in whole])


def _less_sure(together: Comparison, alone: Comparison) -> Comparison:
    """Of two tests of a difference the one that is less sure of it, and the longer interval;
    `alone` counts only where it was made."""
    if together.p_value is None or alone.p_value is None:
        return together
    widths = together.difference.half_width or 0.0, alone.difference.half_width or 0.0
    difference = alone.difference if widths[1] > widths[0] else together.difference
    return Comparison(difference, max(together.p_value, alone.p_value))


Pair = tuple[Sequence[TrialRecord], Sequence[TrialRecord]]


def _pairs_by_seed(first: Sequence[TrialRecord], second: Sequence[TrialRecord]) -> list[Pair]:
    mine, theirs = ({trial.seed: trial for trial in group} for group in (first, second))
    common = sorted(mine.keys() & theirs.keys())
    return [((mine[seed],), (theirs[seed],)) for seed in common]


def _of_mean(noise: SeedNoise, seeds: int) -> SeedNoise:
    return SeedNoise(noise.variance / seeds, noise.freedom)


def _mean(trials: Sequence[TrialRecord], answers: Mapping[str, Array]) -> Array:
    rows = [answers[trial.trial_id] for trial in trials]
    return np.asarray(np.mean(rows, axis=0), dtype=np.float64)


def _share(estimate: Estimate) -> Estimate:
    """An accuracy's interval ends at 0 and 1."""
    if estimate.low is None or estimate.high is None:
        return estimate
    return Estimate(estimate.value, max(0.0, estimate.low), min(1.0, estimate.high))


# --- the winner ------------------------------------------------------------------------------


def winner(ranking: Ranking | None) -> Winner | None:
    """The cheapest configuration among those tied with the best: fewest parameters, then fewest
    tokens trained, then the better mean. None where there is no ranking.

    A baseline is there to be compared with, and wins only where no configuration of the grid is
    tied: with few questions, random weights of the smallest shape may be.
    """
    if ranking is None:
        return None
    sign = 1.0 if ranking.mode == "max" else -1.0
    of_grid = [each for each in ranking.tied if each.baseline is None]
    chosen = min(of_grid or ranking.tied, key=_cost)
    # Seeds with equal values: the lowest seed, so that the choice does not hang on row order.
    trial = max(chosen.trials, key=lambda t: (sign * (value_of(t, ranking.metric) or 0.0), -t.seed))
    teachers = [t for t in ranking.records.trials if t.baseline == TEACHER]
    # A model that no seed made is every seed's teacher.
    seeded = ranking.records.teachers_have_seeds
    its_own = [t for t in teachers if t.seed == trial.seed or not seeded]
    selected, reported = (
        partial(_estimate, Measure(ranking.records, metric))
        for metric in (ranking.metric, report_metric(ranking.metric))
    )
    return Winner(
        configuration=chosen,
        trial=trial,
        selected=_required(selected([trial])),
        reported=reported([trial]),
        over_seeds=reported(chosen.trials),
        teacher_selected=selected(its_own),
        teacher_reported=reported(its_own),
        teacher_over_seeds=reported(teachers),
        tied=tuple(each for each in ranking.tied if each is not chosen),
        untested=tuple(each for each in ranking.configurations if each.untested),
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
    return _estimate(Measure(records, metric), trials)


def _estimate(measure: Measure, trials: Sequence[TrialRecord]) -> Estimate | None:
    measured = [trial for trial in trials if measure.values([trial])]
    return measure.estimate(measured) if measured else None
