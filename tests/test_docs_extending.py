"""Every change that docs/extending.md shows is applied to a copy of the code, and holds there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from docs_at_hand import ROOT, blocks, changed

PAGE = ROOT / "docs" / "extending.md"
SECTIONS = re.split(r"^## ", PAGE.read_text(), flags=re.M)[1:]
TITLES = [section.splitlines()[0] for section in SECTIONS]


def test_the_page_has_the_five_ways_to_extend() -> None:
    for wanted in ("loss", "criterion", "family", "task", "searcher"):
        assert any(wanted in title for title in TITLES)


@pytest.mark.slow
@pytest.mark.parametrize("title", TITLES)
def test_what_a_section_changes_passes_the_test_that_it_names(title: str, tmp_path: Path) -> None:
    section = SECTIONS[TITLES.index(title)]
    named = re.findall(r"^Test: `(\S+) -k (\w+)`$", section, re.M)
    part = tmp_path / "section.md"
    part.write_text(section)
    diffs = [block for block in blocks(part) if block.language == "diff"]
    assert bool(named) or not diffs, "a change without a test"
    copy = tmp_path / "copy"
    for folder in ("orchestrator", "trainers", "tests", "docs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", copy)
    files = [diff.text.splitlines()[0].removeprefix("+++ ") for diff in diffs]
    for name, diff in zip(files, diffs, strict=True):
        (copy / name).write_text(changed((copy / name).read_text(), diff.text))
    for file, keyword in named:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", file, "-k", keyword, "-p", "no:cacheprovider"],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert " passed" in done.stdout
    for check in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *check, *files]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
        assert not files or done.returncode == 0, done.stdout
