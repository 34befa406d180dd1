"""Losses as pure functions, and a way to apply them without holding all logits at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ChunkLoss = Callable[[Tensor, slice], Tensor]
"""Given student logits (tokens, vocabulary) of some tokens and their place among all tokens, the
*sum* of the loss over these tokens."""


def cross_entropy(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Next-token cross-entropy in nats, summed over tokens; computed in fp32."""
    return F.cross_entropy(logits_NV.float(), labels_N, reduction="sum")


ROWS_OF = 2**19
"""How many logits a CPU works on at a time: 2 MB of fp32, so that the passes that a loss makes over
them stay in its cache. With 49k words that is 3 times as fast as all of a chunk at once."""


def forward_kl(student_NV: Tensor, teacher_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of the next-token distributions in nats, summed over tokens.

    Both logits are divided by the temperature and the result is multiplied by its square, which
    keeps the gradient's size (Hinton et al. 2015). Minitron's L_logits (P1 section 3) at
    temperature 1. Computed in fp32.
    """
    taught_NV = _cooled(teacher_NV, temperature)
    divergence: Tensor = _ForwardKL.apply(_cooled(student_NV, temperature), taught_NV)  # type: ignore[no-untyped-call]
    return divergence * temperature**2


class _ForwardKL(torch.autograd.Function):
    """KL(teacher || student) summed over tokens. Its gradient for the student's logits is the
    difference of the probabilities, which costs half of what autograd's own passes over (tokens,
    vocabulary) do; the teacher's logits get none."""

    @staticmethod
    def forward(ctx: Any, student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
        student_NV, teacher_NV = student_NV.log_softmax(-1), teacher_NV.log_softmax(-1)
        probabilities_NV = teacher_NV.exp()
        teacher_NV -= student_NV
        # As a scalar product: `F.kl_div` makes several passes more.
        divergence = _product(probabilities_NV, teacher_NV)
        ctx.save_for_backward(student_NV.exp_().sub_(probabilities_NV))
        return divergence

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (difference_NV,) = ctx.saved_tensors
        return difference_NV * grads[0], None


def reverse_kl(student_NV: Tensor, teacher_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(student || teacher), otherwise as `forward_kl`."""
    student = F.log_softmax(_cooled(student_NV, temperature), dim=-1)
    teacher = F.log_softmax(_cooled(teacher_NV, temperature), dim=-1)
    return _product(student.exp(), student - teacher) * temperature**2


def _product(first_NV: Tensor, second_NV: Tensor) -> Tensor:
    """The scalar product, a slice at a time: a single sum of 50 million terms in fp32 loses so many
    small ones that a divergence came out 0.2% too large."""
    slices = (torch.split(each.flatten(), ROWS_OF) for each in (first_NV, second_NV))
    return torch.stack([torch.dot(*pair) for pair in zip(*slices, strict=True)]).sum()


def mse(student_NV: Tensor, teacher_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """Squared differences of the logits divided by the temperature, a mean over the vocabulary and
    summed over tokens (P1 table 15). Computed in fp32."""
    squares = F.mse_loss(student_NV.float(), teacher_NV.float(), reduction="sum")
    return squares / (student_NV.shape[-1] * temperature**2)


def cosine(student_NV: Tensor, teacher_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """1 - cosine similarity of the logits, summed over tokens (P1 table 15). Computed in fp32.

    A temperature changes the length of both vectors and so leaves the loss as it is.
    """
    del temperature
    similarity_N = F.cosine_similarity(student_NV.float(), teacher_NV.float(), dim=-1)
    return (1 - similarity_N).sum()


LogitLoss = Callable[[Tensor, Tensor, float], Tensor]
LOGIT_LOSSES: Mapping[str, LogitLoss] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "mse": mse,
    "cosine": cosine,
}
"""By the names in `trainers.config.DistillLoss`: student's logits, teacher's logits and temperature
to the loss summed over tokens."""


def likeliest(student_NV: Tensor, teacher_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Both logits of the teacher's k likeliest tokens, (tokens, k): a loss of these leaves out all
    other tokens, and a softmax over them renormalises both sides. All tokens where k is more."""
    taught_NK, ids_NK = teacher_NV.topk(min(k, teacher_NV.shape[-1]), dim=-1)
    return student_NV.gather(-1, ids_NK), taught_NK


def sparse_forward_kl(
    student_NV: Tensor, ids_NK: Tensor, weights_NK: Tensor, entropy_N: Tensor | None = None
) -> Tensor:
    """The sum over tokens n and k of -weight * log p_student(id), less the teacher's entropy where
    it is known; in nats, computed in fp32.

    For samples drawn from the teacher (weights 1/K) that is an unbiased estimate of KL(teacher ||
    student), gradient included; without the entropy, of the cross-entropy, which differs from it by
    a constant. For the teacher's K likeliest tokens with their probabilities it leaves out the
    other tokens' part, p_teacher * -log p_student: the value is too small, and the student learns
    the K probabilities renormalised and none for the others.
    """
    log_probabilities_NV = F.log_softmax(student_NV.float(), dim=-1)
    picked_NK = log_probabilities_NV.gather(-1, ids_NK)
    cross = -torch.dot(weights_NK.float().flatten(), picked_NK.flatten())
    return cross if entropy_N is None else cross - entropy_N.float().sum()


def _cooled(logits_NV: Tensor, temperature: float) -> Tensor:
    # Dividing by one would pass over every logit for nothing: a tenth of a step with 49k words.
    return logits_NV.float() if temperature == 1 else logits_NV.float() / temperature


class _ChunkedLoss(torch.autograd.Function):
    """Loss and gradients chunk by chunk in the forward pass; backward only scales them."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, head_VD: Tensor, loss: ChunkLoss, size: int) -> Tensor:
        grad_hidden = torch.empty_like(hidden_ND)
        grad_head = torch.empty_like(head_VD, dtype=torch.float32)
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        # One piece of memory for every chunk: fresh pages cost as much as a tenth of the product.
        logits_NV = hidden_ND.new_empty(min(size, len(hidden_ND)), len(head_VD))
        for start in range(0, len(hidden_ND), size):
            place = slice(start, min(start + size, len(hidden_ND)))
            chunk_NV = logits_NV[: place.stop - start]
            torch.mm(hidden_ND[place], head_VD.T, out=chunk_NV)
            total += _turn_into_gradient(chunk_NV, loss, start)
            torch.mm(chunk_NV, head_VD, out=grad_hidden[place])
            _add_product(grad_head, chunk_NV, hidden_ND[place], first=start == 0)
        ctx.save_for_backward(grad_hidden, grad_head.to(head_VD.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_head = ctx.saved_tensors
        # In place, as nobody else has them; autograd refuses a second time.
        return grad_hidden.mul_(grads[0]), grad_head.mul_(grads[0]), None, None


def _turn_into_gradient(logits_NV: Tensor, loss: ChunkLoss, start: int) -> Tensor:
    """The loss of the logits, which stand from `start` among all tokens; afterwards the tensor
    holds the loss's gradient."""
    tokens, words = logits_NV.shape
    rows = tokens if logits_NV.is_cuda else max(1, ROWS_OF // words)
    total = logits_NV.new_zeros((), dtype=torch.float32)
    for first in range(0, tokens, rows):
        rows_RV = logits_NV[first : first + rows].detach().requires_grad_()
        with torch.enable_grad():
            value = loss(rows_RV, slice(start + first, start + first + len(rows_RV)))
            (gradient_RV,) = torch.autograd.grad(value, rows_RV)
        total += value.detach()
        logits_NV[first : first + rows] = gradient_RV
    return total


def _add_product(total_VD: Tensor, d_logits_NV: Tensor, hidden_ND: Tensor, first: bool) -> None:
    if total_VD.dtype == d_logits_NV.dtype:
        # In one call: a product of its own would be as large as the output head, and be added in
        # another pass over it.
        total_VD.addmm_(d_logits_NV.T, hidden_ND, beta=0 if first else 1)
    elif first:
        total_VD.copy_(d_logits_NV.T @ hidden_ND)
    else:
        total_VD += d_logits_NV.T @ hidden_ND


CHUNK_TOKENS = 512
"""Rows of logits at once: at 49k words 100 MB of fp32 for each of the handful of tensors that a
loss makes of them."""


def chunked(
    hidden_ND: Tensor, head_VD: Tensor, loss: ChunkLoss, chunk_tokens: int = CHUNK_TOKENS
) -> Tensor:
    """The sum of `loss` over all tokens, with at most `chunk_tokens` rows of logits in memory.

    Gradients reach the final hidden states and the output head. Without gradients enabled, only
    the value is computed.
    """
    if torch.is_grad_enabled():
        result: Tensor = _ChunkedLoss.apply(hidden_ND, head_VD, loss, chunk_tokens)  # type: ignore[no-untyped-call]
        return result
    total = hidden_ND.new_zeros((), dtype=torch.float32)
    for start in range(0, len(hidden_ND), chunk_tokens):
        place = slice(start, min(start + chunk_tokens, len(hidden_ND)))
        total += loss(F.linear(hidden_ND[place], head_VD), place)
    return total
