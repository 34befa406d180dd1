"""Where each architecture keeps its layers, and which parameters a layer has. Imports no torch.

A family is a short description. Code that prunes or counts reads the description and has no case
of its own for any architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal


class UnknownFamilyError(ValueError):
    """The architecture is not described here."""


NormKind = Literal["rms", "rms_plus_one", "layer", "layer_plus_one"]
"""How a norm scales: by its weight, or by one plus its weight; `layer` also centres and shifts."""


@dataclass(frozen=True)
class Family:
    """One architecture, as Hugging Face names its modules and settings.

    Paths of `query` to `head_norms` start at a layer, the others at the model.
    """

    model_type: str
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    output_head: str = "lm_head"
    output_head_in_files: str | None = None
    """The output head's name in a checkpoint's files, where it differs from the module's."""
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    fused_query_key_value: str | None = None
    """One projection for all three, a head's query, key and value rows side by side."""
    attention_output: str = "self_attn.o_proj"
    gate: str | None = "mlp.gate_proj"
    """The MLP's gate, whose output enters the activation; None where `up` does."""
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    """Every norm of a layer that is as wide as the residual stream."""
    head_norms: tuple[str, ...] = ()
    """Norms over one head's width (of queries and keys): no axis cuts them."""
    norm_kind: NormKind = "rms"
    norm_epsilon: str = "rms_norm_eps"
    attention_bias: bool | str = "attention_bias"
    """Bias of the query, key and value projections: fixed, or the config key that says."""
    output_bias: bool | str = "attention_bias"
    mlp_bias: bool | str = "mlp_bias"
    free_head_dim: bool = True
    """Whether the config may say head_dim; otherwise it is hidden_size / num_attention_heads."""
    hidden_multiple_of_heads: bool = False
    """Whether transformers refuses a hidden_size that num_attention_heads does not divide."""
    embedding_scaled: bool = False
    """Whether embeddings are multiplied by the square root of hidden_size as they are read."""
    logit_softcap: str | None = None
    """Config key of c in c * tanh(logits / c), applied to the output head's logits."""
    per_layer_settings: tuple[str, ...] = ("layer_types",)
    """Config entries that hold one value a layer and shrink with them."""
    buffers: tuple[str, ...] = ("self_attn.rotary_emb.inv_freq",)
    """What old checkpoints store of a layer besides its parameters; no axis cuts it."""
    defaults: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What transformers takes for settings that a config.json leaves unsaid."""

    @property
    def gated_mlp(self) -> bool:
        """Whether the MLP multiplies two projections of its input."""
        return self.gate is not None

    @property
    def before_activation(self) -> str:
        """The projection whose output enters the MLP's activation."""
        return self.gate or self.up

    def setting(self, key: str, config: Mapping[str, Any]) -> Any:
        """What the config says under this key, or what transformers takes where it is silent."""
        return config.get(key, self.defaults.get(key))

    def flag(self, flag: bool | str, config: Mapping[str, Any]) -> bool:
        """The value of a flag that is either fixed by the family or read from the config."""
        return bool(self.setting(flag, config)) if isinstance(flag, str) else flag


_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_GEMMA = Family(
    "gemma2",
    norms=(
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    norm_kind="rms_plus_one",
    mlp_bias=False,
    hidden_multiple_of_heads=True,
    embedding_scaled=True,
    logit_softcap="final_logit_softcapping",
    defaults={
        "head_dim": 256,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "final_logit_softcapping": 30.0,
    },
)

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", hidden_multiple_of_heads=True, defaults={"rms_norm_eps": 1e-6}),
        Family(
            "mistral",
            attention_bias=False,
            output_bias=False,
            mlp_bias=False,
            defaults={"num_key_value_heads": 8, "rms_norm_eps": 1e-6},
        ),
        Family(
            "qwen2",
            attention_bias=True,
            output_bias=False,
            mlp_bias=False,
            defaults={"num_key_value_heads": 32, "rms_norm_eps": 1e-6},
        ),
        Family(
            "qwen3",
            mlp_bias=False,
            head_norms=_HEAD_NORMS,
            defaults={"head_dim": 128, "num_key_value_heads": 32, "rms_norm_eps": 1e-6},
        ),
        _GEMMA,
        replace(
            _GEMMA,
            model_type="gemma3_text",
            head_norms=_HEAD_NORMS,
            defaults={**_GEMMA.defaults, "final_logit_softcapping": None},
        ),
        Family(
            "nemotron",
            gate=None,
            norm_kind="layer_plus_one",
            norm_epsilon="norm_eps",
            defaults={"norm_eps": 1e-5},
        ),
        Family(
            "gpt_neox",
            layers="gpt_neox.layers",
            embedding="gpt_neox.embed_in",
            final_norm="gpt_neox.final_layer_norm",
            output_head_in_files="embed_out",
            fused_query_key_value="attention.query_key_value",
            attention_output="attention.dense",
            gate=None,
            up="mlp.dense_h_to_4h",
            down="mlp.dense_4h_to_h",
            norm_kind="layer",
            norm_epsilon="layer_norm_eps",
            mlp_bias=True,
            free_head_dim=False,
            hidden_multiple_of_heads=True,
            buffers=("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
            defaults={"attention_bias": True, "layer_norm_eps": 1e-5},
        ),
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
