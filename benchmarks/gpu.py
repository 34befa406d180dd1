"""What a distillation step costs on one GPU, beside TRL's `GKDTrainer` with Liger's kernels.

    pip install liger-kernel; pip install --no-deps --target /tmp/peers trl
    PYTHONPATH=/tmp/peers python benchmarks/gpu.py --json

Teacher: a Llama of 1.6B random parameters; student: 12 of its 23 layers (0.9B). Both sides start
from the same weights, read the same blocks in the same order and train with AdamW on fp32 master
weights: ours in bf16 under ZeRO-1, the peer as Hugging Face trains in bf16 (autocast over fp32
weights). Each side runs in fresh processes, in turn; before anything is compared, the losses of
the first step must agree to 2%. Figures are medians over steps; memory is the allocator's peak.
`model_flops_utilisation` is the FLOPs of the model (teacher forward, student forward and backward,
attention) per second over the card's stated bf16 peak, or over the fastest bf16 matrix product
measured here where the card is not in the table. Where there is no GPU, this says so, with null for
every name, and ends.
Left out: loading, the first steps, evaluation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

NAMES = ("speedup_vs_gkd_liger", "model_flops_utilisation", "peak_memory_vs_gkd_liger")
WARM_UP = 3
STATED_PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L4": 121e12, "4090": 165e12}
"""Dense bf16 FLOPs a second, as the maker states them (H100 and H200: SXM)."""
TEACHER: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 23,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 8192,
    "rope_theta": 130000,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
STUDENT = TEACHER | {"num_hidden_layers": 12}
TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 4}


class Clock:
    """A reporter: notes how long each step took and its loss, once the GPU is done with it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.start()

    def start(self) -> None:
        """A step begins."""
        _wait()
        self._began = time.perf_counter()

    def report(self, done: int, total: int, values: Mapping[str, float]) -> None:
        """See `trainers.contract.Reporter`: a step is what lies between two reports."""
        _wait()
        self.seconds.append(time.perf_counter() - self._began)
        self.losses.append(values["loss"])
        self.start()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# --- the sides -------------------------------------------------------------------------------


def ours(setting: argparse.Namespace, clock: Clock) -> None:
    """The engine, with a live teacher."""
    from trainers import engine, workers
    from trainers.config import DistillLoss, EngineSettings, Training
    from trainers.contract import Runtime
    from trainers.distill import Distillation
    from trainers.teacher import LiveTeacher

    student, teacher = (model.bfloat16() for model in _models(setting))
    training = Training(
        steps=setting.steps,
        batch_size=setting.batch,
        learning_rate=1e-4,
        precision="bf16",
        engine=EngineSettings(liger=_has("liger_kernel") and torch.cuda.is_available()),
    )
    objective = Distillation(student, LiveTeacher(teacher.to(workers.device())), DistillLoss())
    with tempfile.TemporaryDirectory() as out:
        runtime = Runtime(checkpoint_every_s=1e9)
        engine.train(objective, _blocks(setting), training, 0, Path(out), clock, runtime)


def gkd(setting: argparse.Namespace, clock: Clock) -> None:
    """TRL's trainer, with Liger's fused loss and layers."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from trainers import corpus, language

    student, teacher = _models(setting)
    blocks_NL = _blocks(setting)
    batches = [corpus.batch(blocks_NL, step, setting.batch, 0) for step in range(setting.steps)]

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids_BL = torch.tensor([row["input_ids"] for row in rows])
        labels_BL = ids_BL.clone()
        labels_BL[:, 0] = -100  # every token but a block's first is to be predicted
        mask = torch.ones_like(ids_BL)
        return {"input_ids": ids_BL, "attention_mask": mask, "labels": labels_BL}

    class Times(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.start()

        def on_log(self, _a: Any, state: Any, _c: Any, logs: Any = None, **__: Any) -> None:
            if logs and "loss" in logs:
                clock.report(state.global_step, setting.steps, {"loss": float(logs["loss"])})

    class InOrder(GKDTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    with tempfile.TemporaryDirectory() as out:
        arguments = GKDConfig(
            output_dir=out,
            per_device_train_batch_size=setting.batch,
            max_steps=setting.steps,
            learning_rate=1e-4,
            lr_scheduler_type="cosine",
            warmup_steps=0,
            adam_beta2=0.95,
            optim="adamw_torch_fused",
            bf16=True,
            gradient_checkpointing=False,
            use_liger_kernel=True,
            lmbda=0.0,
            beta=0.0,
            temperature=1.0,
            max_length=None,
            save_strategy="no",
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
        )
        InOrder(
            model=student,
            teacher_model=teacher.bfloat16(),
            args=arguments,
            train_dataset=Dataset.from_dict({"input_ids": torch.cat(batches).tolist()}),
            data_collator=collate,
            processing_class=language.tokenizer(),
            callbacks=[Times()],
        ).train()


SIDES = {"ours": ours, "gkd_liger": gkd}


def _models(setting: argparse.Namespace) -> tuple[Any, Any]:
    from trainers.checkpoints import new_model

    teacher, student = _shapes(setting)
    return new_model(student, seed=1).train(), new_model(teacher, seed=0).eval()


def _shapes(setting: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    if setting.tiny:
        return TEACHER | TINY, STUDENT | TINY | {"num_hidden_layers": 2}
    return TEACHER, STUDENT


def _blocks(setting: argparse.Namespace) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (setting.batch * setting.steps, setting.block_length)
    return torch.randint(_shapes(setting)[0]["vocab_size"], shape, generator=generator)


def _has(package: str) -> bool:
    return find_spec(package) is not None


# --- measuring -------------------------------------------------------------------------------


def run_side(name: str, setting: argparse.Namespace) -> dict[str, Any]:
    """In this process: seconds and losses of every step, and the peak of memory in bytes."""
    clock = Clock()
    SIDES[name](setting, clock)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {"seconds": clock.seconds, "losses": clock.losses, "peak_bytes": peak}


def in_a_process(name: str) -> dict[str, Any]:
    """The same in a process of its own, with this one's arguments."""
    line = [sys.executable, __file__, *sys.argv[1:], "--side", name]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def peak_flops(card: str) -> tuple[float, str]:
    """The card's bf16 FLOPs a second, and whose word that is."""
    words = card.replace("-", " ").split()
    for name, peak in STATED_PEAK.items():
        if name in words and "PCIe" not in words:
            return peak, "stated"
    return max(_gemm_rate(size) for size in (2048, 4096, 8192)), "measured"


def _gemm_rate(size: int) -> float:
    a, b = torch.rand(2, size, size, device="cuda", dtype=torch.bfloat16)
    best = 0.0
    for _ in range(20):
        _wait()
        began = time.perf_counter()
        torch.mm(a, b)
        _wait()
        best = max(best, 2.0 * size**3 / (time.perf_counter() - began))
    return best


def step_flops(setting: argparse.Namespace) -> float:
    """Model FLOPs of a step: the teacher's forward pass, the student's training, attention."""
    from trainers.shapes import shape_of

    teacher, student = (shape_of(each) for each in _shapes(setting))
    tokens = setting.batch * setting.block_length
    flops: float = teacher.forward_flops(tokens, setting.block_length)
    return flops + student.training_flops(tokens, setting.block_length)


def figures(sides: Mapping[str, list[dict[str, Any]]], setting: argparse.Namespace) -> Any:
    """What the runs of each side come to."""
    cost = {
        name: statistics.median(s for run in runs for s in run["seconds"][WARM_UP:])
        for name, runs in sides.items()
    }
    memory = {name: max(run["peak_bytes"] for run in runs) for name, runs in sides.items()}
    card = torch.cuda.get_device_name()
    peak, whose = peak_flops(card)
    peer = "gkd_liger" in cost
    tokens = setting.batch * setting.block_length
    return {
        "gpu": card,
        "speedup_vs_gkd_liger": cost["gkd_liger"] / cost["ours"] if peer else None,
        "model_flops_utilisation": step_flops(setting) / cost["ours"] / peak,
        "peak_memory_vs_gkd_liger": memory["ours"] / memory["gkd_liger"] if peer else None,
        "tokens_per_s": {name: tokens / seconds for name, seconds in cost.items()},
        "peak_gib": {name: used / 2**30 for name, used in memory.items()},
        "peak_tflops": peak / 1e12,
        "peak_is": whose,
    }


def assert_equal(sides: Mapping[str, list[dict[str, Any]]]) -> None:
    """Raise unless all runs gave the same loss at the first step, as well as bf16 can tell."""
    losses = {name: [run["losses"][0] for run in runs] for name, runs in sides.items()}
    print("loss of step 1:", losses)
    every = [loss for found in losses.values() for loss in found]
    assert max(every) - min(every) <= 0.02 * abs(min(every)), losses


def main() -> None:
    """Measure, print a table, and with --json one line of JSON last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=8, help="blocks a step")
    parser.add_argument("--block-length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=13, help="of each run, the first 3 uncounted")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each side")
    parser.add_argument("--tiny", action="store_true", help="tiny models: only to try it out")
    parser.add_argument("--side", choices=list(SIDES), help="run this side here, print its steps")
    parser.add_argument("--json", action="store_true")
    setting = parser.parse_args()
    if setting.side:
        print(json.dumps(run_side(setting.side, setting)))
        return
    if not torch.cuda.is_available():
        print("no GPU here: nothing was measured")
        if setting.json:
            print(json.dumps(dict.fromkeys(("gpu", *NAMES))))
        return
    missing = [each for each in ("trl", "liger_kernel") if not _has(each)]
    if missing:
        print(f"left out: GKDTrainer with Liger, as {' and '.join(missing)} is not installed")
    names = ["ours"] if missing else list(SIDES)
    sides: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(setting.rounds):
        for name in names:
            sides[name].append(in_a_process(name))
    assert_equal(sides)
    found = figures(sides, setting)
    print(f"{found['gpu']}, torch {torch.__version__}, peak {found['peak_tflops']:.0f} TFLOP/s")
    for name in names:
        rate, used = found["tokens_per_s"][name], found["peak_gib"][name]
        print(f"{name:<10} {rate:10.0f} tokens/s {used:8.2f} GiB")
    print(f"model FLOPs utilisation {found['model_flops_utilisation']:.3f}")
    if setting.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
