"""Losses as pure functions, and a way to apply them without holding all logits at once."""

from __future__ import annotations

from collections.abc import Callable
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
        head = head_VD.detach().requires_grad_()
        for start in range(0, len(hidden_ND), size):
            place = slice(start, min(start + size, len(hidden_ND)))
            with torch.enable_grad():
                hidden = hidden_ND[place].detach().requires_grad_()
                value = loss(F.linear(hidden, head), place)
                d_hidden, d_head = torch.autograd.grad(value, (hidden, head))
            grad_hidden[place] = d_hidden
            grad_head += d_head
            total += value.detach()
        ctx.save_for_backward(grad_hidden, grad_head.to(head_VD.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden * grads[0], grad_head * grads[0], None, None


def chunked(
    hidden_ND: Tensor, head_VD: Tensor, loss: ChunkLoss, chunk_tokens: int = 1024
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
