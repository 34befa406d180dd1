"""What is left to do, as jobs, and which comes next. Pure bookkeeping; knows nothing of Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from orchestrator.plan import SweepPlan, TrialPlan
from orchestrator.spec import Resources
from orchestrator.stages import STAGES
from orchestrator.steps import StageNode
from orchestrator.store import Store

Outcome = Literal["completed", "failed", "interrupted"]


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
                shared[node.stage_id] = Job(node.stage_id, trial, (node,), True, needs, cores)
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
    return [*shared.values(), *trials]


@dataclass
class JobQueue:
    """What waits, what runs and what has ended. When nothing is left, `more` is asked for jobs that
    what has ended makes possible (the next rung of a race)."""

    waiting: list[Job]
    more: Callable[[], Sequence[Job]] = tuple
    running: dict[str, Job] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    stopping: bool = False

    def take(self) -> Job | None:
        """The next job whose needs are met, if any."""
        if self.stopping:
            return None
        if not self.waiting and not self.running:
            self.waiting += self.more()
        job = next((job for job in self.waiting if job.needs <= self.done), None)
        if job is not None:
            self.waiting.remove(job)
            self.running[job.job_id] = job
        return job

    @property
    def exhausted(self) -> bool:
        """Whether no job will ever be handed out again, once `take` has given none."""
        return self.stopping or not (self.waiting or self.running)

    def finish(self, job_id: str, outcome: Outcome, reason: str | None) -> list[tuple[Job, str]]:
        """Note the end of a running job; gives the jobs that can now never run, and why."""
        job = self.running.pop(job_id)
        if outcome == "completed":
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
