"""Whether the harness' tasks that a sweep asks can be had, before anything starts.

The harness imports torch and may ask the network, so a process of its own looks
(`python -m trainers.questions --check`).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.steps import StageNode


class MissingTasksError(Exception):
    """Tasks that cannot be asked."""

    def __init__(self, *messages: str) -> None:
        super().__init__(*messages)
        self.messages = messages


def harness_tasks(nodes: Iterable[StageNode]) -> list[dict[str, Any]]:
    """The tasks that stages ask by a name of the harness, each once. Local files are looked for
    when a sweep file is read, and generated questions are always there."""
    asked = [
        task
        for node in nodes
        for task in (node.config.get("criterion") or node.config).get("tasks", ())
        if task["kind"] == "harness"
    ]
    return [task for place, task in enumerate(asked) if task not in asked[:place]]


def check_tasks(tasks: Sequence[Mapping[str, Any]]) -> None:
    """Load the tasks in a process of its own. Raises `MissingTasksError`."""
    with tempfile.TemporaryDirectory(prefix="orchestrate-tasks-") as folder:
        path = Path(folder) / "tasks.json"
        path.write_text(json.dumps(tasks))
        command = [sys.executable, "-m", "trainers.questions", "--check", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        # What the check has to say stands on its own; of a crash the last line says the most.
        said = done.stdout.splitlines() or done.stderr.splitlines()[-1:]
        silent = f"looking for the questions failed with status {done.returncode}"
        raise MissingTasksError(*(said or [silent]))
