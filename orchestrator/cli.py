"""The command line: parses, delegates, and turns what happened into an exit status.

0 every trial completed, 1 some trial failed, 2 invalid input and nothing was started,
130 interrupted with the state saved.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from rich.console import Console
from rich.markup import escape

from orchestrator import plan as planning
from orchestrator.plan import SweepPlan
from orchestrator.race import settled
from orchestrator.space import enumerate_trials
from orchestrator.spec import SpecError, Sweep, load
from orchestrator.store import Lease, LeaseHeldError, Store

if TYPE_CHECKING:
    from orchestrator.jobs import Job
    from orchestrator.ledger import Ledger
    from orchestrator.records import Records, TrialRecord
    from orchestrator.selection import Ranking
    from orchestrator.space import LeftOut
    from orchestrator.tracking import Mirror
    from orchestrator.tuning import Place

INVALID, FAILED, INTERRUPTED = 2, 1, 130
LEFT_OUT_SHOWN = 10

out = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)


class _SweepByDefault(click.Group):
    """A first word that is no command is a sweep file to run."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands:
            if not args[0].endswith((".yaml", ".yml")) and not Path(args[0]).exists():
                known = ", ".join(sorted(self.commands))
                ctx.fail(f"{args[0]!r} is neither a sweep file (.yaml) nor a command ({known})")
            args = ["run", *args]
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # `orchestrate --set a=1 sweep.yaml`: options before the sweep belong to `run` too.
        if args and args[0].startswith("-") and args[0] not in ("--help", "-h", "--version"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


def _sweep_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option(
            "--results",
            type=click.Path(path_type=Path),
            default=Path("results"),
            show_default=True,
            help="Folder for results, artifacts and the MLflow store.",
        ),
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            help="Override a setting of every trial, e.g. --set distill.training.steps=50.",
        ),
        click.option("--profile", help="Scale to run at; a file of sweeps/profiles or a path."),
        click.argument("sweep", type=click.Path(path_type=Path)),
    ):
        command = option(command)
    return command


@click.group(cls=_SweepByDefault, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="orchestrate")
def app() -> None:
    """Find out, with evidence, how to make a language model smaller.

    \b
    orchestrate sweeps/depth_ablation.yaml                  run a sweep
    orchestrate sweeps/depth_ablation.yaml --dry-run        say what would run
    orchestrate sweeps/depth_ablation.yaml --profile smollm2 --set distill.training.steps=40
    orchestrate plan sweeps/depth_ablation.yaml --json      the same as JSON
    orchestrate ui                                          compare runs in MLflow
    """


@app.command()
@_sweep_options
@click.option("--address", help="Ray cluster to join, e.g. auto; a local one by default.")
@click.option("--max-concurrent", type=click.IntRange(min=1), help="Trials at the same time.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
def run(
    sweep: Path,
    profile: str | None,
    overrides: tuple[str, ...],
    results: Path,
    address: str | None,
    max_concurrent: int | None,
    dry_run: bool,
) -> None:
    """Run a sweep: prune, distil, measure, choose and report. Goes on where it stopped."""
    loaded, planned = _plan(sweep, profile, overrides, results)
    if dry_run:
        _print_plan(loaded, planned, Store(results / "artifacts"), results)
        return
    results = _writable(results)  # absolute: workers run in folders of their own
    store = Store(results / "artifacts")
    folder = _results_folder(results, loaded)
    try:
        with Lease(folder / ".running").at_once():
            status = _run(loaded, planned, store, results, address, max_concurrent, _command())
    except LeaseHeldError as error:
        _refuse(f"{folder}: this sweep is running already, in another process ({error})")
    sys.exit(status)


@app.command()
@_sweep_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(
    sweep: Path, profile: str | None, overrides: tuple[str, ...], results: Path, as_json: bool
) -> None:
    """Print trials, shapes, stages and what they share; run nothing.

    \b
    orchestrate plan sweeps/depth_ablation.yaml
    orchestrate plan sweeps/depth_ablation.yaml --profile smollm2 --json
    """
    loaded, planned = _plan(sweep, profile, overrides, results)
    store = Store(results / "artifacts")
    if as_json:
        click.echo(json.dumps(_plan_as_json(loaded, planned, store, results), indent=1))
    else:
        _print_plan(loaded, planned, store, results)


@app.command()
@_sweep_options
def validate(sweep: Path, profile: str | None, overrides: tuple[str, ...], results: Path) -> None:
    """Check a sweep file and its profile; exit 2 with every mistake, or say that it is valid."""
    loaded, planned = _plan(sweep, profile, overrides, results)
    out.print(f"{sweep}: valid, {len(planned.trials)} trials at profile {loaded.profile}")


@app.command()
@_sweep_options
def report(sweep: Path, profile: str | None, overrides: tuple[str, ...], results: Path) -> None:
    """Write tables, figures, report.html and best.json again from the parquet files."""
    loaded, _ = _plan(sweep, profile, overrides, results)
    folder = _recorded_folder(results, loaded)
    _write_report(_read(folder), loaded, folder)
    out.print(f"written: {folder}/report.html, tables/, figures/, best.json")


@app.command()
@_sweep_options
def best(sweep: Path, profile: str | None, overrides: tuple[str, ...], results: Path) -> None:
    """Print the winning configuration as JSON."""
    loaded, _ = _plan(sweep, profile, overrides, results)
    path = _recorded_folder(results, loaded) / "best.json"
    if not path.exists():
        _refuse(f"{path}: no trial of this sweep has won yet")
    click.echo(path.read_text())


@app.command()
@_sweep_options
def publish(sweep: Path, profile: str | None, overrides: tuple[str, ...], results: Path) -> None:
    """Copy a finished sweep's small files to results/published, to be committed."""
    loaded, _ = _plan(sweep, profile, overrides, results)
    folder = results / loaded.name / loaded.profile
    if not (folder / "trials.parquet").exists():
        _refuse(f"{folder}: nothing to publish; run the sweep first")
    target = results / "published" / loaded.name / loaded.profile
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in folder.glob("*.parquet"):
        shutil.copyfile(file, target / file.name)
    # All else is made anew from the records, with paths as they are from there.
    ran = load(folder / "sweep.yaml")
    (target / "sweep.yaml").write_text(ran.dump_yaml(relative_to=target.resolve()))
    _write_report(_read(target), ran, target)
    files = [file for file in target.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files) / 1e6
    out.print(f"published {len(files)} files, {size:.1f} MB, to {target}")


@app.command()
@click.option("--results", type=click.Path(path_type=Path), default=Path("results"))
@click.option("--port", default=5000, show_default=True)
def ui(results: Path, port: int) -> None:
    """Open MLflow's page on the runs, on 127.0.0.1."""
    from orchestrator.tracking import ui_command

    try:
        command = ui_command(results, port)
    except ValueError as error:
        _refuse(str(error))
    out.print(f"MLflow on http://127.0.0.1:{port} (Ctrl-C to end)")
    os.execv(command[0], command)


# --- running ---------------------------------------------------------------------------------


def _run(
    sweep: Sweep,
    planned: SweepPlan,
    store: Store,
    results: Path,
    address: str | None,
    max_concurrent: int | None,
    command: str,
) -> int:
    from orchestrator.jobs import make_jobs
    from orchestrator.ledger import Ledger
    from orchestrator.records import write_parquet
    from orchestrator.tracking import Mirror, artifact_location, tracking_uri
    from orchestrator.tuning import Place

    place = Place(sweep.name, sweep.profile, results / sweep.name / sweep.profile, store)
    (place.folder / "sweep.yaml").write_text(sweep.dump_yaml(relative_to=place.folder))
    ledger = Ledger(place.folder / "ledger.jsonl")
    resolved = (place.folder / "sweep.yaml").read_text()
    mirror = Mirror(
        tracking_uri(results),
        artifact_location(results),
        sweep.name,
        sweep.profile,
        resolved,
        ledger.tracked,
    )
    jobs = make_jobs(planned, ledger.finished_trials(), store, sweep.resources)
    _greet(sweep, planned, len(planned.trials) - sum(not job.shared for job in jobs))
    interrupted = False
    if jobs:
        interrupted = _run_jobs(
            jobs, planned, place, ledger, mirror, sweep, address, max_concurrent
        )
        # What a race went on to is known only now.
        planned = _plan_with(sweep, _ended(ledger))
    order = [trial.trial.trial_id for trial in planned.trials]
    records = ledger.records(sweep.name, sweep.profile, order)
    write_parquet(records, place.folder)
    ranking = _write_report(records, sweep, place.folder, command)
    _copy_winner(ranking, planned, place)
    mirror.finish(place.folder)
    warnings = mirror.close()
    write_parquet(ledger.records(sweep.name, sweep.profile, order), place.folder)
    _close(records, ranking, place, warnings, sweep)
    if interrupted:
        out.print("interrupted; the same command goes on from here")
        return INTERRUPTED
    mine = set(order)
    return FAILED if any(t.status == "failed" and t.trial_id in mine for t in records.trials) else 0


def _run_jobs(
    jobs: Sequence[Job],
    planned: SweepPlan,
    place: Place,
    ledger: Ledger,
    mirror: Mirror,
    sweep: Sweep,
    address: str | None,
    max_concurrent: int | None,
) -> bool:
    """Whether the run was interrupted."""
    from orchestrator import tuning
    from orchestrator.jobs import make_jobs
    from orchestrator.progress import Board

    board = Board(out, _titles(jobs, planned))
    begun = {job.job_id for job in jobs}

    def more() -> Sequence[Job]:
        """The jobs that the trials that have ended make possible."""
        if sweep.scheduler.method != "race":
            return ()
        grown = _plan_with(sweep, _ended(ledger))
        left = make_jobs(grown, set(_ended(ledger)), place.store, sweep.resources)
        found = [job for job in left if job.job_id not in begun]
        begun.update(job.job_id for job in found)
        board.add(_titles(found, grown))
        return found

    try:
        with board.shown():
            summary = tuning.run(
                jobs,
                place,
                ledger,
                mirror,
                board,
                sweep.resources,
                address,
                max_concurrent,
                more,
            )
    except KeyboardInterrupt:
        return True
    except tuning.NoRoomError as error:
        _refuse(str(error))
    return summary.interrupted


def _titles(jobs: Sequence[Job], planned: SweepPlan) -> dict[str, str]:
    return {
        job.job_id: f"{job.nodes[0].kind} for {planned.asked_by[job.job_id]} trials"
        if job.shared
        else job.trial.trial.label
        for job in jobs
    }


def _ended(ledger: Ledger) -> dict[str, TrialRecord]:
    """Every trial that was run, whether it completed or failed."""
    return {trial.trial_id: trial for trial in ledger.records("", "").trials}


def _greet(sweep: Sweep, planned: SweepPlan, done: int) -> None:
    out.print(f"[bold]{sweep.name}[/] at profile [bold]{sweep.profile}[/]: {sweep.question}")
    for line in _left_out(planned.left_out):
        out.print(f"  {escape(line)}")
    out.print(f"{len(planned.trials)} trials, {done} of them done already")


def _left_out(left_out: Sequence[LeftOut]) -> list[str]:
    """A line for each combination that makes no trial; of many, the first and their number."""
    lines = [f"left out: {dict(left.assignment)}: {left.reason}" for left in left_out]
    shown = lines if len(lines) <= LEFT_OUT_SHOWN else lines[: LEFT_OUT_SHOWN // 2]
    more = len(lines) - len(shown)
    return shown + ([f"… and {more} more left out; all stand in plan --json"] if more else [])


def _write_report(
    records: Records, sweep: Sweep, folder: Path, command: str | None = None
) -> Ranking | None:
    from orchestrator import report as reporting

    return reporting.write(
        records,
        folder,
        sweep.question,
        sweep.select.metric,
        sweep.select.mode,
        command or f"orchestrate sweeps/{sweep.name}.yaml --profile {sweep.profile}",
        sweep.claims,
        sweep.finalists,
    )


def _copy_winner(ranking: Ranking | None, planned: SweepPlan, place: Place) -> None:
    """`best/`: the winner's checkpoint as a folder of its own, replaced whole."""
    from orchestrator.selection import winner

    chosen = winner(ranking)
    if chosen is None:
        return
    won = next((t for t in planned.trials if t.trial.trial_id == chosen.trial.trial_id), None)
    if won is None:  # the winner is of an earlier, larger form of this sweep
        return
    model = won.student
    beside, target = place.folder / "best.part", place.folder / "best"
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(place.store.path(model.stage_id) / "model", beside)
    shutil.rmtree(target, ignore_errors=True)
    beside.rename(target)


def _close(
    records: Records,
    ranking: Ranking | None,
    place: Place,
    warnings: Sequence[str],
    sweep: Sweep,
) -> None:
    """The last lines: the table, the winner, failures, and where to look next."""
    from orchestrator import report as reporting
    from orchestrator.claims import judge
    from orchestrator.progress import claims_table, outcome_table
    from orchestrator.selection import winner

    chosen = winner(ranking)
    out.print(outcome_table(ranking, chosen))
    if sweep.claims:
        out.print(claims_table(judge(records, sweep.claims)))
    for trial in records.trials:
        if trial.status == "failed":
            out.print(f"[red]failed[/] {trial.trial_id}: {escape(str(trial.reason))}")
    for warning in warnings:
        out.print(f"[yellow]MLflow[/]: {escape(warning)}")
    out.print(escape(reporting.summary(chosen, sweep.select.metric)))
    out.print(f"report: {place.folder}/report.html   winner: {place.folder}/best")
    out.print("compare runs: orchestrate ui")


# --- planning --------------------------------------------------------------------------------


def _plan(
    sweep: Path, profile: str | None, overrides: Sequence[str], results: Path
) -> tuple[Sweep, SweepPlan]:
    """The sweep and its plan, with those rungs of a race that are decided already."""
    try:
        loaded = load(sweep, profile, overrides, results)
        ended = _completed(results / loaded.name / loaded.profile)
        return loaded, _plan_with(loaded, ended)
    except SpecError as error:
        _refuse(*error.messages)


def _plan_with(sweep: Sweep, ended: Mapping[str, TrialRecord]) -> SweepPlan:
    space = enumerate_trials(sweep)
    if sweep.scheduler.method == "race":
        space = settled(sweep, space, ended)
    return planning.plan_sweep(sweep, space)


def _completed(folder: Path) -> dict[str, TrialRecord]:
    """Trials that need not run again, by id."""
    if not (folder / "ledger.jsonl").exists():
        return {}
    from orchestrator.ledger import Ledger

    ledger = Ledger(folder / "ledger.jsonl")
    finished = ledger.finished_trials()
    return {t.trial_id: t for t in ledger.records("", "").trials if t.trial_id in finished}


def _refuse(*messages: str) -> NoReturn:
    for message in messages:
        click.echo(message, err=True)
    sys.exit(INVALID)


def _writable(results: Path) -> Path:
    probe = results / f".writable-{os.getpid()}"
    try:
        results.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        _refuse(f"--results {results}: cannot be written ({error.strerror}); name another folder")
    return results.resolve()


def _results_folder(results: Path, sweep: Sweep) -> Path:
    folder = results / sweep.name / sweep.profile
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _recorded_folder(results: Path, sweep: Sweep) -> Path:
    """The sweep's own results, or the published ones where it has not been run here."""
    own = results / sweep.name / sweep.profile
    published = results / "published" / sweep.name / sweep.profile
    for folder in (own, published):
        if (folder / "trials.parquet").exists():
            return folder
    _refuse(f"{own}: no results of this sweep at this profile, here or published; run it first")


def _read(folder: Path) -> Records:
    from orchestrator.records import read_parquet

    return read_parquet(folder)


def _command() -> str:
    return "orchestrate " + " ".join(sys.argv[1:])


def _print_plan(sweep: Sweep, planned: SweepPlan, store: Store, results: Path) -> None:
    from orchestrator.progress import plan_table

    described = _plan_as_json(sweep, planned, store, results)
    out.print(f"[bold]{sweep.name}[/] at profile [bold]{sweep.profile}[/]: {sweep.question}")
    for table in plan_table(described):
        out.print(table)
    for line in _left_out(planned.left_out):
        out.print(escape(line))
    for rung in sweep.scheduler.rungs[1:]:
        out.print(f"then, in the rung {escape(rung.name)}: those that the rung before chooses")
    total = described["total"]
    out.print(
        f"{total['trials']} trials ({total['trials_done']} done), {total['stages']} stages "
        f"({total['stages_stored']} stored), {total['tokens']:,} tokens, {total['flops']:.3g} "
        "FLOPs; work shared between trials counts once, questions are not counted"
    )
    if total["cache_bytes"]:
        out.print(f"caches of teacher outputs: {total['cache_bytes'] / 1e9:.3g} GB of disk")


def _plan_as_json(sweep: Sweep, planned: SweepPlan, store: Store, results: Path) -> dict[str, Any]:
    stored = {n.stage_id for n in planned.nodes() if store.manifest(n.stage_id) is not None}
    done = set(_completed(results / sweep.name / sweep.profile))
    found = planning.describe(planned, done, stored, lambda stage_id: str(store.path(stage_id)))
    return {"sweep": sweep.name, "profile": sweep.profile, **found}


def main() -> None:
    """Entry point of the console command."""
    try:
        app(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(INVALID)


if __name__ == "__main__":
    main()
