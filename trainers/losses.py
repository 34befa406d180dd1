"""Losses as pure functions, and a way to apply them without holding all logits at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ChunkLoss = Callable[[Tensor, slice], Tensor]
"""Given a chunk's student logits (tokens, vocabulary) and its place among all tokens, the *sum* of
the loss over the chunk's tokens."""


def cross_entropy(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Next-token cross-entropy in nats, summed over tokens; computed in fp32."""
    return F.cross_entropy(logits_NV.float(), labels_N, reduction="sum")


def forward_kl(student_NV: Tensor, teacher_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of the next-token distributions in nats, summed over tokens.

    Both logits are divided by the temperature and the result is multiplied by its square, which
    keeps the gradient's size (Hinton et al. 2015). Minitron's L_logits (P1 section 3) at
    temperature 1. Computed in fp32.
    """
    student = F.log_softmax(_cooled(student_NV, temperature), dim=-1)
    teacher = F.log_softmax(_cooled(teacher_NV, temperature), dim=-1)
    # As a scalar product: `F.kl_div` makes several passes more over (tokens, vocabulary), which at
    # 49k words is a fifth of a step.
    return torch.dot(teacher.exp().flatten(), (teacher - student).flatten()) * temperature**2


def reverse_kl(student_NV: Tensor, teacher_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(student || teacher), otherwise as `forward_kl`."""
    student = F.log_softmax(_cooled(student_NV, temperature), dim=-1)
    teacher = F.log_softmax(_cooled(teacher_NV, temperature), dim=-1)
    return torch.dot(student.exp().flatten(), (student - teacher).flatten()) * temperature**2


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
        grad_head = torch.zeros_like(head_VD, dtype=torch.float32)
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden_ND), size):
            place = slice(start, min(start + size, len(hidden_ND)))
            value, d_logits = _value_and_gradient(hidden_ND[place], head_VD, loss, place)
            torch.mm(d_logits, head_VD, out=grad_hidden[place])
            _add_product(grad_head, d_logits, hidden_ND[place])
            total += value
            del d_logits  # or it would stand beside the next chunk's logits
        ctx.save_for_backward(grad_hidden, grad_head.to(head_VD.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden * grads[0], grad_head * grads[0], None, None


def _value_and_gradient(
    hidden_ND: Tensor, head_VD: Tensor, loss: ChunkLoss, place: slice
) -> tuple[Tensor, Tensor]:
    logits_NV = F.linear(hidden_ND, head_VD).requires_grad_()
    with torch.enable_grad():
        value = loss(logits_NV, place)
        (d_logits_NV,) = torch.autograd.grad(value, logits_NV)
    return value.detach(), d_logits_NV


def _add_product(total_VD: Tensor, d_logits_NV: Tensor, hidden_ND: Tensor) -> None:
    if total_VD.dtype == d_logits_NV.dtype:
        # In one call: a product of its own would be as large as the output head, and be added in
        # another pass over it.
        total_VD.addmm_(d_logits_NV.T, hidden_ND)
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
