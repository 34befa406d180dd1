"""What the driver makes of what its workers report, without any Ray."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import small_sweep

from orchestrator.jobs import ATTEMPTS, JobQueue, Outcome, make_jobs
from orchestrator.ledger import Ledger
from orchestrator.plan import plan_sweep
from orchestrator.space import enumerate_trials
from orchestrator.spec import load
from orchestrator.stopping import NoJudge
from orchestrator.store import Store
from orchestrator.tracking import Mirror
from orchestrator.tuning import Place, _Desk


class Silent:
    """A watcher that looks away."""

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
