"""Teacher signals: what a student's loss may know of its teacher."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trainers.checkpoints import final_hidden, output_head, softcapped


class TeacherSignal(Protocol):
    """Gives the teacher's logits for a chunk of tokens, exact at every temperature."""

    def hidden(self, input_ids_BL: Tensor) -> Tensor:
        """Final hidden states, (batch, length, hidden), without gradients."""

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """The logits that these final hidden states give, (tokens, vocabulary)."""


class LiveTeacher:
    """Runs the teacher on each batch. Only its final hidden states are held, never all logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model.requires_grad_(False)
        self._head = output_head(model)

    @torch.no_grad()
    def hidden(self, input_ids_BL: Tensor) -> Tensor:
        """See `TeacherSignal`."""
        return final_hidden(self._model, input_ids_BL)

    @torch.no_grad()
    def logits(self, hidden_ND: Tensor) -> Tensor:
        """See `TeacherSignal`."""
        return softcapped(torch.nn.functional.linear(hidden_ND, self._head), self._model)
