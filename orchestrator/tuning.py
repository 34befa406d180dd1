"""The Ray Tune adapter: hands out jobs whose inputs are ready, to warm reused workers.

A job is either a stage that several trials wait for, or a whole trial. Both are Tune trials of one
experiment, so Tune places them all and its actors stay warm from job to job. Tune's own state is
scratch: what is finished is known from the ledger alone. The only import of ray.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from orchestrator import execute, workers
from orchestrator.execute import Interrupted, Runtime
from orchestrator.jobs import Job, JobQueue, Outcome
from orchestrator.ledger import Ledger
from orchestrator.records import StageRecord
from orchestrator.spec import Resources
from orchestrator.stages import STAGES
from orchestrator.steps import StageNode
from orchestrator.store import Store
from orchestrator.tracking import Mirror
from trainers.contract import StageContext

REPORT_EVERY_S = 0.5


class Watcher(Protocol):
    """Who shows a person how the sweep is going."""

    def started(self, job_id: str) -> None:
        """A worker has taken the job."""

    def advanced(
        self, job_id: str, stage: str, done: int, total: int, values: Mapping[str, float]
    ) -> None:
        """A stage of the job is `done` of `total` units far."""

    def finished(self, job_id: str, outcome: Outcome, reason: str | None) -> None:
        """The job has ended."""


@dataclass(frozen=True)
class Place:
    """Where a sweep's files are and under what name they are recorded."""

    sweep: str
    profile: str
    folder: Path
    store: Store

    def requested_by(self, trial_id: str) -> str:
        """Who asked for an artifact, as its manifest names it."""
        return f"{self.sweep}/{self.profile}/{trial_id}"

    @property
    def stop_file(self) -> Path:
        """Its existence asks every worker to save and stop."""
        return self.folder / ".stop"


# --- in the worker ---------------------------------------------------------------------------


def run_job(config: dict[str, Any]) -> None:
    """Run one job in a Tune worker; its last report is the result. Failures come back as data, so
    that the worker stays warm."""
    from ray import tune

    tune.report(_worked(json.loads(config["work"])))


def _worked(work: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    torch.set_num_threads(work["threads"])
    store, records = Store(Path(work["store"])), list[StageRecord]()
    launch = _launcher(work)

    def run(node: StageNode) -> StageRecord:
        return execute.run_stage(
            node,
            store,
            work["trial_id"],
            work["requested_by"],
            _Throttled(Path(work["stop_file"])),
            Runtime(work["threads"], work["checkpoint_every_s"]),
            launch,
        )

    try:
        for record in execute.run_stages([StageNode(**n) for n in work["nodes"]], run, store):
            records.append(record)
    except Interrupted:
        return _result("interrupted", None, None, records)
    except Exception as error:  # whatever a stage raises is this trial's failure, not the sweep's
        return _result("failed", execute.reason_of(error), traceback.format_exc(), records)
    return _result("completed", None, None, records)


def _launcher(work: Mapping[str, Any]) -> execute.Launch:
    """Stages that train run on all workers, the others in this process."""
    if work["workers"]["count"] == 1:
        return execute.launch_here
    several = workers.Workers(**work["workers"], stop_file=work["stop_file"])

    def launch(node: StageNode, context: StageContext[Any]) -> execute.Launched:
        if not STAGES[node.kind].trains:
            return execute.launch_here(node, context)
        return workers.launch(node, context, several)

    return launch


def _result(
    outcome: Outcome, reason: str | None, trace: str | None, records: Sequence[StageRecord]
) -> dict[str, Any]:
    found = {"outcome": outcome, "reason": reason, "trace": trace}
    return {"result": json.dumps(found | {"stages": [asdict(record) for record in records]})}


class _Throttled:
    """Passes progress on to Tune a few times a second, and looks whether to stop."""

    def __init__(self, stop_file: Path) -> None:
        self._stop_file = stop_file
        self._last = 0.0

    def __call__(self, stage: str, done: int, total: int, values: Mapping[str, float]) -> None:
        now = time.monotonic()
        if now - self._last < REPORT_EVERY_S and done:
            return
        self._last = now
        if self._stop_file.exists():
            raise Interrupted
        from ray import tune

        # As one text: `done` and `time_total_s` among others mean something to Tune itself.
        tune.report({"progress": json.dumps([stage, done, total, dict(values)])})


# --- in the driver ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """How a run of the sweep ended: jobs by outcome."""

    completed: int
    failed: int
    interrupted: bool


class _Desk:
    """The driver's side: hands out jobs, writes the ledger, tells the watcher and the mirror."""

    def __init__(
        self, queue: JobQueue, place: Place, ledger: Ledger, mirror: Mirror, watcher: Watcher
    ) -> None:
        self.queue, self.place = queue, place
        self._ledger, self._mirror, self._watcher = ledger, mirror, watcher
        self.completed = self.failed = 0

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        # Tune pickles its searcher and callbacks into a state file that is never read here.
        return (object, ())

    def ended(self, job: Job, result: Mapping[str, Any]) -> None:
        """Record what a job's result says, and fail what can no longer run."""
        outcome, reason = result["outcome"], result["reason"]
        stages = [StageRecord(**record) for record in result["stages"]]
        for stage in stages:
            self._ledger.stage(stage)
            if stage.kind == "importance":
                self._ledger.scores(execute.block_scores(stage.stage_id, self.place.store))
        if result["trace"]:
            self._keep_trace(job, result["trace"])
        if outcome == "completed" and not job.shared:
            self._collect(job, stages)
        if outcome == "failed":
            self._fail(job, reason, stages)
        self._watcher.finished(job.job_id, outcome, reason)
        for doomed, why in self.queue.finish(job.job_id, outcome, reason):
            self._fail(doomed, why, [])
            self._watcher.finished(doomed.job_id, "failed", why)

    def advanced(self, job: Job, result: Mapping[str, Any]) -> None:
        self._watcher.advanced(job.job_id, *json.loads(result["progress"]))

    def started(self, job: Job) -> None:
        self._watcher.started(job.job_id)

    def _collect(self, job: Job, stages: Sequence[StageRecord]) -> None:
        found = execute.collect(
            job.trial, self.place.store, stages, self.place.sweep, self.place.profile
        )
        self._ledger.trial(found.trial, found.curves, found.items)
        self._mirror.trial(found.trial, found.curves)
        self.completed += 1

    def _fail(self, job: Job, reason: str, stages: Sequence[StageRecord]) -> None:
        if job.shared:
            return
        record = execute.failed_trial(
            job.trial, reason, stages, self.place.sweep, self.place.profile
        )
        self._ledger.trial(record, (), ())
        self._mirror.trial(record, ())
        self.failed += 1

    def _keep_trace(self, job: Job, trace: str) -> None:
        path = self.place.folder / "logs" / f"{job.job_id}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(trace)


def run(
    jobs: Sequence[Job],
    place: Place,
    ledger: Ledger,
    mirror: Mirror,
    watcher: Watcher,
    resources: Resources,
    address: str | None = None,
    max_concurrent: int | None = None,
    more: Callable[[], Sequence[Job]] = tuple,
) -> Summary:
    """Run all jobs to their end, and those that `more` gives when none is left. Ctrl-C once saves
    and stops, twice stops at once."""
    queue = JobQueue(list(jobs), more)
    desk = _Desk(queue, place, ledger, mirror, watcher)
    place.stop_file.unlink(missing_ok=True)
    with (
        _ray(address, resources.workers > 1) as cores,
        _scratch() as scratch,
        _interruptible(queue, place.stop_file),
    ):
        _check_room(resources, cores)
        _tuner(desk, resources, cores, max_concurrent, scratch).fit()
    place.stop_file.unlink(missing_ok=True)
    return Summary(desk.completed, desk.failed, queue.stopping)


def _tuner(
    desk: _Desk, resources: Resources, cores: int, max_concurrent: int | None, scratch: Path
) -> Any:
    from ray import tune

    trainable = tune.with_resources(
        run_job, lambda config: tune.PlacementGroupFactory([config["bundle"]])
    )
    describe = _describer(desk.place, resources, cores)
    at_once = max_concurrent or resources.max_concurrent or cores
    if resources.workers > 1:
        # Ray Train makes placement groups that Tune knows nothing of: together they must fit.
        at_once = min(at_once, cores // (resources.workers * resources.cpus_per_trial))
    return tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=_searcher(desk, describe),
            num_samples=-1,
            reuse_actors=True,
            max_concurrent_trials=max(1, at_once),
            trial_name_creator=lambda trial: str(trial.trial_id),
            trial_dirname_creator=lambda trial: str(trial.trial_id),
        ),
        run_config=tune.RunConfig(
            storage_path=str(scratch), callbacks=[_callback(desk)], verbose=0, log_to_file=False
        ),
    )


def _check_room(resources: Resources, cores: int) -> None:
    """Ray would wait for ever for workers that there is no room for."""
    needed = resources.workers * resources.cpus_per_trial
    if resources.workers > 1 and needed > cores:
        raise NoRoomError(
            f"resources: {resources.workers} workers of {resources.cpus_per_trial} CPUs each need "
            f"{needed} CPUs, and there are {cores}"
        )


class NoRoomError(Exception):
    """The cluster is too small for one trial."""


def _describer(place: Place, resources: Resources, cores: int) -> Callable[[Job], dict[str, Any]]:
    several = resources.workers > 1

    def describe(job: Job) -> dict[str, Any]:
        cpus = min(job.cpus, cores)
        bundle = {"CPU": workers.WAITING_CPU if several else float(cpus)}
        if resources.gpus_per_worker and not several:
            bundle["GPU"] = resources.gpus_per_worker
        trial_id = job.trial.trial.trial_id
        work = {
            "nodes": [asdict(node) for node in job.nodes],
            "store": str(place.store.root),
            "trial_id": trial_id,
            "requested_by": place.requested_by(trial_id),
            "stop_file": str(place.stop_file),
            "threads": cpus,
            "checkpoint_every_s": resources.checkpoint_every_s,
            "workers": {
                "count": resources.workers,
                "cpus": resources.cpus_per_trial,
                "gpus": resources.gpus_per_worker,
            },
        }
        return {"job_id": job.job_id, "bundle": bundle, "work": json.dumps(work)}

    return describe


def _searcher(desk: _Desk, describe: Callable[[Job], dict[str, Any]]) -> Any:
    """Tune's searcher that proposes the next ready job, and waits while there is none."""
    from ray.tune.search import Searcher

    class Jobs(Searcher):  # type: ignore[misc]
        def suggest(self, trial_id: str) -> Any:
            job = desk.queue.take()
            if job is not None:
                return describe(job)
            return Searcher.FINISHED if desk.queue.exhausted else None

        def on_trial_complete(
            self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
        ) -> None:
            """Told through the callback, which also knows why a worker died."""

        def save(self, checkpoint_path: str) -> None:
            """Nothing to save: the ledger knows."""

        def restore(self, checkpoint_path: str) -> None:
            """Nothing to restore: the ledger knows."""

    return Jobs(metric=None, mode=None)


def _callback(desk: _Desk) -> Any:
    """Tune's events, turned into the desk's."""
    from ray.tune import Callback

    class Events(Callback):  # type: ignore[misc]
        def on_trial_start(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
            if (job := desk.queue.running.get(trial.config["job_id"])) is not None:
                desk.started(job)

        def on_trial_result(
            self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **_: Any
        ) -> None:
            job = desk.queue.running.get(trial.config["job_id"])
            if job is None:
                return
            if "result" in result:
                desk.ended(job, json.loads(result["result"]))
            elif "progress" in result:
                desk.advanced(job, result)

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
            # Tune's own getter looks where the file has not been uploaded to yet.
            path = Path(trial.error_file) if trial.error_file else None
            trace = path.read_text() if path and path.exists() else "no error was recorded"
            reason = f"the worker died: {trace.strip().splitlines()[-1]}"
            job = desk.queue.running.get(trial.config["job_id"])
            if job is not None:
                failure = {"outcome": "failed", "reason": reason, "trace": trace, "stages": []}
                desk.ended(job, failure)

    return Events()


@contextmanager
def _ray(address: str | None, dashboard: bool) -> Iterator[int]:
    """A Ray of this machine alone, on 127.0.0.1, or the cluster at `address`; gives its CPUs."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Workers inherit these. By default glibc gives every large tensor back to the system when it is
    # freed, and the page faults of getting it again cost a third of a step with 49k words.
    os.environ.setdefault("MALLOC_MMAP_MAX_", "0")
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(1 << 40))
    os.environ.setdefault("MALLOC_TOP_PAD_", str(1 << 28))
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the new output prints a banner whatever `verbose` says
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "3600")
    import ray

    # A trial of several workers that is stopped early leaks its placement group unless the
    # dashboard is there; for one worker each it would only cost memory.
    local: dict[str, Any] = {} if address else {"include_dashboard": dashboard}
    if dashboard:
        local["dashboard_host"] = "127.0.0.1"
    ray.init(address=address, log_to_driver=False, logging_level="ERROR", **local)
    try:
        yield max(1, int(ray.cluster_resources().get("CPU", 1)))
    finally:
        ray.shutdown()


@contextmanager
def _scratch() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="orchestrate-tune-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _interruptible(queue: JobQueue, stop_file: Path) -> Iterator[None]:
    """The first SIGINT or SIGTERM asks every worker to save and stop; the second stops now."""

    def ask(number: int, frame: Any) -> None:
        if queue.stopping:
            raise KeyboardInterrupt
        queue.stopping = True
        with suppress(OSError):
            stop_file.touch()

    before = {name: signal.signal(name, ask) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
