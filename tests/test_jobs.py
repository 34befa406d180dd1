"""Which job is handed out when, and what happens to those that wait for one that failed."""

from __future__ import annotations

from pathlib import Path

import small_sweep

from orchestrator.jobs import Job, JobQueue, make_jobs
from orchestrator.plan import plan_sweep
from orchestrator.space import enumerate_trials
from orchestrator.spec import Sweep, load
from orchestrator.store import Store


def jobs_of(folder: Path, finished: set[str] | None = None) -> tuple[Sweep, list[Job]]:
    sweep = load(small_sweep.write(folder))
    plan = plan_sweep(sweep, enumerate_trials(sweep))
    return sweep, make_jobs(plan, finished or set(), Store(folder / "store"), sweep.resources)


def test_shared_stages_come_before_the_trials_that_need_them(tmp_path: Path) -> None:
    _, jobs = jobs_of(tmp_path)
    queue = JobQueue(list(jobs))
    first = queue.take()
    assert first is not None and first.nodes[0].kind == "pretrain"
    assert queue.take() is None, "everything else needs the pretrained model"
    queue.finish(first.job_id, "completed", None)
    order = []
    while (job := queue.take()) is not None:
        assert job.needs <= queue.done
        queue.finish(job.job_id, "completed", None)
        order.append(job.job_id)
    assert queue.exhausted
    assert {job.job_id for job in jobs} == {first.job_id, *order}


def test_a_stage_that_one_trial_alone_asks_for_is_no_job_of_its_own(tmp_path: Path) -> None:
    _, jobs = jobs_of(tmp_path)
    assert {job.nodes[0].kind for job in jobs if job.shared} == {
        "pretrain",
        "importance",
        "cache",
    }


def test_a_failed_shared_stage_fails_all_that_wait_for_it_with_its_reason(tmp_path: Path) -> None:
    _, jobs = jobs_of(tmp_path)
    queue = JobQueue(list(jobs))
    pretrain = queue.take()
    assert pretrain is not None
    doomed = queue.finish(pretrain.job_id, "failed", "the loss is nan at step 3")
    assert {job.job_id for job, _ in doomed} == {j.job_id for j in jobs} - {pretrain.job_id}
    assert len(doomed) == len(jobs) - 1, "none is failed twice"
    assert all("the loss is nan at step 3" in reason for _, reason in doomed)
    assert queue.exhausted


def test_a_failed_trial_fails_no_other(tmp_path: Path) -> None:
    _, jobs = jobs_of(tmp_path)
    queue = JobQueue([job for job in jobs if not job.shared])
    queue.done = set().union(*(job.needs for job in jobs))
    job = queue.take()
    assert job is not None
    assert queue.finish(job.job_id, "failed", "out of memory") == []
    assert queue.take() is not None


def test_finished_trials_are_no_jobs_and_neither_are_their_stages(tmp_path: Path) -> None:
    _, jobs = jobs_of(tmp_path)
    trials = {job.job_id for job in jobs if not job.shared}
    _, left = jobs_of(tmp_path, finished=trials)
    assert left == []


def test_nothing_is_handed_out_once_the_sweep_is_asked_to_stop(tmp_path: Path) -> None:
    _, jobs = jobs_of(tmp_path)
    queue = JobQueue(list(jobs), stopping=True)
    assert queue.take() is None
    assert queue.exhausted
