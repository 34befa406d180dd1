"""Optuna proposes configurations of a sweep's grid, learning from those that have ended.

The grid says which configurations there are: conditional axes, exclusions and constraints are its
business. The study lies in a database of its own beside the results, so that a search goes on after
any stop; but the ledger is the truth, and what the database lacks is told to it again. The only
import of optuna.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from orchestrator.axes import Axis, Grid, key_of, shown
from orchestrator.scheduling import Search
from trainers.config import hash_of

Configuration = Mapping[str, Any]
"""Names of axes -> values; those that do not apply are left out."""

MISSES = 10
"""Proposals in a row that are no new configuration, after which one is drawn at random."""
KEY, MISS = "configuration", "not_run"
"""Attributes of an Optuna trial: the configuration that it stands for, or why it has none."""


@dataclass(frozen=True)
class Ended:
    """How a configuration ended: what each objective came to (None where it failed), or, stopped
    early, its held-out loss after so many tokens."""

    status: Literal["completed", "stopped", "failed"]
    values: tuple[float, ...] | None
    tokens: int = 0


class Proposer:
    """The search of one sweep. `candidates` are all configurations of its grid by `key_of`; of
    those that have not `ended`, some are to be tried `again`."""

    def __init__(
        self,
        search: Search,
        directions: Sequence[Literal["max", "min"]],
        grid: Grid,
        candidates: Mapping[str, Configuration],
        database: Path,
        ended: Mapping[str, Ended],
        again: Sequence[str] = (),
    ) -> None:
        self._search, self._candidates = search, candidates
        self._space = _Space(grid)
        self._storage, self._study = _study(search, directions, self._space, database)
        self._running: dict[str, Any] = {}
        self._seen: set[str] = set()
        """Configurations that were proposed, in this process or before."""
        self._again: list[str] = []
        self._recall(ended, again)

    def propose(self) -> Configuration | None:
        """A configuration that is to be run next; None when there is none left to try."""
        if self._again:
            key = self._again.pop(0)
            self._running[key] = trial = self._study.ask()
            self._space.suggested(trial)
            return self._candidates[key]
        assert self._search.trials is not None
        if len(self._seen) >= min(self._search.trials, len(self._candidates)):
            return None
        key, trial = self._new()
        self._seen.add(key)
        self._running[key] = trial
        return self._candidates[key]

    def tell(self, key: str, ended: Ended) -> None:
        """Say how a proposed configuration ended; anything else is ignored."""
        trial = self._running.pop(key, None)
        if trial is not None:
            self._tell(trial, ended)

    def close(self) -> None:
        """Let go of the database."""
        self._storage.remove_session()

    # --- remembering

    def _recall(self, ended: Mapping[str, Ended], again: Sequence[str]) -> None:
        """Bring the study in line with the ledger: configurations that ended are told or added,
        and those that are to be tried `again` or were under way when the search last stopped come
        first."""
        import optuna

        states = optuna.trial.TrialState
        for trial in self._study.get_trials(deepcopy=False):
            # What an earlier process left open cannot be told what was measured on the way: it is
            # closed, and what is known of it comes in as a trial of its own.
            if trial.state is states.WAITING:
                self._study.tell(self._study.ask(), state=states.FAIL)
            elif trial.state is states.RUNNING:
                self._study.tell(trial.number, state=states.FAIL)
        decided: set[str] = set()
        for trial in self._study.get_trials(deepcopy=False):
            if (key := trial.user_attrs.get(KEY)) in self._candidates:
                self._seen.add(key)
                decided |= {key} if trial.state in (states.COMPLETE, states.PRUNED) else set()
        for key, how in ended.items():
            failed_before = how.status == "failed" and key in self._seen
            if key in self._candidates and key not in decided and not failed_before:
                self._add(key, how)
        self._seen |= set(again)
        for key in sorted(self._seen - set(ended)):
            parameters = self._space.parameters(self._candidates[key])
            self._study.enqueue_trial(parameters, user_attrs={KEY: key})
            self._again.append(key)

    def _add(self, key: str, how: Ended) -> None:
        import optuna

        self._seen.add(key)
        values = self._finite(how)
        completed = how.status == "completed" and values is not None
        params = self._space.parameters(self._candidates[key])
        self._study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.COMPLETE if completed else _state(how, values),
                values=values if completed else None,
                params=params,
                distributions={name: self._space.distributions[name] for name in params},
                user_attrs={KEY: key},
                intermediate_values={how.tokens: values[0]} if not completed and values else {},
            )
        )

    # --- asking and telling

    def _new(self) -> tuple[str, Any]:
        """A configuration of the grid that has not been tried, and its Optuna trial."""
        import optuna

        for attempt in range(MISSES + 1):
            if attempt == MISSES:
                left = [key for key in self._candidates if key not in self._seen]
                chosen = random.Random(f"{self._search.seed} {len(self._seen)}").choice(left)
                self._study.enqueue_trial(self._space.parameters(self._candidates[chosen]))
            trial = self._study.ask()
            key = key_of(self._space.suggested(trial))
            if key in self._candidates and key not in self._seen:
                trial.set_user_attr(KEY, key)
                return key, trial
            why = "tried already" if key in self._candidates else "left out of the grid"
            trial.set_user_attr(MISS, why)
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
        raise AssertionError("a configuration that was enqueued is not what Optuna gave")

    def _tell(self, trial: Any, how: Ended) -> None:
        values = self._finite(how)
        if how.status == "completed" and values is not None:
            self._study.tell(trial, list(values))
            return
        state = _state(how, values)
        if values is not None and _learns_from_stopped(how, values):
            trial.report(values[0], how.tokens)
        self._study.tell(trial, state=state)

    def _finite(self, how: Ended) -> tuple[float, ...] | None:
        """The values, unless there is one that no model can learn from."""
        if how.values is None or not all(map(math.isfinite, how.values)):
            return None
        return how.values


def _learns_from_stopped(how: Ended, values: tuple[float, ...]) -> bool:
    """Optuna learns from a measurement on the way where there is one objective."""
    return how.status == "stopped" and len(values) == 1


def _state(how: Ended, values: tuple[float, ...] | None) -> Any:
    """Of a configuration without a value at its end. NaN is a failure: told as a value, Optuna
    would leave its trial running for ever."""
    from optuna.trial import TrialState

    stopped = values is not None and _learns_from_stopped(how, values)
    return TrialState.PRUNED if stopped else TrialState.FAIL


def _study(
    search: Search, directions: Sequence[Literal["max", "min"]], space: _Space, database: Path
) -> tuple[Any, Any]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # Another space or other objectives are another study; it is told again what it can use.
    objectives = [objective.model_dump() for objective in search.objectives]
    what = {"method": search.method, "objectives": objectives, "space": space.described}
    storage = optuna.storages.RDBStorage(f"sqlite:///{database}")
    study = optuna.create_study(
        study_name=hash_of({**what, "directions": list(directions)})[:16],
        storage=storage,
        sampler=_sampler(search),
        directions=["minimize" if mode == "min" else "maximize" for mode in directions],
        load_if_exists=True,
    )
    return storage, study


def _sampler(search: Search) -> Any:
    import optuna

    samplers, seed = optuna.samplers, search.seed
    match search.method:
        case "tpe":
            return samplers.TPESampler(
                seed=seed, n_startup_trials=search.startup, constant_liar=True
            )
        case "gp":
            return samplers.GPSampler(seed=seed, n_startup_trials=search.startup)
        case "nsga2":
            return samplers.NSGAIISampler(seed=seed, population_size=search.startup)
        case _:
            return samplers.RandomSampler(seed=seed)


# --- the grid as Optuna sees it --------------------------------------------------------------


class _Space:
    """Axes as Optuna's parameters. An axis of evenly spaced numbers is a number; any other is a
    choice among its values' texts, for Optuna stores no mapping. Linked axes are one parameter."""

    def __init__(self, grid: Grid) -> None:
        self._axes = {" + ".join(axis.names): axis for axis in _conditions_first(grid)}
        self._grid = grid
        self.distributions = {name: _distribution(axis) for name, axis in self._axes.items()}

    @property
    def described(self) -> dict[str, Any]:
        """What makes two spaces the same for Optuna."""
        import optuna

        return {
            name: optuna.distributions.distribution_to_json(distribution)
            for name, distribution in self.distributions.items()
        }

    def suggested(self, trial: Any) -> dict[str, Any]:
        """The configuration that an Optuna trial proposes; an axis is only asked for where it
        applies."""
        found: dict[str, Any] = {}
        for name, axis in self._axes.items():
            if all(o in found and key_of(found[o]) in wanted for o, wanted in axis.when.items()):
                found |= _row_of(axis, _suggestion(trial, name, self.distributions[name]))
        order = [name for axis in self._grid.axes for name in axis.names]
        return {name: found[name] for name in order if name in found}

    def parameters(self, configuration: Configuration) -> dict[str, Any]:
        """What Optuna would call this configuration."""
        return {
            name: _parameter(axis, configuration)
            for name, axis in self._axes.items()
            if axis.names[0] in configuration
        }


def _conditions_first(grid: Grid) -> list[Axis]:
    """The axes, each after those that its condition is about."""
    ordered: list[Axis] = []
    pending = list(grid.axes)
    while pending:
        known = {name for axis in ordered for name in axis.names}
        axis = next(axis for axis in pending if set(axis.when) <= known)
        pending.remove(axis)
        ordered.append(axis)
    return ordered


def _distribution(axis: Axis) -> Any:
    import optuna

    values = [row[0].plain() for row in axis.rows]
    if (step := _even_step(values)) is not None and len(axis.names) == 1:
        if all(isinstance(value, int) for value in values):
            return optuna.distributions.IntDistribution(values[0], values[-1], step=int(step))
        return optuna.distributions.FloatDistribution(values[0], values[-1], step=step)
    return optuna.distributions.CategoricalDistribution([_text(row) for row in _told(axis)])


def _suggestion(trial: Any, name: str, distribution: Any) -> Any:
    import optuna

    match distribution:
        case optuna.distributions.IntDistribution(low=low, high=high, step=step):
            return trial.suggest_int(name, low, high, step=step)
        case optuna.distributions.FloatDistribution(low=low, high=high, step=step):
            return trial.suggest_float(name, low, high, step=step)
        case _:
            return trial.suggest_categorical(name, distribution.choices)


def _even_step(values: Sequence[Any]) -> float | None:
    """The distance between neighbours of at least three rising numbers, where it is one."""
    numbers = [value for value in values if type(value) in (int, float)]
    if len(values) < 3 or len(numbers) < len(values):
        return None
    steps = [after - before for before, after in itertools.pairwise(numbers)]
    even = steps[0] > 0 and all(math.isclose(step, steps[0], rel_tol=1e-6) for step in steps)
    return round(steps[0], 10) if even else None


def _told(axis: Axis) -> list[dict[str, Any]]:
    return [
        {name: node.told() for name, node in zip(axis.names, row, strict=True)} for row in axis.rows
    ]


def _text(row: Mapping[str, Any]) -> str:
    return ", ".join(shown(value) for value in row.values())


def _row_of(axis: Axis, suggested: Any) -> dict[str, Any]:
    """The values that Optuna's one stands for; a float may be off by its rounding."""
    rows = _told(axis)
    if isinstance(suggested, str):
        return next(row for row in rows if _text(row) == suggested)
    return min(rows, key=lambda row: abs(row[axis.names[0]] - suggested))


def _parameter(axis: Axis, configuration: Configuration) -> Any:
    row = {name: configuration[name] for name in axis.names}
    values = [each[0].plain() for each in axis.rows]
    return row[axis.names[0]] if len(axis.names) == 1 and _even_step(values) else _text(row)
