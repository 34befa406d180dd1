"""Records and claims -> effect, interval and verdict of each claim. Pure.

A comparison of two groups is made in pairs: trials that agree in the seed and in every axis that
neither group names. An axis that only one of the two trials has does not keep them apart: a
baseline lacks the axes of the grid, so it stands beside every value of them, and a teacher that no
seed made beside every seed. `among` narrows both groups; a baseline that a group names stays where
it lacks the axis.

The effect is positive where it speaks for the claim. What is repeated is the seed: differences are
averaged over the pairs of a setting of the other axes, then over those settings (each counts the
same), and the interval is over seeds, and over questions too where the metric has them
(`orchestrator.inference`). One seed gives no verdict: a claim is about a way to make models, and
how far another seed would have led elsewhere is not known. Its interval over questions is told.

What failed or was stopped must not decide by its absence: only seeds with all pairs count, as far
as two or more have them, and a comparison of settings of which one has no value is undecided.

A group that is better than *each* of several settings is compared with one after the other. It is
supported where all intervals are on its side (an intersection-union test, which needs no
correction: Berger, 1982, Technometrics 24), and contradicted where one setting is found to be
better after Holm's correction for their number. The effect that is told is the least certain one.

A claim about rankings is about the sweep's own configurations. Its interval counts a pair of them
for or against an agreement only where the seeds establish in both metrics which is better; a pair
that is not established may be either.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np
from scipy import stats

from orchestrator.asked import (
    BASELINE,
    OTHERS,
    SEED,
    Better,
    BetterThanEach,
    Claim,
    NoBetter,
    RankingChanges,
    key_of,
    keys_meant,
)
from orchestrator.inference import (
    CONFIDENCE,
    ROUNDING,
    Array,
    Estimate,
    established,
    holm,
    interval,
    p_value,
    seed_noise,
)
from orchestrator.records import TEACHER, Records, TrialRecord
from orchestrator.selection import (
    Measure,
    axis_names,
    canonical,
    configuration_key,
    groups,
    value_of,
)

Outcome = Literal["supported", "contradicted", "undecided", "no data"]
Measures = Callable[[str], Measure]

FEWEST_CONFIGURATIONS = 4
"""Fewer do not make a ranking that could be compared with another."""


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
    measures = cache(lambda metric: Measure(records, metric))
    return tuple(_judged(records, claim, measures) for claim in claims)


def _judged(records: Records, claim: Claim, measures: Measures) -> Verdict:
    if isinstance(claim, RankingChanges):
        return _ranking(records, claim, measures)
    if isinstance(claim, BetterThanEach):
        return _versus_each(records, claim, measures(claim.metric))
    return _versus(records, claim, measures(claim.metric))


# --- which trials are meant ------------------------------------------------------------------


@dataclass(frozen=True)
class _Member:
    """A trial of a group, its value of the metric, and keys of what tells it apart."""

    trial: TrialRecord
    value: float | None
    settings: Mapping[str, str]

    @property
    def trial_id(self) -> str:
        """Of the trial."""
        return self.trial.trial_id


def _members(
    records: Records, metric: str, group: Mapping[str, Any], among: Mapping[str, Any] | None
) -> list[_Member]:
    """The trials of a group, by id; those without a value failed or were stopped."""
    own, narrowed = _rule(records, group), _rule(records, among or {})
    found, seeded = [], records.teachers_have_seeds
    for trial in records.trials:
        settings, value = _settings(trial, seeded), value_of(trial, metric)
        meant = (BASELINE in group) == (BASELINE in settings) and _fits(settings, own)
        # A baseline lacks the axes of the grid: it stands for every value of them.
        lenient = BASELINE in group
        lost = trial.status != "completed"  # a metric that was not to be measured is not lost
        if (value is not None or lost) and meant and _fits(settings, narrowed, lenient):
            found.append(_Member(trial, value, settings))
    return sorted(found, key=lambda member: member.trial_id)


def _opponents(
    records: Records,
    claim: Better | BetterThanEach | NoBetter,
    group: Mapping[str, Any],
    than: Mapping[str, Any],
) -> list[_Member]:
    """The second group: as it is named or, of `others`, the trials of the grid that have every axis
    of the first, and are not in it."""
    if than != OTHERS:
        return _members(records, claim.metric, than, claim.among)
    everything = _members(records, claim.metric, {}, claim.among)
    own = _rule(records, group)
    return [
        member
        for member in everything
        if own.keys() <= member.settings.keys() and not _fits(member.settings, own)
    ]


def _settings(trial: TrialRecord, teachers_have_seeds: bool) -> dict[str, str]:
    """Keys of the axes, the baseline and the seed, where one entered the trial."""
    found = {name: key_of(value) for name, value in trial.axes.items()}
    if trial.baseline is not None:
        found[BASELINE] = key_of(trial.baseline)
    if trial.baseline != TEACHER or teachers_have_seeds:
        found[SEED] = key_of(trial.seed)
    return found


def _rule(records: Records, group: Mapping[str, Any]) -> dict[str, set[str]]:
    """By name, the keys of the values that a group means."""
    seeded = records.teachers_have_seeds
    all_settings = [_settings(trial, seeded) for trial in records.trials] if group else []
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

    @property
    def measured(self) -> bool:
        """Whether both trials have a value."""
        return self.first.value is not None and self.second.value is not None

    @property
    def compared(self) -> tuple[Any, ...]:
        """What is compared, whatever the seed."""
        return self.cell, _but_for_the_seed(self.first), _but_for_the_seed(self.second)


@dataclass(frozen=True)
class _Effect:
    """The mean over seeds of the differences of some pairs. `p_value`: of there being none; None
    where the estimate has no interval. `whole`: nothing that was to be compared is lacking."""

    estimate: Estimate
    p_value: float | None
    note: str | None
    pairs: int
    seeds: int
    whole: bool = True


def _versus(records: Records, claim: Better | NoBetter, measure: Measure) -> Verdict:
    group = claim.better if isinstance(claim, Better) else claim.no_better
    first = _members(records, claim.metric, group, claim.among)
    second, free = _opponents(records, claim, group, claim.than), _free(group, claim.than)
    effect = _effect(measure, _pairs(first, second, free))
    if effect is None:
        return _verdict(claim, claim.metric, note=_why_no_pair(first, second, free))
    return _decided(claim, effect, _outcome(claim, effect.estimate), effect.note)


def _versus_each(records: Records, claim: BetterThanEach, measure: Measure) -> Verdict:
    first = _members(records, claim.metric, claim.better, claim.among)
    second = _opponents(records, claim, claim.better, claim.than_each)
    free, found = _free(claim.better, claim.than_each), dict[str, _Effect]()
    opponents = _by_setting(records, claim, second)
    for name, members in opponents.items():
        effect = _effect(measure, _pairs(first, members, free))
        if effect is not None:
            found[name] = effect
    if not found:
        return _verdict(claim, claim.metric, note=_why_no_pair(first, second, free))
    better = _found_better(found)
    name = better or min(found, key=lambda each: _lowest(found[each].estimate))
    whole = len(found) == len(opponents) and all(
        each.seeds > 1 and each.whole and _outcome(claim, each.estimate) == "supported"
        for each in found.values()
    )
    outcome: Outcome = "contradicted" if better else "supported" if whole else "undecided"
    verdict = _decided(claim, found[name], outcome, found[name].note)
    note = _about_the_told(found, name, better is not None, len(opponents) - len(found))
    return replace(verdict, note="; ".join(filter(None, (note, verdict.note))))


def _by_setting(
    records: Records, claim: BetterThanEach, members: Iterable[_Member]
) -> dict[str, list[_Member]]:
    """The members by what tells the settings of the second group apart, by its name."""
    named = claim.better if claim.than_each == OTHERS else claim.than_each
    apart = sorted(named.keys() - {SEED})
    by_keys: dict[tuple[str, ...], list[_Member]] = {}
    for member in members:
        by_keys.setdefault(tuple(member.settings[name] for name in apart), []).append(member)
    return {_named(records, by_keys[key][0].trial, apart): by_keys[key] for key in sorted(by_keys)}


def _about_the_told(found: Mapping[str, _Effect], name: str, better: bool, unpaired: int) -> str:
    """Which of the opponents an effect is about, and what is lacking of the others."""
    told = f"{name} is better, one" if better else f"against {name}, the least certain"
    notes = [f"{told} of {len(found)}"]
    if unpaired:
        notes.append(f"no pair with {unpaired} more")
    if found[name].seeds > 1 and any(each.seeds == 1 for each in found.values()):
        notes.append("one seed of some decides nothing")
    return "; ".join(notes)


def _free(group: Mapping[str, Any], than: Mapping[str, Any]) -> set[str]:
    """In what the two trials of a pair may differ."""
    return {*group, *(() if than == OTHERS else than), BASELINE} - {SEED}


def _named(records: Records, trial: TrialRecord, names: Sequence[str]) -> str:
    short = axis_names(records)
    values = {name: trial.baseline if name == BASELINE else trial.axes[name] for name in names}
    return ", ".join(f"{short.get(name, name)}={canonical(v)}" for name, v in values.items())


def _found_better(found: Mapping[str, _Effect]) -> str | None:
    """The opponent that most surely does better than the group, if one is found to."""
    tested = {name: each.p_value for name, each in found.items() if each.p_value is not None}
    adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
    ahead = [
        name
        for name, p in adjusted.items()
        if p < 1 - CONFIDENCE and found[name].estimate.value < -ROUNDING
        if found[name].seeds > 1 and found[name].whole
    ]
    return min(ahead, key=lambda name: tested[name], default=None)


def _lowest(estimate: Estimate) -> float:
    return estimate.value if estimate.low is None else estimate.low


def _decided(
    claim: Better | BetterThanEach | NoBetter, effect: _Effect, outcome: Outcome, note: str | None
) -> Verdict:
    if effect.seeds == 1 and effect.estimate.low is not None:
        alone = _outcome(claim, effect.estimate)
        note = "; ".join(
            filter(None, (f"one seed decides nothing; over its questions alone: {alone}", note))
        )
    return _verdict(
        claim,
        claim.metric,
        effect.estimate,
        outcome if effect.seeds > 1 and effect.whole else "undecided",
        pairs=effect.pairs,
        seeds=effect.seeds,
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


def _but_for_the_seed(member: _Member) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(_without(member, {SEED}).items()))


def _why_no_pair(first: Sequence[_Member], second: Sequence[_Member], free: set[str]) -> str:
    for which, group in (("the first", first), ("the second", second)):
        if all(member.value is None for member in group):
            return f"no trial of {which} group completed with a value"
    if _pairs(first, second, free):
        return "no two trials that could be compared both completed with a value"
    names = sorted({name for each in (*first, *second) for name in _without(each, free)})
    return f"no trial of one group agrees with one of the other in {', '.join(names)}"


def _effect(measure: Measure, pairs: Sequence[_Pair]) -> _Effect | None:
    """None where no pair has both values."""
    counted = _counted(pairs)
    if not counted:
        return None
    effect = _mean_effect(measure, counted)
    lacking = {p.compared for p in pairs} - {p.compared for p in counted}
    notes, left = [effect.note], len(pairs) - len(counted)
    if left:
        notes.append(f"{left} of {len(pairs)} pairs left out: a trial of their seed has no value")
    if lacking:
        notes.append(f"{len(lacking)} of the settings compared have no value at all")
    everything = {p.compared for p in counted}
    by_seed = _seeds(counted).values()
    same = all({p.compared for p in found} == everything for found in by_seed)
    uneven = left > 0 and not lacking and not same
    if uneven:
        notes.append("fewer than two seeds have every pair")
    note = "; ".join(filter(None, notes)) or None
    return replace(effect, note=note, whole=not lacking and not uneven)


def _seeds(pairs: Iterable[_Pair]) -> dict[str, list[_Pair]]:
    found: dict[str, list[_Pair]] = {}
    for pair in pairs:
        found.setdefault(pair.seed, []).append(pair)
    return found


def _counted(pairs: Sequence[_Pair]) -> list[_Pair]:
    """The measured pairs; where some are lost, those of the seeds that have all that any has, if
    these are at least two."""
    measured = [pair for pair in pairs if pair.measured]
    if len(measured) == len(pairs):
        return measured
    everything = {pair.compared for pair in measured}
    by_seed = _seeds(measured)
    full = [s for s, found in by_seed.items() if {p.compared for p in found} == everything]
    if len(full) < 2:
        return measured
    return [pair for pair in measured if pair.seed in full]


def _mean_effect(measure: Measure, pairs: Sequence[_Pair]) -> _Effect:
    sign = measure.sign
    by_seed = _seeds(pairs)
    trials = {m.trial_id: m.trial for pair in pairs for m in (pair.first, pair.second)}
    answers = measure.answers(trials.values())
    values = {
        m.trial_id: np.array([m.value if answers is None else measure.value_on(m.trial, answers)])
        for pair in pairs
        for m in (pair.first, pair.second)
    }
    effects = [sign * float(_average(by_seed[seed], values)[0]) for seed in sorted(by_seed)]
    value, seeds = statistics.fmean(effects), seed_noise(effects)
    if answers is None:
        estimate, note = _over_seeds_alone(effects, measure.has_questions)
        test = None if estimate.low is None else p_value(value, seeds, None)
        return _Effect(estimate, test, note, len(pairs), len(by_seed))
    rows = [sign * _average(by_seed[seed], answers) for seed in sorted(by_seed)]
    varied = len(effects) == 1 or max(effects) - min(effects) > ROUNDING
    note = None if varied else "the effect is the same with every seed: over questions alone"
    questions = measure.noise(rows)
    estimate, test = interval(value, seeds, questions), p_value(value, seeds, questions)
    return _Effect(estimate, test, note, len(pairs), len(by_seed))


def _over_seeds_alone(effects: Sequence[float], lacking: bool) -> tuple[Estimate, str | None]:
    value, seeds = statistics.fmean(effects), seed_noise(effects)
    why = (
        "not every trial has its answers" if lacking else "the metric has no questions to resample"
    )
    if seeds is None:
        return Estimate(value), f"one seed, and {why}"
    if max(effects) - min(effects) > ROUNDING:
        return interval(value, seeds), f"{why}: over seeds alone" if lacking else None
    # Seeds that change nothing are no repetitions; that nothing differs at all is a finding.
    if abs(value) <= ROUNDING:
        return interval(value, seeds), "no difference with any seed"
    return Estimate(value), f"the effect is the same with every seed, and {why}"


def _average(pairs: Sequence[_Pair], values: Mapping[str, Array]) -> Array:
    """The mean difference of a seed's pairs, every setting of the other axes counting the same."""
    cells: dict[tuple[tuple[str, str], ...], list[Array]] = {}
    for pair in pairs:
        difference = values[pair.first.trial_id] - values[pair.second.trial_id]
        cells.setdefault(pair.cell, []).append(difference)
    return _mean([_mean(cells[cell]) for cell in sorted(cells)])


def _mean(values: Sequence[Array]) -> Array:
    return np.asarray(np.mean(values, axis=0), dtype=np.float64)


# --- two rankings ----------------------------------------------------------------------------


def _ranking(records: Records, claim: RankingChanges, measures: Measures) -> Verdict:
    first, then = claim.ranking.first, claim.ranking.then
    metric = f"agreement of {first} and {then}"
    found = groups(_measured(records, claim))
    seeds = sorted(set.intersection(*({t.seed for t in group} for group in found)) if found else ())
    count = len(found)
    if count < 2:
        return _verdict(claim, metric, note="fewer than two configurations have both values")
    if not seeds:
        return _verdict(claim, metric, note="no seed has both values of every configuration")
    rankings = [measures(name).sign * _values(found, seeds, name) for name in (first, then)]
    estimate = _agreement(*rankings)
    note = f"Kendall's tau over {count} configurations"
    if estimate is None:
        note = f"{note} is not defined: all are equal in one of the metrics"
    elif count < FEWEST_CONFIGURATIONS:
        estimate = Estimate(estimate.value)
        note = f"{note}; at least {FEWEST_CONFIGURATIONS} are needed"
    elif estimate.low is None:
        note = f"{note}; one seed does not establish their order"
    return _verdict(
        claim,
        metric,
        estimate,
        "undecided" if estimate is None else _outcome(claim, estimate),
        pairs=count * (count - 1) // 2,
        seeds=len(seeds),
        note=note,
    )


def _measured(records: Records, claim: RankingChanges) -> list[TrialRecord]:
    """The trials, the teacher's aside, that have both values and are among those meant."""
    rule, seeded = _rule(records, claim.among or {}), records.teachers_have_seeds
    by_configuration = sorted(records.trials, key=lambda t: (configuration_key(t), t.trial_id))
    return [
        trial
        for trial in by_configuration
        if trial.baseline != TEACHER
        and value_of(trial, claim.ranking.first) is not None
        and value_of(trial, claim.ranking.then) is not None
        and _fits(_settings(trial, seeded), rule)
    ]


def _values(found: Sequence[Sequence[TrialRecord]], seeds: Sequence[int], metric: str) -> Array:
    """Of each of C configurations with each of S seeds."""
    values = [{trial.seed: value_of(trial, metric) for trial in group} for group in found]
    values_CS = np.array([[by_seed[seed] for seed in seeds] for by_seed in values])
    return np.asarray(values_CS, dtype=np.float64)


def _agreement(first_CS: Array, then_CS: Array) -> Estimate | None:
    """Kendall's tau-b of the means over seeds; None where all are equal in one metric.

    The interval reaches from the tau where every pair that is not established is reversed to the
    one where none is. All that is established holds at once with 95% confidence.
    """
    tau = stats.kendalltau(np.mean(first_CS, axis=1), np.mean(then_CS, axis=1)).statistic
    value = round(float(tau), 12)
    if not math.isfinite(value):
        return None
    if first_CS.shape[1] < 2:
        return Estimate(value)
    chance = (1 - CONFIDENCE) / 2
    both_CC = established(first_CS, chance) * established(then_CS, chance)
    pairs = len(both_CC) * (len(both_CC) - 1)
    same, reversed_ = np.sum(both_CC > 0) / pairs, np.sum(both_CC < 0) / pairs
    return Estimate(value, float(2 * same - 1), float(1 - 2 * reversed_))


# --- verdicts --------------------------------------------------------------------------------


def _outcome(claim: Claim, effect: Estimate) -> Outcome:
    """What the interval says; undecided where it reaches both sides, or where there is none."""
    low, high = effect.low, effect.high
    if low is None or high is None:
        return "undecided"
    if isinstance(claim, Better | BetterThanEach):
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
