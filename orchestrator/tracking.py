"""A mirror of the records in MLflow: written from records, never read back for a decision.

One experiment per sweep name, a parent run per sweep and profile, a child run per trial. Runs are
found again by their tags, so mirroring twice leaves no duplicates. All writing happens on one
background thread: a slow or dead server never holds up a sweep, it costs one warning. The only
module that imports mlflow, and only once there is something to write (the import takes seconds).
"""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.records import CurvePoint, Records, TrialRecord

OnTracked = Callable[[str | None, str], None]
"""Told the MLflow run id of a trial, or of the whole sweep where the trial id is None."""

SWEEP_TAG = "orchestrate.sweep_profile"
TRIAL_TAG = "orchestrate.trial_id"
REASON_TAG = "orchestrate.reason"
MIRRORED_TAG = "orchestrate.mirrored"
"""Set last on a child run: when the trial that it shows ended. Equal means nothing to write."""

STATUS = {"completed": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
# What MLflow takes in one call, and how long a parameter may be.
METRICS_A_CALL = 1000
PARAMETERS_A_CALL = 100
PARAMETER_LENGTH = 6000
NOTE_LENGTH = 8000
PATIENCE = 2
"""Trials in a row that could not be written, after which the mirror gives up."""


def tracking_uri(results: Path) -> str:
    """`MLFLOW_TRACKING_URI` where it is set, else a database in the results folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{results.resolve() / 'mlflow.db'}"


def artifact_location(results: Path) -> Path | None:
    """Where artifacts go beside the database; None leaves it to a server of the user's."""
    local = tracking_uri(results).startswith("sqlite:")
    return results.resolve() / "mlartifacts" if local else None


def ui_command(results: Path, port: int) -> list[str]:
    """The command that serves MLflow's page on this machine alone.

    Raises ValueError where a server of the user's already serves it.
    """
    uri = tracking_uri(results)
    if uri.startswith(("http:", "https:")):
        raise ValueError(f"MLFLOW_TRACKING_URI names a server: open {uri} in a browser")
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "1", "--backend-store-uri", uri]
    if (artifacts := artifact_location(results)) is not None:
        command += ["--default-artifact-root", artifacts.as_uri()]
    return command


def _quiet_environment() -> None:
    """A dead server is given up on in seconds, where MLflow's own defaults take minutes."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    # Nothing about a sweep leaves the machine unasked.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # What goes wrong is said once, by `close`.
    for name in ("alembic", "mlflow.store.db.utils", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.ERROR)


# --- the mirror ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trial:
    record: TrialRecord
    curves: Sequence[CurvePoint]


@dataclass(frozen=True)
class _Finish:
    folder: Path


class Mirror:
    """Mirrors one sweep at one profile, on a thread of its own, until `close`.

    `resolved_yaml` is the resolved sweep file's text. `on_tracked` is called on that thread.
    """

    def __init__(
        self,
        uri: str,
        artifact_location: Path | None,
        sweep: str,
        profile: str,
        resolved_yaml: str,
        on_tracked: OnTracked = lambda trial_id, run_id: None,
    ) -> None:
        self._runs = _Runs(uri, artifact_location, sweep, profile, resolved_yaml, on_tracked)
        self._uri = uri
        self._jobs: queue.SimpleQueue[_Trial | _Finish | None] = queue.SimpleQueue()
        self._failures: list[str] = []
        self._written = 0
        # A daemon, so that a server that hangs cannot keep the program from ending.
        self._thread = threading.Thread(target=self._work, name="mlflow-mirror", daemon=True)
        self._thread.start()

    def trial(self, record: TrialRecord, curves: Sequence[CurvePoint]) -> None:
        """Have a trial that ended shown. Returns at once."""
        self._jobs.put(_Trial(record, curves))

    def finish(self, folder: Path) -> None:
        """Have the results folder's report, tables and figures shown on the parent run, and the
        run closed. Returns at once."""
        self._jobs.put(_Finish(folder))

    def close(self, timeout_s: float = 120.0) -> list[str]:
        """Wait until all is written, or given up; gives at most one warning."""
        self._jobs.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            late = f"writing was not done after {timeout_s:.0f} s"
            return [self._warning([*self._failures, late])]
        return [self._warning(self._failures)] if self._failures else []

    def _warning(self, failures: Sequence[str]) -> str:
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        return _without_password(
            f"MLflow at {self._uri} does not show everything: {failures[0]}"
            f"{more}. The results are not affected; `orchestrate mirror` writes what is missing."
        )

    def _work(self) -> None:
        in_a_row = 0
        while (job := self._jobs.get()) is not None:
            if in_a_row >= PATIENCE:
                self._failures.append("given up")
                continue
            try:
                self._write(job)
                in_a_row = 0
            # Whatever goes wrong with a mirror is a warning: it must never fail a sweep.
            except Exception as error:
                # Nothing can be written without the parent run, so that alone is enough.
                in_a_row += 1 if self._runs.open else PATIENCE
                self._failures.append(_one_line(error))

    def _write(self, job: _Trial | _Finish) -> None:
        if isinstance(job, _Finish):
            self._runs.finish(job.folder)
        else:
            self._runs.trial(job.record, job.curves)


def mirror(
    records: Records,
    folder: Path,
    uri: str,
    artifact_location: Path | None,
    resolved_yaml: str,
    on_tracked: OnTracked = lambda trial_id, run_id: None,
) -> list[str]:
    """Mirror a whole sweep from its records and wait for it; gives warnings."""
    sweep, profile = records.sweep, records.profile
    writer = Mirror(uri, artifact_location, sweep, profile, resolved_yaml, on_tracked)
    for trial in records.trials:
        mine = [point for point in records.curves if point.trial_id == trial.trial_id]
        writer.trial(trial, mine)
    writer.finish(folder)
    return writer.close(timeout_s=3600.0)


def _one_line(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:300]}"


def _without_password(text: str) -> str:
    return re.sub(r"://[^/@\s]*@", "://", text)


# --- MLflow's runs ---------------------------------------------------------------------------


class _Runs:
    """The experiment, the parent run and its children. Used by one thread."""

    def __init__(
        self,
        uri: str,
        artifact_location: Path | None,
        sweep: str,
        profile: str,
        resolved_yaml: str,
        on_tracked: OnTracked,
    ) -> None:
        self._uri, self._artifacts, self._yaml = uri, artifact_location, resolved_yaml
        self._sweep, self._profile = sweep, profile
        self._on_tracked = on_tracked
        self._client: Any = None
        self._experiment = self._parent = ""
        self._children: dict[str, Any] = {}

    @property
    def open(self) -> bool:
        """Whether the parent run is there."""
        return bool(self._parent)

    def trial(self, record: TrialRecord, curves: Sequence[CurvePoint]) -> None:
        """Write a child run, unless it shows this trial already."""
        self._connect()
        known = self._children.get(record.trial_id)
        mark = str(_ms(record.ended_at))
        if known is not None and known.data.tags.get(MIRRORED_TAG) == mark:
            self._on_tracked(record.trial_id, known.info.run_id)
            return
        run = known or self._new_child(record)
        self._fill(run, record, curves)
        run_id = run.info.run_id
        self._client.set_terminated(run_id, STATUS[record.status], _ms(record.ended_at))
        self._client.set_tag(run_id, MIRRORED_TAG, mark)
        self._children[record.trial_id] = self._client.get_run(run_id)
        self._on_tracked(record.trial_id, run_id)

    def finish(self, folder: Path) -> None:
        """Show the results folder on the parent run and close it."""
        self._connect()
        for name in ("tables", "figures"):
            if (folder / name).is_dir():
                self._client.log_artifacts(self._parent, str(folder / name), name)
        for name in ("sweep.yaml", "report.html", "best.json"):
            if (folder / name).is_file():
                self._client.log_artifact(self._parent, str(folder / name))
        note = folder / "tables" / "configurations.md"
        if note.is_file():
            text = note.read_text(encoding="utf-8")[:NOTE_LENGTH]
            self._client.set_tag(self._parent, "mlflow.note.content", text)
        if (folder / "best.json").is_file():
            self._show_winner(json.loads((folder / "best.json").read_text(encoding="utf-8")))
        self._client.set_terminated(self._parent, "FINISHED")

    def _show_winner(self, best: Mapping[str, Any]) -> None:
        self._client.set_tag(self._parent, "orchestrate.winner", best["trial_id"])
        # Stamped with the sweep's own end: the same winner again is no new point, and a later
        # winner is the latest one.
        self._log_metrics(self._parent, _summary(best["metrics"], best["measured_until"]))

    def _connect(self) -> None:
        if self._parent:
            return
        _quiet_environment()
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=self._uri)
        self._experiment = self._find_experiment()
        parent = self._find_parent()
        self._client.log_text(parent, self._yaml, "sweep.yaml")
        self._children = {
            run.data.tags[TRIAL_TAG]: run
            for run in self._search(f"tags.`mlflow.parentRunId` = '{parent}'")
            if TRIAL_TAG in run.data.tags
        }
        self._parent = parent
        self._on_tracked(None, parent)

    def _find_experiment(self) -> str:
        found = self._client.get_experiment_by_name(self._sweep)
        if found is None:
            place = None if self._artifacts is None else (self._artifacts / self._sweep).as_uri()
            return str(self._client.create_experiment(self._sweep, artifact_location=place))
        if found.lifecycle_stage == "deleted":
            self._client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def _find_parent(self) -> str:
        name = f"{self._sweep}/{self._profile}"
        for run in self._search(f"tags.`{SWEEP_TAG}` = '{name}'"):
            self._client.update_run(run.info.run_id, status="RUNNING")
            return str(run.info.run_id)
        tags = {SWEEP_TAG: name, "orchestrate.profile": self._profile}
        run = self._client.create_run(self._experiment, tags=tags, run_name=name)
        return str(run.info.run_id)

    def _search(self, condition: str) -> Iterator[Any]:
        token = None
        while True:
            page = self._client.search_runs(
                [self._experiment], condition, max_results=1000, page_token=token
            )
            yield from page
            token = page.token
            if not token:
                return

    def _new_child(self, record: TrialRecord) -> Any:
        tags = {"mlflow.parentRunId": self._parent, TRIAL_TAG: record.trial_id}
        if record.baseline:
            tags["orchestrate.baseline"] = record.baseline
        return self._client.create_run(
            self._experiment, _ms(record.started_at), tags, run_name=record.trial_id
        )

    def _fill(self, run: Any, record: TrialRecord, curves: Sequence[CurvePoint]) -> None:
        from mlflow.entities import Metric, Param

        run_id = run.info.run_id
        # MLflow refuses to change a parameter: one that is there stays.
        missing = {k: v for k, v in _parameters(record).items() if k not in run.data.params}
        parameters = [Param(key, value) for key, value in missing.items()]
        for chunk in _chunks(parameters, PARAMETERS_A_CALL):
            self._client.log_batch(run_id, params=chunk)
        points = [Metric(_name(p.name), p.value, p.time_ms, p.step) for p in curves]
        self._log_metrics(run_id, [*points, *_summary(record.metrics, record.ended_at)])
        # Also where there is none but an earlier attempt left one.
        if record.reason or REASON_TAG in run.data.tags:
            self._client.set_tag(run_id, REASON_TAG, record.reason or "")

    def _log_metrics(self, run_id: str, metrics: Sequence[Any]) -> None:
        for chunk in _chunks(metrics, METRICS_A_CALL):
            self._client.log_batch(run_id, metrics=chunk)


def _summary(metrics: Mapping[str, float | None], at: float) -> list[Any]:
    from mlflow.entities import Metric

    return [Metric(_name(k), v, _ms(at), 0) for k, v in metrics.items() if v is not None]


def _parameters(record: TrialRecord) -> dict[str, str]:
    """The resolved settings under dotted names, with the model's size beside them."""
    found = dict(_flatten(record.config))
    found.setdefault("seed", str(record.seed))
    if record.parameters is not None:
        found.setdefault("parameters", str(record.parameters))
    return {_name(key): value[:PARAMETER_LENGTH] for key, value in found.items()}


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and (value or not prefix):
        for key in sorted(value):
            yield from _flatten(value[key], f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _name(key: str) -> str:
    # The characters that MLflow allows in names, and their greatest length.
    return re.sub(r"[^\w\-. :/]", "_", key)[:250]


def _chunks(rows: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
