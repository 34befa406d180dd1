"""Stage `importance`: what happens when a contiguous block of layers is left out.

Layer importance of the Minitron papers: by perplexity, by Block Influence (P1 section 2.3) and by
a downstream task (P2 section 3). Every block of the asked lengths is scored, so that both single
layers and whole blocks can be chosen from one artifact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainers import corpus, shell
from trainers.checkpoints import load_model, load_tokenizer, read_config
from trainers.config import (
    BlockInfluence,
    ImportanceConfig,
    Perplexity,
    TaskAccuracy,
)
from trainers.contract import StageContext, StageError, StageResult, Ticker, write_rows
from trainers.evaluate import BLOCKS_A_BATCH, lm_loss
from trainers.families import family_of
from trainers.shapes import shape_of

Measure = Callable[[PreTrainedModel], dict[str, float]]


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The model's list of layers, found by its family."""
    layers = model.get_submodule(family_of(model.config.to_dict()).layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


@contextmanager
def left_out(model: PreTrainedModel, first: int, length: int) -> Iterator[PreTrainedModel]:
    """The model without `length` layers from `first` on; restored on leaving."""
    family = family_of(model.config.to_dict())
    parent_path, _, name = family.layers.rpartition(".")
    parent, layers = model.get_submodule(parent_path), layers_of(model)
    kept = [place for place in range(len(layers)) if not first <= place < first + length]
    whole = {
        key: value
        for key in family.per_layer_settings
        if isinstance(value := getattr(model.config, key, None), list)
    }
    try:
        setattr(parent, name, _numbered(nn.ModuleList(layers[place] for place in kept)))
        model.config.num_hidden_layers = len(kept)
        for key, values in whole.items():
            setattr(model.config, key, [values[place] for place in kept])
        yield model
    finally:
        setattr(parent, name, _numbered(layers))
        model.config.num_hidden_layers = len(layers)
        for key, values in whole.items():
            setattr(model.config, key, values)


def _numbered(layers: nn.ModuleList) -> nn.ModuleList:
    """The layers, told their places: attention finds its part of the key-value cache by it."""
    for place, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place  # type: ignore[assignment]
    return layers


def blocks_of_layers(count: int, lengths: tuple[int, ...]) -> list[tuple[int, int]]:
    """(first, length) of every contiguous block of these lengths among `count` layers."""
    return [(first, length) for length in lengths for first in range(count - length + 1)]


@torch.no_grad()
def block_influence(
    model: PreTrainedModel, blocks_NL: Tensor, lengths: tuple[int, ...], tick: Callable[[int], None]
) -> dict[tuple[int, int], float]:
    """1 - E[cos(input, output)] of every block of layers, from one pass with running sums."""
    layers = layers_of(model)
    places = blocks_of_layers(len(layers), lengths)
    sums = dict.fromkeys(places, 0.0)
    stream: list[Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(_keep_input(stream), with_kwargs=True) for layer in layers
    ]
    hooks.append(
        layers[-1].register_forward_hook(lambda _m, _i, output: stream.append(_first(output)))
    )
    try:
        for batch in torch.split(blocks_NL, BLOCKS_A_BATCH):
            stream.clear()
            model.base_model(input_ids=batch, use_cache=False)
            for first, length in places:
                before, after = stream[first].float(), stream[first + length].float()
                sums[first, length] += float(F.cosine_similarity(before, after, dim=-1).sum())
            tick(len(batch))
    finally:
        for hook in hooks:
            hook.remove()
    return {place: 1 - total / blocks_NL.numel() for place, total in sums.items()}


def _keep_input(stream: list[Tensor]) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], None]:
    def hook(_module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        stream.append(inputs[0] if inputs else named["hidden_states"])

    return hook


def _first(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def run(context: StageContext[ImportanceConfig]) -> StageResult:
    """Score every block; leaves scores.jsonl."""
    config, folder = context.config, context.model("model")
    model = load_model(folder, config.precision)
    count = model.config.num_hidden_layers
    if max(config.block_lengths) >= count:
        raise StageError(f"a block of {max(config.block_lengths)} layers out of {count}")
    blocks = corpus.blocks(config.corpus, folder, "calibration")
    match config.criterion:
        case BlockInfluence(samples=samples):
            rows = _influences(context, model, blocks[:samples])
            tokens = blocks[:samples].numel()
        case Perplexity(samples=samples):
            rows = _leave_out(context, model, lambda m: {"lm_loss": lm_loss(m, blocks[:samples])})
            tokens = _passes(count, config) * blocks[:samples].numel()
        case TaskAccuracy(tasks=tasks):
            rows = _leave_out(context, model, _accuracy(tasks, load_tokenizer(folder)))
            tokens = 0
    _check(rows)
    write_rows(context.out / "scores.jsonl", rows)
    flops = shape_of(read_config(folder)).forward_flops(tokens, blocks.shape[1])
    return StageResult({}, tokens, flops)


def _influences(
    context: StageContext[ImportanceConfig], model: PreTrainedModel, blocks_NL: Tensor
) -> list[dict[str, Any]]:
    tick = Ticker(context.reporter, len(blocks_NL))
    found = block_influence(model, blocks_NL, context.config.block_lengths, tick)
    return [
        _row("block_influence", first, length, name, value)
        for (first, length), value in found.items()
        for name in ("block_influence", "importance")
    ]


def _passes(count: int, config: ImportanceConfig) -> int:
    return 1 + len(blocks_of_layers(count, config.block_lengths))


def _accuracy(tasks: Any, tokenizer: Any) -> Measure:
    from trainers import questions  # the harness takes seconds to import

    def measure(model: PreTrainedModel) -> dict[str, float]:
        answers = questions.ask(model, tokenizer, tasks)
        margins = [answer.score for answer in answers if answer.score is not None]
        correct = [answer.correct for answer in answers]
        return {"accuracy": sum(correct) / len(correct)} | (
            {"margin": sum(margins) / len(margins)} if margins else {}
        )

    return measure


def _leave_out(
    context: StageContext[ImportanceConfig], model: PreTrainedModel, measure: Measure
) -> list[dict[str, Any]]:
    """Measure the intact model and the model without each block."""
    kind = context.config.criterion.kind
    places = blocks_of_layers(model.config.num_hidden_layers, context.config.block_lengths)
    intact = measure(model)
    rows = [_row(kind, 0, 0, name, value) for name, value in intact.items()]
    for number, (first, length) in enumerate(places, 1):
        with left_out(model, first, length):
            found = measure(model)
        rows += [_row(kind, first, length, name, value) for name, value in found.items()]
        rows.append(_row(kind, first, length, "importance", _harm(intact, found)))
        context.reporter.report(number, len(places), {})
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


if __name__ == "__main__":
    shell.main(ImportanceConfig, run)
