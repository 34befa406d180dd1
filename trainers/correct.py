"""Stage `correct`: a teacher (role `model`) is fine-tuned on the corpus that it will teach.

A teacher that was trained on other text guides a student less well on this one, so P2 corrects it
first, by conventional training.
"""

from __future__ import annotations

from trainers import corpus, engine, shell, workers
from trainers.checkpoints import load_model, load_tokenizer, read_config, save_model
from trainers.config import CorrectConfig
from trainers.contract import StageContext, StageResult
from trainers.pretrain import LanguageModelling
from trainers.shapes import shape_of


@workers.metered
def run(context: StageContext[CorrectConfig]) -> StageResult:
    """Train on next-token cross-entropy and leave a plain checkpoint with its tokenizer."""
    config, folder = context.config, context.model("model")
    model = load_model(folder, config.training.precision).train()
    trained = engine.train(
        LanguageModelling(model),
        corpus.blocks(config.corpus, folder, "training"),
        config.training,
        context.seed,
        context.out,
        context.reporter,
        context.runtime,
    )
    if workers.is_first():
        save_model(model, load_tokenizer(folder), context.out / "model")
        engine.forget(context.out)
    shape = shape_of(read_config(folder))
    flops = shape.training_flops(trained.tokens, config.corpus.block_length)
    return StageResult({"loss": trained.final_loss}, trained.tokens, flops)


if __name__ == "__main__":
    shell.main(CorrectConfig, run)
