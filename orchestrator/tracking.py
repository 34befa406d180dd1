"""A mirror of the records in MLflow: written from records, never read back for a decision.

What is written is said by `orchestrator.runs`. All writing happens on one background thread that
holds no more than a few trials: what finds no room, and what a dead server did not take, is written
when the sweep ends, or by `orchestrate mirror`. A slow or dead server never holds up a sweep, it
costs one warning. MLflow is imported only once there is something to write, as that takes seconds.
"""

from __future__ import annotations

import os
import queue
import re
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from orchestrator.records import CurvePoint, Records, TrialRecord
from orchestrator.runs import OnTracked, Runs, is_refusal, one_line

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
        self._runs = Runs(uri, artifact_location, sweep, profile, resolved_yaml, on_tracked)
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
                refused = self._runs.open and is_refusal(error)
                self._problem = without_secrets(one_line(error), self._uri)
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
