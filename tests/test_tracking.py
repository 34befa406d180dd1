"""MLflow shows what the records say; mirroring again adds nothing; a dead server is a warning."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import made_up
import pytest

from orchestrator import report, runs, tracking
from orchestrator.records import CurvePoint, Records
from orchestrator.wording import shortest_names

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


def show(
    records: Records, results: Path, folder: Path
) -> tuple[tracking.Mirrored, dict[str | None, str]]:
    tracked: dict[str | None, str] = {}
    done = tracking.mirror(
        records,
        folder,
        tracking.tracking_uri(results),
        tracking.artifact_location(results),
        "name: depth_ablation\n",
        tracked.__setitem__,
    )
    return done, tracked


def test_mlflow_shows_one_parent_and_one_child_per_trial_and_the_same_when_told_twice(
    tmp_path: Path,
) -> None:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

    folder = tmp_path / "depth_ablation" / "made_up"
    report.write(RECORDS, folder, "Which layers?", "accuracy.mean", "max", "orchestrate …")
    done, tracked = show(RECORDS, tmp_path, folder)
    assert done == tracking.Mirrored(trials=3, written=3, reached=True, problem=None)

    client = MlflowClient(tracking_uri=tracking.tracking_uri(tmp_path))
    experiment = client.get_experiment_by_name("depth_ablation")
    assert experiment is not None

    def by_id() -> dict[str, Run]:
        return {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}

    first = by_id()
    assert set(tracked) == {*KEPT, None}
    assert set(first) == set(tracked.values())
    parent = first[tracked[None]]
    for trial in RECORDS.trials:
        run = first[tracked[trial.trial_id]]
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert {k: v for k, v in run.data.metrics.items() if "." in k} == trial.metrics
        assert run.data.params["seed"] == str(trial.seed)
        assert run.data.metrics.get("parameters") == (trial.parameters if trial.metrics else None)
        assert run.info.end_time == round(trial.ended_at * 1000)
        assert settings_of(client, run) == trial.config
    child = first[tracked["perplexity-0"]]
    assert child.info.status == "FINISHED"
    assert child.info.run_name == "contiguous=true, criterion=perplexity, seed=0 (perplexity-0)"
    assert child.data.params == {
        "contiguous": "true", "criterion": "perplexity", "group": "grid", "seed": "0"
    }  # fmt: skip
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

    # Again, with the failed trial now completed: a new run of it, and no metric twice.
    metrics = {"lm_loss.after": 2.0}
    again = replace(RECORDS.trials[-1], status="completed", reason=None, metrics=metrics)
    later = replace(again, ended_at=again.ended_at + 60)
    records = replace(RECORDS, trials=(*RECORDS.trials[:-1], later))
    done, tracked_again = show(records, tmp_path, folder)
    assert done == tracking.Mirrored(trials=3, written=1, reached=True, problem=None)
    second = by_id()
    assert set(second) == set(tracked_again.values())
    assert set(second) - set(first) == {tracked_again["task-2"]}
    assert len(client.get_metric_history(child.info.run_id, "lm_loss")) == len(expected)
    assert len(client.get_metric_history(parent.info.run_id, "accuracy.mean")) == 1
    completed = second[tracked_again["task-2"]]
    assert completed.info.status == "FINISHED"
    assert completed.data.metrics == {**metrics, "parameters": 540_000.0}


def test_a_dead_server_holds_nothing_up_and_costs_one_warning(tmp_path: Path) -> None:
    # Port 9 of this machine refuses connections at once.
    mirror = tracking.Mirror("http://me:secret@127.0.0.1:9", None, "s", "p", "name: s\n")
    started = time.monotonic()
    for trial in RECORDS.trials:
        mirror.trial(trial, [])
    mirror.finish(tmp_path, RECORDS)
    assert time.monotonic() - started < 0.1
    (warning,) = mirror.close()
    assert time.monotonic() - started < 30
    assert "127.0.0.1:9" in warning and "secret" not in warning
    assert "orchestrate mirror" in warning


@contextmanager
def hanging_server() -> Iterator[str]:
    """Takes connections, and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as server:
        yield f"http://me:secret@127.0.0.1:{server.getsockname()[1]}"


def test_a_server_that_never_answers_holds_nothing_up_and_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    with hanging_server() as uri:
        mirror = tracking.Mirror(uri, None, "s", "p", "name: s\n")
        started = time.monotonic()
        for trial in RECORDS.trials:
            mirror.trial(trial, [])
        mirror.finish(tmp_path, RECORDS)
        assert time.monotonic() - started < 0.1
        (warning,) = mirror.close()
    assert time.monotonic() - started < 25
    assert "does not answer" in warning and "secret" not in warning


def test_a_mirror_that_stands_still_is_not_waited_for(tmp_path: Path) -> None:
    with hanging_server() as uri:
        mirror = tracking.Mirror(uri, None, "s", "p", "name: s\n")
        mirror.finish(tmp_path, RECORDS)
        started = time.monotonic()
        (warning,) = mirror.close(stalled_s=0.5)
    assert time.monotonic() - started < 20
    assert "was not done" in warning


def test_a_mirror_holds_no_more_than_a_few_trials_whatever_it_is_told() -> None:
    points: list[weakref.ref[CurvePoint]] = []
    with hanging_server() as uri:
        mirror = tracking.Mirror(uri, None, "s", "p", "name: s\n")
        for number in range(10 * tracking.WAITING):
            point = CurvePoint("t", number, number, 0, "loss", 1.0)
            points.append(weakref.ref(point))
            mirror.trial(RECORDS.trials[0], [point])
        del point
        assert 0 < sum(each() is not None for each in points) <= tracking.WAITING
        assert len(mirror.close(stalled_s=0.1)) == 1


def test_trials_that_found_no_room_are_written_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "WAITING", 2)
    ids = [f"t{number}" for number in range(8)]
    trials = tuple(replace(RECORDS.trials[0], trial_id=each, sweep="s") for each in ids)
    # More than MLflow takes in one call.
    curves = [CurvePoint("t7", step, step, step, "loss", 1.0 / step) for step in range(1, 1201)]
    uri, place = tracking.tracking_uri(tmp_path), tracking.artifact_location(tmp_path)
    mirror = tracking.Mirror(uri, place, "s", "p", "name: s\n")
    for trial in trials:
        mirror.trial(trial, curves if trial.trial_id == "t7" else ())
    mirror.finish(tmp_path, Records("s", "p", trials=trials, curves=tuple(curves)))
    assert mirror.close() == []
    found = shown(tmp_path, "s")
    assert sorted(run.data.tags.get(runs.TRIAL_TAG, "") for run in found) == ["", *ids]
    (last,) = [run for run in found if run.data.tags.get(runs.TRIAL_TAG) == "t7"]
    assert len(client_of(tmp_path).get_metric_history(last.info.run_id, "loss")) == len(curves)


def test_runs_that_a_slow_server_made_twice_are_one_again(tmp_path: Path) -> None:
    """A request that was given up on may be carried out later."""
    show(RECORDS, tmp_path, tmp_path)
    client, before = client_of(tmp_path), shown(tmp_path, "depth_ablation")
    experiment = before[0].info.experiment_id
    for run in before:
        again = client.create_run(experiment, run.info.start_time + 1, dict(run.data.tags))
        if runs.SWEEP_TAG in run.data.tags:
            tags = {"mlflow.parentRunId": again.info.run_id, runs.TRIAL_TAG: "task-2"}
            client.create_run(experiment, tags=tags)
    done, tracked = show(RECORDS, tmp_path, tmp_path)
    assert (done.written, done.problem) == (0, None)
    after = shown(tmp_path, "depth_ablation")
    assert {run.info.run_id for run in after} == set(tracked.values())
    assert {run.info.run_id for run in after} == {run.info.run_id for run in before}


def test_what_mlflow_refuses_of_one_trial_keeps_no_other_out(tmp_path: Path) -> None:
    wrong = replace(RECORDS.trials[0], metrics={"": 1.0})
    done, tracked = show(replace(RECORDS, trials=(wrong, *RECORDS.trials[1:])), tmp_path, tmp_path)
    assert done.reached and done.written == 2
    assert done.problem is not None and wrong.trial_id in done.problem
    assert set(tracked) == {None, *(trial.trial_id for trial in RECORDS.trials[1:])}


def settings_of(client: Any, run: Any) -> Any:
    """What the run's config.json says."""
    return json.loads(Path(client.download_artifacts(run.info.run_id, runs.CONFIG)).read_text())


def client_of(results: Path) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=tracking.tracking_uri(results))


def shown(results: Path, sweep: str) -> list[Any]:
    client = client_of(results)
    return list(client.search_runs([client.get_experiment_by_name(sweep).experiment_id]))


@pytest.mark.parametrize(
    "text",
    [
        "no such host: postgresql://me:p@ss%2Fword@db/runs",
        "tried http://me:p@ss%2Fword@server:5000/api and gave up",
        "the password p@ss/word is wrong",
        "refused: Basic of token-1",
    ],
)
def test_no_password_and_no_token_stands_in_what_is_said(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "token-1")
    said = tracking.without_secrets(text, "http://me:p%40ss%2Fword@server:5000")
    assert not any(secret in said for secret in ("p@ss", "p%40ss", "word@", "ss/word", "token-1"))


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


def test_parameters_are_short_names_within_mlflows_limits() -> None:
    axes = {"a.size": 1.0, "b.size": 0.5, "c.odd*name": True, "d.long": "x" * 7000, "e.rate": 1e-05}
    trial = replace(RECORDS.trials[1], axes=axes)
    found = runs.parameters_of(trial, shortest_names(axes))
    assert found == {
        "a.size": "1",
        "b.size": "0.5",
        "odd_name": "true",
        "long": "x" * runs.PARAMETER_LENGTH,
        "rate": "1e-05",
        "group": "grid",
        "seed": "0",
    }


def test_ten_characters_tell_variants_of_one_kind_apart() -> None:
    """MLflow draws no more of a parameter."""
    values = [{"kind": "topk_cache", "k": 12}, {"kind": "topk_cache", "k": 2}, "live", {}]
    assert [runs.as_text(value)[:10] for value in values] == [
        "k=12 topk_",
        "k=2 topk_c",
        "live",
        "{}",
    ]


def test_a_trial_with_many_long_axes_has_a_name_that_mlflow_takes() -> None:
    axes = {f"axis_{number}": "x" * 50 for number in range(9)}
    name = runs.run_name(replace(RECORDS.trials[1], axes=axes), shortest_names(axes))
    assert len(name) == runs.NAME_LENGTH
    assert name.endswith("(perplexity-0)")
