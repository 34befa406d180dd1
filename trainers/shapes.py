"""A model's parameters and FLOPs from its Hugging Face config alone. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from trainers.config import (
    BenchmarkConfig,
    Corpus,
    FolderModel,
    GeneratedCorpus,
    GgufModel,
    HiddenCache,
    HubModel,
    LlamaShape,
    ModelSource,
    PruneConfig,
    SampledCache,
    ScratchModel,
    TopKCache,
)
from trainers.families import Family, family_of

_GENERATION_BYTES = {"fp32": (4, 4), "bf16": (2, 2), "fp8": (1, 2)}
"""Of a number in a layer's weights, and of any other."""


@dataclass(frozen=True)
class Sizes:
    """What pruning cuts, with the names of Hugging Face's configs."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int


@dataclass(frozen=True)
class Shape:
    """The sizes that decide how many parameters a decoder has."""

    family: Family
    config: Mapping[str, Any]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    tie_word_embeddings: bool

    @property
    def heads_per_group(self) -> int:
        """Query heads that share a key-value head; 1 under multi-head attention."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer: attention, MLP and norms."""
        queries = self.num_attention_heads * self.head_dim
        key_values = self.num_key_value_heads * self.head_dim
        attention = 2 * self.hidden_size * queries + 2 * self.hidden_size * key_values
        if self.family.flag(self.family.attention_bias, self.config):
            attention += queries + 2 * key_values
        if self.family.flag(self.family.output_bias, self.config):
            attention += self.hidden_size
        attention += len(self.family.head_norms) * self.head_dim
        return attention + self._mlp_parameters + len(self.family.norms) * self._norm_parameters

    @property
    def _norm_parameters(self) -> int:
        return self.hidden_size * (2 if self.family.norm_kind.startswith("layer") else 1)

    @property
    def _mlp_parameters(self) -> int:
        ups = 2 if self.family.gated_mlp else 1
        weights = (ups + 1) * self.hidden_size * self.intermediate_size
        if self.family.flag(self.family.mlp_bias, self.config):
            weights += ups * self.intermediate_size + self.hidden_size
        return weights

    @property
    def parameters_non_embedding(self) -> int:
        """All but the input and output embeddings."""
        return self.num_hidden_layers * self.layer_parameters + self._norm_parameters

    @property
    def parameters(self) -> int:
        """All trainable parameters; tied embeddings count once."""
        tables = 1 if self.tie_word_embeddings else 2
        return self.parameters_non_embedding + tables * self.vocab_size * self.hidden_size

    def forward_flops(self, tokens: int, context: int, head: bool = True) -> float:
        """FLOPs of a forward pass over `tokens` in sequences of `context`: two a weight and token,
        the output `head` included unless it is not run, and causal attention at its mean length
        context / 2."""
        weights = self.parameters_non_embedding + head * self.vocab_size * self.hidden_size
        queries = self.num_attention_heads * self.head_dim
        attention = 2 * context * queries * self.num_hidden_layers
        return float(tokens) * (2 * weights + attention)

    def training_flops(self, tokens: int, context: int) -> float:
        """FLOPs of forward and backward: three times the forward pass."""
        return 3 * self.forward_flops(tokens, context)

    def generation_flops(self, read: int, made: int) -> float:
        """FLOPs of one request that reads some tokens and is answered with `made` new ones, with a
        key-value cache: every token but the last passes the layers once, and the output head runs
        for what is made alone."""
        passed = read + made - 1
        head = 2.0 * made * self.vocab_size * self.hidden_size
        return self.forward_flops(passed, passed, head=False) + head

    def generation_bytes(self, precision: str, tokens: int) -> float:
        """Bytes of the weights and of the keys and values of so many tokens, while the model
        generates. vLLM's fp8 is of the layers alone: embeddings, keys and values stay in bf16."""
        layers, other = _GENERATION_BYTES[precision]
        tables = (self.parameters - self.parameters_non_embedding) * other
        kept = 2 * self.num_key_value_heads * self.head_dim * self.num_hidden_layers * other
        return float(self.parameters_non_embedding * layers + tables + kept * tokens)

    def kept_by_layer(self, number: int) -> int:
        """Bytes that one layer keeps for its backward pass, a token; `number` is the size of a
        number in bytes, 4 or 2.

        Korthikanti et al. 2022, section 4.1, for transformers' layers: no dropout, norms that
        compute in fp32, attention that keeps its output and a sum for each head instead of the
        weights between all tokens (PyTorch's `scaled_dot_product_attention`).
        """
        queries = self.num_attention_heads * self.head_dim
        key_values = self.num_key_value_heads * self.head_dim
        attention = number * 2 * (queries + key_values) + 4 * self.num_attention_heads
        if self.family.head_norms:
            attention += (4 + number) * (queries + key_values)
        mlp = number * self.intermediate_size * (4 if self.family.gated_mlp else 2)
        return attention + mlp + len(self.family.norms) * self._kept_by_norm(number)

    def _kept_by_norm(self, number: int) -> int:
        """With its output, which what comes next keeps."""
        if self.family.norm_kind.startswith("layer"):
            return 2 * number * self.hidden_size
        scaled = 4 if self.family.norm_kind == "rms_plus_one" else number
        return (4 + scaled + number) * self.hidden_size

    def kept_bytes(self, number: int, checkpointed: bool = False) -> int:
        """Bytes that the model keeps for its backward pass, a token: all that its layers keep, or
        their inputs alone where the rest is computed again; the final norm; and the final states
        as the loss reads them, with their gradient."""
        layer = number * self.hidden_size if checkpointed else self.kept_by_layer(number)
        last = self._kept_by_norm(number) + 2 * number * self.hidden_size
        return self.num_hidden_layers * layer + last

    def passed_by_layer(self, number: int) -> int:
        """Bytes that come and go, a token, while a layer is computed or passed back: what its MLP
        holds at once, and the stream around it. Measured on Llama and Nemotron."""
        return number * (3 * self.intermediate_size + 5 * self.hidden_size)

    @property
    def sizes(self) -> Sizes:
        """The sizes that pruning may change."""
        return Sizes(
            self.num_hidden_layers,
            self.hidden_size,
            self.intermediate_size,
            self.num_attention_heads,
            self.num_key_value_heads,
        )

    def resized(self, sizes: Sizes) -> Shape:
        """The same model cut to these sizes; heads keep their width."""
        return replace(self, **asdict(sizes))


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The shape that a Hugging Face config describes. Raises `ValueError` where it cannot."""
    family = family_of(config)

    def size(key: str, usual: int | None = None) -> int:
        value = family.setting(key, config)
        value = usual if value is None else value
        if type(value) is not int or value <= 0:
            raise ValueError(f"the model's config has no usable {key}: {value!r}")
        return value

    heads, hidden = size("num_attention_heads"), size("hidden_size")
    return Shape(
        family=family,
        config=dict(config),
        vocab_size=size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=size("intermediate_size"),
        num_hidden_layers=size("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", hidden // heads),
        tie_word_embeddings=family.flag("tie_word_embeddings", config),
    )


def llama_config(shape: LlamaShape, vocab_size: int) -> dict[str, Any]:
    """The Hugging Face config of a random-weight Llama."""
    sizes = shape.model_dump(exclude={"scale_residual_init"})
    return {"model_type": "llama", "vocab_size": vocab_size, **sizes}


# --- what pruning may make of a model ---------------------------------------------------------


def pruned_sizes(shape: Shape, config: PruneConfig) -> Sizes:
    """The sizes that pruning aims at; an axis that is not named stays as it is.

    Whole groups of heads take their query heads with them, so where only `num_key_value_heads` is
    named the query heads of a group stay. Under multi-head attention a query head is a group of
    its own, so where only `num_attention_heads` is named the groups follow.
    """
    sizes, width = shape.sizes, config.width
    if config.depth is not None:
        sizes = replace(sizes, num_hidden_layers=config.depth.num_hidden_layers)
    if width is None:
        return sizes
    heads, groups = width.num_attention_heads, width.num_key_value_heads
    if groups is None:
        multi_head = shape.num_attention_heads == shape.num_key_value_heads
        groups = heads if heads is not None and multi_head else shape.num_key_value_heads
    return replace(
        sizes,
        hidden_size=width.hidden_size or shape.hidden_size,
        intermediate_size=width.intermediate_size or shape.intermediate_size,
        num_attention_heads=heads or groups * shape.heads_per_group,
        num_key_value_heads=groups,
    )


def problems_with(shape: Shape, target: Sizes) -> list[tuple[str, str]]:
    """What forbids cutting a model of this shape to these sizes: (setting, what is wrong and what
    is allowed). Empty where nothing does."""
    source = asdict(shape.sizes)
    found = [
        (name, f"{size} is not between 1 and the model's {source[name]}")
        for name, size in asdict(target).items()
        if not 1 <= size <= source[name]
    ]
    return found or _problems_with_heads(shape, target) or _problems_with_width(shape, target)


def _problems_with_heads(shape: Shape, target: Sizes) -> list[tuple[str, str]]:
    heads, groups, most = (
        target.num_attention_heads,
        target.num_key_value_heads,
        shape.heads_per_group,
    )
    if heads % groups or heads // groups > most:
        allowed = ", ".join(str(groups * number) for number in range(1, most + 1))
        return [
            (
                "num_attention_heads",
                f"{heads} query heads do not fit {groups} key-value heads, each of which keeps the "
                f"same number of its {most}; allowed are {allowed}",
            )
        ]
    return []


def _problems_with_width(shape: Shape, target: Sizes) -> list[tuple[str, str]]:
    hidden, heads = target.hidden_size, target.num_attention_heads
    if not shape.family.free_head_dim and hidden != heads * shape.head_dim:
        return [
            (
                "hidden_size",
                f"{hidden} is not num_attention_heads * head_dim, which {shape.family.model_type} "
                f"requires; with {heads} heads of {shape.head_dim} allowed is "
                f"{heads * shape.head_dim}",
            )
        ]
    if shape.family.hidden_multiple_of_heads and hidden % heads:
        return [
            (
                "hidden_size",
                f"{hidden} is not a multiple of num_attention_heads, which "
                f"{shape.family.model_type} requires; the nearest below is "
                f"{hidden - hidden % heads}",
            )
        ]
    return []


# --- what a benchmark of generation takes ----------------------------------------------------


def benchmark_cost(config: BenchmarkConfig, model: Shape, teacher: Shape) -> tuple[int, float]:
    """Tokens that both models read and make in all rounds, and the FLOPs of that. In each round a
    model answers once with one token, for the time to the first, and once with all."""
    tokens, flops = 0, 0.0
    for load in config.loads:
        for shape, batch in ((model, load.batch), (teacher, load.teacher_batch)):
            for made in (1, load.output):
                tokens += batch * (load.input + made)
                flops += batch * shape.generation_flops(load.input, made)
    rounds = config.warmup + config.rounds
    return rounds * tokens, rounds * flops


# --- the config of a model that has not been loaded -------------------------------------------


def source_config(source: ModelSource, corpus: Corpus) -> dict[str, Any]:
    """The Hugging Face config of the source model, without loading or downloading its weights.

    Raises `ValueError` where it cannot be known: a hub model without `shape` that is neither in
    the local cache nor to be reached.
    """
    match source:
        case ScratchModel(shape=shape):
            if not isinstance(corpus, GeneratedCorpus):
                raise ValueError(
                    "a model from scratch takes its vocabulary from the corpus, which must be of "
                    f"kind generated; this one is {corpus.kind}"
                )
            from trainers import language  # it needs numpy, which a plan for others does not

            return llama_config(shape, len(language.WORDS))
        case FolderModel(path=path):
            config: dict[str, Any] = json.loads((path / "config.json").read_text())
            return config
        case GgufModel():
            return source.shape or gguf_config(source.file)
        case HubModel():
            return source.shape or _hub_config(source)


def vocabulary(folder: Path) -> dict[str, int] | None:
    """Token -> number in a checkpoint's tokenizer.json; None where there is none to be read."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    tokens = json.loads(path.read_text()).get("model", {}).get("vocab")
    return tokens if isinstance(tokens, dict) else None


def gguf_config(file: Path) -> dict[str, Any]:
    """The sizes that a GGUF file's header states, as Hugging Face names them."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ValueError("reading a GGUF file needs the package gguf: make smollm2") from error
    reader = GGUFReader(file)

    def read(key: str) -> Any:
        field = reader.get_field(key)
        return None if field is None else field.contents()

    architecture = read("general.architecture")
    sizes = {
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "head_dim": "attention.key_length",
        "vocab_size": "vocab_size",
    }
    found = {name: read(f"{architecture}.{key}") for name, key in sizes.items()}
    names = {tensor.name for tensor in reader.tensors}
    return {key: value for key, value in found.items() if value is not None} | {
        "model_type": architecture,
        "tie_word_embeddings": "output.weight" not in names,
    }


def _hub_config(source: HubModel) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(source.repository, "config.json", revision=source.revision)
    except Exception as error:  # the hub's client raises many kinds; all mean the same here
        raise ValueError(
            f"cannot read the config of {source.repository} from the hub "
            f"({type(error).__name__}); give its config.json under source.shape, or name a "
            "local folder"
        ) from error
    config: dict[str, Any] = json.loads(Path(path).read_text())
    return config


# --- what a cache of the teacher's outputs takes on disk ---------------------------------------

CHUNK_TOKENS = 4096
"""A cache is computed, written and checked in chunks of whole blocks of about so many tokens."""
NPY_HEADER_BYTES = 128
_ITEM_BYTES = {"uint16": 2, "int32": 4, "uint32": 4, "float32": 4, "int64": 8}


@dataclass(frozen=True)
class ArraySpec:
    """An array on disk. bf16 numbers stand as their bits, as numpy has no such type."""

    shape: tuple[int, ...]
    dtype: str
    by_block: bool = True
    """Whether its rows are blocks, written chunk by chunk; the others are written whole."""

    @property
    def file_bytes(self) -> int:
        """The size of its .npy file."""
        return NPY_HEADER_BYTES + math.prod(self.shape) * _ITEM_BYTES[self.dtype]


def blocks_a_chunk(block_length: int) -> int:
    """How many blocks a cache's chunk has."""
    return max(1, CHUNK_TOKENS // block_length)


def cache_arrays(
    shape: Shape,
    signal: HiddenCache | SampledCache | TopKCache,
    blocks: int,
    block_length: int,
    precision: str,
    states: Sequence[str] = (),
) -> dict[str, ArraySpec]:
    """The arrays that a cache of a teacher of this shape is made of, by name.

    Positions are the block_length - 1 that predict a token; inner states are kept at all of them,
    and at the last one too.
    """
    number = "uint16" if precision == "bf16" else "float32"
    word = "uint16" if shape.vocab_size <= 1 << 16 else "int32"
    width, places = shape.hidden_size, (blocks, block_length - 1)
    arrays = {"blocks": ArraySpec((blocks,), "int64", by_block=False)}
    match signal:
        case HiddenCache():
            arrays["head"] = ArraySpec((shape.vocab_size, width), number, by_block=False)
            arrays["hidden"] = ArraySpec((*places, width), number)
            for state in states:
                arrays[state] = ArraySpec((blocks, block_length, width), number)
        case SampledCache(samples=samples):
            arrays["ids"] = ArraySpec((*places, samples), word)
            arrays["entropy"] = ArraySpec(places, "float32")
        case TopKCache(k=k):
            arrays["ids"] = ArraySpec((*places, k), word)
            arrays["probabilities"] = ArraySpec((*places, k), "float32")
            arrays["entropy"] = ArraySpec(places, "float32")
    chunks = math.ceil(blocks / blocks_a_chunk(block_length))
    by_block = sum(array.by_block for array in arrays.values())
    return arrays | {"checksums": ArraySpec((chunks, by_block), "uint32", by_block=False)}


def cache_bytes(
    shape: Shape,
    signal: HiddenCache | SampledCache | TopKCache,
    blocks: int,
    block_length: int,
    precision: str,
    states: int,
) -> int:
    """Bytes on disk of a cache of so many blocks and inner states: all of its arrays, without its
    description and the teacher's tokenizer."""
    names = [f"output.{number}" for number in range(states)]
    arrays = cache_arrays(shape, signal, blocks, block_length, precision, names)
    return sum(array.file_bytes for array in arrays.values())
