"""The doctor finds what there is and what there is not, names remedies, and is never stalled."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import small_sweep
from click.testing import CliRunner, Result

from orchestrator import cluster, doctor
from orchestrator.cli import app
from orchestrator.cluster import Node, View
from orchestrator.doctor import Check, Needs
from orchestrator.plan import SweepPlan, plan_sweep
from orchestrator.space import enumerate_trials
from orchestrator.spec import Sweep, load
from orchestrator.store import Store

ROOT = Path(__file__).parent.parent

QUICK_S = 10.0
"""MLflow's own client takes 246 s to give up on a dead server."""


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def listening() -> Iterator[int]:
    """A port that takes connections and says nothing."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        yield int(silent.getsockname()[1])


def assert_fails(check: Check, found: str, remedy: str) -> None:
    assert not check.ok
    assert found in check.found
    assert remedy in check.remedy


# --- packages and compilers ------------------------------------------------------------------


def test_the_installed_packages_are_those_the_project_asks_for() -> None:
    check = doctor.packages()
    assert check.ok, check.found
    assert "torch 2" in check.found and "ray 2" in check.found


def test_a_compiler_that_finds_pythons_headers_is_named() -> None:
    check = doctor.compiler(required=True)
    assert check.ok and Path(check.found).exists()


def test_without_a_compiler_on_the_path_the_remedy_names_a_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert_fails(doctor.compiler(required=True), "no c++ on the PATH", "g++")


def test_a_compiler_that_does_not_compile_is_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    assert_fails(doctor.compiler(required=True), "false", "headers")


def test_ninja_is_found_beside_the_interpreter_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert doctor.ninja(required=True).ok


def test_a_compiler_is_only_required_while_the_op_is_not_built(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    compiler, ninja, built = doctor.op(has_gpu=False)
    assert compiler.required and ninja.required and "not built yet" in built.found
    (tmp_path / doctor.OP).mkdir()
    (tmp_path / doctor.OP / f"{doctor.OP}.so").touch()
    compiler, ninja, built = doctor.op(has_gpu=False)
    assert not compiler.required and ninja.required and str(tmp_path) in built.found


def test_gpus_that_a_trial_takes_have_to_be_there() -> None:
    import torch

    there = torch.cuda.device_count()
    assert doctor.gpus(there).ok
    assert_fails(doctor.gpus(there + 1), f"a trial takes {there + 1}", "--address")


# --- folders and disks -----------------------------------------------------------------------


def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("here before")
    assert doctor.shared_folder(tmp_path).ok
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_folder_that_is_not_there_yet_is_made(tmp_path: Path) -> None:
    assert doctor.shared_folder(tmp_path / "results" / "of" / "mine").ok


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("a file stands here")
    assert_fails(doctor.shared_folder(tmp_path / "results"), "results", "--results")


@pytest.mark.skipif(not Path("/proc/sys").exists(), reason="needs a read-only file system")
def test_a_read_only_file_system_is_refused() -> None:
    assert_fails(doctor.shared_folder(Path("/proc/sys/results")), "/proc/sys", "--results")


def test_artifacts_go_where_the_profile_has_them(tmp_path: Path) -> None:
    assert doctor.artifacts(Store(tmp_path / "artifacts")).ok
    (tmp_path / "file").write_text("a file stands here")
    assert_fails(doctor.artifacts(Store(tmp_path / "file")), "file", "the profile's artifacts")


def test_a_disk_too_small_for_the_caches_is_named_with_what_they_need(tmp_path: Path) -> None:
    assert doctor.disk(tmp_path / "not" / "there" / "yet", Needs()).ok
    check = doctor.disk(tmp_path, Needs(cache_bytes=10**18))
    assert_fails(check, "caches of 1e+09 GB", "largest_cache_gb")


def test_the_disk_that_is_looked_at_is_the_one_where_artifacts_go(tmp_path: Path) -> None:
    needs, results, elsewhere = Needs(cache_bytes=10**18), tmp_path / "a", tmp_path / "b"
    for folder in (results, elsewhere):
        folder.mkdir()
    (check,) = doctor.disks(results, needs, Store(results / "artifacts"))
    assert_fails(check, f"in {results}", "largest_cache_gb")
    records, artifacts = doctor.disks(results, needs, Store(elsewhere))
    assert records.ok and f"in {results}" in records.found and "caches" not in records.found
    assert_fails(artifacts, f"in {elsewhere}; the sweep stores caches of 1e+09 GB", "artifacts")


def planned(path: Path, profile: str | None = None) -> tuple[Sweep, SweepPlan]:
    sweep = load(path, profile)
    return sweep, plan_sweep(sweep, enumerate_trials(sweep))


def test_a_sweep_needs_its_correction_and_its_checkpoints_too() -> None:
    sweep, plan = planned(ROOT / "sweeps" / "teacher_correction.yaml", "llama31_8b")
    needs = doctor.needs_of(plan, sweep.resources, ())
    (correct,) = (node.stage_id for node in plan.nodes() if node.kind == "correct")
    without = doctor.needs_of(plan, sweep.resources, {correct})
    teacher = 8_030_261_248
    assert needs.model_bytes - without.model_bytes == 4 * teacher
    assert needs.checkpoint_bytes == 2 * 12 * teacher, "with AdamW's moments, and the one before it"
    assert without.checkpoint_bytes < needs.checkpoint_bytes
    assert needs.from_hub


def test_as_many_checkpoints_are_counted_as_trials_run_at_once(tmp_path: Path) -> None:
    sweep, plan = planned(small_sweep.write(tmp_path))
    one, two = (doctor.needs_of(plan, sweep.resources, (), cores=cores) for cores in (1, 2))
    assert 0 < one.checkpoint_bytes < two.checkpoint_bytes <= 2 * one.checkpoint_bytes
    limited = sweep.resources.model_copy(update={"max_concurrent": 1})
    assert doctor.needs_of(plan, limited, (), cores=2) == one


def test_a_sweep_needs_its_caches_and_models_until_they_are_stored(tmp_path: Path) -> None:
    sweep, plan = planned(small_sweep.write(tmp_path))
    whole = doctor.needs_of(plan, sweep.resources, ())
    assert whole.cache_bytes > 0 and whole.model_bytes > 0 and not whole.from_hub
    assert whole.cache_bytes == sum(node.disk_bytes for node in plan.nodes())
    stored = {node.stage_id for node in plan.nodes() if node.kind == "cache"}
    left = doctor.needs_of(plan, sweep.resources, stored)
    assert left.cache_bytes == 0 and left.model_bytes == whole.model_bytes
    everything = {node.stage_id for node in plan.nodes()}
    nothing = doctor.needs_of(plan, sweep.resources, everything)
    assert nothing.model_bytes == nothing.checkpoint_bytes == 0


# --- MLflow ----------------------------------------------------------------------------------


def test_a_database_that_is_not_there_yet_is_well_and_stays_away(tmp_path: Path) -> None:
    check = doctor.mlflow_store(f"sqlite:///{tmp_path}/mlflow.db")
    assert check.ok and "not there yet" in check.found
    assert not (tmp_path / "mlflow.db").exists()


def test_a_database_opens_is_locked_or_is_none(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    uri = f"sqlite:///{path}"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE runs (id)")
    assert doctor.mlflow_store(uri).ok
    database.execute("BEGIN EXCLUSIVE")
    assert_fails(doctor.mlflow_store(uri, timeout_s=0.1), "locked", "orchestrate mirror")
    database.close()
    path.write_bytes(b"no database at all" * 100)
    assert_fails(doctor.mlflow_store(uri), "not a database", "orchestrate mirror")


def test_a_dead_server_is_told_within_seconds() -> None:
    began = time.monotonic()
    check = doctor.mlflow_store(f"http://127.0.0.1:{free_port()}")
    assert_fails(check, "does not answer", "start the server")
    assert time.monotonic() - began < QUICK_S


def test_a_server_that_never_answers_is_told_within_seconds() -> None:
    began = time.monotonic()
    with listening() as port:
        assert_fails(doctor.mlflow_store(f"http://127.0.0.1:{port}"), "does not answer", "server")
    assert time.monotonic() - began < QUICK_S


def test_another_server_is_not_taken_for_mlflow() -> None:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>welcome</html>")

        def log_message(self, *_: object) -> None:
            """Quiet."""

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        check = doctor.mlflow_store(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert_fails(check, "not as an MLflow server does", "start the server")


def test_a_database_that_is_not_reached_is_told_within_seconds() -> None:
    began = time.monotonic()
    check = doctor.mlflow_store("postgresql://me:hidden@127.0.0.1:1/mlflow")
    assert not check.ok
    assert time.monotonic() - began < QUICK_S


@pytest.mark.parametrize("scheme", ["http", "postgresql"])
def test_a_password_in_the_address_is_not_shown(scheme: str) -> None:
    check = doctor.mlflow_store(f"{scheme}://me:hidden@127.0.0.1:{free_port()}/mlflow", 2.0)
    assert "hidden" not in check.found + check.remedy


@pytest.mark.slow
def test_a_real_mlflow_server_is_recognised(tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    command += ["--port", str(port), "--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db"]
    server = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        patience = time.monotonic() + 120
        check = doctor.mlflow_store(f"http://127.0.0.1:{port}")
        while not check.ok and time.monotonic() < patience:
            time.sleep(1)
            check = doctor.mlflow_store(f"http://127.0.0.1:{port}")
        assert check.ok, check.found
    finally:
        os.killpg(server.pid, 15)
        server.wait()


# --- Ray -------------------------------------------------------------------------------------

OURS = cluster.versions(cluster.SAME_EVERYWHERE)
NODE = Node("first", 8.0, 0.0, None, {}, compiler=True, shares={}, hub_cache="/hub", problem=None)


@pytest.mark.parametrize(
    ("workers", "cpus", "gpus", "fits"),
    [
        (1, 8, 0.0, True),
        (2, 8, 0.0, True),
        (3, 8, 0.0, False),
        (2, 16, 0.0, False),
        (1, 1, 1, False),
    ],
)
def test_a_trial_has_room_where_every_worker_has_a_node(
    workers: int, cpus: int, gpus: float, fits: bool
) -> None:
    seen = View((NODE, NODE), None)
    check = doctor._room(seen, Needs(workers=workers, cpus=cpus, gpus=gpus))
    assert check.ok == fits
    assert fits or "add nodes" in check.remedy


@pytest.mark.parametrize("workers", [1, 2])
def test_the_dashboard_is_required_for_trials_of_several_workers(workers: int) -> None:
    check = doctor._dashboard(View((NODE,), None), Needs(workers=workers))
    assert_fails(check, "does not answer", "ray[default]")
    assert check.required == (workers > 1)


@pytest.mark.parametrize(
    ("node", "found", "remedy"),
    [
        (replace(NODE, problem="no module named torch"), "torch", "constraints.txt"),
        (replace(NODE, versions={**OURS, "ray": "2.0.0"}), "2.0.0 there", "same versions"),
        (replace(NODE, versions=OURS, shares={"/a": True, "/b": False}), "see /b,", "same path"),
        (replace(NODE, versions=OURS, compiler=False), "no C++ compiler", "g++"),
        (replace(NODE, versions=OURS, gpus=8.0, visible_gpus=0), "torch sees 0", "driver"),
    ],
)
def test_a_node_that_cannot_work_with_the_others_is_told_why(
    node: Node, found: str, remedy: str
) -> None:
    assert doctor._node(replace(NODE, versions=OURS)).ok
    assert_fails(doctor._node(node), found, remedy)


def test_nodes_read_models_of_the_hub_from_one_cache() -> None:
    node = replace(NODE, versions=OURS)
    assert doctor._node(node, hub_cache="/hub").ok
    assert_fails(doctor._node(node, hub_cache="/shared/hub"), "are in /hub", "HF_HOME")


def test_the_cache_of_the_hub_is_looked_at_where_the_store_has_links_into_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    address = f"127.0.0.1:{free_port()}"
    for from_hub in (True, False):
        checks = doctor.examine(tmp_path / "results", Needs(from_hub=from_hub), address)
        found = {check.name: check.found for check in checks}
        assert ("Hugging Face cache" in found) == from_hub
        assert not from_hub or str(tmp_path / "hub") in found["Hugging Face cache"]


def test_a_cluster_that_is_not_there_is_told_within_seconds(tmp_path: Path) -> None:
    began = time.monotonic()
    (check,) = doctor.ray_checks(f"127.0.0.1:{free_port()}", [tmp_path], Needs())
    assert_fails(check, "nothing listens", "ray status")
    assert time.monotonic() - began < QUICK_S


# --- the command -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--profile", "tiny"], "--profile needs a sweep"),
        (["--set", "artifacts=/tmp"], "--set needs a sweep"),
        (["sweeps/no_such.yaml"], "no_such.yaml"),
        (["--address", "http://127.0.0.1"], "HOST:PORT"),
        (["--address", "nonsense"], "HOST:PORT"),
    ],
)
def test_bad_input_is_one_message_and_exit_2(arguments: list[str], expected: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert expected in result.output


def test_a_required_check_that_fails_is_exit_1_and_a_line_with_its_remedy(tmp_path: Path) -> None:
    result = call("--address", f"127.0.0.1:{free_port()}", "--results", tmp_path, "--json")
    assert result.exit_code == 1
    checks = {check["name"]: check for check in json.loads(result.output)}
    assert checks["packages"]["ok"] and checks["results folder"]["ok"] and checks["disk"]["ok"]
    assert not checks["Ray"]["ok"] and checks["Ray"]["required"] and checks["Ray"]["remedy"]
    shown = call("--address", f"127.0.0.1:{free_port()}", "--results", tmp_path).output
    assert "FAILS" in shown and "→" in shown


def test_the_folder_that_set_names_is_the_one_that_is_looked_at(tmp_path: Path) -> None:
    sweep, elsewhere = small_sweep.write(tmp_path), tmp_path / "elsewhere"
    where = ["--results", tmp_path / "results", "--address", f"127.0.0.1:{free_port()}"]
    result = call(sweep, "--set", f"artifacts={elsewhere}", *where, "--json")
    checks = {check["name"]: check["found"] for check in json.loads(result.output)}
    assert checks["artifacts"] == f"{elsewhere}: can be written"
    assert f"free in {elsewhere}; the sweep stores" in checks["disk of artifacts"]


@pytest.mark.slow
def test_a_machine_that_runs_sweeps_is_well(tmp_path: Path) -> None:
    sweep = small_sweep.write(tmp_path)
    result = call(sweep, "--results", tmp_path / "results", "--json")
    checks = {check["name"]: check for check in json.loads(result.output)}
    assert result.exit_code == 0, checks
    assert checks["Ray"]["found"].startswith("starts here: 1 node")
    assert checks["Ray's dashboard"]["ok"]
