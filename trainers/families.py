"""Where each architecture keeps its layers, and which parameters a layer has. Imports no torch.

A family is a short description. Code that prunes or counts reads the description and has no case
of its own for any architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class UnknownFamilyError(ValueError):
    """The architecture is not described here."""


@dataclass(frozen=True)
class Family:
    """One architecture, as Hugging Face names its modules and settings."""

    model_type: str
    layers: str = "model.layers"
    """Path of the list of layers inside the model."""
    gated_mlp: bool = True
    attention_bias: bool | str = "attention_bias"
    """Bias of the query, key and value projections: fixed, or the config key that says."""
    output_bias: bool | str = "attention_bias"
    mlp_bias: bool | str = "mlp_bias"
    query_key_norm: bool = False
    per_layer_settings: tuple[str, ...] = ("layer_types",)
    """Config entries that hold one value a layer and shrink with them."""


FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama"),
        Family("mistral", attention_bias=False, output_bias=False, mlp_bias=False),
        Family("qwen2", attention_bias=True, output_bias=False, mlp_bias=False),
        Family("qwen3", mlp_bias=False, query_key_norm=True),
    )
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The description for a Hugging Face config. Raises `UnknownFamilyError`."""
    model_type = str(config.get("model_type"))
    if model_type not in FAMILIES:
        raise UnknownFamilyError(
            f"architecture {model_type!r} is not described; described are {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def setting(flag: bool | str, config: Mapping[str, Any]) -> bool:
    """The value of a flag that is either fixed by the family or read from the config."""
    return bool(config.get(flag, False)) if isinstance(flag, str) else flag
