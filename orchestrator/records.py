"""What is known of the trials and stages that ran: typed records, the ledger, the parquet files.

The ledger is the truth: append-only JSON lines, one event a line, flushed to disk before the sweep
goes on. The parquet files are written from it and can be rebuilt at any time. The only module that
imports pyarrow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["completed", "stopped", "failed"]

TEACHER = "teacher"
"""Name of the baseline that every sweep has: the source model, neither pruned nor distilled."""


@dataclass(frozen=True)
class TrialRecord:
    """A trial that ended. A failed one has a reason and no metrics. Times are Unix seconds."""

    trial_id: str
    sweep: str
    profile: str
    seed: int
    status: Status
    reason: str | None
    baseline: str | None
    """Name under `baselines:` in the sweep file, `teacher`, or None for a trial of the grid."""
    config: Mapping[str, Any]
    axes: Mapping[str, Any]
    """Dotted axis name -> this trial's value (without `seed`); absent where the axis is off."""
    parameters: int | None
    parameters_non_embedding: int | None
    tokens_trained: int | None
    metrics: Mapping[str, float | None]
    cpu_s: float
    gpu_s: float
    wall_s: float
    started_at: float
    ended_at: float
    mlflow_run_id: str | None = None


@dataclass(frozen=True)
class StageRecord:
    """A stage that a trial asked for. Where `cached`, it cost this trial nothing."""

    stage_id: str
    trial_id: str
    kind: str
    cached: bool
    cpu_s: float
    gpu_s: float
    wall_s: float
    peak_rss_mb: float
    tokens: int
    flops: float


@dataclass(frozen=True)
class CurvePoint:
    """One value of a training curve; `time_ms` is fixed when it is measured."""

    trial_id: str
    step: int
    tokens: int
    time_ms: int
    name: str
    value: float


@dataclass(frozen=True)
class ItemRecord:
    """One question answered by one trial's final model. `score` is the margin of the gold choice
    over the best other one in log-probability, where the task has choices."""

    trial_id: str
    task: str
    item_id: str
    split: Literal["select", "report"]
    correct: float
    score: float | None


@dataclass(frozen=True)
class BlockScore:
    """What leaving out the block of `block_length` layers that ends at layer `last` (0-based)
    does. `name` says what `value` is: lm_loss, block_influence, accuracy, or importance (higher =
    matters more, whatever the criterion). The intact model stands as block_length 0, last -1."""

    stage_id: str
    criterion: str
    block_length: int
    last: int
    name: str
    value: float


@dataclass(frozen=True)
class Records:
    """All that a sweep has recorded, in a fixed order: what reports are made from."""

    sweep: str
    profile: str
    trials: tuple[TrialRecord, ...] = ()
    stages: tuple[StageRecord, ...] = ()
    curves: tuple[CurvePoint, ...] = ()
    items: tuple[ItemRecord, ...] = ()
    scores: tuple[BlockScore, ...] = field(default=())
