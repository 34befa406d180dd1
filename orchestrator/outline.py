"""What a sweep is going to do, in words and as JSON: for `plan`, `--dry-run` and the greeting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape

from orchestrator.growth import Trials, objectives_of
from orchestrator.plan import SweepPlan
from orchestrator.plan import describe as describe_plan
from orchestrator.progress import plan_table
from orchestrator.space import LeftOut
from orchestrator.spec import Sweep
from orchestrator.store import Store

LEFT_OUT_SHOWN = 10


def describe(sweep: Sweep, planned: SweepPlan, store: Store, ended: Trials) -> dict[str, Any]:
    """The plan as JSON: trials, stages, what is stored and done already, and the totals."""
    stored = {n.stage_id for n in planned.nodes() if store.manifest(n.stage_id) is not None}
    over = ("completed", "stopped") if sweep.scheduler.stops else ("completed",)
    done = {id_ for id_, trial in ended.items() if trial.status in over}
    found = describe_plan(
        planned, sweep.resources, done, stored, lambda stage_id: str(store.path(stage_id))
    )
    return {"sweep": sweep.name, "profile": sweep.profile, **found}


def show_plan(out: Console, sweep: Sweep, planned: SweepPlan, store: Store, ended: Trials) -> None:
    """Print all that is known before anything runs."""
    described = describe(sweep, planned, store, ended)
    out.print(_headline(sweep))
    for table in plan_table(described, out.width):
        out.print(table)
    for line in _left_out(planned.left_out):
        out.print(escape(line))
    for line in _to_come(sweep):
        out.print(line)
    for line in _totals(sweep, described["total"]):
        out.print(line)
    for line in map(_warning, described["warnings"]):
        out.print(f"[yellow]warning[/]: {escape(line)}")


def greet(out: Console, sweep: Sweep, planned: SweepPlan, done: int) -> None:
    """Print what is about to run; `done` trials need not."""
    out.print(_headline(sweep))
    for line in _left_out(planned.left_out):
        out.print(f"  {escape(line)}")
    out.print(f"{len(planned.trials)} trials, {done} of them done already")
    for line in _to_come(sweep):
        out.print(line)


def _headline(sweep: Sweep) -> str:
    profile = f"at profile [bold]{sweep.profile}[/]"
    return f"[bold]{sweep.name}[/] {profile}: {escape(sweep.question)}"


def _to_come(sweep: Sweep) -> list[str]:
    """What the sweep will be given while it runs."""
    later = [
        f"then, in the rung {escape(rung.name)}: those that the rung before chooses"
        for rung in sweep.scheduler.rungs[1:]
    ]
    search, seeds = sweep.search, len(sweep.seeds)
    if search.method != "grid":
        goals = ", ".join(f"{each.metric} ({each.mode})" for each in objectives_of(sweep))
        later.append(
            f"then up to {search.trials} configurations proposed by {search.method}, with "
            f"{seeds} seed{'s' * (seeds > 1)} each, for {goals}"
        )
    if sweep.scheduler.stops:
        later.append(
            f"{sweep.scheduler.method} may stop a trial by its held-out loss after "
            f"{sweep.scheduler.floor_tokens:,} tokens"
        )
    return later


def _left_out(left_out: Sequence[LeftOut]) -> list[str]:
    """A line for each combination that makes no trial; of many, the first and their number."""
    lines = [f"left out: {dict(left.assignment)}: {left.reason}" for left in left_out]
    shown = lines if len(lines) <= LEFT_OUT_SHOWN else lines[: LEFT_OUT_SHOWN // 2]
    more = len(lines) - len(shown)
    return shown + ([f"… and {more} more left out; all stand in plan --json"] if more else [])


def _totals(sweep: Sweep, total: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{total['trials']} trials ({total['trials_done']} done), {total['stages']} stages "
        f"({total['stages_stored']} stored), {total['tokens']:,} tokens, {total['flops']:.3g} "
        "FLOPs; work shared between trials counts once, questions are not counted"
    ]
    if total["cache_bytes"]:
        lines.append(f"caches of teacher outputs: {total['cache_bytes'] / 1e9:.3g} GB of disk")
    if total["gpu_hours"] is not None:
        used = sweep.resources
        lines.append(
            f"{total['gpu_hours']:,.0f} GPU-hours, shared work once, at {used.utilisation:.0%} of "
            f"{used.peak_tflops:g} TFLOPS; {used.workers} workers of {used.gpus_per_worker:g} GPU"
        )
    return lines


def _warning(warning: Mapping[str, Any]) -> str:
    """The sentence, after the trials that it is true of; of many, the first and their number."""
    labels = warning["labels"]
    more = f" and {len(labels) - 1} more" if len(labels) > 1 else ""
    return f"{labels[0]}{more}: {warning['text']}"
