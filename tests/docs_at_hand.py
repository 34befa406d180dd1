"""The pages of the documentation, as tests read them: their fenced blocks, and what they name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block: what stands behind the fence, and the text inside."""

    language: str
    name: str
    text: str


def blocks(page: Path) -> Iterator[Block]:
    """A page's fenced blocks in their order."""
    for found in _FENCE.finditer(page.read_text()):
        language, _, name = found[1].partition(" ")
        yield Block(language, name.strip(), found[2])


def changed(text: str, diff: str) -> str:
    """The text after a page's diff: hunks behind `@@`, whose old lines stand there once."""
    for hunk in diff.split("@@\n")[1:]:
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        assert text.count(old) == 1, f"{text.count(old)} times in the file:\n{old}"
        text = text.replace(old, new)
    return text
