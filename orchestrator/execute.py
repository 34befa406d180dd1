"""Run stages in this process: skip what is stored, call the entry point, say what it cost."""

from __future__ import annotations

import ctypes
import importlib
import json
import re
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.faults import InfrastructureError, explain, is_infrastructure
from orchestrator.plan import TrialPlan
from orchestrator.records import (
    BlockScore,
    CurvePoint,
    ItemRecord,
    StageRecord,
    Status,
    TrialRecord,
)
from orchestrator.stages import STAGES
from orchestrator.steps import StageNode
from orchestrator.store import DamagedArtifactError, Manifest, Store
from trainers.config import for_record
from trainers.contract import (
    DamagedInputError,
    Interrupted,
    Runtime,
    StageContext,
    StageError,
    StageResult,
    read_rows,
)

Sink = Callable[[str, int, int, Mapping[str, float]], None]
"""Hears (stage kind, done, total, values) while a stage runs; raises `Interrupted` to stop it."""


@dataclass(frozen=True)
class _StageReporter:
    kind: str
    sink: Sink

    def report(self, done: int, total: int, values: Mapping[str, float]) -> None:
        self.sink(self.kind, done, total, values)


@dataclass(frozen=True)
class Costs:
    """What a stage cost, over all its workers."""

    cpu_s: float
    gpu_s: float
    peak_rss_mb: float

    @staticmethod
    def meter() -> Callable[[float], Costs]:
        """Starts to measure this process; calling the result with the seconds of GPU that a stage
        used gives the costs since."""
        _reset_peak_memory()
        started = time.process_time()
        return lambda gpu_s: Costs(time.process_time() - started, gpu_s, _peak_memory_mb())


@dataclass(frozen=True)
class Launched:
    """A stage's result and what it cost."""

    result: StageResult
    costs: Costs


Launch = Callable[[StageNode, StageContext[Any]], Launched]
"""Runs a stage's entry point, here or on several workers."""


def launch_here(node: StageNode, context: StageContext[Any]) -> Launched:
    """Run the stage in this process."""
    meter = Costs.meter()
    result = entry_point(STAGES[node.kind].entry_point)(context)
    return Launched(result, meter(result.gpu_s))


def run_stage(
    node: StageNode,
    store: Store,
    trial_id: str,
    requested_by: str,
    sink: Sink,
    runtime: Runtime,
    launch: Launch = launch_here,
) -> StageRecord:
    """The stage's record. Its artifact is in the store afterwards.

    An artifact that this very trial had built before a kill, and could not record, counts as run
    by it and not as found: `requested_by` in the manifest tells. Raises `InfrastructureError` where
    the machine failed and not the stage.
    """
    try:
        if (stored := store.found(node.stage_id)) is None:
            with store.lease(node.stage_id):
                stored = store.found(node.stage_id)  # another may have built it while we waited
                if stored is None:
                    stored = _build(node, store, requested_by, sink, runtime, launch)
    except (DamagedInputError, InfrastructureError):
        raise
    except Exception as error:
        if not is_infrastructure(error):
            raise
        raise InfrastructureError(explain(error, store.root)) from error
    return stage_record(stored, trial_id, cached=stored.requested_by != requested_by)


def run_stages(
    nodes: Sequence[StageNode],
    run: Callable[[StageNode], StageRecord],
    store: Store,
    upstream: Sequence[StageNode] = (),
) -> Iterator[StageRecord]:
    """The records of a trial's stages, run one after the other.

    An input that turns out to be damaged is thrown away and built again, once; `upstream` are the
    stages that may have to be run for that and for nothing else.
    """
    by_id = {node.stage_id: node for node in (*upstream, *nodes)}
    again = set[str]()

    def records(node: StageNode) -> Iterator[StageRecord]:
        while True:
            try:
                yield run(node)
                return
            except DamagedInputError as error:
                damaged = by_id.get(node.inputs.get(error.role, ""))
                if damaged is None or damaged.stage_id in again:
                    raise
                again.add(damaged.stage_id)
                store.discard(damaged.stage_id)
                yield from records(damaged)

    for node in nodes:
        yield from records(node)


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
    node: StageNode,
    store: Store,
    requested_by: str,
    sink: Sink,
    runtime: Runtime,
    launch: Launch,
) -> Manifest:
    for role, stage_id in node.inputs.items():
        try:
            store.fetch(stage_id)
        except DamagedArtifactError as error:
            raise DamagedInputError(role, str(error)) from error
    out = store.working_folder(node.stage_id)
    out.mkdir(parents=True, exist_ok=True)
    context: StageContext[Any] = StageContext(
        config=STAGES[node.kind].config.model_validate(node.config),
        inputs={role: store.path(stage_id) for role, stage_id in node.inputs.items()},
        out=out,
        seed=node.seed or 0,
        reporter=_StageReporter(node.kind, sink),
        runtime=runtime,
    )
    sink(node.kind, 0, 0, {})
    started, began = time.time(), time.monotonic()
    try:
        launched = launch(node, context)
        wall_s = time.monotonic() - began
        return store.publish(_manifest(node, requested_by, launched, started, wall_s))
    except Exception:
        # Who was stopped for so long that another took the stage over may find its files gone, at
        # work or while it publishes.
        if (published := store.found(node.stage_id)) is not None:
            return published
        raise


def _manifest(
    node: StageNode, requested_by: str, launched: Launched, started: float, wall_s: float
) -> Manifest:
    return Manifest(
        stage_id=node.stage_id,
        kind=node.kind,
        requested_by=requested_by,
        config=node.config,
        inputs=node.inputs,
        seed=node.seed,
        metrics=dict(launched.result.metrics),
        tokens=launched.result.tokens,
        flops=launched.result.flops,
        **asdict(launched.costs),
        wall_s=wall_s,
        started_at=started,
        ended_at=started + wall_s,  # and not by the clock, which may have been set back
        files={},
    )


def entry_point(name: str) -> Callable[[StageContext[Any]], StageResult]:
    """The function that `module:function` names."""
    module, function = name.split(":")
    found: Callable[[StageContext[Any]], StageResult] = getattr(
        importlib.import_module(module), function
    )
    return found


_NO_MEMORY = re.compile(r"can't allocate memory: you tried to allocate (\d+) bytes")
"""How PyTorch says so on a CPU; a GPU's own words can be read as they are."""


def reason_of(error: Exception) -> str:
    """The first line of what a user should read of a failure."""
    text = str(error).strip().splitlines()
    first = text[0] if text else ""
    if (asked := _NO_MEMORY.search(first)) is not None:
        return f"out of memory: {int(asked[1]) / 1e9:.3g} GB more could not be had"
    if isinstance(error, MemoryError):
        return f"out of memory{first and ': ' + first}"
    return first if isinstance(error, StageError) else f"{type(error).__name__}: {first}"


def _reset_peak_memory() -> None:
    """A warm worker runs many stages. What those before left unused goes back to the system, which
    workers are told not to do by themselves (`cluster.FOR_WORKERS`), or it would come on top of
    what this stage takes; and Linux can forget their high-water mark."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
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


def stopped_trial(
    plan: TrialPlan,
    reason: str,
    store: Store,
    stages: Sequence[StageRecord],
    sweep: str,
    profile: str,
) -> Collected:
    """What a trial measured that was stopped on its way: its curve so far, and as metrics what was
    measured before its distillation and, as `lm_loss.stopped`, the last held-out loss. Its last
    checkpoint stays, so that it can go on."""
    found = {step: store.manifest(node.stage_id) for step, node in plan.steps.items()}
    before = {step: found[step] for step in ("before",) if found.get(step) is not None}
    metrics = _metrics({step: manifest for step, manifest in before.items() if manifest})
    rows = read_rows(store.working_folder(plan.steps["distill"].stage_id) / "curve.jsonl")
    curves = tuple(CurvePoint(trial_id=plan.trial.trial_id, **row) for row in rows)
    heldout = [point for point in curves if point.name == "heldout_loss"]
    if heldout:
        metrics["lm_loss.stopped"] = heldout[-1].value
    now = time.time()
    record = _trial_record(
        plan,
        sweep,
        profile,
        "stopped",
        reason,
        stages,
        started_at=min((m.started_at for m in found.values() if m), default=now),
        ended_at=now,
        metrics=metrics,
        tokens_trained=max((point.tokens for point in curves), default=0),
    )
    return Collected(record, curves, ())


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
    """The contract's metric names, from the two evaluations and the benchmark of a trial."""
    metrics: dict[str, float] = {}
    if "benchmark" in manifests:
        metrics |= manifests["benchmark"].metrics
    for step in ("before", "after"):
        if step not in manifests:
            continue
        for name, value in manifests[step].metrics.items():
            if name in ("lm_loss", "kd_loss", "calibration_error"):
                metrics[f"{name}.{step}"] = value
            elif step == "after":
                metrics[name] = value
            else:
                metrics[name.replace(".", "_before.", 1)] = value
    return metrics


def _curves(plan: TrialPlan, store: Store) -> tuple[CurvePoint, ...]:
    if "distill" not in plan.steps:
        return ()
    rows = read_rows(store.file(plan.steps["distill"].stage_id, "curve.jsonl"))
    return tuple(CurvePoint(trial_id=plan.trial.trial_id, **row) for row in rows)


def _items(plan: TrialPlan, store: Store) -> tuple[ItemRecord, ...]:
    rows = read_rows(store.file(plan.steps["after"].stage_id, "items.jsonl"))
    return tuple(ItemRecord(trial_id=plan.trial.trial_id, **row) for row in rows)


def _dropped(plan: TrialPlan, store: Store) -> tuple[int, ...] | None:
    """The source's layers that the student lacks after all its prunings; None where none was
    pruned or the student keeps no weights."""
    cuts = [node for node in plan.steps.values() if node.kind == "prune"]
    if not cuts or any(node.config["initialise"] == "random" for node in cuts):
        return None
    dropped = [read_dropped(store.file(node.stage_id, "dropped_layers.json")) for node in cuts]
    count = plan.shape.num_hidden_layers + sum(map(len, dropped))
    left = list(range(count))
    for layers in dropped:
        left = [layer for place, layer in enumerate(left) if place not in layers]
    return tuple(layer for layer in range(count) if layer not in left)


def read_dropped(file: Path) -> tuple[int, ...]:
    """The layers that a prune stage left out, in the numbering of the model that it cut."""
    return tuple(json.loads(file.read_text()))


def block_scores(stage_id: str, store: Store) -> tuple[BlockScore, ...]:
    """The scores that an importance stage left."""
    rows = read_rows(store.file(stage_id, "scores.jsonl"))
    return tuple(BlockScore(stage_id=stage_id, **row) for row in rows)


__all__ = [
    "Collected",
    "Costs",
    "Interrupted",
    "Launched",
    "Runtime",
    "block_scores",
    "collect",
    "entry_point",
    "failed_trial",
    "launch_here",
    "reason_of",
    "run_stage",
    "run_stages",
    "stage_record",
    "stopped_trial",
]
