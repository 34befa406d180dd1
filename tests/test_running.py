"""What a run leaves as its winner: `best/` holds the model that `best.json` names, or none."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import made_up
import pytest
import small_sweep
from rich.console import Console

from orchestrator.ledger import Ledger
from orchestrator.plan import SweepPlan, plan_sweep
from orchestrator.publishing import write_report
from orchestrator.running import Options, _Run
from orchestrator.space import enumerate_trials
from orchestrator.spec import load
from orchestrator.store import Store
from orchestrator.tracking import Mirror
from orchestrator.tuning import Place


@pytest.fixture
def run(tmp_path: Path) -> tuple[_Run, SweepPlan]:
    """The small sweep, none of whose trials has ended; nothing is stored."""
    sweep = load(small_sweep.write(tmp_path))
    place = Place("small", "micro", tmp_path / "results", Store(tmp_path / "store"))
    place.folder.mkdir()
    ledger = Ledger(place.folder / "ledger.jsonl")
    mirror = Mirror(
        f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "mlartifacts", "small", "micro", ""
    )
    made = _Run(sweep, place, ledger, mirror, Options(), Console(file=io.StringIO()), {})
    return made, plan_sweep(sweep, enumerate_trials(sweep))


def ended(run: _Run, trial_id: str, accuracy: float) -> None:
    record = made_up.trial("perplexity", 0, 0, {"accuracy.mean": accuracy})
    run.ledger.trial(replace(record, trial_id=trial_id, sweep="small", profile="micro"))


def grid_of(planned: SweepPlan) -> list[str]:
    return [t.trial.trial_id for t in planned.trials if t.trial.baseline is None]


def leave_best(run: _Run, trial_id: str) -> Path:
    """As an earlier run left it."""
    best = run.place.folder / "best"
    best.mkdir()
    (best / "config.json").write_text("{}")
    (run.place.folder / "best.trial").write_text(f"{trial_id}\n")
    return best


def test_the_winner_that_is_made_again_is_the_one_that_best_json_names(
    run: tuple[_Run, SweepPlan],
) -> None:
    """And not a better one that the sweep no longer asks for."""
    this, planned = run
    asked = grid_of(planned)[0]
    ended(this, asked, 0.5)
    ended(this, "removed", 0.9)
    jobs = this.winner_to_rebuild(planned)
    assert [job.job_id for job in jobs if not job.shared] == [asked]
    write_report(this.records(planned), this.sweep, this.place.folder)
    assert json.loads((this.place.folder / "best.json").read_text())["trial_id"] == asked


def test_where_there_is_no_winner_there_is_no_best_model(run: tuple[_Run, SweepPlan]) -> None:
    this, planned = run
    best = leave_best(this, "removed")
    this.finish(planned, interrupted=True)
    left = {path.name for path in this.place.folder.iterdir()}
    assert not best.exists() and not left & {"best", "best.trial", "best.part", "best.json"}
    assert "winner:" not in this.out.file.getvalue()  # type: ignore[attr-defined]


def test_another_model_than_the_winners_does_not_stay_where_the_winners_is_lost(
    run: tuple[_Run, SweepPlan],
) -> None:
    this, planned = run
    first, second, *_ = grid_of(planned)
    best = leave_best(this, first)
    ended(this, first, 0.5)
    ranking = write_report(this.records(planned), this.sweep, this.place.folder)
    this.copy_winner(ranking, planned)
    assert best.is_dir(), "it is the winner's own"
    ended(this, second, 0.9)
    ranking = write_report(this.records(planned), this.sweep, this.place.folder)
    this.copy_winner(ranking, planned)
    assert not best.exists() and not (this.place.folder / "best.trial").exists()
