"""Stage `importance`: what every unit and every contiguous block of layers is worth.

By activations, one forward pass scores neurons, heads, channels and, by Block Influence, layers
(P1 sections 2.2 and 2.3). By perplexity (P1 section 2.3) or a downstream task (P2 section 3), a
block of layers is worth what is lost without it. Every block of the asked lengths is scored, so
that both single layers and whole blocks can be chosen from one artifact.

Under a launcher such as torchrun each process takes its share of the blocks or questions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, distributed
from transformers import PreTrainedModel

from trainers import activations, corpus, shell, workers
from trainers.ablation import Block, blocks_of_layers, hidden_without
from trainers.checkpoints import (
    load_model,
    load_tokenizer,
    output_head,
    read_config,
    softcapped,
)
from trainers.config import Activations, ImportanceConfig, Perplexity, TaskAccuracy
from trainers.contract import Silent, StageContext, StageError, StageResult, Ticker, write_rows
from trainers.evaluate import BLOCKS_A_BATCH
from trainers.losses import chunked, cross_entropy
from trainers.shapes import Shape, shape_of

Rows = list[dict[str, Any]]
PARTS = 1000
"""In how many parts progress is told where the work is not counted in blocks of text."""


@workers.metered
def run(context: StageContext[ImportanceConfig]) -> StageResult:
    """Score every block of layers into scores.jsonl, and by activations every unit into
    activations.safetensors."""
    # Every process comes to the same result; the first alone writes it and tells of progress.
    if not workers.is_first():
        context = replace(context, reporter=Silent())
    match context.config.criterion:
        case Activations(samples=samples):
            rows, result = _by_activations(context, samples)
        case Perplexity() as criterion:
            rows, result = _by_perplexity(context, criterion)
        case TaskAccuracy() as criterion:
            rows, result = _by_tasks(context, criterion)
    _check(rows)
    if workers.is_first():
        write_rows(context.out / "scores.jsonl", rows)
    return result


# --- by activations --------------------------------------------------------------------------


def _by_activations(
    context: StageContext[ImportanceConfig], samples: int
) -> tuple[Rows, StageResult]:
    model, blocks_NL = _model(context), _calibration(context, samples)
    tick = Ticker(context.reporter, len(blocks_NL))
    statistics, influence = activations.collect(model, blocks_NL, tick)
    if workers.is_first():
        statistics.save(context.out / activations.FILE)
    rows = [
        _row("block_influence", first, length, name, value)
        for (first, length), value in influence.items()
        for name in ("block_influence", "importance")
    ]
    tokens = blocks_NL.numel()
    flops = flops_of(_shape(context), tokens, blocks_NL.shape[1], (), head=False)
    return rows, StageResult({}, tokens, flops)


# --- by perplexity ---------------------------------------------------------------------------


def _by_perplexity(
    context: StageContext[ImportanceConfig], criterion: Perplexity
) -> tuple[Rows, StageResult]:
    model, blocks_NL = _model(context), _calibration(context, criterion.samples)
    places = _places(model, criterion.block_lengths)
    tick = Ticker(context.reporter, len(blocks_NL) * (1 + len(places)))
    intact, *others = losses_without(model, blocks_NL, places, tick)
    rows = _leaving_out(
        criterion.kind, places, {"lm_loss": intact}, [{"lm_loss": loss} for loss in others]
    )
    tokens = blocks_NL.numel()
    flops = flops_of(_shape(context), tokens, blocks_NL.shape[1], places, head=True)
    return rows, StageResult({}, tokens, flops)


@torch.no_grad()
def losses_without(
    model: PreTrainedModel, blocks_NL: Tensor, places: Sequence[Block], tick: Ticker
) -> list[float]:
    """LM loss in nats a predicted token: of the intact model, then without each block of layers.

    `tick` counts texts, once for each model. Where torch.distributed runs, each process takes its
    share of `blocks_NL`.
    """
    rank, processes = workers.rank_and_processes()
    mine_NL = blocks_NL[rank::processes]
    sums = torch.zeros(1 + len(places), dtype=torch.float64, device=model.device)
    for start in range(0, len(mine_NL), BLOCKS_A_BATCH):
        batch_BL = mine_NL[start : start + BLOCKS_A_BATCH].to(model.device)
        for number, hidden_BLD in enumerate(hidden_without(model, batch_BL, places)):
            sums[number] += _summed_loss(model, hidden_BLD, batch_BL)
            tick(len(batch_BL))
    if processes > 1:
        distributed.all_reduce(sums)
        tick((len(blocks_NL) - len(mine_NL)) * len(sums))
    predicted = blocks_NL.shape[0] * (blocks_NL.shape[1] - 1)
    return [float(total) / predicted for total in sums]


def _summed_loss(model: PreTrainedModel, hidden_BLD: Tensor, batch_BL: Tensor) -> Tensor:
    labels = batch_BL[:, 1:].flatten()
    return chunked(
        hidden_BLD[:, :-1].flatten(0, 1),
        output_head(model),
        lambda logits_NV, place: cross_entropy(softcapped(logits_NV, model), labels[place]),
    )


# --- by downstream tasks ---------------------------------------------------------------------


def _by_tasks(
    context: StageContext[ImportanceConfig], criterion: TaskAccuracy
) -> tuple[Rows, StageResult]:
    from trainers import questions  # the harness takes seconds to import

    model, tokenizer = _model(context), load_tokenizer(context.model("model"))
    places = _places(model, criterion.block_lengths)
    answers, lengths = questions.ask_without(
        model,
        tokenizer,
        criterion.tasks,
        places,
        lambda part: context.reporter.report(round(part * PARTS), PARTS, {}),
    )
    intact, *others = [_accuracy(each, criterion.split) for each in answers]
    rows = _leaving_out(criterion.kind, places, intact, others)
    tokens = sum(lengths)
    # The context of an average token, as attention's cost sees it.
    length = round(sum(length**2 for length in lengths) / tokens) if tokens else 0
    flops = flops_of(_shape(context), tokens, length, places, head=False)
    return rows, StageResult({}, tokens, flops)


def _accuracy(answers: Sequence[Any], split: str) -> dict[str, float]:
    asked = [answer for answer in answers if answer.split == split]
    if not asked:
        raise StageError(
            f"none of the {len(answers)} questions of the tasks is of the half {split}"
        )
    margins = [answer.score for answer in asked if answer.score is not None]
    correct = [answer.correct for answer in asked]
    return {"accuracy": sum(correct) / len(correct)} | (
        {"margin": sum(margins) / len(margins)} if margins else {}
    )


# --- what leaving out means ------------------------------------------------------------------


def _places(model: PreTrainedModel, lengths: tuple[int, ...]) -> list[Block]:
    count = model.config.num_hidden_layers
    if max(lengths) >= count:
        raise StageError(f"a block of {max(lengths)} layers out of {count}")
    return blocks_of_layers(count, lengths)


def _leaving_out(
    kind: str, places: list[Block], intact: dict[str, float], others: list[dict[str, float]]
) -> Rows:
    rows = [_row(kind, 0, 0, name, value) for name, value in intact.items()]
    for (first, length), found in zip(places, others, strict=True):
        rows += [_row(kind, first, length, name, value) for name, value in found.items()]
        rows.append(_row(kind, first, length, "importance", _harm(intact, found)))
    return rows


def _harm(intact: dict[str, float], found: dict[str, float]) -> float:
    """How much worse the model got: in loss, or in accuracy with the mean margin as tie-breaker.

    Few questions give many equal accuracies; the margin, squashed below one question's worth,
    orders those without ever outvoting a question.
    """
    if "lm_loss" in found:
        return found["lm_loss"] - intact["lm_loss"]
    tie = math.tanh(intact.get("margin", 0.0) - found.get("margin", 0.0)) * 1e-6
    return intact["accuracy"] - found["accuracy"] + tie


def _row(criterion: str, first: int, length: int, name: str, value: float) -> dict[str, Any]:
    return {
        "criterion": criterion,
        "block_length": length,
        "last": first + length - 1,
        "name": name,
        "value": value,
    }


def _check(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if not math.isfinite(row["value"]):
            raise StageError(f"the score {row['name']} is {row['value']} {_place(row)}")


def _place(row: dict[str, Any]) -> str:
    match row["block_length"]:
        case 0:
            return "for the intact model"
        case 1:
            return f"without layer {row['last']}"
        case length:
            return f"without the {length} layers that end at layer {row['last']}"


# --- inputs and costs ------------------------------------------------------------------------


def _model(context: StageContext[ImportanceConfig]) -> PreTrainedModel:
    model = load_model(context.model("model"), context.config.precision)
    return model.to(workers.device())


def _calibration(context: StageContext[ImportanceConfig], samples: int) -> Tensor:
    """`samples` of the calibration blocks, drawn with the seed, in the order of the text."""
    blocks_NL = corpus.blocks(context.config.corpus, context.model("model"), "calibration")
    return blocks_NL[corpus.drawn_blocks(len(blocks_NL), 1, samples, context.seed)]


def _shape(context: StageContext[ImportanceConfig]) -> Shape:
    return shape_of(read_config(context.model("model")))


def flops_of(
    shape: Shape, tokens: int, context: int, places: Sequence[Block], *, head: bool
) -> float:
    """FLOPs of one pass of the intact model, and of the layers behind each block in `places`;
    without `head` of the layers alone (a task's questions run the head on few positions)."""
    count = shape.num_hidden_layers
    behind = [count - first - length for first, length in places]
    shapes = (shape.resized(replace(shape.sizes, num_hidden_layers=n)) for n in (count, *behind))
    return sum(each.forward_flops(tokens, context, head) for each in shapes)


if __name__ == "__main__":
    shell.main(ImportanceConfig, run)
