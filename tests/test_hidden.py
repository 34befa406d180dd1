"""Hidden-state losses: which states are compared, what they are, and how far apart they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families_at_hand import MODEL_TYPES, VARIANTS, tiny_config, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from trainers import checkpoints
from trainers.checkpoints import final_hidden
from trainers.config import DistillLoss, HiddenLoss
from trainers.distill import Distillation
from trainers.families import FAMILIES
from trainers.hidden import HiddenDistance, captured, normalised
from trainers.mapping import layer_number, mapped_layers, state_pairs, teacher_states
from trainers.teacher import LiveTeacher

EVERY_FAMILY = pytest.mark.parametrize("name", sorted({*MODEL_TYPES, *VARIANTS}))
IDS = torch.arange(1, 25).reshape(2, 12)
BLOCKS = torch.arange(2)


# --- which states ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "number"),
    [(0, 0), (3, 3), ("3", 3), ("last", 5), ("last-0", 5), ("last-2", 3), ("last-5", 0)],
)
def test_a_layer_is_counted_from_either_end(place: int | str, number: int) -> None:
    assert layer_number(place, 6) == number


@pytest.mark.parametrize("place", [6, "6", "last-6", -1, "first", "last2", "last-", "", "-"])
def test_a_place_outside_of_the_model_is_an_error_that_says_what_is_allowed(
    place: int | str,
) -> None:
    with pytest.raises(
        ValueError, match=f"layer {place} .* 6 layers; .* 0 to 5, or last to last-5"
    ):
        layer_number(place, 6)


def test_pairs_are_counted_from_either_end_of_each_model() -> None:
    mapping = {"0": 0, "last-2": "last-2", "last": 7}
    assert mapped_layers(mapping, 16, 32) == [(0, 0), (13, 29), (15, 7)]


def test_two_names_of_the_same_pair_are_one_pair() -> None:
    assert mapped_layers({"3": 7, "last": "last"}, 4, 8) == [(3, 7)]


@pytest.mark.parametrize(
    ("mapping", "whose"), [({"9": 0}, "student's layer 9"), ({"0": "last-9"}, "teacher's layer la")]
)
def test_a_mapping_to_a_layer_that_is_not_there_says_whose(
    mapping: dict[str, int | str], whose: str
) -> None:
    with pytest.raises(ValueError, match=whose):
        mapped_layers(mapping, 4, 8)


@given(st.integers(2, 60), st.integers(2, 60))
def test_proportional_pairs_go_evenly_from_first_to_last(students: int, teachers: int) -> None:
    pairs = mapped_layers("proportional", students, teachers)
    assert [student for student, _ in pairs] == list(range(students))
    assert pairs[0] == (0, 0)
    assert pairs[-1] == (students - 1, teachers - 1)
    for student, teacher in pairs:
        exact = student * (teachers - 1) / (students - 1)
        assert abs(teacher - exact) <= 0.5


def test_a_student_as_deep_as_its_teacher_is_paired_layer_by_layer() -> None:
    assert mapped_layers("proportional", 5, 5) == [(n, n) for n in range(5)]


def test_a_student_of_one_layer_is_paired_with_the_teachers_last() -> None:
    assert mapped_layers("proportional", 1, 5) == [(0, 4)]


def test_the_embedding_is_compared_once_and_every_other_state_of_each_pair_of_layers() -> None:
    hidden = HiddenLoss(
        states=("output", "embedding", "attention"), mapping={"0": 1, "last": "last"}
    )
    assert state_pairs(hidden, 2, 4) == (
        ("output.0", "output.1"),
        ("output.1", "output.3"),
        ("embedding", "embedding"),
        ("attention.0", "attention.1"),
        ("attention.1", "attention.3"),
    )


def test_a_teachers_state_that_is_needed_twice_is_named_once() -> None:
    assert teacher_states(HiddenLoss(mapping={"0": 1, "1": 1}), 2, 4) == ("output.1",)


# --- what they are ---------------------------------------------------------------------------


@EVERY_FAMILY
@torch.no_grad()
def test_captured_states_are_those_that_transformers_gives(name: str) -> None:
    model = tiny_model(name)
    states = ["embedding", *(f"{kind}.{n}" for kind in ("input", "output") for n in range(3))]
    with captured(model, states) as found:
        final_hidden(model, IDS)
    expected = model(IDS, output_hidden_states=True).hidden_states
    # Some families multiply the embedding's output by a constant, which normalising takes away.
    torch.testing.assert_close(
        normalised(found["embedding"]), normalised(expected[0]), rtol=1e-4, atol=1e-4
    )
    for n in range(3):
        torch.testing.assert_close(found[f"input.{n}"], expected[n])
        torch.testing.assert_close(found[f"output.{n}"], expected[n + 1])


@EVERY_FAMILY
@torch.no_grad()
def test_an_attention_state_is_what_the_output_projection_of_that_layer_writes(name: str) -> None:
    model = tiny_model(name)

    def written() -> Tensor:
        with captured(model, ["attention.1"]) as found:
            final_hidden(model, IDS)
        return found["attention.1"]

    first = written()
    family = FAMILIES[model.config.model_type]
    projection = model.get_submodule(f"{family.layers}.1.{family.attention_output}")
    for parameter in projection.parameters():
        parameter *= 2
    assert first.shape == (2, 12, model.config.hidden_size)
    torch.testing.assert_close(written(), 2 * first)


def test_a_parallel_block_adds_its_attention_to_its_input() -> None:
    model = tiny_model("gpt_neox")
    with torch.no_grad(), captured(model, ["input.1", "attention.1", "output.1"]) as found:
        for parameter in model.gpt_neox.layers[1].mlp.parameters():
            parameter.zero_()
        final_hidden(model, IDS)
    torch.testing.assert_close(found["input.1"] + found["attention.1"], found["output.1"])


def test_nothing_is_captured_after_the_pass() -> None:
    model = tiny_model("llama")
    with captured(model, ["output.1"]) as found:
        pass
    final_hidden(model, IDS)
    assert found == {}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("output.9", "layer 9 is not in a model of 4 layers"),
        ("query.1", "no hidden state is called"),
    ],
)
def test_a_state_that_a_model_does_not_have_is_an_error(state: str, message: str) -> None:
    with pytest.raises(ValueError, match=message), captured(tiny_model("llama"), [state]):
        pass


# --- how far apart they are ------------------------------------------------------------------


def wide(name: str, seed: int = 1) -> PreTrainedModel:
    """A teacher of 6 layers and 48 channels."""
    config = tiny_config(name) | {"hidden_size": 48, "num_hidden_layers": 6}
    return checkpoints.new_model(config | {"initializer_range": 0.2}, seed).eval()


def naive_normalised(vector: Tensor) -> Tensor:
    return vector / (vector.square().mean() + 1e-6).sqrt()


def naive_distance(student: Tensor, teacher: Tensor, weight: Tensor, distance: str) -> Tensor:
    """A mean over tokens, one token after the other."""
    found = []
    for ours, theirs in zip(student.flatten(0, 1), teacher.flatten(0, 1), strict=True):
        raised, taught = weight @ naive_normalised(ours), naive_normalised(theirs)
        if distance == "mse":
            found.append((raised - taught).square().sum() / len(taught))
        else:
            found.append(1 - raised @ taught / (raised.norm() * taught.norm()))
    return torch.stack(found).mean()


@pytest.mark.parametrize("distance", ["cosine", "mse"])
@pytest.mark.parametrize("tokens", [7, 600], ids=["one_chunk", "more_than_a_chunk"])
def test_the_distance_equals_the_naive_one_with_its_gradients(distance: Any, tokens: int) -> None:
    hidden = HiddenLoss(states=("embedding", "output"), mapping={"0": 1}, distance=distance)
    module = HiddenDistance(hidden, tiny_model("llama"), (6, 48), seed=0)
    draw = torch.Generator().manual_seed(0)

    def states(names: list[str], width: int) -> dict[str, Tensor]:
        return {
            name: (3 * torch.randn(2, tokens, width, generator=draw)).requires_grad_()
            for name in names
        }

    student, teacher = states(["embedding", "output.0"], 32), states(["embedding", "output.1"], 48)
    inputs = [*student.values(), *module.parameters()]
    found = module(student, teacher)
    expected = torch.zeros(())
    for (ours, theirs), weight in zip(module.pairs, module.projections, strict=True):
        expected = expected + naive_distance(student[ours], teacher[theirs], weight, distance)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(each, inputs) for each in (found, expected)]
    for mine, naive in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, naive, rtol=1e-5, atol=1e-5)
    assert all(state.grad is None for state in teacher.values())


@pytest.mark.parametrize("distance", ["cosine", "mse"])
def test_the_size_of_a_state_does_not_matter(distance: Any) -> None:
    hidden = HiddenLoss(states=("embedding",), distance=distance)
    module = HiddenDistance(hidden, tiny_model("llama"), (4, 32), seed=0)
    student, teacher = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    found = module({"embedding": student}, {"embedding": teacher})
    scaled = module({"embedding": 7 * student}, {"embedding": teacher / 3})
    torch.testing.assert_close(found, scaled, rtol=1e-4, atol=1e-5)


def test_a_state_that_the_projection_turns_into_the_teachers_has_no_distance() -> None:
    for distance in ("cosine", "mse"):
        hidden = HiddenLoss(states=("embedding",), distance=distance)
        module = HiddenDistance(hidden, tiny_model("llama"), (4, 32), seed=0)
        student = torch.randn(2, 5, 32)
        teacher = student @ module.projections[0].detach().T
        found = module({"embedding": student}, {"embedding": teacher})
        assert float(found) == pytest.approx(0, abs=1e-5)


def test_there_is_a_projection_for_each_pair_also_between_equal_widths() -> None:
    hidden = HiddenLoss(states=("embedding", "input", "output"), mapping="proportional")
    for width in (32, 48, 20):
        module = HiddenDistance(hidden, tiny_model("llama"), (6, width), seed=0)
        assert [weight.shape for weight in module.projections] == [(width, 32)] * (1 + 4 + 4)


def test_projections_begin_without_changing_lengths_and_angles() -> None:
    module = HiddenDistance(HiddenLoss(), tiny_model("llama"), (6, 48), seed=0)
    (weight,) = module.projections
    torch.testing.assert_close(weight.T @ weight, torch.eye(32), rtol=1e-5, atol=1e-5)


def test_the_seed_decides_the_projections_whatever_was_drawn_before() -> None:
    def projection(seed: int) -> Tensor:
        torch.rand(seed + 1)
        return HiddenDistance(HiddenLoss(), tiny_model("llama"), (6, 48), seed).projections[0]

    first, again, other = projection(3), projection(3), projection(4)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_projections_have_the_students_precision() -> None:
    student = tiny_model("llama").bfloat16()
    module = HiddenDistance(HiddenLoss(), student, (6, 48), seed=0)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    states = {"output.1": torch.randn(2, 5, 32).bfloat16().requires_grad_()}
    found = module(states, {"output.3": torch.randn(2, 5, 48).bfloat16()})
    assert found.dtype is torch.float32
    assert torch.autograd.grad(found, states["output.1"])[0].dtype is torch.bfloat16


ALL_STATES = HiddenLoss(
    states=("embedding", "input", "output", "attention"), mapping="proportional", weight=1.0
)


def learner(student: PreTrainedModel, teacher: PreTrainedModel) -> Distillation:
    """An objective that compares all states and nothing else."""
    size = teacher.config.num_hidden_layers, teacher.config.hidden_size
    distance = HiddenDistance(ALL_STATES, student, size, seed=0)
    signal = LiveTeacher(teacher, [theirs for _, theirs in distance.pairs])
    return Distillation(student, signal, DistillLoss(logits="none", hidden=ALL_STATES), distance)


@EVERY_FAMILY
def test_a_wider_and_deeper_teacher_teaches_a_student_of_every_family(name: str) -> None:
    student, teacher = tiny_model(name), wide("llama")
    objective = learner(student, teacher)
    assert objective.hidden is not None
    found = objective(IDS, BLOCKS)
    pairs, weights = objective.hidden.pairs, objective.hidden.projections
    with captured(student, [ours for ours, _ in pairs]) as learned:
        final_hidden(student, IDS)
    with torch.no_grad(), captured(teacher, [theirs for _, theirs in pairs]) as taught:
        final_hidden(teacher, IDS)
    expected = sum(
        naive_distance(learned[ours], taught[theirs], weight, "cosine")
        for (ours, theirs), weight in zip(pairs, weights, strict=True)
    )
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    before_the_end = list(objective.parameters())
    gradients = [
        torch.autograd.grad(each, before_the_end, allow_unused=True, materialize_grads=True)
        for each in (found, expected)
    ]
    for mine, naive in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, naive, rtol=1e-3, atol=1e-5)


def test_recomputing_layers_in_the_backward_pass_changes_no_gradient() -> None:
    teacher = wide("llama")

    def gradients(recompute: bool) -> dict[str, Tensor]:
        student = tiny_model("llama").train()
        if recompute:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        objective = learner(student, teacher)
        objective(IDS, BLOCKS).backward()
        return {
            name: parameter.grad
            for name, parameter in objective.named_parameters()
            if parameter.grad is not None
        }

    plain, recomputed = gradients(False), gradients(True)
    assert set(plain) == set(recomputed)
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient)
