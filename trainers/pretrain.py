"""Stage `pretrain`: a random-weight Llama learns a corpus."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainers import corpus, engine, shell, workers
from trainers.checkpoints import (
    DTYPES,
    final_hidden,
    new_model,
    output_head,
    save_model,
    softcapped,
)
from trainers.config import LlamaShape, PretrainConfig
from trainers.contract import StageContext, StageResult
from trainers.losses import chunked, cross_entropy
from trainers.shapes import llama_config, shape_of


class LanguageModelling(nn.Module):
    """Mean next-token cross-entropy of a model on its own input: conventional training."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids_BL: Tensor, blocks_B: Tensor) -> Tensor:
        """Mean loss in nats a predicted token, whichever blocks of the corpus the batch is."""
        hidden = final_hidden(self.model, input_ids_BL)[:, :-1].flatten(0, 1)
        labels = input_ids_BL[:, 1:].flatten()
        total = chunked(
            hidden,
            output_head(self.model),
            lambda logits, place: cross_entropy(softcapped(logits, self.model), labels[place]),
        )
        return total / labels.numel()


def _initialised(shape: LlamaShape, settings: dict[str, Any], seed: int) -> PreTrainedModel:
    model = new_model(settings, seed)
    if shape.scale_residual_init:
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.data /= math.sqrt(2 * shape.num_hidden_layers)
    return model


@workers.metered
def run(context: StageContext[PretrainConfig]) -> StageResult:
    """Train from random weights and leave a plain checkpoint with its tokenizer."""
    config = context.config
    tokenizer = corpus.tokenizer_for(config.corpus)
    settings = llama_config(config.shape, len(tokenizer)) | {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    folder = context.out / "model"
    if workers.is_first():
        tokenizer.save_pretrained(folder)
    workers.wait_for_all()
    blocks = corpus.blocks(config.corpus, folder, "training")
    model = _initialised(config.shape, settings, context.seed)
    model = model.to(DTYPES[config.training.precision]).train()
    trained = engine.train(
        LanguageModelling(model),
        blocks,
        config.training,
        context.seed,
        context.out,
        context.reporter,
        context.runtime,
    )
    if workers.is_first():
        save_model(model.to(torch.float32), tokenizer, folder)
        engine.forget(context.out)
    flops = shape_of(settings).training_flops(trained.tokens, config.corpus.block_length)
    return StageResult({"loss": trained.final_loss}, trained.tokens, flops)


if __name__ == "__main__":
    shell.main(PretrainConfig, run)
