"""The command line: parses, delegates, and turns what happened into an exit status.

0 every trial completed, 1 some trial failed, 2 invalid input and nothing was started,
130 interrupted with the state saved.
"""

from __future__ import annotations

import gc
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from rich.console import Console
from rich.markup import escape

from orchestrator.faults import explain, is_infrastructure
from orchestrator.growth import plan_with
from orchestrator.leases import Lease, LeaseHeldError
from orchestrator.outline import describe, show_plan
from orchestrator.plan import SweepPlan
from orchestrator.spec import SpecError, Sweep, load
from orchestrator.storage import open_store
from orchestrator.store import Store
from orchestrator.wording import hint

if TYPE_CHECKING:
    from orchestrator.records import Records, TrialRecord

INVALID, FAILED, INTERRUPTED = 2, 1, 130

out = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)


class _SweepByDefault(click.Group):
    """A first word that is no command is a sweep file to run."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands:
            if not args[0].endswith((".yaml", ".yml")) and not Path(args[0]).exists():
                known = ", ".join(sorted(self.commands))
                meant = hint(args[0], self.commands)
                ctx.fail(
                    f"{args[0]!r} is neither a sweep file (.yaml) nor a command ({known}){meant}"
                )
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
    orchestrate compare A B                                 two trials or sweeps side by side
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
    """Run a sweep: prune, distil, measure, choose and report. Goes on where it stopped.

    \b
    orchestrate sweeps/depth_ablation.yaml                  at the profile that the file names
    orchestrate sweeps/depth_ablation.yaml --profile smollm2 --set distill.training.steps=40
    orchestrate sweeps/losses.yaml --profile llama31_8b --results /shared/results --address auto
    """
    loaded, planned = _plan(sweep, profile, overrides, results)
    if dry_run:
        show_plan(out, loaded, planned, _store(results, loaded), _ended(results, loaded))
        return
    results = _writable(results)  # absolute: workers run in folders of their own
    store = _store(results, loaded, writing=True)
    folder = results / loaded.name / loaded.profile
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with Lease(folder / ".running", on_lost=_taken_over).at_once():
            status = _run(loaded, planned, store, results, address, max_concurrent)
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
        described = describe(loaded, planned, store, _ended(results, loaded))
        click.echo(json.dumps(described, indent=1))
    else:
        show_plan(out, loaded, planned, store, _ended(results, loaded))


@app.command()
@_sweep_options
def validate(sweep: Path, profile: str | None, overrides: tuple[str, ...], results: Path) -> None:
    """Check a sweep file and its profile; exit 2 with every mistake, or say that it is valid.

    \b
    orchestrate validate sweeps/depth_ablation.yaml --profile llama31_8b
    """
    loaded, planned = _plan(sweep, profile, overrides, results)
    trials = f"{len(planned.trials)} trials at profile {loaded.profile}"
    out.print(f"{escape(str(sweep))}: valid, {trials}")


@app.command()
@_sweep_options
def report(sweep: Path, profile: str | None, overrides: tuple[str, ...], results: Path) -> None:
    """Write tables, figures, report.html and best.json again from the parquet files.

    \b
    orchestrate report sweeps/depth_ablation.yaml           of your run, or of the published one
    """
    loaded, _ = _plan(sweep, profile, overrides, results)
    folder = _recorded_folder(results, loaded)
    from orchestrator.publishing import write_report

    write_report(_read(folder), loaded, folder)
    out.print(f"written: {folder}/report.html, tables/, figures/, best.json")


@app.command()
@_sweep_options
def best(sweep: Path, profile: str | None, overrides: tuple[str, ...], results: Path) -> None:
    """Print the winning configuration as JSON.

    \b
    orchestrate best sweeps/depth_ablation.yaml --profile smollm2_local
    """
    loaded, _ = _plan(sweep, profile, overrides, results)
    path = _recorded_folder(results, loaded) / "best.json"
    if not path.exists():
        _refuse(f"{path}: no trial of this sweep has won yet")
    click.echo(path.read_text())


@app.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    default=Path("results"),
    show_default=True,
    help="Folder where sweeps are recorded; published ones are in its folder published.",
)
@click.argument("first")
@click.argument("second")
def compare(first: str, second: str, results: Path, as_json: bool) -> None:
    """Set two trials or two sweeps side by side: settings, metrics, paired tests, claims.

    A trial is named by its id or how that begins; a sweep by its file, its name, NAME@PROFILE or a
    results folder.

    \b
    orchestrate compare 361a2c ace708
    orchestrate compare width_vs_depth@tiny width_vs_depth@smollm2_local
    orchestrate compare results/losses/tiny results/published/losses/tiny --json
    """
    from orchestrator import comparing
    from orchestrator.side_by_side import tables_of

    try:
        compared = comparing.compare(results, first, second)
    except comparing.CannotCompareError as error:
        _refuse(*error.args)
    if as_json:
        click.echo(json.dumps(comparing.as_json(compared), indent=1, allow_nan=False))
        return
    for table in tables_of(compared):
        out.print(table)


@app.command()
@_sweep_options
def publish(sweep: Path, profile: str | None, overrides: tuple[str, ...], results: Path) -> None:
    """Copy a finished sweep's small files to results/published, to be committed.

    \b
    orchestrate publish sweeps/depth_ablation.yaml          its run at the profile that it names
    """
    from orchestrator import publishing

    loaded, _ = _plan(sweep, profile, overrides, results)
    folder = results / loaded.name / loaded.profile
    if not (folder / "trials.parquet").exists():
        _refuse(f"{folder}: nothing to publish; run the sweep first")
    _read(folder)
    target = results / "published" / loaded.name / loaded.profile
    try:
        files = publishing.publish(folder, target)
    except SpecError as error:
        _refuse(*error.messages)
    except publishing.UnfinishedError as error:
        _refuse(str(error))
    size = sum(file.stat().st_size for file in files) / 1e6
    out.print(f"published {len(files)} files, {size:.1f} MB, to {target}")


@app.command()
@click.option(
    "--results",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=Path("results"),
    show_default=True,
    help="Folder of the records; one's own stand before published ones.",
)
@click.option(
    "--sweeps",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=Path("sweeps"),
    show_default=True,
    help="Folder of the sweep files, for the claims that have no run yet.",
)
@click.option(
    "--out",
    "page",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where to write the page; README.md below the results by default.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def practices(results: Path, sweeps: Path, page: Path | None, as_json: bool) -> None:
    """Gather the verdicts of all sweeps on the published best practices into one page.

    \b
    orchestrate practices                          results/README.md, and a table here
    orchestrate practices --out page.md --json     another file, and the same as JSON
    """
    from orchestrator import practices as gathering
    from orchestrator.located import LocatedError

    page = page or results / "README.md"
    try:
        gathered = gathering.gather(results, sweeps)
        gathering.write(gathering.page(gathered, page.parent), page)
    except LocatedError as error:
        _refuse(*error.messages)
    except (ValueError, OSError) as error:
        _refuse(_first_line(error))
    if as_json:
        click.echo(json.dumps(gathering.as_json(gathered, page.parent), indent=1))
    else:
        out.print(gathering.as_table(gathered))
        out.print(f"written: {page}")


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
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    default=Path("results"),
    show_default=True,
    help="Folder whose recorded sweeps, published and own, have the trial.",
)
@click.option(
    "--keep", type=click.Path(path_type=Path), help="Run in this empty folder, and leave it there."
)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    default=0.02,
    show_default=True,
    help="Least half width of an interval, as a share of the value.",
)
@click.argument("trial_id")
def verify(trial_id: str, results: Path, keep: Path | None, tolerance: float) -> None:
    """Run one recorded trial again from nothing; say whether it comes out within its interval.

    \b
    orchestrate verify 6a73daded564                  a row of results/published, or of your own
    orchestrate verify 52a4 --keep /tmp/again        the beginning of an id does; keep what ran
    orchestrate verify 52a4 --tolerance 0.05         other machines may come out so far off

    Exit status: 0 every value is within its interval, 1 one is not or the trial failed, 2 there is
    no such trial or it cannot be built any more, 130 interrupted.
    """
    from orchestrator import verifying
    from orchestrator.room import NoRoomError

    try:
        row = verifying.find(results, trial_id)
        rebuilt = verifying.rebuild(row, results)
        with verifying.fresh_folder(keep) as folder:
            within = verifying.verify(row, folder, rebuilt, tolerance, out)
    except SpecError as error:
        _refuse(*error.messages)
    except (verifying.CannotVerifyError, NoRoomError) as error:
        _refuse(str(error))
    sys.exit(INTERRUPTED if within is None else 0 if within else FAILED)


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
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="As the sweep would have it."
)
@click.option("--profile", help="Scale that the sweep would run at.")
@click.argument("sweep", type=click.Path(path_type=Path), required=False)
def doctor(
    sweep: Path | None,
    profile: str | None,
    overrides: tuple[str, ...],
    results: Path,
    address: str | None,
    as_json: bool,
) -> None:
    """Check that this machine, or a cluster, has what a sweep will need; name each remedy.

    \b
    orchestrate doctor                                      this machine
    orchestrate doctor sweeps/width_vs_depth.yaml --profile llama31_8b --address auto
    orchestrate doctor sweeps/losses.yaml --set artifacts=/shared/artifacts
    """
    from orchestrator import doctor as doctoring
    from orchestrator.cluster import UnreachableError, host_and_port

    if sweep is None and (profile is not None or overrides):
        option = "--set KEY=VALUE" if profile is None else "--profile PROFILE"
        _refuse(f"{option.split()[0]} needs a sweep: orchestrate doctor SWEEP {option}")
    try:
        if address is not None and address != "auto":
            host_and_port(address)
    except UnreachableError as error:
        _refuse(f"--address: {error}")
    needs, store = doctoring.Needs(), None
    if sweep is not None:
        loaded, planned = _plan(sweep, profile, overrides, results)
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
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    default=Path("results"),
    show_default=True,
    help="Folder of the MLflow store, unless MLFLOW_TRACKING_URI is set.",
)
@click.option("--port", default=5000, show_default=True, help="Port of 127.0.0.1 to serve it on.")
def ui(results: Path, port: int) -> None:
    """Open MLflow's page on the runs, on 127.0.0.1.

    \b
    orchestrate ui                                          http://127.0.0.1:5000
    orchestrate ui --results /shared/results --port 5001
    """
    from orchestrator.tracking import ui_command

    try:
        command = ui_command(results, port)
    except ValueError as error:
        _refuse(str(error))
    out.print(f"MLflow on http://127.0.0.1:{port} (Ctrl-C to end); runs are under Model training")
    os.execv(command[0], command)


def _run(
    sweep: Sweep,
    planned: SweepPlan,
    store: Store,
    results: Path,
    address: str | None,
    max_concurrent: int | None,
) -> int:
    """The exit status of a run."""
    from orchestrator import running
    from orchestrator.asking import MissingTasksError
    from orchestrator.room import NoRoomError

    options = running.Options(address, max_concurrent, _command())
    try:
        outcome = running.run(sweep, planned, store, results, options, out)
    except NoRoomError as error:
        _refuse(str(error))
    except MissingTasksError as error:
        _refuse(*error.messages)
    return INTERRUPTED if outcome.interrupted else FAILED if outcome.failed else 0


# --- planning --------------------------------------------------------------------------------


def _plan(
    sweep: Path, profile: str | None, overrides: Sequence[str], results: Path
) -> tuple[Sweep, SweepPlan]:
    """The sweep and its plan, with those rungs of a race that are decided already."""
    try:
        loaded = load(sweep, profile, overrides, results)
        return loaded, plan_with(loaded, _ended(results, loaded))
    except SpecError as error:
        _refuse(*error.messages)


def _named(sweep: Path, profile: str | None, results: Path) -> tuple[str, str]:
    """The names under which a sweep file's results are kept."""
    try:
        loaded = load(sweep, profile, (), results)
    except SpecError as error:
        _refuse(*error.messages)
    return loaded.name, loaded.profile


def _ended(results: Path, sweep: Sweep) -> dict[str, TrialRecord]:
    """Trials of a sweep that completed or were stopped, by id."""
    ledger = results / sweep.name / sweep.profile / "ledger.jsonl"
    if not ledger.exists():
        return {}
    from orchestrator.ledger import Ledger

    trials = Ledger(ledger).trials()
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
    return shlex.join(["orchestrate", *sys.argv[1:]])


def main() -> None:
    """Entry point of the console command."""
    try:
        app(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(INVALID)
    finally:
        # Ray and MLflow leave a million objects, which Python would look through once more: 1.3 s.
        gc.freeze()


if __name__ == "__main__":
    main()
