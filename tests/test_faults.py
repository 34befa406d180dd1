"""Nothing lost, whatever dies: real sweeps, disturbed in every way that we could think of.

Each is compared with the same sweep left in peace. No finished work is repeated, no row lost or
doubled, what failed has a reason in its row, and once the cause is gone the same command completes.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fault_tools as faults
import psutil
import pytest
import small_sweep
from click.testing import CliRunner
from fault_tools import NAME, STEPS, SWEEP, TRIALS, Finished, Run, nothing_lost, rows

from orchestrator.cli import app

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "fault-aws-secret-0xA1",
    "HF_TOKEN": "hf_faultsecret0xB2",
    "MLFLOW_TRACKING_PASSWORD": "fault-mlflow-secret-0xC3",
}


# --- the sweep in peace ----------------------------------------------------------------------


@dataclass
class Calm(Run):
    """The sweep undisturbed, with the addresses at which any of its processes listened."""

    listened: set[str] = field(default_factory=set)
    sweep: Path = Path()
    store: Path = Path()
    """An MLflow store with nothing in it: to make one takes seconds."""

    def students(self) -> set[str]:
        return faults.of_students(self.results)


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """Where everything of these tests is, temporary files of Ray and Tune included. Its name is
    short: the paths of sockets must be."""
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    (folder / "t").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder / "t"))
        yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def calm(place: Path) -> Calm:
    sweep = small_sweep.write(place / "sweeps", SWEEP, NAME)
    run = faults.start(sweep, place / "calm", **SECRETS)
    found = Calm(run.process, run.log, run.results, sweep=sweep, store=place / "empty.db")
    _make_store(found.store)
    while run.process.poll() is None:
        found.listened |= {host for process in run.tree() for host in _listens(process)}
        time.sleep(0.2)
    run.ends(0)
    assert len(rows(run.folder, "trials")) == TRIALS
    return found


def _make_store(path: Path) -> None:
    from mlflow.tracking import MlflowClient

    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()


def _listens(process: psutil.Process) -> list[str]:
    with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        connections = process.net_connections(kind="inet")
        return [each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN]
    return []


Prepare = Callable[..., Path]


@pytest.fixture
def prepared(calm: Calm, place: Path, request: pytest.FixtureRequest) -> Prepare:
    """A results folder in which what the trials share is stored already, and unless `students`
    nothing else; it lies in `within`."""

    def prepare(name: str = "results", within: Path | None = None, students: bool = False) -> Path:
        results = (within or place / request.node.name[:40]) / name
        leave_out = () if students else calm.students()
        faults.copy_artifacts(calm.results, results, leave_out)
        shutil.copyfile(calm.store, results / "mlflow.db")
        return results

    return prepare


def test_secrets_of_the_environment_reach_no_file_of_the_results(calm: Calm) -> None:
    files = [path for path in calm.results.rglob("*") if path.is_file()]
    assert calm.results / "mlflow.db" in files and calm.folder / "ledger.jsonl" in files
    for path in files:
        data = path.read_bytes()
        for name, secret in SECRETS.items():
            assert secret.encode() not in data, f"{name} stands in {path}"
    assert not any(secret in calm.output for secret in SECRETS.values())


def test_nothing_listens_beyond_this_machine(calm: Calm) -> None:
    assert calm.listened, "Ray listens somewhere, or nothing was seen"
    assert calm.listened <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


# --- processes that die ----------------------------------------------------------------------


def test_a_dead_worker_is_replaced_a_bounded_number_of_times(calm: Calm, prepared: Prepare) -> None:
    """One student's worker is killed whenever it gets anywhere, the other's once, late."""
    results = prepared()
    finished = Finished.of(results)
    options = ("--max-concurrent", "1", "--set", "resources.checkpoint_every_s=0.001")
    run = faults.start(calm.sweep, results, *options)
    run.until(lambda: faults.furthest(results), "a student had a checkpoint")
    unlucky, reached, kills, late = next(iter(faults.steps(results))), 0, 0, False
    while run.process.poll() is None:
        for stage_id, step in faults.steps(results).items():
            if stage_id == unlucky and step > reached:
                assert kills < 10, "it is tried for ever"
                faults.kill(run.workers())
                reached, kills = step, kills + 1
            elif stage_id != unlucky and step > STEPS // 2 and not late:
                faults.kill(run.workers())
                late = True
        time.sleep(0.01)
    run.ends(1)
    assert late and kills == 3, "tried once, and twice again"
    (failed,) = [trial for trial in rows(run.folder, "trials") if trial["status"] == "failed"]
    assert "died" in failed["reason"]
    assert failed["reason"] in run.output

    again = faults.start(calm.sweep, results)
    again.ends(0)
    nothing_lost(again, calm)
    finished.is_untouched(results)


def test_workers_that_a_node_has_no_memory_for_are_tried_again_with_fewer_at_once(
    calm: Calm, prepared: Prepare
) -> None:
    """Ray kills a worker in the middle of its work when a node's memory is nearly used up."""
    results = prepared()
    finished = Finished.of(results)
    memory = psutil.virtual_memory()
    most = memory.total - memory.available + 5e9
    threshold = f"{most / memory.total:.4f}"
    run = faults.start(calm.sweep, results, RAY_memory_usage_threshold=threshold)
    ballast: list[mmap.mmap] = []

    def fill(left: float) -> None:
        # Again and again: what runs beside this test gives memory back, too.
        room = int(psutil.virtual_memory().available - (memory.total - most) - left)
        if room > 50e6:
            how = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
            ballast.append(mmap.mmap(-1, room, flags=how))

    def reached() -> bool:
        fill(left=2e9)  # most of it now: the student takes seconds
        return bool(faults.furthest(results))

    def killed() -> bool:
        fill(left=-1e9)
        return "ran low on memory" in run.output

    run.until(reached, "a student had a checkpoint")
    run.until(killed, "a worker was killed")
    ballast.clear()
    run.ends(0)
    nothing_lost(run, calm)
    finished.is_untouched(results)


def test_a_worker_that_never_has_the_memory_to_start_is_told_in_a_line(
    calm: Calm, prepared: Prepare
) -> None:
    run = faults.start(calm.sweep, prepared(), RAY_memory_usage_threshold="0.001")
    run.ends(1)
    failed = [trial for trial in rows(run.folder, "trials") if trial["status"] == "failed"]
    assert failed
    for trial in failed:
        assert "its node ran low on memory (tried 3 times)" in trial["reason"]


def test_signals_save_or_stop_at_once(calm: Calm, prepared: Prepare) -> None:
    """Ctrl-C once drains and saves, twice stops now; the same command goes on from there."""
    results = prepared()
    first = faults.start(calm.sweep, results)
    first.until(lambda: faults.furthest(results), "a student had a checkpoint")
    os.killpg(first.process.pid, signal.SIGINT)  # as a terminal sends it: to all of the session
    assert "interrupted" in first.ends(130, within_s=60)
    saved = faults.furthest(results)
    assert 0 < saved < STEPS, "the half-done student was not kept"

    second = faults.start(calm.sweep, results)
    second.until(lambda: faults.furthest(results) > saved, "the student went on")
    os.killpg(second.process.pid, signal.SIGINT)
    time.sleep(0.2)
    os.killpg(second.process.pid, signal.SIGINT)
    second.ends(130, within_s=20)
    assert not [p for p in second.workers() if p.is_running()]
    finished = Finished.of(results)

    last = faults.start(calm.sweep, results)
    last.ends(0)
    nothing_lost(last, calm)
    finished.is_untouched(results)


@pytest.fixture(scope="module")
def cluster(place: Path) -> Iterator[Any]:
    """A Ray cluster on this machine, for runs that join one."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield made
    made.shutdown()


def test_a_node_that_dies_takes_no_trial_with_it(
    calm: Calm, prepared: Prepare, cluster: Any
) -> None:
    results = prepared()
    second = cluster.add_node(num_cpus=1)
    finished = Finished.of(results)
    run = faults.start(calm.sweep, results, "--address", cluster.address)
    try:
        run.until(lambda: len(faults.steps(results)) == 2, "both nodes had a student")
    finally:
        cluster.remove_node(second, allow_graceful=False)
    reached = faults.steps(results)
    assert reached
    run.ends(0)
    nothing_lost(run, calm)
    finished.is_untouched(results)


ONE_STUDENT = ("--set", "axes.distill.training.learning_rate=[0.002]", "--max-concurrent", "1")


@pytest.mark.timeout(1800)
def test_a_trial_of_several_workers_that_loses_one_is_tried_again(
    calm: Calm, prepared: Prepare
) -> None:
    """Ray Train's workers are two processes that the one which waits for them outlives."""
    results = prepared()
    finished = Finished.of(results)
    several = ("--set", "resources.workers=2", "--set", "distill.training.steps=100")
    run = faults.start(calm.sweep, results, *ONE_STUDENT, *several)
    run.until(lambda: faults.furthest(results), "the student had a checkpoint")
    faults.kill(run.workers("RayTrainWorker")[:1])
    told = run.ends(0, within_s=600)
    assert re.search(r"lost .*: worker [12] of 2 died: ", told), told
    trials = rows(run.folder, "trials")
    assert [trial["status"] for trial in trials] == ["completed"] * (TRIALS - 1)
    ran = [stage["stage_id"] for stage in rows(run.folder, "stages") if not stage["cached"]]
    assert len(ran) == len(set(ran))
    finished.is_untouched(results)


@pytest.mark.timeout(1800)
def test_the_driver_may_die_wherever_it_writes_its_ledger(
    calm: Calm, prepared: Prepare, cluster: Any
) -> None:
    """Killed in the middle of an event's bytes, and killed when they are written."""
    cluster.add_node(num_cpus=2)
    options = (*ONE_STUDENT, "--address", cluster.address)
    usual = faults.start(calm.sweep, prepared("usual", students=True), *options)
    usual.ends(0)
    killer = [sys.executable, str(Path(__file__).with_name("dies_at.py"))]

    def dies(moment: tuple[str, int, str]) -> None:
        results = prepared("-".join(map(str, moment)), students=True)
        finished = Finished.of(results)
        run = faults.start(calm.sweep, results, *options, command=[*killer, *map(str, moment)])
        assert run.process.wait(faults.PATIENCE_S) == -signal.SIGKILL, run.output
        last = faults.start(calm.sweep, results, *options)
        last.ends(0)
        nothing_lost(last, usual)
        finished.is_untouched(results)
        trials = {
            trial["trial_id"]: trial["mlflow_run_id"] for trial in rows(last.folder, "trials")
        }
        assert faults.mirrored(results) == sorted(trials.items())

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(dies, _moments(usual)))


def _moments(usual: Run) -> list[tuple[str, int, str]]:
    """An event by its kind and number, and a moment of it: both moments of each, but of stages, of
    which there are many, one of every second."""
    lines = (usual.folder / "ledger.jsonl").read_text().splitlines()
    written = Counter(json.loads(line)["event"] for line in lines)
    assert set(written) == {"trial", "stage", "scores", "tracked"} and written["trial"] == 2
    return [
        (kind, number, moment)
        for kind, many in written.items()
        for number in range(1, many + 1)
        for turn, moment in enumerate(("middle", "after"))
        if kind != "stage" or number % 4 == 1 + 2 * turn
    ]


# --- disks -----------------------------------------------------------------------------------

NO_CHECKPOINTS = ("--set", "resources.checkpoint_every_s=10000")


@pytest.mark.parametrize(
    ("written", "options", "students"),
    [
        ("a checkpoint", (), False),
        ("an artifact", NO_CHECKPOINTS, False),
        ("the ledger", (), True),
    ],
)
def test_a_full_disk_is_told_and_what_was_done_stays(
    calm: Calm, prepared: Prepare, place: Path, written: str, options: Sequence[str], students: bool
) -> None:
    with faults.small_disk(place / written.split()[-1], 48) as disk:
        results = prepared(within=disk, students=students)
        run = faults.start(calm.sweep, results, *options)
        moments = {
            "a checkpoint": lambda: faults.furthest(results),
            "an artifact": lambda: any((results / "artifacts/.working").glob("distill-*")),
            "the ledger": run.workers,
        }
        run.until(moments[written], f"{written} was written")
        faults.fill(disk)
        finished = Finished.of(results)
        told = run.ends(1)
        assert "No space left" in told or "disk is full" in told
        assert _reasons_are_told(run)

        faults.enlarge(disk, 96)
        again = faults.start(calm.sweep, results, *options)
        again.ends(0)
        nothing_lost(again, calm)
        finished.is_untouched(results)


def _reasons_are_told(run: Run) -> bool:
    """Every row of the records that failed has its reason, which was printed too."""
    if not (run.folder / "trials.parquet").exists():
        return True
    failed = [trial for trial in rows(run.folder, "trials") if trial["status"] == "failed"]
    return all(trial["reason"] and trial["reason"] in run.output for trial in failed)


def test_a_disk_that_is_full_from_the_start_is_told_in_one_line(
    calm: Calm, prepared: Prepare, place: Path
) -> None:
    with faults.small_disk(place / "full", 24) as disk:
        results = prepared(within=disk, students=True)
        faults.fill(disk)
        run = faults.start(calm.sweep, results)
        assert run.process.wait(faults.PATIENCE_S) in (1, 2)
        assert "No space left" in run.output and "Traceback" not in run.output
        assert len(run.output.splitlines()) <= 3, run.output


def test_a_file_system_that_is_lost_for_a_while_costs_no_finished_work(
    calm: Calm, prepared: Prepare, place: Path
) -> None:
    with faults.small_disk(place / "network", 96) as disk:
        results = prepared(within=disk)
        run = faults.start(calm.sweep, results)
        run.until(lambda: faults.furthest(results), "a student had a checkpoint")
        faults.make_read_only(results)
        finished = Finished.of(results)
        assert "Read-only file system" in run.ends(1)
        faults.make_writable(results)

        again = faults.start(calm.sweep, results)
        again.ends(0)
        nothing_lost(again, calm)
        finished.is_untouched(results)


# --- damaged files ---------------------------------------------------------------------------


def _copy_of(calm: Calm, results: Path) -> Path:
    """All that the undisturbed run left, less its MLflow store; gives the sweep's folder."""
    faults.copy_artifacts(calm.results, results)
    shutil.copyfile(calm.store, results / "mlflow.db")
    shutil.copytree(calm.folder, results / NAME / "micro")
    return results / NAME / "micro"


def _ledger_flipped(folder: Path) -> None:
    """A digit of a measurement is another one: the line is still valid JSON."""
    faults.flip_bit(folder / "ledger.jsonl", b'"lm_loss.after":')


def _ledger_cut_off(folder: Path) -> None:
    faults.cut_off(folder / "ledger.jsonl", 0.4)


def _records_damaged(folder: Path) -> None:
    for number, path in enumerate(sorted(folder.glob("*.parquet"))):
        (faults.cut_off, faults.flip_bit, lambda path: path.write_bytes(b""))[number % 3](path)


@pytest.mark.parametrize("damage", [_ledger_flipped, _ledger_cut_off, _records_damaged])
def test_damaged_records_are_written_anew_from_what_is_stored(
    calm: Calm, place: Path, damage: Callable[[Path], None]
) -> None:
    results = place / damage.__name__
    folder = _copy_of(calm, results)
    before = {path.name: path.read_bytes() for path in folder.glob("*.parquet")}
    damage(folder)
    finished = Finished.of(results)
    run = faults.start(calm.sweep, results)
    run.ends(0)
    nothing_lost(run, calm)
    finished.is_untouched(results)
    assert {path.name for path in folder.glob("*.parquet")} == set(before)


@pytest.mark.parametrize("command", ["report", "best", "publish"])
@pytest.mark.parametrize("damage", [faults.cut_off, lambda path: path.write_bytes(b"")])
def test_damaged_records_are_told_in_one_line(
    calm: Calm, tmp_path: Path, command: str, damage: Callable[[Path], None]
) -> None:
    folder = _copy_of(calm, tmp_path / "results")
    damage(folder / "trials.parquet")
    (folder / "best.json").unlink()
    done = CliRunner().invoke(
        app, [command, str(calm.sweep), "--results", str(tmp_path / "results")]
    )
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == 2
    assert "trials.parquet" in done.output or "best.json" in done.output


@pytest.fixture(scope="module")
def interrupted(calm: Calm, place: Path) -> Path:
    """A sweep that was stopped with a student half done, after Tune's own state was torn."""
    results = place / "interrupted"
    faults.copy_artifacts(calm.results, results, calm.students())
    shutil.copyfile(calm.store, results / "mlflow.db")
    run = faults.start(calm.sweep, results)
    run.until(lambda: faults.furthest(results), "a student had a checkpoint")
    state = [
        path
        for pattern in ("experiment_state*", "searcher-state*", "search_gen_state*", "tuner.pkl")
        for path in (place / "t").rglob(pattern)
    ]
    assert state, "Tune keeps a state of its own somewhere"
    for path in state:
        with suppress(FileNotFoundError):
            faults.cut_off(path, 0.5)
    os.kill(run.process.pid, signal.SIGTERM)
    run.ends(130, within_s=60)
    assert faults.steps(results)
    return results


@pytest.mark.parametrize("damage", [faults.cut_off, faults.flip_bit, None])
def test_a_student_with_a_damaged_checkpoint_starts_anew(
    calm: Calm, interrupted: Path, place: Path, damage: Callable[[Path], None] | None
) -> None:
    results = place / f"shard-{damage.__name__ if damage else 'whole'}"
    shutil.copytree(interrupted, results)
    shards = list((results / "artifacts/.working").glob("distill-*/checkpoints/step*/*.pt"))
    weights = [path for path in shards if "model_states" in path.name]
    assert weights
    for path in weights if damage else ():
        damage(path)
    run = faults.start(calm.sweep, results)
    run.ends(0)
    nothing_lost(run, calm)


# --- trials that fail by themselves ----------------------------------------------------------

VARIANTS = {
    **SWEEP,
    "axes": {
        "student": {
            "variants": {
                "usual": {"distill.training.learning_rate": 2e-3},
                "diverging": {"distill.training.learning_rate": 1e30},
                # About 0.6 GB, where the others take a few MB.
                "large": {
                    "distill.training.steps": 4,
                    "distill.training.batch_size": 4096,
                    "distill.training.warmup_steps": 1,
                },
            }
        }
    },
}


def test_what_a_trial_brings_on_itself_is_its_own_failure_and_not_tried_again(
    calm: Calm, place: Path
) -> None:
    """One student diverges, another needs more memory than its worker may have."""
    folder = place / "variants"
    sweep = small_sweep.write(folder / "sweeps", VARIANTS, NAME)
    results = folder / "results"
    faults.copy_artifacts(calm.results, results)
    shutil.copyfile(calm.store, results / "mlflow.db")
    run = faults.start(sweep, results, "--max-concurrent", "1")
    run.until(lambda: "failed     student=diverging" in run.output, "a student had diverged")
    for worker in run.workers():
        limit = worker.memory_info().vms + 200 * 2**20
        worker.rlimit(psutil.RLIMIT_AS, (limit, limit))
    told = run.ends(1)
    by_name = {trial["axis.student"]: trial for trial in rows(run.folder, "trials")}
    assert by_name["usual"]["status"] == by_name[None]["status"] == "completed"
    diverged, large = by_name["diverging"], by_name["large"]
    assert "the loss is" in diverged["reason"] and "at step" in diverged["reason"]
    assert "memory" in large["reason"]
    for trial in (diverged, large):
        assert trial["status"] == "failed" and trial["reason"] in told
        assert all(value is None for key, value in trial.items() if key.startswith("metric."))
    assert told.count("started    student=diverging") == 1
    assert told.count("started    student=large") == 1

    finished = Finished.of(results)
    again = faults.start(sweep, results)
    again.ends(1)
    by_name = {trial["axis.student"]: trial for trial in rows(run.folder, "trials")}
    assert by_name["large"]["status"] == "completed", "there is memory enough now"
    assert by_name["diverging"]["reason"] == diverged["reason"]
    finished.is_untouched(results)


# --- the same at once, and clocks ------------------------------------------------------------

CLOCK = """
import os, time
_time, _time_ns, _flag = time.time, time.time_ns, os.environ["FAULT_CLOCK"]
time.time = lambda: _time() - 7200 * os.path.exists(_flag)
time.time_ns = lambda: _time_ns() - 7200 * 10**9 * os.path.exists(_flag)
"""
"""Every Python process of the run reads its clock so: two hours back once the file is there."""


def test_a_sweep_that_runs_is_not_started_again_and_survives_a_clock_set_back(
    calm: Calm, prepared: Prepare, place: Path
) -> None:
    results, clock, flag = prepared(), place / "clock", place / "clock" / "back"
    clock.mkdir()
    (clock / "sitecustomize.py").write_text(CLOCK)
    path = os.pathsep.join(filter(None, (str(clock), os.environ.get("PYTHONPATH"))))
    run = faults.start(calm.sweep, results, PYTHONPATH=path, FAULT_CLOCK=str(flag))
    run.until(lambda: faults.furthest(results), "a student had a checkpoint")
    flag.touch()

    second = small_sweep.run(calm.sweep, results)
    assert second.returncode == 2
    assert "running already" in second.stderr and str(run.process.pid) in second.stderr
    assert socket.gethostname() in second.stderr

    run.ends(0)
    nothing_lost(run, calm)
    for trial in rows(run.folder, "trials"):
        assert trial["started_at"] <= trial["ended_at"]
        assert 0 <= trial["wall_s"] < 600
    for manifest in faults.manifests(results).values():
        assert manifest["started_at"] <= manifest["ended_at"]
        assert 0 <= manifest["wall_s"] < 600


def test_a_holder_that_died_holds_nothing(calm: Calm, prepared: Prepare) -> None:
    """kill -9 of everything at once leaves leases behind: the next start takes them over."""
    results = prepared()
    run = faults.start(calm.sweep, results)
    run.until(lambda: faults.furthest(results), "a student had a checkpoint")
    run.kill()
    assert (run.folder / ".running").exists()
    assert list((results / "artifacts" / ".leases").iterdir())
    reached, finished = faults.furthest(results), Finished.of(results)
    again = faults.start(calm.sweep, results)
    again.until(
        lambda: faults.furthest(results) > reached or Finished.of(results) != finished,
        "a student went on",
    )
    again.ends(0)
    nothing_lost(again, calm)
    finished.is_untouched(results)
