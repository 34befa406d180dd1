"""How far a student's inner hidden states are from its teacher's (P1 section 3, L_is)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from trainers.config import HiddenLoss
from trainers.families import Family, family_of
from trainers.hooks import on_input, on_output
from trainers.losses import chunked
from trainers.mapping import StateName, layer_number, state_pairs
from trainers.mapping import teacher_states as teacher_states

EPSILON = 1e-6
"""Added to the mean square before a state is divided by its root."""


# --- what a model's states are ---------------------------------------------------------------


@contextmanager
def captured(
    model: PreTrainedModel, states: Sequence[StateName]
) -> Iterator[dict[StateName, Tensor]]:
    """While open, a forward pass of the model puts these states into the dictionary, each (batch,
    length, hidden) and part of the pass' graph; a later pass overwrites them.

    "embedding" is what the embedding gives, "input.i" and "output.i" the residual stream before and
    after layer i, "attention.i" what layer i's attention output projection gives. Raises
    `ValueError` for a layer that the model does not have.
    """
    found: dict[StateName, Tensor] = {}
    with ExitStack() as stack:
        # Closed when the pass is over: layers that are recomputed in the backward pass (gradient
        # checkpointing) must not be captured a second time.
        for state in dict.fromkeys(states):
            stack.callback(_hook(model, state, partial(found.__setitem__, state)).remove)
        yield found


def _hook(
    model: PreTrainedModel, state: StateName, take: Callable[[Tensor], None]
) -> RemovableHandle:
    family = family_of({"model_type": model.config.model_type})
    kind, _, number = state.partition(".")
    if kind == "embedding":
        return on_output(model.get_submodule(family.embedding), take)
    layer = _layer(model, family, number)
    match kind:
        case "input":
            return on_input(layer, take)
        case "output":
            return on_output(layer, take)
        case "attention":
            return on_output(layer.get_submodule(family.attention_output), take)
        case _:
            raise ValueError(
                f"no hidden state is called {state}; "
                "there are embedding, input.N, output.N and attention.N"
            )


def _layer(model: PreTrainedModel, family: Family, number: str) -> nn.Module:
    layers = model.get_submodule(family.layers)
    assert isinstance(layers, nn.ModuleList)
    return layers[layer_number(number, len(layers))]


# --- how they are compared -------------------------------------------------------------------


def normalised(hidden_ND: Tensor) -> Tensor:
    """Each token's state divided by the root of its mean square, in fp32: an RMS norm without
    learned weights, the same for student and teacher whatever norms their families have."""
    return F.rms_norm(hidden_ND.float(), hidden_ND.shape[-1:], eps=EPSILON)


def cosine_distance(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """1 - cosine similarity of each token's two vectors, summed over tokens; fp32."""
    similarity_N = F.cosine_similarity(student_ND.float(), teacher_ND.float(), dim=-1)
    return len(similarity_N) - similarity_N.sum()


def squared_distance(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """Squared differences, a mean over a token's components and summed over tokens; fp32."""
    return (student_ND.float() - teacher_ND.float()).square().mean(-1).sum()


class HiddenDistance(nn.Module):
    """L_is = the sum over pairs of states of their mean distance over tokens (P1 section 3).

    Both states are normalised (see `normalised`), then the student's is raised to the teacher's
    width by a linear layer without bias, shared across positions, one for each pair, also where the
    widths are equal. The layers are trained with the student and are no part of its checkpoint.
    They begin as (semi-)orthogonal matrices drawn with `seed`, which keep lengths and angles.
    """

    def __init__(
        self, loss: HiddenLoss, student: PreTrainedModel, teacher: tuple[int, int], seed: int
    ) -> None:
        """`teacher` is its number of layers and its width. Raises `ValueError` for a mapping that
        names a layer outside of either model."""
        super().__init__()
        layers, width = teacher
        self._distance = cosine_distance if loss.distance == "cosine" else squared_distance
        self.pairs = state_pairs(loss, student.config.num_hidden_layers, layers)
        generator = torch.Generator().manual_seed(seed)
        self.projections = nn.ParameterList(
            _orthogonal(width, student.config.hidden_size, generator).to(student.dtype)
            for _ in self.pairs
        )

    @property
    def student_states(self) -> tuple[StateName, ...]:
        """The student's states that are compared, each once."""
        return tuple(dict.fromkeys(student for student, _ in self.pairs))

    def forward(
        self, student: Mapping[StateName, Tensor], teacher: Mapping[StateName, Tensor]
    ) -> Tensor:
        """The loss of states (batch, length, hidden) as captured. Gradients reach the student's
        states and the projections; they are computed in chunks of tokens, so that what is held for
        the backward pass is one gradient a state."""
        total = torch.zeros((), device=next(iter(student.values())).device)
        for (ours, theirs), weight_TS in zip(self.pairs, self.projections, strict=True):
            total = total + self._of_pair(student[ours], teacher[theirs], weight_TS)
        return total

    def _of_pair(self, student_BLD: Tensor, teacher_BLD: Tensor, weight_TS: Tensor) -> Tensor:
        student_ND = normalised(student_BLD.flatten(0, 1)).to(weight_TS.dtype)
        teacher_ND = teacher_BLD.flatten(0, 1)

        def distance(raised_NT: Tensor, place: slice) -> Tensor:
            return self._distance(raised_NT, normalised(teacher_ND[place]))

        return chunked(student_ND, weight_TS, distance) / len(student_ND)


def _orthogonal(rows: int, columns: int, generator: torch.Generator) -> nn.Parameter:
    weight = torch.empty(rows, columns)
    return nn.Parameter(nn.init.orthogonal_(weight, generator=generator))
