"""The Ray Tune adapter: hands out jobs whose inputs are ready, to warm reused workers.

A job is either a stage that several trials wait for, or a whole trial. Both are Tune trials of one
experiment, so Tune places them all and its actors stay warm from job to job. Tune's own state is
scratch: what is finished is known from the ledger alone. The only import of ray.
"""

from __future__ import annotations

import base64
import importlib
import json
import os
import shutil
import signal
import tempfile
import time
import traceback
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from orchestrator import cluster, execute, room, workers
from orchestrator.execute import Interrupted, Runtime
from orchestrator.faults import is_infrastructure
from orchestrator.jobs import ATTEMPTS, Job, JobQueue, Outcome, Pace
from orchestrator.ledger import Ledger
from orchestrator.records import BlockScore, StageRecord
from orchestrator.room import Capacity, NoRoomError
from orchestrator.spec import Resources
from orchestrator.stages import STAGES
from orchestrator.steps import StageNode
from orchestrator.stopping import HELDOUT, TOKENS, Judge, NoJudge
from orchestrator.storage import open_store
from orchestrator.store import DamagedArtifactError, Store
from orchestrator.tracking import Mirror
from trainers.contract import StageContext

LOOK_EVERY_S = 0.5
"""How often a worker looks whether to stop."""
LOW_ON_MEMORY = "the worker was killed as its node ran low on memory"
REPORT_EVERY_S = 4.0
"""A report costs worker, driver and Ray 4 ms of CPU: twice a second, that is 0.7% of any step."""


class _Describe(Protocol):
    """Makes the settings of a Tune trial: jobs for a worker, or modules for it to load."""

    def __call__(self, jobs: Sequence[Job], imports: Sequence[str] = ()) -> dict[str, Any]: ...


class Watcher(Protocol):
    """Who shows a person how the sweep is going."""

    def waits(self, reason: str) -> None:
        """No job can be begun yet."""

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
    run: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    """A name of its own for what asks workers to stop: over NFS, they may go on seeing a file of an
    earlier run for a minute after it was removed."""

    def requested_by(self, trial_id: str) -> str:
        """Who asked for an artifact, as its manifest names it."""
        return f"{self.sweep}/{self.profile}/{trial_id}"

    @property
    def stop_file(self) -> Path:
        """Its existence asks every worker to save and stop."""
        return self.folder / f".stop-{self.run}"

    def early_stop_file(self, job_id: str) -> Path:
        """Its existence asks the worker of one trial to save and stop: it is not worth more."""
        return self.early_stops / job_id

    @property
    def early_stops(self) -> Path:
        """The folder of those files."""
        return self.folder / f".early-{self.run}"

    def remove_stops(self) -> None:
        """Remove what asked workers to stop, in this run or in one that was killed."""
        for file in self.folder.glob(".stop-*"):
            file.unlink(missing_ok=True)
        for folder in self.folder.glob(".early-*"):
            shutil.rmtree(folder, ignore_errors=True)


# --- in the worker ---------------------------------------------------------------------------


def run_jobs(config: dict[str, Any]) -> None:
    """Run one job after the other in a Tune worker, and report the result of each. Failures come
    back as data, so that the worker stays warm. Without jobs it is warmed up: it loads modules."""
    from ray import tune

    for module in config["imports"]:
        importlib.import_module(module)
    if config["imports"]:
        tune.report({"warm": True})  # Tune prints a line about a trial that reports nothing
    for work in _unpacked(config["work"]):
        asked_to_stop = Path(work["stop_file"]).exists()
        found = _result("interrupted", None, None, ()) if asked_to_stop else _worked(work)
        tune.report({"job_id": work["job_id"], **found})


def _packed(work: Sequence[Mapping[str, Any]]) -> str:
    """What a worker is to do, small: Tune keeps the settings of all its trials, several times, and
    sends them back with every report. Stages repeat each other, so this is a tenth."""
    return base64.b85encode(zlib.compress(json.dumps(work).encode())).decode()


def _unpacked(text: str) -> Any:
    return json.loads(zlib.decompress(base64.b85decode(text)))


def _worked(work: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    torch.set_num_threads(work["threads"])
    records = list[StageRecord]()
    nodes, upstream = ([StageNode(**n) for n in work[key]] for key in ("nodes", "upstream"))
    launch, early = _launcher(work), Path(work["early_stop_file"])

    def run(node: StageNode) -> StageRecord:
        return execute.run_stage(
            node,
            store,
            work["trial_id"],
            work["requested_by"],
            _Throttled(work["job_id"], Path(work["stop_file"]), early),
            Runtime(work["checkpoint_every_s"]),
            launch,
        )

    try:
        store = open_store(Path(work["store"]), work["artifacts"])
        for record in execute.run_stages(nodes, run, store, upstream):
            records.append(record)
    except Interrupted:
        return _result("stopped" if early.exists() else "interrupted", None, None, records)
    except Exception as error:  # whatever a stage raises is this trial's failure, not the sweep's
        outcome: Outcome = "lost" if is_infrastructure(error) else "failed"
        return _result(outcome, execute.reason_of(error), traceback.format_exc(), records)
    return _result("completed", None, None, records)


def _launcher(work: Mapping[str, Any]) -> execute.Launch:
    """Stages that train run on all workers, the others in this process."""
    if work["workers"]["count"] == 1:
        return execute.launch_here
    files = {name: work[name] for name in ("stop_file", "early_stop_file", "job_id")}
    several = workers.Workers(**work["workers"], **files)

    def launch(node: StageNode, context: StageContext[Any]) -> execute.Launched:
        if STAGES[node.kind].trains:
            return workers.launch(node, context, several)
        if several.gpus:  # this process holds none: one worker does
            return workers.launch(node, context, replace(several, count=1))
        return execute.launch_here(node, context)

    return launch


def _result(
    outcome: Outcome, reason: str | None, trace: str | None, records: Sequence[StageRecord]
) -> dict[str, Any]:
    found = {"outcome": outcome, "reason": reason, "trace": trace}
    return {"result": json.dumps(found | {"stages": [asdict(record) for record in records]})}


class _Throttled:
    """Passes progress on to Tune now and then, measurements always, and looks whether to stop."""

    def __init__(self, job_id: str, stop_file: Path, early_stop_file: Path) -> None:
        self._job_id = job_id
        self._stop_file, self._early = stop_file, early_stop_file
        self._looked = self._told = 0.0

    def __call__(self, stage: str, done: int, total: int, values: Mapping[str, float]) -> None:
        now = time.monotonic()
        measured = HELDOUT in values
        at_once = measured or not done
        if now - self._looked < LOOK_EVERY_S and not at_once:
            return
        self._looked = now
        if self._stop_file.exists():
            raise Interrupted
        if now - self._told < REPORT_EVERY_S and not at_once:
            return
        self._told = now
        from ray import tune

        # As one text: `done` and `time_total_s` among others mean something to Tune itself.
        progress = json.dumps([stage, done, total, dict(values)])
        tune.report({"job_id": self._job_id, "progress": progress})
        # Reporting returns when the driver has heard, and has judged what was measured.
        if measured and self._early.exists():
            raise Interrupted


# --- in the driver ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """How a run of the sweep ended: trials by outcome."""

    completed: int
    stopped: int
    failed: int
    interrupted: bool


class _Desk:
    """The driver's side: hands out jobs, writes the ledger, tells the watcher and the mirror."""

    def __init__(
        self,
        queue: JobQueue,
        place: Place,
        ledger: Ledger,
        mirror: Mirror,
        watcher: Watcher,
        judge: Judge,
    ) -> None:
        self.queue, self.place = queue, place
        self._ledger, self._mirror, self._watcher = ledger, mirror, watcher
        self._judge, self._judged = judge, set[str]()
        self._begun = set[str]()
        self._pace = Pace()
        self.completed = self.stopped = self.failed = 0

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        # Tune pickles its searcher and callbacks into a state file that is never read here.
        return (object, ())

    def ended(self, job: Job, result: Mapping[str, Any]) -> None:
        """Record what a job's result says, and fail what can no longer run."""
        outcome, reason = result["outcome"], result["reason"]
        self._begun.discard(job.job_id)
        if outcome == "interrupted" and not self.queue.stopping:
            outcome, reason = "lost", "it stopped, and nobody had asked it to"
        stages = [StageRecord(**record) for record in result["stages"]]
        collected: execute.Collected | None = None
        scores: list[Sequence[BlockScore]] = []
        try:
            made = [stage.stage_id for stage in stages if stage.kind == "importance"]
            scores = [execute.block_scores(stage_id, self.place.store) for stage_id in made]
            if outcome == "completed" and not job.shared and job.then is None:
                collected = self._collected(job, stages)
        except (OSError, DamagedArtifactError) as error:  # it was there a moment ago
            outcome, reason = "lost", f"what it measured cannot be read: {error}"
        for stage in stages:
            self._ledger.stage(stage)
        for rows in scores:
            self._ledger.scores(rows)
        if result["trace"]:
            self._keep_trace(job, result["trace"])
        if outcome == "lost" and self.queue.tried_enough(job.job_id):
            outcome, reason = "failed", f"{reason} (tried {ATTEMPTS} times)"
        if outcome == "stopped":
            self._stopped(job, stages)
        if collected is not None:
            self._keep(job, collected)
        if outcome == "failed":
            self._fail(job, reason, stages)
        self._pace.end(job.job_id)
        if outcome == "completed" and job.then is not None:
            self._watcher.advanced(job.job_id, "waits to run alone", 0, 0, {})
        else:
            self._watcher.finished(job.job_id, outcome, reason)
        for doomed, why in self.queue.finish(job.job_id, outcome, reason):
            self._fail(doomed, why, [])
            self._watcher.finished(doomed.job_id, "failed", why)

    def advanced(self, job: Job, result: Mapping[str, Any]) -> None:
        stage, done, total, values = json.loads(result["progress"])
        self._watcher.advanced(job.job_id, stage, done, total, values)
        if HELDOUT not in values or job.shared or job.trial.trial.baseline is not None:
            return
        self._judged.add(job.job_id)
        seed = job.trial.trial.seed
        if self._judge.stops(job.job_id, seed, values[TOKENS], values[HELDOUT]):
            file = self.place.early_stop_file(job.job_id)
            self.place.early_stops.mkdir(exist_ok=True)
            file.touch()

    def next_jobs(self) -> list[Job]:
        """The jobs that the next free worker does, one after the other: mostly one, several where
        the last ones were so short that handing them out cost as much."""
        first = self.queue.take()
        if first is None:
            return []
        jobs = [first]
        for _ in range(self._pace.together(len(self.queue.waiting)) - 1):
            job = self.queue.take(first.cpus)
            if job is None:
                break
            jobs.append(job)
        return jobs

    def to_import(self, warmed: int) -> list[str]:
        """What one more worker may load while it has nothing to do, so many having done so: the
        modules of the stages that wait. None where what waits is too little or measures time, nor
        where a worker would be of another size than the next job needs."""
        waiting = self.queue.waiting
        sizes = {job.cpus for job in (*waiting, *self.queue.running.values())}
        timed = any(job.alone or job.then for job in waiting)
        if len(waiting) <= warmed + 1 or timed or len(sizes) > 1:
            return []
        kinds = {node.kind for job in waiting for node in job.nodes}
        return sorted({STAGES[kind].entry_point.split(":")[0] for kind in kinds})

    def begin(self, jobs: Sequence[str]) -> None:
        """A worker has come to the first of these jobs that has not ended."""
        job_id = next((each for each in jobs if each in self.queue.running), None)
        if job_id is not None:
            self._begun.add(job_id)
            self._pace.begin(job_id)
            self._watcher.started(job_id)

    def memory_ran_out(self, at_once: int, reason: str) -> int:
        """Ray took a worker's memory away, and Tune gave up; gives how many may run from now on.

        While several were at work, nobody knows whose fault it was: all wait again, and fewer run
        at once. One that was alone is lost.
        """
        # Those at work first: others were handed out with them, or wait for a worker to start.
        running = sorted(self.queue.running, key=lambda job_id: job_id not in self._begun)
        at_work = sum(job_id in self._begun for job_id in running)
        self._begun.clear()
        if at_work <= 1:
            self.worker_died(running, reason, reason)
            return 1
        fewer = max(1, min(at_once, at_work) - 1)
        for job_id in running:
            self._pace.end(job_id)
            self.queue.put_back(job_id)
            self._watcher.finished(job_id, "lost", f"{reason}; from now {fewer} at once")
        return fewer

    def worker_died(self, jobs: Sequence[str], reason: str, trace: str) -> None:
        """The job that it was at is lost; those that it had not come to are handed out again."""
        left = [self.queue.running[each] for each in jobs if each in self.queue.running]
        for job in left[1:]:
            self.queue.put_back(job.job_id)
        for job in left[:1]:
            failure = {"outcome": "lost", "reason": reason, "trace": trace, "stages": []}
            self.ended(job, failure)

    def _collected(self, job: Job, stages: Sequence[StageRecord]) -> execute.Collected:
        return execute.collect(
            job.trial, self.place.store, stages, self.place.sweep, self.place.profile
        )

    def _keep(self, job: Job, found: execute.Collected) -> None:
        self._ledger.trial(found.trial, found.curves, found.items)
        self._mirror.trial(found.trial, found.curves)
        self.completed += 1
        if job.job_id not in self._judged and job.trial.trial.baseline is None:
            for point in found.curves:  # its distillation was found in the store
                if point.name == HELDOUT:
                    self._judge.stops(job.job_id, found.trial.seed, point.tokens, point.value)

    def _stopped(self, job: Job, stages: Sequence[StageRecord]) -> None:
        self.place.early_stop_file(job.job_id).unlink(missing_ok=True)
        found = execute.stopped_trial(
            job.trial,
            "others were better after as many tokens",
            self.place.store,
            stages,
            self.place.sweep,
            self.place.profile,
        )
        self._ledger.trial(found.trial, found.curves, ())
        self._mirror.trial(found.trial, found.curves)
        self.stopped += 1

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
    more: Callable[[bool], Sequence[Job]] = lambda idle: (),
    judge: Judge | None = None,
) -> Summary:
    """Run all jobs to their end, or until the judge stops them, and those that `more` gives when
    none waits. Ctrl-C once saves and stops, twice stops at once."""
    queue = JobQueue(list(jobs), more)
    desk = _Desk(queue, place, ledger, mirror, watcher, judge or NoJudge())
    place.remove_stops()
    most = max_concurrent or resources.max_concurrent
    began = False
    with _interruptible(queue, place.stop_file):
        while True:
            try:
                # A new Ray each time: what the old one had promised to workers goes with it.
                with (
                    _ray(address, resources.workers > 1),
                    _scratch() as scratch,
                    _interruptible(queue, place.stop_file),  # Ray has a handler of its own by now
                ):
                    found = room.wait_for(resources, address, watcher.waits, lambda: queue.stopping)
                    at_once = found.at_once(resources, most)
                    ran_out = _fit(_tuner(desk, resources, found, at_once, scratch))
            except NoRoomError as error:
                if not began:
                    raise
                watcher.waits(f"{error}; the same command goes on once there is room again")
                queue.stopping = True
                break
            if ran_out is None:
                break
            most, began = desk.memory_ran_out(at_once, ran_out), True
    place.remove_stops()
    return Summary(desk.completed, desk.stopped, desk.failed, queue.stopping)


def _fit(tuner: Any) -> str | None:
    """Run to the end; a reason where Ray killed a worker lest the node run out of memory.

    Of a worker that died Tune tells its callback, but that exception it does not expect.
    """
    from ray.exceptions import OutOfMemoryError

    try:
        tuner.fit()
    except RuntimeError as error:
        if not isinstance(error.__cause__, OutOfMemoryError):
            raise
        return LOW_ON_MEMORY
    return None


def _tuner(desk: _Desk, resources: Resources, found: Capacity, at_once: int, scratch: Path) -> Any:
    from ray import tune

    trainable = tune.with_resources(
        run_jobs, lambda config: tune.PlacementGroupFactory([config["bundle"]])
    )
    describe = _describer(desk.place, resources, found.widest)
    return tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=_searcher(desk, describe, at_once - 1 if resources.workers == 1 else 0),
            num_samples=-1,
            reuse_actors=True,
            max_concurrent_trials=at_once,
            trial_name_creator=lambda trial: str(trial.trial_id),
            trial_dirname_creator=lambda trial: str(trial.trial_id),
        ),
        run_config=tune.RunConfig(
            storage_path=str(scratch), callbacks=[_callback(desk)], verbose=0, log_to_file=False
        ),
    )


def _describer(place: Place, resources: Resources, widest: int) -> _Describe:
    several = resources.workers > 1

    def work_of(job: Job, cpus: int) -> dict[str, Any]:
        trial_id = job.trial.trial.trial_id
        return {
            "job_id": job.job_id,
            "nodes": [asdict(node) for node in job.nodes],
            # Only to be run again where an input of a shared stage turns out to be damaged.
            "upstream": [asdict(n) for n in job.trial.steps.values()] if job.shared else [],
            "store": str(place.store.folder),
            "artifacts": place.store.uri,
            "trial_id": trial_id,
            "requested_by": place.requested_by(trial_id),
            "stop_file": str(place.stop_file),
            "early_stop_file": str(place.early_stop_file(job.job_id)),
            "threads": cpus,
            "checkpoint_every_s": resources.checkpoint_every_s,
            "workers": {
                "count": resources.workers,
                "cpus": resources.cpus_per_trial,
                "gpus": resources.gpus_per_worker,
            },
        }

    def describe(jobs: Sequence[Job], imports: Sequence[str] = ()) -> dict[str, Any]:
        cpus = min(jobs[0].cpus if jobs else resources.cpus_per_trial, widest)
        bundle = {"CPU": workers.WAITING_CPU if several else float(cpus)}
        if resources.gpus_per_worker and not several:
            bundle["GPU"] = resources.gpus_per_worker
        work = [work_of(job, cpus) for job in jobs]
        return {
            "jobs": [job.job_id for job in jobs],
            "bundle": bundle,
            "work": _packed(work),
            "imports": list(imports),
        }

    return describe


def _searcher(desk: _Desk, describe: _Describe, spare: int) -> Any:
    """Tune's searcher that proposes the next ready job, and waits while there is none. Meanwhile as
    many workers as are to `spare` start and load what they will need: that takes seconds, in which
    the first one does what all wait for."""
    from ray.tune.search import Searcher

    class Jobs(Searcher):  # type: ignore[misc]
        warmed = 0

        def suggest(self, trial_id: str) -> Any:
            jobs = desk.next_jobs()
            if jobs:
                return describe(jobs)
            if desk.queue.exhausted:
                return Searcher.FINISHED
            if self.warmed < spare and (imports := desk.to_import(self.warmed)):
                self.warmed += 1
                return describe([], imports)
            return None

        def on_trial_complete(
            self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
        ) -> None:
            """Told through the callback, which also knows why a worker died."""

        def save(self, checkpoint_path: str) -> None:
            """Nothing to save: the ledger knows."""

        def restore(self, checkpoint_path: str) -> None:
            """Nothing to restore: the ledger knows."""

    return Jobs(metric=None, mode=None)


def _why_it_died(trace: str) -> str:
    """In a line; what Ray says of memory is a page, and its last lines are general advice."""
    if "due to the node running low on memory" in trace:
        return LOW_ON_MEMORY
    return f"the worker died: {trace.strip().splitlines()[-1]}"[: workers.REASON_LENGTH]


def _callback(desk: _Desk) -> Any:
    """Tune's events, turned into the desk's."""
    from ray.tune import Callback

    class Events(Callback):  # type: ignore[misc]
        def on_trial_start(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
            desk.begin(trial.config["jobs"])

        def on_trial_result(
            self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **_: Any
        ) -> None:
            job = desk.queue.running.get(result.get("job_id", ""))
            if job is None:
                return
            if "result" in result:
                desk.ended(job, json.loads(result["result"]))
                desk.begin(trial.config["jobs"])
            elif "progress" in result:
                desk.advanced(job, result)

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
            # Tune keeps its trials for ever; this is most of one.
            trial.config["work"] = ""
            trial.evaluated_params = {}

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
            # Tune's own getter looks where the file has not been uploaded to yet.
            path = Path(trial.error_file) if trial.error_file else None
            trace = path.read_text() if path and path.exists() else "no error was recorded"
            desk.worker_died(trial.config["jobs"], _why_it_died(trace), trace)

    return Events()


@contextmanager
def _ray(address: str | None, dashboard: bool) -> Iterator[None]:
    """A Ray of this machine alone, on 127.0.0.1, or the cluster at `address`."""
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the new output prints a banner whatever `verbose` says
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = "0"  # a worker that died is told in one line
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "3600")
    # A trial of several workers that is stopped early leaks its placement group unless the
    # dashboard is there; for one worker each it would only cost memory.
    try:
        with cluster.joined(address, dashboard):
            yield
    except cluster.UnreachableError as error:
        raise NoRoomError(str(error)) from error


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
