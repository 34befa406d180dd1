"""Trial -> stages with content ids, and what they will cost. Pure: no clock, no disk writes.

A stage's id hashes its kind and version, its complete config, the ids of its inputs by role, and
the seed where it uses one. Two trials that differ only downstream share every upstream stage.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from orchestrator.settings import Explicit, RandomLayers
from orchestrator.space import LeftOut, Space, Trial, origin_of
from orchestrator.spec import SpecError, Sweep, TrialConfig
from orchestrator.stages import STAGES
from trainers.config import (
    AcquireConfig,
    AtRandom,
    BlockInfluence,
    ByList,
    ByScore,
    Corpus,
    DistillConfig,
    EvaluateConfig,
    ImportanceConfig,
    LayerChoice,
    LayerCriterion,
    ModelSource,
    Perplexity,
    PretrainConfig,
    PruneConfig,
    ScratchModel,
    TaskAccuracy,
    hash_of,
    identity,
)
from trainers.families import UnknownFamilyError
from trainers.shapes import Shape, shape_of, source_config


@dataclass(frozen=True)
class StageNode:
    """One stage to run: everything a worker needs, as plain values."""

    stage_id: str
    kind: str
    config: Mapping[str, Any]
    inputs: Mapping[str, str]
    """Role -> id of the stage whose artifact fills it."""
    seed: int | None
    tokens: int = 0
    """Tokens trained on or scored, questions not counted."""
    flops: float = 0.0


@dataclass(frozen=True)
class TrialPlan:
    """A trial and its stages by step, in the order they run."""

    trial: Trial
    shape: Shape
    steps: Mapping[str, StageNode] = field(default_factory=dict)

    @property
    def tokens_trained(self) -> int:
        """Tokens that the student is distilled on."""
        return self.steps["distill"].tokens if "distill" in self.steps else 0


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
    config = trial.config
    try:
        source_shape = _source_shape(config.source, config.corpus)
    except (ValueError, OSError, UnknownFamilyError) as error:
        raise SpecError(f"{origin_of(sweep, trial, 'source')}: source: {error}") from error
    count = source_shape.num_hidden_layers
    kept = _layers_kept(sweep, trial, count)
    shape = source_shape.with_layers(kept)
    return TrialPlan(trial, shape, _steps(config, source_shape, shape))


def _steps(config: TrialConfig, source: Shape, shape: Shape) -> dict[str, StageNode]:
    steps: dict[str, StageNode] = {}
    steps["source"] = teacher = _source_node(config, source)
    student = teacher
    if config.prune is not None:
        inputs = {"model": teacher.stage_id}
        importance = _importance_node(config, source, shape, teacher)
        if importance is not None:
            steps["importance"] = importance
            inputs["importance"] = importance.stage_id
        prune = PruneConfig(
            num_hidden_layers=shape.num_hidden_layers,
            choice=_choice(config),
            initialise=config.prune.initialise,
        )
        uses_seed = isinstance(prune.choice, AtRandom) or prune.initialise == "random"
        student = steps["prune"] = _node("prune", prune, inputs, config.seed if uses_seed else None)
    if config.distill is not None:
        steps["before"] = _evaluate_node(config, shape, student, teacher, before=True)
        student = steps["distill"] = _distill_node(config, source, shape, student, teacher)
    steps["after"] = _evaluate_node(
        config, shape, student, None if student is teacher else teacher, before=False, source=source
    )
    return steps


# --- shapes ----------------------------------------------------------------------------------


def _source_shape(source: ModelSource, corpus: Corpus) -> Shape:
    key = (hash_of(identity(source)), hash_of(identity(corpus)))
    if key not in _SHAPES:
        _SHAPES[key] = shape_of(source_config(source, corpus))
    return _SHAPES[key]


_SHAPES: dict[tuple[str, str], Shape] = {}


def _layers_kept(sweep: Sweep, trial: Trial, count: int) -> int:
    """How many of the source's `count` layers the student has. Raises `SpecError`."""
    if trial.config.prune is None:
        return count
    depth = trial.config.prune.depth
    dropped = depth.criterion.drop if isinstance(depth.criterion, Explicit) else ()
    outside = [layer for layer in dropped if layer >= count]
    kept = depth.layers_kept(count)
    if outside:
        setting, problem = (
            "criterion.drop",
            (f"the source has no layer {', '.join(map(str, outside))}; allowed: 0 to {count - 1}"),
        )
    elif kept < 1:
        setting, problem = "criterion.drop", f"drops all {count} layers; keep at least one"
    elif kept > count:
        setting, problem = (
            "keep",
            (
                f"cannot keep {kept} layers, the source has {count}; "
                f"allowed: 1 to {count}, or a fraction below 1"
            ),
        )
    elif contradiction := depth.contradiction(count):
        setting, problem = "keep", contradiction
    else:
        return kept
    dotted = f"prune.depth.{setting}"
    raise SpecError(f"{origin_of(sweep, trial, dotted)}: {dotted}: {problem}")


# --- stages ----------------------------------------------------------------------------------


def _node(
    kind: str,
    config: BaseModel,
    inputs: Mapping[str, str],
    seed: int | None,
    tokens: int = 0,
    flops: float = 0.0,
) -> StageNode:
    determined_by = {
        "kind": kind,
        "version": STAGES[kind].version,
        "config": identity(config),
        "inputs": dict(inputs),
        "seed": seed,
    }
    stage_id = f"{kind}-{hash_of(determined_by)[:16]}"
    return StageNode(
        stage_id, kind, config.model_dump(mode="json"), dict(inputs), seed, tokens, flops
    )


def _source_node(config: TrialConfig, shape: Shape) -> StageNode:
    source = config.source
    if not isinstance(source, ScratchModel):
        return _node("acquire", AcquireConfig(source=source), {}, None)
    training, length = source.training, config.corpus.block_length
    tokens = training.steps * training.batch_size * length
    pretrain = PretrainConfig(shape=source.shape, corpus=config.corpus, training=training)
    return _node(
        "pretrain", pretrain, {}, source.seed, tokens, shape.training_flops(tokens, length)
    )


def _choice(config: TrialConfig) -> LayerChoice:
    assert config.prune is not None
    depth = config.prune.depth
    match depth.criterion:
        case Explicit(drop=drop):
            return ByList(drop=drop)
        case RandomLayers():
            return AtRandom(contiguous=depth.contiguous)
        case _:
            return ByScore(contiguous=depth.contiguous)


def _importance_node(
    config: TrialConfig, source: Shape, shape: Shape, teacher: StageNode
) -> StageNode | None:
    """None where layers are listed or drawn, or where none is dropped."""
    criterion = _criterion(config)
    count = source.num_hidden_layers
    dropped = count - shape.num_hidden_layers
    if criterion is None or dropped == 0:
        return None
    wanted = {1, dropped, *config.importance.extra_block_lengths}
    lengths = tuple(sorted(length for length in wanted if 0 < length < count))
    stage = ImportanceConfig(
        criterion=criterion,
        corpus=config.corpus,
        block_lengths=lengths,
        precision=config.evaluate.precision,
    )
    tokens = 0 if isinstance(criterion, TaskAccuracy) else _scored(config)
    passes = [count - length + 1 for length in lengths]
    context = config.corpus.block_length
    if isinstance(criterion, Perplexity):
        # Each block of layers costs a pass without it, and one pass measures the intact model.
        flops = source.forward_flops(tokens, context) + sum(
            number * source.with_layers(count - length).forward_flops(tokens, context)
            for number, length in zip(passes, lengths, strict=True)
        )
        tokens *= 1 + sum(passes)
    else:
        flops = source.forward_flops(tokens, context)
    return _node("importance", stage, {"model": teacher.stage_id}, None, tokens, flops)


def _scored(config: TrialConfig) -> int:
    return config.importance.samples * config.corpus.block_length


def _criterion(config: TrialConfig) -> LayerCriterion | None:
    assert config.prune is not None
    match config.prune.depth.criterion.kind:
        case "perplexity":
            return Perplexity(samples=config.importance.samples)
        case "block_influence":
            return BlockInfluence(samples=config.importance.samples)
        case "task":
            return TaskAccuracy(tasks=config.importance.tasks)
        case _:
            return None


def _distill_node(
    config: TrialConfig, source: Shape, shape: Shape, student: StageNode, teacher: StageNode
) -> StageNode:
    assert config.distill is not None
    settings, context = config.distill, config.corpus.block_length
    stage = DistillConfig(corpus=config.corpus, training=settings.training, loss=settings.loss)
    tokens = settings.training.steps * settings.training.batch_size * context
    flops = shape.training_flops(tokens, context)
    inputs = {"model": student.stage_id}
    if settings.loss.logits != "none":
        flops += source.forward_flops(tokens, context)
        inputs["teacher"] = teacher.stage_id
    return _node("distill", stage, inputs, config.seed, tokens, flops)


def _evaluate_node(
    config: TrialConfig,
    shape: Shape,
    model: StageNode,
    teacher: StageNode | None,
    before: bool,
    source: Shape | None = None,
) -> StageNode:
    settings = config.evaluate
    tasks = settings.tasks if settings.tasks_before or not before else ()
    stage = EvaluateConfig(corpus=config.corpus, tasks=tasks, precision=settings.precision)
    tokens = config.corpus.heldout_blocks * config.corpus.block_length
    flops = shape.forward_flops(tokens, config.corpus.block_length)
    inputs = {"model": model.stage_id}
    if teacher is not None:
        flops += (source or shape).forward_flops(tokens, config.corpus.block_length)
        inputs["teacher"] = teacher.stage_id
    return _node("evaluate", stage, inputs, None, tokens, flops)


# --- for people and programs -----------------------------------------------------------------


def describe(
    plan: SweepPlan,
    done: Collection[str],
    stored: Collection[str],
    artifact: Callable[[str], str],
) -> dict[str, Any]:
    """The plan as JSON values. `done` trials and `stored` stages are marked; `artifact` gives the
    folder of a stage id."""
    trials = [_described(each, plan, done, stored, artifact) for each in plan.trials]
    nodes = plan.nodes()
    return {
        "trials": trials,
        "left_out": [
            {"assignment": dict(left.assignment), "reason": left.reason} for left in plan.left_out
        ],
        "total": {
            "trials": len(trials),
            "trials_done": sum(trial["done"] for trial in trials),
            "stages": len(nodes),
            "stages_stored": sum(node.stage_id in stored for node in nodes),
            "tokens": sum(node.tokens for node in nodes),
            "flops": sum(node.flops for node in nodes),
        },
    }


def _described(
    planned: TrialPlan,
    plan: SweepPlan,
    done: Collection[str],
    stored: Collection[str],
    artifact: Callable[[str], str],
) -> dict[str, Any]:
    trial, steps = planned.trial, planned.steps
    return {
        "trial_id": trial.trial_id,
        "label": trial.label,
        "baseline": trial.baseline,
        "axes": dict(trial.axes),
        "seed": trial.seed,
        "done": trial.trial_id in done,
        "parameters": planned.shape.parameters,
        "parameters_non_embedding": planned.shape.parameters_non_embedding,
        "num_hidden_layers": planned.shape.num_hidden_layers,
        "tokens": sum(node.tokens for node in steps.values()),
        "flops": sum(node.flops for node in steps.values()),
        "stages": [
            {
                "step": step,
                "stage_id": node.stage_id,
                "kind": node.kind,
                "trials": plan.asked_by[node.stage_id],
                "stored": node.stage_id in stored,
                "tokens": node.tokens,
                "flops": node.flops,
                "config": node.config,
                "inputs": {role: artifact(found) for role, found in node.inputs.items()},
                "seed": node.seed,
            }
            for step, node in steps.items()
        ],
    }
