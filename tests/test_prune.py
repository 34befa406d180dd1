"""The stage `prune`: what it keeps, and that what comes out needs no code of ours.

What becomes of the tensors is in `test_surgery.py`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeContext, SaveArtifact
from families_at_hand import tiny_config as config_of
from families_at_hand import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from trainers import activations, checkpoints, prune
from trainers.activations import ActivationStatistics
from trainers.config import (
    AtRandom,
    ByActivation,
    ByList,
    ByScore,
    DepthCut,
    PruneConfig,
    RandomUnits,
    WidthCut,
)
from trainers.contract import StageError
from trainers.shapes import Sizes, pruned_sizes, shape_of
from trainers.surgery import Cut, Ranking, operate

IDS = torch.arange(24).reshape(2, 12)


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        found: Tensor = checkpoints.load_model(folder)(IDS).logits
    return found


def dropping(*layers: int) -> PruneConfig:
    cut = DepthCut(num_hidden_layers=4 - len(layers), choice=ByList(drop=layers))
    return PruneConfig(depth=cut)


def drop_layers(source: Path, target: Path, dropped: tuple[int, ...]) -> None:
    operate(source, target, Cut(tuple(layer for layer in range(4) if layer not in dropped)))


def tensors(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


# --- surgery ---------------------------------------------------------------------------------


def test_dropping_nothing_changes_no_bit(artifact: Path, make_context: MakeContext) -> None:
    context = make_context(dropping(), model=artifact)
    prune.run(context)
    assert torch.equal(logits(context.out / "model"), logits(artifact / "model"))


@pytest.mark.parametrize("idle", [(1,), (0, 3), (1, 2)])
def test_dropping_layers_that_do_nothing_leaves_the_logits(
    tiny_config: dict[str, Any],
    save_artifact: SaveArtifact,
    make_context: MakeContext,
    idle: tuple[int, ...],
) -> None:
    model = checkpoints.new_model(tiny_config, seed=1)
    with torch.no_grad():
        for layer in idle:
            model.model.layers[layer].self_attn.o_proj.weight.zero_()
            model.model.layers[layer].mlp.down_proj.weight.zero_()
    source = save_artifact(model)
    context = make_context(dropping(*idle), model=source)
    prune.run(context)
    torch.testing.assert_close(
        logits(context.out / "model"), logits(source / "model"), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("dropped", [(0,), (3,), (1, 2), (0, 2), (0, 1, 3)])
def test_kept_layers_keep_every_bit_and_their_order(
    artifact: Path, make_context: MakeContext, dropped: tuple[int, ...]
) -> None:
    context = make_context(dropping(*dropped), model=artifact)
    prune.run(context)
    before, after = tensors(artifact / "model"), tensors(context.out / "model")
    kept = [layer for layer in range(4) if layer not in dropped]
    expected = {name: tensor for name, tensor in before.items() if ".layers." not in name}
    for place, layer in enumerate(kept):
        prefix = f"model.layers.{layer}."
        expected |= {
            f"model.layers.{place}.{name.removeprefix(prefix)}": tensor
            for name, tensor in before.items()
            if name.startswith(prefix)
        }
    assert after.keys() == expected.keys()
    assert all(torch.equal(after[name], expected[name]) for name in expected)
    assert json.loads((context.out / "dropped_layers.json").read_text()) == list(dropped)


def test_the_result_loads_with_plain_transformers_and_generates(
    artifact: Path, make_context: MakeContext
) -> None:
    context = make_context(dropping(1, 2), model=artifact)
    prune.run(context)
    folder = context.out / "model"
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), "no key may be missing, unexpected or of another shape"
    assert len(model.model.layers) == model.config.num_hidden_layers == 2
    ids = AutoTokenizer.from_pretrained(folder)("the dog", return_tensors="pt")["input_ids"]
    assert model.generate(ids, min_new_tokens=3, max_new_tokens=3, do_sample=False).shape == (1, 5)
    assert shape_of(checkpoints.read_config(folder)).parameters == (
        checkpoints.count_parameters(model)
    )


@pytest.mark.parametrize("dropped", [(), (0,), (1, 3)])
def test_a_checkpoint_in_several_files_is_cut_the_same(
    artifact: Path,
    model: PreTrainedModel,
    save_artifact: SaveArtifact,
    make_context: MakeContext,
    dropped: tuple[int, ...],
) -> None:
    sharded = save_artifact(model, max_shard_size="20KB")
    assert len(list((sharded / "model").glob("*.safetensors"))) > 2
    whole = make_context(dropping(*dropped), out="whole", model=artifact)
    parts = make_context(dropping(*dropped), out="parts", model=sharded)
    prune.run(whole)
    prune.run(parts)
    assert torch.equal(logits(parts.out / "model"), logits(whole.out / "model"))
    index = json.loads((parts.out / "model" / "model.safetensors.index.json").read_text())
    sizes = [t.numel() * t.element_size() for t in tensors(parts.out / "model").values()]
    assert index["metadata"]["total_size"] == sum(sizes)


def test_one_file_left_of_several_still_loads(
    artifact: Path, tmp_path: Path, make_context: MakeContext
) -> None:
    # All that layer 3 has in a file of its own: without it a single file with a number remains.
    source = tmp_path / "split" / "model"
    drop_layers(artifact / "model", source, ())
    whole = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    weight_map = {}
    for number, of_layer_3 in ((1, False), (2, True)):
        part = {k: v for k, v in whole.items() if k.startswith("model.layers.3.") is of_layer_3}
        name = f"model-{number:05}-of-00002.safetensors"
        save_file(part, source / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    context = make_context(dropping(3), model=tmp_path / "split")
    prune.run(context)
    drop_layers(artifact / "model", tmp_path / "expected", (3,))
    assert torch.equal(logits(context.out / "model"), logits(tmp_path / "expected"))


def test_weights_in_another_form_beside_the_checkpoint_are_left_alone(
    artifact: Path, tmp_path: Path
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    checkpoints.link_folder(artifact / "model", source)
    save_file({"layers.0.wq": torch.zeros(2)}, source / "consolidated.safetensors")
    drop_layers(source, target, (0,))
    assert [file.name for file in target.glob("*.safetensors*")] == ["model.safetensors"]


def test_a_folder_without_safetensors_is_refused(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((artifact / "model" / "config.json").read_bytes())
    with pytest.raises(StageError, match=r"holds no model\.safetensors"):
        drop_layers(tmp_path, tmp_path / "target", (0,))


def test_settings_that_hold_one_value_a_layer_shrink_with_the_layers(tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    config = {
        "model_type": "qwen3",
        "vocab_size": 30,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "use_sliding_window": True,
        "sliding_window": 3,
        "layer_types": kinds,
    }
    checkpoints.new_model(config, seed=0).save_pretrained(tmp_path / "whole")
    drop_layers(tmp_path / "whole", tmp_path / "cut", (0, 2))
    assert checkpoints.read_config(tmp_path / "cut")["layer_types"] == [kinds[1], kinds[3]]
    model = checkpoints.load_model(tmp_path / "cut")
    assert [layer.self_attn.layer_type for layer in model.model.layers] == [kinds[1], kinds[3]]


def test_random_weights_have_the_pruned_shape_and_come_from_the_seed(
    artifact: Path, make_context: MakeContext
) -> None:
    config = dropping(1).model_copy(update={"initialise": "random"})
    source = shape_of(checkpoints.read_config(artifact / "model"))
    pruned = source.resized(replace(source.sizes, num_hidden_layers=3))
    found = {}
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        context = make_context(config, out=out, seed=seed, model=artifact)
        prune.run(context)
        found[out] = logits(context.out / "model")
        shape = shape_of(checkpoints.read_config(context.out / "model"))
        assert replace(shape, config=pruned.config) == pruned
    assert torch.equal(found["a"], found["b"])
    assert not torch.equal(found["a"], found["c"])
    inherited = make_context(dropping(1), out="inherited", model=artifact)
    prune.run(inherited)
    sizes = [
        {name: tensor.shape for name, tensor in tensors(folder / "model").items()}
        for folder in (inherited.out, context.out)
    ]
    assert sizes[0] == sizes[1]
    assert AutoTokenizer.from_pretrained(context.out / "model")("the dog")["input_ids"]


# --- which layers ------------------------------------------------------------------------------

SCORES = {(1, 0): 0.9, (1, 1): 0.2, (1, 2): 0.8, (1, 3): 0.1, (2, 1): 0.5, (2, 2): 0.4, (2, 3): 0.4}


def by_score(keep: int, contiguous: bool) -> DepthCut:
    return DepthCut(num_hidden_layers=keep, choice=ByScore(contiguous=contiguous))


def test_single_layers_are_dropped_by_their_own_scores() -> None:
    assert prune.choose(by_score(3, False), 4, SCORES, seed=0) == (3,)
    assert prune.choose(by_score(2, False), 4, SCORES, seed=0) == (1, 3)


def test_a_block_is_dropped_by_its_own_score_and_the_earliest_of_equals() -> None:
    assert prune.choose(by_score(2, True), 4, SCORES, seed=0) == (1, 2)


def test_missing_scores_are_an_error_that_says_which() -> None:
    with pytest.raises(StageError, match="no block of 3 layers"):
        prune.choose(by_score(1, True), 4, SCORES, seed=0)
    with pytest.raises(StageError, match="hold 0 single layers, not 1"):
        prune.choose(by_score(3, False), 4, {}, seed=0)


def test_scores_are_read_from_the_importance_artifact(
    artifact: Path, tmp_path: Path, make_context: MakeContext
) -> None:
    rows = [
        {"criterion": "perplexity", "block_length": 1, "last": last, "name": name, "value": value}
        for last, value in enumerate([0.3, 0.1, 0.4, 0.2])
        for name, value in (("importance", value), ("lm_loss", 1 - value))
    ]
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    context = make_context(
        PruneConfig(depth=by_score(2, False)), model=artifact, importance=tmp_path
    )
    prune.run(context)
    assert json.loads((context.out / "dropped_layers.json").read_text()) == [1, 3]


@given(st.integers(1, 30), st.data(), st.booleans(), st.integers(0, 2**32))
def test_random_layers_are_as_many_as_asked_and_depend_on_the_seed_alone(
    count: int, data: st.DataObject, contiguous: bool, seed: int
) -> None:
    number = data.draw(st.integers(0, count))
    layers = prune.random_layers(count, number, contiguous, seed)
    assert len(set(layers)) == number
    assert list(layers) == sorted(layers)
    assert set(layers) <= set(range(count))
    if contiguous and layers:
        assert layers[-1] - layers[0] == number - 1
    assert layers == prune.random_layers(count, number, contiguous, seed)
    choice = DepthCut(
        num_hidden_layers=max(1, count - number), choice=AtRandom(contiguous=contiguous)
    )
    if number < count:
        assert prune.choose(choice, count, SCORES, seed) == layers


def test_seeds_draw_different_layers() -> None:
    drawn = {prune.random_layers(12, 4, False, seed) for seed in range(20)}
    assert len(drawn) > 15
    blocks = {prune.random_layers(12, 4, True, seed) for seed in range(60)}
    assert blocks == {tuple(range(first, first + 4)) for first in range(9)}


@pytest.mark.parametrize(
    ("keep", "drop", "message"),
    [
        (5, (), "cannot keep 5 of 4 layers"),
        (3, (4,), "cannot drop layers .4. of layers 0 to 3"),
        (3, (-1,), "cannot drop layers"),
        (2, (1, 1), "cannot drop layers"),
        (2, (1,), "1 layers are listed, 2 of 4 are to be dropped"),
    ],
)
def test_an_impossible_choice_is_an_error(keep: int, drop: tuple[int, ...], message: str) -> None:
    config = DepthCut(num_hidden_layers=keep, choice=ByList(drop=drop))
    with pytest.raises(StageError, match=message):
        prune.choose(config, 4, {}, seed=0)


def test_keeping_every_layer_needs_no_scores() -> None:
    assert prune.choose(by_score(4, True), 4, {}, seed=0) == ()


# --- which units -----------------------------------------------------------------------------

STATISTICS = ("l2", "mean", "variance")


def statistics_of(model_type: str = "llama") -> ActivationStatistics:
    """Made-up sums for a model of `config_of(model_type)`, other ones for every aggregation."""
    shape = shape_of(config_of(model_type))
    draw = torch.Generator().manual_seed(3)
    rows = {
        "down_input": (4, shape.intermediate_size),
        "pre_activation": (4, shape.intermediate_size),
        "heads": (4, shape.num_attention_heads),
        "groups": (4, shape.num_key_value_heads),
        "channels": (4 * len(shape.family.norms) + 1, shape.hidden_size),
    }
    sums = {
        f"{units}.{sequence}": torch.rand(2, *size, generator=draw, dtype=torch.float64) + 1
        for units, size in rows.items()
        for sequence in STATISTICS
    }
    return ActivationStatistics(8, sums)


def cut_of(
    width: WidthCut,
    model_type: str = "llama",
    layers: tuple[int, ...] = (0, 1, 2, 3),
    statistics: ActivationStatistics | None = None,
    seed: int = 0,
) -> Cut:
    shape = shape_of(config_of(model_type))
    target = pruned_sizes(shape, PruneConfig(width=width))
    return prune.choose_units(width, shape, target, layers, statistics, seed)


@pytest.mark.parametrize("batch", STATISTICS)
@pytest.mark.parametrize("sequence", STATISTICS)
@pytest.mark.parametrize("seen", ["down_input", "pre_activation"])
def test_the_neurons_with_the_largest_scores_stay(batch: Any, sequence: Any, seen: Any) -> None:
    statistics = statistics_of()
    choice = ByActivation(batch=batch, sequence=sequence, neurons=seen)
    cut = cut_of(WidthCut(intermediate_size=11, choice=choice), statistics=statistics)
    scores = statistics.scores(seen, batch, sequence)
    assert cut.neurons is not None
    for layer in range(4):
        best = sorted(range(48), key=lambda unit, row=scores[layer]: -float(row[unit]))[:11]
        assert cut.neurons[layer] == tuple(sorted(best))
    assert cut.heads is cut.channels is None


def test_each_group_that_stays_keeps_as_many_of_its_query_heads_best_first() -> None:
    shape = replace(shape_of(config_of("llama")), num_attention_heads=8, num_key_value_heads=2)
    target = Sizes(4, 32, 48, 4, 2)
    heads = [0.1, 0.9, 0.5, 0.7, 3.0, 1.0, 2.0, 2.0]
    found = prune.heads_of_layer(heads, None, shape, target)
    assert found.groups == Ranking((0, 1))
    assert found.queries == {0: Ranking((1, 3), (2, 0)), 1: Ranking((4, 6), (7, 5))}


def test_whole_groups_go_by_their_own_scores_and_take_their_query_heads() -> None:
    shape = replace(shape_of(config_of("llama")), num_attention_heads=8, num_key_value_heads=4)
    found = prune.heads_of_layer(None, [0.2, 0.1, 0.4, 0.3], shape, Sizes(4, 32, 48, 4, 2))
    assert found.groups == Ranking((2, 3), (0, 1))
    assert found.queries == {2: Ranking((4, 5)), 3: Ranking((6, 7))}
    both = prune.heads_of_layer(list(range(8)), [0.2, 0.1, 0.4, 0.3], shape, Sizes(4, 32, 48, 2, 2))
    assert both.queries == {2: Ranking((5,), (4,)), 3: Ranking((7,), (6,))}


def test_where_each_head_is_its_own_group_cutting_heads_cuts_groups() -> None:
    statistics = statistics_of("llama, multi-head")
    width = WidthCut(num_attention_heads=2, choice=ByActivation())
    cut = cut_of(width, "llama, multi-head", statistics=statistics)
    scores = statistics.scores("groups", "l2", "mean")
    assert cut.heads is not None
    for layer, heads in cut.heads.items():
        order = sorted(range(4), key=lambda unit, row=scores[layer]: -float(row[unit]))
        assert heads.groups == Ranking(tuple(order[:2]), tuple(order[2:]))
        assert heads.queries == {head: Ranking((head,)) for head in order[:2]}


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
@pytest.mark.parametrize("layers", [(0, 1, 2, 3), (1, 3)])
def test_channels_have_one_ranking_over_the_norms_of_the_layers_that_stay(
    model_type: str, layers: tuple[int, ...]
) -> None:
    statistics = statistics_of(model_type)
    width = WidthCut(hidden_size=12, choice=ByActivation())
    cut = cut_of(width, model_type, layers, statistics)
    norms = 2 if model_type == "llama" else 4
    scores = statistics.scores("channels", "l2", "mean")
    total = scores[-1].clone()
    for layer in layers:
        for norm in range(norms):
            total += scores[layer * norms + norm]
    assert cut.channels == tuple(sorted(total.topk(12).indices.tolist()))


def test_of_equal_units_the_earlier_stay() -> None:
    assert prune.best([1.0, 2.0, 1.0, 1.0], 2) == (0, 1)
    assert prune.split({4: 1.0, 5: 1.0, 6: 1.0}, 2) == Ranking((4, 5), (6,))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("units", "width"),
    [
        ("down_input", {"intermediate_size": 8}),
        ("heads", {"num_attention_heads": 2}),
        ("groups", {"num_key_value_heads": 1}),
        ("channels", {"hidden_size": 8}),
    ],
)
def test_a_score_that_is_no_finite_number_is_an_error_that_names_the_layer(
    units: str, width: dict[str, int], value: float
) -> None:
    statistics = statistics_of()
    row = 4 if units == "channels" else 2  # layer 2 has the norms 4 and 5
    statistics.sums[f"{units}.mean"][:, row, 1] = value
    named = "neurons" if units == "down_input" else units
    with pytest.raises(StageError, match=f"{named} of layer 2 is not a finite number"):
        cut_of(WidthCut(**width, choice=ByActivation()), statistics=statistics)
    cut_of(WidthCut(**width, choice=ByActivation()), "llama", (0, 1, 3), statistics)


def test_units_cannot_be_chosen_by_activations_of_nothing_or_of_another_model() -> None:
    width = WidthCut(hidden_size=8, choice=ByActivation())
    with pytest.raises(StageError, match="no input has any"):
        cut_of(width)
    with pytest.raises(StageError, match="channels are those of another model"):
        cut_of(width, "gemma2", statistics=statistics_of("llama"))


ALL_WIDTHS = {"hidden_size": 16, "intermediate_size": 9, "num_attention_heads": 2}


def test_random_units_come_from_the_seed_alone_and_differ_from_layer_to_layer() -> None:
    width = WidthCut(**ALL_WIDTHS, choice=RandomUnits())
    first = cut_of(width, seed=1)
    assert first == cut_of(width, seed=1)
    other = cut_of(width, seed=2)
    assert (first.neurons, first.heads, first.channels) != (
        other.neurons,
        other.heads,
        other.channels,
    )
    assert first.neurons is not None
    assert len(set(first.neurons.values())) == 4
    without_a_layer = cut_of(width, layers=(0, 2, 3), seed=1)
    assert without_a_layer.neurons == {layer: first.neurons[layer] for layer in (0, 2, 3)}
    assert without_a_layer.channels == first.channels


# --- the stage -------------------------------------------------------------------------------


@pytest.fixture
def measured(save_artifact: SaveArtifact, tmp_path: Path) -> tuple[Path, Path]:
    """An artifact with a tiny Llama, and one with made-up activations of it."""
    folder = tmp_path / "activations"
    folder.mkdir()
    statistics_of().save(folder / activations.FILE)
    return save_artifact(tiny_model("llama")), folder


def test_depth_and_width_are_cut_at_once_by_the_numbers_of_the_source(
    measured: tuple[Path, Path], make_context: MakeContext
) -> None:
    width = WidthCut(**ALL_WIDTHS, choice=ByActivation())
    config = dropping(0, 2).model_copy(update={"width": width})
    context = make_context(config, model=measured[0], activations=measured[1])
    prune.run(context)
    shape = shape_of(checkpoints.read_config(context.out / "model"))
    assert shape.sizes == Sizes(2, 16, 9, 2, 2)
    assert checkpoints.count_parameters(checkpoints.load_model(context.out / "model")) == (
        shape.parameters
    )
    kept = json.loads((context.out / "kept_units.json").read_text())
    cut = cut_of(width, layers=(1, 3), statistics=statistics_of())
    assert cut.neurons is not None
    assert kept["neurons"] == {str(layer): list(units) for layer, units in cut.neurons.items()}
    assert kept["channels"] == list(cut.channels or ())
    assert kept["heads"].keys() == kept["groups"].keys() == {"1", "3"}
    assert all(len(heads) == 2 for heads in kept["heads"].values())
    before, after = (tensors(folder / "model") for folder in (measured[0], context.out))
    up = before["model.layers.3.mlp.up_proj.weight"]
    expected = up[kept["neurons"]["3"]][:, kept["channels"]]
    assert torch.equal(after["model.layers.1.mlp.up_proj.weight"], expected)


def test_the_residual_of_heads_is_added_unless_it_is_switched_off(
    measured: tuple[Path, Path], make_context: MakeContext
) -> None:
    found = {}
    for on in (True, False):
        width = WidthCut(num_attention_heads=2, choice=ByActivation(), head_residual=on)
        inputs = {"model": measured[0], "activations": measured[1]}
        context = make_context(PruneConfig(width=width), out=str(on), **inputs)
        prune.run(context)
        found[on] = tensors(context.out / "model")
    differ = [
        name for name in found[True] if not torch.equal(found[True][name], found[False][name])
    ]
    assert len(differ) == 4
    assert all("q_proj" in name for name in differ)


def test_random_weights_at_a_narrower_shape_need_no_activations(
    measured: tuple[Path, Path], make_context: MakeContext
) -> None:
    width = WidthCut(**ALL_WIDTHS, choice=ByActivation(), rescale_norms=True)
    context = make_context(PruneConfig(width=width, initialise="random"), model=measured[0])
    prune.run(context)
    config = checkpoints.read_config(context.out / "model")
    assert shape_of(config).sizes == Sizes(4, 16, 9, 2, 2)
    assert config["rms_norm_eps"] == checkpoints.read_config(measured[0] / "model")["rms_norm_eps"]
    assert json.loads((context.out / "kept_units.json").read_text()) == {}


@pytest.mark.parametrize(
    ("width", "message"),
    [
        ({"intermediate_size": 49}, "intermediate_size: 49 is not between 1 and the model's 48"),
        ({"num_attention_heads": 3}, "num_attention_heads: 3 query heads do not fit 2"),
        ({"hidden_size": 18}, "hidden_size: 18 is not a multiple of num_attention_heads"),
    ],
)
def test_sizes_that_cannot_be_had_are_refused_by_name(
    artifact: Path, make_context: MakeContext, width: dict[str, int], message: str
) -> None:
    sizes = {"intermediate_size": 48, "hidden_size": 32} | width
    context = make_context(
        PruneConfig(width=WidthCut(**sizes, choice=RandomUnits())), model=artifact
    )
    with pytest.raises(StageError, match=message):
        prune.run(context)
