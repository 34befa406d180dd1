"""Which device a worker takes, and what it says that it held. No GPU is needed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trainers import workers
from trainers.config import EvaluateConfig, GeneratedCorpus
from trainers.contract import StageContext, StageError, StageResult

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("gpus", "workers_here", "rank", "expected", "backend"),
    [
        (0, None, None, CPU, "gloo"),
        (1, None, None, torch.device("cuda", 0), "cpu:gloo,cuda:nccl"),
        (2, "2", "1", torch.device("cuda", 1), "cpu:gloo,cuda:nccl"),
        (0, "2", "1", CPU, "gloo"),
    ],
)
def test_each_worker_takes_its_own_gpu_where_there_are_any(
    monkeypatch: pytest.MonkeyPatch,
    gpus: int,
    workers_here: str | None,
    rank: str | None,
    expected: torch.device,
    backend: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name, value in (("LOCAL_WORLD_SIZE", workers_here), ("LOCAL_RANK", rank)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert workers.device() == expected
    assert workers.backend() == backend


@pytest.mark.parametrize("said_by", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_fewer_gpus_than_workers_are_refused(monkeypatch: pytest.MonkeyPatch, said_by: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv(said_by, "2")
    with pytest.raises(StageError, match="2 workers on this machine share 1 GPU"):
        workers.device()


@workers.metered
def stage(context: StageContext[EvaluateConfig]) -> StageResult:
    return StageResult({"lm_loss": 1.0}, 7)


@pytest.mark.parametrize(("device", "held"), [(CPU, False), (torch.device("cuda", 0), True)])
def test_the_seconds_of_a_gpu_are_those_that_the_stage_took(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, held: bool
) -> None:
    monkeypatch.setattr(workers, "device", lambda: device)
    config = EvaluateConfig(corpus=GeneratedCorpus())
    result = stage(StageContext(config, {}, Path()))
    assert (result.gpu_s > 0) is held
    assert (result.metrics, result.tokens) == ({"lm_loss": 1.0}, 7)
