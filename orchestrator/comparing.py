"""Two recorded trials, or two recorded sweeps, side by side: what `orchestrate compare` tells.

Differences are the second less the first. Questions are the same where their contents are, whatever
sweep and profile asked them, so two trials are always compared on the questions that both answered.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np

from orchestrator.answers import not_counted
from orchestrator.claims import Verdict, judge
from orchestrator.inference import Estimate, Resamples, holm, interval
from orchestrator.located import LocatedError, read_file
from orchestrator.recorded import Asked, read_asked, results_folders
from orchestrator.records import Records, TrialRecord, read_parquet, read_trials
from orchestrator.selection import (
    Comparison,
    Measure,
    Winner,
    configuration_key,
    groups,
    labels,
    rank,
    task_of,
    value_of,
    winner,
)
from orchestrator.wording import nearest_first

NEAREST = 4
"""How many names are told where the one that was given is none."""
MEAN = "mean"
HALVES: tuple[Literal["select", "report"], ...] = ("select", "report")
MEANS = {"select": f"accuracy.{MEAN}", "report": f"accuracy_report.{MEAN}"}


class CannotCompareError(Exception):
    """What is asked for is not there, or cannot be set side by side, and why."""


# --- what is meant ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A results folder, and one of its trials where that is meant."""

    folder: Path
    trial_id: str | None = None

    @property
    def name(self) -> str:
        """Sweep and profile, as `compare` takes them."""
        return f"{self.folder.parent.name}@{self.folder.name}"


def find(results: Path, wanted: str) -> Found:
    """A results folder, a sweep file, NAME or NAME@PROFILE of a recorded sweep, or the beginning of
    a trial's id. One's own results stand before published ones.

    Raises `CannotCompareError`, which names what is nearest.
    """
    path, _, at = wanted.rpartition("@") if "@" in wanted else (wanted, "", "")
    if (Path(wanted) / "trials.parquet").is_file():
        return Found(Path(wanted).resolve())
    recorded = _recorded(results)
    if path.endswith((".yaml", ".yml")):
        name, profile = _of_file(Path(path))
        return _sweep(results, recorded, name, at or profile)
    if path in {name for name, _ in recorded}:
        return _sweep(results, recorded, path, at)
    return _trial(results, recorded, wanted)


def _recorded(results: Path) -> dict[tuple[str, str], Path]:
    found = results_folders(results)
    if not found:
        raise CannotCompareError(f"{results}: nothing is recorded there, here or published")
    return found


def _of_file(path: Path) -> tuple[str, str]:
    """The name and the profile that a sweep file gives."""
    try:
        tree = read_file(path)
    except LocatedError as error:
        raise CannotCompareError(*error.messages) from error
    name, profile = (tree.child(key) for key in ("name", "profile"))
    if name is None:
        raise CannotCompareError(f"{path}: has no name, so it is no sweep file")
    return str(name.value), Path(str(profile.value)).stem if profile else ""


def _sweep(
    results: Path, recorded: Mapping[tuple[str, str], Path], name: str, profile: str
) -> Found:
    at = {there: folder for (sweep, there), folder in recorded.items() if sweep == name}
    if not profile and len(at) == 1:
        return Found(next(iter(at.values())))
    if profile in at:
        return Found(at[profile])
    listed = ", ".join(f"{name}@{there}" for there in sorted(at))
    if listed and not profile:
        raise CannotCompareError(f"{name}: recorded at several profiles; say which: {listed}")
    if listed:
        raise CannotCompareError(f"{name}: not recorded at profile {profile}; there is {listed}")
    near = _listed(nearest_first(name, {sweep for sweep, _ in recorded}))
    raise CannotCompareError(f"{results}: no sweep {name} is recorded; nearest: {near}")


def _trial(results: Path, recorded: Mapping[tuple[str, str], Path], wanted: str) -> Found:
    try:
        # A trial may stand in several sweeps. The last one counts, which is one's own.
        published = results / "published"
        folders = sorted(recorded.values(), key=lambda each: published not in each.parents)
        ids = {trial.trial_id: folder for folder in folders for trial in read_trials(folder)}
    except ValueError as error:
        raise CannotCompareError(str(error)) from error
    meant = sorted(id_ for id_ in ids if wanted and id_.startswith(wanted))
    if len(meant) > 1 and wanted not in meant:
        raise CannotCompareError(f"{wanted}: begins {len(meant)} trials' ids: {_listed(meant)}")
    if meant:
        id_ = wanted if wanted in meant else meant[0]
        return Found(ids[id_], id_)
    sweeps = {f"{sweep}@{profile}" for sweep, profile in recorded}
    near = f"nearest sweeps: {_listed(nearest_first(wanted, sweeps))}"
    if alike := get_close_matches(wanted, ids, NEAREST):
        near = f"nearest trials: {_listed(alike)}; {near}"
    raise CannotCompareError(f"{wanted}: no trial, sweep or results folder in {results}; {near}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:NEAREST]) + (", …" if len(names) > NEAREST else "")


@dataclass(frozen=True)
class Side:
    """One of two sweeps, or the sweep of one of two trials."""

    found: Found
    records: Records
    asked: Asked

    @property
    def trial(self) -> TrialRecord:
        """The trial that is meant."""
        return next(t for t in self.records.trials if t.trial_id == self.found.trial_id)

    def winner(self) -> Winner | None:
        """The sweep's winner."""
        select = self.asked.select
        return winner(rank(self.records, select.metric, select.mode, self.asked.finalists))


def _side(found: Found) -> Side:
    try:
        records = read_parquet(found.folder)
    except (FileNotFoundError, ValueError) as error:
        raise CannotCompareError(str(error)) from error
    # A trial that its sweep does not ask for any more can still be looked at by its id.
    records = records if found.trial_id else records.asked
    try:
        asked = read_asked(found.folder / "sweep.yaml")
    except LocatedError as error:
        raise CannotCompareError(*error.messages) from error
    return Side(found, records, asked)


# --- side by side ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A dotted setting that differs; of sweeps, all values that their trials have."""

    key: str
    first: Any
    second: Any


@dataclass(frozen=True)
class Metric:
    """A value of each; None where it was not measured. Means over different tasks have no
    difference."""

    name: str
    first: float | None
    second: float | None
    difference: float | None


@dataclass(frozen=True)
class Answers:
    """Two trials on the questions that both answered: of one task, or the mean over tasks.

    `p_value` is McNemar's exact test, or for a mean over several tasks the test that draws signs.
    """

    half: Literal["select", "report"]
    task: str
    questions: int
    first_better: int
    second_better: int
    first: float
    second: float
    difference: Estimate
    p_value: float


@dataclass(frozen=True)
class Trials:
    """Two trials side by side."""

    first: Mapping[str, Any]
    second: Mapping[str, Any]
    settings: tuple[Setting, ...]
    metrics: tuple[Metric, ...]
    answers: tuple[Answers, ...]


@dataclass(frozen=True)
class Claimed:
    """A claim with its verdict in each sweep; None where the sweep does not make it."""

    text: str
    practice: int | None
    first: Verdict | None
    second: Verdict | None


@dataclass(frozen=True)
class Shared:
    """A configuration that both sweeps have; `p_value` after Holm's correction, None where no test
    can be made. The difference is on the questions that both answered, while the values are each
    over all of its own. Means over different tasks have no difference."""

    label: str
    seeds: tuple[int, int]
    first: Estimate
    second: Estimate
    difference: Estimate | None
    p_value: float | None


@dataclass(frozen=True)
class Sweeps:
    """Two sweeps side by side. `metric` is what the first chooses by."""

    first: Mapping[str, Any]
    second: Mapping[str, Any]
    settings: tuple[Setting, ...]
    metric: str
    winners: Trials | None
    claims: tuple[Claimed, ...]
    configurations: tuple[Shared, ...]


def compare(results: Path, first: str, second: str) -> Trials | Sweeps:
    """Two trials or two sweeps, named as `find` takes them. Raises `CannotCompareError`."""
    one, other = find(results, first), find(results, second)
    if (one.trial_id is None) != (other.trial_id is None):
        trial, sweep = (second, first) if one.trial_id is None else (first, second)
        raise CannotCompareError(f"{trial} is a trial and {sweep} a sweep: name two of a kind")
    sides = _side(one), _side(other)
    return _sweeps(*sides) if one.trial_id is None else _trials(*sides)


def as_json(compared: Trials | Sweeps) -> dict[str, Any]:
    """The same for machines; a missing value is null."""
    kind = "trials" if isinstance(compared, Trials) else "sweeps"
    return {"kind": kind, **asdict(compared)}


# --- two trials ------------------------------------------------------------------------------


def _trials(first: Side, second: Side) -> Trials:
    one, other = first.trial, second.trial
    return Trials(
        first=_about_trial(one),
        second=_about_trial(other),
        settings=_settings([one], [other]),
        metrics=_metrics(one, other),
        answers=_answers(_joined(first.records, [one], second.records, [other])),
    )


def _about_trial(trial: TrialRecord) -> dict[str, Any]:
    names = ("trial_id", "sweep", "profile", "seed", "baseline", "status", "reason")
    costs = ("parameters", "tokens_trained", "cpu_s", "gpu_s", "wall_s")
    return {name: getattr(trial, name) for name in (*names, *costs)}


def _metrics(one: TrialRecord, other: TrialRecord) -> tuple[Metric, ...]:
    found = []
    same_tasks = _tasks(one) == _tasks(other)
    for name in sorted({*one.metrics, *other.metrics}):
        first, second = value_of(one, name), value_of(other, name)
        difference = None
        if first is not None and second is not None and (same_tasks or not _over_tasks(name)):
            difference = second - first
        found.append(Metric(name, first, second, difference))
    return tuple(found)


def _tasks(trial: TrialRecord) -> set[str]:
    about = (task_of(name) for name in trial.metrics)
    return {task for task, _ in filter(None, about)}


def _over_tasks(metric: str) -> bool:
    about = task_of(metric)
    return about is not None and about[0] == MEAN


def _joined(
    first: Records, ones: Sequence[TrialRecord], second: Records, others: Sequence[TrialRecord]
) -> Records:
    """The trials of both under ids of their own: the same trial may stand in two folders."""
    trials, items = [], []
    for place, (records, chosen) in enumerate(((first, ones), (second, others))):
        names = {trial.trial_id: f"{place}:{trial.trial_id}" for trial in chosen}
        trials += [replace(trial, trial_id=names[trial.trial_id]) for trial in chosen]
        items += [
            replace(item, trial_id=names[item.trial_id])
            for item in records.items
            if item.trial_id in names
        ]
    return Records(first.sweep, first.profile, trials=tuple(trials), items=tuple(items))


def _answers(joined: Records) -> tuple[Answers, ...]:
    """Of two trials: by half, each task that both answered and, of several that count in a mean,
    their mean."""
    one, other = (trial.trial_id for trial in joined.trials)
    found = []
    for half in HALVES:
        scores: dict[str, dict[tuple[str, str], float]] = {one: {}, other: {}}
        for item in joined.items:
            if item.split == half:
                scores[item.trial_id][item.task, item.item_id] = item.correct
        means = {trial.trial_id: value_of(trial, MEANS[half]) for trial in joined.trials}
        out = not_counted(scores, means)
        both = sorted(scores[one].keys() & scores[other].keys())
        by_task = {task: list(keys) for task, keys in groupby(both, key=lambda key: key[0])}
        counted = [keys for task, keys in by_task.items() if task not in out]
        of_mean = {MEAN: counted} if len(counted) > 1 else {}
        for task, parts in ({task: [keys] for task, keys in by_task.items()} | of_mean).items():
            mine, theirs = (
                np.array([scores[id_][key] for key in chain(*parts)]) for id_ in (one, other)
            )
            resamples = Resamples([len(keys) for keys in parts])
            found.append(_paired(half, task, resamples, mine, theirs))
    return tuple(found)


def _paired(
    half: Literal["select", "report"], task: str, resamples: Resamples, one: Any, other: Any
) -> Answers:
    differences = other - one
    value = resamples.mean(differences)
    return Answers(
        half=half,
        task=task,
        questions=len(differences),
        first_better=int(np.sum(differences < 0)),
        second_better=int(np.sum(differences > 0)),
        first=resamples.mean(one),
        second=resamples.mean(other),
        difference=interval(value, questions=resamples.noise(differences[None])),
        p_value=resamples.sign_test(differences),
    )


# --- settings --------------------------------------------------------------------------------


def _settings(ones: Iterable[TrialRecord], others: Iterable[TrialRecord]) -> tuple[Setting, ...]:
    """Dotted keys of which the trials on one side have other values than those on the other."""
    first, second = _values(ones), _values(others)
    return tuple(
        Setting(key, _told(first.get(key, {})), _told(second.get(key, {})))
        for key in sorted({*first, *second})
        if first.get(key, {}).keys() != second.get(key, {}).keys()
    )


def _values(trials: Iterable[TrialRecord]) -> dict[str, dict[str, Any]]:
    """By dotted key the values that occur, by their JSON; a null is no value."""
    found: dict[str, dict[str, Any]] = {}
    for trial in trials:
        for key, value in _flat(trial.config):
            if value is not None:
                found.setdefault(key, {})[json.dumps(value, sort_keys=True)] = value
    return found


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves by dotted key; an item of a list of mappings goes by its name or its place."""
    if isinstance(value, Mapping):
        for name, below in value.items():
            yield from _flat(below, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple) and any(isinstance(each, Mapping) for each in value):
        for place, each in enumerate(value):
            name = each.get("name", place) if isinstance(each, Mapping) else place
            yield from _flat(each, f"{key}.{name}")
    else:
        yield key, value


def _told(values: Mapping[str, Any]) -> Any:
    """The value where there is one; else all of them, in order; None where there is none."""
    if len(values) <= 1:
        return next(iter(values.values()), None)
    return sorted(values.values(), key=_place)


def _place(value: Any) -> tuple[bool, float, str]:
    number = isinstance(value, int | float)
    return not number, float(value) if number else 0.0, json.dumps(value, sort_keys=True)


# --- two sweeps ------------------------------------------------------------------------------


def _sweeps(first: Side, second: Side) -> Sweeps:
    metric = first.asked.select.metric
    won = first.winner(), second.winner()
    return Sweeps(
        first=_about_sweep(first, won[0]),
        second=_about_sweep(second, won[1]),
        settings=_settings(*(_grid(each) for each in (first, second))),
        metric=metric,
        winners=_winners(first, second, *won),
        claims=_claims(first, second),
        configurations=_configurations(first, second, metric),
    )


def _grid(side: Side) -> list[TrialRecord]:
    grid = [trial for trial in side.records.trials if trial.baseline is None]
    return grid or list(side.records.trials)


def _about_sweep(side: Side, won: Winner | None) -> dict[str, Any]:
    trials = side.records.trials
    statuses = ("completed", "stopped", "failed")
    return {
        "sweep": side.records.sweep,
        "profile": side.records.profile,
        "folder": str(side.found.folder),
        "trials": len(trials),
        **{status: sum(trial.status == status for trial in trials) for status in statuses},
        "cpu_s": math.fsum(trial.cpu_s for trial in trials),
        "metric": side.asked.select.metric,
        "winner": None if won is None else _about_winner(won),
    }


def _about_winner(won: Winner) -> dict[str, Any]:
    return {
        "configuration": won.configuration.label,
        "trial_id": won.trial.trial_id,
        "parameters": won.configuration.parameters,
        "tokens_trained": won.configuration.tokens_trained,
        "over_seeds": asdict(won.configuration.estimate),
        "reported": None if won.reported is None else asdict(won.reported),
        "tied": [each.label for each in won.tied],
    }


def _winners(first: Side, second: Side, won: Winner | None, other: Winner | None) -> Trials | None:
    if won is None or other is None:
        return None
    meant = (
        replace(side, found=replace(side.found, trial_id=each.trial.trial_id))
        for side, each in ((first, won), (second, other))
    )
    return _trials(*meant)


def _claims(first: Side, second: Side) -> tuple[Claimed, ...]:
    """Claims by their text, in the first sweep's order and then the second's."""
    sides = [
        {verdict.text: verdict for verdict in judge(each.records, each.asked.claims)}
        for each in (first, second)
    ]
    return tuple(
        Claimed(text, (one or other).practice, one, other)  # type: ignore[union-attr]
        for text in dict.fromkeys([*sides[0], *sides[1]])
        for one, other in [(sides[0].get(text), sides[1].get(text))]
    )


def _configurations(first: Side, second: Side, metric: str) -> tuple[Shared, ...]:
    """Those with the same axes, or the same baseline, and a value of the metric in both."""
    theirs = {configuration_key(group[0]): group for group in _measured(second, metric)}
    names = labels(first.records)
    rows = [
        (mine, other)
        for mine in _measured(first, metric)
        if (other := theirs.get(configuration_key(mine[0]))) is not None
    ]
    compared = [_compared(first, mine, second, other, metric) for mine, other in rows]
    tested = [each.p_value for each in compared if each is not None and each.p_value is not None]
    adjusted = iter(holm(tested))
    estimates = Measure(first.records, metric), Measure(second.records, metric)
    return tuple(
        Shared(
            label=names[mine[0].trial_id],
            seeds=(len(mine), len(other)),
            first=estimates[0].estimate(mine),
            second=estimates[1].estimate(other),
            difference=None if found is None else found.difference,
            p_value=None if found is None or found.p_value is None else next(adjusted),
        )
        for (mine, other), found in zip(rows, compared, strict=True)
    )


def _measured(side: Side, metric: str) -> list[list[TrialRecord]]:
    return groups(trial for trial in side.records.trials if value_of(trial, metric) is not None)


def _compared(
    first: Side,
    mine: Sequence[TrialRecord],
    second: Side,
    other: Sequence[TrialRecord],
    metric: str,
) -> Comparison | None:
    """The second less the first; None for means over different tasks."""
    if _over_tasks(metric) and _tasks(mine[0]) != _tasks(other[0]):
        return None
    joined = _joined(first.records, mine, second.records, other)
    one, two = joined.trials[: len(mine)], joined.trials[len(mine) :]
    return Measure(joined, metric).compare(two, one)
