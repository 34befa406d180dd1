"""The axes of a sweep: alone, linked or conditional, and the combinations that are excluded."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.located import Node, Part, locate
from orchestrator.schema import DATA_FOLDER, unknown_setting
from orchestrator.spec import NAME, SpecError, Sweep, TrialConfig
from orchestrator.wording import Problem, choices

TEACHER = "teacher"
"""Name of the baseline that every sweep has: the source model, neither pruned nor distilled."""

MAX_COMBINATIONS = 100_000


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
        listed = (node for node in self.values(name) if key_of(node.plain()) == key_of(value))
        return next(listed, None) or locate(value, self.by_name[name].place.origin)

    def active(self, values: Mapping[str, Node]) -> dict[str, Node]:
        """The values less those of axes whose condition does not hold."""
        if not any(axis.when for axis in self.axes):
            return dict(values)
        axes = self.by_name

        def applies(name: str) -> bool:
            return name in values and all(
                applies(other) and key_of(values[other].plain()) in allowed
                for other, allowed in axes[name].when.items()
            )

        return {name: node for name, node in values.items() if applies(name)}

    def excluded(self, values: Mapping[str, Node]) -> str | None:
        """Which exclusion takes these values away, if one does."""
        keys = {name: key_of(node.plain()) for name, node in values.items()}
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
        rules = enumerate(self._under("exclude").sequence)
        return replace(grid, exclusions=tuple(self._exclusion(i, n, grid) for i, n in rules))

    def _under(self, key: str) -> Node:
        return self._tree.child(key) or Node(None, self._tree.origin)

    def _problem(self, text: str, *parts: Part) -> None:
        self.problems.append(Problem(parts, text))

    # axes

    def _axis(self, name: str, node: Node) -> Axis:
        self._known(name, "axes", name)
        if not node.mapping:
            rows = self._values(node, ("axes", name))
            return Axis((name,), tuple((each,) for each in rows), node)
        for key in node.mapping:
            if key not in ("values", "when"):
                text = f"unknown key{choices(key, ['values', 'when'])}"
                self._problem(text, "axes", name, key)
        values = node.child("values") or Node(None, node.origin)
        rows = self._values(values, ("axes", name, "values"))
        return Axis((name,), tuple((each,) for each in rows), node, node.child("when"))

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
                tried = [each.plain() for each in grid.values(name)]
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

    # baselines

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


def key_of(value: Any) -> str:
    """One text for values that mean the same: 1 and 1.0, a variant and its name alone."""
    if isinstance(value, str):
        value = {"kind": value}
    return json.dumps(_canonical(value), sort_keys=True)


def _canonical(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _canonical(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def shown(value: Any) -> str:
    """A value as it might stand in the file."""
    return value if isinstance(value, str) else json.dumps(value)
