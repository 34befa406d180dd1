"""What one optimizer step of distillation costs beside the tools that people use.

    pip install --no-deps --target /tmp/peers -r benchmarks/requirements-peers.txt
    PYTHONPATH=/tmp/peers python benchmarks/distill_step.py --json

Peers: TRL's `GKDTrainer(lmbda=0, beta=0)`, modelopt's `KDTrainer` and a Hugging Face `Trainer` on
full logits. Ours: the stage `distill` with a live teacher, with cached hidden states, with cached
samples, and with cross-entropy alone; and the stage `cache`, whose cost for the blocks of a step is
shared by `--trials` trials. A peer that is not installed is named and left out.

All sides start from the same weights and read the same blocks in the same order, with fused AdamW
and gradients clipped, each in a process of its own that waits while others take a step. Before
anything is compared, the exact sides must agree on the loss of the first step to 5 digits (1 in
bf16), and of the second, after one update, to 3. The figures are medians of CPU seconds a step.
The teacher has the shape of SmolLM2-135M; the student has 11 of its 30 layers (67M parameters), or
two thirds of its width (66M). Weights are random. Left out: loading, the first steps, evaluation.
In bf16 the peers step bf16 weights, while ours keep fp32 masters: they do less.
All sides together hold about 16 GB; `--sides` takes fewer.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

WARM_UP = 2
"""Steps that are not counted: the first ones allocate what later ones reuse."""
EXACT = ("live", "hidden cache", "GKDTrainer", "KDTrainer", "Trainer")
"""The sides that must agree on the loss."""

TEACHER: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
STUDENTS: dict[str, dict[str, Any]] = {
    "depth": {"num_hidden_layers": 11},
    "width": {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
TINY_STUDENTS = {"depth": {"num_hidden_layers": 2}, "width": {"intermediate_size": 48}}


@dataclass(frozen=True)
class Setting:
    """What all sides are given. Sizes in tokens and blocks."""

    folder: Path
    steps: int
    batch_size: int
    block_length: int
    precision: str
    threads: int

    @property
    def corpus(self) -> Any:
        """Blocks of the generated language: as many as the steps read."""
        from trainers.config import GeneratedCorpus

        blocks = self.steps * self.batch_size
        return GeneratedCorpus(block_length=self.block_length, training_blocks=blocks)

    @property
    def training(self) -> Any:
        """The same optimizer on every side."""
        from trainers.config import Training

        return Training(
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=1e-4,
            precision=self.precision,
        )


class Baton:
    """Lets its side take one step at a time, and says what the step cost."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._began = 0.0

    def wait(self) -> None:
        """Until this side may go on."""
        self._connection.recv()
        self._began = time.process_time()

    def hand_back(self, loss: float) -> None:
        """The step is done."""
        self._connection.send((time.process_time() - self._began, loss))

    def report(self, done: int, total: int, values: Mapping[str, float]) -> None:
        """As a stage's reporter: a step is what lies between two reports."""
        self.hand_back(values.get("loss", float("nan")))
        if done < total:
            self.wait()


# --- ours ------------------------------------------------------------------------------------


def _ours(setting: Setting, baton: Baton, signal: Any, loss: Any, **inputs: Path) -> None:
    from trainers import distill
    from trainers.config import DistillConfig

    config = DistillConfig(
        corpus=setting.corpus, training=setting.training, loss=loss, signal=signal
    )
    baton.wait()
    with tempfile.TemporaryDirectory() as out:
        inputs = {"model": setting.folder / "student", **inputs}
        distill.run(_context(config, inputs, Path(out), setting, baton))


def _context(
    config: Any, inputs: Mapping[str, Path], out: Path, setting: Setting, baton: Any
) -> Any:
    from trainers.contract import Runtime, StageContext

    runtime = Runtime(checkpoint_every_s=1e9)
    return StageContext(config, inputs, out, 0, baton, runtime)


def live(setting: Setting, baton: Baton) -> None:
    """The teacher runs in every step."""
    from trainers.config import DistillLoss, LiveSignal

    _ours(setting, baton, LiveSignal(), DistillLoss(), teacher=setting.folder / "teacher")


def hidden_cache(setting: Setting, baton: Baton) -> None:
    """The teacher's final hidden states are read from disk."""
    from trainers.config import DistillLoss, HiddenCache

    with _cached(setting, HiddenCache()) as folder:
        _ours(setting, baton, HiddenCache(), DistillLoss(), signals=folder)


def sampled_cache(setting: Setting, baton: Baton) -> None:
    """12 tokens a position are read from disk."""
    from trainers.config import DistillLoss, SampledCache

    with _cached(setting, SampledCache()) as folder:
        _ours(setting, baton, SampledCache(), DistillLoss(), signals=folder)


def cross_entropy(setting: Setting, baton: Baton) -> None:
    """No teacher."""
    from trainers.config import DistillLoss, LiveSignal

    loss = DistillLoss(logits="none", cross_entropy_weight=1)
    _ours(setting, baton, LiveSignal(), loss)


@contextmanager
def _cached(setting: Setting, signal: Any) -> Iterator[Path]:
    from trainers.contract import Silent

    with tempfile.TemporaryDirectory() as out:
        _build(setting, signal, setting.corpus, Path(out), Silent())
        yield Path(out)


def _build(setting: Setting, signal: Any, corpus: Any, out: Path, reporter: Any) -> None:
    from trainers import cache
    from trainers.config import CacheConfig

    config = CacheConfig(
        corpus=corpus,
        signal=signal,
        steps=corpus.training_blocks,
        batch_size=1,
        precision=setting.precision,
    )
    inputs = {"model": setting.folder / "teacher"}
    cache.run(_context(config, inputs, out, setting, reporter))


def build(setting: Setting, baton: Baton) -> None:
    """The hidden cache is computed and written; a step is a chunk of its blocks."""
    from trainers.config import HiddenCache
    from trainers.shapes import blocks_a_chunk

    blocks = setting.steps * blocks_a_chunk(setting.block_length)
    corpus = setting.corpus.model_copy(update={"training_blocks": blocks})
    baton.wait()
    with tempfile.TemporaryDirectory() as out:
        _build(setting, HiddenCache(), corpus, Path(out), baton)


# --- peers -----------------------------------------------------------------------------------


def gkd_trainer(setting: Setting, baton: Baton) -> None:
    """TRL's: forward KL on given text."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from trainers import language

    arguments = GKDConfig(
        **_arguments(setting), lmbda=0.0, beta=0.0, temperature=1.0, max_length=None
    )
    student, teacher = _models(setting)
    _paced(GKDTrainer, setting, baton)(
        model=student,
        teacher_model=teacher,
        args=arguments,
        train_dataset=_dataset(setting),
        data_collator=_collate,
        processing_class=language.tokenizer(),
    ).train()


def kd_trainer(setting: Setting, baton: Baton) -> None:
    """modelopt's."""
    from modelopt.torch.distill.plugins.huggingface import KDTrainer
    from transformers import TrainingArguments

    student, teacher = _models(setting)
    _paced(KDTrainer, setting, baton)(
        model=student,
        args=TrainingArguments(**_arguments(setting), remove_unused_columns=False),
        train_dataset=_dataset(setting),
        data_collator=_collate,
        distill_args={"distill": True, "teacher_model": teacher},
    ).train()


def plain_trainer(setting: Setting, baton: Baton) -> None:
    """Hugging Face's, with the KL of full logits as its loss."""
    import torch
    import torch.nn.functional as F
    from transformers import Trainer, TrainingArguments

    student, teacher = _models(setting)

    class FullLogits(Trainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            given = {"input_ids": inputs["input_ids"], "use_cache": False}
            ours_NV = model(**given).logits[:, :-1].flatten(0, 1).float()
            with torch.no_grad():
                theirs_NV = teacher(**given).logits[:, :-1].flatten(0, 1).float()
            ours_NV, theirs_NV = ours_NV.log_softmax(-1), theirs_NV.log_softmax(-1)
            return F.kl_div(ours_NV, theirs_NV, log_target=True, reduction="batchmean")

    _paced(FullLogits, setting, baton)(
        model=student,
        args=TrainingArguments(**_arguments(setting), remove_unused_columns=False),
        train_dataset=_dataset(setting),
        data_collator=_collate,
    ).train()


def _arguments(setting: Setting) -> dict[str, Any]:
    """Hugging Face's names for `setting.training`."""
    training = setting.training
    return {
        "output_dir": str(setting.folder / "out"),
        "per_device_train_batch_size": setting.batch_size,
        "max_steps": setting.steps,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0,
        "weight_decay": training.weight_decay,
        "adam_beta1": training.beta1,
        "adam_beta2": training.beta2,
        "max_grad_norm": training.gradient_clip,
        "optim": "adamw_torch_fused",
        "use_cpu": True,
        # The weights are in the precision already.
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def _models(setting: Setting) -> tuple[Any, Any]:
    from trainers.checkpoints import load_model

    folder = setting.folder
    student = load_model(folder / "student" / "model", setting.precision).train()
    teacher = load_model(folder / "teacher" / "model", setting.precision)
    return student, teacher.requires_grad_(False)


def _dataset(setting: Setting) -> Any:
    """The blocks in the order in which our engine reads them."""
    import torch
    from datasets import Dataset

    from trainers import corpus

    blocks_NL = corpus.blocks(setting.corpus, setting.folder / "student" / "model", "training")
    steps = range(setting.steps)
    ordered = torch.cat([corpus.batch(blocks_NL, step, setting.batch_size, 0) for step in steps])
    return Dataset.from_dict({"input_ids": ordered.tolist()})


def _collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch in which each token but a block's first is to be predicted."""
    import torch

    input_ids_BL = torch.tensor([row["input_ids"] for row in rows])
    labels_BL = input_ids_BL.clone()
    labels_BL[:, 0] = -100
    return {
        "input_ids": input_ids_BL,
        "attention_mask": torch.ones_like(input_ids_BL),
        "labels": labels_BL,
    }


def _paced(trainer: type, setting: Setting, baton: Baton) -> Any:
    """The trainer, which reads blocks in order and takes each step when the baton lets it."""
    from torch.utils.data import DataLoader
    from transformers import TrainerCallback

    losses: list[float] = []

    class Pace(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            baton.wait()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            baton.hand_back(losses[-1])

    class Paced(trainer):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, callbacks=[Pace()], **kwargs)

        def get_train_dataloader(self) -> Any:
            return DataLoader(
                self.train_dataset, batch_size=setting.batch_size, collate_fn=_collate
            )

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            losses.append(float(loss))
            return loss

    return Paced


# --- measuring -------------------------------------------------------------------------------


SIDES: dict[str, Callable[[Setting, Baton], None]] = {
    "live": live,
    "hidden cache": hidden_cache,
    "sampled cache": sampled_cache,
    "cross-entropy": cross_entropy,
    "cache build": build,
    "GKDTrainer": gkd_trainer,
    "KDTrainer": kd_trainer,
    "Trainer": plain_trainer,
}
NEEDS = {"GKDTrainer": "trl", "KDTrainer": "nvidia-modelopt"}
"""Packages of peers."""


def _serve(name: str, setting: Setting, connection: Connection) -> None:
    """A side's process."""
    import torch

    torch.set_num_threads(setting.threads)
    try:
        SIDES[name](setting, Baton(connection))
    except (EOFError, BrokenPipeError):
        return  # the benchmark ended before the side did
    except BaseException:
        connection.send(traceback.format_exc())


class Side:
    """One contender, in a process that waits until it is asked for a step."""

    def __init__(self, name: str, setting: Setting) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(name, setting, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def step(self) -> None:
        """One step. Raises `RuntimeError` where the side failed."""
        self._connection.send("go")
        answer = self._connection.recv()
        if isinstance(answer, str):
            raise RuntimeError(f"{self.name} failed:\n{answer}")
        seconds, loss = answer
        self.seconds.append(seconds)
        self.losses.append(loss)

    @property
    def median(self) -> float:
        """CPU seconds a step."""
        return statistics.median(self.seconds[WARM_UP:])

    def close(self) -> None:
        """End the process: a side that waits for its turn hears that there will be none."""
        self._connection.close()
        self._process.join(timeout=20)
        if self._process.is_alive():
            self._process.terminate()


def measure(setting: Setting, names: list[str]) -> dict[str, Side]:
    """Every side takes a step, then every side takes the next one."""
    sides = [Side(name, setting) for name in names]
    try:
        for number in range(setting.steps):
            for side in sides:
                side.step()
            if number == 1:
                assert_equal(sides, setting.precision)
    finally:
        for side in sides:
            side.close()
    return {side.name: side for side in sides}


def assert_equal(sides: list[Side], precision: str) -> None:
    """Raise unless the exact sides gave the same loss before and after their first update."""
    exact = [side for side in sides if side.name in EXACT]
    if not exact:
        return
    tolerances = (1e-5, 1e-3) if precision == "fp32" else (1e-1, 1e-1)
    for step, tolerance in enumerate(tolerances):
        losses = {side.name: side.losses[step] for side in exact}
        print(f"loss of step {step + 1}:", {name: round(x, 7) for name, x in losses.items()})
        spread = max(losses.values()) - min(losses.values())
        assert spread <= tolerance * abs(min(losses.values())), (step, losses)


def make_models(folder: Path, student: str, tiny: bool) -> dict[str, int]:
    """Random teacher and student as the artifacts of a stage; gives their parameters."""
    from trainers import language
    from trainers.checkpoints import count_parameters, new_model, save_model

    teacher = TEACHER | (TINY if tiny else {})
    cut = (TINY_STUDENTS if tiny else STUDENTS)[student]
    parameters = {}
    for seed, (name, config) in enumerate({"teacher": teacher, "student": teacher | cut}.items()):
        model = new_model(config, seed)
        save_model(model, language.tokenizer(), folder / name / "model")
        parameters[name] = count_parameters(model)
    return parameters


def ratios(sides: Mapping[str, Side], setting: Setting, trials: int) -> dict[str, float]:
    """The figures, as far as the sides that they need were there."""
    from trainers.shapes import blocks_a_chunk

    cost = {name: side.median for name, side in sides.items()}
    found: dict[str, float] = {}
    if {"sampled cache", "cross-entropy"} <= set(cost):
        ratio = cost["sampled cache"] / cost["cross-entropy"]
        found["sampled_cache_cost_vs_cross_entropy"] = ratio
    peers = {"gkd": "GKDTrainer", "modelopt": "KDTrainer", "trainer": "Trainer"}
    for short, name in peers.items():
        if {name, "live"} <= set(cost):
            found[f"live_speedup_vs_{short}"] = cost[name] / cost["live"]
        if {name, "hidden cache", "cache build"} <= set(cost):
            build = cost["cache build"] / blocks_a_chunk(setting.block_length) * setting.batch_size
            cached = cost["hidden cache"] + build / trials
            found[f"hidden_cache_speedup_vs_{short}"] = cost[name] / cached
    return found


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> None:
    """Measure, print a table, and with --json one line of JSON last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", choices=list(STUDENTS), default="depth")
    parser.add_argument("--tokens", type=int, default=1024, help="a step")
    parser.add_argument("--block-length", type=int, default=512)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="steps that count")
    parser.add_argument("--trials", type=int, default=8, help="that share a cache")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--tiny", action="store_true", help="tiny models: only to try it out")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # for the processes of the sides
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    asked = [name for name in SIDES if name in arguments.sides]
    missing = {name for name in asked if name in NEEDS and _installed(NEEDS[name]) is None}
    for name in sorted(missing):
        print(f"left out: {name}, as {NEEDS[name]} is not installed")
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(
            folder=Path(folder),
            steps=arguments.rounds + WARM_UP,
            batch_size=arguments.tokens // arguments.block_length,
            block_length=arguments.block_length,
            precision=arguments.precision,
            threads=arguments.threads,
        )
        parameters = make_models(setting.folder, arguments.student, arguments.tiny)
        _print_setting(setting, parameters)
        sides = measure(setting, [name for name in asked if name not in missing])
    for name, side in sides.items():
        spread = f"{min(side.seconds[WARM_UP:]):8.3f} to {max(side.seconds[WARM_UP:]):.3f}"
        print(f"{name:<16} {side.median:8.3f} CPU s   {spread}")
    found = ratios(sides, setting, arguments.trials)
    for name, ratio in found.items():
        print(f"{name:<40} {ratio:.3f}")
    if arguments.json:
        print(json.dumps(found))


def _print_setting(setting: Setting, parameters: Mapping[str, int]) -> None:
    packages = ["torch", "transformers", "deepspeed", *NEEDS.values()]
    print(f"{setting.batch_size} blocks of {setting.block_length} tokens a step,", end=" ")
    print(f"{setting.precision}, {setting.threads} threads,", end=" ")
    print(", ".join(f"{name} {count / 1e6:.1f}M" for name, count in parameters.items()))
    print(", ".join(f"{name} {_installed(name)}" for name in packages), end=", ")
    print(platform.processor() or platform.machine())


if __name__ == "__main__":
    main()
