"""What a config says of a model equals what the model turns out to be."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families_at_hand import VARIANTS, tiny_model
from families_at_hand import tiny_config as config_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from trainers import checkpoints
from trainers.config import (
    AtRandom,
    DepthCut,
    FolderModel,
    GeneratedCorpus,
    LlamaShape,
    PruneConfig,
    RandomUnits,
    ScratchModel,
    Training,
    WidthCut,
)
from trainers.families import FAMILIES, Family, UnknownFamilyError, family_of
from trainers.shapes import (
    Shape,
    Sizes,
    llama_config,
    problems_with,
    pruned_sizes,
    shape_of,
    source_config,
)


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
    if FAMILIES[model_type].attention_bias == "attention_bias":
        config["attention_bias"] = draw(st.booleans())
    if FAMILIES[model_type].mlp_bias == "mlp_bias":
        config["mlp_bias"] = draw(st.booleans())
    if FAMILIES[model_type].free_head_dim:
        config["head_dim"] = draw(st.sampled_from([2, 6, 10]))
    else:
        config["num_key_value_heads"] = heads
    return config


@pytest.mark.parametrize("key", ["hidden_size", "num_key_value_heads", "head_dim"])
@pytest.mark.parametrize("value", [{"a": 1}, "9", 0, -3, True, 2.5])
def test_a_config_whose_sizes_are_none_is_refused_by_name(key: str, value: Any) -> None:
    config = {
        "model_type": "llama", "vocab_size": 20, "hidden_size": 64, "intermediate_size": 16,
        "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
    }  # fmt: skip
    assert shape_of(config | {"num_key_value_heads": None}).num_key_value_heads == 8
    with pytest.raises(ValueError, match=f"no usable {key}"):
        shape_of(config | {key: value})


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
@pytest.mark.parametrize("silent", [True, False])
def test_a_config_that_leaves_settings_unsaid_is_read_as_transformers_reads_it(
    tmp_path: Path, model_type: str, silent: bool
) -> None:
    config = {
        "model_type": model_type,
        "vocab_size": 20,
        "hidden_size": 64,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
    }
    if not silent or model_type == "nemotron":  # of which transformers makes no model without it
        config["num_key_value_heads"] = 2 if FAMILIES[model_type].free_head_dim else 32
    model = checkpoints.new_model(config, seed=0)
    assert shape_of(config).parameters == checkpoints.count_parameters(model)
    model.save_pretrained(tmp_path)
    saved = shape_of(checkpoints.read_config(tmp_path))
    assert saved.parameters == checkpoints.count_parameters(model)
    assert source_config(FolderModel(path=tmp_path), GeneratedCorpus()) == saved.config


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_family_takes_for_unsaid_settings_what_transformers_takes(family: Family) -> None:
    known = AutoConfig.for_model(family.model_type).to_dict()
    said = {key: value for key, value in family.defaults.items() if value is not None}
    assert {key: known[key] for key in said} == said
    for flag in (family.attention_bias, family.output_bias, family.mlp_bias):
        if isinstance(flag, str):
            assert known[flag] == bool(family.defaults.get(flag))
    assert family.norm_epsilon in family.defaults
    assert known["tie_word_embeddings"] == bool(family.defaults.get("tie_word_embeddings"))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_path_of_a_family_is_a_module_and_no_parameter_is_left_out(name: str) -> None:
    model, family = tiny_model(name), family_of(config_of(name))
    layer = f"{family.layers}.0."
    if family.fused_query_key_value is None:
        projections = [family.query, family.key, family.value]
    else:
        projections = [family.fused_query_key_value]
    inside = [*projections, family.attention_output, family.up, family.down]
    inside += [*family.norms, *family.head_norms, *([family.gate] if family.gate else [])]
    paths = [family.embedding, family.final_norm, family.output_head]
    paths += [layer + path for path in inside]
    described = {
        f"{path}.{parameter}"
        for path in paths
        for parameter, _ in model.get_submodule(path).named_parameters()
    }
    first = {key for key in model.state_dict() if family.layers not in key or layer in key}
    assert described == first


# --- cutting ---------------------------------------------------------------------------------


def test_fewer_layers_cost_the_parameters_of_those_layers(tiny_config: dict[str, Any]) -> None:
    whole = shape_of(tiny_config)
    one = whole.resized(replace(whole.sizes, num_hidden_layers=1))
    assert one.parameters == whole.parameters - 3 * whole.layer_parameters
    smaller = checkpoints.new_model(tiny_config | {"num_hidden_layers": 1}, seed=0)
    assert one.parameters == checkpoints.count_parameters(smaller)


def eight_heads_in_two_groups(model_type: str = "llama") -> Shape:
    config = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 4}
    return shape_of(config_of(model_type) | config)


@pytest.mark.parametrize(
    ("width", "heads_and_groups"),
    [
        ({}, (8, 2)),
        ({"num_attention_heads": 4}, (4, 2)),
        ({"num_key_value_heads": 1}, (4, 1)),
        ({"num_key_value_heads": 1, "num_attention_heads": 2}, (2, 1)),
    ],
)
def test_groups_take_their_query_heads_with_them(
    width: dict[str, int], heads_and_groups: tuple[int, int]
) -> None:
    shape = eight_heads_in_two_groups()
    config = PruneConfig(width=WidthCut(**width, choice=RandomUnits()))
    heads, groups = heads_and_groups
    expected = replace(shape.sizes, num_attention_heads=heads, num_key_value_heads=groups)
    assert pruned_sizes(shape, config) == expected
    assert problems_with(shape, expected) == []


@pytest.mark.parametrize("setting", ["num_attention_heads", "num_key_value_heads"])
def test_under_multi_head_attention_heads_and_groups_are_the_same(setting: str) -> None:
    shape = shape_of(config_of("llama, multi-head"))
    config = PruneConfig(
        depth=DepthCut(num_hidden_layers=3, choice=AtRandom()),
        width=WidthCut(**{setting: 2}, intermediate_size=5, choice=RandomUnits()),
    )
    assert pruned_sizes(shape, config) == Sizes(3, 32, 5, 2, 2)


@pytest.mark.parametrize(
    ("model_type", "change", "setting", "message"),
    [
        ("llama", {"num_hidden_layers": 5}, "num_hidden_layers", "between 1 and the model's 4"),
        ("llama", {"hidden_size": 0}, "hidden_size", "0 is not between 1 and the model's 32"),
        ("llama", {"num_attention_heads": 5}, "num_attention_heads", "allowed are 2, 4, 6, 8"),
        ("llama", {"num_key_value_heads": 1}, "num_attention_heads", "allowed are 1, 2, 3, 4"),
        ("llama", {"hidden_size": 30}, "hidden_size", "not a multiple of num_attention_heads"),
        ("gpt_neox", {"hidden_size": 24}, "hidden_size", "with 4 heads of 8 allowed is 32"),
    ],
)
def test_sizes_that_cannot_be_had_are_named_with_what_is_allowed(
    model_type: str, change: dict[str, int], setting: str, message: str
) -> None:
    free = FAMILIES[model_type].free_head_dim
    shape = eight_heads_in_two_groups(model_type) if free else shape_of(config_of(model_type))
    problems = problems_with(shape, replace(shape.sizes, **change))
    assert [name for name, _ in problems] == [setting]
    assert message in problems[0][1]


@given(configs(), st.data())
@settings(max_examples=60, deadline=None)
def test_sizes_without_problems_make_a_model_of_the_predicted_parameters(
    config: dict[str, Any], data: st.DataObject
) -> None:
    shape = shape_of(config)
    drawn = {name: data.draw(st.integers(1, size)) for name, size in asdict(shape.sizes).items()}
    target = Sizes(**drawn)
    if problems_with(shape, target):
        return
    smaller = config | drawn | {"head_dim": shape.head_dim}
    model = checkpoints.new_model(smaller, seed=0)
    assert shape.resized(target).parameters == checkpoints.count_parameters(model)


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
