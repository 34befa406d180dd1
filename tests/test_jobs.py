"""Which job is handed out when, and what happens to those that wait for one that failed."""

from __future__ import annotations

from pathlib import Path

import small_sweep

from orchestrator.jobs import AT_MOST, ATTEMPTS, Job, JobQueue, Pace, make_jobs
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


# --- attempts, and short jobs ------------------------------------------------------------------


def begun(queue: JobQueue) -> Job:
    job = queue.take()
    assert job is not None
    return job


def test_a_job_that_is_lost_with_its_machine_is_tried_again_but_not_for_ever(
    tmp_path: Path,
) -> None:
    _, jobs = jobs_of(tmp_path)
    queue = JobQueue(list(jobs))
    first = begun(queue)
    for attempt in range(1, ATTEMPTS):
        assert queue.attempts[first.job_id] == attempt
        assert not queue.tried_enough(first.job_id)
        assert queue.finish(first.job_id, "lost", "the worker died") == []
        assert begun(queue) is first
    assert queue.tried_enough(first.job_id)


def test_a_job_that_is_interrupted_waits_again(tmp_path: Path) -> None:
    _, jobs = jobs_of(tmp_path)
    queue = JobQueue(list(jobs))
    first = begun(queue)
    assert first.shared and queue.finish(first.job_id, "interrupted", None) == []
    assert not queue.exhausted
    assert begun(queue) is first
    queue.stopping = True
    queue.finish(first.job_id, "interrupted", None)
    assert queue.take() is None and queue.exhausted


def test_a_job_that_was_handed_out_and_not_begun_is_no_attempt(tmp_path: Path) -> None:
    _, jobs = jobs_of(tmp_path)
    queue = JobQueue(list(jobs))
    first = begun(queue)
    queue.put_back(first.job_id)
    assert not queue.running and queue.attempts[first.job_id] == 0
    assert begun(queue) is first


def test_a_trial_that_was_stopped_is_done(tmp_path: Path) -> None:
    _, jobs = jobs_of(tmp_path)
    queue = JobQueue(list(jobs))
    first = begun(queue)
    queue.finish(first.job_id, "stopped", None)
    assert first.job_id in queue.done and not queue.failed


def test_more_is_asked_for_when_nothing_waits_and_told_whether_anything_runs(
    tmp_path: Path,
) -> None:
    _, jobs = jobs_of(tmp_path)
    told: list[bool] = []
    trials = [job for job in jobs if not job.shared]
    alone = Job("alone", trials[0].trial, (), False, frozenset(), 1)

    def more(idle: bool) -> list[Job]:
        told.append(idle)
        return [] if idle else [alone]

    queue = JobQueue([jobs[0]], more)
    begun(queue)
    assert begun(queue) is alone and told == [False]
    for job_id in (jobs[0].job_id, "alone"):
        queue.finish(job_id, "completed", None)
    assert queue.take() is None and told == [False, True]
    assert queue.exhausted


def paced(*seconds: float) -> Pace:
    """A pace after jobs of so many seconds."""
    moments = iter([moment for each in seconds for moment in (0.0, each)])
    pace = Pace(lambda: next(moments))
    for number in range(len(seconds)):
        pace.begin(str(number))
        pace.end(str(number))
    return pace


def test_only_short_jobs_are_handed_out_together() -> None:
    assert paced().together(1000) == 1
    assert paced(0.01).together(1000) == 1, "one job says little"
    assert paced(*[60.0] * 20).together(1000) == 1
    assert paced(*[0.5] * 20).together(1000) == 4
    assert paced(*[0.001] * 20).together(1000) == AT_MOST


def test_the_last_short_jobs_are_shared_out() -> None:
    assert paced(*[0.001] * 20).together(16) == 2
    assert paced(*[0.001] * 20).together(3) == 1
