"""What a config says of a model equals what the model turns out to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from trainers import checkpoints
from trainers.config import FolderModel, GeneratedCorpus, LlamaShape, ScratchModel, Training
from trainers.families import FAMILIES, UnknownFamilyError
from trainers.shapes import llama_config, shape_of, source_config


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """A tiny config of any described architecture, with the variations that it has."""
    model_type = draw(st.sampled_from(sorted(FAMILIES)))
    groups, heads_a_group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads = groups * heads_a_group
    config = {
        "model_type": model_type,
        "vocab_size": draw(st.integers(3, 40)),
        "hidden_size": heads * draw(st.sampled_from([2, 4, 8])),
        "intermediate_size": draw(st.integers(1, 30)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "tie_word_embeddings": draw(st.booleans()),
    }
    if model_type in ("llama", "qwen3"):
        config["attention_bias"] = draw(st.booleans())
    if model_type == "llama":
        config["mlp_bias"] = draw(st.booleans())
    if model_type != "qwen2":
        config["head_dim"] = draw(st.sampled_from([2, 6, 10]))
    return config


@given(configs())
@settings(max_examples=60, deadline=None)
def test_parameters_from_the_config_equal_those_of_the_model(config: dict[str, Any]) -> None:
    model, shape = checkpoints.new_model(config, seed=0), shape_of(config)
    assert shape.parameters == checkpoints.count_parameters(model)
    tables = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    embedding = sum(table.numel() for table in tables)
    assert shape.parameters_non_embedding == shape.parameters - embedding
    layer = sum(parameter.numel() for parameter in model.base_model.layers[0].parameters())
    assert shape.layer_parameters == layer


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_the_saved_config_says_the_same_as_the_one_it_was_made_from(
    tmp_path: Path, model_type: str
) -> None:
    config = {
        "model_type": model_type,
        "vocab_size": 20,
        "hidden_size": 24,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    model = checkpoints.new_model(config | {"num_key_value_heads": 2}, seed=0)
    model.save_pretrained(tmp_path)
    saved = shape_of(checkpoints.read_config(tmp_path))
    assert saved.parameters == checkpoints.count_parameters(model)
    assert source_config(FolderModel(path=tmp_path), GeneratedCorpus()) == saved.config


def test_fewer_layers_cost_the_parameters_of_those_layers(tiny_config: dict[str, Any]) -> None:
    whole = shape_of(tiny_config)
    assert whole.with_layers(1).parameters == whole.parameters - 3 * whole.layer_parameters
    smaller = checkpoints.new_model(tiny_config | {"num_hidden_layers": 1}, seed=0)
    assert whole.with_layers(1).parameters == checkpoints.count_parameters(smaller)


def test_a_model_from_scratch_is_known_before_it_is_built() -> None:
    shape = LlamaShape(
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    source = ScratchModel(shape=shape, training=Training(steps=1, batch_size=1, learning_rate=0.1))
    config = source_config(source, GeneratedCorpus())
    assert config == llama_config(shape, config["vocab_size"])
    model = checkpoints.new_model(config, seed=0)
    assert shape_of(config).parameters == checkpoints.count_parameters(model)


def test_an_unknown_architecture_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(UnknownFamilyError, match="'mamba'") as refused:
        shape_of({"model_type": "mamba", "hidden_size": 4})
    assert all(model_type in str(refused.value) for model_type in FAMILIES)


@pytest.mark.parametrize("value", [None, 0, -2, "many", 2.5])
def test_a_config_without_a_usable_size_is_refused_by_name(value: Any) -> None:
    config = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2}
    with pytest.raises(ValueError, match="vocab_size"):
        shape_of(config | {"intermediate_size": 4, "num_hidden_layers": 1, "vocab_size": value})


@pytest.mark.parametrize("key_value_heads", [1, 4])
def test_forward_flops_are_those_that_pytorch_counts(key_value_heads: int) -> None:
    config = {
        "model_type": "llama",
        "vocab_size": 120,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": key_value_heads,
    }
    batch, length = 2, 80
    model, shape = checkpoints.new_model(config, seed=0).eval(), shape_of(config)
    model.set_attn_implementation("eager")  # the counter does not see into fused attention
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(batch, length, dtype=torch.long), use_cache=False)
    # PyTorch counts all length * length scores of each head: two products of two FLOPs for each
    # of head_dim numbers. Causal attention needs the half of them, and we count that half. PyTorch
    # leaves out norms, which we count as if they multiplied: hence almost and not exactly.
    all_scores = 3 * batch * 4 * length * length * 4 * shape.head_dim
    causal = counter.get_total_flops() - all_scores / 2
    assert all_scores / causal > 0.2, "attention must weigh enough to be tested"
    assert shape.forward_flops(batch * length, length) == pytest.approx(causal, rel=0.01)
    assert shape.training_flops(batch * length, length) == pytest.approx(3 * causal, rel=0.01)
