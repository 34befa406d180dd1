"""Several workers train what one worker trains: real processes that talk through gloo.

Run by a launcher, this file is what the workers do: `torchrun … test_workers.py FOLDER JOB…`.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from trainers import checkpoints, engine, language, workers
from trainers.config import (
    DistillConfig,
    DistillLoss,
    EngineSettings,
    GeneratedCorpus,
    HiddenLoss,
    Training,
)
from trainers.contract import Interrupted, Runtime, Silent, StageContext, StageError, read_rows
from trainers.distill import Distillation, _measure
from trainers.hidden import HiddenDistance
from trainers.mapping import teacher_states
from trainers.teacher import LiveTeacher

ROOT = Path(__file__).parent.parent
STEPS, WORDS, LENGTH = 20, 61, 12
BLOCKS = torch.randint(WORDS, (23, LENGTH), generator=torch.Generator().manual_seed(5))
SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.25,
}
TEACHER = SHAPE | {"hidden_size": 40, "num_hidden_layers": 3, "intermediate_size": 64}
UNTIED, TIED = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}

pytestmark = pytest.mark.slow


# --- what is trained, here and there -----------------------------------------------------------


def settings_of(**changes: Any) -> Training:
    usual = {
        "steps": STEPS,
        "batch_size": 8,
        "micro_batch_size": 2,
        "learning_rate": 3e-3,
        "minimum_learning_rate": 1e-4,
        "warmup_steps": 3,
        "weight_decay": 0.1,
        "gradient_clip": 0.5,
    }
    return Training(**{**usual, **changes})


def distillation(tied: bool, shard_teacher: bool = False) -> Distillation:
    """A student with projections of its own beside it, and a live teacher."""
    # At a fixed weight: a dynamic one is of each micro-batch, and those differ with the workers.
    states = ("embedding", "output", "attention")
    loss = DistillLoss(hidden=HiddenLoss(states=states, mapping={"last": "last"}, weight=0.5))
    teacher = checkpoints.new_model(TEACHER, seed=1).eval()
    if shard_teacher:
        teacher = engine.sharded_teacher(teacher, "fp32")
        weight = teacher.model.layers[0].mlp.up_proj.weight
        assert weight.numel() == 0 < weight.ds_tensor.numel() < weight.ds_numel
    student = checkpoints.new_model(SHAPE | (TIED if tied else UNTIED), seed=2).train()
    assert loss.hidden
    distance = HiddenDistance(loss.hidden, student, (3, 40), seed=3)
    return Distillation(
        student, LiveTeacher(teacher, teacher_states(loss.hidden, 2, 3)), loss, distance
    )


def train(
    objective: nn.Module,
    out: Path,
    training: Training,
    reporter: Any = None,
    checkpoint_every_s: float = 1e9,
) -> engine.Trained:
    out.mkdir(parents=True, exist_ok=True)
    runtime = Runtime(checkpoint_every_s=checkpoint_every_s)
    return engine.train(objective, BLOCKS, training, 7, out, reporter or Silent(), runtime)


def train_and_export(out: Path, tied: bool = False, **chosen: Any) -> None:
    objective = distillation(tied, chosen.get("shard_teacher", False))
    train(objective, out, settings_of(engine=EngineSettings(**chosen)))
    if workers.is_first():
        objective.model.save_pretrained(out / "model")


# --- what the workers do -----------------------------------------------------------------------


class NanOnOneWorker(Distillation):
    """Its loss leaves the numbers on the second worker alone, in the second half of step 3."""

    calls = 0

    def forward(self, input_ids_BL: Tensor, blocks_B: Tensor) -> Tensor:
        self.calls += 1
        loss = super().forward(input_ids_BL, blocks_B)
        bad = self.calls == 6 and not workers.is_first()
        return loss * math.nan if bad else loss


class StopOneWorker:
    """A reporter that is interrupted at step 5 on the second worker alone."""

    def report(self, done: int, total: int, values: Mapping[str, float]) -> None:
        if done == 5 and not workers.is_first():
            raise Interrupted


class Slow:
    """A reporter that leaves time for a kill, and tells how far training is."""

    def __init__(self, told: Path) -> None:
        self.told = told

    def report(self, done: int, total: int, values: Mapping[str, float]) -> None:
        if workers.is_first():
            self.told.write_text(str(done))
        time.sleep(0.2)


def note(out: Path, text: str) -> None:
    """What this worker met, for the test to read."""
    (out / f"worker{workers.rank_and_processes()[0]}.txt").write_text(text)


class Sharded:
    """A reporter that holds the engine to its word: between steps no worker has all weights."""

    def __init__(self, objective: Distillation) -> None:
        assert objective.hidden
        layer = objective.model.model.layers[0]
        head = objective.model.get_output_embeddings()
        self.weights = [layer.mlp.up_proj.weight, head.weight, *objective.hidden.projections]

    def report(self, done: int, total: int, values: Mapping[str, float]) -> None:
        for weight in self.weights:
            assert weight.numel() == 0 < weight.ds_tensor.numel() < weight.ds_numel


def job_zero(out: Path) -> None:
    objective = distillation(tied=False)
    training = settings_of(steps=4, engine=EngineSettings(zero_stage=3))
    train(objective, out / "watched", training, Sharded(objective))
    for stage in range(4):
        train_and_export(out / f"zero{stage}", zero_stage=stage)
        train_and_export(out / f"tied{stage}", zero_stage=stage, tied=True)


def job_settings(out: Path) -> None:
    train_and_export(out / "sharded", zero_stage=3, shard_teacher=True)
    train_and_export(out / "offloaded2", zero_stage=2, offload_optimizer=True)
    train_and_export(out / "offloaded3", zero_stage=3, offload_parameters=True)
    train_and_export(out / "recomputed", zero_stage=2, gradient_checkpointing=True)
    train_and_export(out / "recomputed3", zero_stage=3, gradient_checkpointing=True)


def job_stops(out: Path) -> None:
    shared = distillation(tied=True)
    bad = NanOnOneWorker(shared.model, *shared._signal, shared._loss, shared.hidden)
    try:
        train(bad, out / "nan", settings_of(), None, checkpoint_every_s=0)
    except StageError as error:
        note(out / "nan", str(error))
    for stage in (0, 3):
        stopped = out / f"stopped{stage}"
        training = settings_of(engine=EngineSettings(zero_stage=stage))
        try:
            train(distillation(tied=False), stopped, training, StopOneWorker())
        except Interrupted:
            note(stopped, (stopped / "checkpoints" / "whole").read_text())
        objective = distillation(tied=False)
        train(objective, stopped, training)
        if workers.is_first():
            objective.model.save_pretrained(stopped / "model")
    try:
        train(shared, out / "odd", settings_of(batch_size=9, micro_batch_size=1))
    except StageError as error:
        note(out / "odd", str(error))


def job_killed(out: Path) -> None:
    objective = distillation(tied=False)
    training = settings_of(engine=EngineSettings(zero_stage=2))
    train(objective, out, training, Slow(out / "told"), checkpoint_every_s=0)
    if workers.is_first():
        objective.model.save_pretrained(out / "model")
        engine.forget(out)


def held_out_on_the_way(out: Path) -> tuple[float, int]:
    """The held-out loss, and how many of its 19 blocks this worker reads."""
    student = checkpoints.new_model(SHAPE | TIED | {"vocab_size": len(language.WORDS)}, seed=2)
    text = GeneratedCorpus(block_length=LENGTH, heldout_blocks=19)
    config = DistillConfig(corpus=text, training=settings_of(), heldout_every=2)
    measured = _measure(StageContext(config, {"model": out}, out), student)
    assert measured is not None
    read: list[int] = []
    student.base_model.register_forward_pre_hook(
        lambda _, __, named: read.append(len(named["input_ids"])), with_kwargs=True
    )
    return measured.measure()["heldout_loss"], sum(read)


def job_measured(out: Path) -> None:
    note(out, json.dumps(held_out_on_the_way(out)))


# --- starting them -----------------------------------------------------------------------------


def torchrun(*arguments: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        *arguments,
    ]


def environment() -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
    }


def run_workers(job: str, out: Path) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    line = torchrun(__file__, job, str(out))
    done = subprocess.run(
        line, env=environment(), capture_output=True, text=True, timeout=550, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return out


def values(out: Path, name: str = "loss") -> list[float]:
    return [row["value"] for row in read_rows(out / "curve.jsonl") if row["name"] == name]


def assert_same(found: Path, expected: Path) -> None:
    """The same curve and the same weights, read by plain transformers.

    Where a gradient is nearly zero, Adam turns its rounding, which differs between processors, into
    a part of a step: a hundredth of the learning rate was seen after all twenty.
    """
    for name in ("loss", "kd_loss", "hidden_loss", "learning_rate"):
        assert len(values(expected, name)) == STEPS
        assert values(found, name) == pytest.approx(values(expected, name), abs=1e-5, rel=0)
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(folder / "model") for folder in (found, expected)
    )
    for (name, weight), (_, other) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        torch.testing.assert_close(weight, other, rtol=0, atol=1e-4, msg=lambda m, n=name: n + m)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one worker makes of it, in this process, without any setting."""
    out = tmp_path_factory.mktemp("alone")
    train_and_export(out / "untied")
    train_and_export(out / "tied", tied=True)
    assert values(out / "untied")[-1] < values(out / "untied")[0] - 0.1
    return out


@pytest.fixture(scope="module")
def zero(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_workers("zero", tmp_path_factory.mktemp("zero"))


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_workers("settings", tmp_path_factory.mktemp("settings"))


@pytest.fixture(scope="module")
def stops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_workers("stops", tmp_path_factory.mktemp("stops"))


# --- the same, however many ----------------------------------------------------------------------


@pytest.mark.parametrize("stage", range(4))
def test_two_workers_under_zero_train_as_one_does(zero: Path, alone: Path, stage: int) -> None:
    assert_same(zero / f"zero{stage}", alone / "untied")


@pytest.mark.parametrize("stage", range(4))
def test_tied_embeddings_stay_tied_under_zero(zero: Path, alone: Path, stage: int) -> None:
    assert_same(zero / f"tied{stage}", alone / "tied")


def test_a_teacher_sharded_over_the_workers_teaches_the_same(settings: Path, alone: Path) -> None:
    assert_same(settings / "sharded", alone / "untied")


@pytest.mark.parametrize("where", ["offloaded2", "offloaded3"])
def test_what_is_offloaded_is_trained_the_same(settings: Path, alone: Path, where: str) -> None:
    assert_same(settings / where, alone / "untied")


@pytest.mark.parametrize("where", ["recomputed", "recomputed3"])
def test_recomputed_activations_train_the_same(settings: Path, alone: Path, where: str) -> None:
    assert_same(settings / where, alone / "untied")


def test_workers_share_the_held_out_text_that_is_measured_on_the_way(tmp_path: Path) -> None:
    expected, blocks = held_out_on_the_way(tmp_path)
    assert blocks == 19
    out = run_workers("measured", tmp_path / "two")
    found = [json.loads((out / f"worker{worker}.txt").read_text()) for worker in range(2)]
    assert [loss for loss, _ in found] == pytest.approx([expected] * 2, abs=1e-5)
    assert [blocks for _, blocks in found] == [8 + 3, 8]


# --- stopping, together ------------------------------------------------------------------------


def test_a_loss_that_is_not_a_number_on_one_worker_ends_all(stops: Path) -> None:
    for worker in range(2):
        assert (stops / "nan" / f"worker{worker}.txt").read_text() == "the loss is nan at step 3"
    assert (stops / "nan" / "checkpoints" / "whole").read_text() == "step2"


@pytest.mark.parametrize("stage", [0, 3])
def test_an_interruption_of_one_worker_stops_all_and_they_go_on(
    stops: Path, alone: Path, stage: int
) -> None:
    for worker in range(2):
        assert (stops / f"stopped{stage}" / f"worker{worker}.txt").read_text() == "step5"
    assert_same(stops / f"stopped{stage}", alone / "untied")


def test_a_batch_that_does_not_divide_is_one_clear_message(stops: Path) -> None:
    said = (stops / "odd" / "worker0.txt").read_text()
    assert said == (
        "batch_size 9 cannot be shared by 2 workers: it must be a multiple of 2, such as 8"
    )


def test_killed_workers_go_on_from_their_last_checkpoint(tmp_path: Path, alone: Path) -> None:
    out = tmp_path / "killed"
    out.mkdir()
    started = subprocess.Popen(
        torchrun(__file__, "killed", str(out)),
        env=environment(),
        start_new_session=True,  # so that launcher and workers die at once, and nobody tidies up
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 300
        while int((out / "told").read_text() or 0 if (out / "told").exists() else 0) < 7:
            assert started.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()
    step = int((out / "checkpoints" / "whole").read_text().removeprefix("step"))
    assert 6 <= step < STEPS
    run_workers("killed", out)
    assert not (out / "checkpoints").exists()
    assert_same(out, alone / "untied")


# --- from a shell ------------------------------------------------------------------------------


def deepspeed(*arguments: str) -> list[str]:
    with socket.socket() as free:  # torchrun finds a port by itself
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = str(Path(sys.executable).parent / "deepspeed")
    return [program, "--num_gpus", "2", "--master_port", str(port), *arguments]


@pytest.mark.parametrize("launcher", [torchrun, deepspeed])
def test_a_training_stage_runs_under_a_launcher(
    artifact: Path, tmp_path: Path, launcher: Any
) -> None:
    training = {"steps": 4, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 1}
    corpus = {"kind": "generated", "block_length": 16, "training_blocks": 12}
    described = {
        "config": {"corpus": corpus, "training": training | {"engine": {"zero_stage": 3}}},
        "inputs": {"model": str(artifact)},
        "seed": 1,
    }
    file, out = tmp_path / "c.yaml", tmp_path / "out"
    file.write_text(json.dumps(described))
    line = launcher("-m" if launcher is torchrun else "--module", "trainers.correct")
    line += ["--config", str(file), "--out", str(out)]
    done = subprocess.run(
        line, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads((out / "result.json").read_text())
    assert done.stdout.count('"metrics"') == 1, "the first worker alone prints"
    assert result["tokens"] == 4 * 4 * 16
    trained = AutoModelForCausalLM.from_pretrained(out / "model")
    before = AutoModelForCausalLM.from_pretrained(artifact / "model")
    assert trained.num_parameters() == before.num_parameters()
    assert not torch.equal(trained.model.norm.weight, before.model.norm.weight)
    assert [row["step"] for row in read_rows(out / "curve.jsonl") if row["name"] == "loss"] == [
        1,
        2,
        3,
        4,
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    with workers.joined():
        globals()[f"job_{sys.argv[1]}"](Path(sys.argv[2]))
