"""A model's parameters and FLOPs from its Hugging Face config alone. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers import language
from trainers.config import (
    Corpus,
    FolderModel,
    GeneratedCorpus,
    GgufModel,
    HubModel,
    LlamaShape,
    ModelSource,
    ScratchModel,
)
from trainers.families import Family, family_of, setting


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
    def layer_parameters(self) -> int:
        """Parameters of one layer: attention, MLP and norms."""
        queries = self.num_attention_heads * self.head_dim
        key_values = self.num_key_value_heads * self.head_dim
        attention = 2 * self.hidden_size * queries + 2 * self.hidden_size * key_values
        if setting(self.family.attention_bias, self.config):
            attention += queries + 2 * key_values
        if setting(self.family.output_bias, self.config):
            attention += self.hidden_size
        if self.family.query_key_norm:
            attention += 2 * self.head_dim
        return attention + self._mlp_parameters + 2 * self.hidden_size

    @property
    def _mlp_parameters(self) -> int:
        ups = 2 if self.family.gated_mlp else 1
        weights = (ups + 1) * self.hidden_size * self.intermediate_size
        if setting(self.family.mlp_bias, self.config):
            weights += ups * self.intermediate_size + self.hidden_size
        return weights

    @property
    def parameters_non_embedding(self) -> int:
        """All but the input and output embeddings."""
        return self.num_hidden_layers * self.layer_parameters + self.hidden_size

    @property
    def parameters(self) -> int:
        """All trainable parameters; tied embeddings count once."""
        tables = 1 if self.tie_word_embeddings else 2
        return self.parameters_non_embedding + tables * self.vocab_size * self.hidden_size

    def forward_flops(self, tokens: int, context: int) -> float:
        """FLOPs of a forward pass over `tokens` in sequences of `context`: two a weight and token,
        the output head included, and causal attention at its mean length context / 2."""
        weights = self.parameters_non_embedding + self.vocab_size * self.hidden_size
        queries = self.num_attention_heads * self.head_dim
        attention = 2 * context * queries * self.num_hidden_layers
        return float(tokens) * (2 * weights + attention)

    def training_flops(self, tokens: int, context: int) -> float:
        """FLOPs of forward and backward: three times the forward pass."""
        return 3 * self.forward_flops(tokens, context)

    def with_layers(self, num_hidden_layers: int) -> Shape:
        """The same model with another number of layers."""
        return Shape(**{**self.__dict__, "num_hidden_layers": num_hidden_layers})


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The shape that a Hugging Face config describes. Raises `ValueError` where it cannot."""
    family = family_of(config)
    heads = _size(config, "num_attention_heads")
    hidden = _size(config, "hidden_size")
    return Shape(
        family=family,
        config=dict(config),
        vocab_size=_size(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_size(config, "intermediate_size"),
        num_hidden_layers=_size(config, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
    )


def llama_config(shape: LlamaShape, vocab_size: int) -> dict[str, Any]:
    """The Hugging Face config of a random-weight Llama."""
    sizes = shape.model_dump(exclude={"scale_residual_init"})
    return {"model_type": "llama", "vocab_size": vocab_size, **sizes}


def _size(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value <= 0:
        raise ValueError(f"the model's config has no usable {key}: {value!r}")
    return value


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
            return llama_config(shape, len(language.WORDS))
        case FolderModel(path=path):
            config: dict[str, Any] = json.loads((path / "config.json").read_text())
            return config
        case GgufModel():
            return source.shape or gguf_config(source.file)
        case HubModel():
            return source.shape or _hub_config(source)


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
