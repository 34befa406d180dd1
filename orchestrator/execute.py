"""Run stages in this process: skip what is stored, call the entry point, say what it cost."""

from __future__ import annotations

import importlib
import json
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.plan import StageNode, TrialPlan
from orchestrator.records import (
    BlockScore,
    CurvePoint,
    ItemRecord,
    StageRecord,
    Status,
    TrialRecord,
)
from orchestrator.stages import STAGES
from orchestrator.store import Manifest, Store
from trainers.config import for_record
from trainers.contract import Interrupted, Runtime, StageContext, StageResult, read_rows

Sink = Callable[[str, int, int, Mapping[str, float]], None]
"""Hears (stage kind, done, total, values) while a stage runs; raises `Interrupted` to stop it."""


@dataclass(frozen=True)
class _StageReporter:
    kind: str
    sink: Sink

    def report(self, done: int, total: int, values: Mapping[str, float]) -> None:
        self.sink(self.kind, done, total, values)


def run_stage(
    node: StageNode,
    store: Store,
    trial_id: str,
    requested_by: str,
    sink: Sink,
    runtime: Runtime,
) -> StageRecord:
    """The stage's record. Its artifact is in the store afterwards.

    An artifact that this very trial had built before a kill, and could not record, counts as run
    by it and not as found: `requested_by` in the manifest tells.
    """
    if (stored := store.manifest(node.stage_id)) is None:
        with store.lease(node.stage_id):
            stored = store.manifest(node.stage_id)  # another may have built it while we waited
            if stored is None:
                stored = _build(node, store, requested_by, sink, runtime)
    return stage_record(stored, trial_id, cached=stored.requested_by != requested_by)


def stage_record(stored: Manifest, trial_id: str, cached: bool) -> StageRecord:
    """A record of the stage for this trial; where `cached`, it cost the trial nothing."""
    return StageRecord(
        stage_id=stored.stage_id,
        trial_id=trial_id,
        kind=stored.kind,
        cached=cached,
        cpu_s=0.0 if cached else stored.cpu_s,
        gpu_s=0.0 if cached else stored.gpu_s,
        wall_s=0.0 if cached else stored.wall_s,
        peak_rss_mb=0.0 if cached else stored.peak_rss_mb,
        tokens=0 if cached else stored.tokens,
        flops=0.0 if cached else stored.flops,
    )


def _build(
    node: StageNode, store: Store, requested_by: str, sink: Sink, runtime: Runtime
) -> Manifest:
    stage = STAGES[node.kind]
    out = store.working_folder(node.stage_id)
    out.mkdir(parents=True, exist_ok=True)
    context: StageContext[Any] = StageContext(
        config=stage.config.model_validate(node.config),
        inputs={role: store.path(stage_id) for role, stage_id in node.inputs.items()},
        out=out,
        seed=node.seed or 0,
        reporter=_StageReporter(node.kind, sink),
        runtime=runtime,
    )
    sink(node.kind, 0, 0, {})
    meter = _Meter()
    result: StageResult = _entry_point(stage.entry_point)(context)
    manifest = meter.manifest(node, requested_by, result)
    store.publish(manifest)
    return manifest


def _entry_point(name: str) -> Callable[[StageContext[Any]], StageResult]:
    module, function = name.split(":")
    found: Callable[[StageContext[Any]], StageResult] = getattr(
        importlib.import_module(module), function
    )
    return found


class _Meter:
    """Time and memory between its creation and the manifest."""

    def __init__(self) -> None:
        _reset_peak_memory()
        self._started = time.time()
        self._wall, self._cpu = time.monotonic(), time.process_time()

    def manifest(self, node: StageNode, requested_by: str, result: StageResult) -> Manifest:
        return Manifest(
            stage_id=node.stage_id,
            kind=node.kind,
            requested_by=requested_by,
            config=node.config,
            inputs=node.inputs,
            seed=node.seed,
            metrics=dict(result.metrics),
            tokens=result.tokens,
            flops=result.flops,
            cpu_s=time.process_time() - self._cpu,
            gpu_s=0.0,
            wall_s=time.monotonic() - self._wall,
            peak_rss_mb=_peak_memory_mb(),
            started_at=self._started,
            ended_at=time.time(),
            files={},
        )


def _reset_peak_memory() -> None:
    """A warm worker runs many stages; Linux can forget the high-water mark of those before."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or not allowed: the peak then covers the worker's whole life
        return


def _peak_memory_mb() -> float:
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --- from artifacts to records ---------------------------------------------------------------


@dataclass(frozen=True)
class Collected:
    """All that a finished trial's artifacts say, ready for the ledger."""

    trial: TrialRecord
    curves: tuple[CurvePoint, ...]
    items: tuple[ItemRecord, ...]


def collect(
    plan: TrialPlan, store: Store, stages: Sequence[StageRecord], sweep: str, profile: str
) -> Collected:
    """Read a completed trial's measurements from its artifacts."""
    found = {step: store.manifest(node.stage_id) for step, node in plan.steps.items()}
    manifests = {step: manifest for step, manifest in found.items() if manifest is not None}
    if missing := sorted(set(plan.steps) - set(manifests)):
        raise FileNotFoundError(f"artifacts of {', '.join(missing)} are not in {store.root}")
    mine = [manifests[step] for step in plan.steps if step in manifests]
    times = [m for m in mine if any(s.stage_id == m.stage_id and not s.cached for s in stages)]
    trained = [found for found in manifests.values() if found.kind == "distill"]
    record = _trial_record(
        plan,
        sweep,
        profile,
        "completed",
        None,
        stages,
        started_at=min((m.started_at for m in times), default=time.time()),
        ended_at=max((m.ended_at for m in times), default=time.time()),
        metrics=_metrics(manifests),
        tokens_trained=sum(manifest.tokens for manifest in trained),
        dropped_layers=_dropped(plan, store),
    )
    return Collected(record, _curves(plan, store), _items(plan, store))


def failed_trial(
    plan: TrialPlan, reason: str, stages: Sequence[StageRecord], sweep: str, profile: str
) -> TrialRecord:
    """The row of a trial that could not be completed: a reason and no metrics."""
    now = time.time()
    return _trial_record(
        plan, sweep, profile, "failed", reason, stages, started_at=now, ended_at=now
    )


def _trial_record(
    plan: TrialPlan,
    sweep: str,
    profile: str,
    status: Status,
    reason: str | None,
    stages: Sequence[StageRecord],
    started_at: float,
    ended_at: float,
    metrics: Mapping[str, float] | None = None,
    tokens_trained: int | None = None,
    dropped_layers: tuple[int, ...] | None = None,
) -> TrialRecord:
    return TrialRecord(
        trial_id=plan.trial.trial_id,
        sweep=sweep,
        profile=profile,
        seed=plan.trial.seed,
        status=status,
        reason=reason,
        baseline=plan.trial.baseline,
        config=for_record(plan.trial.config),
        axes=dict(plan.trial.axes),
        parameters=plan.shape.parameters,
        parameters_non_embedding=plan.shape.parameters_non_embedding,
        tokens_trained=tokens_trained,
        metrics=metrics or {},
        cpu_s=sum(stage.cpu_s for stage in stages),
        gpu_s=sum(stage.gpu_s for stage in stages),
        wall_s=sum(stage.wall_s for stage in stages),
        started_at=started_at,
        ended_at=ended_at,
        dropped_layers=dropped_layers,
    )


def _metrics(manifests: Mapping[str, Manifest]) -> dict[str, float]:
    """The contract's metric names, from the two evaluations of a trial."""
    metrics: dict[str, float] = {}
    for step in ("before", "after"):
        if step not in manifests:
            continue
        for name, value in manifests[step].metrics.items():
            if name in ("lm_loss", "kd_loss"):
                metrics[f"{name}.{step}"] = value
            elif step == "after":
                metrics[name] = value
            else:
                metrics[name.replace(".", "_before.", 1)] = value
    return metrics


def _curves(plan: TrialPlan, store: Store) -> tuple[CurvePoint, ...]:
    if "distill" not in plan.steps:
        return ()
    rows = read_rows(store.path(plan.steps["distill"].stage_id) / "curve.jsonl")
    return tuple(CurvePoint(trial_id=plan.trial.trial_id, **row) for row in rows)


def _items(plan: TrialPlan, store: Store) -> tuple[ItemRecord, ...]:
    rows = read_rows(store.path(plan.steps["after"].stage_id) / "items.jsonl")
    return tuple(ItemRecord(trial_id=plan.trial.trial_id, **row) for row in rows)


def _dropped(plan: TrialPlan, store: Store) -> tuple[int, ...] | None:
    """The source's layers that the student lacks after all its prunings; None where none was
    pruned or the student keeps no weights."""
    cuts = [node for node in plan.steps.values() if node.kind == "prune"]
    if not cuts or any(node.config["initialise"] == "random" for node in cuts):
        return None
    dropped = [read_dropped(store.path(node.stage_id)) for node in cuts]
    count = plan.shape.num_hidden_layers + sum(map(len, dropped))
    left = list(range(count))
    for layers in dropped:
        left = [layer for place, layer in enumerate(left) if place not in layers]
    return tuple(layer for layer in range(count) if layer not in left)


def read_dropped(artifact: Path) -> tuple[int, ...]:
    """The layers that a prune stage left out, in the numbering of the model that it cut."""
    return tuple(json.loads((artifact / "dropped_layers.json").read_text()))


def block_scores(stage_id: str, store: Store) -> tuple[BlockScore, ...]:
    """The scores that an importance stage left."""
    rows = read_rows(store.path(stage_id) / "scores.jsonl")
    return tuple(BlockScore(stage_id=stage_id, **row) for row in rows)


__all__ = [
    "Collected",
    "Interrupted",
    "Runtime",
    "block_scores",
    "collect",
    "failed_trial",
    "run_stage",
    "stage_record",
]
