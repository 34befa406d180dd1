"""The settings under `scheduler`: whether every trial runs to its end."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from trainers.config import Frozen


class Rung(Frozen):
    """One round of a race: settings laid over every trial's, and how many configurations go on."""

    name: Annotated[str, Field(min_length=1)]
    set: dict[str, Any] = Field(default_factory=dict)
    keep: int | None = Field(default=None, gt=0)


class Scheduler(Frozen):
    """Which trials run to the end: all of them (`none`), or the best of each rung of a `race`.

    Losses are best low, other metrics high.
    """

    method: Literal["none", "race"] = "none"
    metric: str = "lm_loss.after"
    rungs: tuple[Rung, ...] = ()

    @model_validator(mode="after")
    def _whole_race(self) -> Scheduler:
        if self.method == "none" and self.rungs:
            raise ValueError("rungs are for the method race")
        names = [rung.name for rung in self.rungs]
        if self.method == "race" and (len(names) < 2 or len(set(names)) < len(names)):
            raise ValueError("a race needs at least two rungs, each with a name of its own")
        for number, rung in enumerate(self.rungs):
            last = number == len(self.rungs) - 1
            if last == (rung.keep is not None):
                raise ValueError("every rung but the last says how many configurations to keep")
        return self
