"""The one training loop, and the only import of DeepSpeed.

Pretraining, conventional training and distillation differ in the objective that they hand in: a
module that takes a batch of token ids and returns its mean loss.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]

from trainers import corpus
from trainers.config import Training
from trainers.contract import (
    Interrupted,
    Reporter,
    Runtime,
    StageError,
    read_rows,
    write_rows,
)

# DeepSpeed compiles a small op with ninja, which pip puts beside the interpreter: on the PATH of
# an activated environment, but not where the console script is called by its path.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
os.environ.setdefault("DS_LOG_LEVEL", "error")

import deepspeed
from deepspeed.utils import logger as deepspeed_logger

deepspeed_logger.setLevel(logging.ERROR)

CURVE_POINTS = 100


@dataclass(frozen=True)
class Trained:
    """What the loop did: all steps of the run, resumed ones included."""

    steps: int
    tokens: int
    final_loss: float


def learning_rate_factor(step: int, training: Training) -> float:
    """The learning rate of optimizer step `step` (from 0), as a share of the peak.

    Linear warm-up that reaches the peak at the end of `warmup_steps`, then a cosine down to the
    minimum, reached at the last step.
    """
    if step < training.warmup_steps:
        return (step + 1) / training.warmup_steps
    last = max(1, training.steps - 1 - training.warmup_steps)
    progress = min(1.0, (step - training.warmup_steps) / last)
    floor = training.minimum_learning_rate / training.learning_rate
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def train(
    objective: nn.Module,
    blocks_NL: Tensor,
    training: Training,
    seed: int,
    out: Path,
    reporter: Reporter,
    runtime: Runtime,
) -> Trained:
    """Train the objective's parameters in place; goes on from `out/checkpoints` where there is one.

    Writes `out/curve.jsonl` (loss in nats a token, learning rate). Raises `StageError` at the first
    loss that is not finite, keeping the last good checkpoint.
    """
    run = _Run(objective, blocks_NL, training, seed, out)
    try:
        _train_to_the_end(run, training.steps, reporter, runtime)
        return run.finish()
    finally:
        run.free()  # a worker lives on after a stage that fails


def _train_to_the_end(run: _Run, steps: int, reporter: Reporter, runtime: Runtime) -> None:
    saved_at = started_at = time.monotonic()
    first = run.step
    while run.step < steps:
        loss = run.advance()
        now = time.monotonic()
        speed = (run.step - first) * run.tokens_per_step / max(now - started_at, 1e-9)
        try:
            reporter.report(run.step, steps, {"loss": loss, "tokens_per_s": speed})
        except (Interrupted, KeyboardInterrupt, SystemExit):
            run.save()
            raise
        if now - saved_at > runtime.checkpoint_every_s and run.step < steps:
            run.save()
            saved_at = time.monotonic()


class _Run:
    """A DeepSpeed engine, the step it is at, and its curve on disk."""

    def __init__(
        self, objective: nn.Module, blocks_NL: Tensor, training: Training, seed: int, out: Path
    ) -> None:
        self._blocks, self._training, self._seed = blocks_NL, training, seed
        self._micro = training.micro_batch_size or training.batch_size
        self._checkpoints = out / "checkpoints"
        self._engine = _start_engine(objective, training, self._micro)
        self.step = 0
        since: list[float] = []
        self.tokens_per_step = training.batch_size * blocks_NL.shape[1]
        self._whole = self._checkpoints / "whole"
        if self._whole.exists():
            _, state = self._engine.load_checkpoint(str(self._checkpoints), self._whole.read_text())
            self.step, since = state["step"], state.get("since", [])
        self._curve = _Curve(out / "curve.jsonl", self.step, training.steps, since)

    def advance(self) -> float:
        """One optimizer step; gives its mean loss."""
        batch = corpus.batch(self._blocks, self.step, self._training.batch_size, self._seed)
        micros = torch.split(batch, self._micro)
        total = 0.0
        for micro in micros:
            loss = self._engine(micro)
            total += loss.item() / len(micros)
            if not math.isfinite(total):
                raise StageError(f"the loss is {total} at step {self.step + 1}")
            self._engine.backward(loss)
            self._engine.step()
        rate = self._training.learning_rate * learning_rate_factor(self.step, self._training)
        self.step += 1
        self._curve.add(self.step, self.step * self.tokens_per_step, total, rate)
        return total

    def save(self) -> None:
        """A checkpoint of this step; the one before is removed only after this one is whole."""
        self._curve.flush()
        tag = f"step{self.step}"
        state = {"step": self.step, "since": list(self._curve.since)}
        # DeepSpeed writes the name of its latest checkpoint in place, so that a kill can leave the
        # name empty. Ours appears whole, and only after what it names.
        self._engine.save_checkpoint(
            str(self._checkpoints), tag=tag, client_state=state, save_latest=False
        )
        beside = self._whole.with_suffix(".part")
        beside.write_text(tag)
        beside.replace(self._whole)
        for old in self._checkpoints.glob("step*"):
            if old.name != tag:
                shutil.rmtree(old)

    def finish(self) -> Trained:
        """Close the curve and drop the checkpoints: the stage is done."""
        self._curve.flush()
        shutil.rmtree(self._checkpoints, ignore_errors=True)
        return Trained(self.step, self.step * self.tokens_per_step, self._curve.last_loss)

    def free(self) -> None:
        """Give back the memory of the engine and its optimizer."""
        self._engine.destroy()


def _start_engine(objective: nn.Module, training: Training, micro_batch_size: int) -> Any:
    _join_process_group()
    optimizer = torch.optim.AdamW(
        [parameter for parameter in objective.parameters() if parameter.requires_grad],
        lr=training.learning_rate,
        betas=(training.beta1, training.beta2),
        weight_decay=training.weight_decay,
        fused=True,
    )
    engine, *_ = deepspeed.initialize(
        model=objective,
        optimizer=optimizer,
        lr_scheduler=lambda inner: torch.optim.lr_scheduler.LambdaLR(
            inner, lambda step: learning_rate_factor(step, training)
        ),
        config=deepspeed_config(training, micro_batch_size),
    )
    return engine


def deepspeed_config(training: Training, micro_batch_size: int) -> dict[str, Any]:
    """The DeepSpeed settings that a run of one worker uses.

    bf16 needs ZeRO stage 1 with fp32 gradient accumulation: that keeps fp32 master weights, while
    stage 0 steps the bf16 weights themselves and rounds most of a small update away.
    """
    half = training.precision == "bf16"
    return {
        "train_batch_size": training.batch_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_clipping": training.gradient_clip,
        "zero_optimization": {"stage": 1 if half else 0},
        "bf16": {"enabled": half},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": sys.maxsize,
    }


def _join_process_group() -> None:
    """A process group of one, which needs no port and no launcher, unless there is a group."""
    if torch.distributed.is_initialized():
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise StageError("a stage runs on one worker; it was launched on several")
    os.environ.setdefault("LOCAL_RANK", "0")
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)


class _Curve:
    """At most about two hundred points of loss and learning rate, each the mean since the last.

    `since` holds the losses after the last point: a checkpoint between two points keeps them.
    """

    def __init__(self, path: Path, step: int, steps: int, since: list[float]) -> None:
        self._path = path
        self._every = max(1, steps // CURVE_POINTS)
        self._steps = steps
        self.since = since
        self._rows = [row for row in read_rows(path) if row["step"] <= step]
        self.last_loss = next(
            (row["value"] for row in reversed(self._rows) if row["name"] == "loss"), math.nan
        )

    def add(self, step: int, tokens: int, loss: float, learning_rate: float) -> None:
        self.since.append(loss)
        if step % self._every and step != self._steps:
            return
        self.last_loss = sum(self.since) / len(self.since)
        self.since.clear()
        stamp = {"step": step, "tokens": tokens, "time_ms": time.time_ns() // 1_000_000}
        self._rows.append({**stamp, "name": "loss", "value": self.last_loss})
        self._rows.append({**stamp, "name": "learning_rate", "value": learning_rate})

    def flush(self) -> None:
        write_rows(self._path, self._rows)
