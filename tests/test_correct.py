"""Stage `correct`: a teacher is fine-tuned as any model is and stays a plain checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainers import corpus, correct
from trainers.config import CorrectConfig, GeneratedCorpus, Training
from trainers.contract import Interrupted, StageError, read_rows
from trainers.engine import learning_rate_factor
from trainers.shapes import shape_of

if TYPE_CHECKING:
    from conftest import MakeContext

CORPUS = GeneratedCorpus(block_length=16, training_blocks=12)
TRAINING = Training(steps=6, batch_size=4, learning_rate=2e-3, warmup_steps=2, gradient_clip=0)
CONFIG = CorrectConfig(corpus=CORPUS, training=TRAINING)


class StopAt4:
    def report(self, done: int, total: int, values: Any) -> None:
        if done == 4:
            raise Interrupted


def losses(out: Path) -> list[float]:
    return [row["value"] for row in read_rows(out / "curve.jsonl") if row["name"] == "loss"]


def plainly_trained(artifact: Path, seed: int) -> tuple[list[float], torch.nn.Module]:
    """The same as a user of transformers would write it down."""
    model = AutoModelForCausalLM.from_pretrained(artifact / "model").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1, betas=(0.9, 0.95), weight_decay=0)
    blocks = corpus.blocks(CORPUS, artifact / "model", "training")
    found = []
    for step in range(TRAINING.steps):
        rate = TRAINING.learning_rate * learning_rate_factor(step, TRAINING)
        optimizer.param_groups[0]["lr"] = rate
        ids_BL = corpus.batch(blocks, step, TRAINING.batch_size, seed)
        logits = model(ids_BL).logits[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits, ids_BL[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found, model


def test_a_teacher_is_trained_as_a_plain_loop_trains_it(
    artifact: Path, make_context: MakeContext
) -> None:
    context = make_context(CONFIG, model=artifact, seed=3)
    result = correct.run(context)
    expected, model = plainly_trained(artifact, 3)
    assert losses(context.out) == pytest.approx(expected, abs=1e-4)
    assert result.metrics == {"loss": pytest.approx(expected[-1], abs=1e-4)}
    corrected = AutoModelForCausalLM.from_pretrained(context.out / "model")
    for found, wanted in zip(corrected.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert result.tokens == 6 * 4 * 16
    shape = shape_of(corrected.config.to_dict())
    assert result.flops == shape.training_flops(result.tokens, 16)


def test_the_corrected_teacher_keeps_its_tokenizer(
    artifact: Path, make_context: MakeContext
) -> None:
    context = make_context(CONFIG, model=artifact)
    correct.run(context)
    before, after = (
        AutoTokenizer.from_pretrained(folder / "model") for folder in (artifact, context.out)
    )
    assert after.get_vocab() == before.get_vocab()


def test_an_interrupted_correction_goes_on_exactly(
    artifact: Path, make_context: MakeContext
) -> None:
    whole = make_context(CONFIG, model=artifact, out="whole")
    correct.run(whole)
    with pytest.raises(Interrupted):
        correct.run(make_context(CONFIG, model=artifact, reporter=StopAt4()))
    again = make_context(CONFIG, model=artifact)
    correct.run(again)
    assert losses(again.out) == losses(whole.out)
    file = "model/model.safetensors"
    assert (again.out / file).read_bytes() == (whole.out / file).read_bytes()


def test_a_correction_needs_a_model(make_context: MakeContext) -> None:
    with pytest.raises(StageError, match="needs an input in the role model"):
        correct.run(make_context(CONFIG))
