"""What a stage gets and what it gives back. Imports no torch.

A stage is a function `run(context) -> StageResult`. It writes into `context.out`, which becomes
an artifact once the function returns. Files with a meaning to others:

    model/        a Hugging Face checkpoint (stages that leave a model)
    curve.jsonl   {"step", "tokens", "time_ms", "name", "value"}, one measurement a line
    items.jsonl   {"task", "item_id", "split", "correct", "score"}, one question a line
    activations.safetensors  sums over samples for every unit, see `trainers.activations`
    cache.json    what a cache of a teacher's outputs holds, beside its arrays
    scores.jsonl  {"criterion", "block_length", "last", "name", "value"}, one block a line
    checkpoints/  what the stage needs to go on after a stop; removed when it completes
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from pydantic import BaseModel

ConfigT = TypeVar("ConfigT", bound=BaseModel)


class Interrupted(BaseException):
    """Raised out of a reporter when the sweep was asked to stop: save, then let it pass.

    Not an `Exception`, so that no handler for failures takes it for one.
    """


class StageError(Exception):
    """The stage cannot give a result, for a reason a user should read as it stands."""


class DamagedInputError(StageError):
    """An input artifact is not what was written; it can be built again."""

    def __init__(self, role: str, problem: str) -> None:
        super().__init__(role, problem)
        self.role = role

    def __str__(self) -> str:
        return str(self.args[1])


class Reporter(Protocol):
    """Where a running stage says how far it is."""

    def report(self, done: int, total: int, values: Mapping[str, float]) -> None:
        """`done` of `total` units (steps, blocks, questions), with current values such as `loss`
        and `tokens_per_s`. Cheap enough for every step. Raises `Interrupted` to stop the stage."""


class Silent:
    """A reporter that says nothing."""

    def report(self, done: int, total: int, values: Mapping[str, float]) -> None:
        """Nothing."""


class Ticker:
    """Counts units that come in bunches, and reports how many of `total` are done."""

    def __init__(self, reporter: Reporter, total: int) -> None:
        self._reporter, self._total, self._done = reporter, total, 0

    def __call__(self, units: int) -> None:
        """So many more are done."""
        self._done += units
        self._reporter.report(self._done, self._total, {})


@dataclass(frozen=True)
class Runtime:
    """Facts of the machine at hand; they change how fast a stage is, never what it computes."""

    checkpoint_every_s: float = 30.0


@dataclass(frozen=True)
class StageContext(Generic[ConfigT]):
    """All that a stage may look at: settings, input artifacts by role, and where to write."""

    config: ConfigT
    inputs: Mapping[str, Path]
    out: Path
    seed: int = 0
    reporter: Reporter = field(default_factory=Silent)
    runtime: Runtime = field(default_factory=Runtime)

    def model(self, role: str) -> Path:
        """The checkpoint folder of the artifact in `role`. Raises `StageError` without one."""
        if role not in self.inputs:
            raise StageError(f"the stage needs an input in the role {role}")
        return self.inputs[role] / "model"


@dataclass(frozen=True)
class StageResult:
    """What a stage measured. `tokens` were trained on or scored; `flops` were spent on them, and on
    a GPU `gpu_s` seconds."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    tokens: int = 0
    flops: float = 0.0
    gpu_s: float = 0.0


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; none where there is no file."""
    if not path.exists():
        return []
    # As one text: a thousand answers are read for every trial, and this takes half the time.
    rows: list[dict[str, Any]] = json.loads(f"[{','.join(path.read_text().splitlines())}]")
    return rows


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSON-lines file whole: beside, then moved into place."""
    beside = path.with_suffix(".part")
    beside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    beside.replace(path)
