"""Sweeps that search, stop early, grow and shrink: run as a user runs them."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_sweep

from orchestrator.ledger import Ledger
from orchestrator.records import Records, TrialRecord, read_parquet

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SWEEP: dict[str, Any] = {
    "name": "small",
    "question": "Which learning rate?",
    "profile": "micro",
    "trial": {
        "prune": {"depth": {"keep": 0.5, "criterion": "random"}},
        "distill": {"heldout_every": 5},
        "evaluate": {"tasks": []},
    },
    "axes": {
        "distill.training.learning_rate": {"from": 0.001, "to": 0.004, "step": 0.001},
        "distill.loss.cross_entropy_weight": [0, 1],
    },
    "select": {"metric": "lm_loss.after"},
}


def run(folder: Path, sweep: dict[str, Any], *options: str, status: int = 0) -> Records:
    done = small_sweep.run(small_sweep.write(folder, sweep), folder / "results", *options)
    assert done.returncode == status, done.stdout + done.stderr
    return read_parquet(folder / "results" / "small" / "micro")


def fail(folder: Path, trial: TrialRecord) -> None:
    """Have the ledger say that the trial failed, as where its disk was full."""
    reason = "No space left on device"
    failed = replace(trial, status="failed", reason=reason, metrics={}, tokens_trained=None)
    Ledger(folder / "results" / "small" / "micro" / "ledger.jsonl").trial(failed)


def grid(records: Records, asked: bool = True) -> dict[str, str]:
    """Trial -> status, of the trials that the sweep asks for or of those that it does not."""
    return {
        trial.trial_id: trial.status
        for trial in records.trials
        if trial.baseline is None and trial.in_sweep == asked
    }


def test_a_search_can_be_given_more_trials_and_repeats_none(tmp_path: Path) -> None:
    search = {"method": "tpe", "trials": 3, "startup": 2}
    first = run(tmp_path, {**SWEEP, "search": search})
    assert set(grid(first).values()) == {"completed"} and len(grid(first)) == 3
    more = run(tmp_path, {**SWEEP, "search": {**search, "trials": 5}})
    assert set(grid(first)) < set(grid(more)) and len(grid(more)) == 5
    ended = {trial.trial_id: trial.ended_at for trial in more.trials}
    assert all(ended[trial.trial_id] == trial.ended_at for trial in first.trials)
    with sqlite3.connect(tmp_path / "results" / "small" / "micro" / "optuna.db") as study:
        states = dict(study.execute("select state, count(*) from trials group by state"))
    assert states["COMPLETE"] == 5 and set(states) <= {"COMPLETE", "FAIL"}


def test_a_configuration_of_a_search_that_failed_is_tried_again_by_the_next_start(
    tmp_path: Path,
) -> None:
    searching = {**SWEEP, "search": {"method": "random", "trials": 2}}
    first = run(tmp_path, searching)
    fail(tmp_path, next(trial for trial in first.trials if trial.baseline is None))
    again = run(tmp_path, searching)
    assert grid(again) == grid(first)


def test_a_failure_in_a_later_rung_is_tried_again_beside_one_in_the_first(tmp_path: Path) -> None:
    rungs = [
        {"name": "short", "set": {"distill.training.steps": 5}, "keep": 1},
        {"name": "full"},
    ]
    racing = {
        **SWEEP,
        "axes": {"distill.training.learning_rate": [0.001, 1e30]},
        "scheduler": {"method": "race", "metric": "lm_loss.after", "rungs": rungs},
    }
    first = run(tmp_path, racing, status=1)
    assert sorted(grid(first).values()) == ["completed", "completed", "failed"]
    fail(tmp_path, max(first.trials, key=lambda trial: trial.tokens_trained or 0))
    again = run(tmp_path, racing, status=1)
    assert grid(again) == grid(first)


def test_a_trial_that_was_stopped_keeps_what_it_measured_and_goes_on_when_asked(
    tmp_path: Path,
) -> None:
    scheduler = {"method": "asha", "floor_tokens": 640, "reduction": 2}
    options = ("--max-concurrent", "1")
    halved = run(tmp_path, {**SWEEP, "scheduler": scheduler}, *options)
    stopped = [trial for trial in halved.trials if trial.status == "stopped"]
    assert stopped and "completed" in grid(halved).values()
    for trial in stopped:
        assert 640 <= (trial.tokens_trained or 0) < 30 * 4 * 32
        assert trial.metrics["lm_loss.stopped"] and "lm_loss.after" not in trial.metrics
        assert any(p.trial_id == trial.trial_id for p in halved.curves)
        assert trial.reason
    whole = run(tmp_path, {**SWEEP, "scheduler": {**scheduler, "method": "none"}}, *options)
    assert set(grid(whole).values()) == {"completed"}
    before = {trial.trial_id: trial.ended_at for trial in halved.trials if trial not in stopped}
    after = {trial.trial_id: trial.ended_at for trial in whole.trials}
    assert {key: after[key] for key in before} == before


def test_a_sweep_that_loses_a_value_keeps_its_rows_and_marks_them(tmp_path: Path) -> None:
    axes = {"distill.training.learning_rate": [0.001, 0.002]}
    first = run(tmp_path, {**SWEEP, "axes": axes})
    axes = {"distill.training.learning_rate": [0.002, 0.003]}
    second = run(tmp_path, {**SWEEP, "axes": axes})
    assert len(grid(second)) == 2 and len(grid(second, asked=False)) == 1
    assert set(grid(second, asked=False)) < set(grid(first))
    report = (tmp_path / "results" / "small" / "micro" / "tables").glob("*.md")
    text = "".join(table.read_text() for table in report)
    assert "0.003" in text and "0.001" not in text


def test_a_sweep_that_gains_an_axis_knows_the_trials_that_it_had_by_its_new_name(
    tmp_path: Path,
) -> None:
    axes: dict[str, Any] = {"distill.training.learning_rate": [0.001]}
    first = run(tmp_path, {**SWEEP, "axes": axes})
    axes["distill.loss.cross_entropy_weight"] = [0, 1]
    second = run(tmp_path, {**SWEEP, "axes": axes})
    assert set(grid(first)) < set(grid(second)) and not grid(second, asked=False)
    names = {frozenset(t.axes) for t in second.trials if t.baseline is None}
    assert names == {frozenset(axes)}
