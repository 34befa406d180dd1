"""Scores of units and layers equal naive ones, for every family, and follow the units around."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from families_at_hand import MODEL_TYPES, VARIANTS, tiny_config, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainers import activations
from trainers.activations import ActivationStatistics, Units, collect, layers_of
from trainers.config import DistillLoss, Statistic
from trainers.contract import StageError
from trainers.distill import Distillation
from trainers.evaluate import lm_loss
from trainers.families import Family, family_of
from trainers.pretrain import LanguageModelling
from trainers.teacher import LiveTeacher

STATISTICS = get_args(Statistic)
UNITS = get_args(Units)
EVERY_FAMILY = pytest.mark.parametrize("name", VARIANTS)


def family(model: PreTrainedModel) -> Family:
    return family_of(model.config.to_dict())


def blocks_of(model: PreTrainedModel, count: int = 5, length: int = 12) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(model.config.vocab_size, (count, length), generator=draw)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-5)


# --- the naive way: keep everything, then aggregate ------------------------------------------


@torch.no_grad()
def watched(
    model: PreTrainedModel, blocks: Tensor, modules: list[nn.Module]
) -> list[tuple[Tensor, Tensor]]:
    """What goes into each module and what comes out, over all blocks in one batch."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def keep(module: nn.Module, inputs: Any, named: Any, output: Any) -> None:
        before = inputs[0] if inputs else named["hidden_states"]
        seen[module] = (before, output[0] if isinstance(output, tuple) else output)

    hooks = [module.register_forward_hook(keep, with_kwargs=True) for module in modules]
    model(input_ids=blocks, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [seen[module] for module in modules]


def naive_activations(model: PreTrainedModel, blocks: Tensor) -> dict[str, list[Tensor]]:
    """Units -> for each row, activations of (samples, tokens, units)."""
    found: dict[str, list[Tensor]] = {units: [] for units in UNITS}
    where, layers = family(model), list(layers_of(model))
    for layer in layers:
        down, before, output = watched(
            model,
            blocks,
            [
                layer.get_submodule(path)
                for path in (where.down, where.before_activation, where.attention_output)
            ],
        )
        found["down_input"].append(down[0])
        found["pre_activation"].append(before[1])
        heads = model.config.num_attention_heads
        groups = getattr(model.config, "num_key_value_heads", heads)
        by_head = output[0].chunk(heads, dim=-1)
        by_group = output[0].chunk(groups, dim=-1)
        found["heads"].append(torch.stack([part.norm(dim=-1) for part in by_head], -1))
        found["groups"].append(torch.stack([part.norm(dim=-1) for part in by_group], -1))
    norms = [layer.get_submodule(path) for layer in layers for path in where.norms]
    norms.append(model.get_submodule(where.final_norm))
    found["channels"] = [output for _, output in watched(model, blocks, norms)]
    return found


NAIVE: dict[Statistic, Callable[[Tensor, int], Tensor]] = {
    "mean": lambda values, dim: values.abs().mean(dim),
    "l2": lambda values, dim: values.pow(2).sum(dim).sqrt(),
    "variance": lambda values, dim: values.var(dim, correction=0),
}


@EVERY_FAMILY
def test_all_nine_aggregations_of_all_units_equal_naive_ones(name: str) -> None:
    model = tiny_model(name)
    blocks = blocks_of(model)
    statistics, _ = collect(model, blocks)
    naive = naive_activations(model, blocks)
    assert statistics.samples == 5
    for units in UNITS:
        values = torch.stack(naive[units]).double()  # rows, samples, tokens, units
        for batch in STATISTICS:
            for sequence in STATISTICS:
                expected = NAIVE[batch](NAIVE[sequence](values, 2), 1)
                found = statistics.scores(units, batch, sequence)
                assert found.dtype == torch.float64
                close(found, expected)


@EVERY_FAMILY
def test_block_influence_is_one_minus_the_mean_cosine_for_every_block(name: str) -> None:
    model = tiny_model(name)
    blocks = blocks_of(model)
    _, found = collect(model, blocks)
    passed = watched(model, blocks, list(layers_of(model)))
    stream = [before for before, _ in passed] + [passed[-1][1]]
    naive = {
        (first, last - first): 1
        - float(F.cosine_similarity(stream[first], stream[last], dim=-1).mean())
        for first in range(4)
        for last in range(first + 1, 5)
    }
    assert found == pytest.approx(naive, abs=1e-5)


def test_neurons_before_the_activation_become_those_at_the_down_projection() -> None:
    model = tiny_model("nemotron")  # relu(x)^2 without a gate
    blocks = blocks_of(model)
    naive = naive_activations(model, blocks)
    for before, after in zip(naive["pre_activation"], naive["down_input"], strict=True):
        close(after, before.relu().square())


# --- sums ------------------------------------------------------------------------------------


def same(first: ActivationStatistics, second: ActivationStatistics, tolerance: float) -> None:
    assert first.samples == second.samples
    assert first.sums.keys() == second.sums.keys()
    for name, total in first.sums.items():
        torch.testing.assert_close(total, second.sums[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", MODEL_TYPES)
def test_the_sums_of_two_halves_are_those_of_the_whole(name: str) -> None:
    model = tiny_model(name)
    blocks = blocks_of(model)
    whole, _ = collect(model, blocks)
    halves = [collect(model, part)[0] for part in (blocks[:2], blocks[2:])]
    sums = {name: total + halves[1].sums[name] for name, total in halves[0].sums.items()}
    same(ActivationStatistics(sum(half.samples for half in halves), sums), whole, 1e-6)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_the_result_does_not_depend_on_the_batch_size(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    model = tiny_model("llama")
    blocks = blocks_of(model)
    expected, influence = collect(model, blocks)
    monkeypatch.setattr(activations, "BLOCKS_A_BATCH", size)
    ticks: list[int] = []
    found, found_influence = collect(model, blocks, ticks.append)
    assert ticks == [size] * (5 // size) + ([5 % size] if 5 % size else [])
    same(found, expected, 1e-6)
    assert found_influence == pytest.approx(influence, abs=1e-6)


@pytest.mark.parametrize("tokens", [1, 3])
def test_block_influence_does_not_depend_on_how_many_tokens_are_multiplied_at_once(
    monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    model = tiny_model("llama")
    blocks = blocks_of(model)
    _, expected = collect(model, blocks)
    monkeypatch.setattr("trainers.activations.TOKENS_A_PRODUCT", tokens)
    _, found = collect(model, blocks)
    assert found == pytest.approx(expected, abs=1e-6)


def test_the_result_does_not_depend_on_the_room_for_chunks_and_streams(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("gemma2")
    blocks = blocks_of(model)
    expected, influence = collect(model, blocks)
    monkeypatch.setattr(activations, "CHUNK_ELEMENTS", 300)
    monkeypatch.setattr(activations, "STREAM_BYTES", 2 * 5 * 12 * 32 * 4)  # of two blocks
    found, found_influence = collect(model, blocks)
    same(found, expected, 1e-6)
    assert found_influence == pytest.approx(influence, abs=1e-6)


def test_statistics_come_back_from_disk_as_they_were(tmp_path: Path) -> None:
    statistics, _ = collect(tiny_model("qwen3"), blocks_of(tiny_model("qwen3")))
    statistics.save(tmp_path / activations.FILE)
    same(ActivationStatistics.load(tmp_path / activations.FILE), statistics, 0)
    assert [file.name for file in tmp_path.iterdir()] == [activations.FILE]


def test_what_never_changes_has_no_variance() -> None:
    values = torch.full((2, 7, 3), 1e3)
    found = activations.sequence_statistics(values)
    assert torch.equal(found["variance"], torch.zeros(2, 3, dtype=torch.float64))


def test_half_precision_activations_are_summed_exactly() -> None:
    values = torch.randn(2, 300, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = activations.sequence_statistics(values)
    for statistic, naive in NAIVE.items():
        close(found[statistic], naive(values.double(), 1))


def test_a_bf16_model_scores_about_as_its_fp32_self() -> None:
    model = tiny_model("llama")
    blocks = blocks_of(model)
    expected, influence = collect(model, blocks)
    found, found_influence = collect(model.bfloat16(), blocks)
    assert found_influence == pytest.approx(influence, abs=0.02)
    torch.testing.assert_close(
        found.scores("down_input", "l2", "mean"),
        expected.scores("down_input", "l2", "mean"),
        rtol=0.1,
        atol=0.01,
    )


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("llama")
    blocks = blocks_of(model)
    before = model(input_ids=blocks).logits.detach()
    collect(model, blocks)
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(input_ids=blocks).logits, before)


# --- units move, scores move along -----------------------------------------------------------


def permute(weight: Tensor, order: Tensor, dim: int) -> None:
    weight.copy_(weight.index_select(dim, order))


@torch.no_grad()
def test_permuted_neurons_have_the_permuted_scores() -> None:
    model = tiny_model("llama")
    blocks = blocks_of(model)
    expected, _ = collect(model, blocks)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    mlp = layers_of(model)[1].mlp
    permute(mlp.gate_proj.weight, order, 0)
    permute(mlp.up_proj.weight, order, 0)
    permute(mlp.down_proj.weight, order, 1)
    found, _ = collect(model, blocks)
    for units in ("down_input", "pre_activation"):
        old, new = (each.scores(units, "l2", "mean") for each in (expected, found))
        close(new[1], old[1, order])
        close(new[[0, 2, 3]], old[[0, 2, 3]])


@torch.no_grad()
def test_query_heads_permuted_within_their_groups_have_the_permuted_scores() -> None:
    model = tiny_model("llama")
    blocks = blocks_of(model)
    expected, _ = collect(model, blocks)
    order = torch.tensor([1, 0, 3, 2])
    rows = (order[:, None] * 8 + torch.arange(8)).flatten()
    attention = layers_of(model)[2].self_attn
    permute(attention.q_proj.weight, rows, 0)
    permute(attention.o_proj.weight, rows, 1)
    found, _ = collect(model, blocks)
    old, new = (each.scores("heads", "l2", "mean") for each in (expected, found))
    close(new[2], old[2, order])
    close(new[[0, 1, 3]], old[[0, 1, 3]])
    old, new = (each.scores("groups", "variance", "l2") for each in (expected, found))
    close(new, old)


# --- numbers that are none -------------------------------------------------------------------


@pytest.mark.parametrize("name", MODEL_TYPES)
@pytest.mark.parametrize("part", ["before_activation", "down", "attention_output"])
@torch.no_grad()
def test_a_weight_that_is_not_a_number_names_its_layer(name: str, part: str) -> None:
    model = tiny_model(name)
    path = getattr(family(model), part)
    layers_of(model)[2].get_submodule(path).weight[0, 0] = torch.nan
    with pytest.raises(StageError, match=r"^the activations of layer 2's \w+ are not finite$"):
        collect(model, blocks_of(model))


@torch.no_grad()
def test_the_neurons_that_are_not_finite_are_named() -> None:
    model = tiny_model("llama")
    layers_of(model)[3].mlp.gate_proj.weight[5] = torch.inf
    with pytest.raises(StageError, match="the activations of layer 3's neurons are not finite"):
        collect(model, blocks_of(model))


@torch.no_grad()
@pytest.mark.parametrize(
    ("path", "named"), [("embed_tokens", "embeddings"), ("norm", "final norm")]
)
def test_what_is_no_layer_is_named_too(path: str, named: str) -> None:
    model = tiny_model("llama")
    model.model.get_submodule(path).weight[:] = torch.nan
    with pytest.raises(StageError, match=f"the activations of the {named} are not finite"):
        collect(model, blocks_of(model))


# --- the loss, whose logits some families cap ------------------------------------------------


@EVERY_FAMILY
@torch.no_grad()
def test_the_lm_loss_equals_transformers_own(name: str) -> None:
    model = tiny_model(name)
    blocks = blocks_of(model)
    expected = float(model(input_ids=blocks, labels=blocks).loss)
    assert lm_loss(model, blocks) == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_capped_logits_change_the_loss() -> None:
    model = tiny_model("gemma2")
    blocks = blocks_of(model)
    losses = []
    for cap in (tiny_config("gemma2").get("final_logit_softcapping", 30.0), 0.5, None):
        model.config.final_logit_softcapping = cap
        expected = float(model(input_ids=blocks, labels=blocks).loss)
        losses.append(lm_loss(model, blocks))
        assert losses[-1] == pytest.approx(expected, abs=1e-5)
    assert abs(losses[1] - losses[2]) > 1e-2


@EVERY_FAMILY
@torch.no_grad()
def test_teachers_and_students_see_the_logits_of_transformers(name: str) -> None:
    model = tiny_model(name)
    blocks = blocks_of(model)
    numbers = torch.arange(len(blocks))
    output = model(input_ids=blocks, labels=blocks)
    teacher = LiveTeacher(model)
    taught = teacher.targets(blocks, numbers).logits(slice(None))
    close(taught, output.logits[:, :-1].flatten(0, 1))
    expected = pytest.approx(float(output.loss), abs=1e-5)
    assert float(LanguageModelling(model)(blocks, numbers)) == expected
    conventional = DistillLoss(logits="none", cross_entropy_weight=1.0)
    assert float(Distillation(model, None, conventional)(blocks, numbers)) == expected
    by_both = DistillLoss(cross_entropy_weight=1.0)  # no divergence from oneself
    assert float(Distillation(model, teacher, by_both)(blocks, numbers)) == expected
