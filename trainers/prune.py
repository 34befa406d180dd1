"""Stage `prune`: choose layers, neurons, heads and channels, and write the smaller checkpoint.

Layers are chosen first, then the units of the layers that stay. Scores and settings name layers by
their number in the model that is cut.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from trainers import activations, shell, surgery
from trainers.activations import ActivationStatistics
from trainers.checkpoints import load_tokenizer, new_model, read_config, save_model
from trainers.config import (
    AtRandom,
    ByActivation,
    ByList,
    ByScore,
    DepthCut,
    PruneConfig,
    RandomUnits,
    UnitChoice,
    WidthCut,
)
from trainers.contract import StageContext, StageError, StageResult, read_rows
from trainers.shapes import Shape, Sizes, problems_with, pruned_sizes, shape_of
from trainers.surgery import Cut, Heads, Ranking, pruned_config

MOST_NEURONS_LISTED = 20_000

# --- layers ----------------------------------------------------------------------------------


def contiguous_block(scores: Mapping[tuple[int, int], float], length: int) -> tuple[int, ...]:
    """The block of `length` layers that matters least; the earliest of equals."""
    candidates = [(value, last) for (size, last), value in scores.items() if size == length]
    if not candidates:
        raise StageError(f"the importance scores hold no block of {length} layers")
    last = min(candidates)[1]
    return tuple(range(last - length + 1, last + 1))


def single_layers(scores: Mapping[tuple[int, int], float], number: int) -> tuple[int, ...]:
    """The `number` layers that each matter least when it alone is left out."""
    ranked = sorted((value, last) for (size, last), value in scores.items() if size == 1)
    if len(ranked) < number:
        raise StageError(f"the importance scores hold {len(ranked)} single layers, not {number}")
    return tuple(sorted(last for _, last in ranked[:number]))


def random_layers(count: int, number: int, contiguous: bool, seed: int) -> tuple[int, ...]:
    """`number` of `count` layers drawn with the seed; with `contiguous`, one random block."""
    draw = random.Random(seed)
    if contiguous:
        first = draw.randrange(count - number + 1)
        return tuple(range(first, first + number))
    return tuple(sorted(draw.sample(range(count), number)))


def listed_layers(drop: Sequence[int], count: int, number: int) -> tuple[int, ...]:
    """Exactly these `number` of `count` layers."""
    layers = tuple(sorted(set(drop)))
    if len(layers) != len(drop) or not set(layers) <= set(range(count)):
        raise StageError(f"cannot drop layers {list(drop)} of layers 0 to {count - 1}")
    if len(layers) != number:
        raise StageError(f"{len(layers)} layers are listed, {number} of {count} are to be dropped")
    return layers


def choose(
    cut: DepthCut, count: int, scores: Mapping[tuple[int, int], float], seed: int
) -> tuple[int, ...]:
    """The layers to drop, ascending. `scores` maps (block length, last layer) to importance."""
    number = count - cut.num_hidden_layers
    if number < 0:
        raise StageError(f"cannot keep {cut.num_hidden_layers} of {count} layers")
    match cut.choice:
        case ByList(drop=drop):
            return listed_layers(drop, count, number)
        case AtRandom(contiguous=contiguous):
            return random_layers(count, number, contiguous, seed)
        case ByScore() if number == 0:
            return ()
        case ByScore(contiguous=True):
            return contiguous_block(scores, number)
        case ByScore():
            return single_layers(scores, number)


# --- units -----------------------------------------------------------------------------------

Units = Literal["neurons", "heads", "groups", "channels"]


def ranked(scores: Sequence[float]) -> tuple[int, ...]:
    """All units, the largest score first; the earlier of equals first."""
    return tuple(sorted(range(len(scores)), key=lambda unit: -scores[unit]))


def unit_scores(
    choice: UnitChoice,
    units: Units,
    shape: Shape,
    layers: Sequence[int],
    statistics: ActivationStatistics | None,
    seed: int,
) -> dict[int, list[float]]:
    """Layer that stays -> the importance of each of its units; for channels a single list under
    -1, since the residual stream has one ranking.

    Raises `StageError` where a score is not finite, or scores belong to another model.
    """
    if isinstance(choice, RandomUnits):
        found = _drawn(units, shape, layers, seed)
    elif statistics is None:
        raise StageError("units are to be chosen by activations, and no input has any")
    else:
        found = _measured(choice, units, shape, layers, statistics)
    for layer, scores in found.items():
        _check_finite(scores, units, "the model" if layer < 0 else f"layer {layer}")
    return found


def _check_finite(scores: Sequence[float], units: Units, where: str) -> None:
    wrong = [unit for unit, score in enumerate(scores) if not math.isfinite(score)]
    if wrong:
        raise StageError(
            f"the importance of {len(wrong)} {units} of {where} is not a finite number, the first "
            f"of them {wrong[0]}"
        )


def _number_of(units: Units, shape: Shape) -> int:
    return {
        "neurons": shape.intermediate_size,
        "heads": shape.num_attention_heads,
        "groups": shape.num_key_value_heads,
        "channels": shape.hidden_size,
    }[units]


def _drawn(units: Units, shape: Shape, layers: Sequence[int], seed: int) -> dict[int, list[float]]:
    """Scores drawn for each layer by itself, so that they do not depend on which layers stay."""
    drawn = {}
    for layer in [-1] if units == "channels" else layers:
        draw = random.Random(f"{seed} {units} {layer}")
        drawn[layer] = [draw.random() for _ in range(_number_of(units, shape))]
    return drawn


def _measured(
    choice: ByActivation,
    units: Units,
    shape: Shape,
    layers: Sequence[int],
    statistics: ActivationStatistics,
) -> dict[int, list[float]]:
    name = choice.neurons if units == "neurons" else units
    table = statistics.scores(name, choice.batch, choice.sequence)
    norms = len(shape.family.norms)
    rows = shape.num_hidden_layers * norms + 1 if units == "channels" else shape.num_hidden_layers
    if tuple(table.shape) != (rows, _number_of(units, shape)):
        raise StageError(
            f"the activations of {units} are those of another model: {tuple(table.shape)} and not "
            f"{(rows, _number_of(units, shape))}"
        )
    if units != "channels":
        return {layer: table[layer].tolist() for layer in layers}
    kept = [layer * norms + place for layer in layers for place in range(norms)]
    for row in kept:
        _check_finite(table[row].tolist(), units, f"layer {row // norms}")
    return {-1: table[[*kept, rows - 1]].sum(dim=0).tolist()}


def best(scores: Sequence[float], number: int) -> tuple[int, ...]:
    """The `number` units with the largest scores, ascending."""
    return tuple(sorted(ranked(scores)[:number]))


def split(scores: Mapping[int, float], number: int) -> Ranking:
    """Units by their scores: the `number` best stay."""
    order = sorted(scores, key=lambda unit: (-scores[unit], unit))
    return Ranking(tuple(order[:number]), tuple(order[number:]))


def heads_of_layer(
    heads: Sequence[float] | None,
    groups: Sequence[float] | None,
    shape: Shape,
    target: Sizes,
) -> Heads:
    """Which heads of a layer stay: whole groups by their scores, then in each of those the same
    number of query heads by theirs. None where that axis is not cut."""
    size, kept = shape.heads_per_group, target.num_attention_heads // target.num_key_value_heads
    of_groups = dict(enumerate(groups or [0.0] * shape.num_key_value_heads))
    chosen = split(of_groups, target.num_key_value_heads)
    queries = {}
    for group in sorted(chosen.kept):
        members = range(group * size, (group + 1) * size)
        queries[group] = split({head: heads[head] if heads else 0.0 for head in members}, kept)
    return Heads(chosen, queries)


def choose_units(
    width: WidthCut,
    shape: Shape,
    target: Sizes,
    layers: Sequence[int],
    statistics: ActivationStatistics | None,
    seed: int,
) -> Cut:
    """What stays of these layers of a model of `shape`, cut to the widths of `target`."""

    def scores(units: Units) -> dict[int, list[float]]:
        return unit_scores(width.choice, units, shape, layers, statistics, seed)

    cut = Cut(tuple(layers), head_residual=width.head_residual, rescale_norms=width.rescale_norms)
    if target.intermediate_size < shape.intermediate_size:
        found = scores("neurons")
        kept = {layer: best(found[layer], target.intermediate_size) for layer in layers}
        cut = replace(cut, neurons=kept)
    if target.num_attention_heads < shape.num_attention_heads:
        fewer = target.num_key_value_heads < shape.num_key_value_heads
        inside = target.num_attention_heads < target.num_key_value_heads * shape.heads_per_group
        heads = scores("heads") if inside else {}
        groups = scores("groups") if fewer else {}
        by_layer = {
            layer: heads_of_layer(heads.get(layer), groups.get(layer), shape, target)
            for layer in layers
        }
        cut = replace(cut, heads=by_layer)
    if target.hidden_size < shape.hidden_size:
        cut = replace(cut, channels=best(scores("channels")[-1], target.hidden_size))
    return cut


# --- the stage -------------------------------------------------------------------------------


def choose_cut(context: StageContext[PruneConfig], shape: Shape) -> Cut:
    """What stays of the model in role `model`. Raises `StageError` where it cannot be done."""
    config = context.config
    target = pruned_sizes(shape, config)
    layers = tuple(range(shape.num_hidden_layers))
    if config.depth is not None:
        scores = read_scores(context.inputs["importance"]) if "importance" in context.inputs else {}
        dropped = choose(config.depth, len(layers), scores, context.seed)
        layers = tuple(layer for layer in layers if layer not in dropped)
    if problems := problems_with(shape, target):
        raise StageError("; ".join(f"{setting}: {what}" for setting, what in problems))
    if config.width is None:
        return Cut(layers)
    width, statistics = config.width, None
    if config.initialise == "random":  # no unit is inherited: any choice gives the sizes
        width = width.model_copy(update={"choice": RandomUnits(), "rescale_norms": False})
    elif isinstance(width.choice, ByActivation) and "activations" in context.inputs:
        statistics = ActivationStatistics.load(context.inputs["activations"] / activations.FILE)
    return choose_units(width, shape, target, layers, statistics, context.seed)


def run(context: StageContext[PruneConfig]) -> StageResult:
    """Cut what is to be cut, keep or redraw the weights, and leave a plain checkpoint."""
    source, target = context.model("model"), context.out / "model"
    config = read_config(source)
    shape = shape_of(config)
    cut = choose_cut(context, shape)
    inherited = context.config.initialise == "inherited"
    if inherited:
        surgery.operate(source, target, cut)
    else:
        model = new_model(pruned_config(config, cut), context.seed)
        save_model(model, load_tokenizer(source), target)
    dropped = [layer for layer in range(shape.num_hidden_layers) if layer not in cut.layers]
    (context.out / "dropped_layers.json").write_text(json.dumps(dropped))
    (context.out / "kept_units.json").write_text(json.dumps(kept_units(cut) if inherited else {}))
    return StageResult()


def kept_units(cut: Cut) -> dict[str, object]:
    """What stays of the axes that are cut, by layer: query heads, groups, channels, and neurons
    where they are few enough to list."""
    found: dict[str, object] = {}
    if cut.neurons is not None and sum(map(len, cut.neurons.values())) < MOST_NEURONS_LISTED:
        found["neurons"] = cut.neurons
    if cut.heads is not None:
        found["heads"] = {
            layer: sorted(head for ranking in heads.queries.values() for head in ranking.kept)
            for layer, heads in cut.heads.items()
        }
        found["groups"] = {layer: sorted(heads.groups.kept) for layer, heads in cut.heads.items()}
    if cut.channels is not None:
        found["channels"] = cut.channels
    return found


def read_scores(artifact: Path) -> dict[tuple[int, int], float]:
    """(block length, last layer) -> importance, from an artifact of the stage `importance`."""
    return {
        (row["block_length"], row["last"]): row["value"]
        for row in read_rows(artifact / "scores.jsonl")
        if row["name"] == "importance"
    }


if __name__ == "__main__":
    shell.main(PruneConfig, run)
