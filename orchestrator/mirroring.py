"""Recorded sweeps, written to MLflow again: all that `orchestrate mirror` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator import tracking
from orchestrator.leases import Lease
from orchestrator.ledger import Ledger
from orchestrator.records import Records, read_parquet, write_parquet
from orchestrator.runs import OnTracked
from orchestrator.tracking import Mirrored


@dataclass(frozen=True)
class Recorded:
    """The records of a sweep at a profile: the user's own, whose truth is the ledger, or published
    ones, which are parquet files and stay as they are."""

    folder: Path
    own: bool

    @property
    def sweep(self) -> str:
        """The sweep's name."""
        return self.folder.parent.name

    @property
    def profile(self) -> str:
        """The profile's name."""
        return self.folder.name


def find(results: Path, sweep: str = "*", profile: str = "*") -> list[Recorded]:
    """What is recorded under a results folder, by name: one's own sweeps, and those published
    ones that were not run here."""
    where = f"{sweep}/{profile}"
    own = [Recorded(file.parent, True) for file in results.glob(f"{where}/ledger.jsonl")]
    tables = results.glob(f"published/{where}/trials.parquet")
    published = [Recorded(file.parent, False) for file in tables]
    chosen = {(each.sweep, each.profile): each for each in [*published, *own]}
    return [chosen[name] for name in sorted(chosen)]


def mirror(recorded: Recorded, results: Path) -> Mirrored:
    """Show the sweep in MLflow: writes those runs that it does not show yet. The ids of one's own
    runs go into the ledger and the table of trials.

    Raises `LeaseHeldError` while the sweep runs, as then it mirrors itself, and `ValueError` where
    published files are damaged.
    """
    # Two at once would each make a run for the same trial. Published folders are not written to.
    lease = recorded.folder / ".running" if recorded.own else results / ".mirroring"
    with Lease(lease).at_once():
        if recorded.own:
            return _mirror_own(recorded, results)
        return _show(recorded, read_parquet(recorded.folder), results)


def _mirror_own(recorded: Recorded, results: Path) -> Mirrored:
    ledger = Ledger(recorded.folder / "ledger.jsonl")
    order = _order(recorded.folder)
    records = ledger.records(recorded.sweep, recorded.profile, order)
    mirrored = _show(recorded, records, results, ledger.tracked)
    again = ledger.records(recorded.sweep, recorded.profile, order)
    if again != records and (recorded.folder / "trials.parquet").exists():
        write_parquet(again, recorded.folder)
    return mirrored


def _show(
    recorded: Recorded,
    records: Records,
    results: Path,
    on_tracked: OnTracked = lambda trial_id, run_id: None,
) -> Mirrored:
    resolved = recorded.folder / "sweep.yaml"
    return tracking.mirror(
        records,
        recorded.folder,
        tracking.tracking_uri(results),
        tracking.artifact_location(results),
        resolved.read_text() if resolved.exists() else "",
        on_tracked,
    )


def _order(folder: Path) -> Sequence[str]:
    """The trials in the order of their table, which is that of the sweep file."""
    try:
        return [trial.trial_id for trial in read_parquet(folder).trials]
    except (FileNotFoundError, ValueError):  # no table yet, or a damaged one: the ledger knows all
        return ()
