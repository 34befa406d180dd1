"""What a layer is worth: equal to measuring by hand, and never at the model's cost."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import MakeContext, SaveArtifact
from torch import Tensor
from transformers import PreTrainedModel

from trainers import checkpoints, corpus, importance, prune, questions
from trainers.config import (
    BlockInfluence,
    GeneratedCorpus,
    GeneratedTask,
    ImportanceConfig,
    Perplexity,
    TaskAccuracy,
)
from trainers.contract import StageError, read_rows
from trainers.evaluate import lm_loss

CORPUS = GeneratedCorpus(block_length=16, training_blocks=4, calibration_blocks=11)
IDLE = 2
"""The layer of `with_idle_layer` that adds nothing to what passes it."""


@pytest.fixture(scope="module")
def with_idle_layer(tiny_config: dict[str, Any], save_artifact: SaveArtifact) -> Path:
    """A model with one layer that is the identity: attention and MLP both write zeros."""
    model = checkpoints.new_model(tiny_config, seed=4)
    with torch.no_grad():
        model.model.layers[IDLE].self_attn.o_proj.weight.zero_()
        model.model.layers[IDLE].mlp.down_proj.weight.zero_()
    return save_artifact(model)


@pytest.fixture
def blocks(artifact: Path) -> Tensor:
    return corpus.blocks(CORPUS, artifact / "model", "calibration")


def without_layers(model: PreTrainedModel, first: int, length: int) -> PreTrainedModel:
    """A new model, made from the weights of the layers that remain."""
    config = {**model.config.to_dict(), "num_hidden_layers": 4 - length}
    smaller = checkpoints.new_model(config, seed=1).eval()
    kept = [layer for layer in range(4) if not first <= layer < first + length]
    for place, layer in enumerate(kept):
        smaller.model.layers[place].load_state_dict(model.model.layers[layer].state_dict())
    smaller.model.embed_tokens.load_state_dict(model.model.embed_tokens.state_dict())
    smaller.model.norm.load_state_dict(model.model.norm.state_dict())
    return smaller


def scores(out: Path, name: str = "importance") -> dict[tuple[int, int], float]:
    """(block length, last layer) -> value."""
    rows = read_rows(out / "scores.jsonl")
    return {(row["block_length"], row["last"]): row["value"] for row in rows if row["name"] == name}


def config_of(criterion: Any, lengths: tuple[int, ...] = (1, 2)) -> ImportanceConfig:
    return ImportanceConfig(criterion=criterion, corpus=CORPUS, block_lengths=lengths)


# --- leaving layers out ----------------------------------------------------------------------


@pytest.mark.parametrize(("first", "length"), [(0, 1), (3, 1), (1, 2), (0, 3)])
def test_a_model_without_a_block_equals_one_built_from_the_other_layers(
    model: PreTrainedModel, blocks: Tensor, first: int, length: int
) -> None:
    with torch.no_grad():
        expected = without_layers(model, first, length)(blocks).logits
        with importance.left_out(model, first, length) as shorter:
            found = shorter(blocks).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_layers_of_several_kinds_keep_their_kind_when_others_are_left_out() -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
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
        "initializer_range": 0.3,
    }
    model = checkpoints.new_model(config, seed=0).eval()
    smaller = checkpoints.new_model(
        config | {"num_hidden_layers": 3, "layer_types": kinds[1:]}, seed=1
    ).eval()
    for place in range(3):
        smaller.model.layers[place].load_state_dict(model.model.layers[place + 1].state_dict())
    smaller.model.embed_tokens.load_state_dict(model.model.embed_tokens.state_dict())
    smaller.lm_head.load_state_dict(model.lm_head.state_dict())
    ids = torch.arange(12)[None]
    with torch.no_grad(), importance.left_out(model, 0, 1) as shorter:
        torch.testing.assert_close(shorter(ids).logits, smaller(ids).logits, rtol=0, atol=1e-6)
    assert model.config.layer_types == kinds


@pytest.mark.parametrize("failing", [False, True])
def test_the_model_is_whole_again_after_a_block_was_left_out(
    model: PreTrainedModel, blocks: Tensor, failing: bool
) -> None:
    before = model(blocks).logits.detach()
    layers = list(model.model.layers)
    try:
        with importance.left_out(model, 1, 2):
            assert len(model.model.layers) == model.config.num_hidden_layers == 2
            if failing:
                raise RuntimeError
    except RuntimeError:
        pass
    assert list(model.model.layers) == layers
    assert model.config.num_hidden_layers == 4
    assert torch.equal(model(blocks).logits, before)


def test_every_contiguous_block_of_each_length_is_scored() -> None:
    assert importance.blocks_of_layers(4, (1, 3)) == [
        (0, 1),
        (1, 1),
        (2, 1),
        (3, 1),
        (0, 3),
        (1, 3),
    ]


# --- Block Influence -------------------------------------------------------------------------


def residual_stream(model: PreTrainedModel, blocks: Tensor) -> list[Tensor]:
    """What goes into each layer, and what comes out of the last, before the final norm."""
    stream: list[Tensor] = []
    last = model.model.layers[-1].register_forward_hook(
        lambda _module, _inputs, output: stream.append(
            output[0] if isinstance(output, tuple) else output
        )
    )
    with torch.no_grad():
        hidden = model(blocks, output_hidden_states=True).hidden_states
    last.remove()
    return [*hidden[:-1], stream[0]]


@pytest.mark.parametrize("lengths", [(1,), (1, 2, 3)])
def test_block_influence_equals_one_minus_the_mean_cosine_of_every_block(
    model: PreTrainedModel, blocks: Tensor, lengths: tuple[int, ...]
) -> None:
    ticks: list[int] = []
    found = importance.block_influence(model, blocks, lengths, ticks.append)
    stream = residual_stream(model, blocks)
    assert len(stream) == 5
    naive = {
        (first, length): 1
        - float(F.cosine_similarity(stream[first], stream[first + length], dim=-1).mean())
        for length in lengths
        for first in range(4 - length + 1)
    }
    assert found == pytest.approx(naive, abs=1e-5)
    assert sum(ticks) == len(blocks)
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)


# --- the stage -------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", [Perplexity(samples=9), BlockInfluence(samples=9)])
def test_a_layer_that_does_nothing_scores_zero_and_is_dropped_first(
    with_idle_layer: Path, make_context: MakeContext, criterion: Perplexity | BlockInfluence
) -> None:
    context = make_context(config_of(criterion), model=with_idle_layer)
    importance.run(context)
    found = scores(context.out)
    assert found[1, IDLE] == pytest.approx(0, abs=1e-5)
    others = [value for (length, last), value in found.items() if (length, last) != (1, IDLE)]
    assert min(map(abs, others)) > 1e-3
    if criterion.kind == "block_influence":
        assert prune.single_layers(found, 1) == (IDLE,)


def test_perplexity_importance_is_the_rise_of_the_loss(
    artifact: Path, model: PreTrainedModel, blocks: Tensor, make_context: MakeContext
) -> None:
    context = make_context(config_of(Perplexity(samples=5)), model=artifact)
    result = importance.run(context)
    intact = lm_loss(model, blocks[:5])
    naive = {
        (length, first + length - 1): lm_loss(without_layers(model, first, length), blocks[:5])
        for length in (1, 2)
        for first in range(4 - length + 1)
    }
    assert scores(context.out, "lm_loss") == pytest.approx(naive | {(0, -1): intact}, abs=1e-6)
    rises = {place: value - intact for place, value in naive.items()}
    assert scores(context.out) == pytest.approx(rises, abs=1e-6)
    assert result.tokens == 5 * 16 * (1 + 7)


def test_scoring_leaves_the_checkpoint_as_it_was(artifact: Path, make_context: MakeContext) -> None:
    files = sorted((artifact / "model").iterdir())
    before = [file.read_bytes() for file in files]
    for kind in (Perplexity(samples=2), BlockInfluence(samples=2)):
        importance.run(make_context(config_of(kind), model=artifact))
    assert [file.read_bytes() for file in sorted((artifact / "model").iterdir())] == before


def test_progress_is_told_to_the_end(artifact: Path, make_context: MakeContext) -> None:
    class Listen:
        heard: list[tuple[int, int]]

        def __init__(self) -> None:
            self.heard = []

        def report(self, done: int, total: int, values: Any) -> None:
            self.heard.append((done, total))

    for criterion in (Perplexity(samples=3), BlockInfluence(samples=11)):
        reporter = Listen()
        importance.run(make_context(config_of(criterion), reporter=reporter, model=artifact))
        assert reporter.heard == sorted(reporter.heard)
        assert reporter.heard[-1][0] == reporter.heard[-1][1]


def test_a_block_as_long_as_the_model_is_an_error(
    artifact: Path, make_context: MakeContext
) -> None:
    with pytest.raises(StageError, match="block of 4 layers out of 4"):
        importance.run(make_context(config_of(Perplexity(), (1, 4)), model=artifact))


@pytest.mark.parametrize("criterion", [Perplexity(samples=2), BlockInfluence(samples=2)])
def test_a_score_that_is_not_a_number_is_an_error_that_names_the_layer(
    tiny_config: dict[str, Any],
    save_artifact: SaveArtifact,
    make_context: MakeContext,
    criterion: Perplexity | BlockInfluence,
) -> None:
    model = checkpoints.new_model(tiny_config, seed=0)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(math.nan)
    context = make_context(config_of(criterion, (1,)), model=save_artifact(model))
    broken = "intact model" if criterion.kind == "perplexity" else "layer 1"
    with pytest.raises(StageError, match=f"nan.*{broken}"):
        importance.run(context)
    assert not (context.out / "scores.jsonl").exists()


def test_a_score_lost_with_one_layer_names_that_layer() -> None:
    rows = [importance._row("perplexity", 3, 2, "lm_loss", math.inf)]
    with pytest.raises(StageError, match="inf without the 2 layers that end at layer 4"):
        importance._check(rows)


# --- by a task -------------------------------------------------------------------------------


def answer(correct: float, score: float | None) -> questions.Answer:
    return questions.Answer("made_up", f"{correct}{score}", "select", correct, score)


def harm(
    monkeypatch: pytest.MonkeyPatch, intact: list[questions.Answer], found: list[questions.Answer]
) -> float:
    told = iter([intact, found])
    monkeypatch.setattr(questions, "ask", lambda *_: next(told))
    measure = importance._accuracy((), None)
    return importance._harm(measure(None), measure(None))


def test_one_question_more_outvotes_any_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    intact = [answer(1, 5.0)] * 400
    few_lost = [answer(1, -1e6)] * 399 + [answer(0, -1e6)]
    more_lost = [answer(1, 1e6)] * 398 + [answer(0, 1e6)] * 2
    assert harm(monkeypatch, intact, few_lost) < harm(monkeypatch, intact, more_lost)


def test_equal_accuracies_are_ranked_by_the_mean_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    intact = [answer(1, 2.0), answer(0, -1.0)]
    sure, unsure = (
        [answer(1, 1.5), answer(0, -1.0)],
        [answer(0, -0.1), answer(1, 0.1)],
    )
    found = [harm(monkeypatch, intact, sure), harm(monkeypatch, intact, unsure)]
    assert found[0] < found[1]
    assert found == pytest.approx([0, 0], abs=1e-6)


def test_answers_without_margins_are_ranked_by_accuracy_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    intact, found = [answer(1, None), answer(1, None)], [answer(1, None), answer(0, None)]
    assert harm(monkeypatch, intact, found) == 0.5


def test_task_importance_is_the_fall_of_accuracy(
    with_idle_layer: Path, make_context: MakeContext
) -> None:
    task = GeneratedTask(name="agreement", limit=40)
    context = make_context(config_of(TaskAccuracy(tasks=(task,)), (1,)), model=with_idle_layer)
    importance.run(context)
    accuracy, found = scores(context.out, "accuracy"), scores(context.out)
    intact = accuracy.pop((0, -1))
    assert found == pytest.approx(
        {place: intact - value for place, value in accuracy.items()}, abs=1e-6
    )
    assert found[1, IDLE] == pytest.approx(0, abs=1e-9)
