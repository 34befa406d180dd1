"""Measurements of a model equal what anyone would compute from its full logits."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import MakeContext, SaveArtifact
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from transformers import PreTrainedModel

from trainers import checkpoints, corpus, evaluate
from trainers.config import EvaluateConfig, GeneratedCorpus, GeneratedTask
from trainers.contract import StageError, read_rows
from trainers.shapes import shape_of
from trainers.teacher import LiveTeacher

# More blocks than one batch holds, and not a multiple of it.
CORPUS = GeneratedCorpus(block_length=20, training_blocks=2, heldout_blocks=19)
TASKS = (GeneratedTask(name="agreement", limit=30), GeneratedTask(name="knowledge", limit=20))


@pytest.fixture
def blocks(artifact: Path) -> Tensor:
    return corpus.blocks(CORPUS, artifact / "model", "heldout")


@pytest.fixture(scope="module")
def teacher(tiny_config: dict[str, Any], save_artifact: SaveArtifact) -> Path:
    surer = tiny_config | {"initializer_range": 0.4}
    return save_artifact(checkpoints.new_model(surer, seed=8))


@torch.no_grad()
def naive_loss(model: PreTrainedModel, blocks: Tensor) -> float:
    logits = model(blocks).logits[:, :-1]
    return float(F.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten()))


@torch.no_grad()
def naive_kl(model: PreTrainedModel, teacher: PreTrainedModel, blocks: Tensor) -> float:
    student, taught = (
        Categorical(logits=each(blocks).logits[:, :-1].flatten(0, 1)) for each in (model, teacher)
    )
    return float(kl_divergence(taught, student).mean())


def test_the_lm_loss_is_the_mean_cross_entropy(model: PreTrainedModel, blocks: Tensor) -> None:
    ticks: list[int] = []
    found = evaluate.lm_loss(model, blocks, ticks.append)
    assert found == pytest.approx(naive_loss(model, blocks), abs=1e-5)
    assert ticks == [8, 8, 3]


def test_the_lm_loss_does_not_depend_on_the_batches(
    model: PreTrainedModel, blocks: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate.lm_loss(model, blocks)
    monkeypatch.setattr(evaluate, "BLOCKS_A_BATCH", 1)
    assert evaluate.lm_loss(model, blocks) == pytest.approx(whole, abs=1e-5)


def test_the_lm_loss_alone_is_to_the_bit_the_one_measured_with_all_else(
    model: PreTrainedModel, teacher: Path, blocks: Tensor
) -> None:
    taught = LiveTeacher(checkpoints.load_model(teacher / "model"))
    assert evaluate.lm_loss(model, blocks) == evaluate.held_out(model, blocks, taught).lm_loss


def test_the_kd_loss_is_the_mean_kl_from_the_teacher(
    model: PreTrainedModel, teacher: Path, blocks: Tensor
) -> None:
    taught = checkpoints.load_model(teacher / "model")
    found = evaluate.held_out(model, blocks, LiveTeacher(taught))
    loss, divergence = found.lm_loss, found.kd_loss
    assert loss == pytest.approx(naive_loss(model, blocks), abs=1e-5)
    assert divergence == pytest.approx(naive_kl(model, taught, blocks), abs=1e-5)
    assert divergence != pytest.approx(naive_kl(taught, model, blocks), abs=1e-3)


def test_the_calibration_error_is_the_gap_between_confidence_and_accuracy_over_bins(
    model: PreTrainedModel, blocks: Tensor
) -> None:
    with torch.no_grad():
        probabilities = model(input_ids=blocks).logits[:, :-1].flatten(0, 1).softmax(-1)
    confidence, likeliest = probabilities.max(-1)
    correct = (likeliest == blocks[:, 1:].flatten()).double()
    gaps = []
    for number in range(15):
        inside = (confidence >= number / 15) & (confidence < (number + 1) / 15)
        if inside.any():
            gap = abs(float(correct[inside].mean()) - float(confidence[inside].double().mean()))
            gaps.append(float(inside.sum()) / len(confidence) * gap)
    found = evaluate.held_out(model, blocks, None).calibration_error
    assert 0 < found == pytest.approx(sum(gaps), abs=1e-5)


def test_more_tokens_than_a_chunk_of_logits_holds_give_the_same(
    model: PreTrainedModel,
) -> None:
    blocks = torch.randint(200, (10, 120), generator=torch.Generator().manual_seed(0))
    assert evaluate.BLOCKS_A_BATCH * 119 < 1024 < 10 * 119
    found = evaluate.lm_loss(model, blocks)
    assert found == pytest.approx(naive_loss(model, blocks), abs=1e-5)


def test_the_kd_loss_of_a_model_with_itself_is_zero(
    artifact: Path, make_context: MakeContext
) -> None:
    context = make_context(EvaluateConfig(corpus=CORPUS), model=artifact, teacher=artifact)
    assert evaluate.run(context).metrics["kd_loss"] == pytest.approx(0, abs=1e-6)


def test_without_a_teacher_there_is_no_kd_loss_and_without_tasks_no_accuracy(
    artifact: Path, model: PreTrainedModel, blocks: Tensor, make_context: MakeContext
) -> None:
    context = make_context(EvaluateConfig(corpus=CORPUS), model=artifact)
    result = evaluate.run(context)
    assert set(result.metrics) == {"lm_loss", "calibration_error"}
    assert result.metrics["lm_loss"] == pytest.approx(naive_loss(model, blocks), abs=1e-5)
    assert result.tokens == blocks.numel()
    shape = shape_of(checkpoints.read_config(artifact / "model"))
    assert result.flops == shape.forward_flops(blocks.numel(), 20)
    assert not (context.out / "items.jsonl").exists()


def test_the_teachers_flops_count_whether_it_is_run_or_remembered(
    artifact: Path, teacher: Path, make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flops(out: str, **inputs: Path) -> float:
        context = make_context(EvaluateConfig(corpus=CORPUS), out=out, model=artifact, **inputs)
        return evaluate.run(context).flops

    alone, first, remembered = (
        flops("a"),
        flops("b", teacher=teacher),
        flops("c", teacher=teacher),
    )
    monkeypatch.setattr(evaluate, "REMEMBERED_BYTES", 0)
    shape = shape_of(checkpoints.read_config(teacher / "model"))
    of_teacher = shape.forward_flops(19 * 20, 20)
    assert first == remembered == flops("d", teacher=teacher) == alone + of_teacher


def test_the_questions_answered_give_the_accuracies(
    artifact: Path, make_context: MakeContext
) -> None:
    context = make_context(EvaluateConfig(corpus=CORPUS, tasks=TASKS), model=artifact)
    metrics = evaluate.run(context).metrics
    rows = read_rows(context.out / "items.jsonl")
    assert len(rows) == 50
    for name, split in (("accuracy", "select"), ("accuracy_report", "report")):
        means = []
        for task in ("agreement", "knowledge"):
            correct = [r["correct"] for r in rows if (r["task"], r["split"]) == (task, split)]
            means.append(sum(correct) / len(correct))
            assert metrics[f"{name}.{task}"] == pytest.approx(means[-1])
        assert metrics[f"{name}.mean"] == pytest.approx(sum(means) / 2)
    for row in rows:
        assert row.keys() == {"task", "item_id", "split", "correct", "score"}
        assert row["correct"] == float(row["score"] > 0)


def test_bf16_measures_nearly_the_same(artifact: Path, make_context: MakeContext) -> None:
    full, half = (
        evaluate.run(
            make_context(
                EvaluateConfig(corpus=CORPUS, precision=precision), model=artifact, teacher=artifact
            )
        ).metrics
        for precision in ("fp32", "bf16")
    )
    assert half["lm_loss"] == pytest.approx(full["lm_loss"], abs=0.05)


@pytest.mark.parametrize(("room", "runs"), [(10**9, 3), (0, 6)])
def test_a_teacher_that_fits_is_run_once_for_all_students_and_says_the_same(
    artifact: Path,
    teacher: Path,
    make_context: MakeContext,
    monkeypatch: pytest.MonkeyPatch,
    room: int,
    runs: int,
) -> None:
    ran: list[int] = []
    alone = evaluate.LiveTeacher.targets

    def counted(self: LiveTeacher, ids_BL: Tensor, *given: Any) -> Any:
        ran.append(len(ids_BL))
        return alone(self, ids_BL, *given)

    evaluate._remembered.cache_clear()
    monkeypatch.setattr(evaluate, "REMEMBERED_BYTES", room)
    monkeypatch.setattr(evaluate.LiveTeacher, "targets", counted)
    config = EvaluateConfig(corpus=CORPUS)
    found = [
        evaluate.run(make_context(config, model=student, teacher=teacher, out=f"{student.name}{i}"))
        for i, student in enumerate((artifact, artifact))
    ]
    assert found[0].metrics == found[1].metrics
    assert len(ran) == runs


def test_another_text_is_asked_of_the_teacher_anew(
    artifact: Path, teacher: Path, make_context: MakeContext
) -> None:
    def kd_loss(seed: int, out: str) -> float:
        config = EvaluateConfig(corpus=CORPUS.model_copy(update={"language_seed": seed}))
        context = make_context(config, model=artifact, teacher=teacher, out=out)
        return evaluate.run(context).metrics["kd_loss"]

    first, other, again = kd_loss(0, "a"), kd_loss(1, "b"), kd_loss(0, "c")
    assert first == again != other


def test_progress_is_told_to_the_end(artifact: Path, make_context: MakeContext) -> None:
    heard: list[tuple[int, int]] = []

    class Listen:
        def report(self, done: int, total: int, values: Any) -> None:
            heard.append((done, total))

    config = EvaluateConfig(corpus=CORPUS, tasks=TASKS)
    evaluate.run(make_context(config, reporter=Listen(), model=artifact))
    assert heard == sorted(heard)
    assert heard[-1][0] == heard[-1][1]


def test_a_loss_that_is_not_a_number_is_an_error(
    tiny_config: dict[str, Any], save_artifact: SaveArtifact, make_context: MakeContext
) -> None:
    model = checkpoints.new_model(tiny_config, seed=0)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    context = make_context(EvaluateConfig(corpus=CORPUS), model=save_artifact(model))
    with pytest.raises(StageError, match="held-out loss is nan"):
        evaluate.run(context)


@pytest.mark.slow
def test_two_processes_measure_what_one_measures(
    artifact: Path, teacher: Path, make_context: MakeContext, tmp_path: Path
) -> None:
    generated = GeneratedTask(name="agreement", limit=300)
    config = EvaluateConfig(corpus=CORPUS, tasks=(*TASKS[1:], generated))
    context = make_context(config, model=artifact, teacher=teacher)
    alone = evaluate.run(context)
    described = {
        "config": config.model_dump(mode="json"),
        "inputs": {"model": str(artifact), "teacher": str(teacher)},
    }
    (tmp_path / "stage.json").write_text(json.dumps(described))
    both = tmp_path / "both"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "-m", "trainers.evaluate", "--threads", "1"]
    command += ["--config", str(tmp_path / "stage.json"), "--out", str(both)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads((both / "result.json").read_text())
    assert result["metrics"] == pytest.approx(dict(alone.metrics), abs=1e-5)
    assert (result["tokens"], result["flops"]) == (alone.tokens, alone.flops)
    one, two = (read_rows(folder / "items.jsonl") for folder in (context.out, both))
    assert [row | {"score": 0} for row in two] == [row | {"score": 0} for row in one]
    assert [row["score"] for row in two] == pytest.approx([row["score"] for row in one], abs=1e-5)
