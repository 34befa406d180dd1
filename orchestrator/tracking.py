"""A mirror of the records in MLflow: written from records, never read back for a decision.

One experiment per sweep name, a parent run per sweep and profile, a child run per trial. Runs are
found again by their tags, so mirroring twice leaves no duplicates. All writing happens on one
background thread that holds no more than a few trials: what finds no room, and what a dead server
did not take, is written when the sweep ends, or by `orchestrate mirror`. A slow or dead server
never holds up a sweep, it costs one warning. The only module that imports mlflow, and only once
there is something to write (the import takes seconds).
"""

from __future__ import annotations

import gc
import json
import logging
import os
import queue
import re
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from orchestrator.records import CurvePoint, Records, TrialRecord, canonical, measured

OnTracked = Callable[[str | None, str], None]
"""Told the MLflow run id of a trial, or of the whole sweep where the trial id is None."""

SWEEP_TAG = "orchestrate.sweep_profile"
TRIAL_TAG = "orchestrate.trial_id"
REASON_TAG = "orchestrate.reason"

STATUS = {"completed": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
PARAMETER_LENGTH = 6000
"""How long MLflow allows a parameter to be."""
NOTE_LENGTH = 8000
WAITING = 32
"""Trials, with their curves, that may wait to be written: some 10 MB at the most."""
REST_S = 30.0
"""After a server could not be reached, nothing is tried for so long."""
AT_ONCE_S = 1.0
"""What failed within this time is tried once more: a connection that was closed, most likely."""
STALLED_S = 30.0
"""A sweep that has ended waits for the mirror while it writes, but not for one that stands still
for so long. Longer than a request may take."""


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
        shown = without_secrets(uri, uri)
        raise ValueError(f"MLFLOW_TRACKING_URI names a server: open {shown} in a browser")
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "1", "--backend-store-uri", uri]
    if (artifacts := artifact_location(results)) is not None:
        command += ["--default-artifact-root", artifacts.as_uri()]
    return command


def without_secrets(text: str, uri: str) -> str:
    """The text without the password of the address `uri`, or of any other, and without the
    password and the token that MLflow takes from the environment."""
    text = re.sub(r"://[^/\s]*@", "://", text)
    password = urlsplit(uri).password
    environment = (os.environ.get(f"MLFLOW_TRACKING_{name}") for name in ("PASSWORD", "TOKEN"))
    for secret in (password, unquote(password or ""), *environment):
        text = text.replace(secret, "…") if secret else text
    return text


def _quiet_environment() -> None:
    """A dead server is given up on in seconds, where MLflow's own defaults take minutes."""
    # Not again by itself: a run that a slow server did make would be made twice.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    # Nothing about a sweep leaves the machine unasked.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # It prints the server's address, password included, for every run that ends.
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    # What goes wrong is said once, by `close`; MLflow's own word on a full disk is a traceback.
    for name in ("alembic", "mlflow.store.db.utils", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _new_client(uri: str) -> Any:
    _quiet_environment()
    first = "mlflow" not in sys.modules
    from mlflow.tracking import MlflowClient

    if first:
        # Half a million objects that stay. The garbage collector would walk through them after
        # every twenty trials or so: more than a tenth of what it costs to write these.
        gc.freeze()
    return MlflowClient(tracking_uri=uri)


# --- the mirror ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trial:
    record: TrialRecord
    curves: Sequence[CurvePoint]


@dataclass(frozen=True)
class _Finish:
    folder: Path
    records: Records


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
        self._room = threading.BoundedSemaphore(WAITING)
        self.finished = False
        """Whether all that `finish` was given is shown, but for what MLflow refused."""
        self._resting_until = 0.0
        self._problem: str | None = None
        """Why MLflow does not show all that it was told."""
        # A daemon, so that a server that hangs cannot keep the program from ending.
        self._thread = threading.Thread(target=self._work, name="mlflow-mirror", daemon=True)
        self._thread.start()

    @property
    def written(self) -> int:
        """Trials that were written, not counting those that MLflow showed already."""
        return self._runs.written

    def trial(self, record: TrialRecord, curves: Sequence[CurvePoint]) -> None:
        """Have a trial that ended shown: now, or by `finish` where too many wait. Returns at
        once."""
        if self._room.acquire(blocking=False):
            self._jobs.put(_Trial(record, curves))
        else:
            self._problem = "trials ended faster than they could be written"

    def finish(self, folder: Path, records: Records) -> None:
        """Have everything shown that is not yet, and the run of the sweep closed: all trials of
        `records`, and report, tables and figures of the results folder. Returns at once."""
        self._jobs.put(_Finish(folder, records))

    def close(self, timeout_s: float = 120.0, stalled_s: float = STALLED_S) -> list[str]:
        """Wait until all is written, or given up; gives at most one warning."""
        problem = self.wait(timeout_s, stalled_s)
        if problem is None:
            return []
        where = without_secrets(self._uri, self._uri)
        return [
            f"{where} does not show everything: {problem}. The results are not affected; "
            "`orchestrate mirror` writes what is missing."
        ]

    def wait(self, timeout_s: float, stalled_s: float) -> str | None:
        """Wait until all is written, or given up; gives what is wrong, if anything is."""
        self._jobs.put(None)
        began = time.monotonic()
        while self._thread.is_alive():
            self._thread.join(0.05)
            now = time.monotonic()
            stalled = now - max(began, self._runs.alive_at) > stalled_s
            if self._thread.is_alive() and (stalled or now - began > timeout_s):
                return self._problem or f"writing was not done after {now - began:.0f} s"
        return self._problem

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if time.monotonic() >= self._resting_until:
                self._attempt(job)
            if isinstance(job, _Trial):
                self._room.release()

    def _attempt(self, job: _Trial | _Finish) -> None:
        """Write the job; where that fails at once, a second time."""
        for last in (False, True):
            began = time.monotonic()
            try:
                self._write(job)
                return
            # Whatever goes wrong with a mirror is a warning: it must never fail a sweep.
            except Exception as error:
                refused = self._runs.open and _is_refusal(error)
                self._problem = without_secrets(_one_line(error), self._uri)
                self._runs.forget()  # of the last call, nobody knows whether it was heard
                if refused:
                    return
                if last or time.monotonic() - began > AT_ONCE_S:
                    self._resting_until = time.monotonic() + REST_S
                    return

    def _write(self, job: _Trial | _Finish) -> None:
        if isinstance(job, _Trial):
            self._runs.trial(job.record, job.curves)
        else:
            refused = self._runs.finish(job.folder, job.records)
            self.finished = True
            # All else is shown now, whatever went wrong before.
            self._problem = without_secrets(refused, self._uri) if refused else None


@dataclass(frozen=True)
class Mirrored:
    """How many of the trials were written, as MLflow did not show them yet; whether it was reached
    to the end; and what it does not show, if anything."""

    trials: int
    written: int
    reached: bool
    problem: str | None


def mirror(
    records: Records,
    folder: Path,
    uri: str,
    artifact_location: Path | None,
    resolved_yaml: str,
    on_tracked: OnTracked = lambda trial_id, run_id: None,
) -> Mirrored:
    """Mirror a whole sweep from its records and wait for it."""
    sweep, profile = records.sweep, records.profile
    writer = Mirror(uri, artifact_location, sweep, profile, resolved_yaml, on_tracked)
    writer.finish(folder, records)
    problem = writer.wait(timeout_s=float("inf"), stalled_s=4 * STALLED_S)
    return Mirrored(len(records.trials), writer.written, writer.finished, problem)


def _is_refusal(error: Exception) -> bool:
    """Whether MLflow itself said no, so that the next trial may fare better."""
    code = getattr(error, "error_code", None)
    return code not in (None, "INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED")


def _one_line(error: Exception) -> str:
    """What a person wants to know of a failure: of a server that is not there, just that."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, TimeoutError):
            return "it does not answer"
        if isinstance(cause, ConnectionError | socket.gaierror) and cause.strerror:
            return f"it cannot be reached ({cause.strerror.lower()})"
        if isinstance(cause, OSError) and cause.strerror:
            return f"{cause.strerror.lower()}: {cause.filename or ''}".rstrip(": ")
        cause = cause.__cause__ or cause.__context__
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:300]}"


# --- MLflow's runs ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Child:
    """The run of a trial, and what tells whether it is up to date."""

    run_id: str
    status: str
    end_ms: int | None

    def shows(self, record: TrialRecord) -> bool:
        """A run is ended last of all, at the time when the trial did."""
        return (self.status, self.end_ms) == (STATUS[record.status], _ms(record.ended_at))


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
        self._told: dict[str | None, str] = {}
        self._client: Any = None
        self._experiment = self._parent = ""
        self._children: dict[str, _Child] = {}
        self.written = 0
        self.alive_at = 0.0
        """When something was last written, by the monotonic clock."""

    @property
    def open(self) -> bool:
        """Whether the parent run is there."""
        return bool(self._parent)

    def forget(self) -> None:
        """Look for all runs again before anything else is written."""
        self._parent = ""

    def trial(self, record: TrialRecord, curves: Sequence[CurvePoint]) -> None:
        """Write a child run, unless it shows this trial already."""
        self._connect()
        record = canonical(record)
        child = self._children.get(record.trial_id)
        if child is None or not child.shows(record):
            child = self._write(record, measured(curves), child)
            self._children[record.trial_id] = child
            self.written += 1
        if record.mlflow_run_id != child.run_id:
            self._tell(record.trial_id, child.run_id)
        self.alive_at = time.monotonic()

    def finish(self, folder: Path, records: Records) -> str | None:
        """Write what is not shown yet, and the parent run; gives the first of MLflow's refusals."""
        self._connect()
        curves: defaultdict[str, list[CurvePoint]] = defaultdict(list)
        for point in records.curves:
            curves[point.trial_id].append(point)
        refused: str | None = None
        for record in records.trials:
            try:
                self.trial(record, curves[record.trial_id])
            except Exception as error:
                if not _is_refusal(error):
                    raise
                refused = refused or f"trial {record.trial_id}: {_one_line(error)}"
        self._show_parent(folder)
        return refused

    def _show_parent(self, folder: Path) -> None:
        note = folder / "tables" / "configurations.md"
        if note.is_file():
            text = note.read_text(encoding="utf-8")[:NOTE_LENGTH]
            self._client.set_tag(self._parent, "mlflow.note.content", text)
        if (folder / "best.json").is_file():
            self._show_winner(json.loads((folder / "best.json").read_text(encoding="utf-8")))
        self._client.set_terminated(self._parent, "FINISHED")
        # Last, as artifacts may be kept by another server than runs are.
        self._client.log_text(self._parent, self._yaml, "sweep.yaml")
        for name in ("tables", "figures"):
            if (folder / name).is_dir():
                self._client.log_artifacts(self._parent, str(folder / name), name)
                self.alive_at = time.monotonic()
        for name in ("report.html", "best.json"):
            if (folder / name).is_file():
                self._client.log_artifact(self._parent, str(folder / name))

    def _show_winner(self, best: Mapping[str, Any]) -> None:
        self._client.set_tag(self._parent, "orchestrate.winner", best["trial_id"])
        # Stamped with the sweep's own end: the same winner again is no new point, and a later
        # winner is the latest one.
        summary = _summary(best["metrics"], best["measured_until"])
        self._client.log_batch(self._parent, metrics=summary)

    def _connect(self) -> None:
        if self._parent:
            return
        _quiet_environment()
        from mlflow.tracking import MlflowClient

        self.alive_at = time.monotonic()  # the import alone takes seconds

        self._client = MlflowClient(tracking_uri=self._uri)
        self._experiment = self._find_experiment()
        self.alive_at = time.monotonic()
        parent = self._find_parent()
        self._children = self._find_children(parent)
        self._parent = parent
        self._tell(None, parent)
        self.alive_at = time.monotonic()

    def _tell(self, trial_id: str | None, run_id: str) -> None:
        if self._told.get(trial_id) != run_id:
            self._on_tracked(trial_id, run_id)
            self._told[trial_id] = run_id

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
        found = list(self._search(f"tags.`{SWEEP_TAG}` = '{name}'"))
        if not found:
            tags = {SWEEP_TAG: name, "orchestrate.profile": self._profile}
            run = self._client.create_run(self._experiment, tags=tags, run_name=name)
            return str(run.info.run_id)
        kept, *extra = sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))
        for run in extra:
            for child in self._search(_children_of(run.info.run_id)):
                self._client.delete_run(child.info.run_id)
            self._client.delete_run(run.info.run_id)
        self._client.update_run(kept.info.run_id, status="RUNNING")
        return str(kept.info.run_id)

    def _find_children(self, parent: str) -> dict[str, _Child]:
        """One run for each trial. A server that answered too late may have made a second."""
        found: dict[str, _Child] = {}
        for run in self._search(_children_of(parent)):
            if (trial_id := run.data.tags.get(TRIAL_TAG)) is None:
                continue
            child = _Child(run.info.run_id, run.info.status, run.info.end_time)
            known = found.get(trial_id)
            if known is not None:
                child, extra = (child, known) if known.end_ms is None else (known, child)
                self._client.delete_run(extra.run_id)
            found[trial_id] = child
        return found

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

    def _write(
        self, record: TrialRecord, curves: Sequence[CurvePoint], known: _Child | None
    ) -> _Child:
        from mlflow.entities import Metric, Param, RunTag

        run = self._client.get_run(known.run_id) if known else self._new_child(record)
        run_id = str(run.info.run_id)
        # MLflow refuses to change a parameter: one that is there stays.
        missing = {k: v for k, v in _parameters(record).items() if k not in run.data.params}
        points = [Metric(_name(p.name), p.value, p.time_ms, p.step) for p in curves]
        # Also where there is no reason, but an earlier attempt left one.
        reason = record.reason or ("" if REASON_TAG in run.data.tags else None)
        self._client.log_batch(
            run_id,
            metrics=[*points, *_summary(record.metrics, record.ended_at)],
            params=[Param(key, value) for key, value in missing.items()],
            tags=[] if reason is None else [RunTag(REASON_TAG, reason)],
        )
        status, end_ms = STATUS[record.status], _ms(record.ended_at)
        self._client.set_terminated(run_id, status, end_ms)
        return _Child(run_id, status, end_ms)

    def _new_child(self, record: TrialRecord) -> Any:
        tags = {"mlflow.parentRunId": self._parent, TRIAL_TAG: record.trial_id}
        if record.baseline:
            tags["orchestrate.baseline"] = record.baseline
        return self._client.create_run(
            self._experiment, _ms(record.started_at), tags, run_name=record.trial_id
        )


def _children_of(parent: str) -> str:
    return f"tags.`mlflow.parentRunId` = '{parent}'"


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


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
