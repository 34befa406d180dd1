"""The sizes that settings under `prune` come to."""

from __future__ import annotations

from dataclasses import asdict
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from orchestrator.pruning import PruneSettings, stepwise
from trainers.shapes import Shape, Sizes, problems_with, shape_of

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


def source(**changes: Any) -> Shape:
    return shape_of({**LLAMA_8B, **changes})


def cut(shape: Shape, **settings: Any) -> Sizes:
    return PruneSettings.model_validate(settings).target(shape)


def test_what_is_not_named_stays_as_it_is() -> None:
    shape = source()
    assert cut(shape, width={"hidden_size": 1.0}) == shape.sizes
    assert cut(shape, width={"hidden_size": 3072}).intermediate_size == 14336


def test_the_published_width_and_depth_of_llama_3_1_minitron() -> None:
    narrow = cut(source(), width={"hidden_size": 0.75, "intermediate_size": 0.643})
    assert (narrow.hidden_size, narrow.intermediate_size, narrow.num_hidden_layers) == (
        3072,
        9216,
        32,
    )
    short = cut(source(), depth={"keep": 0.5, "criterion": "perplexity"})
    assert short.num_hidden_layers == 16


def test_a_fraction_is_rounded_to_the_multiple_and_an_absolute_size_is_taken_as_it_is() -> None:
    shape = source()
    assert cut(shape, width={"intermediate_size": 0.3}).intermediate_size == 4304
    rounded = cut(shape, width={"intermediate_size": 0.3, "multiple_of": 256})
    assert rounded.intermediate_size == 4352
    assert cut(shape, width={"intermediate_size": 4301}).intermediate_size == 4301


def test_a_fraction_of_the_hidden_size_suits_a_family_that_wants_a_multiple_of_its_heads() -> None:
    shape = source(hidden_size=576, num_attention_heads=9, num_key_value_heads=3)
    assert cut(shape, width={"hidden_size": 0.6667}).hidden_size % 9 == 0


def test_query_heads_are_cut_alike_in_every_group() -> None:
    sizes = cut(source(), width={"num_attention_heads": 0.4})
    assert (sizes.num_attention_heads, sizes.num_key_value_heads) == (16, 8)


def test_whole_groups_take_their_heads_with_them() -> None:
    sizes = cut(source(), width={"num_key_value_heads": 0.5})
    assert (sizes.num_attention_heads, sizes.num_key_value_heads) == (16, 4)


def test_where_each_head_is_its_own_group_cutting_heads_cuts_groups() -> None:
    sizes = cut(source(num_key_value_heads=32), width={"num_attention_heads": 0.5})
    assert (sizes.num_attention_heads, sizes.num_key_value_heads) == (16, 16)


def test_heads_and_channels_follow_each_other_where_the_family_ties_them() -> None:
    neox = {**LLAMA_8B, "model_type": "gpt_neox", "num_key_value_heads": 32}
    shape = shape_of(neox)
    by_heads = cut(shape, width={"num_attention_heads": 24})
    assert by_heads.hidden_size == 24 * 128
    by_channels = cut(shape, width={"hidden_size": 0.75})
    assert (by_channels.num_attention_heads, by_channels.num_key_value_heads) == (24, 24)
    assert not problems_with(shape, by_heads) and not problems_with(shape, by_channels)


def test_fractions_are_of_the_source_and_not_of_the_model_at_hand() -> None:
    settings = PruneSettings.model_validate({"depth": {"keep": 0.25, "criterion": "random"}})
    assert settings.target(source(), num_hidden_layers=16).num_hidden_layers == 8


def test_an_explicit_list_is_taken_out_of_the_model_at_hand() -> None:
    depth = {"criterion": {"kind": "layers", "drop": [0, 1]}}
    settings = PruneSettings.model_validate({"depth": depth})
    assert settings.target(source(), num_hidden_layers=16).num_hidden_layers == 14


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "needs depth, width or both"),
        ({"width": {"hidden_size": 0.0}}, "above 0"),
        ({"width": {"hidden_size": 1.5}}, "up to 1.0"),
        ({"width": {"criterion": "random"}, "iterations": 2}, "width.criterion is random"),
        (
            {"depth": {"criterion": {"kind": "layers", "drop": [1]}}, "iterations": 2},
            "depth.criterion is layers",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        PruneSettings.model_validate(settings)


def test_rounds_cut_by_equal_amounts_and_end_at_the_target() -> None:
    end = Sizes(16, 2048, 7168, 16, 8)
    rounds = stepwise(source(), end, 4)
    assert [sizes.hidden_size for sizes in rounds] == [3584, 3072, 2560, 2048]
    assert [sizes.num_hidden_layers for sizes in rounds] == [28, 24, 20, 16]
    assert rounds[-1] == end


@given(
    rounds=st.integers(1, 9),
    layers=st.integers(1, 32),
    hidden=st.integers(1, 128),
    groups=st.integers(1, 8),
    queries=st.integers(1, 4),
    family=st.sampled_from(["llama", "mistral"]),
)
def test_every_round_is_a_possible_shape_smaller_than_the_one_before(
    rounds: int, layers: int, hidden: int, groups: int, queries: int, family: str
) -> None:
    shape = shape_of({**LLAMA_8B, "model_type": family})
    end = Sizes(layers, hidden * 32, 7168, groups * queries, groups)
    assume(not problems_with(shape, end))
    steps = [shape.sizes, *stepwise(shape, end, rounds)]
    assert steps[-1] == end and len(steps) <= rounds + 1
    for before, after in pairwise(steps):
        assert not problems_with(shape.resized(before), after)
        assert all(size <= asdict(before)[name] for name, size in asdict(after).items())
