"""Records and claims -> effect, interval and verdict of each claim. Pure.

A comparison of two groups is made in pairs: trials that agree in the seed and in every axis that
neither group names. An axis that only one of the two trials has does not keep them apart: a
baseline lacks the axes of the grid, so it stands beside every value of them, and the teacher,
which no seed enters, beside every seed. `among` narrows both groups; a baseline that a group names
stays where it lacks the axis.

The effect is positive where it speaks for the claim. What is repeated is the seed: differences are
averaged over the pairs of a setting of the other axes, then over those settings (each counts the
same), and Student's t over seeds gives the interval. Where there is one seed, or where the seed
changes nothing, an accuracy is resampled over its questions (the same ones for all trials); any
other metric has no interval, and its claim stays undecided.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from orchestrator.asked import (
    BASELINE,
    OTHERS,
    SEED,
    Better,
    Claim,
    NoBetter,
    RankingChanges,
    key_of,
    keys_meant,
    lower_is_better,
)
from orchestrator.records import TEACHER, Records, TrialRecord
from orchestrator.selection import (
    CONFIDENCE,
    RESAMPLES,
    ROUNDING,
    Estimate,
    Questions,
    configuration_key,
    groups,
    over_seeds,
    task_of,
    value_of,
)

Array = npt.NDArray[np.float64]
Outcome = Literal["supported", "contradicted", "undecided", "no data"]

FEWEST_CONFIGURATIONS = 4
"""Fewer do not make a ranking that could be compared with another."""

BOOTSTRAP_SEED = 0


@dataclass(frozen=True)
class Verdict:
    """What the trials say of a claim.

    `effect` is in the metric's unit, positive in the claim's favour; of a claim about rankings it
    is Kendall's tau, and `pairs` counts pairs of configurations. None where there is no data.
    `note` says what the verdict rests on, or why there is none.
    """

    text: str
    practice: int | None
    metric: str
    effect: Estimate | None
    verdict: Outcome
    pairs: int
    seeds: int
    note: str | None
    published: str | None


def judge(records: Records, claims: Sequence[Claim]) -> tuple[Verdict, ...]:
    """A verdict per claim, in the same order. The order of the trials does not matter."""
    return tuple(
        _ranking(records, claim) if isinstance(claim, RankingChanges) else _versus(records, claim)
        for claim in claims
    )


def sign_of(metric: str) -> float:
    """-1 for a metric that is better low; 1 for any other."""
    return -1.0 if lower_is_better(metric) else 1.0


# --- which trials are meant ------------------------------------------------------------------


@dataclass(frozen=True)
class _Member:
    """A completed trial of a group, its value of the metric, and keys of what tells it apart."""

    trial_id: str
    value: float
    settings: Mapping[str, str]


def _members(
    records: Records, metric: str, group: Mapping[str, Any], among: Mapping[str, Any] | None
) -> list[_Member]:
    """The trials of a group that completed with a value of the metric, by id."""
    own, narrowed = _rule(records, group), _rule(records, among or {})
    found = []
    for trial in records.trials:
        settings, value = _settings(trial), value_of(trial, metric)
        meant = (BASELINE in group) == (BASELINE in settings) and _fits(settings, own)
        # A baseline lacks the axes of the grid: it stands for every value of them.
        lenient = BASELINE in group
        if value is not None and meant and _fits(settings, narrowed, lenient):
            found.append(_Member(trial.trial_id, value, settings))
    return sorted(found, key=lambda member: member.trial_id)


def _others(records: Records, claim: Better | NoBetter, group: Mapping[str, Any]) -> list[_Member]:
    """The trials of the grid that have every axis of the group, and are not in it."""
    everything = _members(records, claim.metric, {}, claim.among)
    own = _rule(records, group)
    return [
        member
        for member in everything
        if own.keys() <= member.settings.keys() and not _fits(member.settings, own)
    ]


def _settings(trial: TrialRecord) -> dict[str, str]:
    """Keys of the axes, the baseline and the seed, where the trial has one. No seed enters the
    teacher, so it has none."""
    found = {name: key_of(value) for name, value in trial.axes.items()}
    if trial.baseline is not None:
        found[BASELINE] = key_of(trial.baseline)
    if trial.baseline != TEACHER:
        found[SEED] = key_of(trial.seed)
    return found


def _rule(records: Records, group: Mapping[str, Any]) -> dict[str, set[str]]:
    """By name, the keys of the values that a group means."""
    all_settings = [_settings(trial) for trial in records.trials]
    return {
        name: keys_meant(wanted, {each[name] for each in all_settings if name in each})
        for name, wanted in group.items()
    }


def _fits(settings: Mapping[str, str], rule: Mapping[str, set[str]], lenient: bool = False) -> bool:
    """Whether the settings are among those meant; `lenient` where they may also be lacking."""
    return all(
        settings[name] in keys if name in settings else lenient for name, keys in rule.items()
    )


# --- two groups ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pair:
    """Two trials that are compared: their seed, and the setting of the other axes."""

    first: _Member
    second: _Member
    seed: str
    cell: tuple[tuple[str, str], ...]


def _versus(records: Records, claim: Better | NoBetter) -> Verdict:
    group = claim.better if isinstance(claim, Better) else claim.no_better
    first = _members(records, claim.metric, group, claim.among)
    if claim.than == OTHERS:
        second, named = _others(records, claim, group), set[str]()
    else:
        second = _members(records, claim.metric, claim.than, claim.among)
        named = set(claim.than)
    free = {*group, *named, BASELINE} - {SEED}
    pairs = _pairs(first, second, free)
    if not pairs:
        return _verdict(claim, claim.metric, note=_why_no_pair(first, second, free))
    estimate, note = _effect(records, claim.metric, pairs)
    return _verdict(
        claim,
        claim.metric,
        estimate,
        _outcome(claim, estimate),
        pairs=len(pairs),
        seeds=len({pair.seed for pair in pairs}),
        note=note,
    )


def _pairs(first: Iterable[_Member], second: Iterable[_Member], free: set[str]) -> list[_Pair]:
    """All pairs of different trials that agree in whatever both have and is not `free`."""
    found = []
    others = [(other, _without(other, free)) for other in second]
    for one in first:
        mine = _without(one, free)
        for other, theirs in others:
            both = mine.keys() & theirs.keys()
            if one.trial_id != other.trial_id and all(mine[n] == theirs[n] for n in both):
                setting = {**mine, **theirs}
                seed = setting.pop(SEED, "")
                found.append(_Pair(one, other, seed, tuple(sorted(setting.items()))))
    return found


def _without(member: _Member, free: set[str]) -> dict[str, str]:
    return {name: key for name, key in member.settings.items() if name not in free}


def _why_no_pair(first: Sequence[_Member], second: Sequence[_Member], free: set[str]) -> str:
    if not first or not second:
        which = "the first" if not first else "the second"
        return f"no trial of {which} group completed with a value"
    names = sorted({name for each in (*first, *second) for name in _without(each, free)})
    return f"no trial of one group agrees with one of the other in {', '.join(names)}"


def _effect(records: Records, metric: str, pairs: Sequence[_Pair]) -> tuple[Estimate, str | None]:
    """The mean over seeds of the paired differences, with its interval, and what that rests on."""
    by_seed: dict[str, list[_Pair]] = {}
    for pair in pairs:
        by_seed.setdefault(pair.seed, []).append(pair)
    sign = sign_of(metric)
    values = {m.trial_id: np.array([m.value]) for pair in pairs for m in (pair.first, pair.second)}
    effects = [sign * float(_average(by_seed[seed], values)[0]) for seed in sorted(by_seed)]
    estimate = over_seeds(effects)
    varied = max(effects) - min(effects) > ROUNDING
    if varied:
        return estimate, None
    why = "one seed" if len(effects) == 1 else "the effect is the same with every seed"
    about = task_of(metric)
    if about is None:
        # Seeds that change nothing are no repetitions; that nothing differs at all is a finding.
        if len(effects) > 1 and abs(estimate.value) <= ROUNDING:
            return estimate, "no difference with any seed"
        note = f"{why}, and the metric has no questions to resample"
        return Estimate(estimate.value), note
    questions = Questions(records, *about)
    resampled = {trial_id: questions.resampled([trial_id]) for trial_id in sorted(values)}
    known = {trial_id: means for trial_id, means in resampled.items() if means is not None}
    if len(known) < len(values):
        return Estimate(estimate.value), f"{why}, and not every trial has its answers"
    draws = [sign * _average(by_seed[seed], known) for seed in sorted(by_seed)]
    return _percentiles(estimate.value, _mean(draws)), f"{why}: the interval is over questions"


def _average(pairs: Sequence[_Pair], values: Mapping[str, Array]) -> Array:
    """The mean difference of a seed's pairs, every setting of the other axes counting the same."""
    cells: dict[tuple[tuple[str, str], ...], list[Array]] = {}
    for pair in pairs:
        difference = values[pair.first.trial_id] - values[pair.second.trial_id]
        cells.setdefault(pair.cell, []).append(difference)
    return _mean([_mean(cells[cell]) for cell in sorted(cells)])


def _mean(values: Sequence[Array]) -> Array:
    return np.asarray(np.mean(values, axis=0), dtype=np.float64)


def _percentiles(value: float, draws: Array) -> Estimate:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Estimate(value, float(low), float(high))


# --- two rankings ----------------------------------------------------------------------------


def _ranking(records: Records, claim: RankingChanges) -> Verdict:
    first, then = claim.ranking.first, claim.ranking.then
    metric = f"agreement of {first} and {then}"
    measured = _measured(records, claim)
    found = sorted(groups(measured), key=lambda group: configuration_key(group[0]))
    count = len(found)
    if count < 2:
        return _verdict(claim, metric, note="fewer than two configurations have both values")
    first_N, then_N = (
        np.array([sign_of(name) * _mean_value(group, name) for group in found])
        for name in (first, then)
    )
    estimate = _agreement(first_N, then_N)
    note = f"Kendall's tau over {count} configurations"
    if estimate is None:
        note = f"{note} is not defined: all are equal in one of the metrics"
    elif count < FEWEST_CONFIGURATIONS:
        note = f"{note}; at least {FEWEST_CONFIGURATIONS} are needed"
    return _verdict(
        claim,
        metric,
        estimate,
        "undecided" if estimate is None else _outcome(claim, estimate),
        pairs=count * (count - 1) // 2,
        seeds=len({trial.seed for trial in measured}),
        note=note,
    )


def _measured(records: Records, claim: RankingChanges) -> list[TrialRecord]:
    """The trials, the teacher's aside, that have both values and are among those meant."""
    rule = _rule(records, claim.among or {})
    return [
        trial
        for trial in sorted(records.trials, key=lambda trial: trial.trial_id)
        if trial.baseline != TEACHER
        and value_of(trial, claim.ranking.first) is not None
        and value_of(trial, claim.ranking.then) is not None
        and _fits(_settings(trial), rule)
    ]


def _mean_value(trials: Sequence[TrialRecord], metric: str) -> float:
    return statistics.fmean(v for v in (value_of(t, metric) for t in trials) if v is not None)


def _agreement(first_N: Array, then_N: Array) -> Estimate | None:
    """Kendall's tau-b with a bootstrap interval over configurations, from `FEWEST` on; None where
    all are equal in one metric."""
    count = len(first_N)
    (value,) = kendall(first_N, then_N, np.ones((1, count)))
    if not math.isfinite(value):
        return None
    if count < FEWEST_CONFIGURATIONS:
        return Estimate(float(value))
    random = np.random.default_rng(BOOTSTRAP_SEED)
    drawn = random.integers(0, count, (RESAMPLES, count))
    counts_RN = np.stack([np.bincount(row, minlength=count) for row in drawn]).astype(np.float64)
    taus = kendall(first_N, then_N, counts_RN)
    # A resample of equal configurations alone ranks nothing.
    return _percentiles(float(value), taus[np.isfinite(taus)])


def kendall(first_N: Array, then_N: Array, counts_RN: Array) -> Array:
    """Kendall's tau-b of each of R samples that hold configuration n `counts_RN[r, n]` times.

    NaN where all are equal in one metric. tau-b leaves out pairs that are tied, so copies of one
    configuration neither agree nor disagree.
    """
    first_NN, then_NN = (np.sign(each[:, None] - each[None, :]) for each in (first_N, then_N))

    def total(weights_NN: Array) -> Array:
        return np.asarray(((counts_RN @ weights_NN) * counts_RN).sum(axis=1), dtype=np.float64)

    comparable = np.sqrt(total(np.abs(first_NN)) * total(np.abs(then_NN)))
    with np.errstate(invalid="ignore"):
        return np.asarray(total(first_NN * then_NN) / comparable, dtype=np.float64)


# --- verdicts --------------------------------------------------------------------------------


def _outcome(claim: Claim, effect: Estimate) -> Outcome:
    """What the interval says; undecided where it reaches both sides, or where there is none."""
    low, high = effect.low, effect.high
    if low is None or high is None:
        return "undecided"
    if isinstance(claim, Better):
        supported, contradicted = low > ROUNDING, high < -ROUNDING
    elif isinstance(claim, NoBetter):
        supported, contradicted = high < claim.within, low > claim.within
    else:
        limit = claim.ranking.agreement_below
        supported, contradicted = high < limit, low >= limit
    return "supported" if supported else "contradicted" if contradicted else "undecided"


def _verdict(
    claim: Claim,
    metric: str,
    effect: Estimate | None = None,
    outcome: Outcome = "no data",
    pairs: int = 0,
    seeds: int = 0,
    note: str | None = None,
) -> Verdict:
    return Verdict(
        text=claim.text,
        practice=claim.practice,
        metric=metric,
        effect=effect,
        verdict=outcome,
        pairs=pairs,
        seeds=seeds,
        note=note,
        published=claim.published,
    )
