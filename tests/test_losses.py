"""Losses equal what the textbook says of full logits, chunked or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from trainers.losses import chunked, cross_entropy, forward_kl

TEMPERATURES = (0.5, 1.0, 3.0)


@dataclass(frozen=True)
class Batch:
    """A student's hidden states and output head, its teacher's logits, and the right words."""

    hidden: Tensor
    head: Tensor
    taught: Tensor
    labels: Tensor


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    tokens, width, words = (draw(st.integers(1, high)) for high in (12, 6, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    return Batch(
        normal(tokens, width).requires_grad_(),
        normal(words, width).requires_grad_(),
        2 * normal(tokens, words),
        torch.randint(words, (tokens,), generator=generator),
    )


def naive_cross_entropy(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    probabilities = torch.exp(logits_NV) / torch.exp(logits_NV).sum(dim=1, keepdim=True)
    picked = [probabilities[token, label] for token, label in enumerate(labels_N)]
    return -torch.stack(picked).log().sum()


def naive_forward_kl(student_NV: Tensor, teacher_NV: Tensor, temperature: float) -> Tensor:
    teacher = Categorical(logits=teacher_NV / temperature)
    student = Categorical(logits=student_NV / temperature)
    return kl_divergence(teacher, student).sum() * temperature**2


def value_and_gradients(batch: Batch, loss: Callable[[], Tensor]) -> list[Tensor]:
    value = loss()
    return [value.detach(), *torch.autograd.grad(value, (batch.hidden, batch.head))]


def assert_same(ours: list[Tensor], naive: list[Tensor]) -> None:
    for mine, theirs in zip(ours, naive, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@given(batches(), st.integers(1, 14))
@settings(max_examples=60, deadline=None)
def test_chunked_cross_entropy_equals_the_naive_one_with_its_gradients(
    batch: Batch, chunk: int
) -> None:
    ours = value_and_gradients(
        batch,
        lambda: chunked(
            batch.hidden,
            batch.head,
            lambda logits, place: cross_entropy(logits, batch.labels[place]),
            chunk,
        ),
    )
    naive = value_and_gradients(
        batch, lambda: naive_cross_entropy(batch.hidden @ batch.head.T, batch.labels)
    )
    assert_same(ours, naive)


@given(batches(), st.integers(1, 14), st.sampled_from(TEMPERATURES))
@settings(max_examples=60, deadline=None)
def test_chunked_forward_kl_equals_the_naive_one_with_its_gradients(
    batch: Batch, chunk: int, temperature: float
) -> None:
    ours = value_and_gradients(
        batch,
        lambda: chunked(
            batch.hidden,
            batch.head,
            lambda logits, place: forward_kl(logits, batch.taught[place], temperature),
            chunk,
        ),
    )
    naive = value_and_gradients(
        batch,
        lambda: naive_forward_kl(batch.hidden @ batch.head.T, batch.taught, temperature),
    )
    assert_same(ours, naive)


@given(batches(), st.integers(1, 14))
@settings(max_examples=30, deadline=None)
def test_without_gradients_the_value_is_the_same(batch: Batch, chunk: int) -> None:
    def loss(logits: Tensor, place: slice) -> Tensor:
        return cross_entropy(logits, batch.labels[place])

    with_gradients = chunked(batch.hidden, batch.head, loss, chunk)
    with torch.no_grad():
        without = chunked(batch.hidden, batch.head, loss, chunk)
    assert not without.requires_grad
    torch.testing.assert_close(without, with_gradients.detach(), rtol=0, atol=1e-6)


@given(batches(), st.floats(-3, 3))
@settings(max_examples=30, deadline=None)
def test_gradients_scale_with_what_is_made_of_the_loss(batch: Batch, scale: float) -> None:
    def loss() -> Tensor:
        return chunked(
            batch.hidden,
            batch.head,
            lambda logits, place: cross_entropy(logits, batch.labels[place]),
            3,
        )

    _, *plain = value_and_gradients(batch, loss)
    _, *scaled = value_and_gradients(batch, lambda: scale * loss())
    assert_same(scaled, [scale * gradient for gradient in plain])


@pytest.mark.parametrize("chunk", [1, 4, 5, 100])
def test_no_chunk_has_more_rows_than_asked_for_and_each_token_is_seen_once(chunk: int) -> None:
    seen: list[int] = []

    def loss(logits: Tensor, place: slice) -> Tensor:
        assert len(logits) <= chunk
        seen.extend(range(*place.indices(10**6)))
        return logits.sum()

    chunked(torch.randn(11, 3, requires_grad=True), torch.randn(5, 3), loss, chunk)
    assert seen == list(range(11))


@given(batches(), st.sampled_from(TEMPERATURES))
@settings(max_examples=30, deadline=None)
def test_the_kl_of_a_model_with_itself_is_zero(batch: Batch, temperature: float) -> None:
    assert float(forward_kl(batch.taught, batch.taught, temperature)) == pytest.approx(0)


@given(batches(), st.sampled_from(TEMPERATURES))
@settings(max_examples=60, deadline=None)
def test_the_kl_is_never_negative(batch: Batch, temperature: float) -> None:
    student = (batch.hidden @ batch.head.T).detach()
    assert float(forward_kl(student, batch.taught, temperature)) >= -1e-5


def test_forward_kl_takes_the_student_first_and_weighs_by_the_teacher() -> None:
    student, teacher = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[4.0, 0.0, -4.0]])
    p, q = F.softmax(teacher, dim=-1), F.softmax(student, dim=-1)
    by_hand = float((p * (p / q).log()).sum())
    assert float(forward_kl(student, teacher)) == pytest.approx(by_hand, abs=1e-6)
    other_way = float((q * (q / p).log()).sum())
    assert abs(by_hand - other_way) > 0.5
    assert float(forward_kl(teacher, student)) == pytest.approx(other_way, abs=1e-6)


@pytest.mark.parametrize("shift", [-50.0, 7.0])
def test_losses_ignore_a_constant_added_to_all_logits(shift: float) -> None:
    student, teacher = torch.randn(4, 7), torch.randn(4, 7)
    labels = torch.tensor([0, 3, 6, 1])
    torch.testing.assert_close(
        forward_kl(student + shift, teacher - shift), forward_kl(student, teacher)
    )
    torch.testing.assert_close(
        cross_entropy(student + shift, labels), cross_entropy(student, labels)
    )


def test_losses_of_bf16_logits_are_computed_in_fp32() -> None:
    student, teacher = torch.randn(5, 300).bfloat16(), torch.randn(5, 300).bfloat16()
    labels = torch.randint(300, (5,))
    assert forward_kl(student, teacher).dtype is torch.float32
    torch.testing.assert_close(
        forward_kl(student, teacher), naive_forward_kl(student.float(), teacher.float(), 1.0)
    )
    torch.testing.assert_close(
        cross_entropy(student, labels), F.cross_entropy(student.float(), labels, reduction="sum")
    )
