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

from trainers import losses
from trainers.losses import (
    LOGIT_LOSSES,
    chunked,
    cosine,
    cross_entropy,
    forward_kl,
    likeliest,
    mse,
    reverse_kl,
    sparse_forward_kl,
)

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


def naive_reverse_kl(student_NV: Tensor, teacher_NV: Tensor, temperature: float) -> Tensor:
    teacher = Categorical(logits=teacher_NV / temperature)
    student = Categorical(logits=student_NV / temperature)
    return kl_divergence(student, teacher).sum() * temperature**2


def naive_mse(student_NV: Tensor, teacher_NV: Tensor, temperature: float) -> Tensor:
    differences = student_NV / temperature - teacher_NV / temperature
    return torch.stack([(row * row).sum() / len(row) for row in differences]).sum()


def naive_cosine(student_NV: Tensor, teacher_NV: Tensor, temperature: float) -> Tensor:
    rows = zip(student_NV / temperature, teacher_NV / temperature, strict=True)
    return torch.stack([1 - a @ b / (a.norm() * b.norm()) for a, b in rows]).sum()


NAIVE = {
    "forward_kl": naive_forward_kl,
    "reverse_kl": naive_reverse_kl,
    "mse": naive_mse,
    "cosine": naive_cosine,
}


def naive_logit_loss(
    kind: str, student_NV: Tensor, teacher_NV: Tensor, temperature: float, top_k: int | None
) -> Tensor:
    if top_k is not None:
        best = [torch.argsort(row, descending=True)[:top_k] for row in teacher_NV]
        student_NV = torch.stack([row[b] for row, b in zip(student_NV, best, strict=True)])
        teacher_NV = torch.stack([row[b] for row, b in zip(teacher_NV, best, strict=True)])
    return NAIVE[kind](student_NV, teacher_NV, temperature)


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
def test_a_divergence_of_many_logits_loses_no_small_terms(
    divergence: Callable[[Tensor, Tensor], Tensor],
) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher_NV = 2 * torch.randn(256, 49152, generator=generator)
    student_NV = teacher_NV + torch.randn(256, 49152, generator=generator)
    rows = zip(student_NV.split(4), teacher_NV.split(4), strict=True)
    in_slices = sum(float(divergence(student, teacher)) for student, teacher in rows)
    assert float(divergence(student_NV, teacher_NV)) == pytest.approx(in_slices, rel=2e-6)


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


@pytest.mark.parametrize("kind", LOGIT_LOSSES)
@given(
    batches(), st.integers(1, 14), st.sampled_from(TEMPERATURES), st.sampled_from([None, 1, 3, 40])
)
@settings(max_examples=60, deadline=None)
def test_a_chunked_logit_loss_equals_the_naive_one_with_its_gradients(
    kind: str, batch: Batch, chunk: int, temperature: float, top_k: int | None
) -> None:
    def chunk_loss(logits: Tensor, place: slice) -> Tensor:
        taught = batch.taught[place]
        if top_k is not None:
            logits, taught = likeliest(logits, taught, top_k)
        return LOGIT_LOSSES[kind](logits, taught, temperature)

    ours = value_and_gradients(batch, lambda: chunked(batch.hidden, batch.head, chunk_loss, chunk))
    naive = value_and_gradients(
        batch,
        lambda: naive_logit_loss(
            kind, batch.hidden @ batch.head.T, batch.taught, temperature, top_k
        ),
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


@pytest.mark.parametrize("kind", LOGIT_LOSSES)
def test_every_logit_loss_of_bf16_logits_is_computed_in_fp32(kind: str) -> None:
    student, teacher = torch.randn(5, 300).bfloat16(), torch.randn(5, 300).bfloat16()
    found = LOGIT_LOSSES[kind](student, teacher, 3.0)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, NAIVE[kind](student.float(), teacher.float(), 3.0))


@pytest.mark.parametrize("kind", LOGIT_LOSSES)
def test_every_logit_loss_of_a_model_with_itself_is_zero(kind: str) -> None:
    logits = torch.randn(6, 11)
    assert float(LOGIT_LOSSES[kind](logits, logits, 0.5)) == pytest.approx(0, abs=1e-5)


def test_reverse_kl_is_forward_kl_with_the_roles_exchanged() -> None:
    student, teacher = torch.randn(6, 11), 2 * torch.randn(6, 11)
    found = LOGIT_LOSSES["reverse_kl"](student, teacher, 1.7)
    torch.testing.assert_close(found, forward_kl(teacher, student, 1.7))
    assert abs(float(found - forward_kl(student, teacher, 1.7))) > 0.1


def test_cosine_does_not_depend_on_the_temperature_nor_mse_on_its_vocabularys_size() -> None:
    student, teacher = torch.randn(6, 11), torch.randn(6, 11)
    torch.testing.assert_close(cosine(student, teacher, 0.1), cosine(student, teacher, 3.0))
    twice = [logits.repeat(1, 2) for logits in (student, teacher)]
    torch.testing.assert_close(mse(*twice), mse(student, teacher))


# --- a few tokens of each distribution -------------------------------------------------------


def drawn(teacher_NV: Tensor, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids_NK = torch.multinomial(
        teacher_NV.softmax(-1), samples, replacement=True, generator=generator
    )
    return ids_NK, torch.full(ids_NK.shape, 1 / samples)


@given(batches(), st.integers(1, 14), st.integers(1, 5), st.booleans())
@settings(max_examples=60, deadline=None)
def test_chunked_sparse_kl_equals_the_naive_one_with_its_gradients(
    batch: Batch, chunk: int, samples: int, entropy_known: bool
) -> None:
    ids, weights = drawn(batch.taught, samples, seed=0)
    weights = weights * torch.rand(weights.shape, generator=torch.Generator().manual_seed(1))
    entropy = Categorical(logits=batch.taught).entropy() if entropy_known else None

    def chunk_loss(logits: Tensor, place: slice) -> Tensor:
        known = None if entropy is None else entropy[place]
        return sparse_forward_kl(logits, ids[place], weights[place], known)

    def naive() -> Tensor:
        probabilities = torch.softmax(batch.hidden @ batch.head.T, dim=-1)
        total = torch.zeros(())
        for n in range(len(ids)):
            for k in range(samples):
                total = total - weights[n, k] * probabilities[n, ids[n, k]].log()
        return total if entropy is None else total - entropy.sum()

    ours = value_and_gradients(batch, lambda: chunked(batch.hidden, batch.head, chunk_loss, chunk))
    assert_same(ours, value_and_gradients(batch, naive))


def test_samples_give_the_kl_and_its_gradient_on_the_average() -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(4, 7, generator=generator).requires_grad_()
    teacher = 2 * torch.randn(4, 7, generator=generator)
    entropy = Categorical(logits=teacher).entropy()

    def value_and_gradient(loss: Tensor) -> Tensor:
        return torch.cat([loss.detach()[None], torch.autograd.grad(loss, student)[0].flatten()])

    draws = torch.stack(
        [
            value_and_gradient(sparse_forward_kl(student, *drawn(teacher, 12, seed), entropy))
            for seed in range(2_000)
        ]
    )
    exact = value_and_gradient(forward_kl(student, teacher))
    # Five standard errors of the mean of so many draws: one in a million by chance.
    tolerance = 5 * draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - exact).abs() <= tolerance + 1e-6).all()
    assert float(tolerance.max()) < 0.1
    assert float((draws[0] - exact).abs().max()) > float(tolerance.max())  # one draw is not exact


def test_the_likeliest_tokens_with_all_their_probabilities_give_the_exact_kl() -> None:
    student, teacher = torch.randn(4, 7), torch.randn(4, 7)
    weights, ids = teacher.softmax(-1).topk(7)
    entropy = Categorical(logits=teacher).entropy()
    found = sparse_forward_kl(student, ids, weights, entropy)
    torch.testing.assert_close(found, forward_kl(student, teacher))


def test_the_likeliest_tokens_alone_leave_out_the_others_part() -> None:
    student, teacher = torch.randn(4, 7), torch.randn(4, 7)
    weights, ids = teacher.softmax(-1).topk(3)
    entropy = Categorical(logits=teacher).entropy()
    found = sparse_forward_kl(student, ids, weights, entropy)
    others = torch.ones(4, 7).scatter(1, ids, 0.0)
    left_out = -(others * teacher.softmax(-1) * student.log_softmax(-1)).sum()
    torch.testing.assert_close(found + left_out, forward_kl(student, teacher))
    assert float(left_out) > 0.1


# --- memory ----------------------------------------------------------------------------------


def test_what_is_kept_for_the_backward_pass_has_no_row_of_logits() -> None:
    hidden, head = torch.randn(40, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    kept: list[tuple[int, ...]] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        chunked(hidden, head, lambda logits, place: logits.square().sum(), 8)
    assert (40, 9) not in kept
    assert max(shape[0] for shape in kept if shape[1:] == (9,)) == 8


@pytest.mark.parametrize("kind", LOGIT_LOSSES)
def test_a_loss_taken_over_a_few_rows_at_a_time_is_that_of_all_rows(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    hidden_ND, head_VD = torch.randn(10, 4), torch.randn(7, 4)
    teacher_NV = torch.randn(10, 7)

    def found(rows_of: int) -> list[Tensor]:
        monkeypatch.setattr(losses, "ROWS_OF", rows_of)
        hidden, head = hidden_ND.clone().requires_grad_(), head_VD.clone().requires_grad_()
        loss = LOGIT_LOSSES[kind]
        total = chunked(hidden, head, lambda x, at: loss(x, teacher_NV[at], 2.0), 6)
        total.backward()
        assert hidden.grad is not None and head.grad is not None
        return [total.detach(), hidden.grad, head.grad]

    assert_same(found(rows_of=2 * 7), found(rows_of=100 * 7))
