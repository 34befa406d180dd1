"""Which metrics the trials of a sweep measure, and what it goes by that none of them does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from orchestrator.asked import METRICS
from orchestrator.located import Part
from orchestrator.scheduling import SIZES
from orchestrator.settings import TrialConfig
from orchestrator.spec import Sweep
from orchestrator.wording import Problem, choices

Configs = Sequence[TrialConfig]


def unmeasured(sweep: Sweep, rungs: Sequence[Configs]) -> list[Problem]:
    """What chooses the winner, is sought, decides a race or early stopping, or is claimed, but is
    measured by no trial of the grid. Of a race `rungs` has the trials of each, else all at once."""
    grid = [config for configs in rungs for config in configs]
    # In a race only those of its last rung win, unless it is said who may.
    finalists = grid if sweep.select.among is not None else rungs[-1]
    found = [
        _unmeasured(("select", "metric"), sweep.select.metric, finalists),
        *_objectives(sweep, grid),
        *_scheduler(sweep, rungs),
        *_claims(sweep, grid),
    ]
    return [problem for problem in found if problem is not None]


def _objectives(sweep: Sweep, grid: Configs) -> Iterator[Problem]:
    for index, objective in enumerate(sweep.search.objectives):
        parts = ("search", "objectives", index, "metric")
        problem = _unmeasured(parts, objective.metric, grid)
        if problem is not None and objective.metric not in SIZES:
            yield Problem(parts, problem.text + f"; or {', '.join(SIZES)}")


def _scheduler(sweep: Sweep, rungs: Sequence[Configs]) -> Iterator[Problem | None]:
    scheduler = sweep.scheduler
    for configs in rungs[:-1]:  # each of them decides who runs the next
        yield _unmeasured(("scheduler", "metric"), scheduler.metric, configs)
    distilled = [config.distill for config in rungs[0] if config.distill is not None]
    if scheduler.stops and all(each.heldout_every is None for each in distilled):
        text = f"{scheduler.method} goes by what trials measure on their way: set "
        text += "trial.distill.heldout_every, in optimizer steps"
        yield Problem(("scheduler", "method"), text)


def _claims(sweep: Sweep, grid: Configs) -> Iterator[Problem | None]:
    claims = sweep.tree.child("claims")
    for index, claim in enumerate(claims.sequence if claims else ()):
        for keys in METRICS:
            if (node := claim.at(keys)) is not None:
                yield _unmeasured(("claims", index, *keys), str(node.value), grid)


def _unmeasured(parts: tuple[Part, ...], metric: str, configs: Configs) -> Problem | None:
    """Why no trial measures what is named at `parts`, and what they do; None where one does."""
    choosing = parts[0] != "claims"
    if any(metric in (*_measured(each, choosing), *_speeds(each)) for each in configs):
        return None
    why = "is not measured"
    if metric.startswith("throughput") and all(config.benchmark is None for config in configs):
        why = "is not measured: there is no trial.benchmark"
    if metric.startswith("accuracy_report") and choosing:
        why = "may not choose the winner: that half of the questions is kept for the report"
    elif metric.startswith("accuracy.") and not any(config.evaluate.tasks for config in configs):
        why = "is not measured: evaluate.tasks is empty"
    listed = {name for each in configs for name in _measured(each, choosing)}
    speeds = {name for each in configs for name in _speeds(each)}
    listed |= {name for name in speeds if name.startswith("throughput.")}  # of very many
    return Problem(parts, f"'{metric}' {why}{choices(metric, sorted(listed))}")


def _measured(config: TrialConfig, choosing: bool) -> list[str]:
    """Losses and accuracies of a trial; those of the report's half of the questions choose none."""
    kinds = ("lm_loss", "kd_loss", "calibration_error")
    halves = ("accuracy",) if choosing else ("accuracy", "accuracy_report")
    tasks = [task.name for task in config.evaluate.tasks]
    return [
        *(f"{kind}.{when}" for kind in kinds for when in ("after", "before")),
        *(f"{half}.{name}" for half in halves for name in (*tasks, "mean") if tasks),
    ]


def _speeds(config: TrialConfig) -> Sequence[str]:
    return config.benchmark.metrics if config.benchmark else ()
