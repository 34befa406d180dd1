"""Sweeps that grow while they run: a race's later rungs, and what a search proposes.

`plan_with` says which trials a sweep has, given those that ended; `Growth` asks for more of them.
"""

from __future__ import annotations

import math
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Protocol

from orchestrator.axes import key_of, parse_axes
from orchestrator.plan import SweepPlan, plan_sweep
from orchestrator.race import settled
from orchestrator.scheduling import SIZES, Objective
from orchestrator.space import Pool, enumerate_trials, pool_of, searched
from orchestrator.spec import SpecError, Sweep

if TYPE_CHECKING:
    from orchestrator.proposals import Ended
    from orchestrator.records import TrialRecord

Trials = Mapping[str, "TrialRecord"]
"""Trials that ended, by id."""

STUDY = "optuna.db"
"""What a search has of its own among a sweep's results."""


def plan_with(sweep: Sweep, ended: Trials) -> SweepPlan:
    """The trials that a sweep is known to have: its grid, those rungs of a race that are decided,
    those configurations of a search that were tried. Raises `SpecError`."""
    if sweep.search.method != "grid":
        pool = pool_of(sweep)
        plan_sweep(sweep, searched(sweep, pool, pool.samples()))  # every value has a shape
        return plan_sweep(sweep, searched(sweep, pool, _tried(pool, ended)))
    space = enumerate_trials(sweep)
    if sweep.scheduler.method == "race":
        space = settled(sweep, space, ended)
    return plan_sweep(sweep, space)


def _tried(pool: Pool, ended: Trials) -> list[str]:
    """Configurations of the pool that have been tried, the earliest first."""
    tried = sorted(
        (trial for trial in ended.values() if trial.baseline is None), key=lambda t: t.started_at
    )
    keys = dict.fromkeys(key_of(dict(trial.axes)) for trial in tried)
    return [key for key in keys if key in pool.requests]


class Growth(Protocol):
    """Gives a sweep more trials."""

    def grown(self, ended: Trials, idle: bool) -> SweepPlan | None:
        """The sweep with more trials, given those that `ended` in this run or before it, or None.
        `idle`: none is running."""

    def close(self, ended: Trials) -> None:
        """No more is asked; `ended` is what ended until now."""


class NoGrowth:
    """The trials are known beforehand."""

    def grown(self, ended: Trials, idle: bool) -> SweepPlan | None:
        """Never any."""
        return None

    def close(self, ended: Trials) -> None:
        """Nothing to do."""


class RaceGrowth:
    """The next rung, once all of a rung have ended."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep

    def grown(self, ended: Trials, idle: bool) -> SweepPlan | None:
        """See `Growth`."""
        return plan_with(self._sweep, ended) if idle else None

    def close(self, ended: Trials) -> None:
        """Nothing to do."""


class SearchGrowth:
    """One configuration more, with all its seeds, whenever a worker has nothing to do."""

    def __init__(
        self, sweep: Sweep, ended: Trials, database: Path, failed: Trials | None = None
    ) -> None:
        from orchestrator.proposals import Proposer

        self._sweep, self._pool = sweep, pool_of(sweep)
        self._keys = _tried(self._pool, ended)
        self._objectives = objectives_of(sweep)
        self._proposer = Proposer(
            sweep.search,
            [objective.mode for objective in self._objectives],
            parse_axes(sweep),
            self._pool.configurations,
            database,
            self._outcomes(self._ids_by_axes(ended), ended),
            _tried(self._pool, failed or {}),
        )
        self._open: dict[str, tuple[str, ...]] = {}

    def grown(self, ended: Trials, idle: bool) -> SweepPlan | None:
        """See `Growth`. A proposal that no model can have the shape of is told as failed."""
        self._tell(ended)
        while (proposed := self._proposer.propose()) is not None:
            key = key_of(proposed)
            keys = list(dict.fromkeys((*self._keys, key)))
            try:
                planned = plan_sweep(self._sweep, searched(self._sweep, self._pool, keys))
            except SpecError:
                self._proposer.tell(key, _failed())
                continue
            self._keys = keys
            chosen = searched(self._sweep, self._pool, [key]).trials
            self._open[key] = tuple(t.trial_id for t in chosen if t.baseline is None)
            if not set(self._open[key]) <= set(ended):
                return planned
            self._tell(ended)  # it ran before the sweep had all of its axes
        return None

    def close(self, ended: Trials) -> None:
        """See `Growth`: tells the study what ended last, and lets go of its database."""
        self._tell(ended)
        self._proposer.close()

    def _tell(self, ended: Trials) -> None:
        for key, how in self._outcomes(self._open, ended).items():
            self._proposer.tell(key, how)
            del self._open[key]

    def _ids_by_axes(self, ended: Trials) -> dict[str, tuple[str, ...]]:
        """The trials of those configurations whose every seed has ended."""
        found: dict[str, dict[int, str]] = {key: {} for key in self._keys}
        for trial in ended.values():
            if trial.baseline is None and (key := key_of(dict(trial.axes))) in found:
                found[key][trial.seed] = trial.trial_id
        return {
            key: tuple(ids.values())
            for key, ids in found.items()
            if {request.seed for request in self._pool.requests[key]} <= set(ids)
        }

    def _outcomes(self, ids: Mapping[str, Sequence[str]], ended: Trials) -> dict[str, Ended]:
        """How those of the configurations ended whose trials all have."""
        return {
            key: outcome([ended[each] for each in trials], self._objectives)
            for key, trials in ids.items()
            if set(trials) <= set(ended)
        }


def growth_of(sweep: Sweep, ended: Trials, failed: Trials, folder: Path) -> Growth:
    """How a sweep grows, given the trials that ended and those that `failed` before and are to be
    tried again. A search keeps its Optuna study in `folder`."""
    if sweep.search.method != "grid":
        return SearchGrowth(sweep, ended, folder / STUDY, failed)
    return RaceGrowth(sweep) if sweep.scheduler.method == "race" else NoGrowth()


def known_to_its_end(sweep: Sweep, ended: Trials, folder: Path) -> SweepPlan:
    """The trials that a sweep is known to have, and what a search would try next: if all of them
    `ended`, so has the sweep. Leaves the study in `folder` as it is."""
    with TemporaryDirectory() as scratch:
        if (folder / STUDY).is_file():
            shutil.copyfile(folder / STUDY, Path(scratch) / STUDY)
        growth = growth_of(sweep, ended, {}, Path(scratch))
        grown = growth.grown(ended, idle=True)
        growth.close(ended)
    return grown or plan_with(sweep, ended)


# --- what a search learns from ---------------------------------------------------------------


def objectives_of(sweep: Sweep) -> tuple[Objective, ...]:
    """What the search seeks: unless said, what selects the winner."""
    chosen = Objective(metric=sweep.select.metric, mode=sweep.select.mode)
    return sweep.search.objectives or (chosen,)


def outcome(trials: Sequence[TrialRecord], objectives: Sequence[Objective]) -> Ended:
    """How a configuration ended, given its trials: means over the seeds that completed. One that
    was stopped early says something only of the held-out loss."""
    from orchestrator.proposals import Ended

    completed = [trial for trial in trials if trial.status == "completed"]
    stopped = [trial for trial in trials if trial.status == "stopped"]
    if stopped and [each.metric for each in objectives] == ["lm_loss.after"]:
        losses = [_value(t, "lm_loss.stopped") for t in stopped]
        tokens = min(trial.tokens_trained or 0 for trial in stopped)
        return Ended("stopped", (statistics.fmean(losses),), tokens)
    if stopped or not completed:
        return _failed()
    return Ended("completed", tuple(_mean(completed, each.metric) for each in objectives))


def _mean(trials: Sequence[TrialRecord], metric: str) -> float:
    return statistics.fmean(_value(trial, metric) for trial in trials)


def _value(trial: TrialRecord, metric: str) -> float:
    found = getattr(trial, metric) if metric in SIZES else trial.metrics.get(metric)
    return math.nan if found is None else float(found)


def _failed() -> Ended:
    from orchestrator.proposals import Ended

    return Ended("failed", None)
