"""Stage `prune`: leave layers out of a checkpoint and write the smaller one."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from trainers import shell
from trainers.checkpoints import load_tokenizer, new_model, read_config, save_model
from trainers.config import AtRandom, ByList, ByScore, PruneConfig
from trainers.contract import StageContext, StageError, StageResult, read_rows
from trainers.families import family_of

WEIGHTS = "model.safetensors"


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
    config: PruneConfig, count: int, scores: Mapping[tuple[int, int], float], seed: int
) -> tuple[int, ...]:
    """The layers to drop, ascending. `scores` maps (block length, last layer) to importance."""
    number = count - config.num_hidden_layers
    if number < 0:
        raise StageError(f"cannot keep {config.num_hidden_layers} of {count} layers")
    match config.choice:
        case ByList(drop=drop):
            return listed_layers(drop, count, number)
        case AtRandom(contiguous=contiguous):
            return random_layers(count, number, contiguous, seed)
        case ByScore(contiguous=True):
            return contiguous_block(scores, number)
        case ByScore():
            return single_layers(scores, number)


def pruned_config(config: Mapping[str, Any], dropped: Sequence[int]) -> dict[str, Any]:
    """The Hugging Face config without these layers."""
    count = config["num_hidden_layers"]
    smaller = dict(config) | {"num_hidden_layers": count - len(dropped)}
    for key in family_of(config).per_layer_settings:
        if isinstance(config.get(key), list):
            smaller[key] = [v for place, v in enumerate(config[key]) if place not in dropped]
    return smaller


def renamed(name: str, layers_path: str, place_of: Mapping[int, int]) -> str | None:
    """A tensor's name in the smaller model; None where its layer is dropped."""
    match = re.match(rf"({re.escape(layers_path)}\.)(\d+)(\..*)", name)
    if match is None:
        return name
    layer = int(match[2])
    return f"{match[1]}{place_of[layer]}{match[3]}" if layer in place_of else None


def drop_layers(source: Path, target: Path, dropped: Sequence[int]) -> None:
    """Write the checkpoint in `source` without these layers into `target`, shard by shard."""
    config = read_config(source)
    kept = [layer for layer in range(config["num_hidden_layers"]) if layer not in dropped]
    place_of = {layer: place for place, layer in enumerate(kept)}
    path = family_of(config).layers
    target.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    size = 0
    for shard in _shards(source):
        with safe_open(shard, framework="pt") as tensors:
            names = {name: renamed(name, path, place_of) for name in tensors.keys()}  # noqa: SIM118
            found = {new: tensors.get_tensor(old) for old, new in names.items() if new is not None}
        if found:
            save_file(found, target / shard.name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(found, shard.name)
            size += sum(tensor.numel() * tensor.element_size() for tensor in found.values())
    if set(weight_map.values()) != {WEIGHTS}:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (target / "config.json").write_text(json.dumps(pruned_config(config, dropped), indent=2))
    _copy_rest(source, target)


def _shards(source: Path) -> list[Path]:
    """The files that transformers reads; some folders hold the weights in another form besides."""
    index = source / f"{WEIGHTS}.index.json"
    if not index.exists():
        if not (source / WEIGHTS).exists():
            raise StageError(f"{source} holds no {WEIGHTS}")
        return [source / WEIGHTS]
    names: dict[str, str] = json.loads(index.read_text())["weight_map"]
    return [source / name for name in sorted(set(names.values()))]


def _copy_rest(source: Path, target: Path) -> None:
    """Tokenizer, generation settings and the like; nothing that holds weights."""
    for file in source.iterdir():
        weights = file.suffix in {".safetensors", ".bin", ".gguf"} or ".index." in file.name
        if file.is_file() and not weights and file.name != "config.json":
            shutil.copyfile(file, target / file.name)


def run(context: StageContext[PruneConfig]) -> StageResult:
    """Drop the chosen layers, keep or redraw the weights, and leave a plain checkpoint."""
    config, source, target = context.config, context.model("model"), context.out / "model"
    settings = read_config(source)
    scores = read_scores(context.inputs["importance"]) if "importance" in context.inputs else {}
    dropped = choose(config, settings["num_hidden_layers"], scores, context.seed)
    if config.initialise == "random":
        model = new_model(pruned_config(settings, dropped), context.seed)
        save_model(model, load_tokenizer(source), target)
    else:
        drop_layers(source, target, dropped)
    (context.out / "dropped_layers.json").write_text(json.dumps(list(dropped)))
    return StageResult()


def read_scores(artifact: Path) -> dict[tuple[int, int], float]:
    """(block length, last layer) -> importance, from an artifact of the stage `importance`."""
    return {
        (row["block_length"], row["last"]): row["value"]
        for row in read_rows(artifact / "scores.jsonl")
        if row["name"] == "importance"
    }


if __name__ == "__main__":
    shell.main(PruneConfig, run)
