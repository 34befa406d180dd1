"""Stage `distill`: the pruned student (role `model`) learns from its teacher (role `teacher`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainers import corpus, engine, shell
from trainers.checkpoints import (
    final_hidden,
    load_model,
    load_tokenizer,
    output_head,
    read_config,
    save_model,
    softcapped,
)
from trainers.config import DistillConfig, DistillLoss
from trainers.contract import StageContext, StageError, StageResult
from trainers.losses import chunked, cross_entropy, forward_kl
from trainers.shapes import shape_of
from trainers.teacher import LiveTeacher, TeacherSignal


class Distillation(nn.Module):
    """Mean distillation loss of a student; the teacher is no part of the module's parameters.

    L = logits_weight * KL(teacher || student) + cross_entropy_weight * CE (P1 section 3, without
    hidden states), over the positions that predict a token.
    """

    def __init__(
        self, student: PreTrainedModel, teacher: TeacherSignal | None, loss: DistillLoss
    ) -> None:
        super().__init__()
        self.model = student
        self._loss = loss
        self._signal = (teacher,)  # in a tuple, lest the teacher's weights become parameters here

    def forward(self, input_ids_BL: Tensor) -> Tensor:
        """Mean loss in nats a predicted token."""
        (teacher,) = self._signal
        loss = self._loss
        labels = input_ids_BL[:, 1:].flatten()
        taught = teacher.hidden(input_ids_BL)[:, :-1].flatten(0, 1) if teacher else None
        hidden = final_hidden(self.model, input_ids_BL)[:, :-1].flatten(0, 1)

        def chunk_loss(logits_NV: Tensor, place: slice) -> Tensor:
            logits_NV = softcapped(logits_NV, self.model)
            total = logits_NV.new_zeros((), dtype=torch.float32)
            if teacher is not None and taught is not None:
                target = teacher.logits(taught[place])
                total = loss.logits_weight * forward_kl(logits_NV, target, loss.temperature)
            if loss.cross_entropy_weight:
                total = total + loss.cross_entropy_weight * cross_entropy(logits_NV, labels[place])
            return total

        return chunked(hidden, output_head(self.model), chunk_loss) / labels.numel()


def run(context: StageContext[DistillConfig]) -> StageResult:
    """Train the student and leave it as a plain checkpoint with the teacher's tokenizer."""
    config, training = context.config, context.config.training
    folder = context.model("model")
    student = load_model(folder, training.precision).train()
    teacher = _load_teacher(context) if config.loss.logits != "none" else None
    trained = engine.train(
        Distillation(student, teacher, config.loss),
        corpus.blocks(config.corpus, folder, "training"),
        training,
        context.seed,
        context.out,
        context.reporter,
        context.runtime,
    )
    save_model(student, load_tokenizer(folder), context.out / "model")
    return StageResult({"loss": trained.final_loss}, trained.tokens, _flops(context, trained))


def _load_teacher(context: StageContext[DistillConfig]) -> LiveTeacher:
    student = read_config(context.model("model"))
    teacher = read_config(context.model("teacher"))
    if student["vocab_size"] != teacher["vocab_size"]:
        raise StageError(
            f"the vocabularies differ: {student['vocab_size']} in the student, "
            f"{teacher['vocab_size']} in the teacher"
        )
    return LiveTeacher(load_model(context.model("teacher"), context.config.training.precision))


def _flops(context: StageContext[DistillConfig], trained: engine.Trained) -> float:
    length = context.config.corpus.block_length
    student = shape_of(read_config(context.model("model")))
    flops = student.training_flops(trained.tokens, length)
    if context.config.loss.logits != "none":
        teacher = shape_of(read_config(context.model("teacher")))
        flops += teacher.forward_flops(trained.tokens, length)
    return flops


if __name__ == "__main__":
    shell.main(DistillConfig, run)
