"""What a layer is worth: equal to measuring by hand, and never at the model's cost."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeContext, SaveArtifact
from families_at_hand import VARIANTS, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from trainers import (
    ablation,
    activations,
    checkpoints,
    corpus,
    importance,
    language,
    questions,
    scorer,
)
from trainers.activations import ActivationStatistics
from trainers.config import (
    Activations,
    GeneratedCorpus,
    GeneratedTask,
    ImportanceConfig,
    Perplexity,
    TaskAccuracy,
)
from trainers.contract import StageError, read_rows
from trainers.evaluate import BLOCKS_A_BATCH, lm_loss
from trainers.shapes import shape_of

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


def config_of(criterion: Any) -> ImportanceConfig:
    return ImportanceConfig(criterion=criterion, corpus=CORPUS)


def perplexity(samples: int, lengths: tuple[int, ...] = (1, 2)) -> Perplexity:
    return Perplexity(samples=samples, block_lengths=lengths)


# --- leaving layers out ----------------------------------------------------------------------


@pytest.mark.parametrize(("first", "length"), [(0, 1), (3, 1), (1, 2), (0, 3)])
def test_a_model_without_a_block_equals_one_built_from_the_other_layers(
    model: PreTrainedModel, blocks: Tensor, first: int, length: int
) -> None:
    with torch.no_grad():
        expected = without_layers(model, first, length)(blocks).logits
        with ablation.left_out(model, first, length) as shorter:
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
    with torch.no_grad(), ablation.left_out(model, 0, 1) as shorter:
        torch.testing.assert_close(shorter(ids).logits, smaller(ids).logits, rtol=0, atol=1e-6)
    assert model.config.layer_types == kinds


@pytest.mark.parametrize("failing", [False, True])
def test_the_model_is_whole_again_after_a_block_was_left_out(
    model: PreTrainedModel, blocks: Tensor, failing: bool
) -> None:
    before = model(blocks).logits.detach()
    layers = list(model.model.layers)
    try:
        with ablation.left_out(model, 1, 2):
            assert len(model.model.layers) == model.config.num_hidden_layers == 2
            if failing:
                raise RuntimeError
    except RuntimeError:
        pass
    assert list(model.model.layers) == layers
    assert model.config.num_hidden_layers == 4
    assert torch.equal(model(blocks).logits, before)


def test_every_contiguous_block_of_each_length_is_scored() -> None:
    assert ablation.blocks_of_layers(4, (1, 3)) == [
        (0, 1),
        (1, 1),
        (2, 1),
        (3, 1),
        (0, 3),
        (1, 3),
    ]


# --- for the price of the layers behind ------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_hidden_states_without_a_block_equal_those_of_really_leaving_it_out(name: str) -> None:
    model = tiny_model(name)
    ids = torch.randint(64, (3, 12), generator=torch.Generator().manual_seed(0))
    places = ablation.blocks_of_layers(4, (1, 2, 3))
    intact, *found = ablation.hidden_without(model, ids, places)
    assert torch.equal(intact, checkpoints.final_hidden(model, ids))
    for (first, length), hidden in zip(places, found, strict=True):
        with ablation.left_out(model, first, length) as shorter:
            expected = checkpoints.final_hidden(shorter, ids)
        torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-5)
    assert not any(layer._forward_pre_hooks for layer in activations.layers_of(model))


@pytest.mark.parametrize("name", VARIANTS)
def test_losses_without_a_block_equal_those_of_really_leaving_it_out(name: str) -> None:
    model = tiny_model(name)
    ids = torch.randint(64, (11, 12), generator=torch.Generator().manual_seed(0))
    places = ablation.blocks_of_layers(4, (1, 3))
    told: list[int] = []
    intact, *found = importance.losses_without(model, ids, places, told.append)
    assert sum(told) == len(ids) * (1 + len(places))
    assert max(told) <= BLOCKS_A_BATCH, "or one could not stop it between two models"
    assert intact == pytest.approx(lm_loss(model, ids), abs=1e-6)
    for (first, length), loss in zip(places, found, strict=True):
        with ablation.left_out(model, first, length) as shorter, torch.no_grad():
            expected = float(shorter(input_ids=ids, labels=ids).loss)
        assert loss == pytest.approx(expected, abs=1e-5)


def test_only_the_layers_behind_a_block_are_paid_for(tiny_config: dict[str, Any]) -> None:
    shape = shape_of(tiny_config)
    head = 2 * 100 * shape.vocab_size * shape.hidden_size
    layer = (shape.forward_flops(100, 10) - head - 2 * 100 * shape.hidden_size) / 4
    norm = 2 * 100 * shape.hidden_size
    found = importance.flops_of(shape, 100, 10, [(0, 1), (1, 2), (3, 1)], head=True)
    assert found == pytest.approx((4 + 3 + 1 + 0) * layer + 4 * (head + norm))
    alone = importance.flops_of(shape, 100, 10, [(0, 1), (1, 2), (3, 1)], head=False)
    assert found - alone == pytest.approx(4 * head)


# --- the stage -------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", [perplexity(9), Activations(samples=9)])
def test_a_layer_that_does_nothing_scores_zero_and_every_other_more(
    with_idle_layer: Path, make_context: MakeContext, criterion: Perplexity | Activations
) -> None:
    context = make_context(config_of(criterion), model=with_idle_layer)
    importance.run(context)
    found = scores(context.out)
    assert found[1, IDLE] == pytest.approx(0, abs=1e-5)
    others = [value for (length, last), value in found.items() if (length, last) != (1, IDLE)]
    assert min(map(abs, others)) > 1e-3


def test_activation_importance_scores_every_block_and_every_unit(
    artifact: Path, model: PreTrainedModel, blocks: Tensor, make_context: MakeContext
) -> None:
    context = make_context(config_of(Activations(samples=9)), model=artifact)
    result = importance.run(context)
    statistics, influence = activations.collect(model, drawn(blocks, 9))
    expected = {(n, first + n - 1): value for (first, n), value in influence.items()}
    assert len(expected) == 4 + 3 + 2 + 1
    for name in ("importance", "block_influence"):
        assert scores(context.out, name) == pytest.approx(expected, abs=1e-7)
    assert {row["criterion"] for row in read_rows(context.out / "scores.jsonl")} == {
        "block_influence"
    }
    written = ActivationStatistics.load(context.out / activations.FILE)
    assert written.samples == 9
    for name, sums in statistics.sums.items():
        torch.testing.assert_close(written.sums[name], sums)
    assert result.tokens == 9 * 16


def test_perplexity_importance_is_the_rise_of_the_loss(
    artifact: Path, model: PreTrainedModel, blocks: Tensor, make_context: MakeContext
) -> None:
    context = make_context(config_of(perplexity(5)), model=artifact)
    result = importance.run(context)
    read = drawn(blocks, 5)
    intact = lm_loss(model, read)
    naive = {
        (length, first + length - 1): lm_loss(without_layers(model, first, length), read)
        for length in (1, 2)
        for first in range(4 - length + 1)
    }
    assert scores(context.out, "lm_loss") == pytest.approx(naive | {(0, -1): intact}, abs=1e-6)
    rises = {place: value - intact for place, value in naive.items()}
    assert scores(context.out) == pytest.approx(rises, abs=1e-6)
    assert result.tokens == 5 * 16
    whole = shape_of(model.config.to_dict()).forward_flops(5 * 16, 16)
    assert whole < result.flops < (1 + 7) * whole


def drawn(blocks: Tensor, samples: int, seed: int = 0) -> Tensor:
    return blocks[corpus.drawn_blocks(len(blocks), 1, samples, seed)]


@pytest.mark.parametrize(("samples", "differ"), [(5, True), (11, False)])
def test_seeds_measure_on_other_calibration_blocks_unless_all_are_read(
    artifact: Path, make_context: MakeContext, samples: int, differ: bool
) -> None:
    found = []
    for seed in (0, 1):
        context = make_context(
            config_of(perplexity(samples)), model=artifact, seed=seed, out=f"seed{seed}"
        )
        importance.run(context)
        found.append(scores(context.out))
    assert (found[0] != found[1]) is differ


def test_scoring_leaves_the_checkpoint_as_it_was(artifact: Path, make_context: MakeContext) -> None:
    files = sorted((artifact / "model").iterdir())
    before = [file.read_bytes() for file in files]
    for kind in (perplexity(2), Activations(samples=2)):
        importance.run(make_context(config_of(kind), model=artifact))
    assert [file.read_bytes() for file in sorted((artifact / "model").iterdir())] == before


def test_progress_is_told_to_the_end(artifact: Path, make_context: MakeContext) -> None:
    class Listen:
        heard: list[tuple[int, int]]

        def __init__(self) -> None:
            self.heard = []

        def report(self, done: int, total: int, values: Any) -> None:
            self.heard.append((done, total))

    task = GeneratedTask(name="agreement", limit=40)
    by_task = TaskAccuracy(tasks=(task, task), block_lengths=(1,))
    for criterion in (perplexity(3), Activations(samples=11), by_task):
        reporter = Listen()
        importance.run(make_context(config_of(criterion), reporter=reporter, model=artifact))
        assert reporter.heard == sorted(reporter.heard)
        assert reporter.heard[-1][0] == reporter.heard[-1][1]


def test_a_block_as_long_as_the_model_is_an_error(
    artifact: Path, make_context: MakeContext
) -> None:
    with pytest.raises(StageError, match="block of 4 layers out of 4"):
        importance.run(make_context(config_of(perplexity(2, (1, 4))), model=artifact))


@pytest.mark.parametrize(
    ("criterion", "broken"),
    [
        (perplexity(2, (1,)), "lm_loss is nan for the intact model"),
        (Activations(samples=2), "activations of layer 1's output are not finite"),
    ],
)
def test_a_score_that_is_not_a_number_is_an_error_that_names_the_place(
    tiny_config: dict[str, Any],
    save_artifact: SaveArtifact,
    make_context: MakeContext,
    criterion: Perplexity | Activations,
    broken: str,
) -> None:
    model = checkpoints.new_model(tiny_config, seed=0)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(math.nan)
    context = make_context(config_of(criterion), model=save_artifact(model))
    with pytest.raises(StageError, match=broken):
        importance.run(context)
    assert not list(context.out.iterdir())


def test_a_score_lost_with_one_layer_names_that_layer() -> None:
    rows = [importance._row("perplexity", 3, 2, "lm_loss", math.inf)]
    with pytest.raises(StageError, match="inf without the 2 layers that end at layer 4"):
        importance._check(rows)


# --- by a task -------------------------------------------------------------------------------


def answer(correct: float, score: float | None) -> questions.Answer:
    return questions.Answer("made_up", f"{correct}{score}", "select", correct, score)


def harm(intact: list[questions.Answer], found: list[questions.Answer]) -> float:
    return importance._harm(
        importance._accuracy(intact, "select"), importance._accuracy(found, "select")
    )


def test_one_question_more_outvotes_any_margin() -> None:
    intact = [answer(1, 5.0)] * 400
    few_lost = [answer(1, -1e6)] * 399 + [answer(0, -1e6)]
    more_lost = [answer(1, 1e6)] * 398 + [answer(0, 1e6)] * 2
    assert harm(intact, few_lost) < harm(intact, more_lost)


def test_equal_accuracies_are_ranked_by_the_mean_margin() -> None:
    intact = [answer(1, 2.0), answer(0, -1.0)]
    sure, unsure = (
        [answer(1, 1.5), answer(0, -1.0)],
        [answer(0, -0.1), answer(1, 0.1)],
    )
    found = [harm(intact, sure), harm(intact, unsure)]
    assert found[0] < found[1]
    assert found == pytest.approx([0, 0], abs=1e-6)


def test_answers_without_margins_are_ranked_by_accuracy_alone() -> None:
    intact, found = [answer(1, None), answer(1, None)], [answer(1, None), answer(0, None)]
    assert harm(intact, found) == 0.5


def test_questions_that_report_the_winner_do_not_choose_its_layers(
    with_idle_layer: Path, make_context: MakeContext
) -> None:
    task = GeneratedTask(name="agreement", limit=40)
    config = config_of(TaskAccuracy(tasks=(task,), block_lengths=(1,)))
    context = make_context(config, model=with_idle_layer)
    importance.run(context)
    model = checkpoints.load_model(context.model("model"))
    answers = questions.ask(model, language.tokenizer(), [task])
    halves = {
        half: [each.correct for each in answers if each.split == half]
        for half in ("select", "report")
    }
    found = scores(context.out, "accuracy")[0, -1]
    assert found == pytest.approx(statistics.fmean(halves["select"]))
    assert found != pytest.approx(statistics.fmean(halves["report"]))


def test_task_importance_is_the_fall_of_accuracy(
    with_idle_layer: Path, make_context: MakeContext
) -> None:
    task = GeneratedTask(name="agreement", limit=40)
    context = make_context(
        config_of(TaskAccuracy(tasks=(task,), block_lengths=(1,))), model=with_idle_layer
    )
    result = importance.run(context)
    accuracy, found = scores(context.out, "accuracy"), scores(context.out)
    intact = accuracy.pop((0, -1))
    assert found == pytest.approx(
        {place: intact - value for place, value in accuracy.items()}, abs=1e-6
    )
    assert found[1, IDLE] == pytest.approx(0, abs=1e-9)
    assert result.tokens > 0
    assert result.flops > 0


@pytest.mark.parametrize("shots", [0, 2])
def test_answers_without_a_block_equal_those_of_really_leaving_it_out(
    model: PreTrainedModel, shots: int
) -> None:
    tasks = [
        GeneratedTask(name="agreement", limit=30, shots=shots),
        GeneratedTask(name="knowledge", limit=20),
    ]
    places = ablation.blocks_of_layers(4, (1, 2))
    tokenizer = language.tokenizer()
    (intact, *found), lengths = questions.ask_without(model, tokenizer, tasks, places)
    same_answers(intact, questions.ask(model, tokenizer, tasks))
    for (first, length), answers in zip(places, found, strict=True):
        with ablation.left_out(model, first, length) as shorter:
            same_answers(answers, questions.ask(shorter, tokenizer, tasks))
    assert sum(lengths) >= 50


def same_answers(found: list[questions.Answer], expected: list[questions.Answer]) -> None:
    assert [each.item_id for each in found] == [each.item_id for each in expected]
    assert [each.correct for each in found] == [each.correct for each in expected]
    assert [each.score for each in found] == pytest.approx(
        [each.score for each in expected], abs=1e-4
    )


def test_a_request_is_run_once_for_all_variants(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    whole = scorer.hidden_without

    def counted(model: Any, tokens_BL: Tensor, places: Any, **how: Tensor) -> Any:
        passes.append(len(tokens_BL))
        return whole(model, tokens_BL, places, **how)

    monkeypatch.setattr(scorer, "hidden_without", counted)
    task = GeneratedTask(name="agreement", limit=30)
    answers, lengths = questions.ask_without(
        model, language.tokenizer(), [task], ablation.blocks_of_layers(4, (1,))
    )
    assert [len(each) for each in answers] == [30] * 5
    assert sum(passes) == len(lengths)


# --- several processes -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "criterion",
    [
        Activations(samples=9),
        perplexity(9, (1,)),
        TaskAccuracy(tasks=(GeneratedTask(name="agreement", limit=300),), block_lengths=(1,)),
    ],
    ids=lambda criterion: criterion.kind,
)
def test_two_processes_come_to_the_scores_of_one(
    artifact: Path,
    make_context: MakeContext,
    tmp_path: Path,
    criterion: Activations | Perplexity | TaskAccuracy,
) -> None:
    config = config_of(criterion)
    context = make_context(config, model=artifact)
    alone = importance.run(context)
    described = {"config": config.model_dump(mode="json"), "inputs": {"model": str(artifact)}}
    (tmp_path / "stage.json").write_text(json.dumps(described))
    both = tmp_path / "both"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    command += ["-m", "trainers.importance", "--threads", "1"]
    command += ["--config", str(tmp_path / "stage.json"), "--out", str(both)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    expected = read_rows(context.out / "scores.jsonl")
    found = read_rows(both / "scores.jsonl")
    assert [row | {"value": 0} for row in found] == [row | {"value": 0} for row in expected]
    assert [row["value"] for row in found] == pytest.approx(
        [row["value"] for row in expected], abs=1e-5
    )
    result = json.loads((both / "result.json").read_text())
    assert (result["tokens"], result["flops"]) == (alone.tokens, alone.flops)
    if isinstance(criterion, Activations):
        one, two = (
            ActivationStatistics.load(folder / activations.FILE) for folder in (context.out, both)
        )
        assert one.samples == two.samples
        for name, sums in one.sums.items():
            torch.testing.assert_close(two.sums[name], sums, rtol=1e-6, atol=1e-6)
