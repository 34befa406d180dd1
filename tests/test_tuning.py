"""What the driver makes of what its workers report, and of the room that there is for them."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_sweep

from orchestrator import room
from orchestrator.cluster import Room
from orchestrator.jobs import ATTEMPTS, JobQueue, Outcome, make_jobs
from orchestrator.ledger import Ledger
from orchestrator.plan import plan_sweep
from orchestrator.room import NoRoomError, capacity_of
from orchestrator.space import enumerate_trials
from orchestrator.spec import Resources, load
from orchestrator.stopping import NoJudge
from orchestrator.store import Store
from orchestrator.tracking import Mirror
from orchestrator.tuning import Place, _Desk, _ray


class Silent:
    """A watcher that looks away."""

    def waits(self, reason: str) -> None: ...

    def started(self, job_id: str) -> None: ...

    def advanced(
        self, job_id: str, stage: str, done: int, total: int, values: Mapping[str, float]
    ) -> None: ...

    def finished(self, job_id: str, outcome: Outcome, reason: str | None) -> None: ...


def desk(folder: Path) -> tuple[_Desk, Ledger]:
    """Of the small sweep, nothing of which is done yet."""
    sweep = load(small_sweep.write(folder))
    store = Store(folder / "store")
    plan = plan_sweep(sweep, enumerate_trials(sweep))
    jobs = make_jobs(plan, set(), store, sweep.resources)
    place, ledger = Place("small", "micro", folder, store), Ledger(folder / "ledger.jsonl")
    mirror = Mirror(
        f"sqlite:///{folder / 'mlflow.db'}", folder / "mlartifacts", "small", "micro", ""
    )
    return _Desk(JobQueue(jobs), place, ledger, mirror, Silent(), NoJudge()), ledger


def test_a_job_that_stops_unasked_is_tried_again_and_in_the_end_a_row_with_its_reason(
    tmp_path: Path,
) -> None:
    interrupted = {"outcome": "interrupted", "reason": None, "trace": None, "stages": []}
    work, ledger = desk(tmp_path)
    trials = {job.job_id for job in work.queue.waiting if not job.shared}
    for _ in range(ATTEMPTS):
        assert not ledger.trials()
        (job,) = work.next_jobs()
        work.ended(job, interrupted)
    assert work.queue.exhausted
    assert set(ledger.trials()) == trials
    assert all("nobody had asked" in str(t.reason) for t in ledger.trials().values())


@pytest.mark.parametrize("at_once", [2, 64])
def test_a_job_that_memory_never_suffices_for_is_lost_as_often_as_any_other(
    tmp_path: Path, at_once: int
) -> None:
    work, _ = desk(tmp_path)
    (first,) = work.next_jobs()
    for _ in range(ATTEMPTS):
        assert first.job_id not in work.queue.failed
        work.begin([first.job_id])
        at_once = work.memory_ran_out(at_once, "no memory")
        assert at_once == 1
        again = work.next_jobs()
    assert first.job_id in work.queue.failed and first not in again


def test_of_jobs_that_ran_beside_each_other_none_is_charged_and_fewer_run(tmp_path: Path) -> None:
    work, _ = desk(tmp_path)
    (pretrain,) = work.next_jobs()
    work.queue.finish(pretrain.job_id, "completed", None)
    jobs = [job for _ in range(2) for job in work.next_jobs()]
    assert len(jobs) == 2
    work.begin([jobs[0].job_id])
    work.begin([jobs[1].job_id])
    assert work.memory_ran_out(64, "no memory") == 1
    assert {job.job_id for job in jobs} <= {job.job_id for job in work.queue.waiting}
    assert not any(work.queue.attempts[job.job_id] for job in jobs)


def test_workers_load_what_waits_only_while_there_is_more_than_one_can_do(tmp_path: Path) -> None:
    work, _ = desk(tmp_path)
    work.next_jobs()
    assert not work.next_jobs(), "all wait for the first stage"
    found = work.to_import(0)
    assert {"trainers.prune", "trainers.distill", "trainers.evaluate"} <= set(found)
    assert work.to_import(len(work.queue.waiting) - 2)
    assert not work.to_import(len(work.queue.waiting) - 1)


@pytest.mark.parametrize("other", [{"alone": True}, {"cpus": 2}], ids=["timed", "wider"])
def test_no_worker_loads_anything_in_the_way_of_a_job_that_is_timed_or_wider(
    tmp_path: Path, other: Mapping[str, Any]
) -> None:
    work, _ = desk(tmp_path)
    work.next_jobs()
    work.queue.waiting[-1] = replace(work.queue.waiting[-1], **other)
    assert not work.to_import(0)


SMALL, LARGE, GPUS = Room(1, 0), Room(4, 0), Room(8, 4)


@pytest.mark.parametrize(
    ("asked", "nodes", "trials"),
    [
        ({}, [SMALL, SMALL], 2),
        ({"cpus_per_trial": 2}, [LARGE], 2),
        ({"cpus_per_trial": 8}, [SMALL, LARGE], 1),
        ({"gpus_per_worker": 1}, [LARGE], 0),
        ({"gpus_per_worker": 1}, [LARGE, GPUS], 4),
        ({"gpus_per_worker": 0.5, "cpus_per_trial": 2}, [GPUS], 4),
        ({"gpus_per_worker": 8}, [GPUS, GPUS], 0),
        ({"workers": 2}, [SMALL, SMALL, SMALL], 1),
        ({"workers": 2, "cpus_per_trial": 2}, [SMALL] * 4, 0),
        ({"workers": 2, "gpus_per_worker": 1}, [LARGE, LARGE], 0),
        ({"workers": 4, "gpus_per_worker": 1}, [GPUS, GPUS], 2),
        ({"workers": 2}, [Room(0, 0), LARGE], 2),
        ({}, [Room(0, 0)], 0),
    ],
)
def test_a_trial_has_room_where_nodes_hold_each_of_its_workers(
    asked: dict[str, Any], nodes: list[Room], trials: int
) -> None:
    assert capacity_of(nodes, Resources(**asked)).trials == trials


def test_a_worker_takes_no_more_cpus_than_a_node_that_has_its_gpus() -> None:
    assert capacity_of([SMALL, SMALL], Resources(cpus_per_trial=2)).widest == 1
    assert capacity_of([Room(64, 0), GPUS], Resources(gpus_per_worker=1)).widest == 8


@pytest.mark.slow
def test_a_cluster_is_given_a_while_for_nodes_and_not_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})

    def adds(reason: str) -> None:
        assert "2 workers, each of 1 CPUs; the nodes: 1 x 1 CPUs" in reason
        made.add_node(num_cpus=1)

    try:
        with _ray(made.address, dashboard=False):
            two, gpu = Resources(workers=2), Resources(gpus_per_worker=1)
            found = room.wait_for(two, made.address, adds, lambda: False)
            assert found.trials == 1
            monkeypatch.setattr(room, "NODES_S", 1.0)
            with pytest.raises(NoRoomError, match="one worker of 1 CPUs and 1 GPUs"):
                room.wait_for(gpu, made.address, lambda _: None, lambda: False)
    finally:
        made.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda each: each.name)
def test_a_sweep_that_waits_for_nodes_can_be_stopped(
    tmp_path: Path, number: signal.Signals
) -> None:
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    sweep, log = small_sweep.write(tmp_path / "sweeps"), tmp_path / "log"
    options = ("--address", made.address, "--set", "resources.gpus_per_worker=1")
    command = small_sweep.command(sweep, tmp_path / "results", *options)
    try:
        with log.open("w") as stream:
            run = subprocess.Popen(command, stdout=stream, stderr=stream)
            until = time.monotonic() + 120
            while "waiting for more" not in log.read_text():
                assert run.poll() is None and time.monotonic() < until, log.read_text()
                time.sleep(0.1)
            run.send_signal(number)
            assert run.wait(120) == 130, log.read_text()
        assert "the same command goes on from here" in log.read_text()
    finally:
        run.kill()
        made.shutdown()


def test_what_asked_an_earlier_run_to_stop_asks_no_later_one(tmp_path: Path) -> None:
    """Even while a worker still sees the file that has been removed, as it may over NFS."""
    store = Store(tmp_path / "store")
    earlier, later = (Place("small", "micro", tmp_path, store) for _ in range(2))
    earlier.stop_file.touch()
    earlier.early_stops.mkdir()
    earlier.early_stop_file("trial").touch()
    assert not later.stop_file.exists() and not later.early_stop_file("trial").exists()
    later.remove_stops()
    assert not earlier.stop_file.exists() and not earlier.early_stops.exists()
