"""The files under deploy/ are what their readers take: Ray's autoscaler, KubeRay, Slurm's shell."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import small_sweep
import yaml
from click.testing import CliRunner

from orchestrator.cli import app
from orchestrator.spec import load

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
PINNED = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line
)


def ray_job() -> dict[str, Any]:
    documents = list(yaml.safe_load_all((DEPLOY / "rayjob.yaml").read_text()))
    (found,) = (each for each in documents if each["kind"] == "RayJob")
    return found


def pods() -> list[tuple[int, dict[str, Any]]]:
    """How many of each pod the RayJob's cluster has, and its specification."""
    cluster = ray_job()["spec"]["rayClusterSpec"]
    groups = [(1, cluster["headGroupSpec"])]
    groups += [(group["replicas"], group) for group in cluster["workerGroupSpecs"]]
    return [(count, group["template"]["spec"]) for count, group in groups]


def assert_would_run(command: str) -> None:
    """The `orchestrate` command names a sweep and a profile that are valid together."""
    words = shlex.split(command.replace("/home/ray/orchestrate", str(ROOT)))
    words = words[words.index("orchestrate") + 1 :]
    sweep, profile = words[0], words[words.index("--profile") + 1]
    result = CliRunner().invoke(app, ["validate", str(ROOT / sweep), "--profile", profile])
    assert result.exit_code == 0, result.output


def test_ray_up_takes_the_cluster_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((DEPLOY / "ray-cluster.yaml").read_text())
    validate_config(prepare_config(config))
    assert config["head_node_type"] in config["available_node_types"]


def test_the_cluster_files_have_the_pinned_ray() -> None:
    image = f"rayproject/ray:{PINNED['ray']}-py311"
    for name in ("ray-cluster.yaml", "Dockerfile"):
        images = re.findall(r"rayproject/ray:\S+", (DEPLOY / name).read_text())
        assert images and all(each.startswith(image) for each in images)
    assert ray_job()["spec"]["rayClusterSpec"]["rayVersion"] == PINNED["ray"]


def test_nothing_of_the_cluster_file_listens_everywhere() -> None:
    config = yaml.safe_load((DEPLOY / "ray-cluster.yaml").read_text())
    started = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    assert "0.0.0.0" not in " ".join(started)
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert ray_job()["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert "export RAY_AUTH_MODE=token" in (DEPLOY / "slurm.sh").read_text()


def test_the_ray_job_runs_a_sweep_that_is_there_on_storage_that_every_pod_has() -> None:
    entrypoint = ray_job()["spec"]["entrypoint"]
    assert_would_run(entrypoint)
    results = Path(shlex.split(entrypoint)[shlex.split(entrypoint).index("--results") + 1])
    for _count, pod in pods():
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {m["mountPath"]: m["name"] for m in pod["containers"][0]["volumeMounts"]}
        assert set(mounts.values()) <= set(volumes)
        (shared,) = (name for path, name in mounts.items() if results.is_relative_to(path))
        assert "persistentVolumeClaim" in volumes[shared]


def test_the_ray_job_has_room_for_a_trial_of_its_profile() -> None:
    words = shlex.split(ray_job()["spec"]["entrypoint"])
    profile = words[words.index("--profile") + 1]
    needed = load(ROOT / "sweeps" / "width_vs_depth.yaml", profile).resources
    limits = [
        pod["containers"][0]["resources"]["limits"]
        for count, pod in pods()
        for _ in range(count)
        if "nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"]
    ]
    places = [
        min(
            int(each["cpu"]) // needed.cpus_per_trial,
            int(int(each["nvidia.com/gpu"]) / needed.gpus_per_worker),
        )
        for each in limits
    ]
    assert sum(places) >= needed.workers


def test_the_slurm_script_is_a_shell_script_that_asks_for_what_its_profile_needs() -> None:
    script = DEPLOY / "slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.M))
    profile = re.findall(r"profile=\$\{2:-(\w+)\}", text)[0]
    needed = load(ROOT / "sweeps" / "width_vs_depth.yaml", profile).resources
    nodes = int(asked["nodes"])
    assert int(asked["gpus-per-node"]) * nodes >= needed.gpus_per_worker * needed.workers
    assert int(asked["cpus-per-task"]) * nodes >= needed.cpus_per_trial * needed.workers


SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then echo localhost; else echo "$@" >> "$REQUEUED"; fi
"""


@pytest.mark.slow
def test_the_slurm_script_starts_ray_runs_the_sweep_and_gives_its_exit_status(
    tmp_path: Path,
) -> None:
    # Slurm's two commands as they act in an allocation of this machine alone.
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    # Away from the checkout: its .venv comes first on the script's PATH where there is one.
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NNODES": "1",
        "SLURM_CPUS_PER_TASK": "1",
        "RESULTS": str(tmp_path / "results"),
        "REQUEUED": str(tmp_path / "requeued"),
        "MLFLOW_TRACKING_URI": "",
    }
    sweep = small_sweep.write(tmp_path / "sweeps")
    try:
        with (tmp_path / "log").open("w") as log:
            done = subprocess.run(
                [DEPLOY / "slurm.sh", sweep, "micro"],
                cwd=tmp_path,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=540,
            )
    finally:
        _end_what_runs_in(f"/tmp/ray-{os.getpid()}")
    said = (tmp_path / "log").read_text()
    assert done.returncode == 0, said
    assert "room for a trial" in said and "wins" in said
    assert not (tmp_path / "requeued").exists()


def _end_what_runs_in(folder: str) -> None:
    """Slurm ends the steps of a job with it."""
    ours = [
        p for p in psutil.process_iter(["cmdline"]) if folder in " ".join(p.info["cmdline"] or ())
    ]
    for process in ours:
        process.kill()
    psutil.wait_procs(ours, timeout=10)
    shutil.rmtree(folder, ignore_errors=True)


# `closest_source` names its sizes, those of the smallest models; `early_stopping` measures its loss
# on the way, for which weights must be whole.
LEFT_OUT = ("closest_source", "early_stopping")
SWEEPS = [path for path in (ROOT / "sweeps").glob("*.yaml") if path.stem not in LEFT_OUT]


@pytest.mark.parametrize("name", ["llama31_8b", "nemotron_15b"])
@pytest.mark.parametrize("sweep", sorted(SWEEPS), ids=lambda p: p.stem)
def test_every_sweep_is_valid_at_the_scale_of_a_cluster(sweep: Path, name: str) -> None:
    result = CliRunner().invoke(app, ["validate", str(sweep), "--profile", name])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("name", ["llama31_8b", "nemotron_15b"])
def test_a_cluster_profile_keeps_held_out_text_out_of_training(name: str) -> None:
    corpus = load(ROOT / "sweeps" / "width_vs_depth.yaml", name).base.plain()["corpus"]
    heldout = re.fullmatch(r"train\[:(\d+)\]", corpus["heldout_split"])
    training = re.fullmatch(r"train\[(\d+):(\d*)\]", corpus["train_split"])
    assert heldout and training and int(training[1]) >= int(heldout[1])


@pytest.mark.parametrize("name", ["llama31_8b", "nemotron_15b"])
def test_a_cluster_profiles_batch_is_shared_evenly_by_its_workers(name: str) -> None:
    from trainers.config import Training
    from trainers.engine import micro_batch_size

    sweep = load(ROOT / "sweeps" / "width_vs_depth.yaml", name)
    training = Training.model_validate(sweep.base.plain()["distill"]["training"])
    assert micro_batch_size(training, sweep.resources.workers) == training.micro_batch_size
    assert training.precision == "bf16" and sweep.resources.gpus_per_worker == 1
