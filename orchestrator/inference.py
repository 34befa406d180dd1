"""What is known of a mean over questions and seeds: intervals and tests. Pure numbers, no records.

Two things might have come out otherwise: which questions were asked, and what the seeds drew.

- Questions are resampled within each task (a percentile bootstrap; a score is the plain mean over
  tasks), everything on the same resamples, so that questions which are hard for all cancel.
- Seeds get Student's t. To resample two or three of them gives intervals that are far too short:
  where only seeds vary, a percentile bootstrap over three finds an effect that is none in a
  quarter of the cases.
- Where both vary, their reaches are added in quadrature, which misses at most as often as each
  alone (Banerjee, 1960, Sankhya 22). Answers that differ by question and seed at once show in the
  spread of both, and are counted once.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt
from scipy import optimize, special, stats

Array = npt.NDArray[np.float64]

CONFIDENCE = 0.95
RESAMPLES = 2000
FLIPS = 99_999
ROUNDING = 1e-12
"""Differences of means below this are rounding."""
SEED = 0
_GRAIN = 2.0**-30
"""Answers are rounded to multiples of this, so that their sums are exact: the last bit of a sum
would else depend on the order in which a machine adds."""
_SMALLEST_P = 1e-9
_SLIGHT = 1e-9
"""How much an effect of a seed counts against one that data speak for."""


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


# --- seeds -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class SeedNoise:
    """Variance of a mean over seeds, estimated with so many degrees of freedom."""

    variance: float
    freedom: float

    def reach(self, p: float = 1 - CONFIDENCE) -> float:
        """How far the mean may be off, but for a chance of `p`."""
        return -float(special.stdtrit(self.freedom, p / 2)) * math.sqrt(self.variance)


def seed_noise(values: Sequence[float]) -> SeedNoise | None:
    """Of the mean of one value a seed; None for a single seed."""
    if len(values) < 2:
        return None
    return SeedNoise(statistics.variance(values) / len(values), len(values) - 1)


def welch_noise(first: Sequence[float], second: Sequence[float]) -> SeedNoise | None:
    """Of the difference of two means over seeds that they do not share (Welch, 1947, Biometrika
    34); None where one of them has a single seed."""
    noises = seed_noise(first), seed_noise(second)
    if noises[0] is None or noises[1] is None:
        return None
    variances = [noise.variance for noise in noises if noise]
    total = math.fsum(variances)
    parts = math.fsum(n.variance**2 / n.freedom for n in noises if n)
    return SeedNoise(total, total**2 / parts if parts else noises[0].freedom + noises[1].freedom)


def pooled_noise(values_CS: Sequence[Sequence[float]]) -> SeedNoise | None:
    """Of a difference of two of C configurations with one and the same seed, from all that differs
    between configurations with S seeds: twice the mean square of what the configurations' and the
    seeds' means leave (two-way analysis of variance). None where C or S is 1."""
    configurations, seeds = len(values_CS), len(values_CS[0]) if values_CS else 0
    if configurations < 2 or seeds < 2:
        return None
    by_configuration = [statistics.fmean(row) for row in values_CS]
    by_seed = [statistics.fmean(column) for column in zip(*values_CS, strict=True)]
    mean = statistics.fmean(by_configuration)
    squares = math.fsum(
        (value - mine - of_seed + mean) ** 2
        for row, mine in zip(values_CS, by_configuration, strict=True)
        for value, of_seed in zip(row, by_seed, strict=True)
    )
    freedom = (configurations - 1) * (seeds - 1)
    return SeedNoise(2 * squares / freedom, freedom)


def adjusted_means(by_seed: Sequence[Mapping[int, float]]) -> list[float]:
    """Of every configuration, the mean over seeds that it would have, had all been measured with
    all seeds.

    Least squares in an effect of the configuration and one of the seed, so that nobody is ahead for
    having had the easy seeds. Where all have the same seeds these are the plain means; where no
    chain of shared seeds joins two configurations, their seeds count as equally hard.
    """
    seeds = sorted(set().union(*by_seed))
    if all(row.keys() == set(seeds) for row in by_seed):
        return [statistics.fmean(row.values()) for row in by_seed]
    cells = [(c, seeds.index(seed)) for c, row in enumerate(by_seed) for seed in sorted(row)]
    design = np.zeros((len(cells) + len(seeds), len(by_seed) + len(seeds)))
    for row, (configuration, seed) in enumerate(cells):
        design[row, [configuration, len(by_seed) + seed]] = 1.0
    # Effects of seeds that nothing else settles are 0, and so is their mean.
    design[len(cells) :, len(by_seed) :] = math.sqrt(_SLIGHT) * np.eye(len(seeds))
    wanted = [by_seed[c][seeds[s]] for c, s in cells] + [0.0] * len(seeds)
    effects = np.linalg.lstsq(design, np.array(wanted), rcond=None)[0][: len(by_seed)]
    return [round(float(effect), 9) for effect in effects]


def over_seeds(values: Sequence[float]) -> Estimate:
    """The mean with Student's t interval; no interval for a single value."""
    return interval(statistics.fmean(values), seed_noise(values))


# --- questions -------------------------------------------------------------------------------


@dataclass(frozen=True)
class QuestionNoise:
    """How far a mean may be off to either side because of the questions, and its variance; `own`
    is the share of that variance that is not seeds answering the same question differently."""

    below: float
    above: float
    variance: float
    own: float


class Resamples:
    """Bootstrap means over questions that stand in the order of their tasks, of these sizes."""

    def __init__(self, sizes: Sequence[int]) -> None:
        ends = np.cumsum(sizes).tolist()
        self._tasks = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]

    @cached_property
    def _counts(self) -> list[Array]:
        """For every task: how often each resample drew each of its questions."""
        random = np.random.default_rng(SEED)
        found = []
        for task in self._tasks:
            size = task.stop - task.start
            drawn = random.integers(0, size, (RESAMPLES, size))
            drawn += size * np.arange(RESAMPLES)[:, None]
            counts = np.bincount(drawn.ravel(), minlength=RESAMPLES * size)
            found.append(counts.reshape(RESAMPLES, size).astype(np.float64))
        return found

    def mean(self, values_Q: Array) -> float:
        """The mean over tasks."""
        return statistics.fmean(float(np.sum(_exact(values_Q[t]))) / _size(t) for t in self._tasks)

    def means(self, values_Q: Array) -> Array:
        """The mean over tasks of every resample."""
        exact_Q = _exact(values_Q)
        tasks = zip(self._counts, self._tasks, strict=True)
        means = [counts @ exact_Q[task] / _size(task) for counts, task in tasks]
        return np.asarray(np.mean(means, axis=0), dtype=np.float64)

    def noise(self, values_SQ: Array) -> QuestionNoise:
        """Of the mean over S seeds."""
        values_Q = np.mean(values_SQ, axis=0)
        tail = (1 - CONFIDENCE) / 2
        value, means = self.mean(values_Q), self.means(values_Q)
        low, high = (float(each) for each in np.quantile(means, [tail, 1 - tail]))
        variance = self._scaled([_squares(values_Q[None, t]) for t in self._tasks])
        own = 1.0
        if len(values_SQ) > 1 and variance > 0:
            shared = self._scaled([_interaction(values_SQ[:, t]) for t in self._tasks])
            own = min(1.0, max(0.0, 1 - shared / variance))
        return QuestionNoise(max(0.0, value - low), max(0.0, high - value), variance, round(own, 6))

    def _scaled(self, mean_squares: Sequence[float]) -> float:
        """Variance of the mean over tasks, from the mean square of a question in each."""
        parts = zip(mean_squares, self._tasks, strict=True)
        return math.fsum(square / _size(t) for square, t in parts) / len(self._tasks) ** 2

    def sign_test(self, values_Q: Array) -> float:
        """Chance of a mean at least as far from 0, were the signs of all values drawn at random.

        For one task whose values are -1, 0 and 1 that is McNemar's exact test; else the chance is
        counted among `FLIPS` draws.
        """
        sizes = [_size(t) for t in self._tasks]
        groups = [_counted(_exact(values_Q[t])) for t in self._tasks]
        if len(groups) == 1 and len(groups[0]) <= 1:
            return mcnemar(*next(iter(groups[0].values()), (0, 0)))
        random = np.random.default_rng(SEED)
        drawn, value = np.zeros(FLIPS), 0.0
        for size, found in zip(sizes, groups, strict=True):
            for magnitude, (above, below) in sorted(found.items()):
                weight = magnitude / size
                value += weight * (above - below)
                drawn += weight * (2 * random.binomial(above + below, 0.5, FLIPS) - above - below)
        as_far = int(np.sum(np.abs(drawn) >= abs(value) - ROUNDING))
        return float((1 + as_far) / (1 + FLIPS))


def mcnemar(first_only: int, second_only: int) -> float:
    """McNemar's exact test, two-sided: of two models, how likely is it that so unequal numbers of
    questions are answered by one of them alone, if neither is better?"""
    count = first_only + second_only
    return float(stats.binomtest(first_only, count).pvalue) if count else 1.0


def _size(task: slice) -> int:
    return int(task.stop - task.start)


def _exact(values: Array) -> Array:
    return np.asarray(np.round(values / _GRAIN) * _GRAIN, dtype=np.float64)


def _counted(values_Q: Array) -> dict[float, tuple[int, int]]:
    """By magnitude (0 left out): how many values are positive, and how many negative."""
    found: dict[float, tuple[int, int]] = {}
    for value, count in zip(*np.unique(values_Q[values_Q != 0], return_counts=True), strict=True):
        above, below = found.get(abs(float(value)), (0, 0))
        positive = value > 0
        found[abs(float(value))] = (above + count * positive, below + count * (not positive))
    return {magnitude: (int(a), int(b)) for magnitude, (a, b) in found.items()}


def _squares(values_SQ: Array) -> float:
    """Mean square of the questions, each the mean over its seeds."""
    values_Q = np.mean(values_SQ, axis=0)
    centred = values_Q - np.mean(values_Q)
    return float(np.sum(centred**2) / max(1, len(values_Q) - 1))


def _interaction(values_SQ: Array) -> float:
    """What answers that differ by seed and question at once add to the questions' mean square."""
    seeds, questions = values_SQ.shape
    left = values_SQ - np.mean(values_SQ, axis=0) - np.mean(values_SQ, axis=1, keepdims=True)
    left = left + np.mean(values_SQ)
    freedom = max(1, (seeds - 1) * (questions - 1))
    return float(np.sum(left**2) / freedom / seeds)


# --- both ------------------------------------------------------------------------------------


def interval(
    value: float, seeds: SeedNoise | None = None, questions: QuestionNoise | None = None
) -> Estimate:
    """The value with the interval that follows from its noise; without any, the value alone."""
    if seeds is None and questions is None:
        return Estimate(value)
    reach = seeds.reach() if seeds else 0.0

    def together(side: float) -> float:
        return _together(reach, side, questions.own if questions else 0.0)

    below, above = (questions.below, questions.above) if questions else (0.0, 0.0)
    return Estimate(value, value - together(below), value + together(above))


def _together(seeds: float, questions: float, own: float) -> float:
    # Never shorter than the questions alone: two seeds may agree by chance.
    return max(math.hypot(seeds, math.sqrt(own) * questions), questions)


def p_value(value: float, seeds: SeedNoise | None, questions: QuestionNoise | None) -> float:
    """The chance at which the interval (its questions' part taken as normal) ends at 0."""
    variance, own = (questions.variance, questions.own) if questions else (0.0, 0.0)

    def beyond(p: float) -> float:
        reach = -float(special.ndtri(p / 2)) * math.sqrt(variance)
        return _together(seeds.reach(p) if seeds else 0.0, reach, own) - abs(value)

    if abs(value) <= ROUNDING:
        return 1.0
    if beyond(_SMALLEST_P) <= 0:
        return _SMALLEST_P
    return float(optimize.brentq(beyond, _SMALLEST_P, 1.0, xtol=_SMALLEST_P))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: at most one in twenty families of tests in
    which no hypothesis is wrong has one of them below 0.05."""
    adjusted, floor = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        floor = max(floor, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = floor
    return adjusted


# --- order -----------------------------------------------------------------------------------


def established(values_CS: Array, chance: float) -> npt.NDArray[np.int64]:
    """Which of C configurations, measured with the same S seeds, are certain to differ: [i, j] is
    the sign of i - j, or 0.

    But for `chance`, all signs are right at once: by Tukey's test with seeds as blocks, which takes
    the noise of all configurations for the same, and, lest one that is far noisier than the others
    passes by their lack of noise, by the paired t test of the two alone.
    """
    noise = pooled_noise(values_CS.tolist())
    seeds = values_CS.shape[1]
    differences_CCS = values_CS[:, None, :] - values_CS[None, :, :]
    means_CC = np.mean(differences_CCS, axis=2)
    if noise is None:
        return np.zeros(means_CC.shape, dtype=np.int64)
    quantile = _studentized_range(1 - chance, len(values_CS), noise.freedom)
    together = quantile * math.sqrt(noise.variance / 2 / seeds)
    errors_CC = np.std(differences_CCS, axis=2, ddof=1) / math.sqrt(seeds)
    alone_CC = -float(special.stdtrit(seeds - 1, chance / 2)) * errors_CC
    sure = np.abs(means_CC) > np.maximum(alone_CC, max(together, ROUNDING))
    return np.asarray(np.sign(means_CC) * sure, dtype=np.int64)


@lru_cache
def _studentized_range(confidence: float, groups: int, freedom: int) -> float:
    return float(stats.studentized_range.ppf(confidence, groups, freedom))
