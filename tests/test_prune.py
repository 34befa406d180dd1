"""Surgery: what is kept stays as it was, and what comes out needs no code of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeContext, SaveArtifact
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from trainers import checkpoints, prune
from trainers.config import AtRandom, ByList, ByScore, PruneConfig
from trainers.contract import StageError
from trainers.shapes import shape_of

IDS = torch.arange(24).reshape(2, 12)


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        found: Tensor = checkpoints.load_model(folder)(IDS).logits
    return found


def dropping(*layers: int) -> PruneConfig:
    return PruneConfig(num_hidden_layers=4 - len(layers), choice=ByList(drop=layers))


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
    prune.drop_layers(artifact / "model", source, ())
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
    prune.drop_layers(artifact / "model", tmp_path / "expected", (3,))
    assert torch.equal(logits(context.out / "model"), logits(tmp_path / "expected"))


def test_weights_in_another_form_beside_the_checkpoint_are_left_alone(
    artifact: Path, tmp_path: Path
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    checkpoints.link_folder(artifact / "model", source)
    save_file({"layers.0.wq": torch.zeros(2)}, source / "consolidated.safetensors")
    prune.drop_layers(source, target, (0,))
    assert [file.name for file in target.glob("*.safetensors*")] == ["model.safetensors"]


def test_a_folder_without_safetensors_is_refused(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((artifact / "model" / "config.json").read_bytes())
    with pytest.raises(StageError, match=r"holds no model\.safetensors"):
        prune.drop_layers(tmp_path, tmp_path / "target", (0,))


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
    prune.drop_layers(tmp_path / "whole", tmp_path / "cut", (0, 2))
    assert checkpoints.read_config(tmp_path / "cut")["layer_types"] == [kinds[1], kinds[3]]
    model = checkpoints.load_model(tmp_path / "cut")
    assert [layer.self_attn.layer_type for layer in model.model.layers] == [kinds[1], kinds[3]]


def test_random_weights_have_the_pruned_shape_and_come_from_the_seed(
    artifact: Path, make_context: MakeContext
) -> None:
    config = PruneConfig(num_hidden_layers=3, choice=ByList(drop=(1,)), initialise="random")
    found = {}
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        context = make_context(config, out=out, seed=seed, model=artifact)
        prune.run(context)
        found[out] = logits(context.out / "model")
        shape = shape_of(checkpoints.read_config(context.out / "model"))
        assert shape == shape_of(checkpoints.read_config(context.out / "model"))
        assert shape.num_hidden_layers == 3
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


# --- choice ----------------------------------------------------------------------------------

SCORES = {(1, 0): 0.9, (1, 1): 0.2, (1, 2): 0.8, (1, 3): 0.1, (2, 1): 0.5, (2, 2): 0.4, (2, 3): 0.4}


def by_score(keep: int, contiguous: bool) -> PruneConfig:
    return PruneConfig(num_hidden_layers=keep, choice=ByScore(contiguous=contiguous))


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
    context = make_context(by_score(2, False), model=artifact, importance=tmp_path)
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
    choice = PruneConfig(
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
    config = PruneConfig(num_hidden_layers=keep, choice=ByList(drop=drop))
    with pytest.raises(StageError, match=message):
        prune.choose(config, 4, {}, seed=0)
