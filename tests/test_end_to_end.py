"""Whole sweeps, run as a user runs them: real processes, Ray, DeepSpeed, the harness, MLflow."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as parquet
import pytest
import small_sweep

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TRIALS = 6  # the teacher, two criteria by contiguous or not, and random layers


class Finished:
    """A sweep that ran undisturbed, and what it printed."""

    def __init__(self, folder: Path) -> None:
        self.sweep = small_sweep.write(folder / "sweeps")
        self.results = folder / "results"
        self.done = small_sweep.run(self.sweep, self.results)
        self.folder = self.results / "small" / "micro"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    found = Finished(tmp_path_factory.mktemp("finished"))
    assert found.done.returncode == 0, found.done.stdout + found.done.stderr
    return found


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return parquet.read_table(folder / f"{name}.parquet").to_pylist()


def test_a_sweep_leaves_the_layout_of_the_contract(finished: Finished) -> None:
    left = {str(p.relative_to(finished.folder)) for p in finished.folder.rglob("*")}
    assert left >= {
        "sweep.yaml",
        "trials.parquet",
        "stages.parquet",
        "curves.parquet",
        "items.parquet",
        "tables/trials.md",
        "tables/trials.csv",
        "tables/main_effects.md",
        "figures/loss_curves.png",
        "figures/layer_importance_lm_loss.svg",
        "report.html",
        "best.json",
        "best/config.json",
        "best/model.safetensors",
    }
    assert (finished.results / "mlflow.db").exists()


def test_every_trial_is_a_row_with_its_measurements(finished: Finished) -> None:
    trials = rows(finished.folder, "trials")
    assert len(trials) == TRIALS
    assert {t["status"] for t in trials} == {"completed"}
    for trial in trials:
        student = trial["baseline"] != "teacher"
        assert trial["metric.lm_loss.after"] > 0
        assert 0 <= trial["metric.accuracy.mean"] <= 1
        assert (trial["metric.kd_loss.after"] is not None) == student
        assert (trial["metric.lm_loss.before"] is not None) == student
        assert (trial["tokens_trained"] == 30 * 4 * 32) == student


def test_distillation_brings_every_student_closer_to_its_teacher(finished: Finished) -> None:
    for trial in rows(finished.folder, "trials"):
        if trial["baseline"] != "teacher":
            assert trial["metric.kd_loss.after"] < trial["metric.kd_loss.before"]


def test_a_stage_that_several_trials_ask_for_runs_once(finished: Finished) -> None:
    stages = rows(finished.folder, "stages")
    ran = Counter(stage["stage_id"] for stage in stages if not stage["cached"])
    assert set(ran) == {stage["stage_id"] for stage in stages}
    assert set(ran.values()) == {1}
    asked = Counter(stage["kind"] for stage in stages)
    assert asked["pretrain"] == TRIALS
    assert asked["distill"] == TRIALS - 1


def test_the_accuracies_are_those_of_the_questions_rows(finished: Finished) -> None:
    items = rows(finished.folder, "items")
    for trial in rows(finished.folder, "trials"):
        for half, name in (("select", "accuracy"), ("report", "accuracy_report")):
            found = [
                item["correct"]
                for item in items
                if item["trial_id"] == trial["trial_id"]
                and item["task"] == "agreement"
                and item["split"] == half
            ]
            assert trial[f"metric.{name}.agreement"] == pytest.approx(sum(found) / len(found))


def test_the_last_lines_name_the_winner_and_where_to_look(finished: Finished) -> None:
    assert "wins" in finished.done.stdout
    assert "report.html" in finished.done.stdout.splitlines()[-2]


def test_the_best_checkpoint_loads_without_our_code_and_the_harness_agrees(
    finished: Finished, tmp_path: Path
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from trainers import language

    language.write_tasks(tmp_path, limit=40)
    results = simple_evaluate(
        model=HFLM(pretrained=str(finished.folder / "best"), device="cpu", dtype="float32"),
        tasks=["tiny_agreement", "tiny_knowledge"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    best = json.loads((finished.folder / "best.json").read_text())["trial_id"]
    items = [item for item in rows(finished.folder, "items") if item["trial_id"] == best]
    for task in ("agreement", "knowledge"):
        ours = [item["correct"] for item in items if item["task"] == task]
        theirs = results["results"][f"tiny_{task}"]["acc,none"]
        assert sum(ours) / len(ours) == pytest.approx(theirs)


def test_mlflow_shows_one_parent_and_a_child_for_each_trial(finished: Finished) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{finished.results}/mlflow.db")
    experiment = client.get_experiment_by_name("small")
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = {run.info.run_id: run for run in runs if "mlflow.parentRunId" in run.data.tags}
    assert len(parents) == 1
    assert len(children) == TRIALS
    assert "| rank |" in parents[0].data.tags["mlflow.note.content"]
    for trial in rows(finished.folder, "trials"):
        shown = children[trial["mlflow_run_id"]].data.metrics
        for name, value in trial.items():
            if name.startswith("metric.") and value is not None:
                assert shown[name.removeprefix("metric.")] == pytest.approx(value)


def test_the_same_command_again_runs_nothing_twice(finished: Finished) -> None:
    before = rows(finished.folder, "stages")
    began = time.monotonic()
    again = small_sweep.run(finished.sweep, finished.results)
    assert again.returncode == 0, again.stderr
    assert time.monotonic() - began < 60
    assert rows(finished.folder, "stages") == before
    assert f"{TRIALS} of them done already" in again.stdout


def test_tables_rebuilt_from_the_parquet_files_are_byte_identical(finished: Finished) -> None:
    tables = finished.folder / "tables"
    before = {path.name: path.read_bytes() for path in tables.iterdir()}
    shutil.rmtree(tables)
    done = subprocess.run(
        ["orchestrate", "report", str(finished.sweep), "--results", str(finished.results)],
        executable=str(Path(sys.executable).parent / "orchestrate"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in tables.iterdir()} == before


def test_a_trial_that_fails_is_a_row_with_its_reason_and_the_others_run_on(
    finished: Finished, tmp_path: Path
) -> None:
    diverging = {
        **small_sweep.SWEEP,
        "name": "diverging",
        "axes": {"distill.training.learning_rate": [2e-3, 1e30]},
        "baselines": {},
    }
    sweep = small_sweep.write(tmp_path, diverging, "diverging")
    # The artifacts of the other sweep are there: its teacher and importance must not run again.
    done = small_sweep.run(sweep, finished.results)
    assert done.returncode == 1, done.stdout + done.stderr
    folder = finished.results / "diverging" / "micro"
    trials = {t["axis.distill.training.learning_rate"]: t for t in rows(folder, "trials")}
    assert trials[2e-3]["status"] == "completed"
    failed = trials[1e30]
    assert failed["status"] == "failed"
    assert "loss is" in failed["reason"] and "at step" in failed["reason"]
    assert all(failed[name] is None for name in failed if name.startswith("metric."))
    assert failed["reason"] in done.stdout
    shared = [s for s in rows(folder, "stages") if s["kind"] in ("pretrain", "importance")]
    assert shared and all(stage["cached"] for stage in shared)


# --- interruptions ---------------------------------------------------------------------------


def until(reached: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait for a point inside the sweep; fail if it ends first."""
    deadline = time.monotonic() + 240
    while not reached():
        assert process.poll() is None, "the sweep ended before it could be disturbed"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ledger_lines(folder: Path) -> int:
    path = folder / "ledger.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def kill_tree(process: subprocess.Popen[str]) -> None:
    """kill -9 of the command and everything that it started, Ray's processes included."""
    tree = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(True))]
    for pid in tree:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def start(sweep: Path, results: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        # Relative, as people type it: the workers run in other folders.
        small_sweep.command(sweep, Path(results.name), "--set", "distill.training.steps=300"),
        cwd=results.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "MLFLOW_TRACKING_URI": ""},
    )


def test_interrupted_and_killed_it_goes_on_and_ends_as_if_undisturbed(tmp_path: Path) -> None:
    sweep = small_sweep.write(tmp_path / "sweeps")
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    folder = rough / "small" / "micro"
    working = rough / "artifacts" / ".working"

    def distilling() -> bool:
        return any(working.glob("distill-*/checkpoints/whole"))

    first = start(sweep, rough)
    until(distilling, first)
    first.send_signal(signal.SIGINT)
    assert first.wait(timeout=120) == 130
    assert distilling(), "the half-done distillation was not kept"
    seen = ledger_lines(folder)

    second = start(sweep, rough)
    until(lambda: ledger_lines(folder) > seen + 1 and distilling(), second)
    kill_tree(second)

    for results in (rough, calm):
        last = start(sweep, results)
        out, _ = last.communicate(timeout=300)
        assert last.returncode == 0, out

    disturbed, undisturbed = (rows(r / "small" / "micro", "trials") for r in (rough, calm))
    assert [t["trial_id"] for t in disturbed] == [t["trial_id"] for t in undisturbed]
    for one, other in zip(disturbed, undisturbed, strict=True):
        metrics = [name for name in one if name.startswith("metric.")]
        assert {n: one[n] for n in metrics} == {n: other[n] for n in metrics}
    stages = rows(folder, "stages")
    assert len(stages) == len(rows(calm / "small" / "micro", "stages"))
    ran = Counter(stage["stage_id"] for stage in stages if not stage["cached"])
    assert set(ran) == {stage["stage_id"] for stage in stages}
    assert set(ran.values()) == {1}
    curves = rows(folder, "curves")
    assert len(curves) == len({(c["trial_id"], c["step"], c["name"]) for c in curves})


def test_a_worker_that_dies_costs_one_attempt_and_no_trial(
    finished: Finished, tmp_path: Path
) -> None:
    results = tmp_path / "results"
    # The teacher and the importance scores are there; only the students have to be made.
    shutil.copytree(finished.results / "artifacts", results / "artifacts")
    process = start(finished.sweep, results)
    working = results / "artifacts" / ".working"
    until(lambda: any(working.glob("distill-*/checkpoints/whole")), process)
    workers = [
        child
        for child in psutil.Process(process.pid).children(True)
        if "ray::ImplicitFunc" in " ".join(child.cmdline())
    ]
    max(workers, key=lambda worker: worker.cpu_times().user).kill()
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert "lost" in out and "the worker died" in out
    trials = rows(results / "small" / "micro", "trials")
    assert len(trials) == TRIALS and {t["status"] for t in trials} == {"completed"}


# --- several workers -------------------------------------------------------------------------

TOGETHER: dict[str, Any] = {
    "name": "together",
    "question": "Do two workers make the same student as one?",
    "profile": "micro",
    "trial": {
        "prune": {"width": {"intermediate_size": 0.5}},
        "distill": {"training": {"engine": {"zero_stage": 2}}},
    },
}


def test_a_trial_of_two_workers_is_recorded_like_any_other(tmp_path: Path) -> None:
    """Ray Train joins two workers, DeepSpeed shards the student by ZeRO stage 2."""
    sweep = small_sweep.write(tmp_path / "sweeps", TOGETHER, "together")
    alone = small_sweep.run(sweep, tmp_path / "alone")
    assert alone.returncode == 0, alone.stdout + alone.stderr
    both = small_sweep.run(
        sweep, tmp_path / "both", "--set", "resources.workers=2", "--set", "source.seed=0"
    )
    assert both.returncode == 0, both.stdout + both.stderr
    one, two = (
        {t["baseline"]: t for t in rows(tmp_path / where / "together" / "micro", "trials")}
        for where in ("alone", "both")
    )
    assert two[None]["trial_id"] == one[None]["trial_id"]
    assert two[None]["status"] == "completed"
    # The teachers, too, were trained by one and by two workers; in fp32 that is rounding.
    assert two[None]["metric.lm_loss.after"] == pytest.approx(
        one[None]["metric.lm_loss.after"], abs=1e-3
    )
    folder = tmp_path / "both" / "together" / "micro"
    kinds = {stage["kind"]: stage for stage in rows(folder, "stages") if not stage["cached"]}
    assert kinds["distill"]["cpu_s"] > 0 and kinds["distill"]["peak_rss_mb"] > 0
    assert {c["name"] for c in rows(folder, "curves")} >= {"loss", "learning_rate"}
    assert (folder / "best" / "config.json").exists()


def test_a_failure_on_two_workers_is_told_in_the_stages_words(tmp_path: Path) -> None:
    training = {**small_sweep.PROFILE["trial"]["distill"]["training"], "learning_rate": 1e12}
    trial = {**TOGETHER["trial"], "distill": {"training": training}}
    sweep = small_sweep.write(tmp_path / "sweeps", {**TOGETHER, "trial": trial}, "together")
    done = small_sweep.run(sweep, tmp_path / "results", "--set", "resources.workers=2")
    assert done.returncode == 1, done.stdout + done.stderr
    (failed,) = [
        t
        for t in rows(tmp_path / "results" / "together" / "micro", "trials")
        if t["status"] == "failed"
    ]
    assert "the loss is" in failed["reason"] and "at step" in failed["reason"]


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("resources.workers=999", "999 workers"),
        ("resources.gpus_per_worker=999", "one worker of 1 CPUs and 999 GPUs"),
    ],
)
def test_more_than_there_is_room_for_is_refused(tmp_path: Path, setting: str, told: str) -> None:
    sweep = small_sweep.write(tmp_path / "sweeps", TOGETHER, "together")
    done = small_sweep.run(sweep, tmp_path / "results", "--set", setting)
    assert done.returncode == 2
    assert told in done.stderr
