"""A student learns from its teacher, and the teacher from nobody."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from conftest import MakeContext, SaveArtifact
from safetensors.torch import load_file
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from transformers import AutoTokenizer, PreTrainedModel

from trainers import cache, checkpoints, corpus, distill, evaluate, surgery
from trainers.config import (
    CacheConfig,
    DistillConfig,
    DistillLoss,
    EngineSettings,
    GeneratedCorpus,
    HiddenCache,
    HiddenLoss,
    SampledCache,
    Training,
)
from trainers.contract import StageError, read_rows
from trainers.hidden import HiddenDistance
from trainers.shapes import shape_of
from trainers.teacher import DenseTargets, LiveTeacher, SparseTargets

CORPUS = GeneratedCorpus(block_length=16, training_blocks=64, heldout_blocks=16)
IDS = torch.arange(1, 37).reshape(3, 12)  # word 0 is padding: all its logits are 0
BLOCKS = torch.arange(3)


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


def naive_divergence(ours_NV: Tensor, theirs_NV: Tensor, loss: DistillLoss) -> Tensor:
    """The mean over tokens of L_logits, from full logits."""
    if loss.top_k is not None:
        best = theirs_NV.argsort(dim=-1, descending=True)[:, : loss.top_k]
        ours_NV, theirs_NV = ours_NV.gather(1, best), theirs_NV.gather(1, best)
    ours_NV, theirs_NV = ours_NV / loss.temperature, theirs_NV / loss.temperature
    student, teacher = Categorical(logits=ours_NV), Categorical(logits=theirs_NV)
    match loss.logits:
        case "forward_kl":
            return kl_divergence(teacher, student).mean() * loss.temperature**2
        case "reverse_kl":
            return kl_divergence(student, teacher).mean() * loss.temperature**2
        case "mse":
            return (ours_NV - theirs_NV).square().mean()
        case "cosine":
            lengths = ours_NV.norm(dim=-1) * theirs_NV.norm(dim=-1)
            return (1 - (ours_NV * theirs_NV).sum(-1) / lengths).mean()
        case _:
            return torch.zeros(())


def naive_states(model: PreTrainedModel) -> tuple[Tensor, ...]:
    """Embedding output, then each block's output, as transformers gives them: of the last block it
    gives only what the final norm makes of it."""
    states: tuple[Tensor, ...] = model(IDS, output_hidden_states=True).hidden_states
    return states


def naive_hidden(
    student: PreTrainedModel, teacher: PreTrainedModel, pairs: list[tuple[int, int]], raise_by: Any
) -> Tensor:
    """The sum over pairs of places in `naive_states` of the mean cosine distance."""
    with torch.no_grad():
        taught = naive_states(teacher)
    learned, total = naive_states(student), torch.zeros(())
    for (ours, theirs), weight in zip(pairs, raise_by, strict=True):
        total = (
            total + (1 - F.cosine_similarity(learned[ours] @ weight.T, taught[theirs], -1)).mean()
        )
    return total


def naive_objective(
    student: PreTrainedModel, teacher: PreTrainedModel, loss: DistillLoss
) -> Tensor:
    """Minitron's loss from full logits: the logit loss and cross-entropy, a token."""
    ours, labels = student(IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()
    with torch.no_grad():
        theirs = teacher(IDS).logits[:, :-1].flatten(0, 1)
    divergence = loss.logits_weight * naive_divergence(ours, theirs, loss)
    return divergence + loss.cross_entropy_weight * F.cross_entropy(ours, labels)


@pytest.mark.parametrize(
    "loss",
    [
        DistillLoss(),
        DistillLoss(temperature=0.5, logits_weight=2.0),
        DistillLoss(temperature=3.0, cross_entropy_weight=0.3),
        DistillLoss(logits="none", cross_entropy_weight=0.7),
        DistillLoss(top_k=5),
        DistillLoss(logits="reverse_kl", temperature=0.5),
        DistillLoss(logits="reverse_kl", top_k=5, temperature=3.0),
        DistillLoss(logits="mse", temperature=2.0, cross_entropy_weight=1.0),
        DistillLoss(logits="mse", top_k=5),
        DistillLoss(logits="cosine", logits_weight=3.0),
        DistillLoss(logits="cosine", top_k=5, cross_entropy_weight=1.0),
    ],
    ids=lambda loss: "-".join(
        f"{name}={value}" for name, value in loss.model_dump(exclude_defaults=True).items()
    ),
)
def test_loss_and_gradients_equal_those_of_full_logits(
    student: PreTrainedModel, teacher: PreTrainedModel, loss: DistillLoss
) -> None:
    signal = LiveTeacher(teacher) if loss.logits != "none" else None
    found = distill.Distillation(student, signal, loss)(IDS, BLOCKS)
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
    loss = distill.Distillation(twin, LiveTeacher(teacher), DistillLoss())(IDS, BLOCKS)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert max(float(p.grad.abs().max()) for p in twin.parameters()) < 1e-5


def test_the_teacher_is_no_part_of_what_is_trained(
    student: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    objective = distill.Distillation(student, LiveTeacher(teacher), DistillLoss())
    trained = {id(parameter) for parameter in objective.parameters()}
    assert trained == {id(parameter) for parameter in student.parameters()}
    objective(IDS, BLOCKS).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


# --- hidden states ---------------------------------------------------------------------------

EMBEDDING_AND_SECOND_INPUT = HiddenLoss(states=("embedding", "input"), mapping={"last": "last-1"})
PAIRS = [(0, 0), (1, 2)]
"""The same as places in `naive_states`: the input of block i is the output of block i - 1."""


def objective_of(
    student: PreTrainedModel, teacher: PreTrainedModel, loss: DistillLoss, seed: int = 0
) -> distill.Distillation:
    assert loss.hidden is not None
    config = teacher.config
    distance = HiddenDistance(
        loss.hidden, student, (config.num_hidden_layers, config.hidden_size), seed
    )
    states = [theirs for _, theirs in distance.pairs]
    return distill.Distillation(student, LiveTeacher(teacher, states), loss, distance)


@pytest.mark.parametrize("weight", [0.3, "dynamic"])
@pytest.mark.parametrize("cross_entropy_weight", [0.0, 0.5])
def test_hidden_states_add_their_weighted_distance_with_its_gradients(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    weight: float | Literal["dynamic"],
    cross_entropy_weight: float,
) -> None:
    hidden = EMBEDDING_AND_SECOND_INPUT.model_copy(update={"weight": weight})
    loss = DistillLoss(hidden=hidden, logits_weight=2.0, cross_entropy_weight=cross_entropy_weight)
    objective = objective_of(student, teacher, loss)
    found = objective(IDS, BLOCKS)
    ours = torch.autograd.grad(found, list(objective.parameters()))
    assert objective.hidden is not None
    distance = naive_hidden(student, teacher, PAIRS, objective.hidden.projections)
    rest = naive_objective(student, teacher, loss)
    # A number, not a tensor: no gradient passes through it.
    ours_NV, theirs_NV = (
        model(IDS).logits[:, :-1].flatten(0, 1).detach() for model in (student, teacher)
    )
    dynamic = naive_divergence(ours_NV, theirs_NV, loss).item() / distance.item()
    expected = rest + (dynamic if weight == "dynamic" else float(weight)) * distance
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)
    for mine, naive in zip(
        ours, torch.autograd.grad(expected, list(objective.parameters())), strict=True
    ):
        torch.testing.assert_close(mine, naive, rtol=1e-4, atol=1e-5)


def test_hidden_states_alone_are_something_to_learn(
    student: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    hidden = EMBEDDING_AND_SECOND_INPUT.model_copy(update={"weight": 0.3})
    objective = objective_of(student, teacher, DistillLoss(logits="none", hidden=hidden))
    assert objective.hidden is not None
    expected = 0.3 * naive_hidden(student, teacher, PAIRS, objective.hidden.projections)
    torch.testing.assert_close(objective(IDS, BLOCKS), expected)


def test_the_parts_of_the_loss_are_told_without_weights_and_once(
    student: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    loss = DistillLoss(
        logits_weight=2.0, cross_entropy_weight=0.5, hidden=EMBEDDING_AND_SECOND_INPUT
    )
    objective = objective_of(student, teacher, loss)
    totals = [objective(ids, BLOCKS[:1]).item() for ids in IDS.split(1)]
    parts = objective.parts()
    assert set(parts) == {"kd_loss", "ce_loss", "hidden_loss", "alpha"}
    # With a dynamic weight the hidden states count as much as the logits do.
    expected = 3.0 * parts["kd_loss"] + 0.5 * parts["ce_loss"]
    assert sum(totals) / 3 == pytest.approx(expected, rel=1e-5)
    assert objective.parts() == {}


def test_a_conventional_objective_tells_of_cross_entropy_alone(student: PreTrainedModel) -> None:
    loss = DistillLoss(logits="none", cross_entropy_weight=0.5)
    objective = distill.Distillation(student, None, loss)
    total = objective(IDS, BLOCKS)
    assert objective.parts() == {"ce_loss": pytest.approx(2 * total.item())}


def test_projections_are_trained_with_the_student_and_dropped_at_export(
    artifact: Path, pruned: Path, make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[list[Tensor], list[Tensor]]] = []
    train = distill.engine.train

    def spied(objective: distill.Distillation, *rest: Any) -> Any:
        assert objective.hidden is not None
        before = [weight.detach().clone() for weight in objective.hidden.projections]
        trained = train(objective, *rest)
        seen.append((before, [weight.detach() for weight in objective.hidden.projections]))
        return trained

    monkeypatch.setattr(distill.engine, "train", spied)
    context = make_context(
        config_of(hidden=HiddenLoss(mapping={"last": "last"})), model=pruned, teacher=artifact
    )
    distill.run(context)
    ((before, after),) = seen
    assert [weight.shape for weight in before] == [(32, 32)]
    assert float((after[0] - before[0]).abs().max()) > 1e-3
    weights = [load_file(folder / "model/model.safetensors") for folder in (context.out, pruned)]
    assert {name: tensor.shape for name, tensor in weights[0].items()} == {
        name: tensor.shape for name, tensor in weights[1].items()
    }
    names = {row["name"] for row in read_rows(context.out / "curve.jsonl")}
    assert {"loss", "kd_loss", "hidden_loss", "alpha"} <= names


def test_a_layer_outside_of_a_model_is_an_error_that_says_what_is_allowed(
    artifact: Path, pruned: Path, make_context: MakeContext
) -> None:
    config = config_of(hidden=HiddenLoss(mapping={"last-2": "last-2"}), steps=1)
    deep = config_of(hidden=HiddenLoss(mapping={"0": 7}), steps=1)
    with pytest.raises(StageError, match=r"student's layer last-2 .* 2 layers; .* 0 to 1"):
        distill.run(make_context(config, model=pruned, teacher=artifact))
    with pytest.raises(StageError, match=r"teacher's layer 7 .* 4 layers; .* 0 to 3"):
        distill.run(make_context(deep, model=pruned, teacher=artifact))


# --- signals ---------------------------------------------------------------------------------


class Told:
    """A signal that says the same of every batch."""

    def __init__(self, targets: DenseTargets | SparseTargets) -> None:
        self._targets = targets

    def targets(self, input_ids_BL: Tensor, blocks_B: Tensor) -> DenseTargets | SparseTargets:
        """What it was given."""
        return self._targets


def sparse_targets(teacher: PreTrainedModel) -> SparseTargets:
    with torch.no_grad():
        told = Categorical(logits=teacher(IDS).logits[:, :-1].flatten(0, 1))
    weights, ids = told.probs.topk(told.probs.shape[-1])
    return SparseTargets(ids, weights, told.entropy())


def test_all_tokens_with_their_probabilities_teach_what_the_live_teacher_does(
    student: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    loss = DistillLoss(cross_entropy_weight=0.3)
    sparse = distill.Distillation(student, Told(sparse_targets(teacher)), loss)
    live = distill.Distillation(student, LiveTeacher(teacher), loss)
    found = [objective(IDS, BLOCKS) for objective in (sparse, live)]
    torch.testing.assert_close(*found)
    gradients = [torch.autograd.grad(each, list(student.parameters())) for each in found]
    for mine, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("loss", "named"),
    [
        (DistillLoss(logits="mse"), "logits: mse"),
        (DistillLoss(temperature=2.0), "temperature: 2.0"),
        (DistillLoss(top_k=4), "top_k: 4"),
        (DistillLoss(hidden=EMBEDDING_AND_SECOND_INPUT), "hidden"),
    ],
    ids=["mse", "temperature", "top_k", "hidden"],
)
def test_what_single_tokens_cannot_tell_is_an_error_that_names_it(
    student: PreTrainedModel, teacher: PreTrainedModel, loss: DistillLoss, named: str
) -> None:
    objective = distill.Distillation(student, Told(sparse_targets(teacher)), loss)
    with pytest.raises(StageError, match=named):
        objective(IDS, BLOCKS)


def test_a_signal_without_the_hidden_states_of_the_loss_is_an_error_that_names_them(
    student: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    objective = objective_of(student, teacher, DistillLoss(hidden=EMBEDDING_AND_SECOND_INPUT))
    objective._signal = (LiveTeacher(teacher, ["embedding"]),)
    with pytest.raises(StageError, match=r"lacks the hidden states input\.2"):
        objective(IDS, BLOCKS)


# --- the stage -------------------------------------------------------------------------------


def test_a_pruned_student_comes_closer_to_its_teacher(
    artifact: Path, pruned: Path, teacher: PreTrainedModel, make_context: MakeContext
) -> None:
    source = {file.name: file.read_bytes() for file in (artifact / "model").iterdir()}
    context = make_context(config_of(steps=25), model=pruned, teacher=artifact)
    result = distill.run(context)
    heldout = corpus.blocks(CORPUS, artifact / "model", "heldout")

    def distance(folder: Path) -> float:
        student = checkpoints.load_model(folder / "model")
        divergence = evaluate.held_out(student, heldout, LiveTeacher(teacher)).kd_loss
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


def test_the_held_out_loss_is_measured_when_asked_and_changes_no_weight(
    artifact: Path, pruned: Path, make_context: MakeContext
) -> None:
    inputs = {"model": pruned, "teacher": artifact}
    plain = make_context(config_of(steps=6), **inputs)
    measured = make_context(config_of(steps=6).model_copy(update={"heldout_every": 2}), **inputs)
    for context in (plain, measured):
        distill.run(context)
    rows = [r for r in read_rows(measured.out / "curve.jsonl") if r["name"] == "heldout_loss"]
    assert [(row["step"], row["tokens"]) for row in rows] == [(2, 256), (4, 512), (6, 768)]
    student = checkpoints.load_model(measured.out / "model")
    heldout = corpus.blocks(CORPUS, pruned / "model", "heldout")
    assert rows[-1]["value"] == pytest.approx(evaluate.lm_loss(student, heldout), abs=1e-6)
    weights = [
        (each.out / "model" / "model.safetensors").read_bytes() for each in (plain, measured)
    ]
    assert weights[0] == weights[1]


def test_sharded_weights_cannot_be_measured_on_the_way() -> None:
    engine = EngineSettings(zero_stage=3)
    training = Training(steps=2, batch_size=2, learning_rate=1e-3, engine=engine)
    with pytest.raises(ValueError, match="zero_stage 3"):
        DistillConfig(corpus=CORPUS, training=training, heldout_every=1)


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


def test_different_tokenizers_are_an_error_that_names_both(
    artifact: Path, pruned: Path, tmp_path: Path, make_context: MakeContext
) -> None:
    other = tmp_path / "other"
    shutil.copytree(artifact, other)
    file = other / "model" / "tokenizer.json"
    text = json.loads(file.read_text())
    words = text["model"]["vocab"]
    words["dog"], words["cat"] = words["cat"], words["dog"]
    file.write_text(json.dumps(text))
    cat, dog = words["dog"], words["cat"]
    with pytest.raises(
        StageError, match=f"tokenizers differ: 'cat' is {cat} in the student, {dog} in the teacher"
    ):
        distill.run(make_context(config_of(), model=pruned, teacher=other))


def test_a_cache_is_checked_against_the_student_and_the_loss_before_it_is_read(
    artifact: Path,
    pruned: Path,
    tmp_path: Path,
    tiny_config: dict[str, Any],
    save_artifact: SaveArtifact,
    make_context: MakeContext,
) -> None:
    def config(**loss: Any) -> DistillConfig:
        return config_of(**loss).model_copy(update={"signal": SampledCache()})

    with pytest.raises(StageError, match="input in the role signals"):
        distill.run(make_context(config(), model=pruned))
    (tmp_path / "signals").mkdir()
    cache.describe_teacher(artifact / "model", tmp_path / "signals" / "teacher")
    context = make_context(config(logits="cosine"), model=pruned, signals=tmp_path / "signals")
    with pytest.raises(StageError, match="logits: cosine"):
        distill.run(context)
    other = save_artifact(checkpoints.new_model(tiny_config | {"vocab_size": 300}, seed=0))
    (tmp_path / "others").mkdir()
    cache.describe_teacher(other / "model", tmp_path / "others" / "teacher")
    with pytest.raises(StageError, match="300 in the teacher"):
        distill.run(make_context(config(), model=pruned, signals=tmp_path / "others"))


def test_cached_hidden_states_teach_what_the_live_teacher_does(
    artifact: Path, pruned: Path, make_context: MakeContext
) -> None:
    loss: dict[str, Any] = {
        "logits": "reverse_kl",
        "temperature": 2.0,
        "hidden": HiddenLoss(states=("embedding", "output"), mapping={"0": 0, "last": "last"}),
    }
    config = config_of(**loss)
    steps, batch_size = config.training.steps, config.training.batch_size
    states = ("embedding", "output.0", "output.3")
    kept = CacheConfig(
        corpus=CORPUS, signal=HiddenCache(), steps=steps, batch_size=batch_size, states=states
    )
    signals = make_context(kept, out="signals", model=artifact)
    cache.run(signals)
    live = make_context(config, out="live", model=pruned, teacher=artifact)
    cached_config = config.model_copy(update={"signal": HiddenCache()})
    cached = make_context(cached_config, out="cached", model=pruned, signals=signals.out)
    results = [distill.run(context) for context in (live, cached)]
    curves = [
        [(row["step"], row["name"], row["value"]) for row in read_rows(context.out / "curve.jsonl")]
        for context in (live, cached)
    ]
    assert [row[:2] for row in curves[0]] == [row[:2] for row in curves[1]]
    for with_live, with_cache in zip(*curves, strict=True):
        assert with_cache[2] == pytest.approx(with_live[2], abs=1e-4)
    shape = shape_of(checkpoints.read_config(artifact / "model"))
    tokens = steps * batch_size * 16
    spared = shape.forward_flops(tokens, 16) - 2 * tokens * shape.hidden_size * shape.vocab_size
    assert results[0].flops - results[1].flops == pytest.approx(spared)
