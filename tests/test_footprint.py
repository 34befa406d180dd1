"""What is said to come onto the disk does come there: models, and checkpoints of training."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import small_sweep
import torch
from test_engine import StopAt

from orchestrator import footprint
from orchestrator.estimate import Run
from orchestrator.execute import run_stage
from orchestrator.plan import SweepPlan, plan_sweep
from orchestrator.space import enumerate_trials
from orchestrator.spec import load
from orchestrator.store import Store
from trainers import engine
from trainers.checkpoints import load_model
from trainers.config import EngineSettings, Training
from trainers.contract import Interrupted, Runtime
from trainers.pretrain import LanguageModelling
from trainers.shapes import shape_of

ROOT = Path(__file__).parent.parent
LLAMA = 8_030_261_248


def planned(path: Path, profile: str | None = None) -> SweepPlan:
    sweep = load(path, profile)
    return plan_sweep(sweep, enumerate_trials(sweep))


def bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def small(trial: Mapping[str, Any]) -> dict[str, Any]:
    sweep = copy.deepcopy(small_sweep.SWEEP) | {"axes": {}, "baselines": {}}
    return sweep | {"trial": {**sweep["trial"], **trial}}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_each_stage_leaves_a_model_of_the_size_that_is_counted(
    precision: str, tmp_path: Path
) -> None:
    training = {"steps": 2, "batch_size": 4, "learning_rate": 1e-3}
    training |= {"warmup_steps": 1, "precision": precision}
    trial = {"correct": {"training": training}, "distill": {"training": training}}
    path = small_sweep.write(tmp_path, small(trial))
    (students,) = (each for each in planned(path).trials if each.trial.baseline is None)
    counted, store = footprint.model_bytes(students), Store(tmp_path / "artifacts")
    kinds = []
    for node in students.steps.values():
        if node.kind in ("evaluate", "benchmark"):
            continue
        run_stage(node, store, "t", "t", lambda *_: None, Runtime())
        weights = store.path(node.stage_id) / "model" / "model.safetensors"
        if not weights.exists():
            assert node.stage_id not in counted
            continue
        kinds.append(node.kind)
        assert weights.stat().st_size == pytest.approx(counted[node.stage_id], rel=0.1)
    assert kinds == ["pretrain", "correct", "prune", "distill"]


@pytest.mark.parametrize(
    ("precision", "zero_stage"),
    [("fp32", 0), ("fp32", 1), ("fp32", 3), ("bf16", 1), ("bf16", 2), ("bf16", 3)],
)
def test_a_training_checkpoint_takes_what_is_counted(
    precision: str, zero_stage: int, artifact: Path, tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    settings = EngineSettings(zero_stage=zero_stage)
    training = Training(
        steps=3, batch_size=2, learning_rate=1e-3, precision=precision, engine=settings
    )
    model = load_model(artifact / "model", precision).train()
    blocks = torch.arange(64).reshape(4, 16) % tiny_config["vocab_size"]
    at_once = Runtime(checkpoint_every_s=0.0)
    with pytest.raises(Interrupted):
        stop = StopAt(2, Interrupted())
        engine.train(LanguageModelling(model), blocks, training, 0, tmp_path, stop, at_once)
    (kept,) = (tmp_path / "checkpoints").glob("step*")
    counted = footprint._training_checkpoint(Run(shape_of(tiny_config), training, context=16))
    assert bytes_in(kept) == pytest.approx(counted, rel=0.15)


def test_a_model_from_elsewhere_is_not_copied_and_its_cuts_keep_its_numbers() -> None:
    found: dict[str, set[int]] = {}
    for trial in planned(ROOT / "sweeps" / "teacher_correction.yaml", "llama31_8b").trials:
        counted = footprint.model_bytes(trial)
        for node in trial.steps.values():
            if node.stage_id in counted:
                found.setdefault(node.kind, set()).add(counted[node.stage_id])
    assert found["acquire"] == {0}
    assert found["correct"] == {4 * LLAMA}
    of_bf16, of_fp32 = sorted(found["prune"])
    assert of_fp32 == 2 * of_bf16 and 0.4 < of_bf16 / (2 * LLAMA) < 0.7
