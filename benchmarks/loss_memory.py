"""How the memory of a distillation loss grows with tokens, beside one that holds all logits.

    python benchmarks/loss_memory.py --json

Forward KL between a student and a teacher, from their final hidden states and output heads to the
gradients of the student's states and head, in fp32: ours in chunks of tokens, and the naive one
with full logits of both. Each runs once at each number of tokens in a fresh process, and both must
come to the same loss and gradients.

What is measured is the rise of the process' peak resident memory (VmHWM, reset when the states and
heads are there) over what it was before. The states themselves are therefore not in it; their
gradient, which any loss has to give, is subtracted (tokens * hidden * 4 bytes). The gradient of the
output head and a chunk of logits remain: they are the same at every number of tokens. The slope is
that of a line through the points, in bytes a token; `slope_vs_naive` is ours divided by the naive
one's. Large blocks go back to the system when they are freed (MALLOC_MMAP_THRESHOLD_), so that a
peak is that of what is in use.

Linux only; CPU only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from trainers.losses import CHUNK_TOKENS, chunked, forward_kl
from trainers.teacher import DenseTargets, OutputHead

TOKENS = (512, 1024, 2048, 4096)
SIDES = ("ours", "naive")


# --- in the fresh process --------------------------------------------------------------------


def ours(hidden_ND: Tensor, head_VD: Tensor, targets: DenseTargets) -> Tensor:
    """As `trainers.distill` computes it."""
    return chunked(
        hidden_ND, head_VD, lambda logits, place: forward_kl(logits, targets.logits(place))
    )


def naive(hidden_ND: Tensor, head_VD: Tensor, targets: DenseTargets) -> Tensor:
    """From full logits of both models."""
    taught_NV = F.log_softmax(targets.logits(slice(0, len(hidden_ND))), dim=-1)
    learned_NV = F.log_softmax(F.linear(hidden_ND, head_VD), dim=-1)
    return F.kl_div(learned_NV, taught_NV, reduction="sum", log_target=True)


def memory(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    status = Path("/proc/self/status").read_text()
    return next(1024 * int(line.split()[1]) for line in status.splitlines() if field in line)


def measure(side: str, tokens: int, vocabulary: int, width: int) -> dict[str, float]:
    """The rise of memory in bytes, with the mean loss and the lengths of both gradients."""
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw)

    hidden_ND = normal(tokens, width).requires_grad_()
    head_VD = normal(vocabulary, width).mul_(0.05).requires_grad_()
    head = OutputHead(normal(vocabulary, width).mul_(0.05))
    targets = DenseTargets(normal(tokens, width), {}, head)
    loss = {"ours": ours, "naive": naive}[side]
    few = loss(hidden_ND[:4], head_VD, targets_of(targets, 4))  # libraries are paged in
    few.backward()  # type: ignore[no-untyped-call]
    hidden_ND.grad = head_VD.grad = None
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    mean = loss(hidden_ND, head_VD, targets) / tokens
    mean.backward()  # type: ignore[no-untyped-call]
    rise = memory("VmHWM") - before - 4 * hidden_ND.numel()
    assert hidden_ND.grad is not None and head_VD.grad is not None
    gradients = [float(tensor.grad.norm()) for tensor in (hidden_ND, head_VD)]
    return {"rise": rise, "loss": mean.item(), "to_states": gradients[0], "to_head": gradients[1]}


def targets_of(targets: DenseTargets, tokens: int) -> DenseTargets:
    """The first tokens' targets."""
    return DenseTargets(targets.hidden_ND[:tokens], {}, targets.head)


# --- in this one -----------------------------------------------------------------------------


def measured(side: str, tokens: int, vocabulary: int, width: int) -> dict[str, float]:
    """What `measure` gives, in a fresh process."""
    root = str(Path(__file__).parents[1])
    settings = {"PYTHONPATH": root, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, "--measure", side, str(tokens), str(vocabulary), str(width)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | settings,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def check(found: dict[str, list[dict[str, float]]]) -> None:
    """Both sides came to the same loss and gradients at every number of tokens."""
    for mine, theirs in zip(found["ours"], found["naive"], strict=True):
        for name in ("loss", "to_states", "to_head"):
            close = abs(mine[name] - theirs[name]) <= 1e-4 * abs(theirs[name])
            assert close, f"{name}: ours {mine[name]}, naive {theirs[name]}"


def slope(tokens: list[int], rises: list[float]) -> float:
    """Bytes a token, by least squares."""
    return float(np.polyfit(tokens, rises, 1)[0])


def main() -> None:
    """Measure, print a table, and with --json one line of JSON last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        side, *sizes = arguments.measure
        print(json.dumps(measure(side, *map(int, sizes))))
        return
    vocabulary, width = arguments.vocabulary, arguments.hidden
    found = {
        side: [measured(side, tokens, vocabulary, width) for tokens in arguments.tokens]
        for side in SIDES
    }
    check(found)
    rises = {side: [each["rise"] for each in found[side]] for side in SIDES}
    slopes = {side: slope(arguments.tokens, rises[side]) for side in SIDES}
    report(arguments.tokens, rises, slopes, vocabulary, width)
    if arguments.json:
        outcome = {f"{side}_bytes_per_token": slopes[side] for side in SIDES}
        print(json.dumps({"slope_vs_naive": slopes["ours"] / slopes["naive"]} | outcome))


def report(
    tokens: list[int],
    rises: dict[str, list[float]],
    slopes: dict[str, float],
    vocabulary: int,
    width: int,
) -> None:
    """A table of what was measured, under the facts of the machine."""
    console = Console(width=100)
    console.print(
        f"forward KL, vocabulary {vocabulary:,}, hidden {width}, fp32; "
        f"ours in chunks of {CHUNK_TOKENS} tokens"
    )
    console.print(f"torch {torch.__version__}, {platform.machine()}, {platform.system()}")
    table = Table()
    table.add_column("tokens")
    for side in SIDES:
        table.add_column(f"{side}, MB", justify="right")
    for place, number in enumerate(tokens):
        table.add_row(f"{number:,}", *(f"{rises[side][place] / 1e6:,.1f}" for side in SIDES))
    table.add_section()
    table.add_row("bytes a token", *(f"{slopes[side]:,.0f}" for side in SIDES))
    console.print(table)
    console.print(f"slope, ours / naive: {slopes['ours'] / slopes['naive']:.4f}")


if __name__ == "__main__":
    main()
