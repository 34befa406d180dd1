"""A model without a block of its layers: really left out, or for the price of those behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainers.activations import layers_of
from trainers.families import family_of
from trainers.hooks import hidden_of

Block = tuple[int, int]
"""A contiguous block of layers: the first, counted from 0, and how many."""


def blocks_of_layers(count: int, lengths: Sequence[int]) -> list[Block]:
    """Every contiguous block of these lengths among `count` layers."""
    return [(first, length) for length in lengths for first in range(count - length + 1)]


# --- for the price of the layers behind ------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """How the model called a layer: with its input, masks and positions."""

    layer: nn.Module
    inputs: tuple[Any, ...]
    named: dict[str, Any]

    @property
    def hidden(self) -> Tensor:
        """The residual stream that the layer got, (batch, length, hidden)."""
        hidden: Tensor = self.inputs[0] if self.inputs else self.named["hidden_states"]
        return hidden

    def again(self, hidden_BLD: Tensor) -> Tensor:
        """What the layer makes of another stream, called the same way otherwise."""
        if self.inputs:
            return hidden_of(self.layer(hidden_BLD, *self.inputs[1:], **self.named))
        return hidden_of(self.layer(**self.named | {"hidden_states": hidden_BLD}))


@torch.no_grad()
def hidden_without(
    model: PreTrainedModel, input_ids_BL: Tensor, blocks: Sequence[Block], **how: Tensor
) -> Iterator[Tensor]:
    """Hidden states after the last norm, (batch, length, hidden): of the intact model, then of the
    model without each block in turn. `how` holds a mask and positions that are not the usual ones.

    The intact model runs once. What a left-out block leaves as it was, the stream before it, is
    taken from there; only the layers behind the block run again.
    """
    calls: list[_Call] = []
    with _noting_calls(model, calls):
        found = model.base_model(input_ids=input_ids_BL, use_cache=False, **how)
        intact: Tensor = found.last_hidden_state
    yield intact
    norm = model.get_submodule(family_of(model.config.to_dict()).final_norm)
    for first, length in blocks:
        hidden_BLD = calls[first].hidden
        for call in calls[first + length :]:
            hidden_BLD = call.again(hidden_BLD)
        yield norm(hidden_BLD)


@contextmanager
def _noting_calls(model: PreTrainedModel, calls: list[_Call]) -> Iterator[None]:
    def note(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls.append(_Call(layer, inputs, named))

    with ExitStack() as stack:
        for layer in layers_of(model):
            hook: Callable[..., None] = note
            stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


# --- really left out -------------------------------------------------------------------------


@contextmanager
def left_out(model: PreTrainedModel, first: int, length: int) -> Iterator[PreTrainedModel]:
    """The model without `length` layers from `first` on; restored on leaving. For what needs a
    whole model, like generation."""
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
