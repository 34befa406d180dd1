"""Teacher signals: what a student's loss may know of its teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from trainers.checkpoints import (
    capped,
    final_hidden,
    load_tokenizer,
    output_head,
    read_config,
    softcap_of,
)
from trainers.contract import StageError
from trainers.hidden import captured
from trainers.losses import CHUNK_TOKENS
from trainers.mapping import StateName as StateName


@dataclass(frozen=True)
class OutputHead:
    """What turns final hidden states into logits: the output head's weight, and c of the soft cap
    c * tanh(logits / c) where the model has one (Gemma 2)."""

    weight_VD: Tensor
    softcap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> OutputHead:
        """The model's own, without a copy."""
        return cls(output_head(model).detach(), softcap_of(model))

    @torch.no_grad()
    def __call__(self, hidden_ND: Tensor, into_NV: Tensor | None = None) -> Tensor:
        """Logits, (tokens, vocabulary), without gradients; in the memory of `into_NV`, which has
        at least as many rows, where it is given."""
        hidden_ND = hidden_ND.to(self.weight_VD.dtype)
        if into_NV is None:
            return capped(F.linear(hidden_ND, self.weight_VD), self.softcap)
        logits_NV = torch.mm(hidden_ND, self.weight_VD.T, out=into_NV[: len(hidden_ND)])
        return capped(logits_NV, self.softcap)


@dataclass
class _Window:
    """The logits of `CHUNK_TOKENS` positions in a row, so that they cost one matrix product however
    few of them are asked for at a time."""

    start: int = -1
    logits_NV: Tensor | None = None

    def logits(self, place: slice, hidden_ND: Tensor, head: OutputHead) -> Tensor:
        """The logits at these positions. The window moves to where they are."""
        first, end, _ = place.indices(len(hidden_ND))
        start = first - first % CHUNK_TOKENS
        if end > start + CHUNK_TOKENS:  # chunks of another size
            return head(hidden_ND[place])
        if self.logits_NV is None or self.start != start:
            wanted_ND = hidden_ND[start : start + CHUNK_TOKENS]
            into = self.logits_NV
            fits = into is not None and len(into) >= len(wanted_ND)
            self.logits_NV = head(wanted_ND, into if fits else None)
            self.start = start
        return self.logits_NV[first - start : end - start]


@dataclass(frozen=True)
class DenseTargets:
    """All of the teacher's next-token distributions, exact at every temperature.

    `hidden_ND` are its final hidden states at the N = batch * (length - 1) positions that predict a
    token; all their logits are never held. `states` are inner states as captured, not normalised,
    each (batch, length, hidden).
    """

    hidden_ND: Tensor
    states: Mapping[StateName, Tensor]
    head: OutputHead
    _window: _Window = field(default_factory=_Window, init=False, repr=False, compare=False)

    def logits(self, place: slice) -> Tensor:
        """The teacher's logits at these positions, (tokens, vocabulary), soft cap applied, without
        gradients; good until the next call."""
        return self._window.logits(place, self.hidden_ND, self.head)


@dataclass(frozen=True)
class SparseTargets:
    """A few tokens of each of the teacher's next-token distributions, at temperature 1.

    `ids_NK` (int64) are tokens and `weights_NK` (fp32) what they weigh: 1/K for each of K samples
    drawn from the teacher, or its probabilities (not renormalised) of its K likeliest tokens.
    `entropy_N` (nats) is the entropy of its distribution where that is known.
    """

    ids_NK: Tensor
    weights_NK: Tensor
    entropy_N: Tensor | None


class TeacherSignal(Protocol):
    """Says what the teacher makes of a micro-batch of token ids."""

    def targets(self, input_ids_BL: Tensor, blocks_B: Tensor) -> DenseTargets | SparseTargets:
        """The teacher's word on each predicted token, positions flattened (batch, length - 1) -> N.

        `blocks_B` (int64, CPU) are the numbers of the training blocks that make up the batch.
        """


class LiveTeacher:
    """Runs the teacher on each batch. Only its final hidden states are held, and the inner ones
    that are asked for; never all logits.

    `head` is given where the model's own cannot be read at any time, as when its weights are
    sharded.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        states: Sequence[StateName] = (),
        head: OutputHead | None = None,
    ) -> None:
        self._model = model.requires_grad_(False)
        self._states = tuple(states)
        self._head = head

    @torch.no_grad()
    def targets(self, input_ids_BL: Tensor, blocks_B: Tensor | None = None) -> DenseTargets:
        """See `TeacherSignal`; the numbers of the blocks are not looked at. The first call moves
        the teacher to where the token ids are."""
        if self._model.device != input_ids_BL.device:
            self._model.to(input_ids_BL.device)
        head = self._head or OutputHead.of(self._model)
        with captured(self._model, self._states) as states:
            hidden_BLD = final_hidden(self._model, input_ids_BL)
        return DenseTargets(hidden_BLD[:, :-1].flatten(0, 1), states, head)


class RememberedTeacher:
    """A live teacher that is asked about the same text for one student after the other: it is run
    once on each batch, told by the number of its first block, and its final hidden states stay."""

    def __init__(self, live: LiveTeacher) -> None:
        self._live = live
        self._said: dict[int, DenseTargets] = {}

    def targets(self, input_ids_BL: Tensor, blocks_B: Tensor) -> DenseTargets:
        """See `TeacherSignal`."""
        first = int(blocks_B[0])
        if first not in self._said:
            self._said[first] = self._live.targets(input_ids_BL, blocks_B)
        # A copy, as its window of logits is not to stay.
        return replace(self._said[first])


def check_same_words(student_folder: Path, teacher_folder: Path) -> None:
    """Raise `StageError`, naming both, where the vocabularies of two checkpoints differ in size, or
    their tokenizers, where both have one, in a word or its number."""
    sizes = [read_config(folder)["vocab_size"] for folder in (student_folder, teacher_folder)]
    if sizes[0] != sizes[1]:
        raise StageError(
            f"the vocabularies differ: {sizes[0]} in the student, {sizes[1]} in the teacher"
        )
    if not (_has_tokenizer(student_folder) and _has_tokenizer(teacher_folder)):
        return
    student, teacher = (
        load_tokenizer(folder).get_vocab() for folder in (student_folder, teacher_folder)
    )
    if student != teacher:
        word = min(word for word, number in student.items() ^ teacher.items())
        raise StageError(
            f"the tokenizers differ: {word!r} is {_number(student, word)} in the student, "
            f"{_number(teacher, word)} in the teacher"
        )


def _has_tokenizer(folder: Path) -> bool:
    """Whether a checkpoint's folder holds a tokenizer."""
    return (folder / "tokenizer_config.json").exists()


def _number(vocabulary: Mapping[str, int], word: str) -> str:
    return str(vocabulary[word]) if word in vocabulary else "no word"
