"""Stage `evaluate`: held-out LM loss, KL to the teacher, and downstream accuracy of a model.

On several workers each takes its share of the text and of the questions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, distributed
from transformers import PreTrainedModel

from trainers import corpus, shell, workers
from trainers.checkpoints import (
    final_hidden,
    load_model,
    load_tokenizer,
    output_head,
    read_config,
    softcapped,
)
from trainers.config import Corpus, EvaluateConfig
from trainers.contract import StageContext, StageError, StageResult, Ticker, write_rows
from trainers.losses import cross_entropy, forward_kl
from trainers.shapes import shape_of
from trainers.teacher import DenseTargets, LiveTeacher, RememberedTeacher

BLOCKS_A_BATCH = 8
TOKENS_A_CHUNK = 1024
CALIBRATION_BINS = 15
REMEMBERED_BYTES = 512 * 2**20
"""A teacher that takes no more, with its hidden states of the held-out text, stays in memory for
the next student that the process measures."""

Teacher = LiveTeacher | RememberedTeacher
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class HeldOut:
    """Means over all predicted tokens: cross-entropy and KL(teacher || model) in nats, and by how
    much the model's confidence in its likeliest token misses how often that is right."""

    lm_loss: float
    kd_loss: float | None
    calibration_error: float

    def metrics(self) -> dict[str, float]:
        """Those that were measured, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


@torch.no_grad()
def lm_loss(
    model: PreTrainedModel,
    blocks_NL: Tensor,
    tick: Callable[[int], None] = lambda blocks: None,
    share: tuple[int, int] = (0, 1),
) -> float:
    """Mean next-token cross-entropy in nats over all predicted tokens of the blocks. `share` as for
    `held_out`."""
    cross, _ = _added_up(model, blocks_NL, None, None, tick, share)
    return cross / _predicted(blocks_NL)


@torch.no_grad()
def held_out(
    model: PreTrainedModel,
    blocks_NL: Tensor,
    teacher: Teacher | None,
    tick: Callable[[int], None] = lambda blocks: None,
    share: tuple[int, int] = (0, 1),
) -> HeldOut:
    """What the model makes of held-out text, beside a teacher where there is one.

    `share`: this process' place among those that share the blocks, and how many they are. All of
    them tick alike and come to the same.
    """
    calibration = _Calibration()
    cross, divergence = _added_up(model, blocks_NL, teacher, calibration, tick, share)
    calibration.sums_3B = _over(share[1], calibration.sums_3B, model.device)
    predicted = _predicted(blocks_NL)
    kd_loss = divergence / predicted if teacher else None
    return HeldOut(cross / predicted, kd_loss, calibration.error())


def _predicted(blocks_NL: Tensor) -> int:
    """How many tokens are predicted: all but the first of each block."""
    return blocks_NL.shape[0] * (blocks_NL.shape[1] - 1)


def _added_up(
    model: PreTrainedModel,
    blocks_NL: Tensor,
    teacher: Teacher | None,
    calibration: _Calibration | None,
    tick: Callable[[int], None],
    share: tuple[int, int],
) -> tuple[float, float]:
    """Cross-entropy and divergence in nats, added up over all predicted tokens; `calibration` takes
    in those of this process' share."""
    rank, processes = share
    sums_2 = torch.zeros(2, dtype=torch.float64)
    batches = torch.split(torch.arange(len(blocks_NL)), BLOCKS_A_BATCH)
    for first in range(0, len(batches), processes):
        together = batches[first : first + processes]
        if rank < len(together):
            numbers_B = together[rank]
            batch_BL = blocks_NL[numbers_B].to(model.device)
            taught = teacher.targets(batch_BL, numbers_B) if teacher else None
            sums_2 += _summed(model, batch_BL, taught, calibration)
        tick(sum(map(len, together)))
    cross, divergence = _over(processes, sums_2, model.device).tolist()
    return cross, divergence


def _summed(
    model: PreTrainedModel,
    batch_BL: Tensor,
    taught: DenseTargets | None,
    calibration: _Calibration | None,
) -> Tensor:
    """Cross-entropy and divergence in nats, added up over all predicted tokens of a batch."""
    cross, divergence = 0.0, 0.0
    labels_N = batch_BL[:, 1:].flatten()
    hidden_ND = final_hidden(model, batch_BL)[:, :-1].flatten(0, 1)
    for start in range(0, len(hidden_ND), TOKENS_A_CHUNK):
        place = slice(start, start + TOKENS_A_CHUNK)
        logits_NV = softcapped(F.linear(hidden_ND[place], output_head(model)), model)
        cross += float(cross_entropy(logits_NV, labels_N[place]))
        if taught is not None:
            divergence += float(forward_kl(logits_NV, taught.logits(place)))
        if calibration is not None:
            calibration.add(logits_NV, labels_N[place])
    return torch.tensor([cross, divergence], dtype=torch.float64)


def _over(processes: int, sums: Tensor, device: torch.device) -> Tensor:
    """The sums of all processes; on a GPU they talk through it."""
    if processes == 1:
        return sums
    total = sums.to(device)
    distributed.all_reduce(total)
    return total.cpu()


class _Calibration:
    """Expected calibration error of next-token predictions (Guo et al. 2017, equation 3): tokens in
    bins of equal width by confidence, |accuracy - confidence| weighted by the bins' tokens."""

    def __init__(self) -> None:
        self.sums_3B = torch.zeros(3, CALIBRATION_BINS, dtype=torch.float64)

    def add(self, logits_NV: Tensor, labels_N: Tensor) -> None:
        """Take in predictions with what came next."""
        confidence_N, likeliest_N = torch.softmax(logits_NV.float(), dim=-1).max(dim=-1)
        # What is not a number fails the stage by its loss, and not here by its bin.
        bins_N = (confidence_N.nan_to_num() * CALIBRATION_BINS).long()
        bins_N = bins_N.clamp(max=CALIBRATION_BINS - 1)
        rows_3N = torch.stack(
            [torch.ones_like(confidence_N), confidence_N, (likeliest_N == labels_N).float()]
        )
        self.sums_3B.index_add_(1, bins_N.cpu(), rows_3N.double().cpu())

    def error(self) -> float:
        """Between 0 and 1."""
        tokens, confidence, correct = self.sums_3B
        return float((correct - confidence).abs().sum() / tokens.sum())


@workers.metered
def run(context: StageContext[EvaluateConfig]) -> StageResult:
    """Measure the model in role `model`; roles `teacher` and any tasks are optional."""
    config, folder = context.config, context.model("model")
    device = workers.device()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where workers exchange what they found
    model = load_model(folder, config.precision).to(device)
    teacher = _teacher(context)
    blocks = corpus.blocks(config.corpus, folder, "heldout")
    # The questions of a task count as much as all the blocks: no one knows before how long.
    tick = Ticker(context.reporter, len(blocks) * (1 + len(config.tasks)))
    found = held_out(model, blocks, teacher, tick, workers.rank_and_processes())
    if not math.isfinite(found.lm_loss):
        raise StageError(f"the held-out loss is {found.lm_loss}")
    metrics = found.metrics()
    if config.tasks:
        metrics |= _accuracies(context, model, folder, lambda _: tick(len(blocks)))
    return StageResult(metrics, blocks.numel(), _flops(context, blocks))


def _flops(context: StageContext[EvaluateConfig], blocks_NL: Tensor) -> float:
    """FLOPs of the held-out text, in the teacher too: also where it is remembered, lest a record
    depend on what its worker did before."""
    roles = [role for role in ("model", "teacher") if role in context.inputs]
    shapes = [shape_of(read_config(context.model(role))) for role in roles]
    return sum(each.forward_flops(blocks_NL.numel(), blocks_NL.shape[1]) for each in shapes)


def _teacher(context: StageContext[EvaluateConfig]) -> Teacher | None:
    if "teacher" not in context.inputs:
        return None
    config, folder = context.config, context.model("teacher")
    shape, text = shape_of(read_config(folder)), config.corpus
    numbers = shape.parameters + text.heldout_blocks * text.block_length * shape.sizes.hidden_size
    if numbers * (2 if config.precision == "bf16" else 4) > REMEMBERED_BYTES:
        return _live(folder, config.precision)
    return _remembered(folder, config.precision, text)


def _live(folder: Path, precision: Precision) -> LiveTeacher:
    return LiveTeacher(load_model(folder, precision).to(workers.device()))


@lru_cache(maxsize=1)
def _remembered(folder: Path, precision: Precision, text: Corpus) -> RememberedTeacher:
    """A folder of the store never changes what it holds."""
    return RememberedTeacher(_live(folder, precision))


def _accuracies(
    context: StageContext[EvaluateConfig],
    model: PreTrainedModel,
    folder: Path,
    progress: Callable[[int], None],
) -> dict[str, float]:
    from trainers import questions  # the harness takes seconds to import

    answers = questions.ask(model, load_tokenizer(folder), context.config.tasks, progress)
    if workers.is_first():
        write_rows(context.out / "items.jsonl", [answer.row() for answer in answers])
    apart = questions.better_when_lower(context.config.tasks)
    select, report = (questions.accuracies(answers, half, apart) for half in ("select", "report"))
    return {f"accuracy.{task}": value for task, value in select.items()} | {
        f"accuracy_report.{task}": value for task, value in report.items()
    }


if __name__ == "__main__":
    shell.main(EvaluateConfig, run)
