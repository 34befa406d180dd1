"""The one training loop, and the only import of DeepSpeed.

Pretraining, conventional training and distillation differ in the objective that they hand in: a
module that takes a micro-batch of token ids and the numbers of the blocks that it is made of,
`objective(input_ids_BL, blocks_B)`, and returns its mean loss. An objective may have a method
`parts()` that gives the means, since it was last called, of what its loss is made of: they enter
the curve beside the loss.

On several workers each takes its share of every batch; the loss is the mean over them, the first
alone writes, and all of them report, save and stop at the same steps.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]
from transformers import PreTrainedModel

from trainers import checksums, corpus, workers
from trainers.config import EngineSettings, Training
from trainers.contract import (
    Interrupted,
    Reporter,
    Runtime,
    StageError,
    read_rows,
    write_rows,
)
from trainers.families import family_of

# DeepSpeed compiles a small op with ninja, which pip puts beside the interpreter: on the PATH of
# an activated environment, but not where the console script is called by its path.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
os.environ.setdefault("DS_LOG_LEVEL", "error")


@contextmanager
def _hiding(module: str) -> Iterator[None]:
    """While open, the module cannot be imported, unless it was before."""
    hidden = module not in sys.modules
    if hidden:
        sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hidden:
            del sys.modules[module]


# DeepSpeed's autotuner, which nothing here calls, imports MLflow where it is installed: 1.3 s of a
# worker's start, and 0.1 GB that it would keep.
with _hiding("mlflow"):
    import deepspeed
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils import logger as deepspeed_logger
    from deepspeed.utils.tensor_fragment import fragment_address

deepspeed_logger.setLevel(logging.ERROR)

CURVE = "curve.jsonl"
CHECKPOINTS = "checkpoints"
COMPILED_SHAPES = 64
"""Of layers, with or without gradients, that a process keeps compiled."""
CURVE_POINTS = 100
BUCKET = 50_000_000
"""Gradients that are reduced at once: DeepSpeed's default of 5e8 holds 2 GB of fp32 for them."""


@dataclass(frozen=True)
class Trained:
    """What the loop did: all steps of the run, resumed ones included."""

    steps: int
    tokens: int
    final_loss: float


def learning_rate_factor(step: int, training: Training) -> float:
    """The learning rate of optimizer step `step` (from 0), as a share of the peak.

    Linear warm-up that reaches the peak at the end of `warmup_steps`, then a cosine down to the
    minimum, reached at the last step.
    """
    if step < training.warmup_steps:
        return (step + 1) / training.warmup_steps
    last = max(1, training.steps - 1 - training.warmup_steps)
    progress = min(1.0, (step - training.warmup_steps) / last)
    floor = training.minimum_learning_rate / training.learning_rate
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def zero_stage(training: Training) -> int:
    """The ZeRO stage in use.

    bf16 needs stage 1 with fp32 gradient accumulation: that keeps fp32 master weights, while stage
    0 steps the bf16 weights themselves and rounds most of a small update away.
    """
    asked = training.engine.zero_stage
    return asked if asked is not None else int(training.precision == "bf16")


@dataclass(frozen=True)
class Measure:
    """Something to measure after every so many optimizer steps, on whole weights (ZeRO 0 to 2). It
    enters the curve, and the report of that step, which also says after how many `tokens`."""

    every: int
    measure: Callable[[], Mapping[str, float]]


def train(
    objective: nn.Module,
    blocks_NL: Tensor,
    training: Training,
    seed: int,
    out: Path,
    reporter: Reporter,
    runtime: Runtime,
    measure: Measure | None = None,
) -> Trained:
    """Train the objective's parameters in place; goes on from `out/checkpoints` where there is one,
    and leaves the last one there: `forget` it once the weights are saved.

    Writes `out/curve.jsonl` (loss in nats a token, learning rate, parts of the loss). Afterwards
    the parameters are whole on the first worker; under ZeRO-3 the others hold shards of no use.
    Raises `StageError` at the first loss that is not finite, on every worker, keeping the last good
    checkpoint; and where the batch does not divide by the workers.
    """
    run = _Run(objective, blocks_NL, training, seed, out)
    try:
        _train_to_the_end(run, training.steps, reporter, runtime, measure)
        whole = _whole_weights(objective) if zero_stage(training) == 3 else None
        trained = run.finish()
    finally:
        run.free()  # a worker lives on after a stage that fails
    if whole is not None:
        _put_back(objective, whole)
    return trained


def forget(out: Path) -> None:
    """Drop the checkpoints of a training whose weights are saved; for the first worker to call."""
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)


def _train_to_the_end(
    run: _Run, steps: int, reporter: Reporter, runtime: Runtime, measure: Measure | None
) -> None:
    saved_at = started_at = time.monotonic()
    first = run.step
    while run.step < steps:
        loss = run.advance()
        now = time.monotonic()
        speed = (run.step - first) * run.tokens_per_step / max(now - started_at, 1e-9)
        values = {"loss": loss, "tokens_per_s": speed} | run.measured(measure)
        stop = _report(reporter, run.step, steps, values)
        due = now - saved_at > runtime.checkpoint_every_s and run.step < steps
        stopping, due = _any_worker(stop is not None, due)
        if stopping or due:
            run.save()
            saved_at = time.monotonic()
        if stopping:
            raise stop or Interrupted


def _report(
    reporter: Reporter, step: int, steps: int, values: Mapping[str, float]
) -> BaseException | None:
    """Report, and give the wish to stop that came back, if one did."""
    try:
        reporter.report(step, steps, values)
    except (Interrupted, KeyboardInterrupt, SystemExit) as stop:
        return stop
    return None


def _any_worker(*wishes: bool) -> list[bool]:
    """Which of the wishes any worker has: a checkpoint is saved by all of them or by none."""
    if workers.rank_and_processes()[1] == 1:
        return list(wishes)
    votes = torch.tensor(wishes, dtype=torch.float32, device=workers.device())
    return [bool(vote) for vote in workers.mean_over_workers(votes) > 0]


class _Run:
    """A DeepSpeed engine, the step it is at, and its curve on disk."""

    def __init__(
        self, objective: nn.Module, blocks_NL: Tensor, training: Training, seed: int, out: Path
    ) -> None:
        self._blocks, self._training, self._seed = blocks_NL, training, seed
        self._objective, self._checkpoints = objective, out / CHECKPOINTS
        self._whole = self._checkpoints / "whole"
        _join_process_group()
        self._rank, self._workers = workers.rank_and_processes()
        self._micro = micro_batch_size(training, self._workers)
        self._device = workers.device()
        # For a dropout, should a checkpoint ask for one: no run may depend on what ran before.
        torch.manual_seed((seed << 8) + self._rank)
        self._engine = _start_engine(objective, training, self._micro)
        self.step = 0
        since: dict[str, list[float]] = {}
        self.tokens_per_step = training.batch_size * blocks_NL.shape[1]
        try:
            tag = self._sound_checkpoint()
            if self._rank == 0:
                self._drop_all_but(tag)  # what failing saves left would pile up on a full disk
            if tag is not None:
                self.step, since = self._load(tag)
        except BaseException:
            self.free()
            raise
        self._curve = _Curve(out / CURVE, self.step, training.steps, since)

    def _sound_checkpoint(self) -> str | None:
        """The name of the last whole checkpoint; None where there is none. One that a disk has
        changed is thrown away with the curve that belongs to it: the training starts anew."""
        if not self._whole.exists():
            return None
        tag = self._whole.read_bytes().decode(errors="replace")
        # A power cut can leave the file without its name, or with another's bytes.
        named = re.fullmatch(r"step\d+", tag) is not None
        sound = named and checksums.are_right(self._checkpoints / tag, self._rank, self._workers)
        if not _any_worker(not sound)[0]:
            return tag
        workers.wait_for_all()  # all have looked
        if self._rank == 0:
            shutil.rmtree(self._checkpoints)
            (self._checkpoints.parent / CURVE).unlink(missing_ok=True)
        workers.wait_for_all()
        return None

    def _load(self, tag: str) -> tuple[int, dict[str, list[float]]]:
        """Restore the checkpoint; gives its step and the losses since the curve's last point."""
        folder = self._checkpoints / tag
        wrote = len(list(folder.glob("random*.pt")))
        if wrote != self._workers and zero_stage(self._training) > 0:
            raise StageError(
                f"the checkpoint in {self._checkpoints} holds the shards of {wrote} workers and "
                f"cannot be read by {self._workers}: start {wrote} again, or remove it"
            )
        with _nothing_is_run():
            read, state = self._engine.load_checkpoint(str(self._checkpoints), tag)
        if read is None:
            raise StageError(f"the checkpoint {folder} cannot be read: remove {self._checkpoints}")
        if self._rank == 0 and (folder / CURVE).exists():
            shutil.copyfile(folder / CURVE, self._checkpoints.parent / CURVE)
        workers.wait_for_all()
        _set_random_state(folder / f"random{min(self._rank, wrote - 1)}.pt")
        return state["step"], state["since"]

    def advance(self) -> float:
        """One optimizer step; gives its mean loss over all workers."""
        micros = torch.split(self._share(), self._micro)
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for number, blocks_B in enumerate(micros, start=1):
            loss = self._engine(self._blocks[blocks_B].long().to(self._device), blocks_B)
            total += loss.detach().double() / len(micros)
            if number == len(micros):  # before the weights move, and once: it is a meeting of all
                mean = self._finite_mean(total)
            self._engine.backward(loss)
            self._engine.step()
        rate = self._training.learning_rate * learning_rate_factor(self.step, self._training)
        self.step += 1
        values = {"loss": mean} | self._parts()
        self._curve.add(self.step, self.step * self.tokens_per_step, values, rate)
        return mean

    def _share(self) -> Tensor:
        """The numbers of this worker's blocks in the current step's batch."""
        batch_size = self._training.batch_size
        numbers = corpus.batch_blocks(len(self._blocks), self.step, batch_size, self._seed)
        return numbers.view(self._workers, -1)[self._rank]

    def _finite_mean(self, loss: Tensor) -> float:
        mean = float(workers.mean_over_workers(loss))
        if not math.isfinite(mean):
            raise StageError(f"the loss is {mean} at step {self.step + 1}")
        return mean

    def _parts(self) -> dict[str, float]:
        """What the loss of the last step was made of, where the objective tells."""
        tell = getattr(self._objective, "parts", None)
        parts: dict[str, float] = tell() if tell else {}
        if self._workers == 1 or not parts:
            return parts
        values = torch.tensor(list(parts.values()), dtype=torch.float64, device=self._device)
        return dict(zip(parts, workers.mean_over_workers(values).tolist(), strict=True))

    def measured(self, measure: Measure | None) -> dict[str, float]:
        """What is to be measured after this step, noted in the curve; nothing after most steps."""
        if measure is None or self.step % measure.every:
            return {}
        self._objective.eval()
        try:
            found = dict(measure.measure())
        finally:
            self._objective.train()
        tokens = self.step * self.tokens_per_step
        self._curve.note(self.step, tokens, found)
        return found | {"tokens": tokens}

    def save(self) -> None:
        """A checkpoint of this step; the one before is removed only after this one is whole."""
        if self._rank == 0:
            self._curve.flush()
        tag = f"step{self.step}"
        state = {"step": self.step, "since": self._curve.since}
        # DeepSpeed writes the name of its latest checkpoint in place, so that a kill can leave the
        # name empty. Ours appears whole, and only after what it names.
        self._engine.save_checkpoint(
            str(self._checkpoints), tag=tag, client_state=state, save_latest=False
        )
        folder = self._checkpoints / tag
        torch.save(_random_state(), folder / f"random{self._rank}.pt")
        if self._rank == 0:
            # The curve goes on being written; what belongs to this step stays beside its weights.
            shutil.copyfile(self._curve.path, folder / CURVE)
        workers.wait_for_all()
        checksums.write(folder, self._rank, self._workers)
        workers.wait_for_all()
        if self._rank == 0:
            self._keep_only(tag)
        workers.wait_for_all()  # whoever goes on finds it

    def _keep_only(self, tag: str) -> None:
        beside = self._whole.with_suffix(".part")
        with beside.open("w") as file:
            file.write(tag)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self._whole)
        self._drop_all_but(tag)

    def _drop_all_but(self, tag: str | None) -> None:
        for old in self._checkpoints.glob("step*"):
            if old.name != tag:
                shutil.rmtree(old)

    def finish(self) -> Trained:
        """Close the curve: all steps are done."""
        if self._rank == 0:
            self._curve.flush()
        tokens = self.step * self.tokens_per_step
        return Trained(self.step, tokens, self._curve.last_loss)

    def free(self) -> None:
        """Give back the memory of the engine and its optimizer."""
        self._engine.destroy()


# --- workers and their shares ----------------------------------------------------------------


def micro_batch_size(training: Training, processes: int) -> int:
    """Sequences that one worker takes at a time. Raises `StageError` where the batch cannot be
    shared out evenly."""
    batch, micro = training.batch_size, training.micro_batch_size
    if batch % processes:
        raise StageError(
            f"batch_size {batch} cannot be shared by {processes} workers: it must be a multiple of "
            f"{processes}, such as {max(1, batch // processes) * processes}"
        )
    share = batch // processes
    if micro and share % micro:
        allowed = [size for size in range(1, min(share, 1024) + 1) if share % size == 0]
        raise StageError(
            f"micro_batch_size {micro} does not divide the {share} sequences that each of "
            f"{processes} workers takes of batch_size {batch}; allowed: {allowed}"
        )
    return micro or share


def _join_process_group() -> None:
    """The group that a launcher or Ray Train made or asks for; else a group of one, which needs no
    port and no launcher."""
    os.environ.setdefault("LOCAL_RANK", "0")
    if torch.cuda.is_available():
        torch.cuda.set_device(workers.device())
    if not workers.join() and not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            workers.backend(), store=HashStore(), rank=0, world_size=1
        )
    kind = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(dist_backend=kind, auto_mpi_discovery=False, verbose=False)


# --- DeepSpeed -------------------------------------------------------------------------------


def _start_engine(objective: nn.Module, training: Training, micro_batch_size: int) -> Any:
    for model in _models(objective):
        _prepare(model, training.engine)
    config = deepspeed_config(training, micro_batch_size, _largest_vector(objective))
    sharded = zero_stage(training) == 3
    if sharded:
        _shard(objective, config)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in objective.parameters() if parameter.requires_grad],
        lr=training.learning_rate,
        betas=(training.beta1, training.beta2),
        weight_decay=training.weight_decay,
        fused=True,
    )
    engine, *_ = deepspeed.initialize(
        model=objective,
        optimizer=optimizer,
        lr_scheduler=lambda inner: torch.optim.lr_scheduler.LambdaLR(
            inner, lambda step: learning_rate_factor(step, training)
        ),
        config=config,
    )
    if zero_stage(training) == 0 and workers.rank_and_processes()[1] == 1:
        # Alone, DeepSpeed would copy all gradients into one tensor and back for nobody.
        engine.enable_backward_allreduce = False
    if sharded:
        for parameter in _read_from_outside(objective):
            deepspeed.zero.register_external_parameter(objective, parameter)
    return engine


def deepspeed_config(
    training: Training, micro_batch_size: int, whole_below: int = 0
) -> dict[str, Any]:
    """The DeepSpeed settings of a run. Under ZeRO-3, parameters of at most `whole_below` numbers
    stay whole on every worker."""
    chosen = training.engine
    zero: dict[str, Any] = {"stage": zero_stage(training), "reduce_bucket_size": BUCKET}
    if chosen.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if chosen.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    if zero["stage"] == 3:
        zero["stage3_param_persistence_threshold"] = whole_below
    return {
        "train_batch_size": training.batch_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_clipping": training.gradient_clip,
        "zero_optimization": zero,
        "bf16": {"enabled": training.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        # PyTorch's fused AdamW runs on the host, too; DeepSpeed's own has to be compiled first.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": sys.maxsize,
    }


def _largest_vector(module: nn.Module) -> int:
    """The size of the largest norm or bias: too small to be worth a message, so that under ZeRO-3
    matrices are sharded and vectors are not."""
    return max((p.numel() for p in module.parameters() if p.dim() <= 1), default=0)


def _shard(module: nn.Module, config: dict[str, Any]) -> None:
    """Leave each worker its shard of every parameter, one parameter after the other: the module is
    never whole on a device."""
    dtype = next(module.parameters()).dtype
    deepspeed.zero.Init(module=module, config_dict_or_path=config, dtype=dtype)
    for buffer in module.buffers():
        buffer.data = buffer.data.to(workers.device())


def _models(objective: nn.Module) -> Iterator[PreTrainedModel]:
    """The language models that the objective trains."""
    if isinstance(objective, PreTrainedModel):
        yield objective
    else:
        for child in objective.children():
            yield from _models(child)


def _read_from_outside(objective: nn.Module) -> list[nn.Parameter]:
    """Parameters that are read without calling the module they belong to, as chunked losses read
    output heads and projections. Under ZeRO-3 they have to be there for all of a step."""
    models = list(_models(objective))
    called = {id(p) for model in models for p in model.base_model.parameters()}
    heads = {id(model.get_output_embeddings().weight) for model in models}
    return [p for p in objective.parameters() if id(p) in heads or id(p) not in called]


def _whole_weights(objective: nn.Module) -> dict[nn.Parameter, Tensor]:
    """Every parameter gathered from its shards into the host's memory; on the first worker."""
    whole = {}
    for parameter in objective.parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            if workers.is_first():
                whole[parameter] = parameter.data.to("cpu", copy=True)
    return whole


def _put_back(objective: nn.Module, whole: Mapping[nn.Parameter, Tensor]) -> None:
    """Make sharded parameters plain ones again, with these values."""
    for module in objective.modules():
        plain = vars(module).pop("_original_parameters", None)
        if plain is not None:
            module._parameters = plain
    for parameter, values in whole.items():
        for name in [name for name in vars(parameter) if name.startswith("ds_")]:
            delattr(parameter, name)
        parameter.data = values


def sharded_teacher(model: PreTrainedModel, precision: str) -> PreTrainedModel:
    """The model, for inference, with every layer sharded over the workers by ZeRO-3.

    The embeddings, the final norm and the output head stay whole on each of them: losses read the
    head chunk by chunk. The model must be called equally often on all workers.
    """
    _join_process_group()
    model.requires_grad_(False)
    layers = model.get_submodule(family_of({"model_type": model.config.model_type}).layers)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": _largest_vector(layers),
        },
        "bf16": {"enabled": precision == "bf16"},
        "steps_per_print": sys.maxsize,
    }
    _shard(layers, config)
    inside = {id(parameter) for parameter in layers.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in inside:
            parameter.data = parameter.data.to(workers.device())
    for buffer in model.buffers():
        buffer.data = buffer.data.to(workers.device())
    engine, *_ = deepspeed.initialize(model=layers, config=config)
    # DeepSpeed learns in which order weights are needed, from one call of its module to the next;
    # the list of layers is never called, so the model's own calls count as such.
    model.base_model.register_forward_pre_hook(
        lambda *_: engine.optimizer.get_param_coordinator().reset_step()
    )
    return model


# --- what is recomputed, compiled or replaced --------------------------------------------------


def _prepare(model: PreTrainedModel, chosen: EngineSettings) -> None:
    if chosen.liger:
        _use_liger(model)
    if chosen.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if chosen.compile:
        _compile_layers(model)


def _use_liger(model: PreTrainedModel) -> None:
    """Replace norms and MLPs by Liger's kernels. Losses are ours anyway."""
    missing = [
        what
        for what, there in (
            ("a GPU", torch.cuda.is_available()),
            ("the package liger-kernel (extra `gpu`)", importlib.util.find_spec("liger_kernel")),
        )
        if not there
    ]
    if missing:
        raise StageError(f"engine.liger needs {' and '.join(missing)}")
    patches = importlib.import_module("liger_kernel.transformers.monkey_patch")
    known = patches.MODEL_TYPE_TO_APPLY_LIGER_FN
    if model.config.model_type not in known:
        raise StageError(
            f"engine.liger knows no {model.config.model_type}; it knows {', '.join(sorted(known))}"
        )
    with _module_kept(type(model).__module__):
        patches._apply_liger_kernel_to_instance(model=model)


@contextmanager
def _module_kept(name: str) -> Iterator[None]:
    """Undoes what is set in a module: Liger replaces classes and functions there as well, and a
    worker's later trials may ask for none of it. Rotary embeddings, which are looked up there, so
    stay as they are; norms and MLPs are replaced in the model itself."""
    module = sys.modules[name]
    before = dict(vars(module))
    try:
        yield
    finally:
        vars(module).update(before)


def _compile_layers(model: PreTrainedModel) -> None:
    """Compile each layer's forward pass: all layers share one compilation, and whoever listens at
    a layer (hidden-state losses) is called outside of it."""
    # Listeners inside a layer come and go; code compiled with one must not be run without it.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    # A worker meets a shape a trial, and what one trial compiled serves all of its shape. PyTorch
    # keeps eight, and whatever comes after them would run uncompiled.
    torch._dynamo.config.recompile_limit = COMPILED_SHAPES
    layers = model.get_submodule(family_of({"model_type": model.config.model_type}).layers)
    for layer in layers.children():
        layer.forward = torch.compile(layer.forward)


# --- checkpoints that run nothing ----------------------------------------------------------------

FORCE_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
IN_SHARDS = [ZeroStageEnum, LossScaler, fragment_address]
"""What DeepSpeed's shards hold beside tensors and plain values."""


@contextmanager
def _nothing_is_run() -> Iterator[None]:
    """DeepSpeed unpickles its shards, and a pickle can run anything. The folder of artifacts may be
    one that others write, too: here a shard that names anything else is not read."""
    before = os.environ.get(FORCE_WEIGHTS_ONLY)
    os.environ[FORCE_WEIGHTS_ONLY] = "1"
    try:
        with torch.serialization.safe_globals(IN_SHARDS):
            yield
    finally:
        if before is None:
            del os.environ[FORCE_WEIGHTS_ONLY]
        else:
            os.environ[FORCE_WEIGHTS_ONLY] = before


# --- random state ----------------------------------------------------------------------------


def _random_state() -> dict[str, Any]:
    kind, keys, *place = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        # As a tensor: an array would be a pickle, which is not read back.
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *place),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _set_random_state(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    random.setstate(state["python"])
    kind, keys, *place = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *place))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


# --- the curve -------------------------------------------------------------------------------


class _Curve:
    """At most about two hundred points of loss, its parts and learning rate, each the mean since
    the last.

    `since` holds the values after the last point: a checkpoint between two points keeps them.
    """

    def __init__(self, path: Path, step: int, steps: int, since: dict[str, list[float]]) -> None:
        self.path = path
        self._every = max(1, steps // CURVE_POINTS)
        self._steps = steps
        self.since = since
        self._rows = [row for row in read_rows(path) if row["step"] <= step]
        self.last_loss = next(
            (row["value"] for row in reversed(self._rows) if row["name"] == "loss"), math.nan
        )

    def add(self, step: int, tokens: int, values: Mapping[str, float], rate: float) -> None:
        for name, value in values.items():
            self.since.setdefault(name, []).append(value)
        if step % self._every and step != self._steps:
            return
        means = {name: sum(each) / len(each) for name, each in self.since.items()}
        self.last_loss = means["loss"]
        self.since.clear()
        means["learning_rate"] = rate
        self.note(step, tokens, means)

    def note(self, step: int, tokens: int, values: Mapping[str, float]) -> None:
        """A point of its own."""
        stamp = {"step": step, "tokens": tokens, "time_ms": time.time_ns() // 1_000_000}
        self._rows += [{**stamp, "name": name, "value": value} for name, value in values.items()]

    def flush(self) -> None:
        write_rows(self.path, self._rows)
