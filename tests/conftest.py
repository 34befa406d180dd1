"""A tiny random model and what stages are called with. Imports torch only where a test asks for it.

`artifact` holds a 4-layer Llama over the generated language's words, as a stage would leave it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pydantic import BaseModel
    from transformers import PreTrainedModel

    from trainers.contract import StageContext

# A test that would need the network fails at once instead.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

TINY_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    # Far from transformers' 0.02, with which all logits of a model this small are nearly equal.
    "initializer_range": 0.25,
}

SaveArtifact = Callable[..., Path]
MakeContext = Callable[..., "StageContext[Any]"]


@pytest.fixture(scope="session")
def save_artifact(tmp_path_factory: pytest.TempPathFactory) -> SaveArtifact:
    """Saves a model and the generated language's tokenizer as the artifact of a stage."""
    from trainers import language

    def save(model: PreTrainedModel, **how: Any) -> Path:
        folder = tmp_path_factory.mktemp("artifact")
        model.save_pretrained(folder / "model", **how)
        language.tokenizer().save_pretrained(folder / "model")
        return folder

    return save


@pytest.fixture(scope="session")
def tiny_config() -> dict[str, Any]:
    """The Hugging Face config of the tiny model."""
    from trainers import language

    return {**TINY_LLAMA, "vocab_size": len(language.WORDS), "eos_token_id": 0, "pad_token_id": 0}


@pytest.fixture(scope="session")
def artifact(tiny_config: dict[str, Any], save_artifact: SaveArtifact) -> Path:
    """The artifact folder of the tiny model; its checkpoint is in `model`."""
    import torch

    from trainers import checkpoints

    torch.set_num_threads(1)
    return save_artifact(checkpoints.new_model(tiny_config, seed=0))


@pytest.fixture
def model(artifact: Path) -> PreTrainedModel:
    """The tiny model, loaded anew for each test."""
    from trainers import checkpoints

    return checkpoints.load_model(artifact / "model")


@pytest.fixture
def make_context(tmp_path: Path) -> MakeContext:
    """Builds what a stage gets: `make_context(config, model=artifact, seed=1, out="again")`."""
    from trainers.contract import Runtime, Silent, StageContext

    def make(
        config: BaseModel,
        *,
        out: str = "out",
        seed: int = 0,
        reporter: Any = None,
        checkpoint_every_s: float = 1e9,
        **inputs: Path,
    ) -> StageContext[Any]:
        folder = tmp_path / out
        folder.mkdir(exist_ok=True)
        runtime = Runtime(checkpoint_every_s=checkpoint_every_s)
        return StageContext(config, inputs, folder, seed, reporter or Silent(), runtime)

    return make
