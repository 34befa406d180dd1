"""What a stage asks of its GPUs, in bytes and in hours, and what to set where it is too much. Pure.

Model states are counted as Rajbhandari et al. 2020 do ("ZeRO", section 3 and table 1), with what
DeepSpeed really holds under the settings of `trainers.engine`; activations as in Korthikanti et
al. 2022 ("Reducing Activation Recomputation", section 4), with the tensors that transformers'
layers keep (`Shape.kept_bytes`). Bytes are of tensors alone: `USABLE` leaves room for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from trainers.config import HiddenCache, LiveSignal, Signal, Training
from trainers.shapes import Shape

GB = 1e9
USABLE = 0.9
"""Share of a GPU's memory that tensors may take: the rest is CUDA's, NCCL's and lost in gaps."""
BYTES = {"fp32": 4, "bf16": 2}
STAGES = (0, 1, 2, 3)
MOST = 16_384
"""Larger micro-batches and more workers than that are not looked for."""

# What the engine and its losses hold beside the model; tests hold these equal to theirs.
BUCKET = 50_000_000
"""Gradients that are reduced at once."""
LOSS_CHUNK_TOKENS = 512
LIVE_PARAMETERS = 1_000_000_000
PREFETCHED_PARAMETERS = 50_000_000
SUB_GROUP = 1_000_000_000
"""DeepSpeed's defaults under ZeRO-3: gathered at once, gathered ahead of use, stepped at once."""
DENSE_LOGITS = 24
SPARSE_LOGITS = 14
"""Bytes for each logit of a chunk while its loss is computed, gradients included: against all of a
teacher's logits, and against some tokens alone. Measured."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the fullest moment of a stage, by what they are for."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    """Master weights and AdamW's two moments."""
    teacher: float = 0.0
    activations: float = 0.0
    """What the forward pass keeps for the backward pass."""
    working: float = 0.0
    """What comes and goes: logits, gradients on their way, gathered weights."""

    @property
    def total(self) -> float:
        """All of it."""
        return float(sum(vars(self).values()))


@dataclass(frozen=True)
class Run:
    """A training stage as far as memory goes: a student of this shape, on blocks of `context`
    tokens, taught by a teacher that is run on every batch or was run beforehand."""

    student: Shape
    training: Training
    context: int
    workers: int = 1
    teacher: Shape | None = None
    signal: Signal = field(default_factory=LiveSignal)
    pairs: int = 0
    """Pairs of hidden states that are compared, each through a projection of its own."""
    highest_stage: int = 3
    """Above which ZeRO stage something that the run does is not possible."""

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage in use, as `trainers.engine.zero_stage` has it."""
        asked = self.training.engine.zero_stage
        return asked if asked is not None else int(self.training.precision == "bf16")

    @property
    def micro_batch_size(self) -> int:
        """Sequences that a worker takes at a time."""
        share = max(1, self.training.batch_size // self.workers)
        return min(self.training.micro_batch_size or share, share)

    @property
    def tokens(self) -> int:
        """Tokens that a worker takes at a time."""
        return self.micro_batch_size * self.context

    @property
    def parameters(self) -> int:
        """All that is trained: the student, and what raises its states to the teacher's width."""
        width = self.teacher.hidden_size if self.teacher else 0
        return self.student.parameters + self.pairs * self.student.hidden_size * width

    @property
    def live_teacher(self) -> Shape | None:
        """The teacher, where its weights are on the GPUs."""
        return self.teacher if isinstance(self.signal, LiveSignal) else None


# --- memory of training ----------------------------------------------------------------------


def training_memory(run: Run, zero_stage: int | None = None) -> Memory:
    """What a training stage takes of each worker's GPU, under a ZeRO stage or that of its settings.

    In bf16, ZeRO 0 stands for a model of which nothing is shared out: DeepSpeed does not train it.
    """
    stage = run.zero_stage if zero_stage is None else zero_stage
    weights, gradients, optimizer = model_states(run, stage)
    activations = _kept_bytes(run)
    in_pass = max(_loss_bytes(run), _layer_bytes(run)) + _passing_bytes(run, stage)
    in_step = _step_bytes(run, stage) - activations
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        teacher=_teacher_bytes(run),
        activations=activations,
        working=max(in_pass, in_step),
    )


def model_states(run: Run, stage: int) -> tuple[float, float, float]:
    """Bytes of weights, gradients and optimizer on each worker's GPU.

    As in table 1 of ZeRO, with DeepSpeed's ways: gradients are added up in fp32, all of them under
    stage 1, where those of bf16 weights stay beside that; from stage 1 on there are fp32 master
    weights even of fp32 weights.
    """
    number, engine = BYTES[run.training.precision], run.training.engine
    whole = float(run.parameters)
    share = whole / run.workers if stage else whole
    offloaded = engine.offload_optimizer and stage > 0
    optimizer = (12 if stage or number == 2 else 8) * share
    gradients = 4 * (whole if stage <= 1 else share)
    if number == 2 and stage <= 1 and not offloaded:
        gradients += number * whole
    weights = number * (share if stage == 3 else whole)
    if offloaded:
        optimizer = 0.0
        gradients = gradients if stage == 1 else 0.0
    if engine.offload_parameters and stage == 3:
        weights = 0.0
    return weights, gradients, optimizer


def _kept_bytes(run: Run) -> float:
    """Of the student, and of each state that is compared: normalised, with its gradient."""
    number = BYTES[run.training.precision]
    student = run.student.kept_bytes(number, run.training.engine.gradient_checkpointing)
    compared = run.pairs * (4 + 2 * number) * run.student.hidden_size
    return float(run.tokens * (student + compared))


def _teacher_bytes(run: Run) -> float:
    """Of a live teacher its weights; of cached hidden states the output head that reads them."""
    number, teacher = BYTES[run.training.precision], run.teacher
    if teacher is None:
        return 0.0
    head = teacher.vocab_size * teacher.hidden_size
    states = run.tokens * teacher.hidden_size * (1 + run.pairs)
    if isinstance(run.signal, HiddenCache):
        return float(number * (head + states))
    if run.live_teacher is None:
        return 0.0
    if not run.training.engine.shard_teacher:
        return float(number * (teacher.parameters + states))
    layers = teacher.num_hidden_layers * teacher.layer_parameters
    gathered = min(layers, LIVE_PARAMETERS + PREFETCHED_PARAMETERS)
    rest = teacher.parameters - layers
    return number * (layers / run.workers + gathered + rest + states)


def _loss_bytes(run: Run) -> float:
    """While the chunked loss runs: the head's gradient in fp32, and a chunk's logits or, in bf16,
    the product that is added to it."""
    student, number = run.student, BYTES[run.training.precision]
    head = student.vocab_size * student.hidden_size
    dense = run.teacher is not None and isinstance(run.signal, LiveSignal | HiddenCache)
    rows = min(LOSS_CHUNK_TOKENS, run.tokens) * student.vocab_size
    logits = rows * (DENSE_LOGITS if dense else SPARSE_LOGITS)
    product = head * number if number == 2 else 0
    return float(4 * head + max(logits, product + rows * number))


def _layer_bytes(run: Run) -> float:
    """While it is passed back: the head's gradient twice, or once beside a layer's, which with
    checkpointing is computed again first."""
    student, number = run.student, BYTES[run.training.precision]
    again = run.training.engine.gradient_checkpointing * student.kept_by_layer(number)
    head = number * student.vocab_size * student.hidden_size
    layer = run.tokens * (again + student.passed_by_layer(number))
    return float(head + max(head, layer))


def _passing_bytes(run: Run, stage: int) -> float:
    """Gradients in the bucket that is being reduced, and weights that ZeRO-3 has gathered."""
    number = BYTES[run.training.precision]
    bucket = BUCKET * (number if stage >= 2 else 4) if run.workers > 1 or stage else 0
    if stage < 3:
        return float(bucket)
    return bucket + number * min(run.parameters, LIVE_PARAMETERS + PREFETCHED_PARAMETERS)


def _step_bytes(run: Run, stage: int) -> float:
    """While weights are stepped: gradients in one flat tensor, where DeepSpeed copies them."""
    if run.training.engine.offload_optimizer or stage == 0:
        return 0.0
    share = run.parameters / run.workers
    if stage == 3:
        return 4 * min(share, SUB_GROUP)
    return 4 * share if run.training.precision == "fp32" else 0.0


# --- memory of everything else ---------------------------------------------------------------


def forward_memory(
    models: Sequence[Shape],
    precision: str,
    tokens: int,
    logits_tokens: int = 0,
    held: int = 0,
) -> Memory:
    """What a stage takes that runs these models forward in turn on `tokens` at once, computes
    `logits_tokens` rows of logits and holds so many bytes a token."""
    number, model = BYTES[precision], models[0]
    passing = max(each.passed_by_layer(number) for each in models) * tokens
    logits = min(tokens, logits_tokens) * model.vocab_size * DENSE_LOGITS
    return Memory(
        weights=float(number * model.parameters),
        teacher=float(number * sum(each.parameters for each in models[1:])),
        activations=float(held * tokens),
        working=float(max(passing, logits)),
    )


# --- hours -----------------------------------------------------------------------------------


def gpu_hours(flops: float, peak_tflops: float, utilisation: float) -> float:
    """Hours of one GPU that computes this share of its peak."""
    return flops / (peak_tflops * 1e12 * utilisation) / 3600


def recomputed_flops(run: Run) -> float:
    """What gradient checkpointing computes a second time: every layer's forward pass."""
    if not run.training.engine.gradient_checkpointing:
        return 0.0
    tokens = run.training.steps * run.training.batch_size * run.context
    return run.student.forward_flops(tokens, run.context, head=False)


# --- what to set where it does not fit -------------------------------------------------------


@dataclass(frozen=True)
class Remedy:
    """Settings (dotted, below the stage's own, or `resources.workers`) under which a run fits, no
    more than it takes, and the memory that it then needs."""

    settings: Mapping[str, Any]
    memory: Memory


Menu = Callable[[Run], Iterator[tuple[str, Any]]]
"""Values of one setting that may save memory, the cheapest first."""


def remedy(run: Run, room: float, cached: Signal | None = None) -> Remedy | None:
    """The cheapest settings under which the run takes at most `room` bytes; None where none do.

    One alone if it suffices, tried in the order of what they cost: smaller micro-batches, a higher
    ZeRO stage, gradient checkpointing, a sharded teacher, the signal `cached` instead of a live
    teacher, the optimizer in the host's memory, more workers. Else as many as it takes, gathered in
    that order.
    """
    menus = (
        _smaller_micro_batches,
        _higher_zero_stages,
        _gradient_checkpointing,
        _sharded_teacher,
        partial(_cached_teacher, cached),
        _offloaded_optimizer,
        _more_workers,
    )
    for menu in menus:
        for dotted, value in menu(run):
            if _fits(run, {dotted: value}, room):
                return _remedy(run, {dotted: value})
    taken: dict[str, Any] = {}
    for menu in menus:
        for dotted, value in menu(under(run, taken)):
            taken[dotted] = value
            if _fits(run, taken, room):
                return _remedy(run, _needed(run, taken, room))
    return None


def under(run: Run, settings: Mapping[str, Any]) -> Run:
    """The run under other settings, named as a remedy names them."""
    for dotted, value in settings.items():
        *section, name = dotted.split(".")
        match section:
            case ["training", "engine"]:
                engine = run.training.engine.model_copy(update={name: value})
                run = replace(run, training=run.training.model_copy(update={"engine": engine}))
            case ["training"]:
                run = replace(run, training=run.training.model_copy(update={name: value}))
            case _:
                run = replace(run, **{name: value})
    return run


def _fits(run: Run, settings: Mapping[str, Any], room: float) -> bool:
    return training_memory(under(run, settings)).total <= room


def _remedy(run: Run, settings: Mapping[str, Any]) -> Remedy:
    return Remedy(settings, training_memory(under(run, settings)))


def _needed(run: Run, settings: Mapping[str, Any], room: float) -> Mapping[str, Any]:
    """These settings without those that it fits without."""
    for dotted in settings:
        fewer = {other: value for other, value in settings.items() if other != dotted}
        if _fits(run, fewer, room):
            settings = fewer
    return settings


def _smaller_micro_batches(run: Run) -> Iterator[tuple[str, Any]]:
    share = run.training.batch_size // run.workers
    for size in range(min(run.micro_batch_size - 1, MOST), 0, -1):
        if share % size == 0:
            yield "training.micro_batch_size", size


def _higher_zero_stages(run: Run) -> Iterator[tuple[str, Any]]:
    for stage in STAGES[run.zero_stage + 1 : run.highest_stage + 1]:
        yield "training.engine.zero_stage", stage


def _gradient_checkpointing(run: Run) -> Iterator[tuple[str, Any]]:
    if not run.training.engine.gradient_checkpointing:
        yield "training.engine.gradient_checkpointing", True


def _sharded_teacher(run: Run) -> Iterator[tuple[str, Any]]:
    if run.live_teacher is not None and not run.training.engine.shard_teacher:
        yield "training.engine.shard_teacher", True


def _cached_teacher(cached: Signal | None, run: Run) -> Iterator[tuple[str, Any]]:
    if run.live_teacher is not None and cached is not None:
        yield "signal", cached


def _offloaded_optimizer(run: Run) -> Iterator[tuple[str, Any]]:
    if run.zero_stage and not run.training.engine.offload_optimizer:
        yield "training.engine.offload_optimizer", True


def _more_workers(run: Run) -> Iterator[tuple[str, Any]]:
    batch = run.training.batch_size
    for count in range(run.workers + 1, min(batch, MOST) + 1):
        if batch % count == 0 and batch // count % run.micro_batch_size == 0:
            yield "resources.workers", count
