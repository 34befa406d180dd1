"""A model that another sweep found best, as a trial's source: `{kind: winner, sweep: NAME}`.

It stands for the checkpoint in that sweep's `best/`, whose content then enters every identity like
that of any local folder: if the other sweep finds another winner, these trials are new ones.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from orchestrator.located import Node

KEYS = ("kind", "sweep", "profile")
NAME = r"[A-Za-z0-9_-]+"
"""Names of sweeps and profiles, which are also the names of their folders."""


class NoWinnerError(Exception):
    """A winner that is asked for and cannot be had; reads `file:line: what is wrong`."""


def find_winners(tree: Node, results: Path, profile: str) -> Node:
    """The tree with every winner replaced by its folder. Raises `NoWinnerError`.

    A winner is of the same profile unless it names another.
    """
    if isinstance(tree.value, tuple):
        items = tuple(find_winners(node, results, profile) for node in tree.value)
        return replace(tree, value=items)
    if not tree.mapping:
        return tree
    if tree.mapping.get("kind") is not None and tree.kind == "winner":
        return _folder(tree, results, profile)
    entries = {key: find_winners(node, results, profile) for key, node in tree.mapping.items()}
    return replace(tree, value=entries)


def _folder(node: Node, results: Path, profile: str) -> Node:
    unknown = [key for key in node.mapping if key not in KEYS]
    sweep = node.child("sweep")
    if unknown or sweep is None or not isinstance(sweep.value, str):
        raise NoWinnerError(f"{node.origin}: a winner is named by sweep and, if need be, profile")
    named = node.child("profile")
    scale = str(named.value) if named is not None else profile
    for name in (sweep.value, scale):
        if not re.fullmatch(NAME, name):
            raise NoWinnerError(f"{node.origin}: '{name}' is not the name of a sweep or profile")
    path = results.resolve() / sweep.value / scale / "best"
    if not (path / "config.json").is_file():
        raise NoWinnerError(
            f"{node.origin}: the sweep {sweep.value} has no winner at profile {scale} yet "
            f"(looked for {path}); run it first: orchestrate sweeps/{sweep.value}.yaml "
            f"--profile {scale}"
        )
    kind, at = Node("folder", node.origin), Node(str(path), sweep.origin)
    return replace(node, value={"kind": kind, "path": at})
