"""The settings under `search` and `scheduler`: which trials are tried, and which run to the end."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from orchestrator.asked import RUNG, Select, lower_is_better
from trainers.config import Frozen

# --- which trials are tried ------------------------------------------------------------------


class Objective(Frozen):
    """What a search makes small or large. Losses, errors, sizes and costs are best low, unless
    said."""

    metric: Annotated[str, Field(min_length=1)]
    mode: Literal["max", "min"]

    @model_validator(mode="before")
    @classmethod
    def _least_is_best(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "mode" in data or not isinstance(data.get("metric"), str):
            return data
        low = lower_is_better(data["metric"]) or data["metric"] in SIZES
        return {**data, "mode": "min" if low else "max"}


SIZES = ("parameters", "parameters_non_embedding", "tokens_trained", "cpu_s", "gpu_s", "wall_s")
"""Columns of a trial's row that an objective may name beside its metrics."""


class Search(Frozen):
    """How the grid is searched: all of it (`grid`), or `trials` configurations of it, drawn at
    `random` or proposed by Optuna's tree-structured Parzen estimator (`tpe`), Gaussian process
    (`gp`) or NSGA-II (`nsga2`). Each is run with every seed; a mean over seeds is what is learned
    from. Without `objectives`, what selects the winner is sought.
    """

    method: Literal["grid", "random", "tpe", "gp", "nsga2"] = "grid"
    trials: int | None = Field(default=None, gt=0)
    objectives: tuple[Objective, ...] = ()
    seed: int = Field(default=0, ge=0, lt=2**32)
    startup: int = Field(default=10, gt=0)
    """Configurations drawn at random before a model of what was measured proposes any; the size of
    a population for `nsga2`."""

    @model_validator(mode="after")
    def _whole(self) -> Search:
        if self.method == "grid" and _differs(self, "trials", "objectives", "seed", "startup"):
            text = (
                "trials, objectives, seed and startup are for the methods random, tpe, gp and nsga2"
            )
            raise ValueError(text)
        if self.method != "grid" and self.trials is None:
            raise ValueError(f"{self.method} needs trials: how many configurations to try")
        if self.method == "nsga2" and self.startup < 2:
            raise ValueError("nsga2 needs a startup of at least 2: the size of its population")
        names = [objective.metric for objective in self.objectives]
        if len(set(names)) < len(names):
            raise ValueError("an objective is named twice")
        return self


def _differs(settings: Frozen, *names: str) -> bool:
    """Whether one of these is not as it is without being set: a resolved file has all of them."""
    defaults = type(settings).model_fields
    return any(getattr(settings, name) != defaults[name].default for name in names)


# --- which trials run to the end -------------------------------------------------------------


class Rung(Frozen):
    """One round of a race: settings laid over every trial's, and how many configurations go on."""

    name: Annotated[str, Field(min_length=1)]
    set: dict[str, Any] = Field(default_factory=dict)
    keep: int | None = Field(default=None, gt=0)


class Scheduler(Frozen):
    """Which trials run to the end: all of them (`none`), the best of each rung of a `race`, or
    those that early stopping lets live, by Ray Tune's rules: asynchronous successive halving
    (`asha`, Li et al. 2020) or the median of the others (`median`, Golovin et al. 2017).

    A race goes by `metric`, losses best low and other metrics high. `asha` and `median` go by the
    held-out loss that trials measure on their way (`distill.heldout_every`), and never before
    `floor_tokens` of distillation: rankings flip in the first few hundred steps (practice 9). A
    rung of `asha` is `reduction` times as long as the one before, and one in `reduction` passes it.
    What one of them does not read may stand there for the other: a file can be run under each.
    """

    method: Literal["none", "race", "asha", "median"] = "none"
    metric: str = "lm_loss.after"
    rungs: tuple[Rung, ...] = ()
    floor_tokens: int | None = Field(default=None, gt=0)
    reduction: float = Field(default=3.0, gt=1)
    at_least: int = Field(default=3, gt=0)
    """How many others the median is taken of, at least."""

    @property
    def stops(self) -> bool:
        """Whether trials may be stopped on their way."""
        return self.method in ("asha", "median")

    @model_validator(mode="after")
    def _whole_race(self) -> Scheduler:
        if self.method != "race" and self.rungs:
            raise ValueError("rungs are for the method race")
        if self.stops and self.floor_tokens is None:
            text = f"{self.method} needs floor_tokens: before that many tokens of distillation no"
            raise ValueError(f"{text} trial is stopped")
        if self.method == "race" and _differs(self, "floor_tokens", "reduction", "at_least"):
            text = "floor_tokens, reduction and at_least are for asha and median; a race has rungs"
            raise ValueError(text)
        if self.method != "race" and _differs(self, "metric"):
            text = "metric is for the method race; asha and median go by the held-out loss"
            raise ValueError(text)
        names = [rung.name for rung in self.rungs]
        if self.method == "race" and (len(names) < 2 or len(set(names)) < len(names)):
            raise ValueError("a race needs at least two rungs, each with a name of its own")
        for number, rung in enumerate(self.rungs):
            last = number == len(self.rungs) - 1
            if last == (rung.keep is not None):
                raise ValueError("every rung but the last says how many configurations to keep")
        return self


def finalists(select: Select, scheduler: Scheduler) -> dict[str, Any] | None:
    """Which trials of the grid can win: those meant or, in a race, those of its last rung; None
    where all can."""
    if select.among is None and scheduler.rungs:
        return {RUNG: scheduler.rungs[-1].name}
    return select.among
