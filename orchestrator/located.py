"""YAML read with the place of every value, so that any later error can name file and line.

Stricter than YAML 1.1: keys are strings and stand once, `1e-3` is a number, `yes` and `12:30` and
`2024-01-01` are text, numbers are finite. Nothing in a file can run code or exhaust the machine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 1_000_000
MAX_VALUES = 50_000
MAX_DEPTH = 40

Scalar = str | int | float | bool | Path | None
Part = str | int


class LocatedError(Exception):
    """What is wrong with a YAML text; each message starts with `file:line: `."""

    def __init__(self, messages: Iterable[str]) -> None:
        self.messages = tuple(messages)
        super().__init__("\n".join(self.messages))


@dataclass(frozen=True)
class Origin:
    """Where a value was written. Relative paths in it start at `folder`."""

    file: str
    line: int | None
    folder: Path

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Node:
    """A value and its place. An `implied` mapping was written only as part of a dotted name; a
    value with a `name` is told by it."""

    value: Scalar | Mapping[str, Node] | tuple[Node, ...]
    origin: Origin
    implied: bool = False
    name: str | None = None

    @property
    def mapping(self) -> Mapping[str, Node]:
        """The entries of a mapping; empty for anything else."""
        return self.value if isinstance(self.value, Mapping) else {}

    @property
    def sequence(self) -> tuple[Node, ...]:
        """The items of a list; empty for anything else."""
        return self.value if isinstance(self.value, tuple) else ()

    @property
    def kind(self) -> str | None:
        """The variant named by a mapping's `kind`, or by a string alone."""
        named = self.mapping.get("kind", self)
        return named.value if isinstance(named.value, str) else None

    def plain(self) -> Any:
        """The value as dicts, lists and scalars; a path as text."""
        if isinstance(self.value, Mapping):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, tuple):
            return [node.plain() for node in self.value]
        return str(self.value) if isinstance(self.value, Path) else self.value

    def told(self) -> Any:
        """What stands for the value in trials, claims and tables: its name, or itself."""
        return self.plain() if self.name is None else self.name

    def child(self, part: Part) -> Node | None:
        """The entry or item at `part`, if there is one."""
        if isinstance(part, int):
            return self.sequence[part] if 0 <= part < len(self.sequence) else None
        return self.mapping.get(part)

    def nearest(self, parts: Sequence[Part]) -> Node:
        """The node at `parts`, or its closest ancestor that was written."""
        node = self
        for part in parts:
            below = node.child(part)
            if below is None:
                break
            node = below
        return node

    def at(self, parts: Sequence[Part]) -> Node | None:
        """The node at `parts`, if it was written."""
        node: Node | None = self
        for part in parts:
            node = node.child(part) if node else None
        return node

    def with_entry(self, key: str, node: Node) -> Node:
        """This mapping with `key` set to `node`."""
        return replace(self, value={**self.mapping, key: node})

    def without(self, parts: Sequence[Part]) -> Node:
        """This tree less the entry at `parts`."""
        child = self.child(parts[0])
        if child is None:
            return self
        changed = child.without(parts[1:]) if len(parts) > 1 else None
        if isinstance(self.value, tuple):
            items = (changed if node is child else node for node in self.value)
            return replace(self, value=tuple(node for node in items if node is not None))
        entries = {k: changed if node is child else node for k, node in self.mapping.items()}
        return replace(self, value={k: node for k, node in entries.items() if node is not None})


def locate(value: Any, origin: Origin) -> Node:
    """A plain value as a tree, all of it at one place."""
    if isinstance(value, Mapping):
        return Node({str(key): locate(item, origin) for key, item in value.items()}, origin)
    if isinstance(value, list | tuple):
        return Node(tuple(locate(item, origin) for item in value), origin)
    return Node(value, origin)


def nest(dotted: str, node: Node) -> Node:
    """`a.b` and a value as the mapping `{a: {b: value}}`."""
    for key in reversed(dotted.split(".")):
        node = Node({key: node}, node.origin, implied=True)
    return node


def merge(below: Node, above: Node) -> Node:
    """`above` laid over `below`: mappings are joined, anything else is replaced.

    Where both name a variant (`kind`, or a string for short) and it changes, nothing of the old
    variant stays: its other keys mean nothing to the new one.
    """
    variants = {below.kind, above.kind} - {None}
    if len(variants) > 1 or (isinstance(above.value, str) and below.kind is None):
        return above
    lower, upper = _as_variant(below, above), _as_variant(above, below)
    if not isinstance(lower.value, Mapping) or not isinstance(upper.value, Mapping):
        return above
    entries = dict(lower.value)
    for key, node in upper.value.items():
        entries[key] = merge(entries[key], node) if key in entries else node
    origin = lower.origin if upper.implied else upper.origin
    return Node(entries, origin, lower.implied and upper.implied)


def _as_variant(node: Node, other: Node) -> Node:
    """A variant written as a string alone, spelt out where it meets a mapping."""
    if isinstance(node.value, str) and isinstance(other.value, Mapping):
        return Node({"kind": Node(node.value, node.origin)}, node.origin)
    return node


def undotted(node: Node) -> Node:
    """A mapping whose keys may be dotted, as nested mappings."""
    if not node.mapping:
        return node
    tree = Node({}, node.origin, node.implied)
    for key, child in node.mapping.items():
        tree = replace(merge(tree, nest(key, child)), origin=node.origin)
    return tree


# --- reading ---------------------------------------------------------------------------------


def read_file(path: Path, shown: str | None = None) -> Node:
    """The tree of a YAML file. Raises `LocatedError`; `shown` is its name in messages."""
    name = shown or str(path)
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise LocatedError([f"{name}:1: cannot be read: {_reason(path, error)}"]) from None
    if len(data) > MAX_BYTES:
        raise LocatedError([f"{name}:1: is larger than {MAX_BYTES // 1_000_000} MB"])
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise LocatedError([f"{name}:{line}: is not a text file in UTF-8"]) from None
    folder = Path(path).absolute().parent
    return _read(text, lambda line: Origin(name, line, folder))


def read_value(text: str, origin: Origin) -> Node:
    """The tree of a YAML value that stands outside any file."""
    return _read(text, lambda _: origin)


def _reason(path: Path, error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, IsADirectoryError):
        return "it is a folder"
    return (error.strerror if isinstance(error, OSError) else None) or "not a valid file name"


def _read(text: str, place: Callable[[int], Origin]) -> Node:
    """`place` gives the origin of a line."""

    def failure(line: int, message: str) -> LocatedError:
        return LocatedError([f"{place(line)}: {message}"])

    try:
        root = _Loader(text).get_single_node()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise failure(line, "has a character that YAML does not allow") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise failure(mark.line + 1 if mark else 1, _syntax(error)) from None
    except (RecursionError, ValueError, OverflowError):
        raise failure(1, "cannot be read as YAML") from None
    if root is None:
        return Node(None, place(1))
    reader = _Reader(place)
    tree = reader.convert(root, place(root.start_mark.line + 1))
    if reader.problems:
        raise LocatedError(dict.fromkeys(reader.problems))
    return tree


def _syntax(error: yaml.MarkedYAMLError) -> str:
    problem = ", ".join(filter(None, (error.context, error.problem))) or "syntax error"
    if "'\\t'" in problem:
        problem = "a tab stands where YAML wants spaces"
    start = error.context_mark
    began = f" (it began on line {start.line + 1})" if start and error.context else ""
    return f"is not valid YAML: {problem}{began}"


_EXPONENT = r"[eE][-+]?[0-9]+"
_RESOLVERS: tuple[tuple[str, str, str], ...] = (
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+|0o[0-7]+", "-+0123456789"),
    (
        "float",
        rf"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:{_EXPONENT})?"
        rf"|[-+]?[0-9][0-9_]*{_EXPONENT}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
)
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """Composes nodes only; refuses early what is too deep or too large."""

    # YAML 1.1's own rules take `1e-3` for text, and `yes`, `12:30` and dates for something else.
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._count = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        self._count += 1
        if self._depth > MAX_DEPTH or self._count > MAX_VALUES:
            limit = f"{MAX_DEPTH} levels" if self._depth > MAX_DEPTH else f"{MAX_VALUES} values"
            raise yaml.MarkedYAMLError(
                problem=f"more than {limit}",
                problem_mark=self.peek_event().start_mark,  # type: ignore[no-untyped-call]
            )
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either reading of YAML would not take for text; writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern, _first in _RESOLVERS:
    _regex = re.compile(rf"^(?:{_pattern})$")
    _starts = [*_first, ""] if _name == "null" else list(_first)
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, _regex, _starts)


def dump(value: Any) -> str:
    """YAML that `read_file` reads back as the same value."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return text


class _Reader:
    """Turns composed YAML nodes into a tree, collecting problems."""

    def __init__(self, place: Callable[[int], Origin]) -> None:
        self.problems: list[str] = []
        self._place = place
        self._count = 0
        self._open: set[int] = set()

    def convert(self, node: yaml.Node, origin: Origin) -> Node:
        self._count += 1
        if id(node) in self._open:
            raise LocatedError([f"{origin}: holds an alias of itself"])
        if self._count > MAX_VALUES or len(self._open) > MAX_DEPTH:
            text = f"aliases expand to more than {MAX_VALUES} values or {MAX_DEPTH} levels"
            raise LocatedError([f"{origin}: {text}"])
        self._open.add(id(node))
        tree = Node(self._value(node, origin), origin)
        self._open.discard(id(node))
        return tree

    def _value(self, node: yaml.Node, origin: Origin) -> Any:
        try:
            if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
                return self._mapping(node)
            if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
                return tuple(self.convert(item, self._origin(item)) for item in node.value)
            return _scalar(node)
        except ValueError as error:
            self.problems.append(f"{origin}: {error}")
            return None

    def _mapping(self, node: yaml.MappingNode) -> dict[str, Node]:
        own: dict[str, Node] = {}
        inherited: dict[str, Node] = {}
        for key, value in node.value:
            origin = self._origin(key)
            if key.tag == _TAG + "merge":
                inherited = {**self._inherit(value, origin), **inherited}
            elif key.tag != _TAG + "str" or not _encodable(key.value):
                shown = f"{key.value!a} " if isinstance(key, yaml.ScalarNode) else ""
                self._problem(origin, f"the key {shown}is not text; put it in quotes")
            elif key.value in own:
                first = own[key.value].origin.line
                self._problem(origin, f"{key.value}: stands twice (first on line {first})")
            else:
                own[key.value] = self.convert(value, origin)
        return {**inherited, **own}

    def _inherit(self, node: yaml.Node, origin: Origin) -> dict[str, Node]:
        """The entries of `<<: *anchor`; the first of several anchors wins."""
        parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
        entries: dict[str, Node] = {}
        for part in parts:
            tree = self.convert(part, self._origin(part))
            if not isinstance(tree.value, Mapping):
                self._problem(origin, "<<: must name a mapping")
            entries = {**tree.mapping, **entries}
        return entries

    def _origin(self, node: yaml.Node) -> Origin:
        return self._place(node.start_mark.line + 1)

    def _problem(self, origin: Origin, text: str) -> None:
        self.problems.append(f"{origin}: {text}")


def _encodable(text: str) -> bool:
    """Whether it is Unicode text; an escape can make half a character."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _scalar(node: yaml.Node) -> Scalar:
    """The value of a scalar. Raises `ValueError` in plain words."""
    if not isinstance(node, yaml.ScalarNode) or not node.tag.startswith(_TAG):
        raise ValueError(f"the tag {_short(node.tag)} is not allowed")
    text: str = node.value
    try:
        match node.tag.removeprefix(_TAG):
            case "str":
                text.encode()
                return text
            case "null":
                return None
            case "bool":
                return {"true": True, "false": False}[text.lower()]
            case "int":
                return int(text.replace("_", ""), 0)
            case "float":
                return _finite(text.replace("_", "").lower())
    except (ValueError, KeyError):
        shown = ascii(text if len(text) < 40 else text[:40] + "…")
        raise ValueError(f"{shown} does not fit {_short(node.tag)}") from None
    raise ValueError(f"the tag {_short(node.tag)} is not allowed")


def _finite(text: str) -> float:
    number = float(text.replace(".inf", "inf").replace(".nan", "nan"))
    if not math.isfinite(number):
        raise ValueError
    return number


def _short(tag: str) -> str:
    return {"str": "text", "int": "an integer", "float": "a finite number"}.get(
        tag.removeprefix(_TAG), tag.replace(_TAG, "!!")
    )
