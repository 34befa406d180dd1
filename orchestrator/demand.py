"""What each stage of a trial asks of the GPUs, and what to set where one cannot have it. Pure.

The shapes that the stages work on follow from their settings; `estimate` makes bytes and hours of
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from orchestrator import estimate
from orchestrator.axes import shown
from orchestrator.estimate import GB, STAGES, Memory, Remedy, Run
from orchestrator.space import source_shape
from orchestrator.spec import Resources, TrialConfig
from orchestrator.steps import StageNode
from trainers.config import (
    AcquireConfig,
    Activations,
    BenchmarkConfig,
    CacheConfig,
    CorrectConfig,
    DistillConfig,
    DistillLoss,
    EvaluateConfig,
    HiddenCache,
    ImportanceConfig,
    Perplexity,
    PretrainConfig,
    PruneConfig,
    SampledCache,
)
from trainers.mapping import state_pairs
from trainers.shapes import (
    Shape,
    blocks_a_chunk,
    cache_bytes,
    pruned_sizes,
    shape_of,
    source_config,
)

# How much the stages take at a time; tests hold these equal to theirs.
BLOCKS_A_BATCH = 8
EVALUATED_LOGITS = 1024
CACHED_LOGITS = 256
STREAM_BYTES = 1 << 28


@dataclass(frozen=True)
class Demand:
    """What a stage takes of each GPU that it runs on, and the FLOPs that it computes."""

    memory: Memory
    flops: float
    run: Run | None = None
    """Of a stage that trains."""
    cached: SampledCache | HiddenCache | None = None
    """The cache of the smallest size that could stand for its live teacher."""
    cached_bytes: int = 0
    timed: tuple[BenchmarkConfig, Shape, Shape] | None = None
    """Of a benchmark its settings, the model and its teacher."""


@dataclass(frozen=True)
class Shortage:
    """A stage that needs more of a GPU than there is, in bytes, and what would make it fit."""

    step: str
    needed: float
    room: float
    zero_stage: int | None
    """Of a stage that trains."""
    settings: Mapping[str, Any] | None
    """Dotted settings of the trial; None where nothing helps but a larger GPU."""
    then: float | None
    """What it needs with them."""
    disk_bytes: int = 0
    """Of a cache that is among them."""

    @property
    def remedy(self) -> str:
        """The settings as after `--set`; empty where there are none."""
        return " ".join(f"{key}={shown(value)}" for key, value in (self.settings or {}).items())

    def text(self, gpu_memory_gb: float) -> str:
        """One sentence."""
        under = "" if self.zero_stage is None else f" under ZeRO {self.zero_stage}"
        need = (
            f"{self.step} needs {self.needed / GB:.1f} GB of a GPU{under}, and of its "
            f"{gpu_memory_gb:g} GB {self.room / GB:.1f} can be used"
        )
        if self.then is None:
            return f"{need}; no setting makes it fit: use larger GPUs or a smaller model"
        disk = f" and {self.disk_bytes / GB:,.0f} GB of disk" if self.disk_bytes else ""
        listed = any(key.startswith("chain.") for key in self.settings or ())
        where = " in the file" if listed else ""  # `--set` does not reach into a list
        return f"{need}; with {self.remedy}{where} it needs {self.then / GB:.1f} GB{disk}"

    def and_of(self, other: Shortage) -> Shortage:
        """The worse of two for which the same is to be set."""
        worse = max(self, other, key=lambda each: each.needed)
        then = max(self.then, other.then) if self.then and other.then else None
        return replace(worse, then=then, disk_bytes=max(self.disk_bytes, other.disk_bytes))


def room(resources: Resources) -> float | None:
    """Bytes of a GPU that one worker may fill; None without GPUs. Workers may share one."""
    if not resources.gpus_per_worker:
        return None
    return estimate.USABLE * resources.gpu_memory_gb * GB * min(1.0, resources.gpus_per_worker)


def gpu_hours(flops: float, resources: Resources) -> float | None:
    """Hours of one GPU at the stated utilisation; None without GPUs."""
    if not resources.gpus_per_worker:
        return None
    return estimate.gpu_hours(flops, resources.peak_tflops, resources.utilisation)


# --- what a trial's stages take --------------------------------------------------------------


def demands(
    config: TrialConfig, steps: Mapping[str, StageNode], resources: Resources
) -> dict[str, Demand]:
    """What each step of a trial takes."""
    shapes = model_shapes(config, steps)
    return {step: _demand(node, shapes, resources) for step, node in steps.items()}


def model_shapes(config: TrialConfig, steps: Mapping[str, StageNode]) -> dict[str, Shape]:
    """The shape of the model that each stage leaves or, of a cache, tells of; by stage id."""
    found: dict[str, Shape] = {}
    for step, node in steps.items():
        if step == "source":
            found[node.stage_id] = source_shape(config)
        elif node.kind == "acquire":
            source = AcquireConfig.model_validate(node.config).source
            found[node.stage_id] = shape_of(source_config(source, config.corpus))
        else:
            model = found[node.inputs["model"]]
            found[node.stage_id] = _pruned(model, node) if node.kind == "prune" else model
    return found


def _pruned(model: Shape, node: StageNode) -> Shape:
    return model.resized(pruned_sizes(model, PruneConfig.model_validate(node.config)))


def _demand(node: StageNode, shapes: Mapping[str, Shape], resources: Resources) -> Demand:
    model = shapes[node.inputs.get("model", node.stage_id)]
    match node.kind:
        case "pretrain":
            pretrain = PretrainConfig.model_validate(node.config)
            length = pretrain.corpus.block_length
            return _training(node, Run(model, pretrain.training, length, resources.workers))
        case "correct":
            correct = CorrectConfig.model_validate(node.config)
            length = correct.corpus.block_length
            return _training(node, Run(model, correct.training, length, resources.workers))
        case "distill":
            return _distillation(node, model, shapes, resources)
        case "evaluate" | "importance" | "cache":
            return Demand(_forward(node, model, shapes), node.flops)
        case "benchmark":
            benchmark = BenchmarkConfig.model_validate(node.config)
            timed = (benchmark, model, shapes[node.inputs["teacher"]])
            return Demand(_generating(*timed), node.flops, timed=timed)
        case _:
            return Demand(Memory(), node.flops)


def _training(node: StageNode, run: Run) -> Demand:
    flops = node.flops + estimate.recomputed_flops(run)
    return Demand(estimate.training_memory(run), flops, run)


def _distillation(
    node: StageNode, student: Shape, shapes: Mapping[str, Shape], resources: Resources
) -> Demand:
    config = DistillConfig.model_validate(node.config)
    taught_by = node.inputs.get("teacher", node.inputs.get("signals"))
    teacher = shapes[taught_by] if taught_by else None
    run = Run(
        student=student,
        training=config.training,
        context=config.corpus.block_length,
        workers=resources.workers,
        teacher=teacher,
        signal=config.signal,
        pairs=_pairs(config.loss, student, teacher),
        highest_stage=3 if config.heldout_every is None else 2,
    )
    found = _training(node, run)
    if run.live_teacher is None:
        return found
    cached = _smallest_cache(config.loss)
    disk = _cache_bytes(config, cached, run.live_teacher, run.pairs)
    return Demand(found.memory, found.flops, run, cached, disk)


def _pairs(loss: DistillLoss, student: Shape, teacher: Shape | None) -> int:
    if loss.hidden is None or teacher is None:
        return 0
    return len(state_pairs(loss.hidden, student.num_hidden_layers, teacher.num_hidden_layers))


def _smallest_cache(loss: DistillLoss) -> SampledCache | HiddenCache:
    few_tokens_do = loss.logits == "forward_kl" and loss.temperature == 1
    if few_tokens_do and loss.top_k is None and loss.hidden is None:
        return SampledCache()
    return HiddenCache()


def _cache_bytes(
    config: DistillConfig, cached: SampledCache | HiddenCache, teacher: Shape, states: int
) -> int:
    corpus, training = config.corpus, config.training
    drawn = training.steps * training.batch_size
    blocks = min(drawn, getattr(corpus, "training_blocks", drawn))
    return cache_bytes(teacher, cached, blocks, corpus.block_length, training.precision, states)


# --- stages that only run a model forward ----------------------------------------------------


def _forward(node: StageNode, model: Shape, shapes: Mapping[str, Shape]) -> Memory:
    match node.kind:
        case "evaluate":
            evaluate = EvaluateConfig.model_validate(node.config)
            corpus = evaluate.corpus
            others = [shapes[node.inputs["teacher"]]] if "teacher" in node.inputs else []
            tokens = min(BLOCKS_A_BATCH, corpus.heldout_blocks) * corpus.block_length
            return estimate.forward_memory(
                [model, *others], evaluate.precision, tokens, EVALUATED_LOGITS
            )
        case "cache":
            cache = CacheConfig.model_validate(node.config)
            length = cache.corpus.block_length
            logits = 0 if isinstance(cache.signal, HiddenCache) else CACHED_LOGITS
            tokens = blocks_a_chunk(length) * length
            return estimate.forward_memory([model], cache.precision, tokens, logits)
        case _:
            return _scored(ImportanceConfig.model_validate(node.config), model)


def _scored(config: ImportanceConfig, model: Shape) -> Memory:
    """Of a model whose units or layers are scored: the stream at every layer is held as well."""
    number, length = estimate.BYTES[config.precision], config.corpus.block_length
    states = (model.num_hidden_layers + 1) * model.hidden_size
    match config.criterion:
        case Activations():
            blocks = max(1, min(BLOCKS_A_BATCH, STREAM_BYTES // (states * length * 4)))
            return estimate.forward_memory(
                [model], config.precision, blocks * length, held=4 * states
            )
        case Perplexity(samples=samples):
            tokens = min(BLOCKS_A_BATCH, samples) * length
            rows = estimate.LOSS_CHUNK_TOKENS
            return estimate.forward_memory(
                [model], config.precision, tokens, rows, held=number * states
            )
        case _:
            return estimate.forward_memory([model], config.precision, length)


def _generating(config: BenchmarkConfig, model: Shape, teacher: Shape) -> Memory:
    """Of two models that stand side by side and generate in turns: at the fullest, one reads its
    requests or holds all of their keys and values."""
    number = estimate.BYTES.get(config.precision, estimate.BYTES["bf16"])
    weights, beside = (
        shape.generation_bytes(config.precision, tokens=0) for shape in (model, teacher)
    )
    in_use = [
        (shape, batch, load)
        for load in config.loads
        for shape, batch in ((model, load.batch), (teacher, load.teacher_batch))
    ]
    kept = max(
        shape.generation_bytes(config.precision, batch * (load.input + load.output))
        - shape.generation_bytes(config.precision, tokens=0)
        for shape, batch, load in in_use
    )
    read = max(batch * load.input * shape.passed_by_layer(number) for shape, batch, load in in_use)
    return Memory(weights=weights, teacher=beside, activations=kept, working=float(read))


# --- where it is too much --------------------------------------------------------------------


def shortages(
    config: TrialConfig, found: Mapping[str, Demand], resources: Resources
) -> list[Shortage]:
    """The steps of a trial that do not fit a GPU; none where there are no GPUs."""
    most = room(resources)
    if most is None:
        return []
    return [
        _shortage(config, step, demand, most)
        for step, demand in found.items()
        if demand.memory.total > most
    ]


def _shortage(config: TrialConfig, step: str, demand: Demand, most: float) -> Shortage:
    needed, run = demand.memory.total, demand.run
    if demand.timed is not None:
        # The teacher beside its copy has both of its sides under the name of the other models' one.
        own = "batch_sizes" if demand.timed[0] == config.benchmark else "teacher_batch_sizes"
        return _fewer_requests(step, needed, most, own, *demand.timed)
    if run is None:
        return Shortage(step, needed, most, None, None, None)
    found = estimate.remedy(run, most, demand.cached)
    if found is None:
        return Shortage(step, needed, most, run.zero_stage, None, None)
    disk = demand.cached_bytes if "signal" in found.settings else 0
    settings = _of_trial(config, step, found)
    return Shortage(step, needed, most, run.zero_stage, settings, found.memory.total, disk)


def _fewer_requests(
    step: str,
    needed: float,
    most: float,
    own: str,
    config: BenchmarkConfig,
    model: Shape,
    teacher: Shape,
) -> Shortage:
    """Half as many requests at once, as often as it takes."""
    batches = config.batches
    while max(max(pair) for pair in batches) > 1:
        batches = tuple((max(1, own_size // 2), max(1, other // 2)) for own_size, other in batches)
        fewer = config.with_batches(batches)
        if (then := _generating(fewer, model, teacher).total) <= most:
            named = {f"benchmark.{own}": list(fewer.batch_sizes)}
            if fewer.teacher_batch_sizes is not None:
                named["benchmark.teacher_batch_sizes"] = list(fewer.teacher_batch_sizes)
            return Shortage(step, needed, most, None, named, then)
    return Shortage(step, needed, most, None, None, None)


def _of_trial(config: TrialConfig, step: str, found: Remedy) -> dict[str, Any]:
    """A stage's settings with the names that they have among the trial's."""
    *link, kind = step.split(".")
    number = int(link[0].removeprefix("chain")) - 1 if link else None
    own = number is not None and config.chain[number].distill is not None
    section = f"chain.{number}.{kind}" if own else kind
    return {
        dotted if dotted.startswith("resources.") else f"{section}.{dotted}": _plain(value)
        for dotted, value in found.settings.items()
    }


def _plain(value: Any) -> Any:
    return value.kind if isinstance(value, SampledCache | HiddenCache) else value


def by_zero_stage(found: Mapping[str, Demand]) -> dict[int, float] | None:
    """The most that any step that trains takes of a GPU under each ZeRO stage, in bytes; None where
    none does."""
    runs = [demand.run for demand in found.values() if demand.run is not None]
    if not runs:
        return None
    return {
        stage: max(estimate.training_memory(run, stage).total for run in runs) for stage in STAGES
    }
