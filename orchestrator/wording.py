"""What pydantic found wrong with a located tree, in sentences a user can act on."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from orchestrator.located import Node, Part

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Problem:
    """What is wrong at `parts` of a tree.

    One that is `partial` may be mended by a setting below it, a `cross` one (settings that are
    allowed, but not together) by one elsewhere.
    """

    parts: tuple[Part, ...]
    text: str
    partial: bool = False
    cross: bool = False

    def message(self, tree: Node, note: str = "") -> str:
        """`file:line: dotted.key: text`."""
        dotted = ".".join(map(str, self.parts))
        return f"{tree.nearest(self.parts).origin}: {dotted and dotted + ': '}{self.text}{note}"


def nearest_first(word: str, allowed: Iterable[str]) -> list[str]:
    """`allowed` by likeness to `word`, the most alike first."""
    names = sorted(set(allowed))
    return sorted(names, key=lambda n: -difflib.SequenceMatcher(None, word, n).ratio())


def hint(word: str, allowed: Iterable[str]) -> str:
    """`, did you mean 'x'?` where something is close enough, else nothing."""
    near = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f", did you mean '{near[0]}'?" if near else ""


def choices(word: str, allowed: Sequence[str]) -> str:
    """The hint and all that is allowed."""
    return f"{hint(word, allowed)}; allowed: {', '.join(allowed) or 'none'}"


def shortest_names(names: Iterable[str]) -> dict[str, str]:
    """Dotted name -> the shortest end of it that no other of the names shares."""
    listed = sorted(names)
    return {name: _shortest(name, listed) for name in listed}


def _shortest(name: str, names: Sequence[str]) -> str:
    parts = name.split(".")
    ends = (".".join(parts[-count:]) for count in range(1, len(parts)))
    rivals = [f".{other}" for other in names if other != name]
    return next((end for end in ends if not any(r.endswith(f".{end}") for r in rivals)), name)


def validate(
    model: type[Model], tree: Node, extra_keys: tuple[str, ...] = ()
) -> tuple[Model | None, list[Problem]]:
    """The typed form of a tree, or everything that is wrong with it.

    `extra_keys` are top-level keys that are read elsewhere; messages list them as allowed.
    """
    unknown: list[Problem] = []
    lacking: set[tuple[Part, ...]] = set()
    for key in extra_keys:
        tree = tree.without([key])
    while True:
        try:
            valid = model.model_validate(_python(tree), strict=True)
            return (None, unknown) if unknown else (valid, [])
        except ValidationError as error:
            details = error.errors(include_url=False, include_input=False)
        keys = [each for each in details if each["type"] == "unknown_key"]
        if not keys:
            return None, unknown + [p for p in _explained(details, tree) if p.parts not in lacking]
        # A model stops at its first unknown key: take that away and look for what else is wrong.
        for each in keys:
            parent = _parts(each["loc"], tree)
            key, allowed = each["ctx"]["key"], each["ctx"]["allowed"].split(", ")
            allowed += () if parent else extra_keys
            unknown.append(Problem((*parent, key), f"unknown key{choices(key, allowed)}"))
            # `step` for `steps` is one mistake, not also a missing `steps`.
            lacking |= {(*parent, near) for near in difflib.get_close_matches(key, allowed, n=1)}
            tree = tree.without([*parent, key])


def _python(node: Node) -> Any:
    """The value as strict pydantic wants it: lists as tuples."""
    if isinstance(node.value, Mapping):
        return {key: _python(child) for key, child in node.value.items()}
    if isinstance(node.value, tuple):
        return tuple(_python(child) for child in node.value)
    return node.value


def _explained(details: Sequence[ErrorDetails], tree: Node) -> list[Problem]:
    problems: dict[Problem, None] = {}
    for error in details:
        parts = _parts(error["loc"], tree)
        for at, text in error.get("ctx", {}).get("problems", ()):
            problems[Problem((*parts, *at), text, cross=True)] = None
        if error["type"] != "inconsistent":
            problems[_problem(error, parts, tree)] = None
    return list(problems)


def _parts(loc: Sequence[Part], tree: Node) -> tuple[Part, ...]:
    """Where in the tree pydantic's location is: without the variants' names it passes through."""
    parts: list[Part] = []
    node: Node | None = tree
    fresh = True  # a variant's name comes once, before its fields
    for part in loc:
        if fresh and node is not None and node.kind is not None and part == node.kind:
            fresh = False
            continue
        parts.append(part)
        node, fresh = node.child(part) if node else None, True
    return tuple(parts)


def _problem(error: ErrorDetails, parts: tuple[Part, ...], tree: Node) -> Problem:
    kind, context = error["type"], error.get("ctx", {})
    node = tree.at(parts)
    value = node.value if node else None
    if kind == "missing":
        return Problem(parts, "is required", partial=True)
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _variant(parts, node, context)
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", context["expected"]) or [context["expected"]]
        return Problem(parts, f"{_shown(value)} is not allowed{choices(str(value), allowed)}")
    if kind in _WANTED:
        return Problem(parts, f"is {_shown(value, typed=True)}, must be {_WANTED[kind]}")
    if kind in _LIMITS:
        word, name = _LIMITS[kind]
        return Problem(parts, f"is {_shown(value)}, must be {word} {context[name]}")
    if kind == "too_short":
        return Problem(parts, f"needs at least {context['min_length']}")
    text = error["msg"].removeprefix("Value error, ")
    return Problem(parts, text, partial=kind == "value_error")


def _variant(parts: tuple[Part, ...], node: Node | None, context: Mapping[str, Any]) -> Problem:
    if "tag" not in context:
        return Problem((*parts, "kind"), "is required", partial=True)
    allowed = re.findall(r"'([^']*)'", context["expected_tags"])
    at = (*parts, "kind") if node and node.mapping else parts
    return Problem(at, f"'{context['tag']}' is not allowed{choices(context['tag'], allowed)}")


_WANTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "path_type": "text (a path)",
    "is_instance_of": "text (a path)",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping (with its `kind`, where there are several)",
}
_LIMITS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


def _shown(value: Any, typed: bool = False) -> str:
    """A value as a user would write it; `typed` says of text that it is text."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | Path):
        text = str(value) if len(str(value)) < 60 else f"{str(value)[:60]}…"
        return f"'{text}'{' (text)' if typed else ''}"
    if isinstance(value, Mapping):
        return "a mapping"
    return "empty" if value is None else "a list" if isinstance(value, tuple) else str(value)
