"""Load and save Hugging Face checkpoints, from the hub, a folder or a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from trainers.config import FolderModel, GgufModel, HubModel
from trainers.families import family_of

transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_model(folder: Path, precision: str = "fp32") -> PreTrainedModel:
    """The causal language model in `folder`, in evaluation mode. Never asks the network, and never
    runs code that comes with a checkpoint."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=DTYPES[precision], local_files_only=True, trust_remote_code=False
    )
    return model.eval()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`. Never asks the network."""
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def new_model(config: dict[str, Any], seed: int) -> PreTrainedModel:
    """A random-weight model of a Hugging Face config."""
    torch.manual_seed(seed)
    settings = dict(config)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(settings.pop("model_type"), **settings)
    )


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A plain checkpoint that loads without any code of ours."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def read_config(folder: Path) -> dict[str, Any]:
    """The checkpoint's config.json."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def count_parameters(model: nn.Module) -> int:
    """Parameters of the module; shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def final_hidden(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Hidden states after the last norm, (batch, sequence, hidden): what the output head reads."""
    hidden: torch.Tensor = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    return hidden


def output_head(model: PreTrainedModel) -> torch.Tensor:
    """The output head's weight, (vocabulary, hidden)."""
    weight: torch.Tensor = model.get_output_embeddings().weight
    return weight


def softcapped(logits: torch.Tensor, model: PreTrainedModel) -> torch.Tensor:
    """The output head's logits as the model's loss sees them: c * tanh(logits / c) where the model
    caps them (Gemma 2), else as they are."""
    return capped(logits, softcap_of(model))


def softcap_of(model: PreTrainedModel) -> float | None:
    """c of the model's soft cap on logits; None where it has none."""
    key = family_of({"model_type": model.config.model_type}).logit_softcap
    cap: float | None = getattr(model.config, key, None) if key else None
    return cap


def capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """c * tanh(logits / c), or the logits as they are."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def fetch_hub(source: HubModel) -> Path:
    """Download a hub model at its revision and give the local snapshot's folder."""
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt"]
    return Path(
        snapshot_download(source.repository, revision=source.revision, allow_patterns=patterns)
    )


def link_folder(source: Path, folder: Path) -> None:
    """Make `folder` a checkpoint of links to the files of `source`: no copy of the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.resolve().iterdir()):
        link = folder / file.name
        if file.is_file() and not link.exists():
            link.symlink_to(file)


def convert_gguf(source: GgufModel, folder: Path) -> None:
    """Dequantise a GGUF file into a plain bf16 checkpoint.

    transformers refuses to save a model that it read from a GGUF file, so the weights go into a
    new model made from the config without its quantisation entry.
    """
    place, name = str(source.file.parent), source.file.name
    loaded = AutoModelForCausalLM.from_pretrained(
        place, gguf_file=name, dtype=torch.bfloat16, trust_remote_code=False
    )
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=name, trust_remote_code=False)
    save_model(plain, tokenizer, folder)


def acquire(source: HubModel | FolderModel | GgufModel, folder: Path) -> None:
    """Put the model that `source` names into `folder` as a plain checkpoint."""
    match source:
        case HubModel():
            link_folder(fetch_hub(source), folder)
        case FolderModel():
            link_folder(source.path, folder)
        case GgufModel():
            convert_gguf(source, folder)
