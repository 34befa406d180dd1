"""Axes and constraints → frozen trials with stable ids; says what it left out and why.

`make_trial` is pure, so a grid and a searcher that proposes one trial at a time use it alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.axes import TEACHER, Grid, key_of, parse_axes, shown
from orchestrator.located import Node, Part, merge, nest, undotted
from orchestrator.measures import unmeasured
from orchestrator.pruning import WIDTHS, PruneSettings, is_size
from orchestrator.spec import SpecError, Sweep, TrialConfig, build_trial
from orchestrator.wording import Problem, choices, shortest_names
from trainers.config import hash_of, identity
from trainers.shapes import Shape, Sizes, shape_of, source_config

RUNG = "rung"
"""The axis that a race adds: which of its rungs a trial ran."""


@dataclass(frozen=True)
class Trial:
    """One resolved setting with a seed. `axes` holds what it was given by name, without `seed`."""

    trial_id: str
    config: TrialConfig
    axes: Mapping[str, Any]
    baseline: str | None
    seed: int
    rung: int | None = None
    """Which rung of a race the trial runs, from 0; its name is among the axes as `rung`."""

    @property
    def label(self) -> str:
        """For people: the baseline's name or the values of the axes, and the seed."""
        short = shortest_names(self.axes)
        given = [f"{short[name]}={shown(value)}" for name, value in self.axes.items()]
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
    """Every trial of a sweep; of a search those that do not depend on what is proposed. Raises
    `SpecError` with all that is wrong with any of them."""
    if sweep.search.method != "grid":
        return searched(sweep, pool_of(sweep), ())
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
    space = Space(tuple(trials.values()), tuple(left_out))
    _check_measured(sweep, space)
    return space


@dataclass(frozen=True)
class Pool:
    """The configurations that a search chooses from: the grid less what exclusions and constraints
    take away, by `key_of` the values of their axes."""

    requests: Mapping[str, tuple[_Request, ...]]
    left_out: tuple[LeftOut, ...]

    @property
    def configurations(self) -> dict[str, dict[str, Any]]:
        """Names of axes -> values; those that do not apply are left out."""
        return {key: _given(requests[0]) for key, requests in self.requests.items()}

    def samples(self) -> list[str]:
        """A few configurations that have every value of every axis among them: making all of them
        would take long."""
        seen: set[tuple[str, str]] = set()
        found = []
        for key, given in self.configurations.items():
            values = {(name, key_of(value)) for name, value in given.items()}
            if not values <= seen:
                seen |= values
                found.append(key)
        return found


def pool_of(sweep: Sweep) -> Pool:
    """Every configuration of a sweep's grid. Raises `SpecError` where a value that an axis lists
    makes no trial."""
    grid, left_out = parse_axes(sweep), list[LeftOut]()
    requests: dict[str, tuple[_Request, ...]] = {}
    for request in _constrained(sweep, _grid_requests(sweep, grid, left_out), left_out):
        key = key_of(_given(request))
        requests[key] = (*requests.get(key, ()), request)
    pool = Pool(requests, tuple(left_out))
    _check_measured(sweep, searched(sweep, pool, pool.samples()))
    return pool


def searched(sweep: Sweep, pool: Pool, keys: Iterable[str]) -> Space:
    """The space of a search so far: the teacher, the configurations of these keys with every seed,
    the baselines. Raises `SpecError`."""
    chosen = [request for key in keys for request in pool.requests.get(key, ())]
    ends = list(_ends(sweep))
    first = [request for request in ends if request.baseline == TEACHER]
    trials: dict[str, Trial] = {}
    errors: dict[str, None] = {}
    for request in (*first, *chosen, *ends[len(first) :]):
        made = _make(sweep, request)
        if isinstance(made, Trial):
            trials.setdefault(made.trial_id, made)
            continue
        tree = _tree(sweep, request)
        errors |= dict.fromkeys(problem.message(tree) + request.note for problem in made)
    if errors:
        raise SpecError(*errors)
    return Space(tuple(trials.values()), pool.left_out)


def _check_measured(sweep: Sweep, space: Space) -> None:
    """Raises `SpecError` where the sweep goes by what no trial measures, or a later rung has
    settings that no trial can have."""
    grid = [each for each in space.trials if each.baseline is None]
    once = {key_of(dict(each.axes)): each for each in grid}.values()  # seeds measure the same
    later = (next_rung(sweep, once, n) for n in range(1, len(sweep.scheduler.rungs)))
    rungs = [[trial.config for trial in trials] for trials in (once, *later)]
    if once and (problems := unmeasured(sweep, rungs)):
        raise SpecError(*(problem.message(sweep.tree) for problem in problems))


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
    assignment = {name: value for name, value in trial.axes.items() if name != RUNG}
    request = _request(sweep, assignment, trial.baseline, trial.seed)
    tree = _tree(sweep, replace(request, rung=trial.rung))
    return str(tree.nearest(_parts(dotted)).origin)


def next_rung(sweep: Sweep, survivors: Iterable[Trial], rung: int) -> Iterator[Trial]:
    """The same configurations in a later rung of the race. Raises `SpecError`."""
    for trial in survivors:
        assignment = {name: value for name, value in trial.axes.items() if name != RUNG}
        request = replace(_request(sweep, assignment, trial.baseline, trial.seed), rung=rung)
        made = _make(sweep, request)
        if not isinstance(made, Trial):
            tree = _tree(sweep, request)
            raise SpecError(*(problem.message(tree) + request.note for problem in made))
        yield made


def source_shape(config: TrialConfig) -> Shape:
    """The shape of a trial's source model. Raises `ValueError` where it cannot be known."""
    key = (hash_of(identity(config.source)), hash_of(identity(config.corpus)))
    if key not in _SHAPES:
        _SHAPES[key] = shape_of(source_config(config.source, config.corpus))
    return _SHAPES[key]


_SHAPES: dict[tuple[str, str], Shape] = {}


# --- one trial -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Request:
    """What a trial is made of."""

    values: Mapping[str, Node] = field(default_factory=dict)
    baseline: str | None = None
    seed: int = 0
    rung: int | None = None

    @property
    def note(self) -> str:
        """For a message: which trial it is about, unless it is about what all share."""
        if self.baseline == TEACHER:
            return ""
        if self.baseline:
            return f" (in the baseline {self.baseline})"
        given = ", ".join(f"{name}={shown(node.told())}" for name, node in self.values.items())
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
    axes = {name: node.told() for name, node in request.values.items()}
    if request.rung is not None and request.baseline is None:
        axes[RUNG] = sweep.scheduler.rungs[request.rung].name
    trial_id = hash_of(identity(config))[:12]
    return Trial(trial_id, config, axes, request.baseline, request.seed, request.rung)


def _tree(sweep: Sweep, request: _Request) -> Node:
    """The settings of a trial, each with the place it came from."""
    tree = sweep.base
    if request.baseline == TEACHER:
        nothing = Node(None, tree.origin)
        tree = tree.with_entry("prune", nothing).with_entry("distill", nothing)
        tree = tree.with_entry("chain", Node((), tree.origin)).with_entry("correct", nothing)
    elif request.baseline:
        tree = merge(tree, _baseline(sweep, request.baseline))
    # A name inside another one (a.b and a) is laid over it, in whatever order they are listed.
    for name in sorted(request.values, key=lambda name: (name.count("."), name)):
        node = request.values[name]
        tree = merge(tree, nest(name, node) if node.name is None else undotted(node))
    if request.rung is not None:
        rung = sweep.tree.at(("scheduler", "rungs", request.rung, "set"))
        tree = merge(tree, undotted(rung)) if rung is not None and rung.mapping else tree
    seeds = sweep.tree.child("seeds")
    return tree.with_entry("seed", Node(request.seed, seeds.origin if seeds else tree.origin))


def _baseline(sweep: Sweep, name: str) -> Node:
    node = sweep.tree.at(("baselines", name))
    empty = Node({}, sweep.tree.origin, implied=True)
    return undotted(node) if node is not None and node.mapping else empty


def _requests(sweep: Sweep, grid: Grid, left_out: list[LeftOut]) -> Iterator[_Request]:
    """What to make trials of, in order; adds what is taken away to `left_out`."""
    race = sweep.scheduler.method == "race"
    ends = list(_ends(sweep))
    yield from (request for request in ends if request.baseline == TEACHER)
    for request in _constrained(sweep, _grid_requests(sweep, grid, left_out), left_out):
        yield replace(request, rung=0) if race else request
    yield from (request for request in ends if request.baseline != TEACHER)


def _ends(sweep: Sweep) -> Iterator[_Request]:
    """What stands before and after the grid: the teacher, then the baselines."""
    for seed in sweep.seeds if _teacher_has_seeds(sweep) else sweep.seeds[:1]:
        yield _Request(baseline=TEACHER, seed=seed)
    for name in sweep.baselines:
        for seed in sweep.seeds:
            # A baseline is compared with those that ran the whole race.
            last = len(sweep.scheduler.rungs) - 1 if sweep.scheduler.method == "race" else None
            yield _Request(baseline=name, seed=seed, rung=last)


def _teacher_has_seeds(sweep: Sweep) -> bool:
    """Whether every seed pretrains a source of its own."""
    source = sweep.base.child("source")
    if source is None or source.kind != "scratch":
        return False
    seed = source.child("seed")
    return seed is None or seed.value is None


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
        given = {name: node.told() for name, node in values.items()}
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


# --- constraints -----------------------------------------------------------------------------


def _constrained(
    sweep: Sweep, requests: Iterable[_Request], left_out: list[LeftOut]
) -> Iterable[_Request]:
    """The requests whose shape meets the sweep's constraints. Raises `SpecError` without any."""
    constraints = sweep.constraints
    if not constraints:
        return requests
    shapes = _Shapes(sweep)
    met: list[tuple[_Request, Shape, Shape]] = []
    missed: list[tuple[float, _Request, str]] = []
    for request in requests:
        shape, source = shapes.of(request)
        if (why := constraints.unmet(shape, source)) is None:
            met.append((request, shape, source))
            continue
        missed.append((constraints.excess(shape, source), request, why))
        if request.seed == sweep.seeds[0]:  # it is the same for the others
            left_out.append(LeftOut(_given(request), why))
    if not met:
        nearest = min(missed, key=lambda each: each[0])
        given = ", ".join(f"{name}={shown(value)}" for name, value in _given(nearest[1]).items())
        origin = sweep.tree.nearest(("constraints",)).origin
        count = len(missed) // len(sweep.seeds)
        raise SpecError(
            f"{origin}: constraints: none of {count} candidates meets them; the nearest, {given}, "
            f"has {nearest[2]}"
        )
    if constraints.nearest is None:
        return [request for request, _, _ in met]
    return _nearest(sweep, met, left_out)


def _nearest(
    sweep: Sweep, met: list[tuple[_Request, Shape, Shape]], left_out: list[LeftOut]
) -> list[_Request]:
    """Those of the shapes nearest the target; the earlier of equally near ones."""
    distances: dict[Sizes, float] = {}
    for _, shape, source in met:
        distances.setdefault(shape.sizes, sweep.constraints.distance(shape, source))
    limit = sweep.constraints.nearest
    kept = set(sorted(distances, key=lambda sizes: distances[sizes])[:limit])
    reason = f"meets the constraints, but {limit} shapes are nearer the target"
    far = [request for request, shape, _ in met if shape.sizes not in kept]
    left_out += [LeftOut(_given(r), reason) for r in far if r.seed == sweep.seeds[0]]
    return [request for request, shape, _ in met if shape.sizes in kept]


def _given(request: _Request) -> dict[str, Any]:
    return {name: node.told() for name, node in request.values.items()}


SHAPE_AXES = ("prune.depth.keep", *(f"prune.width.{name}" for name in WIDTHS))


class _Shapes:
    """Shapes of requested trials. To type a whole trial takes a millisecond and a space may hold
    tens of thousands, so trials that differ only in sizes are typed once."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._typed: dict[str, tuple[PruneSettings | None, Shape]] = {}

    def of(self, request: _Request) -> tuple[Shape, Shape]:
        """The shape of the trial's student and of its source. Raises `SpecError`."""
        sizes = {n: v.plain() for n, v in request.values.items() if n in SHAPE_AXES}
        rest = {n: v.told() for n, v in request.values.items() if n not in SHAPE_AXES}
        key = key_of(rest)
        if key not in self._typed or not all(map(is_size, sizes.values())):
            self._typed[key] = self._type(request)  # tells what is wrong with what is no size
        prune, source = self._typed[key]
        if prune is None:
            return source, source
        return source.resized(_with_sizes(prune, sizes).target(source)), source

    def _type(self, request: _Request) -> tuple[PruneSettings | None, Shape]:
        made = _make(self._sweep, request)
        tree = _tree(self._sweep, request)
        if not isinstance(made, Trial):
            raise SpecError(*(problem.message(tree) + request.note for problem in made))
        try:
            return made.config.prune, source_shape(made.config)
        except (ValueError, OSError) as error:
            origin = tree.nearest(("source",)).origin
            raise SpecError(f"{origin}: source: {error}") from error


def _with_sizes(prune: PruneSettings, sizes: Mapping[str, Any]) -> PruneSettings:
    depth, width = prune.depth, prune.width
    if depth is not None and "prune.depth.keep" in sizes:
        depth = depth.model_copy(update={"keep": sizes["prune.depth.keep"]})
    widths = {
        name: sizes[f"prune.width.{name}"] for name in WIDTHS if f"prune.width.{name}" in sizes
    }
    if width is not None and widths:
        width = width.model_copy(update=widths)
    return prune.model_copy(update={"depth": depth, "width": width})


def _parts(dotted: str) -> tuple[Part, ...]:
    return tuple(int(part) if part.isdigit() else part for part in dotted.split("."))
