"""One run of a sweep, from its plan to its report: what is left is run, all of it is recorded."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from orchestrator import report as reporting
from orchestrator import tuning
from orchestrator.asking import check_tasks, harness_tasks
from orchestrator.claims import judge
from orchestrator.growth import Trials, growth_of, plan_with
from orchestrator.jobs import Job, make_jobs
from orchestrator.ledger import Ledger
from orchestrator.outline import greet
from orchestrator.plan import SweepPlan, TrialPlan
from orchestrator.progress import Board, claims_table, outcome_table
from orchestrator.publishing import write_report
from orchestrator.records import Records, write_parquet
from orchestrator.selection import Ranking, rank, winner
from orchestrator.spec import Sweep
from orchestrator.stopping import Judge, judge_of
from orchestrator.store import DamagedArtifactError, Store
from orchestrator.tracking import Mirror, artifact_location, tracking_uri
from orchestrator.tuning import Place


@dataclass(frozen=True)
class Options:
    """How to run: the Ray cluster to join (a local one if None), how many trials at a time, the
    command that the report names."""

    address: str | None = None
    max_concurrent: int | None = None
    command: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of the trials that the sweep asks for now."""

    interrupted: bool
    failed: int


def run(
    sweep: Sweep, planned: SweepPlan, store: Store, results: Path, options: Options, out: Console
) -> Outcome:
    """Run what is left of a sweep, then write records, report and winner.

    `results` is absolute: workers run in folders of their own. Before anything starts, raises
    `room.NoRoomError` where no worker of the size asked for has room, and
    `asking.MissingTasksError` where a task cannot be had.
    """
    place = Place(sweep.name, sweep.profile, results / sweep.name / sweep.profile, store)
    (place.folder / "sweep.yaml").write_text(sweep.dump_yaml(relative_to=place.folder))
    ledger = Ledger(place.folder / "ledger.jsonl")
    mirror = Mirror(
        tracking_uri(results),
        artifact_location(results),
        sweep.name,
        sweep.profile,
        (place.folder / "sweep.yaml").read_text(),
        ledger.tracked,
    )
    failed = {id_: t for id_, t in ledger.trials().items() if t.status == "failed"}
    this = _Run(sweep, place, ledger, mirror, options, out, failed)
    planned, interrupted = this.trials(planned)
    return this.finish(planned, interrupted)


@dataclass(frozen=True)
class _Run:
    sweep: Sweep
    place: Place
    ledger: Ledger
    mirror: Mirror
    options: Options
    out: Console
    failed: Trials
    """Trials that failed in a run before this one, which tries them again."""

    def ended(self) -> Trials:
        """Trials that this run need not begin: those that ended, unless they failed before it."""
        trials = self.ledger.trials().items()
        return {id_: trial for id_, trial in trials if trial is not self.failed.get(id_)}

    def trials(self, planned: SweepPlan) -> tuple[SweepPlan, bool]:
        """Run what is left; the plan with what came to it, and whether it was interrupted."""
        # Where the sweep stops no trial early, one that was stopped goes on.
        finished = self.ledger.finished_trials(stopped=self.sweep.scheduler.stops)
        jobs = self.jobs(planned, finished)
        self.check_tasks(jobs)
        left = sum(not job.shared for job in jobs)
        greet(self.out, self.sweep, planned, len(planned.trials) - left)
        interrupted = False
        if jobs or self.sweep.grows:
            interrupted = self.run_jobs(jobs, planned)
            # What a race went on to, or a search proposed, is known only now.
            planned = plan_with(self.sweep, self.ledger.trials())
        if not interrupted and (again := self.winner_to_rebuild(planned)):
            interrupted = self.run_jobs(again, planned)
        return planned, interrupted

    def jobs(self, planned: SweepPlan, finished: set[str]) -> list[Job]:
        return list(make_jobs(planned, finished, self.place.store, self.sweep.resources))

    def check_tasks(self, jobs: Sequence[Job]) -> None:
        """Whether the questions of the jobs can be had: better now than after hours of training."""
        asked = harness_tasks(node for job in jobs for node in job.nodes)
        if asked:
            names = ", ".join(dict.fromkeys(task["name"] for task in asked))
            self.out.print(f"looking for the questions of {escape(names)}")
            check_tasks(asked)

    def run_jobs(self, jobs: Sequence[Job], planned: SweepPlan) -> bool:
        """Whether the run was interrupted."""
        board = Board(self.out, _titles(jobs, planned))
        begun = {job.job_id for job in jobs}
        growth = growth_of(self.sweep, self.ended(), self.failed, self.place.folder)

        def more(idle: bool) -> Sequence[Job]:
            """The jobs that the trials that have ended make possible."""
            ended = self.ended()
            grown = growth.grown(ended, idle)
            if grown is None:
                return ()
            found = [job for job in self.jobs(grown, set(ended)) if job.job_id not in begun]
            begun.update(job.job_id for job in found)
            board.add(_titles(found, grown))
            return found

        try:
            with board.shown():
                summary = tuning.run(
                    jobs,
                    self.place,
                    self.ledger,
                    self.mirror,
                    board,
                    self.sweep.resources,
                    self.options.address,
                    self.options.max_concurrent,
                    more,
                    self.judge(planned),
                )
        except KeyboardInterrupt:
            return True
        finally:
            growth.close(self.ended())
        return summary.interrupted

    def judge(self, planned: SweepPlan) -> Judge:
        """Who stops trials early; what earlier runs of the sweep measured is told again."""
        sweep, ledger = self.sweep, self.ledger
        lengths = [trial.tokens_trained for trial in planned.trials]
        seeds = {t.trial_id: t.seed for t in ledger.trials().values() if t.baseline is None}
        curves = ledger.records(sweep.name, sweep.profile).curves if sweep.scheduler.stops else ()
        measured = [point for point in curves if point.trial_id in seeds]
        return judge_of(sweep.scheduler, max(lengths, default=0), measured, seeds)

    def winner_to_rebuild(self, planned: SweepPlan) -> Sequence[Job]:
        """The jobs that make the winner's checkpoint again where it was lost or damaged: its trial
        is finished, so that nothing else would."""
        ids = {trial.trial.trial_id for trial in planned.trials}
        records, select = self.records(planned).asked, self.sweep.select
        won = _won(rank(records, select.metric, select.mode, self.sweep.finalists), planned)
        if won is None or self.place.store.found(won.student.stage_id) is not None:
            return ()
        self.out.print("the checkpoint of the winner was lost or damaged, and is made again")
        return self.jobs(planned, ids - {won.trial.trial_id})

    def finish(self, planned: SweepPlan, interrupted: bool) -> Outcome:
        """Write everything from the ledger, and say how it ended."""
        records = self.records(planned)
        write_parquet(records, self.place.folder)
        ranking = write_report(records, self.sweep, self.place.folder, self.options.command)
        self.copy_winner(ranking, planned)
        self.mirror.finish(self.place.folder, records)
        warnings = self.mirror.close()
        write_parquet(self.records(planned), self.place.folder)  # with the ids of MLflow's runs
        self.close(records, ranking, warnings)
        if interrupted:
            self.out.print("interrupted; the same command goes on from here")
        mine = {trial.trial.trial_id for trial in planned.trials}
        failed = [t for t in records.trials if t.status == "failed" and t.trial_id in mine]
        return Outcome(interrupted, len(failed))

    def records(self, planned: SweepPlan) -> Records:
        """The records under the names that the sweep gives its trials now: it may have gained axes
        since they ran. Those that it does not ask for any more are marked."""
        asked = {each.trial.trial_id: each.trial for each in planned.trials}
        records = self.ledger.records(self.sweep.name, self.sweep.profile, list(asked))
        trials = [
            replace(trial, axes=dict(now.axes), baseline=now.baseline)
            if (now := asked.get(trial.trial_id)) is not None
            else replace(trial, in_sweep=False)
            for trial in records.trials
        ]
        return replace(records, trials=tuple(trials))

    def copy_winner(self, ranking: Ranking | None, planned: SweepPlan) -> None:
        """`best/`: the winner's checkpoint as a folder of its own, replaced whole. Where there is
        no winner or its checkpoint is lost, no other model stays there."""
        won, store, folder = _won(ranking, planned), self.place.store, self.place.folder
        beside, target, of = folder / "best.part", folder / "best", folder / "best.trial"
        shutil.rmtree(beside, ignore_errors=True)
        try:
            if won is not None:
                store.fetch(won.student.stage_id)
                shutil.copytree(store.path(won.student.stage_id) / "model", beside)
        except DamagedArtifactError as error:
            if won and of.is_file() and of.read_text().strip() == won.trial.trial_id:
                return
            self.out.print(f"[yellow]warning[/]: there is no best/: {escape(str(error))}")
        of.unlink(missing_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        if won is not None and beside.is_dir():
            beside.rename(target)
            # Beside it and not inside: the folder may be another sweep's source, by its content.
            of.write_text(f"{won.trial.trial_id}\n")

    def close(self, records: Records, ranking: Ranking | None, warnings: Sequence[str]) -> None:
        """The last lines: the table, the winner, failures, and where to look next."""
        out, chosen = self.out, winner(ranking)
        out.print(outcome_table(ranking, chosen))
        if self.sweep.claims:
            out.print(claims_table(judge(records.asked, self.sweep.claims)))
        for trial in records.trials:
            if trial.status == "failed":
                out.print(f"[red]failed[/] {trial.trial_id}: {escape(str(trial.reason))}")
        for warning in warnings:
            out.print(f"[yellow]MLflow[/]: {escape(warning)}")
        out.print(escape(reporting.summary(chosen, self.sweep.select.metric)))
        best = self.place.folder / "best"
        where = f"   winner: {best}" if best.is_dir() else ""
        out.print(f"report: {self.place.folder}/report.html{where}")
        out.print("compare runs: orchestrate ui")


def _titles(jobs: Sequence[Job], planned: SweepPlan) -> Mapping[str, str]:
    return {
        job.job_id: f"{job.nodes[0].kind} for {planned.asked_by[job.job_id]} trials"
        if job.shared
        else job.trial.trial.label
        for job in jobs
    }


def _won(ranking: Ranking | None, planned: SweepPlan) -> TrialPlan | None:
    chosen = winner(ranking)
    if chosen is None:
        return None
    return next(t for t in planned.trials if t.trial.trial_id == chosen.trial.trial_id)
