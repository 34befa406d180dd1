"""Axes and constraints → frozen trials with stable ids; says what it left out and why.

`make_trial` is pure, so a grid and a searcher that proposes one trial at a time use it alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.axes import TEACHER, Grid, key_of, parse_axes, shown
from orchestrator.located import Node, Part, merge, nest, undotted
from orchestrator.spec import SpecError, Sweep, TrialConfig, build_trial
from orchestrator.wording import Problem, choices
from trainers.config import hash_of, identity


@dataclass(frozen=True)
class Trial:
    """One resolved setting with a seed. `axes` holds what it was given by name, without `seed`."""

    trial_id: str
    config: TrialConfig
    axes: Mapping[str, Any]
    baseline: str | None
    seed: int

    @property
    def label(self) -> str:
        """For people: the baseline's name or the values of the axes, and the seed."""
        given = [f"{name}={shown(value)}" for name, value in self.axes.items()]
        return ", ".join([*([self.baseline] if self.baseline else given), f"seed={self.seed}"])


@dataclass(frozen=True)
class LeftOut:
    """A combination of the axes (or a baseline) that makes no trial of its own."""

    assignment: Mapping[str, Any]
    reason: str


@dataclass(frozen=True)
class Space:
    """The trials of a sweep in a fixed order: teacher, grid with seeds innermost, baselines."""

    trials: tuple[Trial, ...]
    left_out: tuple[LeftOut, ...]


def enumerate_trials(sweep: Sweep) -> Space:
    """Every trial of a sweep. Raises `SpecError` with all that is wrong with any of them."""
    grid = parse_axes(sweep)
    trials: dict[str, Trial] = {}
    left_out: list[LeftOut] = []
    errors: dict[str, str] = {}
    for request in _requests(sweep, grid, left_out):
        made = _make(sweep, request)
        if isinstance(made, Trial):
            first = trials.setdefault(made.trial_id, made)
            if first is not made:
                given = {"baseline": made.baseline} if made.baseline else made.axes
                reason = f"the same settings as the trial with {first.label}"
                left_out.append(LeftOut({**given, "seed": made.seed}, reason))
            continue
        tree = _tree(sweep, request)
        for problem in made:
            errors.setdefault(problem.message(tree), request.note)
    if errors:
        raise SpecError(*(message + note for message, note in errors.items()))
    return Space(tuple(trials.values()), tuple(left_out))


def make_trial(
    sweep: Sweep, assignment: Mapping[str, Any], baseline: str | None = None, seed: int = 0
) -> Trial:
    """The trial that gives these values to these names; axes whose condition fails are ignored.

    Raises `SpecError`, each message with the place of the value that is wrong.
    """
    request = _request(sweep, assignment, baseline, seed)
    made = _make(sweep, request)
    if isinstance(made, Trial):
        return made
    tree = _tree(sweep, request)
    raise SpecError(*(problem.message(tree) + request.note for problem in made))


def origin_of(sweep: Sweep, trial: Trial, dotted: str) -> str:
    """`file:line` (or `--set …`) that gave this trial this setting, or the nearest around it."""
    tree = _tree(sweep, _request(sweep, trial.axes, trial.baseline, trial.seed))
    return str(tree.nearest(_parts(dotted)).origin)


# --- one trial -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Request:
    """What a trial is made of."""

    values: Mapping[str, Node] = field(default_factory=dict)
    baseline: str | None = None
    seed: int = 0

    @property
    def note(self) -> str:
        """For a message: which trial it is about, unless it is about what all share."""
        if self.baseline == TEACHER:
            return ""
        if self.baseline:
            return f" (in the baseline {self.baseline})"
        given = ", ".join(f"{name}={shown(node.plain())}" for name, node in self.values.items())
        return f" (in the trial with {given})" if given else ""


def _request(
    sweep: Sweep, assignment: Mapping[str, Any], baseline: str | None, seed: int
) -> _Request:
    grid = parse_axes(sweep)
    messages = [
        _no_such("axis", name, grid.by_name) for name in assignment if name not in grid.by_name
    ]
    baselines = (TEACHER, *sweep.baselines)
    if baseline is not None and baseline not in baselines:
        messages.append(_no_such("baseline", baseline, baselines))
    if messages:
        raise SpecError(*(f"{sweep.tree.origin}: {message}" for message in messages))
    values = {name: grid.node(name, value) for name, value in assignment.items()}
    return _Request(grid.active(values), baseline, seed)


def _no_such(what: str, name: str, names: Iterable[str]) -> str:
    return f"there is no {what} '{name}'{choices(name, list(names))}"


def _make(sweep: Sweep, request: _Request) -> Trial | list[Problem]:
    config, problems = build_trial(_tree(sweep, request))
    if config is None:
        return problems
    axes = {name: node.plain() for name, node in request.values.items()}
    trial_id = hash_of(identity(config))[:12]
    return Trial(trial_id, config, axes, request.baseline, request.seed)


def _tree(sweep: Sweep, request: _Request) -> Node:
    """The settings of a trial, each with the place it came from."""
    tree = sweep.base
    if request.baseline == TEACHER:
        nothing = Node(None, tree.origin)
        tree = tree.with_entry("prune", nothing).with_entry("distill", nothing)
    elif request.baseline:
        tree = merge(tree, _baseline(sweep, request.baseline))
    # A name inside another one (a.b and a) is laid over it, in whatever order they are listed.
    for name in sorted(request.values, key=lambda name: (name.count("."), name)):
        tree = merge(tree, nest(name, request.values[name]))
    seeds = sweep.tree.child("seeds")
    return tree.with_entry("seed", Node(request.seed, seeds.origin if seeds else tree.origin))


def _baseline(sweep: Sweep, name: str) -> Node:
    node = sweep.tree.at(("baselines", name))
    empty = Node({}, sweep.tree.origin, implied=True)
    return undotted(node) if node is not None and node.mapping else empty


def _requests(sweep: Sweep, grid: Grid, left_out: list[LeftOut]) -> Iterator[_Request]:
    """What to make trials of, in order; adds what exclusions take away to `left_out`."""
    yield _Request(baseline=TEACHER, seed=sweep.seeds[0])
    yield from _grid_requests(sweep, grid, left_out)
    for name in sweep.baselines:
        for seed in sweep.seeds:
            yield _Request(baseline=name, seed=seed)


def _grid_requests(sweep: Sweep, grid: Grid, left_out: list[LeftOut]) -> Iterator[_Request]:
    seen: set[str] = set()
    some = False
    for rows in itertools.product(*(axis.rows for axis in grid.axes)):
        every = {
            name: node
            for axis, row in zip(grid.axes, rows, strict=True)
            for name, node in zip(axis.names, row, strict=True)
        }
        values = grid.active(every)
        given = {name: node.plain() for name, node in values.items()}
        key = key_of(given)
        if key in seen:  # it differs in an axis that does not apply: one trial, as expected
            continue
        seen.add(key)
        if reason := grid.excluded(values):
            left_out.append(LeftOut(given, reason))
            continue
        for seed in sweep.seeds:
            if reason := grid.excluded({**values, "seed": Node(seed, sweep.tree.origin)}):
                left_out.append(LeftOut({**given, "seed": seed}, reason))
                continue
            some = True
            yield _Request(values, seed=seed)
    if not some:
        origin = sweep.tree.nearest(("exclude",)).origin
        raise SpecError(f"{origin}: exclude: no trial is left")


def _parts(dotted: str) -> tuple[Part, ...]:
    return tuple(int(part) if part.isdigit() else part for part in dotted.split("."))
