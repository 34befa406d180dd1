"""How much of this machine's arithmetic a distillation step uses.

    python benchmarks/utilisation.py --json

`fraction_of_peak` is the model FLOPs of a step per second, divided by the fastest fp32 matrix
product of several sizes, measured on the same threads right after each step; the median over steps.
Model FLOPs of a step: the teacher's forward pass (2 a parameter and token), the student's forward
and backward (6), and attention; what the softmax of 49,152 words, AdamW and gradient clipping cost
is no part of them. The step is the stage's own: a live teacher in the shape of SmolLM2-135M, a
student of 11 of its layers (67M) or two thirds of its width, forward KL, the engine's optimizer.
Weights are random. Left out: loading, and the first steps.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from distill_step import STUDENTS, TEACHER, TINY, TINY_STUDENTS

from trainers import engine
from trainers.checkpoints import new_model
from trainers.config import DistillLoss, Training
from trainers.contract import Runtime
from trainers.distill import Distillation
from trainers.shapes import shape_of
from trainers.teacher import LiveTeacher

WARM_UP = 2
GEMM_SIZES = (512, 1024, 2048)
GEMM_SECONDS = 0.3
"""For how long each size is multiplied."""


def gemm_rate(size: int) -> float:
    """FLOPs a second of the fastest of several fp32 products of square matrices."""
    a, b = torch.rand(2, size, size)
    out = torch.empty(size, size)
    best, ends = 0.0, time.perf_counter() + GEMM_SECONDS
    while time.perf_counter() < ends:
        began = time.perf_counter()
        torch.mm(a, b, out=out)
        best = max(best, 2.0 * size**3 / (time.perf_counter() - began))
    return best


class Rounds:
    """A reporter: times the step that ended, then the machine, and lets the next step begin."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.peaks: list[float] = []
        self._began = time.perf_counter()

    def report(self, done: int, total: int, values: Mapping[str, float]) -> None:
        """See `trainers.contract.Reporter`."""
        self.seconds.append(time.perf_counter() - self._began)
        self.peaks.append(max(gemm_rate(size) for size in GEMM_SIZES))
        self._began = time.perf_counter()


def measure(
    teacher: dict[str, Any], student: dict[str, Any], blocks_BL: torch.Tensor, steps: int
) -> Rounds:
    """Real steps of the engine on the same blocks over and over, the machine's peak between."""
    signal = LiveTeacher(new_model(teacher, seed=0).eval())
    objective = Distillation(new_model(student, seed=1).train(), signal, DistillLoss())
    training = Training(steps=steps, batch_size=len(blocks_BL), learning_rate=1e-4)
    rounds = Rounds()
    with tempfile.TemporaryDirectory() as out:
        runtime = Runtime(checkpoint_every_s=1e9)
        engine.train(objective, blocks_BL, training, 0, Path(out), rounds, runtime)
    return rounds


def main() -> None:
    """Measure, print a table, and with --json one line of JSON last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", choices=list(STUDENTS), default="depth")
    parser.add_argument("--tokens", type=int, default=1024, help="a step")
    parser.add_argument("--block-length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="steps that count")
    parser.add_argument("--tiny", action="store_true", help="tiny models: only to try it out")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    teacher = TEACHER | (TINY if arguments.tiny else {})
    cut = TINY_STUDENTS if arguments.tiny else STUDENTS
    student = teacher | cut[arguments.student]
    length = arguments.block_length
    blocks_BL = torch.randint(teacher["vocab_size"], (arguments.tokens // length, length))
    flops = shape_of(teacher).forward_flops(blocks_BL.numel(), length)
    flops += shape_of(student).training_flops(blocks_BL.numel(), length)
    rounds = measure(teacher, student, blocks_BL, arguments.rounds + WARM_UP)
    seconds, peaks = rounds.seconds[WARM_UP:], rounds.peaks[WARM_UP:]
    fractions = [flops / s / peak for s, peak in zip(seconds, peaks, strict=True)]
    print(
        f"{blocks_BL.numel()} tokens in blocks of {length}, {arguments.threads} threads, ", end=""
    )
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}")
    sizes = [f"{shape_of(each).parameters / 1e6:.1f}M" for each in (teacher, student)]
    print(f"teacher {sizes[0]}, student {sizes[1]}, {flops / 1e12:.3f} TFLOP a step")
    for s, peak, fraction in zip(seconds, peaks, fractions, strict=True):
        print(f"step {s:7.3f} s {flops / s / 1e9:8.1f} GFLOP/s", end="   ")
        print(f"peak {peak / 1e9:8.1f} GFLOP/s   {fraction:.3f}")
    found = {
        "fraction_of_peak": statistics.median(fractions),
        "seconds_per_step": statistics.median(seconds),
        "peak_gflops": statistics.median(peaks) / 1e9,
        "threads": arguments.threads,
    }
    print(f"fraction of peak {found['fraction_of_peak']:.3f}")
    if arguments.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
