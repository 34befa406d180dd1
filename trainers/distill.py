"""Stage `distill`: the pruned student (role `model`) learns from its teacher, which is either run
on every batch (role `teacher`) or was run beforehand (role `signals`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainers import corpus, engine, shell, workers
from trainers.checkpoints import (
    final_hidden,
    load_model,
    load_tokenizer,
    output_head,
    read_config,
    save_model,
    softcapped,
)
from trainers.config import DistillConfig, DistillLoss, HiddenCache, LiveSignal
from trainers.contract import StageContext, StageError, StageResult
from trainers.evaluate import lm_loss
from trainers.hidden import HiddenDistance, captured
from trainers.losses import LOGIT_LOSSES, chunked, cross_entropy, likeliest, sparse_forward_kl
from trainers.mapping import StateName, teacher_states
from trainers.shapes import Shape, shape_of
from trainers.teacher import (
    DenseTargets,
    LiveTeacher,
    SparseTargets,
    TeacherSignal,
    check_same_words,
)

SMALLEST_DISTANCE = 1e-12
"""What a dynamic weight divides by at least: a student that is its own teacher has no distance."""


class Distillation(nn.Module):
    """Mean distillation loss of a student (P1 section 3), over the positions that predict a token.

    L = logits_weight * L_logits + cross_entropy_weight * CE + alpha * L_hidden. A dynamic alpha is
    L_logits / L_hidden of the batch at hand, a constant for the gradient. The projections of
    `hidden` are trained with the student; the teacher is no part of the module's parameters.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: TeacherSignal | None,
        loss: DistillLoss,
        hidden: HiddenDistance | None = None,
    ) -> None:
        super().__init__()
        self.model = student
        self.hidden = hidden
        self._loss = loss
        self._signal = (teacher,)  # in a tuple, lest the teacher's weights become parameters here
        self._noted: dict[str, Tensor] = {}
        self._times = 0

    def forward(self, input_ids_BL: Tensor, blocks_B: Tensor) -> Tensor:
        """Mean loss in nats a predicted token. `blocks_B` are the numbers of the training blocks
        that make up the batch. Raises `StageError` where the loss needs what the signal lacks."""
        (teacher,) = self._signal
        targets = teacher.targets(input_ids_BL, blocks_B) if teacher else None
        with captured(self.model, self.hidden.student_states if self.hidden else ()) as states:
            hidden_BLD = final_hidden(self.model, input_ids_BL)
        hidden_ND, labels_N = hidden_BLD[:, :-1].flatten(0, 1), input_ids_BL[:, 1:].flatten()
        total, parts = self._of_logits(hidden_ND, labels_N, targets)
        if self.hidden is not None:
            distance = self.hidden(states, _taught_states(targets, self.hidden))
            parts["hidden_loss"] = distance.detach()
            parts["alpha"] = self._alpha(parts)
            total = total + parts["alpha"] * distance
        self._note(parts)
        return total

    def _of_logits(
        self, hidden_ND: Tensor, labels_N: Tensor, targets: DenseTargets | SparseTargets | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted mean of what is learned from logits, and its parts without weights."""
        loss, count = self._loss, len(labels_N)
        parts: dict[str, Tensor] = {}

        def add(name: str, value: Tensor, weight: float) -> Tensor:
            parts[name] = parts.get(name, 0) + value.detach() / count
            return weight * value

        def chunk_loss(logits_NV: Tensor, place: slice) -> Tensor:
            logits_NV = softcapped(logits_NV, self.model)
            terms = []
            if loss.logits != "none":
                divergence = divergence_from(logits_NV, place, targets, loss)
                terms.append(add("kd_loss", divergence, loss.logits_weight))
            if loss.cross_entropy_weight:
                cross = cross_entropy(logits_NV, labels_N[place])
                terms.append(add("ce_loss", cross, loss.cross_entropy_weight))
            return torch.stack(terms).sum()

        if loss.logits == "none" and not loss.cross_entropy_weight:
            return hidden_ND.new_zeros((), dtype=torch.float32), parts
        return chunked(hidden_ND, output_head(self.model), chunk_loss) / count, parts

    def _alpha(self, parts: dict[str, Tensor]) -> Tensor:
        assert self._loss.hidden is not None
        weight, distance = self._loss.hidden.weight, parts["hidden_loss"]
        if weight == "dynamic":
            return parts["kd_loss"] / distance.clamp_min(SMALLEST_DISTANCE)
        return torch.full_like(distance, weight)

    # --- what the curve shows ----------------------------------------------------------------

    def _note(self, parts: dict[str, Tensor]) -> None:
        self._noted = {name: self._noted.get(name, 0) + value for name, value in parts.items()}
        self._times += 1

    def parts(self) -> dict[str, float]:
        """Means over the micro-batches since the last call, none where there were none: `kd_loss`
        and `ce_loss` (nats a token for the divergences), `hidden_loss` and `alpha`, where the loss
        has them; without their weights."""
        means = {name: float(total) / self._times for name, total in self._noted.items()}
        self._noted, self._times = {}, 0
        return means


def _taught_states(
    targets: DenseTargets | SparseTargets | None, hidden: HiddenDistance
) -> Mapping[StateName, Tensor]:
    states = targets.states if isinstance(targets, DenseTargets) else {}
    missing = sorted({teacher for _, teacher in hidden.pairs} - set(states))
    if missing:
        raise StageError(f"the teacher's signal lacks the hidden states {', '.join(missing)}")
    return states


def divergence_from(
    logits_NV: Tensor,
    place: slice,
    targets: DenseTargets | SparseTargets | None,
    loss: DistillLoss,
) -> Tensor:
    """L_logits of a chunk of student logits at `place` among all tokens, summed over its tokens.

    Raises `StageError` without targets, and for sparse targets where the loss is not the forward KL
    of whole distributions at temperature 1: they say nothing else.
    """
    match targets:
        case DenseTargets():
            taught_NV = targets.logits(place)
            if loss.top_k is not None:
                logits_NV, taught_NV = likeliest(logits_NV, taught_NV, loss.top_k)
            return LOGIT_LOSSES[loss.logits](logits_NV, taught_NV, loss.temperature)
        case SparseTargets():
            check_sparse(loss)
            entropy_N = None if targets.entropy_N is None else targets.entropy_N[place]
            return sparse_forward_kl(
                logits_NV, targets.ids_NK[place], targets.weights_NK[place], entropy_N
            )
        case None:
            raise StageError(f"{loss.logits} needs a teacher")


def check_sparse(loss: DistillLoss) -> None:
    """Raise `StageError` where a few tokens of each distribution are too little for this loss."""
    problems = [
        problem
        for problem, there in (
            (f"logits: {loss.logits}", loss.logits not in ("forward_kl", "none")),
            (f"temperature: {loss.temperature}", loss.temperature != 1),
            (f"top_k: {loss.top_k}", loss.top_k is not None),
            ("hidden", loss.hidden is not None),
        )
        if there
    ]
    if problems:
        raise StageError(
            f"a cache of single tokens does not serve {', '.join(problems)}: it serves the forward "
            "KL at temperature 1; use live or hidden_cache"
        )


# --- the stage -------------------------------------------------------------------------------


@workers.metered
def run(context: StageContext[DistillConfig]) -> StageResult:
    """Train the student and leave it as a plain checkpoint with its tokenizer."""
    config, training = context.config, context.config.training
    folder = context.model("model")
    if config.loss.needs_teacher:
        _check(context)
    student = load_model(folder, training.precision).train()
    trained = engine.train(
        Distillation(student, _signal(context), config.loss, _hidden_distance(context, student)),
        corpus.blocks(config.corpus, folder, "training"),
        training,
        context.seed,
        context.out,
        context.reporter,
        context.runtime,
        _measure(context, student),
    )
    if workers.is_first():
        save_model(student, load_tokenizer(folder), context.out / "model")
        engine.forget(context.out)
    flops = _flops(context, trained)
    return StageResult({"loss": trained.final_loss}, trained.tokens, flops)


def _measure(
    context: StageContext[DistillConfig], student: PreTrainedModel
) -> engine.Measure | None:
    config = context.config
    if config.heldout_every is None:
        return None
    heldout_NL = corpus.blocks(config.corpus, context.model("model"), "heldout")

    def measure() -> dict[str, float]:
        share = workers.rank_and_processes()
        return {"heldout_loss": lm_loss(student, heldout_NL, share=share)}

    return engine.Measure(config.heldout_every, measure)


def _check(context: StageContext[DistillConfig]) -> None:
    """Raise `StageError` for a teacher that this student cannot learn from in this way."""
    check_same_words(context.model("model"), _teacher_folder(context))
    if not isinstance(context.config.signal, LiveSignal | HiddenCache):
        check_sparse(context.config.loss)
    try:
        _states(context)
    except ValueError as error:
        raise StageError(str(error)) from None


def _teacher_folder(context: StageContext[DistillConfig]) -> Path:
    """A folder with the teacher's config and tokenizer: its checkpoint, or what a cache says."""
    if isinstance(context.config.signal, LiveSignal):
        return context.model("teacher")
    if "signals" not in context.inputs:
        raise StageError("the stage needs an input in the role signals")
    return context.inputs["signals"] / "teacher"


def _teacher_shape(context: StageContext[DistillConfig]) -> Shape:
    return shape_of(read_config(_teacher_folder(context)))


def _states(context: StageContext[DistillConfig]) -> tuple[StateName, ...]:
    """The teacher's inner states that the loss needs."""
    hidden = context.config.loss.hidden
    if hidden is None:
        return ()
    layers = shape_of(read_config(context.model("model"))).num_hidden_layers
    return teacher_states(hidden, layers, _teacher_shape(context).num_hidden_layers)


def _signal(context: StageContext[DistillConfig]) -> TeacherSignal | None:
    config = context.config
    if not config.loss.needs_teacher:
        return None
    if isinstance(config.signal, LiveSignal):
        model = load_model(context.model("teacher"), config.training.precision)
        if config.training.engine.shard_teacher:
            model = engine.sharded_teacher(model, config.training.precision)
        return LiveTeacher(model, _states(context))
    from trainers import signals  # reads with numpy what only some trials need

    return signals.open_cache(context.inputs["signals"], config.signal)


def _hidden_distance(
    context: StageContext[DistillConfig], student: PreTrainedModel
) -> HiddenDistance | None:
    hidden = context.config.loss.hidden
    if hidden is None:
        return None
    teacher = _teacher_shape(context)
    size = teacher.num_hidden_layers, teacher.hidden_size
    return HiddenDistance(hidden, student, size, context.seed)


def _flops(context: StageContext[DistillConfig], trained: engine.Trained) -> float:
    """FLOPs of the student's steps, and of a live teacher or of the logits of cached states."""
    length = context.config.corpus.block_length
    student = shape_of(read_config(context.model("model")))
    flops = student.training_flops(trained.tokens, length)
    if not context.config.loss.needs_teacher:
        return flops
    match context.config.signal:
        case LiveSignal():
            return flops + _teacher_shape(context).forward_flops(trained.tokens, length)
        case HiddenCache():
            teacher = _teacher_shape(context)
            return flops + 2.0 * trained.tokens * teacher.hidden_size * teacher.vocab_size
        case _:
            return flops


if __name__ == "__main__":
    shell.main(DistillConfig, run)
