"""What a sweep asks of its trials: which of them wins, and which published claims hold.

Read by the planner, so nothing heavy is imported; judged by `orchestrator.claims`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from trainers.config import Frozen


def lower_is_better(metric: str) -> bool:
    """Whether less of the metric is better: losses, errors, waiting and memory."""
    kind = metric.partition(".")[0]
    return any(part in kind for part in ("loss", "error", "first_token", "peak_memory"))


class Select(Frozen):
    """What makes a trial the winner. Losses are best low, anything else high, unless said.

    Only trials of the grid `among` those meant, and the baselines, can win; in a race, unless said,
    those of its last rung.
    """

    metric: str = "accuracy.mean"
    mode: Literal["max", "min"] = "max"
    among: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _losses_are_best_low(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "mode" in data:
            return data
        if lower_is_better(str(data.get("metric", ""))):
            return {**data, "mode": "min"}
        return data


# --- claims ----------------------------------------------------------------------------------

BASELINE, SEED, RUNG = "baseline", "seed", "rung"
"""Names that a group may use beside the sweep's axes."""


def _some_value_each(group: dict[str, Any]) -> dict[str, Any]:
    for name, wanted in group.items():
        if wanted in ((), []):
            raise PydanticCustomError("no_value", "{name} lists no value", {"name": name})
    return group


Group = Annotated[dict[str, Any], Field(min_length=1), AfterValidator(_some_value_each)]
"""Which trials: a name of an axis, `baseline` or `seed` -> a value or several, all of which hold.
Only where it names a `baseline` are baselines meant."""


class _Claim(Frozen):
    """`practice` is the number of the published best practice, `published` what its authors
    measured. `among` narrows the trials that are looked at."""

    text: str = Field(min_length=1)
    practice: int | None = Field(default=None, gt=0)
    among: Group | None = None
    published: str | None = None


OTHERS = {"others": True}


def _others(value: Any) -> Any:
    return OTHERS if value == "others" else value


Opponents = Annotated[Group, BeforeValidator(_others)]
"""A group, or `others`: all trials of the grid that are not in the first one."""


class Better(_Claim):
    """The first group does better than the second."""

    better: Group
    than: Opponents
    metric: str


class BetterThanEach(_Claim):
    """The first group does better than every setting of the second by itself: it is the best.

    A claim about `than` is about the mean of the second group, which one bad setting can drag down.
    """

    better: Group
    than_each: Opponents
    metric: str


class NoBetter(_Claim):
    """The first group improves on the second by less than `within`, in the metric's unit."""

    no_better: Group
    than: Opponents
    within: float = Field(gt=0)
    metric: str


class Rankings(Frozen):
    """Two metrics that rank the configurations, and the agreement that is said to be missed."""

    first: str
    then: str
    agreement_below: float = Field(gt=-1, le=1)
    """Kendall's tau: 1 for the same ranking, -1 for the reverse, about 0 for unrelated ones."""


class RankingChanges(_Claim):
    """One metric ranks the configurations otherwise than another."""

    ranking: Rankings


_KINDS: dict[str, type[Better] | type[BetterThanEach] | type[NoBetter] | type[RankingChanges]] = {
    "better": Better,
    "no_better": NoBetter,
    "ranking": RankingChanges,
}


def _as_claim(value: Any) -> Any:
    """The claim of the kind whose key it has; errors inside it keep their place."""
    if isinstance(value, _Claim):
        return value
    if not isinstance(value, Mapping):
        raise PydanticCustomError("claim", "must be a mapping")
    present = [key for key in _KINDS if key in value]
    if len(present) == 1:
        # Also where that is misspelt: the message is then about what was meant.
        each = present == ["better"] and any(str(key).startswith("than_") for key in value)
        kind = BetterThanEach if each else _KINDS[present[0]]
        return kind.model_validate(value, strict=True)
    given = " and ".join(present) or "none"
    text = "a claim has one of better, no_better, ranking; this one has {given}"
    raise PydanticCustomError("claim_kind", text, {"given": given})


Claim = Annotated[Better | BetterThanEach | NoBetter | RankingChanges, BeforeValidator(_as_claim)]


GROUPS = ("better", "no_better", "than", "than_each", "among")
"""The keys of a claim under which a group stands."""

METRICS = (("metric",), ("ranking", "first"), ("ranking", "then"))
"""Where a claim may name a metric."""


# --- values of axes --------------------------------------------------------------------------


def key_of(value: Any) -> str:
    """One text for values that mean the same: 1 and 1.0, a variant and its name alone."""
    if isinstance(value, str):
        value = {"kind": value}
    return json.dumps(_canonical(value), sort_keys=True)


def _canonical(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _canonical(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def keys_meant(wanted: Any, tried: set[str]) -> set[str]:
    """The keys of a value or of several; a list is one value where the axis has such a value."""
    if not isinstance(wanted, list | tuple) or key_of(wanted) in tried:
        return {key_of(wanted)}
    return {key_of(each) for each in wanted}
