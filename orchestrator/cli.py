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
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from rich.console import Console
from rich.markup import escape

from orchestrator import plan as planning
from orchestrator.faults import explain, is_infrastructure
from orchestrator.growth import growth_of, objectives_of, plan_with
from orchestrator.leases import Lease, LeaseHeldError
from orchestrator.plan import SweepPlan
from orchestrator.spec import SpecError, Sweep, load
from orchestrator.storage import open_store
from orchestrator.store import DamagedArtifactError, Store

if TYPE_CHECKING:
    from orchestrator.jobs import Job
    from orchestrator.ledger import Ledger
    from orchestrator.plan import TrialPlan
    from orchestrator.records import Records, TrialRecord
    from orchestrator.selection import Ranking
    from orchestrator.space import LeftOut
    from orchestrator.stopping import Judge
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
        _print_plan(loaded, planned, _store(results, loaded), results)
        return
    results = _writable(results)  # absolute: workers run in folders of their own
    store = _store(results, loaded, writing=True)
    folder = results / loaded.name / loaded.profile
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with Lease(folder / ".running", on_lost=_taken_over).at_once():
            status = _run(loaded, planned, store, results, address, max_concurrent, _command())
    except LeaseHeldError as error:
        _refuse(f"{folder}: this sweep is running already, in another process ({error})")
    except Exception as error:
        if not is_infrastructure(error):
            raise
        click.echo(f"{explain(error, folder)}; the same command goes on from here", err=True)
        status = FAILED
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
    store = _store(results, loaded)
    if as_json:
        click.echo(json.dumps(_plan_as_json(loaded, planned, store, results), indent=1))
    else:
        _print_plan(loaded, planned, store, results)


@app.command()
@_sweep_options
def validate(sweep: Path, profile: str | None, overrides: tuple[str, ...], results: Path) -> None:
    """Check a sweep file and its profile; exit 2 with every mistake, or say that it is valid."""
    loaded, planned = _plan(sweep, profile, overrides, results)
    trials = f"{len(planned.trials)} trials at profile {loaded.profile}"
    out.print(f"{escape(str(sweep))}: valid, {trials}")


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
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    default=Path("results"),
    show_default=True,
    help="Folder of the records, and of the MLflow store unless MLFLOW_TRACKING_URI is set.",
)
@click.option("--profile", help="Only what ran at this profile.")
@click.argument("sweep", required=False, type=click.Path(path_type=Path))
def mirror(sweep: Path | None, profile: str | None, results: Path) -> None:
    """Write runs to MLflow again from the records: those of SWEEP, or of every sweep.

    \b
    orchestrate mirror                               every sweep that ran here or is published
    orchestrate mirror sweeps/depth_ablation.yaml    one, at the profile that its file names

    What MLflow shows already stays as it is. Exit status 1 where it cannot be reached.
    """
    from orchestrator import mirroring

    name, at = ("*", profile or "*") if sweep is None else _named(sweep, profile, results)
    recorded = mirroring.find(results, name, at)
    if not recorded:
        _refuse(f"{results / name / at}: no results, here or published; run the sweep first")
    results, failed = _writable(results), False
    for each in recorded:
        try:
            done = mirroring.mirror(each, results)
        except LeaseHeldError:
            out.print(f"{each.folder}: runs at this moment, and shows itself")
            continue
        except (ValueError, OSError) as error:
            click.echo(f"{each.folder}: {_first_line(error)}", err=True)
            failed = True
            continue
        out.print(f"{each.sweep} at {each.profile}: {done.written} of {done.trials} trials written")
        if done.problem:
            click.echo(f"{each.sweep} at {each.profile}: {done.problem}", err=True)
        failed = failed or done.problem is not None
        if not done.reached:
            break
    sys.exit(FAILED if failed else 0)


@app.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--address", help="Ray cluster to look at, HOST:PORT or auto; else this machine.")
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    default=Path("results"),
    show_default=True,
    help="Folder that the sweep would write into.",
)
@click.option("--profile", help="Scale that the sweep would run at.")
@click.argument("sweep", type=click.Path(path_type=Path), required=False)
def doctor(
    sweep: Path | None, profile: str | None, results: Path, address: str | None, as_json: bool
) -> None:
    """Check that this machine, or a cluster, has what a sweep will need; name each remedy.

    \b
    orchestrate doctor                                      this machine
    orchestrate doctor sweeps/width_vs_depth.yaml --profile llama31_8b --address auto
    """
    from orchestrator import doctor as doctoring
    from orchestrator.cluster import UnreachableError, host_and_port

    if sweep is None and profile is not None:
        _refuse("--profile needs a sweep: orchestrate doctor SWEEP --profile PROFILE")
    try:
        if address is not None and address != "auto":
            host_and_port(address)
    except UnreachableError as error:
        _refuse(f"--address: {error}")
    needs, store = doctoring.Needs(), None
    if sweep is not None:
        loaded, planned = _plan(sweep, profile, (), results)
        store = _store(results, loaded)
        stored = {n.stage_id for n in planned.nodes() if store.manifest(n.stage_id) is not None}
        needs = doctoring.needs_of(planned, loaded.resources, stored)
    checks = list(doctoring.examine(results, needs, address, store))
    if as_json:
        click.echo(doctoring.as_json(checks))
    else:
        out.print(doctoring.as_table(checks))
    sys.exit(FAILED if any(check.required and not check.ok for check in checks) else 0)


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
    jobs = make_jobs(planned, _finished(sweep, ledger), store, sweep.resources)
    _greet(sweep, planned, len(planned.trials) - sum(not job.shared for job in jobs))
    interrupted = False
    if jobs or sweep.grows:
        interrupted = _run_jobs(
            jobs, planned, place, ledger, mirror, sweep, address, max_concurrent
        )
        # What a race went on to, or a search proposed, is known only now.
        planned = plan_with(sweep, ledger.trials())
    if not interrupted and (again := _winner_to_rebuild(sweep, planned, ledger, store)):
        interrupted = _run_jobs(
            again, planned, place, ledger, mirror, sweep, address, max_concurrent
        )
    order = [trial.trial.trial_id for trial in planned.trials]
    records = _as_asked(ledger.records(sweep.name, sweep.profile, order), planned)
    write_parquet(records, place.folder)
    ranking = _write_report(records, sweep, place.folder, command)
    _copy_winner(ranking, planned, place)
    mirror.finish(place.folder, records)
    warnings = mirror.close()
    tracked = ledger.records(sweep.name, sweep.profile, order)
    write_parquet(_as_asked(tracked, planned), place.folder)
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
    growth = growth_of(sweep, ledger.trials(), place.folder)

    def more(idle: bool) -> Sequence[Job]:
        """The jobs that the trials that have ended make possible."""
        ended = ledger.trials()
        grown = growth.grown(ended, idle)
        if grown is None:
            return ()
        left = make_jobs(grown, set(ended), place.store, sweep.resources)
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
                _judge(sweep, planned, ledger),
            )
    except KeyboardInterrupt:
        return True
    except tuning.NoRoomError as error:
        _refuse(str(error))
    finally:
        growth.close(ledger.trials())
    return summary.interrupted


def _judge(sweep: Sweep, planned: SweepPlan, ledger: Ledger) -> Judge:
    """Who stops trials early; what earlier runs of the sweep measured is told again."""
    from orchestrator.stopping import judge_of

    lengths = [trial.tokens_trained for trial in planned.trials]
    baselines = {t.trial_id for t in ledger.trials().values() if t.baseline is not None}
    curves = ledger.records(sweep.name, sweep.profile).curves if sweep.scheduler.stops else ()
    measured = [point for point in curves if point.trial_id not in baselines]
    return judge_of(sweep.scheduler, max(lengths, default=0), measured)


def _titles(jobs: Sequence[Job], planned: SweepPlan) -> dict[str, str]:
    return {
        job.job_id: f"{job.nodes[0].kind} for {planned.asked_by[job.job_id]} trials"
        if job.shared
        else job.trial.trial.label
        for job in jobs
    }


def _finished(sweep: Sweep, ledger: Ledger) -> set[str]:
    """Trials that need not run again. Where the sweep stops none early, one that was goes on."""
    return ledger.finished_trials(stopped=sweep.scheduler.stops)


def _as_asked(records: Records, planned: SweepPlan) -> Records:
    """The records under the names that the sweep gives its trials now: it may have gained axes
    since they ran. Those that it does not ask for any more are marked."""
    asked = {each.trial.trial_id: each.trial for each in planned.trials}
    trials = [
        replace(trial, axes=dict(now.axes), baseline=now.baseline)
        if (now := asked.get(trial.trial_id)) is not None
        else replace(trial, in_sweep=False)
        for trial in records.trials
    ]
    return replace(records, trials=tuple(trials))


def _greet(sweep: Sweep, planned: SweepPlan, done: int) -> None:
    out.print(_headline(sweep))
    for line in _left_out(planned.left_out):
        out.print(f"  {escape(line)}")
    out.print(f"{len(planned.trials)} trials, {done} of them done already")
    for line in _to_come(sweep):
        out.print(line)


def _to_come(sweep: Sweep) -> list[str]:
    """What the sweep will be given while it runs."""
    later = [f"then, in the rung {escape(r.name)}: those that the rung before chooses"
             for r in sweep.scheduler.rungs[1:]]  # fmt: skip
    search, seeds = sweep.search, len(sweep.seeds)
    if search.method != "grid":
        goals = ", ".join(f"{each.metric} ({each.mode})" for each in objectives_of(sweep))
        later.append(
            f"then up to {search.trials} configurations proposed by {search.method}, with "
            f"{seeds} seed{'s' * (seeds > 1)} each, for {goals}"
        )
    if sweep.scheduler.stops:
        later.append(
            f"{sweep.scheduler.method} may stop a trial by its held-out loss after "
            f"{sweep.scheduler.floor_tokens:,} tokens"
        )
    return later


def _headline(sweep: Sweep) -> str:
    profile = f"at profile [bold]{sweep.profile}[/]"
    return f"[bold]{sweep.name}[/] {profile}: {escape(sweep.question)}"


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
        records.asked,
        folder,
        sweep.question,
        sweep.select.metric,
        sweep.select.mode,
        command or f"orchestrate sweeps/{sweep.name}.yaml --profile {sweep.profile}",
        sweep.claims,
        sweep.finalists,
    )


def _winner_to_rebuild(
    sweep: Sweep, planned: SweepPlan, ledger: Ledger, store: Store
) -> Sequence[Job]:
    """The jobs that make the winner's checkpoint again where it was lost or damaged: its trial
    is finished, so that nothing else would."""
    from orchestrator.jobs import make_jobs
    from orchestrator.selection import rank

    ids = {trial.trial.trial_id for trial in planned.trials}
    records = ledger.records(sweep.name, sweep.profile)
    won = _won(rank(records, sweep.select.metric, sweep.select.mode, sweep.finalists), planned)
    if won is None or store.found(won.student.stage_id) is not None:
        return ()
    out.print("the checkpoint of the winner was lost or damaged, and is made again")
    return make_jobs(planned, ids - {won.trial.trial_id}, store, sweep.resources)


def _won(ranking: Ranking | None, planned: SweepPlan) -> TrialPlan | None:
    from orchestrator.selection import winner

    chosen = winner(ranking)
    if chosen is None:
        return None
    # It may be of an earlier, larger form of this sweep.
    return next((t for t in planned.trials if t.trial.trial_id == chosen.trial.trial_id), None)


def _copy_winner(ranking: Ranking | None, planned: SweepPlan, place: Place) -> None:
    """`best/`: the winner's checkpoint as a folder of its own, replaced whole."""
    won = _won(ranking, planned)
    if won is None:
        return
    model = won.student
    try:
        place.store.fetch(model.stage_id)
    except DamagedArtifactError as error:
        out.print(f"[yellow]warning[/]: best/ stays as it was: {escape(str(error))}")
        return
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
        out.print(claims_table(judge(records.asked, sweep.claims)))
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
        return loaded, plan_with(loaded, _ended(results / loaded.name / loaded.profile))
    except SpecError as error:
        _refuse(*error.messages)


def _named(sweep: Path, profile: str | None, results: Path) -> tuple[str, str]:
    """The names under which a sweep file's results are kept."""
    try:
        loaded = load(sweep, profile, (), results)
    except SpecError as error:
        _refuse(*error.messages)
    return loaded.name, loaded.profile


def _ended(folder: Path) -> dict[str, TrialRecord]:
    """Trials of a results folder that completed or were stopped, by id."""
    if not (folder / "ledger.jsonl").exists():
        return {}
    from orchestrator.ledger import Ledger

    trials = Ledger(folder / "ledger.jsonl").trials()
    return {id_: trial for id_, trial in trials.items() if trial.status != "failed"}


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


def _taken_over() -> None:
    """A process of another machine took this one, which was stopped for a minute, for dead. The
    ledger is the other's now: two that write it would repeat each other's work."""
    click.echo("the sweep is another process's now, or its folder is gone; this one ends", err=True)
    os._exit(INTERRUPTED)


def _store(results: Path, sweep: Sweep, writing: bool = False) -> Store:
    """Where the sweep's artifacts are."""
    try:
        store = open_store(results / "artifacts", sweep.artifacts)
        if writing:
            store.check_access()
    except (OSError, ValueError) as error:
        _refuse(f"artifacts: {sweep.artifacts or results}: cannot be used ({_first_line(error)})")
    return store


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


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

    try:
        return read_parquet(folder)
    except ValueError as error:  # a newer version wrote them, or a disk changed them
        _refuse(f"{error}; the sweep's own command writes its records anew")


def _command() -> str:
    return "orchestrate " + " ".join(sys.argv[1:])


def _print_plan(sweep: Sweep, planned: SweepPlan, store: Store, results: Path) -> None:
    from orchestrator.progress import plan_table

    described = _plan_as_json(sweep, planned, store, results)
    out.print(_headline(sweep))
    for table in plan_table(described, out.width):
        out.print(table)
    for line in _left_out(planned.left_out):
        out.print(escape(line))
    for line in _to_come(sweep):
        out.print(line)
    total = described["total"]
    out.print(
        f"{total['trials']} trials ({total['trials_done']} done), {total['stages']} stages "
        f"({total['stages_stored']} stored), {total['tokens']:,} tokens, {total['flops']:.3g} "
        "FLOPs; work shared between trials counts once, questions are not counted"
    )
    if total["cache_bytes"]:
        out.print(f"caches of teacher outputs: {total['cache_bytes'] / 1e9:.3g} GB of disk")
    if total["gpu_hours"] is not None:
        used = sweep.resources
        out.print(
            f"{total['gpu_hours']:,.0f} GPU-hours, shared work once, at {used.utilisation:.0%} of "
            f"{used.peak_tflops:g} TFLOPS; {used.workers} workers of {used.gpus_per_worker:g} GPU"
        )
    for line in map(_warning, described["warnings"]):
        out.print(f"[yellow]warning[/]: {escape(line)}")


def _plan_as_json(sweep: Sweep, planned: SweepPlan, store: Store, results: Path) -> dict[str, Any]:
    stored = {n.stage_id for n in planned.nodes() if store.manifest(n.stage_id) is not None}
    ended = _ended(results / sweep.name / sweep.profile)
    over = ("completed", "stopped") if sweep.scheduler.stops else ("completed",)
    done = {id_ for id_, trial in ended.items() if trial.status in over}
    found = planning.describe(
        planned, sweep.resources, done, stored, lambda stage_id: str(store.path(stage_id))
    )
    return {"sweep": sweep.name, "profile": sweep.profile, **found}


def _warning(warning: Mapping[str, Any]) -> str:
    """The sentence, after the trials that it is true of; of many, the first and their number."""
    labels = warning["labels"]
    more = f" and {len(labels) - 1} more" if len(labels) > 1 else ""
    return f"{labels[0]}{more}: {warning['text']}"


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
