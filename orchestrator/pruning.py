"""What a trial cuts and how far: the settings under `prune`, and the sizes they come to.

Every size is absolute, or a fraction of the source's. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from orchestrator.located import Part
from trainers.config import ByActivation, Frozen, RandomUnits, Shorthand
from trainers.shapes import Shape, Sizes, problems_with


def inconsistent(problems: Sequence[tuple[tuple[Part, ...], str]]) -> PydanticCustomError:
    """An error about several settings, each with its place below the model that raises it."""
    text = "; ".join(f"{'.'.join(map(str, at))}: {what}" for at, what in problems)
    return PydanticCustomError("inconsistent", "{text}", {"text": text, "problems": problems})


def _check_size(value: Any) -> Any:
    if value is None:
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        problem = "must be a whole number (1, 2, …) or a fraction of the source's above 0 up to 1.0"
    elif isinstance(value, int) and value < 1:
        problem = f"is {value}, must be at least 1"
    elif isinstance(value, float) and not 0 < value <= 1:
        problem = f"is {value}, must be a fraction above 0 up to 1.0, or a whole number"
    else:
        return value
    raise PydanticCustomError("size", "{problem}", {"problem": problem})


Size = Annotated[int | float | None, BeforeValidator(_check_size)]
"""A whole number is a size, a number with a point a fraction of the source's (1.0: all of it)."""


def is_size(value: Any) -> bool:
    """Whether a `Size` may have this value."""
    try:
        _check_size(value)
    except PydanticCustomError:
        return False
    return True


# --- depth -----------------------------------------------------------------------------------


class ByPerplexity(Frozen):
    """Drop what raises the calibration loss least."""

    kind: Literal["perplexity"] = "perplexity"


class ByBlockInfluence(Frozen):
    """Drop what changes the hidden states least."""

    kind: Literal["block_influence"] = "block_influence"


class ByTask(Frozen):
    """Drop what lowers the accuracy on `importance.tasks` least."""

    kind: Literal["task"] = "task"


class RandomLayers(Frozen):
    """Drop layers drawn with the trial's seed."""

    kind: Literal["random"] = "random"


class Explicit(Frozen):
    """Drop exactly these layers, counted from 0."""

    kind: Literal["layers"] = "layers"
    drop: tuple[int, ...]


DepthCriterion = Annotated[
    ByPerplexity | ByBlockInfluence | ByTask | RandomLayers | Explicit,
    Field(discriminator="kind"),
    Shorthand,
]


class DepthSettings(Frozen):
    """How many layers stay, and which.

    `keep` is a number of layers, or a fraction of the source's. An explicit list says it already:
    there `keep` may be left out, and must agree where it is given.
    """

    keep: Size = None
    criterion: DepthCriterion
    contiguous: bool = False

    @property
    def scored(self) -> bool:
        """Whether the layers are chosen by scores of the model."""
        return not isinstance(self.criterion, Explicit | RandomLayers)

    def layers_kept(self, num_hidden_layers: int) -> int:
        """Of so many layers, how many stay; a fraction is rounded and leaves one at least.

        Does not check that it is possible: the result may be above `num_hidden_layers`, or below 1
        for a list.
        """
        if isinstance(self.criterion, Explicit):
            return num_hidden_layers - len(self.criterion.drop)
        return self._asked_for(num_hidden_layers)

    def contradiction(self, num_hidden_layers: int) -> str | None:
        """How `keep` and an explicit list disagree for a source of so many layers, if they do."""
        kept = self.layers_kept(num_hidden_layers)
        if self.keep is None or kept == self._asked_for(num_hidden_layers):
            return None
        return (
            f"keep {self.keep} of {num_hidden_layers} layers contradicts criterion.drop, which "
            f"leaves {kept}; write `keep: null` to let the list decide"
        )

    def _asked_for(self, num_hidden_layers: int) -> int:
        if isinstance(self.keep, float):
            return max(1, round(self.keep * num_hidden_layers))
        return self.keep or 0

    @model_validator(mode="after")
    def _complete(self) -> DepthSettings:
        if isinstance(self.criterion, Explicit):
            drop = self.criterion.drop
            if not drop or min(drop) < 0 or len(set(drop)) < len(drop):
                raise inconsistent(
                    [(("criterion", "drop"), "must list layers, counted from 0, each once")]
                )
        elif self.keep is None:
            raise inconsistent(
                [(("keep",), f"is required with the criterion {self.criterion.kind}")]
            )
        return self


# --- width -----------------------------------------------------------------------------------

WIDTHS = ("intermediate_size", "hidden_size", "num_attention_heads", "num_key_value_heads")


class WidthSettings(Frozen):
    """How wide the layers stay, and which neurons, heads and channels those are.

    A fraction of `intermediate_size` or `hidden_size` is rounded to a multiple of `multiple_of`
    (and of the heads, where the family wants that), one of `num_attention_heads` so that every
    group keeps equally many. Query heads are cut inside their groups; `num_key_value_heads` cuts
    whole groups. Where each head is its own group, cutting heads cuts groups.
    """

    intermediate_size: Size = None
    hidden_size: Size = None
    num_attention_heads: Size = None
    num_key_value_heads: Size = None
    multiple_of: int = Field(default=8, gt=0)
    criterion: Annotated[ByActivation | RandomUnits, Field(discriminator="kind"), Shorthand] = (
        ByActivation()
    )
    head_residual: bool = False
    rescale_norms: bool = False

    @property
    def scored(self) -> bool:
        """Whether the units are chosen by their activations."""
        return isinstance(self.criterion, ByActivation)

    def target(self, source: Shape, num_hidden_layers: int) -> Sizes:
        """The sizes that these settings mean for a source; they may be impossible."""
        heads, groups = self._heads(source)
        multiple = self.multiple_of
        if source.family.hidden_multiple_of_heads:
            multiple = math.lcm(multiple, heads)
        hidden = _sized(self.hidden_size, source.hidden_size, multiple)
        if not source.family.free_head_dim:  # heads and channels can only be cut together
            if self.num_attention_heads is None and hidden % source.head_dim == 0:
                heads = groups = hidden // source.head_dim
            elif self.hidden_size is None:
                hidden = heads * source.head_dim
        return Sizes(
            num_hidden_layers=num_hidden_layers,
            hidden_size=hidden,
            intermediate_size=_sized(
                self.intermediate_size, source.intermediate_size, self.multiple_of
            ),
            num_attention_heads=heads,
            num_key_value_heads=groups,
        )

    def _heads(self, source: Shape) -> tuple[int, int]:
        heads, groups = source.num_attention_heads, source.num_key_value_heads
        kept_groups = _sized(self.num_key_value_heads, groups, 1)
        if heads == groups and self.num_key_value_heads is None:
            kept = _sized(self.num_attention_heads, heads, 1)
            return kept, kept
        if self.num_attention_heads is None:
            return kept_groups * (heads // groups), kept_groups
        return _sized(self.num_attention_heads, heads, kept_groups), kept_groups


def _sized(asked: int | float | None, whole: int, multiple: int) -> int:
    """The size asked for; a fraction is rounded to a multiple and stays within the whole."""
    if asked is None or asked == whole:
        return whole
    if isinstance(asked, int):
        return asked
    return whole if asked == 1 else min(whole, max(1, round(asked * whole / multiple)) * multiple)


# --- both ------------------------------------------------------------------------------------


class PruneSettings(Frozen):
    """What is cut, in how many rounds of scoring and cutting, and from which weights one starts.

    With `iterations` T the model is scored and cut T times, each time by the same amount (P1
    section 2.4). `initialise: random` keeps the pruned shape and draws new weights.
    """

    depth: DepthSettings | None = None
    width: WidthSettings | None = None
    iterations: int = Field(default=1, gt=0)
    initialise: Literal["inherited", "random"] = "inherited"

    def target(self, source: Shape, num_hidden_layers: int | None = None) -> Sizes:
        """The sizes after pruning, for fractions of `source`; an explicit list of layers is taken
        out of `num_hidden_layers`, the layers that the model at hand has."""
        layers = at_hand = num_hidden_layers or source.num_hidden_layers
        if self.depth is not None:
            explicit = isinstance(self.depth.criterion, Explicit)
            layers = self.depth.layers_kept(at_hand if explicit else source.num_hidden_layers)
        return (self.width or WidthSettings()).target(source, layers)

    @model_validator(mode="after")
    def _complete(self) -> PruneSettings:
        problems: list[tuple[tuple[Part, ...], str]] = []
        if self.depth is None and self.width is None and self.initialise == "inherited":
            problems.append(((), "needs depth, width or both"))
        if self.iterations > 1:
            parts: Mapping[str, Any] = {"depth": self.depth, "width": self.width}
            for name, part in parts.items():
                if part is not None and not part.scored:
                    text = (
                        f"more than 1 needs scores, and {name}.criterion is {part.criterion.kind}"
                    )
                    problems.append((("iterations",), text))
        if problems:
            raise inconsistent(problems)
        return self


def stepwise(source: Shape, target: Sizes, rounds: int) -> list[Sizes]:
    """Sizes after each of `rounds` rounds, in equal steps from source to target: after round i,
    d_s - i (d_s - d_t) / T (P1 section 2.4), heads in whole steps of a group.

    Rounds that would cut nothing, or stop at a shape that the family cannot have, are left out.
    """
    found: list[Sizes] = []
    for number in range(1, rounds):
        sizes = _after(source, target, number / rounds)
        before = source.resized(found[-1]) if found else source
        if sizes not in (before.sizes, target) and not problems_with(before, sizes):
            found.append(sizes)
    return [*found, target]


def _after(source: Shape, target: Sizes, share: float) -> Sizes:
    """The sizes when this share of the way is done."""

    def between(start: int, end: int) -> int:
        return start - round((start - end) * share)

    groups = between(source.num_key_value_heads, target.num_key_value_heads)
    queries = target.num_attention_heads // target.num_key_value_heads
    heads = groups * between(source.heads_per_group, queries)
    hidden = between(source.hidden_size, target.hidden_size)
    if source.family.hidden_multiple_of_heads:
        hidden = min(source.hidden_size, -(-hidden // heads) * heads)
    return Sizes(
        num_hidden_layers=between(source.num_hidden_layers, target.num_hidden_layers),
        hidden_size=hidden,
        intermediate_size=between(source.intermediate_size, target.intermediate_size),
        num_attention_heads=heads,
        num_key_value_heads=groups,
    )
