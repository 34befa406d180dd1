"""The axes of a sweep: alone, linked or conditional, and the combinations that are excluded."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.asked import BASELINE, GROUPS, RUNG, SEED
from orchestrator.asked import key_of as key_of
from orchestrator.located import Node, Part, locate
from orchestrator.schema import DATA_FOLDER, unknown_setting
from orchestrator.spec import NAME, SpecError, Sweep, TrialConfig
from orchestrator.wording import Problem, choices

TEACHER = "teacher"
"""Name of the baseline that every sweep has: the source model, neither pruned nor distilled."""

MAX_COMBINATIONS = 100_000
RANGE = ("from", "to", "step")


@dataclass(frozen=True)
class Axis:
    """Names that move together (mostly one), and the values they take, a row at a time."""

    names: tuple[str, ...]
    rows: tuple[tuple[Node, ...], ...]
    place: Node
    condition: Node | None = None
    when: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """The condition, read: other axes and the keys of the values that they must have."""


@dataclass(frozen=True)
class Exclusion:
    """Values of axes that are not tried together, as keys."""

    rule: Mapping[str, frozenset[str]]
    place: Node


@dataclass(frozen=True)
class Grid:
    """The axes in file order, linked ones last, and the exclusions."""

    axes: tuple[Axis, ...]
    exclusions: tuple[Exclusion, ...] = ()

    @property
    def by_name(self) -> dict[str, Axis]:
        """The axis each name belongs to."""
        return {name: axis for axis in self.axes for name in axis.names}

    def values(self, name: str) -> list[Node]:
        """The values of one name, in file order."""
        axis = self.by_name[name]
        return [row[axis.names.index(name)] for row in axis.rows]

    def node(self, name: str, value: Any) -> Node:
        """A value of an axis with its place; one that is not listed stands at the axis."""
        listed = (node for node in self.values(name) if key_of(node.told()) == key_of(value))
        return next(listed, None) or locate(value, self.by_name[name].place.origin)

    def active(self, values: Mapping[str, Node]) -> dict[str, Node]:
        """The values less those of axes whose condition does not hold."""
        if not any(axis.when for axis in self.axes):
            return dict(values)
        axes = self.by_name

        def applies(name: str) -> bool:
            return name in values and all(
                applies(other) and key_of(values[other].told()) in allowed
                for other, allowed in axes[name].when.items()
            )

        return {name: node for name, node in values.items() if applies(name)}

    def excluded(self, values: Mapping[str, Node]) -> str | None:
        """Which exclusion takes these values away, if one does."""
        keys = {name: key_of(node.told()) for name, node in values.items()}
        for exclusion in self.exclusions:
            if all(keys.get(name) in allowed for name, allowed in exclusion.rule.items()):
                return f"excluded at {exclusion.place.origin}"
        return None


def parse_axes(sweep: Sweep) -> Grid:
    """The axes of a sweep. Raises `SpecError`."""
    parser = _Parser(sweep.tree, list(sweep.seeds))
    grid = parser.grid()
    if parser.problems:
        raise SpecError(*(problem.message(sweep.tree) for problem in parser.problems))
    return grid


class _Parser:
    """Reads axes, linked axes, conditions and exclusions, collecting problems."""

    def __init__(self, tree: Node, seeds: list[int]) -> None:
        self.problems: list[Problem] = []
        self._tree = tree
        self._seeds = seeds

    def grid(self) -> Grid:
        """The grid as far as it can be read; `problems` has the rest."""
        plain = [self._axis(name, node) for name, node in self._under("axes").mapping.items()]
        groups = enumerate(self._under("linked").sequence)
        linked = [self._group(index, node) for index, node in groups]
        grid = Grid((*plain, *linked))
        self._once_each()
        grid = replace(grid, axes=tuple(self._conditioned(axis, grid) for axis in grid.axes))
        self._no_circle(grid)
        self._few_enough(grid)
        self._baselines()
        self._rungs()
        self._claims(grid)
        rules = enumerate(self._under("exclude").sequence)
        return replace(grid, exclusions=tuple(self._exclusion(i, n, grid) for i, n in rules))

    def _under(self, key: str) -> Node:
        return self._tree.child(key) or Node(None, self._tree.origin)

    def _problem(self, text: str, *parts: Part) -> None:
        self.problems.append(Problem(parts, text))

    # axes

    def _axis(self, name: str, node: Node) -> Axis:
        if "variants" in node.mapping:
            return self._variants(name, node)
        self._known(name, "axes", name)
        if not node.mapping:
            rows = self._values(node, ("axes", name))
            return Axis((name,), tuple((each,) for each in rows), node)
        if "from" in node.mapping:
            return self._range(name, node)
        for key in node.mapping:
            if key not in ("values", "when"):
                text = f"unknown key{choices(key, ['values', 'when', *RANGE, 'variants'])}"
                self._problem(text, "axes", name, key)
        values = node.child("values") or Node(None, node.origin)
        rows = self._values(values, ("axes", name, "values"))
        return Axis((name,), tuple((each,) for each in rows), node, node.child("when"))

    def _variants(self, name: str, node: Node) -> Axis:
        """An axis of named groups of settings, laid over the trial's."""
        parts = ("axes", name)
        for key in node.mapping:
            if key not in ("variants", "when"):
                self._problem(f"unknown key{choices(key, ['variants', 'when'])}", *parts, key)
        if unknown_setting(TrialConfig, name) is None or not re.fullmatch(NAME, name):
            text = "an axis of variants needs a name of its own: letters, digits, '_' and '-', and"
            self._problem(f"{text} not that of a setting", *parts)
        variants = node.mapping["variants"]
        if not variants.mapping:
            self._problem("must map names to settings", *parts, "variants")
        for variant, settings in variants.mapping.items():
            if settings.value is not None and not isinstance(settings.value, Mapping):
                self._problem("must be a mapping of settings", *parts, "variants", variant)
        named = [
            replace(s if s.mapping else Node({}, s.origin), name=variant)
            for variant, s in variants.mapping.items()
        ]
        return Axis((name,), tuple((each,) for each in named), node, node.child("when"))

    def _range(self, name: str, node: Node) -> Axis:
        """An axis written as `{from: 8, to: 32, step: 4}`, both ends included."""
        parts = ("axes", name)
        for key in node.mapping:
            if key not in (*RANGE, "when"):
                self._problem(f"unknown key{choices(key, [*RANGE, 'when'])}", *parts, key)
        ends = {key: node.mapping[key].value if key in node.mapping else None for key in RANGE}
        if ends["step"] is None:
            ends["step"] = 1
        numbers = [v for v in ends.values() if isinstance(v, int | float) and v is not True]
        values: list[int | float] = []
        if len(numbers) < len(RANGE):
            self._problem("a range needs the numbers from, to and (unless 1) step", *parts)
        elif numbers[2] <= 0 or numbers[1] < numbers[0]:
            self._problem("a range goes up: to is not below from, and step is above 0", *parts)
        else:
            count = math.floor((numbers[1] - numbers[0]) / numbers[2] + 1e-9) + 1
            if count > MAX_COMBINATIONS:
                self._problem(f"{count} values; at most {MAX_COMBINATIONS} can be tried", *parts)
                count = 1
            # Steps of 0.1 do not add up exactly; ten digits are what a person would have written.
            values = [numbers[0] + i * numbers[2] for i in range(count)]
            values = [round(v, 10) if isinstance(v, float) else v for v in values]
        rows = tuple((Node(value, node.origin),) for value in values)
        return Axis((name,), rows, node, node.child("when"))

    def _group(self, index: int, node: Node) -> Axis:
        parts = ("linked", index)
        columns = []
        for name, values in node.mapping.items():
            self._known(name, *parts, name)
            columns.append(self._values(values, (*parts, name), distinct=False))
        lengths = {name: len(values.sequence) for name, values in node.mapping.items()}
        if not columns:
            self._problem("must be a mapping of settings to lists of values", *parts)
        elif len(set(lengths.values())) > 1:
            listed = ", ".join(f"{name} has {length}" for name, length in lengths.items())
            self._problem(f"linked axes need equally many values; {listed}", *parts)
        rows = tuple(zip(*columns, strict=False))
        self._distinct([Node(row, node.origin) for row in rows], parts)
        return Axis(tuple(node.mapping), rows, node)

    def _known(self, name: str, *parts: Part) -> None:
        if name == "seed":
            self._problem("seeds cannot be linked; list them under axes", *parts)
        elif trouble := unknown_setting(TrialConfig, name):
            self._problem(trouble, *parts)

    def _values(
        self, node: Node, parts: tuple[Part, ...], distinct: bool = True
    ) -> tuple[Node, ...]:
        if not isinstance(node.value, tuple):
            self._problem("must be a list of the values to try", *parts)
        elif not node.value:
            self._problem("lists no value to try", *parts)
        elif distinct:
            self._distinct(node.value, parts)
        return node.sequence

    def _distinct(self, values: Iterable[Node], parts: tuple[Part, ...]) -> None:
        seen: set[str] = set()
        for index, node in enumerate(values):
            if (key := key_of(node.plain())) in seen:
                self._problem(f"{shown(node.plain())} is listed twice", *parts, index)
            seen.add(key)

    def _once_each(self) -> None:
        first: set[str] = set(self._under("axes").mapping)
        for index, group in enumerate(self._under("linked").sequence):
            for name in group.mapping:
                if name in first:
                    self._problem("is listed as an axis elsewhere already", "linked", index, name)
                first.add(name)

    def _few_enough(self, grid: Grid) -> None:
        count = math.prod(len(axis.rows) for axis in grid.axes)
        if count > MAX_COMBINATIONS:
            self._problem(f"{count} combinations; at most {MAX_COMBINATIONS} can be tried", "axes")

    # conditions and exclusions

    def _conditioned(self, axis: Axis, grid: Grid) -> Axis:
        if axis.condition is None:
            return axis
        parts = ("axes", axis.names[0], "when")
        if not axis.condition.mapping:
            self._problem("must be a mapping of axes to values", *parts)
        return replace(axis, when=self._rule(axis.condition, parts, grid, seeds=False))

    def _rule(
        self, node: Node, parts: tuple[Part, ...], grid: Grid, seeds: bool
    ) -> dict[str, frozenset[str]]:
        """Names of axes and, for each, the keys of the values that are meant."""
        rule = {}
        for name, wanted in node.mapping.items():
            if name == "seed" and seeds:
                tried: list[Any] = self._seeds
            elif name in grid.by_name:
                tried = [each.told() for each in grid.values(name)]
            else:
                names = [*grid.by_name, *(["seed"] if seeds else [])]
                self._problem(f"is not an axis{choices(name, names)}", *parts, name)
                continue
            rule[name] = self._meant(wanted, tried, (*parts, name))
        return rule

    def _meant(self, wanted: Node, tried: list[Any], parts: tuple[Part, ...]) -> frozenset[str]:
        """The keys of a value or of a list of values (a list may also be a value itself)."""
        known = {key_of(value) for value in tried}
        whole = key_of(wanted.plain())
        if whole in known or not isinstance(wanted.value, tuple):
            meant = {whole: wanted}
        else:
            meant = {key_of(each.plain()): each for each in wanted.value}
        for key, node in meant.items():
            # After `--set axes.…` a value that the file excludes need not be tried any more.
            if key not in known and not self._narrowed():
                listed = ", ".join(map(shown, tried))
                text = f"{shown(node.plain())} is not a value of that axis; its values: {listed}"
                self._problem(text, *parts)
        return frozenset(meant)

    def _narrowed(self) -> bool:
        nodes = [self._under("axes"), *self._under("axes").mapping.values(), self._under("seeds")]
        return any(node.origin.line is None for node in nodes)

    def _no_circle(self, grid: Grid) -> None:
        needs = {
            axis.names[0]: set(axis.when) & set(grid.by_name) for axis in grid.axes if axis.when
        }
        for start in needs:
            reached, pending = set[str](), [start]
            while pending:
                for name in needs.get(pending.pop(), set()) - reached:
                    reached.add(name)
                    pending.append(name)
            if start in reached:
                self._problem("the condition depends on itself", "axes", start, "when")

    def _exclusion(self, index: int, node: Node, grid: Grid) -> Exclusion:
        parts = ("exclude", index)
        if not node.mapping:
            self._problem("must be a mapping of axes to values", *parts)
        return Exclusion(self._rule(node, parts, grid, seeds=True), node)

    # rungs and baselines

    def _rungs(self) -> None:
        rungs = self._under("scheduler").child("rungs")
        for index, rung in enumerate(rungs.sequence if rungs else ()):
            settings = rung.child("set")
            for name in settings.mapping if settings else ():
                if name == "seed":
                    self._problem("seeds cannot change from rung to rung", *_at(index), name)
                elif trouble := unknown_setting(TrialConfig, name):
                    self._problem(trouble, *_at(index), name)

    def _baselines(self) -> None:
        for name, node in self._under("baselines").mapping.items():
            parts = ("baselines", name)
            if name == TEACHER:
                self._problem("every sweep has this baseline already; choose another name", *parts)
            elif not re.fullmatch(NAME, name):
                self._problem("is not a name: use letters, digits, '_' and '-' only", *parts)
            for key in node.mapping:
                if key in ("seed", DATA_FOLDER):
                    self._problem("is the same for all trials; it cannot differ here", *parts, key)

    # claims

    def _claims(self, grid: Grid) -> None:
        among = self._under("select").child("among")
        for name, wanted in (among.mapping if among else {}).items():
            self._claimed(name, wanted, grid, ("select", "among", name))
        for index, claim in enumerate(self._under("claims").sequence):
            groups = {key: node for key, node in claim.mapping.items() if key in GROUPS}
            for key, group in groups.items():
                for name, wanted in group.mapping.items():
                    self._claimed(name, wanted, grid, ("claims", index, key, name))

    def _claimed(self, name: str, wanted: Node, grid: Grid, parts: tuple[Part, ...]) -> None:
        """One entry of a group of a claim."""
        if name == BASELINE:
            self._claimed_baselines(wanted, parts)
        elif name in grid.by_name or name == SEED:
            # A sweep that was written with its results may be a narrowed one.
            if self._tree.child("merged") is None:
                seeds: list[Any] = self._seeds
                tried = seeds if name == SEED else [node.told() for node in grid.values(name)]
                self._meant(wanted, tried, parts)
        elif name == RUNG and self._rung_names():
            self._meant(wanted, self._rung_names(), parts)
        else:
            names = [*grid.by_name, SEED, BASELINE, *([RUNG] if self._rung_names() else [])]
            self._problem(f"is not an axis{choices(name, names)}", *parts)

    def _claimed_baselines(self, wanted: Node, parts: tuple[Part, ...]) -> None:
        names = [TEACHER, *self._under("baselines").mapping]
        for node in wanted.sequence or (wanted,):
            if node.value not in names:
                text = f"there is no baseline {shown(node.plain())}"
                self._problem(f"{text}{choices(str(node.value), names)}", *parts)

    def _rung_names(self) -> list[Any]:
        """What the axis `rung` takes, which a race has without listing it."""
        rungs = self._under("scheduler").child("rungs")
        named = [rung.child("name") for rung in (rungs.sequence if rungs else ())]
        return [name.value for name in named if name is not None]


def _at(rung: int) -> tuple[Part, ...]:
    return ("scheduler", "rungs", rung, "set")


def shown(value: Any) -> str:
    """A value as it might stand in the file."""
    return value if isinstance(value, str) else json.dumps(value)
