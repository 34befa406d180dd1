"""Early stopping: which running trials are not worth their tokens, by the rules of Ray Tune.

Ray's schedulers decide; what they decide on is told from here. That way a trial is asked to save
and leave, where Tune itself would cut it off, and what earlier runs of the sweep measured counts.
Trials are held against those of their own seed: a seed with a better teacher or an easier draw
would else be all that is left, and configurations would be compared over different seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from orchestrator.scheduling import Scheduler

if TYPE_CHECKING:
    from orchestrator.records import CurvePoint

HELDOUT = "heldout_loss"
"""What trials measure on their way, as the curve and a worker's report name it."""
TOKENS = "tokens"


class Judge(Protocol):
    """Says of each measurement whether its trial is to stop."""

    def stops(self, trial_id: str, seed: int, tokens: int, loss: float) -> bool:
        """Whether a trial with this held-out loss (nats) after so many tokens is to stop."""


class NoJudge:
    """Every trial runs to its end."""

    def stops(self, trial_id: str, seed: int, tokens: int, loss: float) -> bool:
        """Never."""
        return False


@dataclass(frozen=True)
class _Trial:
    """As much of a Tune trial as its schedulers look at."""

    trial_id: str


class RayJudge:
    """Decides by a scheduler of Ray Tune for every seed, each made by `rule`."""

    def __init__(self, rule: Callable[[], Any]) -> None:
        self._rule = rule
        self._rules: dict[int, Any] = {}
        self._trials: dict[str, _Trial] = {}

    def stops(self, trial_id: str, seed: int, tokens: int, loss: float) -> bool:
        """See `Judge`. A loss that is no number is the stage's own failure and not judged."""
        from ray.tune.schedulers import TrialScheduler

        if not math.isfinite(loss):
            return False
        if seed not in self._rules:
            self._rules[seed] = self._rule()
        rule = self._rules[seed]
        if trial_id not in self._trials:
            self._trials[trial_id] = _Trial(trial_id)
            rule.on_trial_add(None, self._trials[trial_id])
        result = {TOKENS: tokens, HELDOUT: loss}
        decided = rule.on_trial_result(None, self._trials[trial_id], result)
        return bool(decided == TrialScheduler.STOP)


def judge_of(
    scheduler: Scheduler,
    tokens: int,
    measured: Iterable[CurvePoint] = (),
    seeds: Mapping[str, int] | None = None,
) -> Judge:
    """The judge of a sweep whose longest trial distils on so many tokens; it remembers what
    earlier runs `measured`. `seeds`: by trial id, of the trials that they measured."""
    if not scheduler.stops:
        return NoJudge()
    judge, known = RayJudge(lambda: _rule(scheduler, tokens)), seeds or {}
    for point in sorted(measured, key=lambda point: (point.tokens, point.time_ms)):
        if point.name == HELDOUT:
            judge.stops(point.trial_id, known[point.trial_id], point.tokens, point.value)
    return judge


def _rule(scheduler: Scheduler, tokens: int) -> Any:
    from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule

    floor = scheduler.floor_tokens
    common = {"time_attr": TOKENS, "metric": HELDOUT, "mode": "min", "grace_period": floor}
    if scheduler.method == "asha":
        return AsyncHyperBandScheduler(
            **common,
            # One more, or Ray would stop a trial at its very end and call it unfinished.
            max_t=max(tokens, floor or 0) + 1,
            reduction_factor=scheduler.reduction,
            stop_last_trials=False,
        )
    # An endless slice: without it Ray would pause trials and not stop them.
    return MedianStoppingRule(
        **common, min_samples_required=scheduler.at_least, min_time_slice=math.inf
    )
