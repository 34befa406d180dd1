"""A tiny random model of every described family, for tests that must hold for each of them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from trainers import checkpoints
from trainers.families import FAMILIES

MODEL_TYPES = tuple(FAMILIES)

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, biased": {"attention_bias": True, "mlp_bias": True},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, multi-head": {"num_key_value_heads": 4},
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    "qwen3": {},
    "gemma2": {"query_pre_attn_scalar": 8, "sliding_window": 5},
    "gemma2, untied": {"query_pre_attn_scalar": 8, "tie_word_embeddings": False},
    "gemma3_text": {"query_pre_attn_scalar": 8, "sliding_window": 5, "sliding_window_pattern": 2},
    "nemotron": {},
    "nemotron, biased": {"attention_bias": True, "mlp_bias": True},
    "gpt_neox": {},
    "gpt_neox, tied": {"tie_word_embeddings": True},
}
"""Settings that make a family's peculiarities count, by a name that begins with the family's."""


def tiny_config(name: str) -> dict[str, Any]:
    """A Hugging Face config of a model type, or of one of `VARIANTS`: 4 layers, 4 query heads in
    2 groups where the family has groups, 8 numbers a head, 48 neurons, 32 channels, 64 tokens."""
    model_type = name.split(",")[0]
    sizes = {
        "model_type": model_type,
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    if model_type != "gpt_neox":
        sizes |= {"num_key_value_heads": 2}
    if FAMILIES[model_type].free_head_dim and model_type != "qwen2":
        sizes |= {"head_dim": 8}
    return sizes | VARIANTS.get(name, {})


def tiny_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A model of `tiny_config(name)` in evaluation mode. No parameter has its usual first value:
    norm scales differ from one another and biases from zero."""
    model = checkpoints.new_model(tiny_config(name), seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.2 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            noise = spread * torch.randn(parameter.shape, generator=draw)
            parameter.copy_(parameter + noise if parameter.dim() == 1 else noise)
    return model.eval()
