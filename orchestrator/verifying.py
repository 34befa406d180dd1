"""One recorded trial, run again from nothing: does it come out as it was recorded?

The row's settings go in and nothing else: its folder is new, so that no artifact is reused, and it
takes the way of every trial (Ray Tune, DeepSpeed, the harness, the ledger). On the same machine it
comes out bit by bit. Another one adds floats in another order, training makes the differences grow,
and a model pretrained from random weights becomes in effect that of another seed. So a value has
come out where it lies in the widest of these intervals around the recorded one:

- accuracies: the bootstrap interval over the questions that the recorded trial answered;
- where its configuration has several seeds: how far two runs of it are apart with 95% confidence,
  Student's t times sqrt(2) times their standard deviation;
- `tolerance` times the value.

Sizes and tokens have to be the same. Speed and memory are those of the machine, and not judged.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from orchestrator import tuning
from orchestrator.jobs import make_jobs
from orchestrator.ledger import Ledger
from orchestrator.located import Origin, locate
from orchestrator.plan import SweepPlan, TrialPlan, plan_trial
from orchestrator.progress import Board
from orchestrator.records import Records, TrialRecord, read_parquet, read_trials, write_parquet
from orchestrator.selection import Measure, configuration_key, over_seeds, value_of
from orchestrator.space import RUNG, Trial, make_trial, next_rung
from orchestrator.spec import SpecError, Sweep, TrialConfig, build_trial, load
from orchestrator.store import Store
from orchestrator.tracking import Mirror
from orchestrator.wording import nearest_first
from trainers.config import for_record, hash_of, identity

NEAREST = 5
"""How many ids are named where the one that was given is none."""
OF_THE_MACHINE = (
    "throughput",
    "first_token",
    "peak_memory",
    "requests_per_s",
    "tokens_per_s",
    "teacher_",
)
"""How metrics begin that say as much of the machine as of the model: they are not judged."""
HELDOUT = "heldout_loss"


class CannotVerifyError(Exception):
    """What is asked for cannot be begun, and why."""


# --- the row ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A recorded trial, with all records of its sweep."""

    folder: Path
    trial: TrialRecord
    records: Records
    also: tuple[Path, ...] = ()
    """Other folders that have the same trial."""

    @property
    def own(self) -> Records:
        """The records of this trial alone."""
        mine = self.trial.trial_id
        return replace(
            self.records,
            trials=(self.trial,),
            stages=tuple(each for each in self.records.stages if each.trial_id == mine),
            curves=tuple(each for each in self.records.curves if each.trial_id == mine),
            items=tuple(each for each in self.records.items if each.trial_id == mine),
        )


def find(results: Path, wanted: str) -> Row:
    """The trial whose id is or begins with `wanted`: of the published sweeps first, then of those
    that ran here.

    Raises `CannotVerifyError`, which names the nearest ids, where there is no such trial, where
    several are meant, and where files are damaged.
    """
    tables = [
        *sorted(results.glob("published/*/*/trials.parquet")),
        *sorted(results.glob("*/*/trials.parquet")),
    ]
    try:
        recorded = {table.parent: read_trials(table.parent) for table in tables}
        known = {trial.trial_id for trials in recorded.values() for trial in trials}
        id_ = _meant(results, wanted, known)
        folder, *others = [
            folder
            for folder, trials in recorded.items()
            if any(trial.trial_id == id_ for trial in trials)
        ]
        records = read_parquet(folder)
    except ValueError as error:  # a newer version wrote them, or a disk changed them
        raise CannotVerifyError(str(error)) from error
    trial = next(each for each in records.trials if each.trial_id == id_)
    return Row(folder, trial, records, tuple(others))


def _meant(results: Path, wanted: str, known: set[str]) -> str:
    """The one id that begins so. Raises `CannotVerifyError`."""
    meant = sorted(id_ for id_ in known if id_.startswith(wanted))
    if not known:
        raise CannotVerifyError(f"{results}: no sweep has recorded anything there")
    if not meant:
        near = ", ".join(nearest_first(wanted, known)[:NEAREST])
        raise CannotVerifyError(f"{results}: no trial {wanted} is recorded; nearest: {near}")
    if len(meant) > 1:
        listed = ", ".join(meant[:NEAREST]) + (", …" if len(meant) > NEAREST else "")
        raise CannotVerifyError(f"{wanted} may be any of {len(meant)} trials: {listed}")
    return meant[0]


# --- the trial that it asks for --------------------------------------------------------------


@dataclass(frozen=True)
class Rebuilt:
    """A row's trial as it is planned today, and what a reader should know of it."""

    sweep: Sweep
    plan: TrialPlan
    note: str | None = None


def rebuild(row: Row, results: Path) -> Rebuilt:
    """The trial of a row: that of its sweep file with the same id or, where an earlier version gave
    the id, the settings that the row holds.

    Raises `SpecError` where neither is possible any more, or where its models and texts are not
    here.
    """
    if row.trial.status == "failed":
        text = f"the recorded trial failed ({row.trial.reason}), so there is nothing to compare"
        raise SpecError(f"{row.folder}: {row.trial.trial_id}: {text}")
    sweep = load(row.folder / "sweep.yaml", results=results)
    asked, problems = _asked_for(sweep, row.trial)
    same = next((each for each in asked if each.trial_id == row.trial.trial_id), None)
    trial = same or _from_settings(row, asked, problems)
    plan = plan_trial(sweep, trial)
    if trial.trial_id == row.trial.trial_id:
        return Rebuilt(sweep, plan, _changed_stages(row, plan))
    return Rebuilt(sweep, plan, _changed_id(row.trial, trial))


def _asked_for(sweep: Sweep, row: TrialRecord) -> tuple[list[Trial], tuple[str, ...]]:
    """The trials of the sweep file with the row's axes, baseline and seed (one for each rung of a
    race), or why there are none."""
    axes = {name: value for name, value in row.axes.items() if name != RUNG}
    try:
        trial = make_trial(sweep, axes, row.baseline, row.seed)
        rungs = range(len(sweep.scheduler.rungs))
        later = [each for rung in rungs for each in next_rung(sweep, [trial], rung)]
    except SpecError as error:
        return [], error.messages
    return [trial, *later], ()


def _from_settings(row: Row, asked: Sequence[Trial], problems: Sequence[str]) -> Trial:
    """The trial that the row's own settings make."""
    record = row.trial
    files = _files_of(asked[0].config) if asked else {}
    settings, missing = _with_files(record.config, files)
    if missing:
        names = ", ".join(sorted(missing))
        text = f"{record.trial_id} was made with {names}, which its sweep.yaml does not lead to"
        raise SpecError(*problems, f"{row.folder}: {text}")
    where = Origin(f"{row.folder}: {record.trial_id}", None, row.folder)
    config, wrong = build_trial(locate(settings, where))
    if config is None:
        today = ", ".join(each.trial_id for each in asked) or "none"
        tree = locate(settings, where)
        raise SpecError(
            *(problem.message(tree) for problem in wrong),
            f"{where}: made by an earlier version, whose settings this one does not take; what "
            f"sweep.yaml asks for there now: {today}",
        )
    trial_id = hash_of(identity(config))[:12]
    return Trial(trial_id, config, dict(record.axes), record.baseline, record.seed)


def _files_of(config: TrialConfig) -> dict[str, str]:
    """How a record names each local file of a trial -> where it is."""
    found: dict[str, str] = {}

    def gather(recorded: Any, here: Any) -> None:
        if isinstance(recorded, Mapping):
            for key, value in recorded.items():
                gather(value, here[key])
        elif isinstance(recorded, list):
            for value, local in zip(recorded, here, strict=True):
                gather(value, local)
        elif recorded != here:
            found[recorded] = here

    gather(for_record(config), config.model_dump(mode="json"))
    return found


def _with_files(settings: Any, files: Mapping[str, str]) -> tuple[Any, set[str]]:
    """Recorded settings with the places of local files, and the files that have none."""
    missing: set[str] = set()

    def placed(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: placed(each) for key, each in value.items()}
        if isinstance(value, list):
            return [placed(each) for each in value]
        if isinstance(value, str) and "@sha256:" in value:
            missing.update({value} - set(files))
            return files.get(value, value)
        return value

    return placed(settings), missing


def _changed_id(record: TrialRecord, trial: Trial) -> str:
    new = sorted(set(_dotted(for_record(trial.config))) - set(_dotted(record.config)))
    since = f"; {len(new)} settings came since, as {', '.join(new[:NEAREST])}" if new else ""
    return (
        f"{record.trial_id} was made by an earlier version: the same settings are the trial "
        f"{trial.trial_id} today{since}"
    )


def _dotted(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The names of all settings; one that is switched off stands for those below it."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _changed_stages(row: Row, plan: TrialPlan) -> str | None:
    """A trial's id says what was asked for; that of a stage also, by its version, how it was
    computed."""
    ran = {stage.stage_id for stage in row.own.stages}
    steps = [step for step, node in plan.steps.items() if node.stage_id not in ran]
    if not ran or not steps:
        return None
    return f"computed by an earlier version of these stages: {', '.join(steps)}"


# --- running it ------------------------------------------------------------------------------


@contextmanager
def fresh_folder(keep: Path | None) -> Iterator[Path]:
    """An empty results folder: one that is removed afterwards, or `keep`. Raises
    `CannotVerifyError` where that is not empty."""
    if keep is None:
        with tempfile.TemporaryDirectory(
            prefix="orchestrate-verify-", ignore_cleanup_errors=True
        ) as scratch:
            yield Path(scratch).resolve()
        return
    try:
        keep.mkdir(parents=True, exist_ok=True)
        used = any(keep.iterdir())
    except OSError as error:
        raise CannotVerifyError(f"--keep {keep}: {error.strerror}") from error
    if used:
        raise CannotVerifyError(f"--keep {keep}: is not empty, and a row is verified from nothing")
    yield keep.resolve()


def verify(row: Row, folder: Path, rebuilt: Rebuilt, tolerance: float, out: Console) -> bool | None:
    """Run the row's trial again in an empty folder and tell how it came out: whether all values are
    within their intervals, or None where the run was interrupted."""
    label = rebuilt.plan.trial.label
    out.print(f"{row.trial.trial_id}: {row.trial.sweep} at {row.trial.profile}, {escape(label)}")
    out.print(f"recorded in {row.folder}; run again from nothing in {folder}")
    for line in filter(None, (rebuilt.note, _elsewhere(row))):
        out.print(escape(line))
    now = run(row, rebuilt, folder, out)
    if not now.trials:
        out.print("interrupted; a row is verified from nothing, so the next time starts anew")
        return None
    if now.trials[0].status != "completed":
        out.print(f"[red]failed[/]: {escape(str(now.trials[0].reason))}")
        return False
    compared = compare(row, now, tolerance)
    out.print(as_table(compared))
    for line in summary(row, now, compared):
        out.print(escape(line))
    return all(each.inside for each in compared)


def _elsewhere(row: Row) -> str | None:
    return f"the same trial is in {', '.join(map(str, row.also))}" if row.also else None


def run(row: Row, rebuilt: Rebuilt, folder: Path, console: Console) -> Records:
    """What the trial's run in an empty results folder recorded: no row where it was interrupted.
    The stages that other trials of the sweep shared get the cores that shared stages are granted.
    """
    sweep, plan = rebuilt.sweep, rebuilt.plan
    place = tuning.Place(
        sweep.name, sweep.profile, folder / sweep.name / sweep.profile, Store(folder / "artifacts")
    )
    place.folder.mkdir(parents=True)
    shared = Counter(stage.stage_id for stage in row.records.stages)
    planned = SweepPlan((plan,), (), shared)
    jobs = make_jobs(planned, set(), place.store, sweep.resources)
    board = Board(console, {j.job_id: j.nodes[0].kind if j.shared else "trial" for j in jobs})
    ledger = Ledger(place.folder / "ledger.jsonl")
    # Into a database of the folder's own: a row that is checked is no run of the user's.
    mirror = Mirror(
        f"sqlite:///{folder / 'mlflow.db'}",
        folder / "mlartifacts",
        sweep.name,
        sweep.profile,
        (row.folder / "sweep.yaml").read_text(),
        ledger.tracked,
    )
    try:
        with board.shown():
            tuning.run(jobs, place, ledger, mirror, board, sweep.resources)
    except KeyboardInterrupt:  # asked twice to stop
        pass
    finally:
        mirror.close()
    records = ledger.records(sweep.name, sweep.profile)
    write_parquet(records, place.folder)
    return records


# --- recorded against new --------------------------------------------------------------------


@dataclass(frozen=True)
class Compared:
    """A recorded value, its interval, and what came out now."""

    name: str
    recorded: float
    now: float | None
    low: float
    high: float
    by: str
    """What the interval is over: questions, seeds, tolerance; or exact."""

    @property
    def inside(self) -> bool:
        """Whether the new value lies in the interval; without one it does not."""
        return self.now is not None and self.low <= self.now <= self.high

    @property
    def bit_equal(self) -> bool:
        """Whether both are the same number to the last bit."""
        return self.now == self.recorded


def compare(row: Row, now: Records, tolerance: float) -> list[Compared]:
    """Every value of the row beside what was measured now. Pure."""
    (new,) = now.trials
    measured = dict(new.metrics)
    sizes = ["parameters", "parameters_non_embedding", "tokens_trained"]
    if row.trial.status == "stopped":
        sizes.remove("tokens_trained")
        measured["lm_loss.stopped"] = _at_the_stop(row, now)
    found = [
        _exact(name, float(getattr(row.trial, name)), getattr(new, name))
        for name in sizes
        if getattr(row.trial, name) is not None
    ]
    for name, recorded in sorted(row.trial.metrics.items()):
        if recorded is not None and not name.startswith(OF_THE_MACHINE):
            low, high, by = _interval(row, name, recorded, tolerance)
            found.append(Compared(name, recorded, measured.get(name), low, high, by))
    return found


def _exact(name: str, recorded: float, now: int | None) -> Compared:
    return Compared(
        name, recorded, None if now is None else float(now), recorded, recorded, "exact"
    )


def _interval(row: Row, metric: str, recorded: float, tolerance: float) -> tuple[float, float, str]:
    least = tolerance * abs(recorded)
    reaches = {"tolerance": (least, least)}
    apart = _between_runs(row, metric)
    reaches["seeds"] = (apart, apart)
    measure = Measure(row.own, metric)
    asked = measure.has_questions and measure.values([row.trial])
    known = measure.estimate([row.trial]) if asked else None
    if known is not None and known.low is not None and known.high is not None:
        reaches["questions"] = (recorded - known.low, known.high - recorded)
    low = recorded - max(below for below, _ in reaches.values())
    high = recorded + max(above for _, above in reaches.values())
    by = max(reaches, key=lambda name: sum(reaches[name]))
    share = measure.is_share([row.trial])
    return (max(0.0, low), min(1.0, high), by) if share else (low, high, by)


def _between_runs(row: Row, metric: str) -> float:
    """How far two runs of the row's configuration are apart, by its seeds; 0 for a single one."""
    key, asked = configuration_key(row.trial), row.trial.in_sweep
    # Earlier trials of equal axes may have had other settings beside them.
    alike = [
        trial
        for trial in row.records.trials
        if configuration_key(trial) == key and trial.in_sweep == asked
    ]
    values = [value for trial in alike if (value := value_of(trial, metric)) is not None]
    half_width = over_seeds(values).half_width if values else None
    # That of a mean of n runs is sqrt(n) times shorter, that of a difference sqrt(2) times longer.
    return 0.0 if half_width is None else half_width * math.sqrt(2 * len(values))


def _at_the_stop(row: Row, now: Records) -> float | None:
    """What the new run, which nobody stopped, had measured where the recorded one was stopped."""
    steps = [point.step for point in row.own.curves if point.name == HELDOUT]
    found = (p.value for p in now.curves if p.name == HELDOUT and steps and p.step == steps[-1])
    return next(found, None)


@dataclass(frozen=True)
class Agreement:
    """How many of `both`, recorded and new, are the same, and how many to the last bit."""

    recorded: int
    both: int
    same: int
    bit_equal: int


def answers(row: Row, now: Records) -> Agreement:
    """How many questions are answered the same; bit-equal: with the same margin."""
    before = {(item.task, item.item_id): item for item in row.own.items}
    after = {(item.task, item.item_id): item for item in now.items}
    pairs = [(before[key], after[key]) for key in before.keys() & after.keys()]
    return Agreement(
        recorded=len(before),
        both=len(pairs),
        same=sum(old.correct == new.correct for old, new in pairs),
        bit_equal=sum((old.correct, old.score) == (new.correct, new.score) for old, new in pairs),
    )


def curve(row: Row, now: Records) -> Agreement:
    """How many points of the training curve are bit-equal."""
    before = {(point.name, point.step): point.value for point in row.own.curves}
    after = {(point.name, point.step): point.value for point in now.curves}
    both = before.keys() & after.keys()
    equal = sum(before[key] == after[key] for key in both)
    return Agreement(len(before), len(both), equal, equal)


# --- for people ------------------------------------------------------------------------------


def as_table(compared: Sequence[Compared]) -> Table:
    """A row per value, with its verdict."""
    table = Table(title="recorded, and run again", title_justify="left")
    for name in ("value", "recorded", "now", "interval", "over", "verdict"):
        right = name in ("recorded", "now", "interval")
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for each in compared:
        table.add_row(
            each.name,
            _shown(each.recorded),
            "not measured" if each.now is None else _shown(each.now),
            "" if each.by == "exact" else f"{_shown(each.low)} to {_shown(each.high)}",
            each.by,
            _verdict(each),
        )
    return table


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value.is_integer() and abs(value) > 1 else f"{value:.6g}"


def _verdict(each: Compared) -> str:
    if each.bit_equal:
        return "[green]bit-equal[/]"
    return "[green]inside[/]" if each.inside else "[red]outside[/]"


def summary(row: Row, now: Records, compared: Sequence[Compared]) -> list[str]:
    """The questions, the curve, the layers, and the verdict last."""
    asked, points = answers(row, now), curve(row, now)
    lines = []
    if asked.recorded:
        lines.append(
            f"questions answered the same: {asked.same:,} of {asked.recorded:,}, with the same "
            f"margin to the last bit: {asked.bit_equal:,}"
        )
    if points.recorded:
        lines.append(f"points of the curve bit-equal: {points.bit_equal:,} of {points.recorded:,}")
    old, new = row.trial.dropped_layers, now.trials[0].dropped_layers
    if old is not None:
        lines.append(f"layers dropped: {_listed(old)}, " + ("the same" if old == new else
                     f"and now {_listed(new)}"))  # fmt: skip
    inside = sum(each.inside for each in compared)
    equal = sum(each.bit_equal for each in compared)
    outside = [each.name for each in compared if not each.inside]
    lines.append(
        f"{row.trial.trial_id}: {inside} of {len(compared)} values within their intervals, "
        f"{equal} of them bit-equal" + (f"; outside: {', '.join(outside)}" if outside else "")
    )
    return lines


def _listed(layers: Sequence[int] | None) -> str:
    return "none" if not layers else ", ".join(map(str, layers))
