"""The files of a results folder that people read: written from its records, and published."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

from orchestrator import report
from orchestrator.records import Records, read_parquet
from orchestrator.selection import Ranking
from orchestrator.spec import Sweep, load


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

    Raises `SpecError` where its sweep.yaml is not valid (any more); what was published before then
    stays.
    """
    ran = load(folder / "sweep.yaml")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in folder.glob("*.parquet"):
        shutil.copyfile(file, target / file.name)
    # All else is made anew from the records, with paths as they are from there.
    (target / "sweep.yaml").write_text(ran.dump_yaml(relative_to=target.resolve()))
    write_report(read_parquet(target), ran, target)
    return [file for file in target.rglob("*") if file.is_file()]
