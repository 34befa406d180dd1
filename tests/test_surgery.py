"""Surgery on every family: what does nothing can be cut, and what is kept stays as it was."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families_at_hand import VARIANTS, tiny_config, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from trainers import checkpoints, surgery
from trainers.contract import StageError
from trainers.families import FAMILIES, Family, family_of
from trainers.shapes import Sizes, problems_with, shape_of
from trainers.surgery import Cut, Heads, Ranking, operate

IDS = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))
LAYERS = (0, 1, 2, 3)
GROUPED = [name for name in VARIANTS if tiny_config(name).get("num_key_value_heads") == 2]
MULTI_HEAD = [name for name in VARIANTS if name not in GROUPED]
FREE_WIDTH = [name for name in VARIANTS if not name.startswith("gpt_neox")]


def family(name: str) -> Family:
    return family_of(tiny_config(name))


def saved(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    """In float64: what surgery changes shall not hide behind what adding in fp32 changes."""
    found: Tensor = copy.deepcopy(model).double()(IDS).logits
    return found


def cut_model(model: PreTrainedModel, folder: Path, cut: Cut) -> PreTrainedModel:
    """The model that surgery makes, as plain transformers loads it."""
    operate(saved(model, folder / "source"), folder / "target", cut)
    found, info = AutoModelForCausalLM.from_pretrained(
        folder / "target", output_loading_info=True, dtype="auto"
    )
    assert not any(info.values()), "no key may be missing, unexpected or of another shape"
    return found.eval()


def assert_same_logits(model: PreTrainedModel, folder: Path, cut: Cut) -> None:
    smaller = cut_model(model, folder, cut)
    assert checkpoints.count_parameters(smaller) < checkpoints.count_parameters(model)
    torch.testing.assert_close(logits(smaller), logits(model), rtol=0, atol=1e-5)


def module(model: PreTrainedModel, layer: int, path: str) -> nn.Module:
    return model.get_submodule(f"{family_of(model.config.to_dict()).layers}.{layer}.{path}")


def per_layer(units: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """As many units in each layer, but others: what a layer keeps is its own affair."""
    return {layer: tuple(sorted((unit + layer) % 48 for unit in units)) for layer in LAYERS}


def two_heads_of_four(layer: int) -> Heads:
    """One query head of each of two groups; the second in the even layers, else the first."""
    kept = [1, 3] if layer % 2 == 0 else [0, 2]
    rest = [head for head in range(4) if head not in kept]
    rankings = {g: Ranking((k,), (r,)) for g, (k, r) in enumerate(zip(kept, rest, strict=True))}
    return Heads(Ranking((0, 1)), rankings)


def one_group_of(groups: int, kept: Sequence[int]) -> Heads:
    """Whole groups of four query heads in all."""
    size = 4 // groups
    rest = tuple(group for group in range(groups) if group not in kept)
    members = {g: Ranking(tuple(range(g * size, g * size + size))) for g in kept}
    return Heads(Ranking(tuple(kept), rest), members)


# --- what does nothing can be cut ------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_cutting_nothing_leaves_every_bit(name: str, tmp_path: Path) -> None:
    source = saved(tiny_model(name), tmp_path / "source")
    operate(source, tmp_path / "target", Cut(LAYERS, head_residual=True, rescale_norms=True))
    before, after = tensors(source), tensors(tmp_path / "target")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype
        assert tensor.numpy().tobytes() == after[key].numpy().tobytes()
    configs = [checkpoints.read_config(folder) for folder in (source, tmp_path / "target")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("name", VARIANTS)
def test_neurons_whose_output_is_zero_can_be_cut(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    kept = per_layer(range(0, 48, 2))
    with torch.no_grad():
        for layer in LAYERS:
            idle = [unit for unit in range(48) if unit not in kept[layer]]
            module(model, layer, family(name).down).weight[:, idle] = 0
    assert_same_logits(model, tmp_path, Cut(LAYERS, neurons=kept))


def silence_heads(model: PreTrainedModel, layer: int, heads: Iterable[int]) -> None:
    path = family_of(model.config.to_dict()).attention_output
    with torch.no_grad():
        for head in heads:
            module(model, layer, path).weight[:, 8 * head : 8 * head + 8] = 0


@pytest.mark.parametrize("name", GROUPED)
def test_query_heads_whose_output_is_zero_can_be_cut(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    heads = {layer: two_heads_of_four(layer) for layer in LAYERS}
    for layer in LAYERS:
        silence_heads(model, layer, (r.removed[0] for r in heads[layer].queries.values()))
    assert_same_logits(model, tmp_path, Cut(LAYERS, heads=heads))


@pytest.mark.parametrize("name", GROUPED)
def test_groups_whose_output_is_zero_can_be_cut(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    heads = {layer: one_group_of(2, (layer % 2,)) for layer in LAYERS}
    for layer in LAYERS:
        gone = 1 - layer % 2
        silence_heads(model, layer, (2 * gone, 2 * gone + 1))
    assert_same_logits(model, tmp_path, Cut(LAYERS, heads=heads))


@pytest.mark.parametrize("name", [name for name in MULTI_HEAD if name in FREE_WIDTH])
def test_heads_of_their_own_whose_output_is_zero_can_be_cut(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    heads = {layer: one_group_of(4, ((layer + 1) % 4, (layer + 2) % 4)) for layer in LAYERS}
    for layer in LAYERS:
        silence_heads(model, layer, heads[layer].groups.removed)
    assert_same_logits(model, tmp_path, Cut(LAYERS, heads=heads))


def silence_layer(model: PreTrainedModel, layer: int) -> None:
    """Whatever the layer adds to the residual stream is zero: weights, biases, and norms after."""
    of = family_of(model.config.to_dict())
    with torch.no_grad():
        for path in (of.attention_output, of.down):
            for parameter in module(model, layer, path).parameters():
                parameter.zero_()


@pytest.mark.parametrize("dropped", [(1,), (0, 3)])
@pytest.mark.parametrize("name", VARIANTS)
def test_layers_that_add_nothing_can_be_dropped(
    name: str, dropped: tuple[int, ...], tmp_path: Path
) -> None:
    model = tiny_model(name)
    for layer in dropped:
        silence_layer(model, layer)
    kept = tuple(layer for layer in LAYERS if layer not in dropped)
    assert_same_logits(model, tmp_path, Cut(kept))


@torch.no_grad()
def silence_channels(model: PreTrainedModel, silent: Sequence[int]) -> None:
    """Nothing is ever written into these channels, and no norm's bias speaks from them.

    A LayerNorm subtracts the mean over all channels, so that zeros stay zero and count for nothing
    only where that mean is zero: there, all that is written has the mean zero over the others.
    """
    of = family_of(model.config.to_dict())
    centred = of.norm_kind.startswith("layer")
    loud = [channel for channel in range(32) if channel not in silent]
    written = [model.get_submodule(of.embedding).weight.T]
    for layer in LAYERS:
        for path in (of.attention_output, of.down):
            written += list(module(model, layer, path).parameters())
        for norm in of.norms:
            for name, parameter in module(model, layer, norm).named_parameters():
                if name == "bias":
                    parameter[list(silent)] = 0
    for parameter in written:
        parameter[list(silent)] = 0
        if centred:
            parameter[loud] = parameter[loud] - parameter[loud].mean(dim=0)
    if centred:
        model.get_submodule(of.final_norm).bias[list(silent)] = 0


SILENT = (0, 5, 6, 7, 13, 20, 30, 31)
LOUD = tuple(channel for channel in range(32) if channel not in SILENT)


@pytest.mark.parametrize("name", FREE_WIDTH)
def test_channels_that_are_always_zero_can_be_cut_where_norms_are_rescaled(
    name: str, tmp_path: Path
) -> None:
    model = tiny_model(name)
    silence_channels(model, SILENT)
    assert_same_logits(model, tmp_path, Cut(LAYERS, channels=LOUD, rescale_norms=True))


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in FREE_WIDTH])
def test_channels_and_heads_that_do_nothing_can_be_cut_together(name: str, tmp_path: Path) -> None:
    # Where hidden_size must be num_attention_heads * head_dim, neither can be cut alone.
    model = tiny_model(name)
    silence_channels(model, SILENT)
    heads = {layer: one_group_of(4, (1, 2, 3)) for layer in LAYERS}
    for layer in LAYERS:
        silence_heads(model, layer, (0,))
    cut = Cut(LAYERS, heads=heads, channels=LOUD, rescale_norms=True)
    assert_same_logits(model, tmp_path, cut)


@pytest.mark.parametrize("name", [name for name in VARIANTS if family(name).embedding_scaled])
def test_scaled_embeddings_and_their_head_make_up_for_fewer_channels_by_themselves(
    name: str, tmp_path: Path
) -> None:
    # Without rescale_norms only the root mean square differs, and by a known factor.
    model = tiny_model(name)
    silence_channels(model, SILENT)
    smaller = cut_model(model, tmp_path, Cut(LAYERS, channels=LOUD))
    whole, part = (m.get_input_embeddings()(IDS).detach() for m in (model, smaller))
    torch.testing.assert_close(part, whole[..., list(LOUD)])
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    hidden[:, list(SILENT)] = 0
    of = family(name)
    with torch.no_grad():
        before = model.get_output_embeddings()(model.get_submodule(of.final_norm)(hidden))
        after = smaller.get_output_embeddings()(
            smaller.get_submodule(of.final_norm)(hidden[:, list(LOUD)])
        )
    torch.testing.assert_close(after, before * (24 / 32) ** 0.5, rtol=1e-4, atol=1e-5)


# --- against a naive surgery -----------------------------------------------------------------

EVERYTHING = Cut(
    layers=(0, 2, 3),
    neurons=per_layer(range(0, 48, 3)),
    heads={layer: two_heads_of_four(layer) for layer in LAYERS},
    channels=LOUD,
)


def blocks(units: Iterable[int], width: int) -> list[int]:
    return [unit * width + place for unit in units for place in range(width)]


def test_every_tensor_of_llama_is_the_one_that_slicing_by_hand_gives(tmp_path: Path) -> None:
    model = tiny_model("llama, biased")
    before = model.state_dict()
    after = cut_model(model, tmp_path, EVERYTHING).state_dict()
    expected = {
        "model.embed_tokens.weight": before["model.embed_tokens.weight"][:, LOUD],
        "model.norm.weight": before["model.norm.weight"][list(LOUD)],
        "lm_head.weight": before["lm_head.weight"][:, LOUD],
    }
    assert EVERYTHING.neurons is not None
    for place, layer in enumerate((0, 2, 3)):
        queries = blocks([1, 3] if layer % 2 == 0 else [0, 2], 8)
        neurons = list(EVERYTHING.neurons[layer])
        everything = list(range(16))
        cuts = {
            "self_attn.q_proj": (queries, LOUD),
            "self_attn.k_proj": (everything, LOUD),
            "self_attn.v_proj": (everything, LOUD),
            "self_attn.o_proj": (LOUD, queries),
            "mlp.gate_proj": (neurons, LOUD),
            "mlp.up_proj": (neurons, LOUD),
            "mlp.down_proj": (LOUD, neurons),
        }
        for path, (rows, columns) in cuts.items():
            old, new = f"model.layers.{layer}.{path}", f"model.layers.{place}.{path}"
            expected[f"{new}.weight"] = before[f"{old}.weight"][list(rows)][:, list(columns)]
            expected[f"{new}.bias"] = before[f"{old}.bias"][list(rows)]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            old, new = f"model.layers.{layer}.{norm}", f"model.layers.{place}.{norm}"
            expected[f"{new}.weight"] = before[f"{old}.weight"][list(LOUD)]
    assert after.keys() == expected.keys()
    assert all(torch.equal(after[name], expected[name]) for name in expected)


def test_every_tensor_of_gpt_neox_is_the_one_that_slicing_by_hand_gives(tmp_path: Path) -> None:
    model = tiny_model("gpt_neox")
    before = model.state_dict()
    heads = {layer: one_group_of(4, (0, 1, 3)) for layer in LAYERS}
    after = cut_model(model, tmp_path, replace(EVERYTHING, heads=heads)).state_dict()
    loud = list(LOUD)
    expected = {
        "gpt_neox.embed_in.weight": before["gpt_neox.embed_in.weight"][:, loud],
        "gpt_neox.final_layer_norm.weight": before["gpt_neox.final_layer_norm.weight"][loud],
        "gpt_neox.final_layer_norm.bias": before["gpt_neox.final_layer_norm.bias"][loud],
        "lm_head.weight": before["lm_head.weight"][:, loud],
    }
    assert EVERYTHING.neurons is not None
    for place, layer in enumerate((0, 2, 3)):
        neurons = list(EVERYTHING.neurons[layer])
        cuts = {
            "attention.query_key_value": (blocks((0, 1, 3), 24), loud),
            "attention.dense": (loud, blocks((0, 1, 3), 8)),
            "mlp.dense_h_to_4h": (neurons, loud),
            "mlp.dense_4h_to_h": (loud, neurons),
        }
        for path, (rows, columns) in cuts.items():
            old, new = f"gpt_neox.layers.{layer}.{path}", f"gpt_neox.layers.{place}.{path}"
            expected[f"{new}.weight"] = before[f"{old}.weight"][rows][:, columns]
            expected[f"{new}.bias"] = before[f"{old}.bias"][rows]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            for kind in ("weight", "bias"):
                old = before[f"gpt_neox.layers.{layer}.{norm}.{kind}"]
                expected[f"gpt_neox.layers.{place}.{norm}.{kind}"] = old[loud]
    assert after.keys() == expected.keys()
    assert all(torch.equal(after[name], expected[name]) for name in expected)


# --- head residual ---------------------------------------------------------------------------


@pytest.mark.parametrize(("total", "kept"), [(2, 1), (4, 3), (4, 2), (4, 1), (8, 3), (5, 5)])
def test_the_last_kept_units_absorb_the_first_removed_ones(total: int, kept: int) -> None:
    order = list(reversed(range(total)))  # the best unit is the last
    found = Ranking(tuple(order[:kept]), tuple(order[kept:])).absorbs
    head = dict(enumerate(order, start=1))  # as the paper counts
    first = max(1, 2 * kept - total + 1)
    expected = {head[i]: head[2 * kept - i + 1] for i in range(first, kept + 1)}
    assert found == expected


def naive_residual(rows: Tensor, width: int, ranking: Ranking) -> Tensor:
    """The rows of the units that stay, in the source's order, each a loop over its numbers."""
    order = [*ranking.kept, *ranking.removed]
    total, stay = len(order), len(ranking.kept)
    found = []
    for unit in sorted(ranking.kept):
        block = rows[unit * width : unit * width + width].clone()
        i = order.index(unit) + 1
        if max(1, 2 * stay - total + 1) <= i <= stay:
            other = order[2 * stay - i + 1 - 1]
            block += block - rows[other * width : other * width + width]
        found.append(block)
    return torch.cat(found)


def test_query_heads_absorb_inside_their_group_and_nothing_else_changes(tmp_path: Path) -> None:
    config = tiny_config("qwen2") | {"num_attention_heads": 8, "head_dim": 4}
    model = checkpoints.new_model(config, seed=0)
    nn.init.normal_(model.model.layers[1].self_attn.q_proj.bias)
    before = model.state_dict()
    rankings = {0: Ranking((2, 0, 3), (1,)), 1: Ranking((7, 4, 5), (6,))}
    heads = {layer: Heads(Ranking((1, 0)), rankings) for layer in LAYERS}
    after = cut_model(model, tmp_path, Cut(LAYERS, heads=heads, head_residual=True)).state_dict()
    for kind in ("weight", "bias"):
        name = f"model.layers.1.self_attn.q_proj.{kind}"
        inside = [
            naive_residual(before[name][:16], 4, rankings[0]),
            naive_residual(before[name][16:], 4, Ranking((3, 0, 1), (2,))),
        ]
        torch.testing.assert_close(after[name], torch.cat(inside))
    same = [name for name in before if "q_proj" not in name and "o_proj" not in name]
    assert all(torch.equal(after[name], before[name]) for name in same)
    output = before["model.layers.1.self_attn.o_proj.weight"]
    kept = output[:, blocks((0, 2, 3, 4, 5, 7), 4)]
    assert torch.equal(after["model.layers.1.self_attn.o_proj.weight"], kept)


@pytest.mark.parametrize("name", MULTI_HEAD)
def test_a_head_of_its_own_absorbs_with_query_key_and_value(name: str, tmp_path: Path) -> None:
    ranking = Ranking((3, 0), (2, 1))
    heads = {layer: one_group_of(4, (3, 0)) for layer in LAYERS}
    heads = {layer: replace(found, groups=ranking) for layer, found in heads.items()}
    cut = Cut(LAYERS, heads=heads, channels=tuple(range(16)), head_residual=True)
    model = tiny_model(name)
    before, after = model.state_dict(), cut_model(model, tmp_path, cut).state_dict()
    of, checked = family(name), 0
    for path in (of.fused_query_key_value, of.query, of.key, of.value):
        for kind in ("weight", "bias"):
            tensor = before.get(f"{of.layers}.2.{path}.{kind}")
            if tensor is not None:
                width = 24 if path == of.fused_query_key_value else 8
                expected = naive_residual(tensor, width, ranking)
                expected = expected[:, :16] if kind == "weight" else expected
                torch.testing.assert_close(after[f"{of.layers}.2.{path}.{kind}"], expected)
                checked += 1
    assert checked >= 2


def test_whole_groups_take_no_residual_under_grouped_query_attention(tmp_path: Path) -> None:
    heads = {layer: one_group_of(2, (1,)) for layer in LAYERS}
    model = tiny_model("llama")
    plain = cut_model(model, tmp_path / "plain", Cut(LAYERS, heads=heads))
    absorbed = cut_model(model, tmp_path / "on", Cut(LAYERS, heads=heads, head_residual=True))
    assert torch.equal(logits(plain), logits(absorbed))


# --- sizes -----------------------------------------------------------------------------------


def random_cut(name: str, rescale: bool) -> Cut:
    """Every axis at once, the residual too."""
    heads = {layer: two_heads_of_four(layer) for layer in LAYERS}
    if name in MULTI_HEAD:
        heads = {layer: one_group_of(4, (3, 1)) for layer in LAYERS}
    return Cut(
        layers=(1, 2, 3),
        neurons=per_layer(range(1, 48, 5)),
        heads=heads,
        channels=tuple(range(3, 19)),
        head_residual=True,
        rescale_norms=rescale,
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_a_model_cut_on_every_axis_has_the_predicted_parameters_and_generates(
    name: str, tmp_path: Path
) -> None:
    cut = random_cut(name, rescale=True)
    smaller = cut_model(tiny_model(name), tmp_path, cut)
    shape = shape_of(tiny_config(name))
    groups = 2
    assert cut.sizes(shape) == Sizes(3, 16, 10, 2, groups)
    assert problems_with(shape, cut.sizes(shape)) == []
    predicted = shape.resized(cut.sizes(shape)).parameters
    assert checkpoints.count_parameters(smaller) == predicted
    assert shape_of(checkpoints.read_config(tmp_path / "target")).parameters == predicted
    made = smaller.generate(IDS, min_new_tokens=3, max_new_tokens=3, do_sample=False)
    assert made.shape == (2, 15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox"])
def test_the_type_of_every_tensor_is_kept(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    smaller = cut_model(tiny_model(name).to(dtype), tmp_path, random_cut(name, rescale=True))
    assert {tensor.dtype for tensor in tensors(tmp_path / "target").values()} == {dtype}
    assert logits(smaller).isfinite().all()


@pytest.mark.parametrize("name", ["gemma2", "gpt_neox", "llama, biased"])
@pytest.mark.parametrize("rows_bytes", [1, 700])
def test_neither_shards_nor_the_number_of_rows_read_at_once_change_a_tensor(
    name: str, rows_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cut = tiny_model(name), random_cut(name, rescale=True)
    operate(saved(model, tmp_path / "whole"), tmp_path / "a", cut)
    parts = saved(model, tmp_path / "parts", max_shard_size="10KB")
    assert len(list(parts.glob("*.safetensors"))) > 3
    monkeypatch.setattr(surgery, "ROWS_BYTES", rows_bytes)
    operate(parts, tmp_path / "b", cut)
    one, other = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == other.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in other.values())


def test_what_is_written_is_a_proper_safetensors_file_with_aligned_data(tmp_path: Path) -> None:
    source = saved(tiny_model("llama"), tmp_path / "source")
    mixed = load_file(source / "model.safetensors")
    mixed["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(4, dtype=torch.float64)
    mixed["model.norm.weight"] = mixed["model.norm.weight"].to(torch.bfloat16)
    save_file(mixed, source / "model.safetensors", metadata={"format": "pt"})
    operate(source, tmp_path / "target", Cut((0,), channels=tuple(range(24, 31))))
    file = tmp_path / "target" / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    with file.open("rb") as stream:
        stored = surgery.read_header(stream)
    assert all(tensor.start % tensor.torch_dtype.itemsize == 0 for tensor in stored.values())
    found = load_file(file)
    assert found["model.norm.weight"].dtype == torch.bfloat16
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    assert torch.equal(found[buffer], mixed[buffer])


# --- configs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gemma3_text"])
def test_a_layer_keeps_its_kind_though_config_json_leaves_the_kinds_to_defaults(
    name: str, tmp_path: Path
) -> None:
    model = tiny_model(name)
    source = saved(model, tmp_path / "source")
    config = checkpoints.read_config(source)
    kinds = config.pop("layer_types")
    (source / "config.json").write_text(json.dumps(config))
    operate(source, tmp_path / "target", Cut((1, 2)))
    assert len(set(kinds)) == 2
    assert checkpoints.read_config(tmp_path / "target")["layer_types"] == kinds[1:3]


def test_settings_of_another_axis_stay_as_they_were(tmp_path: Path) -> None:
    before = tiny_config("gemma2") | {"rms_norm_eps": 1e-5, "note": "kept"}
    after = surgery.pruned_config(before, Cut((0, 1), neurons=per_layer(range(8))))
    changed = {"num_hidden_layers": 2, "intermediate_size": 8}
    kinds = {"layer_types": ["sliding_attention", "full_attention"]}
    assert after == before | changed | kinds


def test_epsilon_follows_the_channels_only_where_norms_are_rescaled() -> None:
    config = tiny_config("gpt_neox")  # silent about its epsilon
    cut = random_cut("gpt_neox", rescale=True)
    assert surgery.pruned_config(config, cut)["layer_norm_eps"] == pytest.approx(2e-5)
    plain = surgery.pruned_config(config, replace(cut, rescale_norms=False))
    assert "layer_norm_eps" not in plain
    assert "head_dim" not in plain
    assert "num_key_value_heads" not in plain


def test_heads_keep_their_width_where_the_config_left_it_to_the_hidden_size() -> None:
    config = tiny_config("llama")
    del config["head_dim"]
    assert surgery.pruned_config(config, random_cut("llama", rescale=False))["head_dim"] == 8


# --- what is refused -------------------------------------------------------------------------


def test_a_tensor_that_the_family_does_not_describe_is_refused(tmp_path: Path) -> None:
    source = saved(tiny_model("llama"), tmp_path / "source")
    extra = load_file(source / "model.safetensors") | {"model.layers.0.extra.weight": torch.ones(2)}
    save_file(extra, source / "model.safetensors")
    with pytest.raises(StageError, match=r"model\.layers\.0\.extra\.weight"):
        operate(source, tmp_path / "target", Cut(LAYERS))


def test_a_file_that_ends_too_soon_is_refused(tmp_path: Path) -> None:
    source = saved(tiny_model("llama"), tmp_path / "source")
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(StageError, match="ends before its data"):
        operate(source, tmp_path / "target", Cut(LAYERS))


# --- a new family ----------------------------------------------------------------------------

PAGE = Path(__file__).parents[1] / "docs" / "families.md"


def test_the_family_that_the_page_adds_can_be_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = PAGE.read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.setitem(FAMILIES, "starcoder2", eval(example, {"Family": Family}))
    model = tiny_model("starcoder2")
    kept = per_layer(range(0, 48, 2))
    with torch.no_grad():
        for layer in LAYERS:
            idle = [unit for unit in range(48) if unit not in kept[layer]]
            module(model, layer, "mlp.c_proj").weight[:, idle] = 0
    silence_channels(model, SILENT)
    cut = Cut(LAYERS, neurons=kept, channels=LOUD, rescale_norms=True)
    assert_same_logits(model, tmp_path, cut)
    shape = shape_of(checkpoints.read_config(tmp_path / "target"))
    whole = shape_of(tiny_config("starcoder2"))
    predicted = whole.resized(cut.sizes(whole))
    assert shape.parameters == predicted.parameters
    assert shape.parameters == checkpoints.count_parameters(
        checkpoints.load_model(tmp_path / "target")
    )


def test_the_page_names_every_family_and_every_field() -> None:
    page = PAGE.read_text()
    names = {field.name for field in fields(Family)} - {"model_type"}
    assert [name for name in (*FAMILIES, *names) if f"`{name}`" not in page] == []
