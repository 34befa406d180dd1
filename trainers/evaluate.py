"""Stage `evaluate`: held-out LM loss, KL to the teacher, and downstream accuracy of a model."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trainers import corpus, shell
from trainers.checkpoints import (
    final_hidden,
    load_model,
    load_tokenizer,
    output_head,
    read_config,
    softcapped,
)
from trainers.config import EvaluateConfig
from trainers.contract import StageContext, StageError, StageResult, Ticker, write_rows
from trainers.losses import cross_entropy, forward_kl
from trainers.shapes import shape_of
from trainers.teacher import LiveTeacher

BLOCKS_A_BATCH = 8


@torch.no_grad()
def lm_loss(
    model: PreTrainedModel, blocks_NL: Tensor, tick: Callable[[int], None] = lambda blocks: None
) -> float:
    """Mean next-token cross-entropy in nats over all predicted tokens of the blocks."""
    return held_out_losses(model, blocks_NL, None, tick)[0]


@torch.no_grad()
def held_out_losses(
    model: PreTrainedModel,
    blocks_NL: Tensor,
    teacher: LiveTeacher | None,
    tick: Callable[[int], None] = lambda blocks: None,
) -> tuple[float, float | None]:
    """Mean cross-entropy, and with a teacher the mean KL(teacher || model), in nats a token."""
    cross, divergence = 0.0, 0.0
    for batch in torch.split(blocks_NL, BLOCKS_A_BATCH):
        labels = batch[:, 1:].flatten()
        hidden = final_hidden(model, batch)[:, :-1].flatten(0, 1)
        taught = teacher.hidden(batch)[:, :-1].flatten(0, 1) if teacher else None

        def both(
            logits: Tensor,
            place: slice,
            labels: Tensor = labels,
            taught: Tensor | None = taught,
        ) -> Tensor:
            logits = softcapped(logits, model)
            loss = cross_entropy(logits, labels[place])
            if teacher is None or taught is None:
                return torch.stack([loss, torch.zeros_like(loss)])
            return torch.stack([loss, forward_kl(logits, teacher.logits(taught[place]))])

        pair = _sum_chunks(hidden, output_head(model), both)
        cross, divergence = cross + float(pair[0]), divergence + float(pair[1])
        tick(len(batch))
    predicted = blocks_NL.shape[0] * (blocks_NL.shape[1] - 1)
    return cross / predicted, divergence / predicted if teacher else None


def _sum_chunks(
    hidden_ND: Tensor, head_VD: Tensor, loss: Callable[[Tensor, slice], Tensor]
) -> Tensor:
    return torch.stack(
        [
            loss(torch.nn.functional.linear(hidden_ND[start : start + 1024], head_VD), place)
            for start in range(0, len(hidden_ND), 1024)
            for place in [slice(start, start + 1024)]
        ]
    ).sum(0)


def run(context: StageContext[EvaluateConfig]) -> StageResult:
    """Measure the model in role `model`; roles `teacher` and any tasks are optional."""
    config, folder = context.config, context.model("model")
    model = load_model(folder, config.precision)
    teacher = _teacher(context)
    blocks = corpus.blocks(config.corpus, folder, "heldout")
    # The questions of a task count as much as all the blocks: no one knows before how long.
    tick = Ticker(context.reporter, len(blocks) * (1 + len(config.tasks)))
    loss, divergence = held_out_losses(model, blocks, teacher, tick)
    if not math.isfinite(loss):
        raise StageError(f"the held-out loss is {loss}")
    metrics = {"lm_loss": loss} | ({"kd_loss": divergence} if divergence is not None else {})
    if config.tasks:
        metrics |= _accuracies(context, model, folder, lambda _: tick(len(blocks)))
    shape = shape_of(read_config(folder))
    tokens = blocks.numel()
    return StageResult(metrics, tokens, shape.forward_flops(tokens, blocks.shape[1]))


def _teacher(context: StageContext[EvaluateConfig]) -> LiveTeacher | None:
    if "teacher" not in context.inputs:
        return None
    return LiveTeacher(load_model(context.model("teacher"), context.config.precision))


def _accuracies(
    context: StageContext[EvaluateConfig],
    model: PreTrainedModel,
    folder: Path,
    progress: Callable[[int], None],
) -> dict[str, float]:
    from trainers import questions  # the harness takes seconds to import

    answers = questions.ask(model, load_tokenizer(folder), context.config.tasks, progress)
    write_rows(context.out / "items.jsonl", [answer.row() for answer in answers])
    select, report = (questions.accuracies(answers, half) for half in ("select", "report"))
    return {f"accuracy.{task}": value for task, value in select.items()} | {
        f"accuracy_report.{task}": value for task, value in report.items()
    }


if __name__ == "__main__":
    shell.main(EvaluateConfig, run)
