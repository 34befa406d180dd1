"""What one forward pass tells of every unit and of every block of layers (P1 sections 2.2, 2.3).

Neurons, heads and channels are scored by the size of their activations, blocks of layers by Block
Influence. Statistics are running sums, so memory does not grow with the number of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from trainers.config import Statistic
from trainers.contract import StageError
from trainers.evaluate import BLOCKS_A_BATCH
from trainers.families import Family, family_of
from trainers.hooks import on_input, on_output
from trainers.workers import rank_and_processes

FILE = "activations.safetensors"
STREAM_BYTES = 1 << 28
"""How much of the residual stream is held at once, unless one block alone needs more."""
CHUNK_ELEMENTS = 1 << 18
"""What is reduced at once: it stays in a core's cache over the passes of all three statistics."""
TOKENS_A_PRODUCT = 256
"""Of which cosines are added up in single precision."""

Units = Literal["down_input", "pre_activation", "heads", "groups", "channels"]
"""Neurons where the down projection reads them or before the activation function, query heads,
key-value groups of heads, and channels of the residual stream."""

Influence = dict[tuple[int, int], float]
"""(first layer, number of layers) -> Block Influence."""


@dataclass(frozen=True)
class ActivationStatistics:
    """Sums over samples from which all nine aggregations follow.

    A sample is one sequence. Its statistic v is taken over the sequence first (L2 norm, mean of
    absolute values, or population variance), then over the batch of samples, whatever batches they
    were computed in. `sums` maps "<units>.<sequence statistic>" to (2, rows, units) in float64:
    the sums of v and of v*v. Rows are layers; for `channels` they are norms, layer 0's in the order
    of `Family.norms`, then layer 1's, and the final norm last.
    """

    samples: int
    sums: Mapping[str, Tensor]

    def scores(self, units: Units, batch: Statistic, sequence: Statistic) -> Tensor:
        """The aggregation `batch` over samples of `sequence` over tokens, (rows, units) float64."""
        sums = self.sums[f"{units}.{sequence}"]
        total, squares = sums[0], sums[1]
        match batch:
            case "mean":
                return total / self.samples
            case "l2":
                return squares.sqrt()
            case "variance":
                return (squares / self.samples - (total / self.samples).square()).clamp(min=0)

    def save(self, path: Path) -> None:
        """Write a safetensors file whole: beside, then moved into place."""
        beside = path.with_suffix(".part")
        save_file(dict(self.sums), beside, metadata={"samples": str(self.samples)})
        beside.replace(path)

    @classmethod
    def load(cls, path: Path) -> ActivationStatistics:
        """Read what `save` wrote."""
        with safe_open(path, framework="pt") as file:
            sums = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls(int(file.metadata()["samples"]), sums)


# --- one pass --------------------------------------------------------------------------------


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The model's list of layers, found by its family."""
    layers = model.get_submodule(_family(model).layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def _family(model: PreTrainedModel) -> Family:
    return family_of(model.config.to_dict())


@torch.no_grad()
def collect(
    model: PreTrainedModel, blocks_NL: Tensor, tick: Callable[[int], None] = lambda blocks: None
) -> tuple[ActivationStatistics, Influence]:
    """Statistics of all units, and the Block Influence of every contiguous block of layers, from
    one pass over the blocks without the output head.

    Where torch.distributed runs, each process takes its share of the blocks and all of them return
    the result for the whole. `tick` hears how many blocks are done. Raises `StageError` where
    activations are not finite, naming the layer.
    """
    rank, processes = rank_and_processes()
    mine_NL = blocks_NL[rank::processes]
    found = _Sums(model)
    with _watched(model, found):
        for batch_BL in _batches(mine_NL, _blocks_a_batch(model, blocks_NL.shape[1])):
            found.streams.start(batch_BL.shape)
            model.base_model(input_ids=batch_BL.to(model.device), use_cache=False)
            found.cosines += found.streams.cosines()
            tick(len(batch_BL))
    if processes > 1:
        found.reduce()
        tick(len(blocks_NL) - len(mine_NL))
    _check_finite(found, _family(model))
    statistics = ActivationStatistics(len(blocks_NL), found.on_cpu())
    return statistics, _influence(found.cosines / blocks_NL.numel())


def _blocks_a_batch(model: PreTrainedModel, length: int) -> int:
    states = model.config.num_hidden_layers + 1
    fitting: int = STREAM_BYTES // (states * length * model.config.hidden_size * 4)
    return max(1, min(BLOCKS_A_BATCH, fitting))


def _batches(blocks_NL: Tensor, size: int) -> tuple[Tensor, ...]:
    # Of no blocks, `torch.split` makes one empty batch; a process may have none.
    return torch.split(blocks_NL, size) if len(blocks_NL) else ()


def _influence(cosines_SS: Tensor) -> Influence:
    """1 - mean cosine similarity of the streams before and after every block of layers, from the
    means for all pairs of the layers' inputs and the last one's output."""
    count = len(cosines_SS) - 1
    return {
        (first, length): 1 - float(cosines_SS[first, first + length])
        for length in range(1, count + 1)
        for first in range(count - length + 1)
    }


# --- running sums ----------------------------------------------------------------------------


class _Streams:
    """The normalised residual stream before each layer and after the last, for one batch."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._states = model.config.num_hidden_layers + 1
        self._shape = (self._states, model.config.hidden_size)
        self._device = model.device
        self._held_BSLD = torch.empty(0, device=model.device)
        self._batch = 0

    def start(self, shape: torch.Size) -> None:
        """Make room for a batch of this (batch, length); the room is used again for the next."""
        self._batch, length = shape
        if len(self._held_BSLD) < self._batch:
            states, width = self._shape
            self._held_BSLD = self._held_BSLD.new_empty(self._batch, states, length, width)

    def keep(self, state: int, hidden_BLD: Tensor) -> None:
        """Note the stream at this place: 0 before the first layer, i after layer i - 1."""
        size_BL1 = torch.linalg.vector_norm(hidden_BLD, dim=-1, keepdim=True, dtype=torch.float32)
        scale_BL1 = size_BL1.clamp_min_(1e-12).reciprocal_()
        torch.mul(hidden_BLD, scale_BL1, out=self._held_BSLD[: self._batch, state])

    def cosines(self) -> Tensor:
        """Sums over tokens of the cosine similarity of each pair of places, float64. A product of
        matrices for some tokens of a sample: one in fp32 over more of them would lose digits."""
        total_SS = torch.zeros(self._states, self._states, dtype=torch.float64, device=self._device)
        for held_BSLD in torch.split(self._held_BSLD[: self._batch], TOKENS_A_PRODUCT, dim=2):
            flat_BSN = held_BSLD.flatten(2)
            total_SS += (flat_BSN @ flat_BSN.mT).sum(0, dtype=torch.float64)
        return total_SS


class _Sums:
    """What `collect` adds up: v and v*v of every unit, and cosines of the stream."""

    def __init__(self, model: PreTrainedModel) -> None:
        config, device = model.config, model.device
        self.heads = config.num_attention_heads
        self.groups = getattr(config, "num_key_value_heads", None) or self.heads
        layers = config.num_hidden_layers
        norms = layers * len(_family(model).norms) + 1
        shapes: dict[Units, tuple[int, int]] = {
            "down_input": (layers, config.intermediate_size),
            "pre_activation": (layers, config.intermediate_size),
            "heads": (layers, self.heads),
            "groups": (layers, self.groups),
            "channels": (norms, config.hidden_size),
        }
        self.units = {
            f"{units}.{statistic}": torch.zeros(2, *shape, dtype=torch.float64, device=device)
            for units, shape in shapes.items()
            for statistic in get_args(Statistic)
        }
        self.cosines = torch.zeros(layers + 1, layers + 1, dtype=torch.float64, device=device)
        self.streams = _Streams(model)

    def add(self, units: Units, row: int, values_BLU: Tensor) -> None:
        """Take in a batch's activations of one row's units."""
        for statistic, v_BU in sequence_statistics(values_BLU).items():
            total_U, squares_U = self.units[f"{units}.{statistic}"][:, row]
            total_U += v_BU.sum(0)
            squares_U += v_BU.square().sum(0)

    def add_heads(self, row: int, joined_BLA: Tensor) -> None:
        """Take in a batch's input of the attention output projection: all heads side by side."""
        tokens = joined_BLA.shape[:2]
        slices_BLHK = joined_BLA.reshape(*tokens, self.heads, -1)
        heads_BLH = torch.linalg.vector_norm(slices_BLHK, dim=-1, dtype=torch.float32).double()
        grouped_BLGQ = heads_BLH.reshape(*tokens, self.groups, -1)
        groups_BLG = torch.linalg.vector_norm(grouped_BLGQ, dim=-1)
        self.add("heads", row, heads_BLH)
        self.add("groups", row, groups_BLG)

    def reduce(self) -> None:
        """Add up what all processes found."""
        for total in (*self.units.values(), self.cosines):
            distributed.all_reduce(total)

    def on_cpu(self) -> dict[str, Tensor]:
        """The units' sums."""
        return {name: total.cpu() for name, total in self.units.items()}


def sequence_statistics(values_BLU: Tensor) -> dict[Statistic, Tensor]:
    """L2 norm, mean of absolute values and population variance over each sequence, (batch, units)
    in float64.

    Chunks of tokens are summed in fp32 and their sums in float64; the variance is the mean square
    less the squared mean, never below 0.
    """
    batch, length, units = values_BLU.shape
    tokens = min(length, max(1, CHUNK_ELEMENTS // (batch * units)))
    exact = torch.promote_types(values_BLU.dtype, torch.float32)
    scratch_BLU = values_BLU.new_empty(batch, tokens, units, dtype=exact)
    parts = [_sums_of_chunk(chunk, scratch_BLU) for chunk in torch.split(values_BLU, tokens, 1)]
    sums_BU, absolute_BU, squares_BU = (
        torch.stack(part).sum(0, dtype=torch.float64) for part in zip(*parts, strict=True)
    )
    variance_BU = squares_BU / length - (sums_BU / length).square()
    return {
        "l2": squares_BU.sqrt(),
        "mean": absolute_BU / length,
        "variance": variance_BU.clamp_(min=0),
    }


def _sums_of_chunk(chunk_BLU: Tensor, scratch_BLU: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Plain sums over a copy that stays in cache: `vector_norm` and `var` over a dimension that is
    # not the last take 2 and 10 times as long.
    exact_BLU = scratch_BLU[:, : chunk_BLU.shape[1]].copy_(chunk_BLU)
    return exact_BLU.sum(1), exact_BLU.abs_().sum(1), exact_BLU.square_().sum(1)


# --- where to look ---------------------------------------------------------------------------


@contextmanager
def _watched(model: PreTrainedModel, found: _Sums) -> Iterator[None]:
    """While open, every forward pass of the model is added to `found`."""
    with ExitStack() as stack:
        for handle in _hooks(model, _family(model), found):
            stack.callback(handle.remove)
        yield


def _hooks(model: PreTrainedModel, family: Family, found: _Sums) -> Iterator[RemovableHandle]:
    layers = layers_of(model)
    streams = found.streams
    for number, layer in enumerate(layers):
        yield on_input(layer, partial(streams.keep, number))
        for place, path in enumerate(family.norms):
            row = number * len(family.norms) + place
            yield on_output(layer.get_submodule(path), partial(found.add, "channels", row))
        output = layer.get_submodule(family.attention_output)
        yield on_input(output, partial(found.add_heads, number))
        before = layer.get_submodule(family.before_activation)
        yield on_output(before, partial(found.add, "pre_activation", number))
        yield on_input(layer.get_submodule(family.down), partial(found.add, "down_input", number))
    yield on_output(layers[-1], partial(streams.keep, len(layers)))
    last = len(layers) * len(family.norms)
    yield on_output(model.get_submodule(family.final_norm), partial(found.add, "channels", last))


def _check_finite(found: _Sums, family: Family) -> None:
    """Raise `StageError` for the first place, in the order of the forward pass, that is not."""
    for name, sums in _in_order(found, len(family.norms)):
        if not bool(torch.isfinite(sums).all()):
            raise StageError(f"the activations of {name} are not finite")


def _in_order(found: _Sums, norms: int) -> Iterator[tuple[str, Tensor]]:
    def sums(units: Units, start: int, stop: int) -> Tensor:
        parts = [found.units[f"{units}.{each}"][:, start:stop] for each in get_args(Statistic)]
        return torch.stack(parts)

    states = found.cosines.diagonal()
    layers = len(states) - 1
    yield "the embeddings", states[0]
    for layer in range(layers):
        yield f"layer {layer}'s norms", sums("channels", layer * norms, (layer + 1) * norms)
        yield f"layer {layer}'s heads", sums("heads", layer, layer + 1)
        yield f"layer {layer}'s neurons", sums("pre_activation", layer, layer + 1)
        yield f"layer {layer}'s neurons", sums("down_input", layer, layer + 1)
        yield f"layer {layer}'s output", states[layer + 1]
    yield "the final norm", sums("channels", layers * norms, layers * norms + 1)
