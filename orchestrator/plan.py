"""A sweep's trials, the stages they share, and what they will cost. Pure: no clock, no disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from orchestrator import demand
from orchestrator.demand import Demand, Shortage
from orchestrator.estimate import GB, STAGES, Memory
from orchestrator.pruning import DepthSettings, Explicit, PruneSettings
from orchestrator.space import LeftOut, Space, Trial, origin_of, source_shape
from orchestrator.spec import Resources, SpecError, Sweep
from orchestrator.steps import StageNode, Steps, VocabularyError
from trainers.families import UnknownFamilyError
from trainers.shapes import Shape, Sizes, problems_with


@dataclass(frozen=True)
class TrialPlan:
    """A trial and its stages by step, in the order they run."""

    trial: Trial
    shape: Shape
    steps: Mapping[str, StageNode] = field(default_factory=dict)
    chain: tuple[Shape, ...] = ()
    """The shapes on the way, where the trial prunes in several steps."""

    @property
    def student(self) -> StageNode:
        """The stage that leaves the trial's final model."""
        final = ("distill", "prune", "source")
        return next(self.steps[step] for step in final if step in self.steps)

    @property
    def tokens_trained(self) -> int:
        """Tokens that the student is distilled on, in all steps of a chain."""
        return sum(node.tokens for node in self.steps.values() if node.kind == "distill")


@dataclass(frozen=True)
class SweepPlan:
    """All trials of a sweep, what the space left out, and how many trials ask for each stage."""

    trials: tuple[TrialPlan, ...]
    left_out: tuple[LeftOut, ...]
    asked_by: Mapping[str, int]

    def nodes(self) -> tuple[StageNode, ...]:
        """Every stage once, inputs before those that read them."""
        seen = {node.stage_id: node for plan in self.trials for node in plan.steps.values()}
        return tuple(seen.values())


def plan_sweep(sweep: Sweep, space: Space) -> SweepPlan:
    """Plan every trial. Raises `SpecError` with all impossible shapes at once."""
    plans: list[TrialPlan] = []
    errors: list[str] = []
    for trial in space.trials:
        try:
            plans.append(plan_trial(sweep, trial))
        except SpecError as error:
            errors += error.messages
    if errors:
        raise SpecError(*dict.fromkeys(errors))
    asked = Counter(node.stage_id for plan in plans for node in plan.steps.values())
    return SweepPlan(tuple(plans), space.left_out, asked)


def plan_trial(sweep: Sweep, trial: Trial) -> TrialPlan:
    """The stages of one trial. Raises `SpecError` where its shape is impossible."""
    try:
        source = source_shape(trial.config)
    except (ValueError, OSError, UnknownFamilyError) as error:
        raise SpecError(f"{origin_of(sweep, trial, 'source')}: source: {error}") from error
    shapes = _shapes_after(sweep, trial, source)
    if wrong := _wrong_benchmark(trial, source, sweep.resources):
        setting, problem = wrong
        raise SpecError(f"{origin_of(sweep, trial, setting)}: {setting}: {problem}")
    try:
        steps = Steps(trial.config, sweep.resources, source, shapes).planned()
    except ValueError as error:
        other = isinstance(error, VocabularyError)
        at = "distill.teacher_model" if other else "distill.loss.hidden.mapping"
        raise SpecError(f"{origin_of(sweep, trial, at)}: {at}: {error}") from error
    return TrialPlan(trial, shapes[-1] if shapes else source, steps, tuple(shapes[:-1]))


# --- shapes ----------------------------------------------------------------------------------


def _shapes_after(sweep: Sweep, trial: Trial, source: Shape) -> list[Shape]:
    """The shape after every pruning of the trial. Raises `SpecError` where one is impossible."""
    found: list[Shape] = []
    for parts, cut in trial.config.cuts:
        before = found[-1] if found else source
        target = cut.target(source, before.num_hidden_layers)
        if wrong := _wrong_sizes(cut, before, target, first=not found):
            setting, problem = wrong
            dotted = ".".join(map(str, (*parts, setting)))
            raise SpecError(f"{origin_of(sweep, trial, dotted)}: {dotted}: {problem}")
        found.append(source.resized(target))
    return found


def _wrong_sizes(
    cut: PruneSettings, before: Shape, target: Sizes, first: bool
) -> tuple[str, str] | None:
    """A setting below the pruning's and why its size cannot be had from the model at hand."""
    if cut.depth is not None and (wrong := _wrong_depth(cut.depth, before, target, first)):
        return f"depth.{wrong[0]}", wrong[1]
    for size, problem in problems_with(before, target):
        if size == "num_hidden_layers":
            return "depth.keep", problem
        if cut.width is not None:
            return f"width.{size}", problem
        return "width", f"{size} {problem}"
    return None


def _wrong_depth(
    depth: DepthSettings, before: Shape, target: Sizes, first: bool
) -> tuple[str, str] | None:
    count, kept = before.num_hidden_layers, target.num_hidden_layers
    dropped = depth.criterion.drop if isinstance(depth.criterion, Explicit) else ()
    if outside := [layer for layer in dropped if layer >= count]:
        listed = ", ".join(map(str, outside))
        return "criterion.drop", f"the source has no layer {listed}; allowed: 0 to {count - 1}"
    if kept < 1:
        return "criterion.drop", f"drops all {count} layers; keep at least one"
    if kept > count:
        text = f"cannot keep {kept} layers, the source has {count}; "
        return "keep", text + f"allowed: 1 to {count}, or a fraction up to 1.0"
    contradiction = depth.contradiction(count) if first else None
    return ("keep", contradiction) if contradiction else None


def _wrong_benchmark(trial: Trial, source: Shape, resources: Resources) -> tuple[str, str] | None:
    """A setting of the benchmark and why it cannot be had from this model on these machines."""
    asked = trial.config.benchmark
    if asked is None:
        return None
    if asked.backend == "vllm" and not resources.gpus_per_worker:
        setting = "precision" if asked.precision == "fp8" else "backend"
        value = getattr(asked, setting)
        return f"benchmark.{setting}", f"{value} needs a GPU, and resources.gpus_per_worker is 0"
    most = source.config.get("max_position_embeddings")
    for index, lengths in enumerate(asked.lengths):
        if isinstance(most, int) and lengths.input + lengths.output > most:
            text = f"{lengths.input} + {lengths.output} tokens are more than the model's {most}"
            return f"benchmark.lengths.{index}", text
    return None


# --- for people and programs -----------------------------------------------------------------


def describe(
    plan: SweepPlan,
    resources: Resources,
    done: Collection[str],
    stored: Collection[str],
    artifact: Callable[[str], str],
) -> dict[str, Any]:
    """The plan as JSON values. `done` trials and `stored` stages are marked; `artifact` gives the
    folder of a stage id. Without GPUs, their hours are null."""
    asked = [demand.demands(each.trial.config, each.steps, resources) for each in plan.trials]
    trials = [
        _described(each, found, resources, plan, done, stored, artifact)
        for each, found in zip(plan.trials, asked, strict=True)
    ]
    nodes = plan.nodes()
    once = {
        node.stage_id: found[step]
        for each, found in zip(plan.trials, asked, strict=True)
        for step, node in each.steps.items()
    }
    return {
        "trials": trials,
        "left_out": [
            {"assignment": dict(left.assignment), "reason": left.reason} for left in plan.left_out
        ],
        "warnings": _warnings(plan, asked, resources),
        "total": {
            "trials": len(trials),
            "trials_done": sum(trial["done"] for trial in trials),
            "stages": len(nodes),
            "stages_stored": sum(node.stage_id in stored for node in nodes),
            "tokens": sum(node.tokens for node in nodes),
            "flops": sum(node.flops for node in nodes),
            "cache_bytes": sum(node.disk_bytes for node in nodes),
            "memory_gb": {
                stage: max(
                    filter(None, (trial["memory_gb"][stage] for trial in trials)), default=None
                )
                for stage in map(str, STAGES)
            },
            "gpu_hours": _hours(once.values(), resources),
        },
    }


def _hours(found: Iterable[Demand], resources: Resources) -> float | None:
    hours = demand.gpu_hours(sum(each.flops for each in found), resources)
    return None if hours is None else round(hours, 4)


def _by_zero_stage(found: Mapping[str, Demand]) -> dict[str, float | None]:
    """GB of a GPU for what a trial trains; null where it trains nothing."""
    needed = demand.by_zero_stage(found)
    return {str(stage): round(needed[stage] / GB, 4) if needed else None for stage in STAGES}


def _in_gb(memory: Memory) -> dict[str, float]:
    parts = {name: round(value / GB, 4) for name, value in vars(memory).items()}
    return parts | {"total": round(memory.total / GB, 4)}


def _warnings(
    plan: SweepPlan, asked: Sequence[Mapping[str, Demand]], resources: Resources
) -> list[dict[str, Any]]:
    """What does not fit a GPU; once for all trials for which the same is to be set, of which the
    largest is told."""
    worst: dict[tuple[str, str], Shortage] = {}
    short: dict[tuple[str, str], list[Trial]] = {}
    for each, found in zip(plan.trials, asked, strict=True):
        for shortage in demand.shortages(each.trial.config, found, resources):
            key = shortage.step, shortage.remedy
            worst[key] = shortage.and_of(worst.get(key, shortage))
            short.setdefault(key, []).append(each.trial)
    return [
        {
            "step": shortage.step,
            "trials": [trial.trial_id for trial in short[key]],
            "labels": [trial.label for trial in short[key]],
            "needs_gb": round(shortage.needed / GB, 4),
            "has_gb": round(shortage.room / GB, 4),
            "settings": shortage.settings,
            "then_gb": None if shortage.then is None else round(shortage.then / GB, 4),
            "text": shortage.text(resources.gpu_memory_gb),
        }
        for key, shortage in worst.items()
    ]


def _sizes(shape: Shape) -> dict[str, int]:
    counts = {
        "parameters": shape.parameters,
        "parameters_non_embedding": shape.parameters_non_embedding,
    }
    return counts | asdict(shape.sizes)


def _described(
    planned: TrialPlan,
    found: Mapping[str, Demand],
    resources: Resources,
    plan: SweepPlan,
    done: Collection[str],
    stored: Collection[str],
    artifact: Callable[[str], str],
) -> dict[str, Any]:
    trial, steps = planned.trial, planned.steps
    fullest = max(found, key=lambda step: found[step].memory.total)
    run = found[fullest].run
    return {
        "trial_id": trial.trial_id,
        "label": trial.label,
        "baseline": trial.baseline,
        "axes": dict(trial.axes),
        "seed": trial.seed,
        "done": trial.trial_id in done,
        **_sizes(planned.shape),
        "chain": [_sizes(shape) for shape in planned.chain],
        "tokens": sum(node.tokens for node in steps.values()),
        "flops": sum(node.flops for node in steps.values()),
        "memory_gb": _by_zero_stage(found),
        "fullest": {
            "step": fullest,
            "zero_stage": run.zero_stage if run else None,
            "memory_gb": round(found[fullest].memory.total / GB, 4),
        },
        "gpu_hours": _hours(found.values(), resources),
        "stages": [
            {
                "step": step,
                "stage_id": node.stage_id,
                "kind": node.kind,
                "trials": plan.asked_by[node.stage_id],
                "stored": node.stage_id in stored,
                "tokens": node.tokens,
                "flops": node.flops,
                "disk_bytes": node.disk_bytes,
                "memory_gb": _in_gb(found[step].memory),
                "gpu_hours": _hours([found[step]], resources),
                "config": node.config,
                "inputs": {role: artifact(stage_id) for role, stage_id in node.inputs.items()},
                "seed": node.seed,
            }
            for step, node in steps.items()
        ],
    }
