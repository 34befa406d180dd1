"""MLflow as a mirror: servers that are down, die or hang cost a sweep one warning, and `orchestrate
mirror` makes up for them. With real servers and real sweeps."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import made_up
import pyarrow.parquet as parquet
import pytest
import small_sweep
from click.testing import CliRunner, Result

from orchestrator import report
from orchestrator.cli import app
from orchestrator.leases import Lease
from orchestrator.ledger import Ledger
from orchestrator.records import read_parquet, write_parquet

PASSWORD, SECRET = "hunter2-of-mlflow", "secret-in-the-environment"
TRIALS = 6
OF_THE_RUN = {"cpu_s", "gpu_s", "wall_s", "mlflow_run_id", "started_at", "ended_at", "time_ms"}
"""What differs between two runs of the same sweep."""
LONGER = ("--set", "distill.training.steps=200")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


# --- rebuilding from the records ---------------------------------------------------------------


def mirror(results: Path, *arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["mirror", *map(str, arguments), "--results", str(results)])


def runs_in(uri: str, sweep: str) -> list[Any]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(sweep)
    return list(client.search_runs([experiment.experiment_id])) if experiment else []


def runs_at(results: Path) -> list[Any]:
    return runs_in(f"sqlite:///{results}/mlflow.db", "depth_ablation")


def record(folder: Path) -> None:
    """A sweep that ran: parquet files and report."""
    records = made_up.records(questions=5)
    write_parquet(records, folder)
    (folder / "sweep.yaml").write_text("name: depth_ablation\n")
    report.write(records, folder, "Which layers?", "accuracy.mean", "max", "orchestrate …")


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_published_records_are_mirrored_and_stay_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "published" / "depth_ablation" / "made_up"
    record(folder)
    before = files_of(folder)
    trials = len(read_parquet(folder).trials)
    first = mirror(tmp_path)
    assert first.exit_code == 0, first.output
    assert f"depth_ablation at made_up: {trials} of {trials} trials written" in first.output
    shown = {run.info.run_id for run in runs_at(tmp_path)}
    assert len(shown) == trials + 1
    again = mirror(tmp_path)
    assert f"0 of {trials} trials written" in again.output
    assert {run.info.run_id for run in runs_at(tmp_path)} == shown
    assert files_of(folder) == before


def test_ones_own_records_come_from_the_ledger_and_learn_the_ids_of_their_runs(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "depth_ablation" / "made_up"
    record(folder)
    ledger = Ledger(folder / "ledger.jsonl")
    told = made_up.records(questions=5)
    for trial in told.trials:
        ledger.trial(trial, [point for point in told.curves if point.trial_id == trial.trial_id])
    order = [trial.trial_id for trial in told.trials]
    done = mirror(tmp_path, "--profile", "made_up")
    assert done.exit_code == 0, done.output
    trials = read_parquet(folder).trials
    assert [trial.trial_id for trial in trials] == order
    runs = {run.info.run_id: run for run in runs_at(tmp_path)}
    for trial in trials:
        assert runs[str(trial.mlflow_run_id)].data.tags["orchestrate.trial_id"] == trial.trial_id


def test_a_sweep_that_runs_is_left_to_itself(tmp_path: Path) -> None:
    folder = tmp_path / "depth_ablation" / "made_up"
    record(folder)
    Ledger(folder / "ledger.jsonl").trial(made_up.records(5).trials[0])
    with Lease(folder / ".running").at_once():
        done = mirror(tmp_path)
    assert done.exit_code == 0
    assert "shows itself" in done.output
    assert not (tmp_path / "mlflow.db").exists()


def test_without_results_there_is_one_message_and_exit_2(tmp_path: Path) -> None:
    done = mirror(tmp_path / "results")
    assert done.exit_code == 2
    assert "no results" in done.output
    sweep = small_sweep.write(tmp_path)
    assert mirror(tmp_path / "results", sweep).exit_code == 2


def test_a_server_that_is_not_there_is_one_plain_message_and_exit_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for profile in ("one", "two"):
        record(tmp_path / "published" / "depth_ablation" / profile)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{PASSWORD}@127.0.0.1:{closed_port()}")
    done = mirror(tmp_path)
    assert done.exit_code == 1
    assert done.output.count("cannot be reached (connection refused)") == 1
    assert PASSWORD not in done.output


# --- servers -----------------------------------------------------------------------------------


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Server:
    """MLflow's own server, on this machine alone, with a database of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, closed_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.folder.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "log.txt").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True
            )
        until(self._answers, self._process)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def kill(self) -> None:
        """At once, with all processes that it started."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


def until(reached: Callable[[], bool], process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + 240
    while not reached():
        assert process.poll() is None, "it ended first"
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    found = Server(tmp_path / "server")
    yield found
    found.kill()


# --- sweeps beside them ------------------------------------------------------------------------


class Calm:
    """A sweep that ran undisturbed."""

    def __init__(self, folder: Path) -> None:
        self.sweep = small_sweep.write(folder / "sweeps")
        self.results = folder / "results"
        self.folder = self.results / "small" / "micro"
        done = small_sweep.run(self.sweep, self.results, *LONGER)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Calm:
    return Calm(tmp_path_factory.mktemp("calm"))


def start(calm: Calm, results: Path, uri: str, *options: str) -> subprocess.Popen[str]:
    """The same sweep with a server at `uri`, and with secrets in the environment."""
    secrets = ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN")
    environment = {**os.environ, **dict.fromkeys(secrets, SECRET)}
    return subprocess.Popen(
        small_sweep.command(calm.sweep, results, *LONGER, *options),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**environment, "MLFLOW_TRACKING_URI": uri},
    )


def copy_artifacts(calm: Calm, results: Path, without: tuple[str, ...] = ()) -> None:
    ignored = shutil.ignore_patterns(*(f"{kind}-*" for kind in without), ".working", ".leases")
    shutil.copytree(calm.results / "artifacts", results / "artifacts", ignore=ignored)


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    found = parquet.read_table(folder / f"{name}.parquet").to_pylist()
    return [{k: v for k, v in row.items() if k not in OF_THE_RUN} for row in found]


def assert_unaffected(results: Path, calm: Calm) -> None:
    for name in ("trials", "curves", "items", "importance"):
        assert rows(results / "small" / "micro", name) == rows(calm.folder, name), name


def assert_one_warning(output: str) -> None:
    lines = [line for line in output.splitlines() if "MLflow" in line]
    assert len([line for line in lines if "does not show everything" in line]) == 1, output
    assert "orchestrate mirror" in output
    assert "Traceback" not in output


def assert_secret(folder: Path) -> None:
    """No file below the folder tells a secret, whatever it is packed in."""
    for path in folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            if path.suffix == ".parquet":
                data += str(parquet.read_table(path).to_pylist()).encode()
            for secret in (PASSWORD, SECRET):
                assert secret.encode() not in data, path


def ended_after(results: Path) -> float:
    """Seconds since the last word in the ledger."""
    return time.time() - (results / "small" / "micro" / "ledger.jsonl").stat().st_mtime


def assert_complete(uri: str, folder: Path) -> None:
    """MLflow shows every trial once, with its curve."""
    from mlflow.tracking import MlflowClient

    runs = {run.info.run_id: run for run in runs_in(uri, "small")}
    trials = parquet.read_table(folder / "trials.parquet").to_pylist()
    assert len(runs) == len(trials) + 1 == TRIALS + 1
    curves = parquet.read_table(folder / "curves.parquet").to_pylist()
    for trial in trials:
        run = runs[trial["mlflow_run_id"]]
        assert run.info.status == "FINISHED"
        assert run.data.metrics["accuracy.mean"] == trial["metric.accuracy.mean"]
        mine = [row for row in curves if row["trial_id"] == trial["trial_id"]]
        points = [row for row in mine if row["name"] == "loss"]
        history = MlflowClient(uri).get_metric_history(run.info.run_id, "loss")
        assert len(history) == len(points)


@pytest.mark.faults
@pytest.mark.parametrize("how", ["refuses", "hangs"])
def test_a_server_that_is_down_for_good_costs_a_sweep_one_warning(
    how: str, calm: Calm, tmp_path: Path
) -> None:
    results = tmp_path / "results"
    copy_artifacts(calm, results)
    # A socket that listens takes connections; nobody ever answers them.
    with socket.create_server(("127.0.0.1", 0), backlog=128) as silent:
        port = closed_port() if how == "refuses" else silent.getsockname()[1]
        process = start(calm, results, f"http://me:{PASSWORD}@127.0.0.1:{port}")
        output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert ended_after(results) < 60
    assert_one_warning(output)
    assert PASSWORD not in output and SECRET not in output
    assert_unaffected(results, calm)
    assert_secret(results / "small")


@pytest.mark.faults
def test_a_server_that_dies_in_the_middle_is_made_up_for_by_mirror(
    calm: Calm, server: Server, tmp_path: Path
) -> None:
    results = tmp_path / "results"
    folder = results / "small" / "micro"
    copy_artifacts(calm, results, without=("distill", "evaluate"))
    server.start()
    uri = server.uri.replace("//", f"//me:{PASSWORD}@")
    process = start(calm, results, uri, "--max-concurrent", "1")

    def shown() -> int:
        ledger = folder / "ledger.jsonl"
        text = ledger.read_text() if ledger.exists() else ""
        return text.count('"event":"tracked","trial_id":"')

    until(lambda: shown() > 0, process)
    server.kill()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert 0 < shown() < TRIALS
    assert ended_after(results) < 60
    assert_one_warning(output)
    assert PASSWORD not in output and SECRET not in output
    assert_unaffected(results, calm)

    os.environ["MLFLOW_TRACKING_URI"] = uri
    down = mirror(results, calm.sweep)
    assert down.exit_code == 1
    assert "cannot be reached" in down.output and PASSWORD not in down.output

    server.start()
    first = mirror(results, calm.sweep)
    assert first.exit_code == 0, first.output
    assert "small at micro:" in first.output
    assert_complete(server.uri, folder)
    again = mirror(results, calm.sweep)
    assert f"0 of {TRIALS} trials written" in again.output
    assert_complete(server.uri, folder)
    assert_unaffected(results, calm)
    server.kill()
    assert_secret(results / "small")
    assert_secret(server.folder)


@pytest.mark.faults
def test_a_lost_database_is_rebuilt_from_the_records(calm: Calm, tmp_path: Path) -> None:
    results = tmp_path / "results"
    shutil.copytree(calm.folder, results / "small" / "micro")
    uri = f"sqlite:///{results}/mlflow.db"
    before = files_of(results / "small" / "micro" / "tables")
    for written in (TRIALS, 0):
        done = mirror(results, calm.sweep)
        assert done.exit_code == 0, done.output
        assert f"{written} of {TRIALS} trials written" in done.output
        assert_complete(uri, results / "small" / "micro")
    assert files_of(results / "small" / "micro" / "tables") == before
    assert_unaffected(results, calm)
