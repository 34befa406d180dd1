"""The stages of one trial, with content ids. Pure: no clock, no disk.

A stage's id hashes its kind and version, its complete config, the ids of its inputs by role, and
the seed where it uses one. Two trials that differ only downstream share every upstream stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel

from orchestrator.pruning import (
    WIDTHS,
    DepthSettings,
    Explicit,
    PruneSettings,
    RandomLayers,
    stepwise,
)
from orchestrator.settings import AutoSignal, DistillSettings
from orchestrator.space import source_shape
from orchestrator.spec import Resources, TrialConfig
from orchestrator.stages import STAGES
from trainers.config import (
    AcquireConfig,
    Activations,
    AtRandom,
    BenchmarkConfig,
    ByActivation,
    ByList,
    ByScore,
    CacheConfig,
    Corpus,
    CorrectConfig,
    Criterion,
    DepthCut,
    DistillConfig,
    DistillLoss,
    EvaluateConfig,
    FolderModel,
    GgufModel,
    HiddenCache,
    HubModel,
    ImportanceConfig,
    LayerChoice,
    LiveSignal,
    ModelSource,
    Perplexity,
    PretrainConfig,
    PruneConfig,
    RandomUnits,
    SampledCache,
    ScratchModel,
    Signal,
    TaskAccuracy,
    TopKCache,
    Training,
    WidthCut,
    hash_of,
    identity,
)
from trainers.mapping import teacher_states
from trainers.shapes import (
    Shape,
    Sizes,
    benchmark_cost,
    cache_bytes,
    shape_of,
    source_config,
    vocabulary,
)


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
    disk_bytes: int = 0
    """Of a cache; checkpoints are not counted."""


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
    corpus = source.corpus or config.corpus
    training, length = source.training, corpus.block_length
    tokens = training.steps * training.batch_size * length
    pretrain = PretrainConfig(shape=source.shape, corpus=corpus, training=training)
    seed = config.seed if source.seed is None else source.seed
    return _node("pretrain", pretrain, {}, seed, tokens, shape.training_flops(tokens, length))


@dataclass(frozen=True)
class _Model:
    """A stage that leaves a model, and the model's shape."""

    node: StageNode
    shape: Shape


class Steps:
    """Collects the stages of one trial by step."""

    def __init__(
        self, config: TrialConfig, resources: Resources, source: Shape, shapes: Sequence[Shape]
    ) -> None:
        self._config, self._resources = config, resources
        self._source, self._shapes = source, shapes
        self._steps: dict[str, StageNode] = {}

    def planned(self) -> dict[str, StageNode]:
        """The steps in the order they run: the chain's under `chain1.`, `chain2.` and so on."""
        config, steps = self._config, self._steps
        student = original = _Model(_source_node(config, self._source), self._source)
        steps["source"] = original.node
        if config.correct is not None:
            corrected = steps["correct"] = _correct_node(config, original)
            original = _Model(corrected, self._source)
            student = original if config.correct.prune_from == "corrected" else student
        for number, (link, target) in enumerate(zip(config.chain, self._shapes, strict=False), 1):
            prefix, before = f"chain{number}.", student
            student = self._pruned(link.prune, before, target, prefix)
            settings = link.distillation(config.distill)
            if settings is not None:
                student = self._distilled(settings, student, before, original, prefix)
        before = student
        if config.prune is not None:
            student = self._pruned(config.prune, before, self._shapes[-1], "")
        if config.distill is not None:
            steps["before"] = self._evaluation(student, original, "before")
            student = self._distilled(config.distill, student, before, original, "")
        steps["after"] = self._evaluation(student, original, "after")
        if config.benchmark is not None:
            steps["benchmark"] = _benchmark_node(config.benchmark, student, original, config.seed)
        return steps

    def _distilled(
        self,
        settings: DistillSettings,
        student: _Model,
        before: _Model,
        original: _Model,
        prefix: str,
    ) -> _Model:
        """The student after its distillation; a cache of its teacher is a stage of its own."""
        config = self._config
        teacher = before if settings.teacher == "previous" else original
        if settings.teacher_model is not None:
            teacher = _other_teacher(config, settings.teacher_model)
            self._steps[f"{prefix}teacher"] = teacher.node
        stage = DistillConfig(
            corpus=config.corpus,
            training=settings.training,
            loss=settings.loss,
            signal=_signal(config, settings, self._resources, student, teacher),
            heldout_every=settings.heldout_every,
        )
        context, training = config.corpus.block_length, settings.training
        tokens = training.steps * training.batch_size * context
        flops = student.shape.training_flops(tokens, context)
        inputs = {"model": student.node.stage_id}
        if not isinstance(stage.signal, LiveSignal):
            cache = self._steps[f"{prefix}cache"] = _cache_node(config, stage, student, teacher)
            inputs["signals"] = cache.stage_id
            if isinstance(stage.signal, HiddenCache):
                flops += 2 * tokens * teacher.shape.hidden_size * teacher.shape.vocab_size
        elif settings.loss.needs_teacher:
            inputs["teacher"] = teacher.node.stage_id
            flops += teacher.shape.forward_flops(tokens, context)
        node = _node("distill", stage, inputs, config.seed, tokens, flops)
        self._steps[f"{prefix}distill"] = node
        return _Model(node, student.shape)

    def _evaluation(self, model: _Model, original: _Model, when: str) -> StageNode:
        """An evaluation beside the original model, unless it is the original that is evaluated."""
        teacher = None if model.node is original.node else original
        return _evaluate_node(self._config, model, teacher, before=when == "before")

    def _pruned(self, cut: PruneSettings, model: _Model, target: Shape, prefix: str) -> _Model:
        """Score and cut in as many rounds as asked; gives the last round's pruning."""
        rounds = stepwise(model.shape, target.sizes, cut.iterations)
        for number, sizes in enumerate(rounds, 1):
            name = prefix + (f"round{number}." if number < len(rounds) else "")
            model = self._cut_once(cut, model, self._source.resized(sizes), name)
        return model

    def _cut_once(self, cut: PruneSettings, model: _Model, target: Shape, name: str) -> _Model:
        config, inputs = self._config, {"model": model.node.stage_id}
        stage = _prune_config(cut, model.shape.sizes, target.sizes)
        layers = _layer_criterion(config, cut, model.shape, target) if _by_score(stage) else None
        needed = {"importance": layers}
        if stage.width is not None and isinstance(stage.width.choice, ByActivation):
            needed["activations"] = Activations(samples=config.importance.samples)
        for role, criterion in needed.items():
            if criterion is not None and stage.initialise == "inherited":
                node = _importance_node(config, criterion, model)
                inputs[role] = node.stage_id
                # One pass may tell of layers and units alike: it is one stage, in both roles.
                if node not in self._steps.values():
                    self._steps[f"{name}{role}"] = node
        seed = config.seed if _draws(stage) else None
        node = self._steps[f"{name}prune"] = _node("prune", stage, inputs, seed)
        return _Model(node, target)


def _prune_config(cut: PruneSettings, source: Sizes, target: Sizes) -> PruneConfig:
    """The cut from one set of sizes to another; an axis that stays as it is, is left out."""
    depth = width = None
    if cut.depth is not None and target.num_hidden_layers != source.num_hidden_layers:
        depth = DepthCut(
            num_hidden_layers=target.num_hidden_layers, choice=_layer_choice(cut.depth)
        )
    widths = {
        name: getattr(target, name)
        for name in WIDTHS
        if getattr(target, name) != getattr(source, name)
    }
    if widths and cut.width is not None:
        settings = cut.width
        width = WidthCut(
            **widths,
            choice=settings.criterion,
            head_residual=settings.head_residual,
            rescale_norms=settings.rescale_norms,
        )
    if cut.initialise == "random":
        # New weights are drawn at the shape alone: whatever chooses the units makes no difference.
        depth = depth and depth.model_copy(update={"choice": AtRandom()})
        width = width and WidthCut(**widths, choice=RandomUnits(), head_residual=False)
    return PruneConfig(depth=depth, width=width, initialise=cut.initialise)


def _layer_choice(depth: DepthSettings) -> LayerChoice:
    match depth.criterion:
        case Explicit(drop=drop):
            return ByList(drop=drop)
        case RandomLayers():
            return AtRandom(contiguous=depth.contiguous)
        case _:
            return ByScore(contiguous=depth.contiguous)


def _by_score(stage: PruneConfig) -> bool:
    return stage.depth is not None and isinstance(stage.depth.choice, ByScore)


def _draws(stage: PruneConfig) -> bool:
    """Whether anything in the pruning depends on the seed."""
    layers = stage.depth is not None and isinstance(stage.depth.choice, AtRandom)
    units = stage.width is not None and isinstance(stage.width.choice, RandomUnits)
    return layers or units or stage.initialise == "random"


def _layer_criterion(
    config: TrialConfig, cut: PruneSettings, shape: Shape, target: Shape
) -> Criterion:
    assert cut.depth is not None
    count = shape.num_hidden_layers
    wanted = {1, count - target.num_hidden_layers, *config.importance.extra_block_lengths}
    lengths = tuple(sorted(length for length in wanted if 0 < length < count))
    match cut.depth.criterion.kind:
        case "perplexity":
            return Perplexity(samples=config.importance.samples, block_lengths=lengths)
        case "task":
            return TaskAccuracy(tasks=config.importance.tasks, block_lengths=lengths)
        case _:
            return Activations(samples=config.importance.samples)


def _importance_node(config: TrialConfig, criterion: Criterion, model: _Model) -> StageNode:
    shape = model.shape
    corpus = config.importance.corpus or config.corpus
    stage = ImportanceConfig(
        criterion=criterion, corpus=corpus, precision=config.evaluate.precision
    )
    context = corpus.block_length
    tokens = 0 if isinstance(criterion, TaskAccuracy) else criterion.samples * context
    flops = shape.forward_flops(tokens, context, head=not isinstance(criterion, Activations))
    if isinstance(criterion, Perplexity):
        flops += sum(
            shape.resized(replace(shape.sizes, num_hidden_layers=above)).forward_flops(
                tokens, context
            )
            for above in _layers_above_blocks(shape.num_hidden_layers, criterion.block_lengths)
        )
    seed = config.seed if _draws_samples(stage) else None
    return _node("importance", stage, {"model": model.node.stage_id}, seed, tokens, flops)


def _draws_samples(stage: ImportanceConfig) -> bool:
    """Whether the seed says on which of the calibration blocks importance is measured."""
    if isinstance(stage.criterion, TaskAccuracy):
        return False
    return stage.criterion.samples < stage.corpus.calibration_blocks


def _layers_above_blocks(count: int, lengths: Sequence[int]) -> list[int]:
    """For every block that is left out in turn, how many layers run again: those above it."""
    return [count - first - n for n in lengths for first in range(count - n + 1)]


def _other_teacher(config: TrialConfig, model: FolderModel | HubModel) -> _Model:
    """A teacher that is not the source. Raises `VocabularyError` where its tokens are others."""
    shape, source = shape_of(source_config(model, config.corpus)), source_shape(config)
    if shape.vocab_size != source.vocab_size:
        raise VocabularyError(
            f"the vocabularies differ: {shape.vocab_size} tokens in the teacher "
            f"{_name_of(model)}, {source.vocab_size} in the student's source "
            f"{_name_of(config.source)}"
        )
    if isinstance(model, FolderModel) and isinstance(config.source, FolderModel):
        theirs, ours = vocabulary(model.path), vocabulary(config.source.path)
        if theirs is not None and ours is not None and theirs != ours:
            raise VocabularyError(
                f"the tokenizers differ: that of the teacher {_name_of(model)} and that of the "
                f"student's source {_name_of(config.source)} number their tokens otherwise"
            )
    return _Model(_node("acquire", AcquireConfig(source=model), {}, None), shape)


class VocabularyError(ValueError):
    """Teacher and student do not speak of the same tokens."""


def _name_of(source: ModelSource) -> str:
    match source:
        case FolderModel(path=path):
            return str(path)
        case HubModel(repository=repository):
            return repository
        case GgufModel(file=file):
            return file.name
        case ScratchModel():
            return "pretrained here"


def _correct_node(config: TrialConfig, source: _Model) -> StageNode:
    assert config.correct is not None
    training, context = config.correct.training, config.corpus.block_length
    tokens = training.steps * training.batch_size * context
    stage = CorrectConfig(corpus=config.corpus, training=training)
    inputs = {"model": source.node.stage_id}
    flops = source.shape.training_flops(tokens, context)
    return _node("correct", stage, inputs, config.seed, tokens, flops)


def _signal(
    config: TrialConfig,
    settings: DistillSettings,
    resources: Resources,
    student: _Model,
    teacher: _Model,
) -> Signal:
    """The teacher signal that is set, or the cheapest exact one: hidden states computed once, where
    they fit the disk. Decided for each trial by itself, lest another trial change its identity."""
    if not settings.loss.needs_teacher:
        return LiveSignal()
    # Raises for layers that there are not, whatever the signal.
    states = _cached_states(settings.loss, student.shape, teacher.shape)
    if not isinstance(settings.signal, AutoSignal):
        return settings.signal
    cached = HiddenCache()
    needed = _cache_bytes(config, settings.training, cached, len(states), teacher.shape)
    return cached if needed <= resources.largest_cache_gb * 1e9 else LiveSignal()


def _cache_bytes(
    config: TrialConfig,
    training: Training,
    signal: HiddenCache | SampledCache | TopKCache,
    states: int,
    teacher: Shape,
) -> int:
    blocks, length = _blocks_drawn(config.corpus, training), config.corpus.block_length
    return cache_bytes(teacher, signal, blocks, length, training.precision, states)


def _blocks_drawn(corpus: Corpus, training: Training) -> int:
    """Distinct blocks of a run, as far as is known before the text is read."""
    drawn = training.steps * training.batch_size
    known = getattr(corpus, "training_blocks", None)
    return drawn if known is None else min(drawn, known)


def _cached_states(loss: DistillLoss, student: Shape, teacher: Shape) -> tuple[str, ...]:
    if loss.hidden is None:
        return ()
    return teacher_states(loss.hidden, student.num_hidden_layers, teacher.num_hidden_layers)


def _cache_node(
    config: TrialConfig, distill: DistillConfig, student: _Model, teacher: _Model
) -> StageNode:
    training, context = distill.training, config.corpus.block_length
    assert not isinstance(distill.signal, LiveSignal)
    stage = CacheConfig(
        corpus=config.corpus,
        signal=distill.signal,
        steps=training.steps,
        batch_size=training.batch_size,
        states=_cached_states(distill.loss, student.shape, teacher.shape),
        precision=training.precision,
    )
    tokens = _blocks_drawn(config.corpus, training) * context
    exact = isinstance(stage.signal, HiddenCache)
    flops = teacher.shape.forward_flops(tokens, context, head=not exact)
    # Where a run draws every block, what is drawn does not depend on the seed; samples do.
    every = _blocks_drawn(config.corpus, training) == getattr(
        config.corpus, "training_blocks", None
    )
    seed = 0 if every and not isinstance(stage.signal, SampledCache) else config.seed
    node = _node("cache", stage, {"model": teacher.node.stage_id}, seed, tokens, flops)
    disk = _cache_bytes(config, training, stage.signal, len(stage.states), teacher.shape)
    return replace(node, disk_bytes=disk)


def _evaluate_node(
    config: TrialConfig, model: _Model, teacher: _Model | None, before: bool
) -> StageNode:
    settings = config.evaluate
    tasks = settings.tasks if settings.tasks_before or not before else ()
    stage = EvaluateConfig(corpus=config.corpus, tasks=tasks, precision=settings.precision)
    tokens = config.corpus.heldout_blocks * config.corpus.block_length
    flops = model.shape.forward_flops(tokens, config.corpus.block_length)
    inputs = {"model": model.node.stage_id}
    if teacher is not None:
        flops += teacher.shape.forward_flops(tokens, config.corpus.block_length)
        inputs["teacher"] = teacher.node.stage_id
    return _node("evaluate", stage, inputs, None, tokens, flops)


def _benchmark_node(
    config: BenchmarkConfig, model: _Model, teacher: _Model, seed: int
) -> StageNode:
    """The original model is measured beside a second copy of itself, which tells how far such a
    measurement can be trusted."""
    if model.node is teacher.node:
        config = config.of_teacher
    tokens, flops = benchmark_cost(config, model.shape, teacher.shape)
    inputs = {"model": model.node.stage_id, "teacher": teacher.node.stage_id}
    return _node("benchmark", config, inputs, seed, tokens, flops)
