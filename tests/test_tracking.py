"""MLflow shows what the records say; mirroring again adds nothing; a dead server is a warning."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import made_up
import pytest

from orchestrator import report, tracking
from orchestrator.records import CurvePoint, Records

WHOLE = made_up.records(questions=5)
KEPT = ("teacher-0", "perplexity-0", "task-2")
RECORDS = replace(WHOLE, trials=tuple(t for t in WHOLE.trials if t.trial_id in KEPT))


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def show(records: Records, results: Path, folder: Path) -> tuple[list[str], dict[str | None, str]]:
    tracked: dict[str | None, str] = {}
    warnings = tracking.mirror(
        records,
        folder,
        tracking.tracking_uri(results),
        tracking.artifact_location(results),
        "name: depth_ablation\n",
        tracked.__setitem__,
    )
    return warnings, tracked


def test_mlflow_shows_one_parent_and_one_child_per_trial_and_the_same_when_told_twice(
    tmp_path: Path,
) -> None:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

    folder = tmp_path / "depth_ablation" / "made_up"
    report.write(RECORDS, folder, "Which layers?", "accuracy.mean", "max", "orchestrate …")
    warnings, tracked = show(RECORDS, tmp_path, folder)
    assert warnings == []

    client = MlflowClient(tracking_uri=tracking.tracking_uri(tmp_path))
    experiment = client.get_experiment_by_name("depth_ablation")
    assert experiment is not None

    def runs() -> dict[str, Run]:
        return {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}

    first = runs()
    assert set(tracked) == {*KEPT, None}
    assert set(first) == set(tracked.values())
    parent = first[tracked[None]]
    for trial in RECORDS.trials:
        run = first[tracked[trial.trial_id]]
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert {k: v for k, v in run.data.metrics.items() if "." in k} == trial.metrics
        assert run.data.params["seed"] == str(trial.seed)
        assert run.info.end_time == round(trial.ended_at * 1000)
    child = first[tracked["perplexity-0"]]
    assert child.info.status == "FINISHED"
    assert child.data.params["prune.depth.criterion"] == "perplexity"
    curve = client.get_metric_history(child.info.run_id, "lm_loss")
    expected = [p for p in RECORDS.curves if (p.trial_id, p.name) == ("perplexity-0", "lm_loss")]
    assert [(m.step, m.timestamp, m.value) for m in curve] == [
        (p.step, p.time_ms, p.value) for p in expected
    ]
    failed = first[tracked["task-2"]]
    assert failed.info.status == "FAILED"
    assert "not finite" in failed.data.tags["orchestrate.reason"]

    assert parent.info.status == "FINISHED"
    assert "criterion=perplexity" in parent.data.tags["mlflow.note.content"]
    assert parent.data.metrics["accuracy.mean"] == RECORDS.trials[1].metrics["accuracy.mean"]
    artifacts = {each.path for each in client.list_artifacts(parent.info.run_id)}
    assert artifacts == {"sweep.yaml", "tables", "figures", "report.html", "best.json"}

    # Again, with the failed trial now completed: the same runs, and no metric twice.
    metrics = {"lm_loss.after": 2.0}
    again = replace(RECORDS.trials[-1], status="completed", reason=None, metrics=metrics)
    later = replace(again, ended_at=again.ended_at + 60)
    records = replace(RECORDS, trials=(*RECORDS.trials[:-1], later))
    warnings, tracked_again = show(records, tmp_path, folder)
    assert (warnings, tracked_again) == ([], tracked)
    second = runs()
    assert set(second) == set(first)
    assert len(client.get_metric_history(child.info.run_id, "lm_loss")) == len(expected)
    assert len(client.get_metric_history(parent.info.run_id, "accuracy.mean")) == 1
    assert second[tracked["task-2"]].info.status == "FINISHED"
    assert second[tracked["task-2"]].data.metrics == metrics


def test_a_dead_server_holds_nothing_up_and_costs_one_warning(tmp_path: Path) -> None:
    # Port 9 of this machine refuses connections at once.
    mirror = tracking.Mirror("http://me:secret@127.0.0.1:9", None, "s", "p", "name: s\n")
    started = time.monotonic()
    for trial in RECORDS.trials:
        mirror.trial(trial, [])
    mirror.finish(tmp_path)
    assert time.monotonic() - started < 0.1
    (warning,) = mirror.close()
    assert time.monotonic() - started < 30
    assert "127.0.0.1:9" in warning and "secret" not in warning
    assert "orchestrate mirror" in warning


def test_a_sweep_without_trials_never_opens_mlflow(tmp_path: Path) -> None:
    uri = tracking.tracking_uri(tmp_path)
    assert tracking.Mirror(uri, None, "s", "p", "").close() == []
    assert list(tmp_path.iterdir()) == []


def test_the_store_is_in_the_results_folder_unless_the_user_names_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tracking.tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking.artifact_location(tmp_path) == tmp_path / "mlartifacts"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert tracking.tracking_uri(tmp_path) == "http://server:5000"
    assert tracking.artifact_location(tmp_path) is None


def test_the_page_is_served_on_this_machine_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = tracking.ui_command(tmp_path, 5001)
    assert command[:3] == [sys.executable, "-m", "mlflow"]
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[command.index("--port") + 1] == "5001"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    with pytest.raises(ValueError, match="http://server:5000"):
        tracking.ui_command(tmp_path, 5001)


def test_settings_become_dotted_parameters_within_mlflows_limits() -> None:
    config = {"a": {"b": [1, 2], "c": None}, "d": "x" * 7000, "e": {}, "odd*name": True}
    found = tracking._parameters(replace(RECORDS.trials[0], config=config))
    assert found["a.b"] == "[1, 2]"
    assert found["a.c"] == "null"
    assert len(found["d"]) == tracking.PARAMETER_LENGTH
    assert found["e"] == "{}"
    assert found["odd_name"] == "true"


def test_long_curves_are_sent_in_chunks_that_mlflow_takes() -> None:
    points = [CurvePoint("t", step, step, 0, "loss", 1.0) for step in range(2500)]
    sizes = [len(chunk) for chunk in tracking._chunks(points, tracking.METRICS_A_CALL)]
    assert sizes == [1000, 1000, 500]
