"""The files of a results folder that people read: written from its records, and published."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from orchestrator import report
from orchestrator.growth import known_to_its_end
from orchestrator.records import TABLES, Records, read_parquet, read_trials
from orchestrator.selection import Ranking
from orchestrator.spec import Sweep, load


class UnfinishedError(Exception):
    """A sweep has trials that have yet to end."""


def write_report(
    records: Records, sweep: Sweep, folder: Path, command: str | None = None
) -> Ranking | None:
    """Tables, figures, page and best.json of the trials that the sweep asks for. The page names the
    command that ran it: unless given, one for what the folder's sweep.yaml says was run."""
    return report.write(
        records.asked,
        folder,
        sweep.question,
        sweep.select.metric,
        sweep.select.mode,
        command or _command_for(folder),
        sweep.claims,
        sweep.finalists,
    )


def _command_for(folder: Path) -> str:
    """Runs what a results folder's sweep.yaml holds, from the folder where `results` is, so that no
    page names a path of this machine."""
    folder = folder.resolve()
    levels = 4 if folder.parent.parent.name == "published" else 3
    return shlex.join(["orchestrate", str(Path(*folder.parts[-levels:], "sweep.yaml"))])


def publish(folder: Path, target: Path) -> list[Path]:
    """Copy the small files of a finished sweep's folder to `target`, which is replaced; gives them.

    Raises `SpecError` where its sweep.yaml is not valid (any more) or its trials cannot be planned,
    and `UnfinishedError`. What was published before stays until all else is there.
    """
    ran = load(folder / "sweep.yaml")
    _check_finished(ran, folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    # A level deeper than results are, lest what a kill leaves there be taken for some.
    with TemporaryDirectory(prefix=".", dir=target.parent) as beside:
        made = Path(beside) / "made"
        made.mkdir()
        for name in TABLES:
            shutil.copyfile(folder / name, made / name)
        # All else is made anew from the records, with paths as they are from there.
        (made / "sweep.yaml").write_text(ran.dump_yaml(relative_to=target.resolve()))
        write_report(read_parquet(made), ran, made, _command_for(target))
        if target.exists():
            target.rename(Path(beside) / "replaced")
        made.rename(target)
    return [file for file in target.rglob("*") if file.is_file()]


def _check_finished(sweep: Sweep, folder: Path) -> None:
    """Whether every trial is recorded, failed and stopped ones included. Raises
    `UnfinishedError`."""
    ended = {trial.trial_id: trial for trial in read_trials(folder)}
    asked = [each.trial.trial_id for each in known_to_its_end(sweep, ended, folder).trials]
    if left := sum(id_ not in ended for id_ in asked):
        trials = f"{left} of {len(asked)} trials{' known so far' if sweep.grows else ''}"
        raise UnfinishedError(f"{folder}: {trials} have not ended; run the sweep to its end first")
