"""One frozen model per stage, and the pieces they are made of. Imports no torch.

Every field here decides what a stage computes, so every field is part of the stage's identity.
Local files enter an identity by their content, not by their path (see `identity`).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError


class Frozen(BaseModel):
    """Base of all settings: immutable, and an unknown key is an error that names the nearest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _reject_unknown_keys(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        allowed = list(cls.model_fields)
        for key in data:
            if key not in allowed:
                near = difflib.get_close_matches(str(key), allowed, n=1)
                raise PydanticCustomError(
                    "unknown_key",
                    "unknown key '{key}'{hint}; allowed: {allowed}",
                    {
                        "key": str(key),
                        "hint": f", did you mean '{near[0]}'?" if near else "",
                        "allowed": ", ".join(allowed),
                    },
                )
        return data


# --- local files -----------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _digest_of_file(path: str, size: int, mtime_ns: int) -> str:
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def content_digest(path: Path) -> str:
    """SHA-256 of a file, or of a folder's files and their relative names."""
    if path.is_dir():
        parts = [
            f"{file.relative_to(path)}:{content_digest(file)}"
            for file in sorted(path.rglob("*"))
            if file.is_file()
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
    stat = path.stat()
    return _digest_of_file(str(path), stat.st_size, stat.st_mtime_ns)


def _dump_local(path: Path, info: SerializationInfo) -> str:
    purpose = (info.context or {}).get("purpose")
    if purpose == "identity":
        return f"sha256:{content_digest(path)}"
    if purpose == "record":
        return f"{path.name}@sha256:{content_digest(path)[:12]}"
    return str(path)


LocalPath = Annotated[Path, PlainSerializer(_dump_local, return_type=str)]
"""A file or folder on this machine; in an identity it stands as a hash of its content."""


def identity(config: BaseModel) -> dict[str, Any]:
    """The complete settings as JSON values, with local files replaced by content hashes."""
    return config.model_dump(mode="json", context={"purpose": "identity"})


def for_record(config: BaseModel) -> dict[str, Any]:
    """The complete settings as JSON values, with local files as name and content hash: the same
    on every machine, and free of its paths."""
    return config.model_dump(mode="json", context={"purpose": "record"})


def hash_of(value: Any) -> str:
    """Hex SHA-256 of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _kind_from_string(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


Shorthand = BeforeValidator(_kind_from_string)
"""Lets a variant be written by its name alone: `perplexity` for `{kind: perplexity}`."""


# --- text ------------------------------------------------------------------------------------


class GeneratedCorpus(Frozen):
    """Text of a generated language (`trainers.language`), the same for the same seed."""

    kind: Literal["generated"] = "generated"
    language_seed: int = 0
    block_length: int = Field(default=96, gt=1)
    training_blocks: int = Field(default=8_000, gt=0)
    calibration_blocks: int = Field(default=128, gt=0)
    heldout_blocks: int = Field(default=128, gt=0)


class TextCorpus(Frozen):
    """Two text files. Calibration blocks are the first of `train`; training takes the rest."""

    kind: Literal["text"] = "text"
    train: LocalPath
    heldout: LocalPath
    block_length: int = Field(default=512, gt=1)
    calibration_blocks: int = Field(default=64, gt=0)
    heldout_blocks: int = Field(default=64, gt=0)


class HubCorpus(Frozen):
    """A text data set of the Hugging Face hub."""

    kind: Literal["hub"] = "hub"
    dataset: str
    name: str | None = None
    revision: str = "main"
    train_split: str = "train"
    heldout_split: str = "test"
    text_field: str = "text"
    block_length: int = Field(default=512, gt=1)
    calibration_blocks: int = Field(default=64, gt=0)
    heldout_blocks: int = Field(default=64, gt=0)


Corpus = Annotated[GeneratedCorpus | TextCorpus | HubCorpus, Field(discriminator="kind"), Shorthand]


# --- models ----------------------------------------------------------------------------------


class LlamaShape(Frozen):
    """A random-weight Llama. The vocabulary comes from the corpus' tokenizer."""

    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    tie_word_embeddings: bool = True
    initializer_range: float = Field(default=0.02, gt=0)
    scale_residual_init: bool = False
    """Divide the initial weights that write into the residual stream by the square root of how many
    there are, 2 a layer (Radford et al. 2019, section 2.3)."""
    max_position_embeddings: int = Field(default=2048, gt=0)
    rope_theta: float = Field(default=10_000.0, gt=0)

    @model_validator(mode="after")
    def _heads_divide(self) -> LlamaShape:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        return self


class EngineSettings(Frozen):
    """How DeepSpeed holds the model: ZeRO stage (None: 0 in fp32, 1 in bf16), what is offloaded to
    the host's memory, and what is recomputed, compiled or replaced by Liger's kernels (GPU)."""

    zero_stage: Literal[0, 1, 2, 3] | None = None
    offload_optimizer: bool = False
    offload_parameters: bool = False
    gradient_checkpointing: bool = False
    compile: bool = False
    liger: bool = False
    shard_teacher: bool = False
    """Whether ZeRO-3 shards a live teacher, too, instead of its standing whole on every worker."""

    @model_validator(mode="after")
    def _possible(self) -> EngineSettings:
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError("offload_parameters needs zero_stage: 3")
        if self.offload_optimizer and self.zero_stage in (None, 0):
            raise ValueError("offload_optimizer needs zero_stage: 1, 2 or 3")
        return self


class Training(Frozen):
    """How a model is trained: AdamW, linear warm-up, cosine decay to a minimum.

    `batch_size` is the global batch in sequences; gradients are accumulated over micro-batches
    of `micro_batch_size` sequences.
    """

    steps: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    micro_batch_size: int | None = Field(default=None, gt=0)
    learning_rate: float = Field(gt=0)
    minimum_learning_rate: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    gradient_clip: float = Field(default=1.0, ge=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    engine: EngineSettings = EngineSettings()

    @model_validator(mode="after")
    def _consistent(self) -> Training:
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of "
                f"micro_batch_size {self.micro_batch_size}"
            )
        if self.minimum_learning_rate > self.learning_rate:
            raise ValueError("minimum_learning_rate is above learning_rate")
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} leaves none of {self.steps} steps")
        if self.precision == "bf16" and self.engine.zero_stage == 0:
            raise ValueError("bf16 needs zero_stage 1 or more: only there are fp32 masters kept")
        return self


class ScratchModel(Frozen):
    """A random-weight Llama, pretrained on the corpus: with a seed of its own, or with the seed of
    each trial, so that a comparison over seeds is one over teachers too."""

    kind: Literal["scratch"] = "scratch"
    shape: LlamaShape
    training: Training
    corpus: Corpus | None = None
    """Another corpus than the trial's: a teacher whose training data is not at hand."""
    seed: int | None = None


class HubModel(Frozen):
    """A model of the Hugging Face hub. `shape` (its config.json) lets `plan` work offline."""

    kind: Literal["hub"] = "hub"
    repository: str
    revision: str = "main"
    shape: dict[str, Any] | None = None


class FolderModel(Frozen):
    """A Hugging Face checkpoint in a local folder."""

    kind: Literal["folder"] = "folder"
    path: LocalPath


class GgufModel(Frozen):
    """A GGUF file, either inside an installed Python package or at `file` on this machine.

    `shape` (what its config.json would say) spares `plan` the seconds that reading a GGUF header
    takes; it is checked when the model is converted.
    """

    kind: Literal["gguf"] = "gguf"
    file: LocalPath
    package: str | None = None
    shape: dict[str, Any] | None = None


ModelSource = Annotated[
    ScratchModel | HubModel | FolderModel | GgufModel, Field(discriminator="kind"), Shorthand
]
ExistingModel = Annotated[HubModel | FolderModel | GgufModel, Field(discriminator="kind")]


# --- questions -------------------------------------------------------------------------------


class GeneratedTask(Frozen):
    """Questions on one ability of the generated language."""

    kind: Literal["generated"] = "generated"
    name: Literal["agreement", "reference", "knowledge"]
    language_seed: int = 0
    shots: int = Field(default=0, ge=0)
    limit: int = Field(default=400, gt=0)


class ChoicesTask(Frozen):
    """Multiple-choice questions in a local JSON-lines file: fields query, choices, gold (index).

    `prompt` is a Jinja template over the fields, as lm-evaluation-harness writes its prompts.
    """

    kind: Literal["choices"] = "choices"
    name: str
    path: LocalPath
    prompt: str = "{{query}}"
    metric: Literal["acc", "acc_norm"] = "acc"
    shots: int = Field(default=0, ge=0)
    limit: int | None = Field(default=None, gt=0)


class PartialTask(Frozen):
    """Questions in a local JSON-lines file that ask which of several contexts makes the same
    continuation likeliest, as WinoGrande is scored (Trinh and Le 2018): fields context_options,
    continuation, gold (index)."""

    kind: Literal["partial"] = "partial"
    name: str
    path: LocalPath
    shots: int = Field(default=0, ge=0)
    limit: int | None = Field(default=None, gt=0)


class HarnessTask(Frozen):
    """Any task, group or tag of tasks that lm-evaluation-harness knows by name.

    `metric` is one that the harness names for it (gsm8k: exact_match), and `filter` which of its
    ways to read an answer counts (gsm8k: strict-match or flexible-extract), by default its first.
    Of a group, `limit` is for each of its tasks, and all questions count the same.
    """

    kind: Literal["harness"] = "harness"
    name: str
    metric: str = "acc"
    filter: str | None = None
    shots: int = Field(ge=0)
    limit: int | None = Field(default=None, gt=0)


Task = Annotated[
    GeneratedTask | ChoicesTask | PartialTask | HarnessTask, Field(discriminator="kind")
]


# --- stages ----------------------------------------------------------------------------------


class AcquireConfig(Frozen):
    """Bring an existing model into the store as a plain Hugging Face checkpoint."""

    source: ExistingModel


class PretrainConfig(Frozen):
    """Train a random-weight Llama on a corpus."""

    shape: LlamaShape
    corpus: Corpus
    training: Training


BlockLengths = Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(min_length=1)]


class Activations(Frozen):
    """What one forward pass tells of every unit: neurons, heads, groups of heads and channels by
    the size of their activations (P1 section 2.2), layers by Block Influence (section 2.3)."""

    kind: Literal["activations"] = "activations"
    samples: int = Field(default=32, gt=0)


class Perplexity(Frozen):
    """The rise of the calibration LM loss when a block of layers is left out (P1 section 2.3)."""

    kind: Literal["perplexity"] = "perplexity"
    samples: int = Field(default=32, gt=0)
    block_lengths: BlockLengths


class TaskAccuracy(Frozen):
    """The fall of downstream accuracy when a block of layers is left out (P2 section 3).

    On the half of the questions by which trials are chosen, too: layers that were chosen on the
    other half would do better there than they are.
    """

    kind: Literal["task"] = "task"
    tasks: tuple[Task, ...] = Field(min_length=1)
    split: Literal["select"] = "select"
    block_lengths: BlockLengths


Criterion = Annotated[Activations | Perplexity | TaskAccuracy, Field(discriminator="kind")]


class ImportanceConfig(Frozen):
    """Score units and layers (`Activations`), or every contiguous block of the given lengths."""

    criterion: Criterion
    corpus: Corpus
    precision: Literal["fp32", "bf16"] = "fp32"


class ByScore(Frozen):
    """Drop the layers whose loss matters least, by the scores in the role `importance`."""

    kind: Literal["score"] = "score"
    contiguous: bool = False


class AtRandom(Frozen):
    """Drop layers drawn with the trial's seed."""

    kind: Literal["random"] = "random"
    contiguous: bool = False


class ByList(Frozen):
    """Drop exactly these layers, counted from 0."""

    kind: Literal["layers"] = "layers"
    drop: tuple[int, ...]


LayerChoice = Annotated[ByScore | AtRandom | ByList, Field(discriminator="kind")]


class DepthCut(Frozen):
    """Leave out layers until `num_hidden_layers` remain."""

    num_hidden_layers: int = Field(gt=0)
    choice: LayerChoice


Statistic = Literal["l2", "mean", "variance"]
"""An aggregation: L2 norm, mean of absolute values, or variance."""


class ByActivation(Frozen):
    """Keep the units with the largest activations, by the statistics in the role `activations`.

    The sequence is aggregated first, then the batch (P1 section 2.2; table 11 has the nine pairs).
    A neuron is seen where the down projection reads it, or before the activation function.
    """

    kind: Literal["activations"] = "activations"
    batch: Statistic = "l2"
    sequence: Statistic = "mean"
    neurons: Literal["down_input", "pre_activation"] = "down_input"


class RandomUnits(Frozen):
    """Keep units drawn with the trial's seed."""

    kind: Literal["random"] = "random"


UnitChoice = Annotated[ByActivation | RandomUnits, Field(discriminator="kind"), Shorthand]


class WidthCut(Frozen):
    """Cut every layer down to these sizes; None leaves an axis as it is.

    `num_key_value_heads` cuts whole groups of heads, `num_attention_heads` query heads inside the
    groups that stay. With `head_residual` the last kept query heads absorb what sets them apart
    from the removed ones (P1 section 2.3). With `rescale_norms` the norms are scaled so that
    cutting channels that are always zero changes nothing; the papers leave them as they are.
    """

    intermediate_size: int | None = Field(default=None, gt=0)
    hidden_size: int | None = Field(default=None, gt=0)
    num_attention_heads: int | None = Field(default=None, gt=0)
    num_key_value_heads: int | None = Field(default=None, gt=0)
    choice: UnitChoice
    head_residual: bool = False
    rescale_norms: bool = False


class PruneConfig(Frozen):
    """Cut a model down, keeping its weights or drawing new ones at the pruned shape."""

    depth: DepthCut | None = None
    width: WidthCut | None = None
    initialise: Literal["inherited", "random"] = "inherited"


def _check_layer_place(value: Any) -> None:
    if not re.fullmatch(r"\d+|last(-\d+)?", str(value)):
        raise PydanticCustomError(
            "layer_place",
            "'{value}' is not a layer: count from the front (0, 1, …) or the end (last, last-2)",
            {"value": str(value)},
        )


def _keys_as_text(value: Any) -> Any:
    return {str(key): place for key, place in value.items()} if isinstance(value, dict) else value


class HiddenLoss(Frozen):
    """How far the student's hidden states are from the teacher's (P1 section 3, L_is).

    `states`: the embedding output, and of the mapped blocks their input, output or attention
    output, each normalised. Student states are raised to the teacher's width by a learned linear
    layer, trained with the student and thrown away. `mapping` pairs student layers with teacher
    layers; `proportional` pairs every student layer with the teacher's at its relative depth. With
    a `dynamic` weight, alpha = logit loss / hidden loss, without a gradient of its own and anew for
    each micro-batch of each worker: it depends on how the batch is shared out.
    """

    states: tuple[Literal["embedding", "input", "output", "attention"], ...] = Field(
        default=("output",), min_length=1
    )
    distance: Literal["cosine", "mse"] = "cosine"
    mapping: Annotated[
        Literal["proportional"] | dict[str, int | str], BeforeValidator(_keys_as_text)
    ] = {"last-2": "last-2"}
    weight: Annotated[float, Field(gt=0)] | Literal["dynamic"] = "dynamic"

    @model_validator(mode="after")
    def _places(self) -> HiddenLoss:
        if not isinstance(self.mapping, str):
            for student, teacher in self.mapping.items():
                _check_layer_place(student)
                _check_layer_place(teacher)
        return self


class DistillLoss(Frozen):
    """`logits_weight` * L_logits + `cross_entropy_weight` * cross-entropy + alpha * L_hidden.

    L_logits compares next-token distributions at a temperature: KL(teacher || student)
    (`forward_kl`), KL(student || teacher), the mean squared error or the cosine distance of the
    logits; with `top_k` on the teacher's k likeliest tokens alone. With `logits: none` and without
    hidden states the student is trained conventionally and no teacher is run.
    """

    logits: Literal["forward_kl", "reverse_kl", "mse", "cosine", "none"] = "forward_kl"
    temperature: float = Field(default=1.0, gt=0)
    logits_weight: float = Field(default=1.0, gt=0)
    top_k: int | None = Field(default=None, gt=0)
    cross_entropy_weight: float = Field(default=0.0, ge=0)
    hidden: HiddenLoss | None = None

    @property
    def needs_teacher(self) -> bool:
        """Whether anything is learned from a teacher."""
        return self.logits != "none" or self.hidden is not None

    @model_validator(mode="after")
    def _something_to_learn_from(self) -> DistillLoss:
        if not self.needs_teacher and self.cross_entropy_weight == 0:
            raise ValueError("logits: none needs a cross_entropy_weight above 0")
        if self.hidden and self.hidden.weight == "dynamic" and self.logits == "none":
            raise ValueError("a dynamic weight of hidden states is relative to a logit loss")
        return self

    @model_validator(mode="after")
    def _all_is_read(self) -> DistillLoss:
        """What nothing reads would make several trials of one, which look like no effect."""
        fields = type(self).model_fields
        unread = [
            name
            for name in ("temperature", "top_k", "logits_weight")
            if getattr(self, name) != fields[name].default
        ]
        if self.logits == "none" and unread:
            raise ValueError(
                f"logits: none compares no logits and has no {', '.join(unread)}: leave that out, "
                "or give it (an axis by `when`) where logits are compared"
            )
        return self


class LiveSignal(Frozen):
    """The teacher runs on every batch."""

    kind: Literal["live"] = "live"


class HiddenCache(Frozen):
    """The teacher's final hidden states (and inner ones that the loss needs), computed once: exact
    at every temperature and divergence."""

    kind: Literal["hidden_cache"] = "hidden_cache"


class SampledCache(Frozen):
    """Tokens drawn from the teacher's distribution at each position: an unbiased forward KL."""

    kind: Literal["sampled_cache"] = "sampled_cache"
    samples: int = Field(default=12, gt=0)


class TopKCache(Frozen):
    """The teacher's k likeliest tokens at each position and their probabilities: biased."""

    kind: Literal["topk_cache"] = "topk_cache"
    k: int = Field(default=12, gt=0)


Signal = Annotated[
    LiveSignal | HiddenCache | SampledCache | TopKCache, Field(discriminator="kind"), Shorthand
]


_STATE = r"embedding|(input|output|attention)\.\d+"


class CacheConfig(Frozen):
    """What the teacher (role `model`) says of the training blocks that a run of so many steps draws
    with its seed. `states` names its inner states that are kept beside the final ones ("output.7"),
    in any order: they are held sorted, so that equal sets make equal caches."""

    corpus: Corpus
    signal: Annotated[
        HiddenCache | SampledCache | TopKCache, Field(discriminator="kind"), Shorthand
    ]
    steps: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    states: tuple[Annotated[str, Field(pattern=rf"^({_STATE})$")], ...] = ()
    precision: Literal["fp32", "bf16"] = "fp32"

    @field_validator("states")
    @classmethod
    def _in_order(cls, states: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted(set(states)))

    @model_validator(mode="after")
    def _can_hold_states(self) -> CacheConfig:
        if self.states and not isinstance(self.signal, HiddenCache):
            raise ValueError(f"{self.signal.kind} holds no hidden states; hidden_cache does")
        return self


class CorrectConfig(Frozen):
    """Fine-tune a model (role `model`) on the corpus, as P2 corrects the teacher first."""

    corpus: Corpus
    training: Training


class DistillConfig(Frozen):
    """Train the student (role `model`) against its teacher (role `teacher`), whose signal is live
    or in the role `signals`."""

    corpus: Corpus
    training: Training
    loss: DistillLoss = DistillLoss()
    signal: Signal = LiveSignal()
    heldout_every: int | None = Field(default=None, gt=0)
    """Optimizer steps between two measurements of the loss on held-out text; None for none."""

    @model_validator(mode="after")
    def _whole_weights_to_measure(self) -> DistillConfig:
        if self.heldout_every is not None and self.training.engine.zero_stage == 3:
            raise ValueError("heldout_every needs whole weights, and zero_stage 3 shards them")
        return self


class EvaluateConfig(Frozen):
    """Held-out LM loss, KL to the teacher where the role is filled, and downstream tasks."""

    corpus: Corpus
    tasks: tuple[Task, ...] = ()
    precision: Literal["fp32", "bf16"] = "fp32"


class RequestLengths(Frozen):
    """Tokens that a request has, and new ones that it is answered with."""

    input: int = Field(gt=0)
    output: int = Field(gt=0)


@dataclass(frozen=True)
class Load:
    """Requests of one kind that are answered together: `batch` by the model, `teacher_batch` by its
    teacher."""

    input: int
    output: int
    batch: int
    teacher_batch: int

    @property
    def name(self) -> str:
        """As metrics have it: `in64_out32_b4`, and `in64_out32_b4t2` where the batches differ."""
        apart = f"t{self.teacher_batch}" if self.teacher_batch != self.batch else ""
        return f"in{self.input}_out{self.output}_b{self.batch}{apart}"


BatchSizes = tuple[Annotated[int, Field(gt=0)], ...]

BY_LOAD = (
    "throughput",
    "throughput_low",
    "throughput_high",
    "first_token_ratio",
    "peak_memory_ratio",
    "requests_per_s",
    "tokens_per_s",
    "first_token_s",
    "peak_memory_mb",
    "teacher_requests_per_s",
    "teacher_tokens_per_s",
    "teacher_first_token_s",
    "teacher_peak_memory_mb",
)
"""What `BenchmarkConfig` measures of every load; `trainers.benchmark` says what each is."""
WITH_MEAN = ("throughput", "first_token_ratio", "peak_memory_ratio")
"""Those of which the geometric mean over all loads is given, too."""


class BenchmarkConfig(Frozen):
    """How fast a model (role `model`) generates beside its teacher (role `teacher`): at all
    `lengths`, each with all `batch_sizes`, in turns over so many measured `rounds`, after `warmup`
    rounds that are not.

    `teacher_batch_sizes` has another one for the teacher beside each of `batch_sizes`, as where the
    smaller model makes room for more requests. `fp8` is what vLLM makes of bf16 weights while it
    loads them.
    """

    backend: Literal["transformers", "vllm"] = "transformers"
    precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    lengths: tuple[RequestLengths, ...]
    batch_sizes: BatchSizes
    teacher_batch_sizes: BatchSizes | None = None
    warmup: int = Field(default=1, ge=0)
    rounds: int = Field(default=6, ge=2)
    """At least two, so that each of the models goes first in one."""

    @property
    def loads(self) -> tuple[Load, ...]:
        """Every length with every batch size."""
        return tuple(
            Load(each.input, each.output, *pair) for each in self.lengths for pair in self.batches
        )

    @property
    def batches(self) -> tuple[tuple[int, int], ...]:
        """Batch sizes of the model, each with the teacher's."""
        return tuple(
            zip(self.batch_sizes, self.teacher_batch_sizes or self.batch_sizes, strict=True)
        )

    @property
    def of_teacher(self) -> BenchmarkConfig:
        """The same for the teacher beside a copy of itself: with its own batch sizes."""
        alone = self.model_copy(update={"teacher_batch_sizes": None})
        return alone.with_batches([(other, other) for _, other in self.batches])

    def with_batches(self, batches: Iterable[tuple[int, int]]) -> BenchmarkConfig:
        """The same with other `batches`, each once."""
        each = list(dict.fromkeys(batches))
        sizes: dict[str, tuple[int, ...]] = {"batch_sizes": tuple(own for own, _ in each)}
        if self.teacher_batch_sizes is not None:
            sizes["teacher_batch_sizes"] = tuple(other for _, other in each)
        return self.model_copy(update=sizes)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of all that is measured."""
        names = [load.name for load in self.loads]
        return tuple(
            f"{metric}.{name}"
            for metric in BY_LOAD
            for name in (*names, *(["mean"] if metric in WITH_MEAN else []))
        )

    @model_validator(mode="after")
    def _possible(self) -> BenchmarkConfig:
        if self.precision == "fp8" and self.backend != "vllm":
            raise ValueError("precision fp8 needs backend: vllm, on a GPU; elsewhere fp32 or bf16")
        if not self.lengths or not self.batch_sizes:
            raise ValueError("needs at least one of lengths and one of batch_sizes")
        others = self.teacher_batch_sizes
        if others is not None and len(others) != len(self.batch_sizes):
            raise ValueError(
                f"teacher_batch_sizes has {len(others)} sizes for the {len(self.batch_sizes)} of "
                "batch_sizes; it needs one beside each"
            )
        names = [load.name for load in self.loads]
        if len(set(names)) < len(names):
            raise ValueError("lengths or batch_sizes lists the same twice")
        return self
