"""Which of the processes that work on a stage this one is, and how they come together.

A stage may run on one worker, or on several that torchrun, DeepSpeed's launcher or Ray Train
started. One worker needs nothing of this: no port, no environment, no process group.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps

import torch
from torch import Tensor, distributed

from trainers.contract import ConfigT, StageContext, StageError, StageResult

Run = Callable[[StageContext[ConfigT]], StageResult]


def rank_and_processes() -> tuple[int, int]:
    """This process' place among those that torch.distributed joins, and how many they are."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def is_first() -> bool:
    """Whether this is the one worker that writes what all of them came to."""
    return rank_and_processes()[0] == 0


def wait_for_all() -> None:
    """Returns once every worker is here."""
    if rank_and_processes()[1] > 1:
        distributed.barrier()


def mean_over_workers(values: Tensor) -> Tensor:
    """The mean over workers of each value; the same on all of them."""
    _rank, processes = rank_and_processes()
    if processes == 1:
        return values
    total = values.clone()
    distributed.all_reduce(total)
    return total / processes


def device() -> torch.device:
    """The GPU of this worker where there are any, else the CPU. Raises `StageError` where there are
    fewer than workers: they would talk as on GPUs and compute as on a CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")
    if (gpus := torch.cuda.device_count()) < here:
        raise StageError(
            f"{here} workers on this machine share {gpus} GPU: start no more workers than GPUs, or "
            "hide the GPUs with CUDA_VISIBLE_DEVICES="
        )
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def backend() -> str:
    """What workers talk through on this machine, for each kind of tensor."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def metered(run: Run[ConfigT]) -> Run[ConfigT]:
    """The stage, whose result says for how many seconds this worker held its GPU; 0 on a CPU."""

    @wraps(run)
    def timed(context: StageContext[ConfigT]) -> StageResult:
        started = time.monotonic()
        result = run(context)
        held = time.monotonic() - started if device().type == "cuda" else 0.0
        return replace(result, gpu_s=held)

    return timed


def launched(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """The rank that a launcher gave this process, and how many it started; without one, 0 and 1."""
    processes = int(environment.get("WORLD_SIZE", "1")) if "RANK" in environment else 1
    return (int(environment["RANK"]), processes) if processes > 1 else (0, 1)


def join() -> bool:
    """Make the launched processes one group, unless they are. Gives whether this call did."""
    if launched()[1] == 1 or distributed.is_initialized():
        return False
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    distributed.init_process_group(backend())
    return True


@contextmanager
def joined() -> Iterator[None]:
    """While open, the processes that a launcher started work together."""
    ours = join()
    try:
        yield
    finally:
        if ours:
            distributed.destroy_process_group()
