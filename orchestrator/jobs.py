"""What is left to do, as jobs, and which comes next. Pure bookkeeping; knows nothing of Ray."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from orchestrator.plan import SweepPlan, TrialPlan
from orchestrator.spec import Resources
from orchestrator.stages import STAGES
from orchestrator.steps import StageNode
from orchestrator.store import Store

Outcome = Literal["completed", "stopped", "failed", "lost", "interrupted"]
"""How an attempt at a job ends: `stopped` early as not worth more, `failed` by itself, or `lost`
with the machine that it ran on."""

ATTEMPTS = 3
"""How often a job that is lost is tried in all; one that fails by itself is not tried again."""


@dataclass(frozen=True)
class Job:
    """One thing for a worker to do: the stages of a trial, or one stage that trials share."""

    job_id: str
    trial: TrialPlan
    """The trial; for a shared stage the first one that asks for it, which bears its cost."""
    nodes: tuple[StageNode, ...]
    shared: bool
    needs: frozenset[str]
    """Shared stages that must be stored before this job may start."""
    cpus: int
    alone: bool = False
    """Whether nothing else may run meanwhile: it measures time."""
    then: Job | None = None
    """The rest of a trial that ends with what must run alone; it goes by the same id."""


def make_jobs(plan: SweepPlan, finished: set[str], store: Store, cpus: Resources) -> list[Job]:
    """The jobs that are left: shared stages that are not stored, then trials, in plan order."""
    open_trials = [trial for trial in plan.trials if trial.trial.trial_id not in finished]
    shared: dict[str, Job] = {}
    for trial in open_trials:
        for node in trial.steps.values():
            if plan.asked_by[node.stage_id] < 2 or node.stage_id in shared:
                continue
            if store.manifest(node.stage_id) is None:
                needs = frozenset(i for i in node.inputs.values() if i in shared)
                wide = STAGES[node.kind].may_use_all_cores
                cores = cpus.cpus_shared if wide else cpus.cpus_per_trial
                alone = STAGES[node.kind].runs_alone
                shared[node.stage_id] = Job(
                    node.stage_id, trial, (node,), True, needs, cores, alone
                )
    trials = [
        Job(
            job_id=trial.trial.trial_id,
            trial=trial,
            nodes=tuple(trial.steps.values()),
            shared=False,
            needs=frozenset(n.stage_id for n in trial.steps.values() if n.stage_id in shared),
            cpus=cpus.cpus_per_trial,
        )
        for trial in open_trials
    ]
    return [*shared.values(), *(_in_two(job, shared, store) for job in trials)]


def _in_two(job: Job, shared: Collection[str], store: Store) -> Job:
    """The job of a trial, without what must run alone and is still to be done: that is the whole
    job again, which finds in the store what the first one did. So a distillation has others beside
    it, and a timing has none."""
    alone = {
        node.stage_id
        for node in job.nodes
        if STAGES[node.kind].runs_alone
        and node.stage_id not in shared
        and store.manifest(node.stage_id) is None
    }
    if not alone:
        return job
    first = tuple(node for node in job.nodes if node.stage_id not in alone)
    return replace(job, nodes=first, then=replace(job, alone=True))


@dataclass
class JobQueue:
    """What waits, what runs and what has ended. When nothing waits, `more` is asked for jobs that
    what has ended makes possible, and told whether nothing runs either (the next rung of a race
    needs that, a search does not)."""

    waiting: list[Job]
    more: Callable[[bool], Sequence[Job]] = lambda idle: ()
    running: dict[str, Job] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    attempts: Counter[str] = field(default_factory=Counter)
    stopping: bool = False

    def take(self, cpus: int | None = None) -> Job | None:
        """The next job whose needs are met, if any; only if it takes so many `cpus`, where that is
        said."""
        if self.stopping:
            return None
        if not self.waiting and cpus is None:
            self.waiting += self.more(not self.running)
        # What failed already is no reason to wait: a job that comes later fails by itself.
        over = self.done | set(self.failed)
        ready = (job for job in self.waiting if job.needs <= over)
        job = next((job for job in ready if self._may_run_beside_others(job)), None)
        if job is not None and cpus in (None, job.cpus):
            self.waiting.remove(job)
            self.running[job.job_id] = job
            self.attempts[job.job_id] += 1
            return job
        return None

    def _may_run_beside_others(self, job: Job) -> bool:
        """Whether the job disturbs no timing, and none that it takes is disturbed."""
        timed = any(running.alone for running in self.running.values())
        return not self.running or not (job.alone or timed)

    def put_back(self, job_id: str) -> None:
        """A job that was handed out and not begun waits again."""
        self.waiting.insert(0, self.running.pop(job_id))
        self.attempts[job_id] -= 1

    def tried_enough(self, job_id: str) -> bool:
        """Whether a job that is lost now has failed for good."""
        return self.attempts[job_id] >= ATTEMPTS

    @property
    def exhausted(self) -> bool:
        """Whether no job will ever be handed out again, once `take` has given none."""
        return self.stopping or not (self.waiting or self.running)

    def finish(self, job_id: str, outcome: Outcome, reason: str | None) -> list[tuple[Job, str]]:
        """Note the end of a running job; gives the jobs that can now never run, and why."""
        job = self.running.pop(job_id)
        if outcome in ("lost", "interrupted"):
            self.waiting.insert(0, job)
        if outcome == "completed" and job.then is not None:
            self.waiting.append(job.then)
            del self.attempts[job_id]  # the rest is a job of its own
        elif outcome in ("completed", "stopped"):
            self.done.add(job_id)
        if outcome != "failed":
            return []
        self.failed[job_id] = reason or "no reason given"
        return self._doom(job)

    def _doom(self, broken: Job) -> list[tuple[Job, str]]:
        doomed: list[tuple[Job, str]] = []
        for job in [job for job in self.waiting if broken.job_id in job.needs]:
            if job not in self.waiting:
                continue
            self.waiting.remove(job)
            reason = f"its {broken.nodes[0].kind} failed: {self.failed[broken.job_id]}"
            if broken.shared and job.shared:
                reason = self.failed[broken.job_id]
            self.failed[job.job_id] = reason
            doomed.append((job, reason))
            doomed += self._doom(job)
        return doomed


TOGETHER_S = 2.0
"""Jobs that a worker is given at once should take it about so long, where they are so short."""
AT_MOST = 32


class Pace:
    """How long jobs took lately, and so how many short ones a worker is given at once."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begun: dict[str, float] = {}
        self._seconds: deque[float] = deque(maxlen=20)

    def begin(self, job_id: str) -> None:
        """A worker has come to the job."""
        self._begun[job_id] = self._clock()

    def end(self, job_id: str) -> None:
        """The job has ended."""
        if (begun := self._begun.pop(job_id, None)) is not None:
            self._seconds.append(self._clock() - begun)

    def together(self, waiting: int) -> int:
        """How many of the jobs to hand out now; so many more wait. One, until some have ended, and
        never so many that others have nothing to do."""
        if len(self._seconds) < self._seconds.maxlen // 2:  # type: ignore[operator]
            return 1
        mean = max(sum(self._seconds) / len(self._seconds), 1e-3)
        return max(1, min(int(TOGETHER_S / mean), AT_MOST, waiting // 8))
