"""The tutorial, run as it stands: its files, its commands in their order, and what it shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from docs_at_hand import ROOT, Block, blocks

PAGE = ROOT / "docs" / "tutorial.md"
MARK = "@@ block "


def script(page: list[Block]) -> str:
    """The page as one shell script: files are written, commands run, each after a mark."""
    parts = ["set -eu"]
    for number, block in enumerate(page):
        if block.language == "yaml":
            parts.append(f"mkdir -p $(dirname {block.name})")
            parts.append(f"cat > {block.name} <<'END OF FILE'\n{block.text}END OF FILE")
        elif block.language == "sh":
            parts += [f"echo '{MARK}{number}'", block.text]
    return "\n".join(parts)


def seen(line: str, output: str) -> bool:
    """Whether the output has a line that holds what the page shows, `…` standing for anything."""
    pieces = [re.escape(piece) for piece in " ".join(line.split()).split("…")]
    wanted = re.compile(".*".join(pieces))
    return any(wanted.search(" ".join(each.split())) for each in output.splitlines())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_command_of_the_tutorial_does_what_it_says(tmp_path: Path) -> None:
    page = list(blocks(PAGE))
    (tmp_path / "orchestrate").symlink_to(ROOT, target_is_directory=True)
    here = Path(sys.executable).parent
    done = subprocess.run(
        ["bash", "-c", script(page)],
        cwd=tmp_path,
        # The environment is here already: make says what it would do.
        env={
            **os.environ,
            "MAKEFLAGS": "n",
            "PATH": f"{here}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "MLFLOW_TRACKING_URI": "",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1100,
    )
    assert done.returncode == 0, done.stdout
    outputs = {
        int(part.split("\n", 1)[0]): part.split("\n", 1)[1] for part in done.stdout.split(MARK)[1:]
    }
    for number, block in enumerate(page):
        if block.language == "text":
            output = outputs[number - 1]
            missing = [line for line in block.text.splitlines() if not seen(line, output)]
            assert missing == [], output
    left = {path.name for path in (tmp_path / "first").iterdir()}
    assert left >= {"layers.yaml", "profiles", "results"}


def test_every_command_of_the_tutorial_is_followed_by_what_to_see() -> None:
    page = list(blocks(PAGE))
    assert {block.language for block in page} == {"sh", "yaml", "text"}
    for block, following in zip(page, [*page[1:], None], strict=True):
        if block.language == "sh" and "make " not in block.text:
            assert following is not None and following.language == "text", block.text


def test_files_are_named_and_output_is_matched_by_its_words() -> None:
    assert all(block.name for block in blocks(PAGE) if block.language == "yaml")
    assert seen("8 trials, … done", "a\n8  trials, 0 of them  done already")
    assert not seen("8 trials, … done", "8 trials\n, done")
