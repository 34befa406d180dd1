"""The table of stages: what each is configured by, reads, leaves and is run by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel

from trainers.config import (
    AcquireConfig,
    BenchmarkConfig,
    CacheConfig,
    CorrectConfig,
    DistillConfig,
    EvaluateConfig,
    ImportanceConfig,
    PretrainConfig,
    PruneConfig,
)

Kind = Literal[
    "acquire",
    "pretrain",
    "correct",
    "importance",
    "prune",
    "cache",
    "distill",
    "evaluate",
    "benchmark",
]


@dataclass(frozen=True)
class StageType:
    """One kind of stage. `version` is raised when what the stage computes changes."""

    kind: Kind
    config: type[BaseModel]
    entry_point: str
    version: int
    trains: bool = False
    """Whether it runs on all workers of a trial: by DeepSpeed, or as it shares out questions."""
    may_use_all_cores: bool = False
    """Whether it speeds up with the cores that a stage awaited by several trials is granted."""
    runs_alone: bool = False
    """Whether nothing else of the sweep may run beside it: it measures time."""


STAGES: Mapping[str, StageType] = {
    stage.kind: stage
    for stage in (
        StageType("acquire", AcquireConfig, "trainers.acquire:run", 1),
        StageType(
            "pretrain",
            PretrainConfig,
            "trainers.pretrain:run",
            1,
            trains=True,
            may_use_all_cores=True,
        ),
        StageType(
            "correct",
            CorrectConfig,
            "trainers.correct:run",
            1,
            trains=True,
            may_use_all_cores=True,
        ),
        StageType("cache", CacheConfig, "trainers.cache:run", 1),
        StageType("importance", ImportanceConfig, "trainers.importance:run", 2),
        StageType("prune", PruneConfig, "trainers.prune:run", 2),
        StageType("distill", DistillConfig, "trainers.distill:run", 2, trains=True),
        StageType("evaluate", EvaluateConfig, "trainers.evaluate:run", 4, trains=True),
        StageType(
            "benchmark",
            BenchmarkConfig,
            "trainers.benchmark:run",
            1,
            runs_alone=True,
        ),
    )
}
