"""A student learns from its teacher, and the teacher from nobody."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import MakeContext, SaveArtifact
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from transformers import AutoTokenizer, PreTrainedModel

from trainers import checkpoints, corpus, distill, evaluate, surgery
from trainers.config import DistillConfig, DistillLoss, GeneratedCorpus, Training
from trainers.contract import StageError
from trainers.shapes import shape_of
from trainers.teacher import LiveTeacher

CORPUS = GeneratedCorpus(block_length=16, training_blocks=64, heldout_blocks=16)
IDS = torch.arange(36).reshape(3, 12)


@pytest.fixture(scope="module")
def pruned(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model without its layers 1 and 2."""
    folder = tmp_path_factory.mktemp("pruned")
    surgery.operate(artifact / "model", folder / "model", surgery.Cut(layers=(0, 3)))
    return folder


@pytest.fixture
def teacher(artifact: Path) -> PreTrainedModel:
    return checkpoints.load_model(artifact / "model")


@pytest.fixture
def student(pruned: Path) -> PreTrainedModel:
    return checkpoints.load_model(pruned / "model")


def config_of(steps: int = 6, **loss: Any) -> DistillConfig:
    return DistillConfig(
        corpus=CORPUS,
        training=Training(steps=steps, batch_size=8, learning_rate=3e-3),
        loss=DistillLoss(**loss),
    )


def naive_objective(
    student: PreTrainedModel, teacher: PreTrainedModel, loss: DistillLoss
) -> Tensor:
    """Minitron's loss from full logits: KL(teacher || student) and cross-entropy, a token."""
    ours, labels = student(IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()
    with torch.no_grad():
        theirs = teacher(IDS).logits[:, :-1].flatten(0, 1)
    temperature = loss.temperature
    cooled = [Categorical(logits=logits / temperature) for logits in (theirs, ours)]
    divergence = kl_divergence(*cooled).mean() * temperature**2
    learned = loss.logits_weight * divergence if loss.logits == "forward_kl" else 0.0
    return learned + loss.cross_entropy_weight * F.cross_entropy(ours, labels)


@pytest.mark.parametrize(
    "loss",
    [
        DistillLoss(),
        DistillLoss(temperature=0.5, logits_weight=2.0),
        DistillLoss(temperature=3.0, cross_entropy_weight=0.3),
        DistillLoss(logits="none", cross_entropy_weight=0.7),
    ],
    ids=["kl", "cold", "kl_and_cross_entropy", "cross_entropy"],
)
def test_loss_and_gradients_equal_those_of_full_logits(
    student: PreTrainedModel, teacher: PreTrainedModel, loss: DistillLoss
) -> None:
    signal = LiveTeacher(teacher) if loss.logits != "none" else None
    found = distill.Distillation(student, signal, loss)(IDS)
    found.backward()
    ours = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    student.zero_grad()
    expected = naive_objective(student, teacher, loss)
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_a_model_that_is_its_own_teacher_has_nothing_to_learn(
    artifact: Path, teacher: PreTrainedModel
) -> None:
    twin = checkpoints.load_model(artifact / "model")
    loss = distill.Distillation(twin, LiveTeacher(teacher), DistillLoss())(IDS)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert max(float(p.grad.abs().max()) for p in twin.parameters()) < 1e-5


def test_the_teacher_is_no_part_of_what_is_trained(
    student: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    objective = distill.Distillation(student, LiveTeacher(teacher), DistillLoss())
    trained = {id(parameter) for parameter in objective.parameters()}
    assert trained == {id(parameter) for parameter in student.parameters()}
    objective(IDS).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_pruned_student_comes_closer_to_its_teacher(
    artifact: Path, pruned: Path, teacher: PreTrainedModel, make_context: MakeContext
) -> None:
    source = {file.name: file.read_bytes() for file in (artifact / "model").iterdir()}
    context = make_context(config_of(steps=25), model=pruned, teacher=artifact)
    result = distill.run(context)
    heldout = corpus.blocks(CORPUS, artifact / "model", "heldout")

    def distance(folder: Path) -> float:
        student = checkpoints.load_model(folder / "model")
        divergence = evaluate.held_out_losses(student, heldout, LiveTeacher(teacher))[1]
        assert divergence is not None
        return divergence

    assert distance(context.out) < 0.8 * distance(pruned)
    assert {file.name: file.read_bytes() for file in (artifact / "model").iterdir()} == source
    assert AutoTokenizer.from_pretrained(context.out / "model")("the dog")["input_ids"]
    tokens = 25 * 8 * 16
    assert result.tokens == tokens
    shapes = [shape_of(checkpoints.read_config(folder / "model")) for folder in (pruned, artifact)]
    assert result.flops == pytest.approx(
        shapes[0].training_flops(tokens, 16) + shapes[1].forward_flops(tokens, 16)
    )


def test_conventional_training_needs_no_teacher(pruned: Path, make_context: MakeContext) -> None:
    context = make_context(config_of(logits="none", cross_entropy_weight=1.0), model=pruned)
    result = distill.run(context)
    assert result.metrics["loss"] > 0
    shape = shape_of(checkpoints.read_config(pruned / "model"))
    assert result.flops == shape.training_flops(result.tokens, 16)


def test_distillation_without_a_teacher_is_an_error(
    pruned: Path, make_context: MakeContext
) -> None:
    with pytest.raises(StageError, match="input in the role teacher"):
        distill.run(make_context(config_of(), model=pruned))


def test_different_vocabularies_are_an_error_that_names_both(
    pruned: Path,
    tiny_config: dict[str, Any],
    save_artifact: SaveArtifact,
    make_context: MakeContext,
) -> None:
    words = tiny_config["vocab_size"]
    other = save_artifact(checkpoints.new_model(tiny_config | {"vocab_size": 300}, seed=0))
    with pytest.raises(StageError, match=f"{words} in the student, 300 in the teacher"):
        distill.run(make_context(config_of(), model=pruned, teacher=other))


def test_bf16_distils_nearly_as_fp32_does(
    artifact: Path, pruned: Path, make_context: MakeContext
) -> None:
    found = {}
    for precision in ("fp32", "bf16"):
        config = config_of(steps=8)
        training = config.training.model_copy(update={"precision": precision})
        config = config.model_copy(update={"training": training})
        context = make_context(config, out=precision, model=pruned, teacher=artifact)
        found[precision] = distill.run(context).metrics["loss"]
    assert found["bf16"] == pytest.approx(found["fp32"], rel=0.05)
