"""Artifacts on disk: a folder for each stage id, whole or not there.

A stage writes into a working folder that outlives a kill, so that it can go on; the manifest is
written last and the folder is then moved to its final name in one step. Whoever works on a stage
holds its lease.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

MANIFEST = "artifact.json"
HEARTBEAT_S = 5.0
EXPIRES_S = 60.0


@dataclass(frozen=True)
class Manifest:
    """What an artifact is, what it cost and who asked for it. Times are Unix seconds."""

    stage_id: str
    kind: str
    requested_by: str
    config: Mapping[str, Any]
    inputs: Mapping[str, str]
    seed: int | None
    metrics: Mapping[str, float]
    tokens: int
    flops: float
    cpu_s: float
    gpu_s: float
    wall_s: float
    peak_rss_mb: float
    started_at: float
    ended_at: float
    files: Mapping[str, int]
    """Size in bytes of every file of the artifact, by relative name."""


class Store:
    """The artifacts under one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, stage_id: str) -> Path:
        """Where the finished artifact stands."""
        return self.root / stage_id

    def working_folder(self, stage_id: str) -> Path:
        """Where the stage writes until it is done; kept over a kill."""
        return self.root / ".working" / stage_id

    def manifest(self, stage_id: str) -> Manifest | None:
        """The manifest of a finished, undamaged artifact; None otherwise."""
        folder = self.path(stage_id)
        try:
            manifest = Manifest(**json.loads((folder / MANIFEST).read_text()))
        except (OSError, ValueError, TypeError):
            return None
        return manifest if _sizes(folder) == dict(manifest.files) else None

    def publish(self, manifest: Manifest) -> None:
        """Turn the working folder into the finished artifact: manifest last, then one rename."""
        working, final = self.working_folder(manifest.stage_id), self.path(manifest.stage_id)
        described = asdict(manifest) | {"files": _sizes(working)}
        _write_whole(working / MANIFEST, json.dumps(described, indent=1))
        if final.exists():  # damaged, or it would not have been built again
            shutil.rmtree(final)
        working.rename(final)

    def discard(self, stage_id: str) -> None:
        """Forget an artifact that turned out to be damaged, so that it is built again. Whoever has
        its files open keeps them."""
        aside = self.path(stage_id).with_name(f".{stage_id}.damaged-{os.getpid()}")
        with suppress(FileNotFoundError):  # another may have discarded it at the same moment
            self.path(stage_id).rename(aside)
        shutil.rmtree(aside, ignore_errors=True)

    @contextmanager
    def lease(self, stage_id: str) -> Iterator[None]:
        """Hold the only right to work on a stage; waits while a living holder has it."""
        with Lease(self.root / ".leases" / stage_id).waiting():
            yield


class LeaseHeldError(Exception):
    """Another living process holds the lease."""


class Lease:
    """A file that says who works on something, kept fresh by a heartbeat.

    A holder on this machine that is dead, or one whose heartbeat stopped, is taken over from.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stop = threading.Event()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Hold the lease, waiting for it as long as its holder lives."""
        while not self._acquire():
            time.sleep(0.2)
        try:
            yield
        finally:
            self._release()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Hold the lease, or raise `LeaseHeldError` where a living process has it."""
        if not self._acquire():
            raise LeaseHeldError(self._path.read_text() if self._path.exists() else "")
        try:
            yield
        finally:
            self._release()

    def _acquire(self) -> bool:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists() and self._abandoned():
            aside = self._path.with_name(f"{self._path.name}.{os.getpid()}.{time.time_ns()}")
            try:
                self._path.rename(aside)  # of several that try, one succeeds
            except FileNotFoundError:
                return False
            aside.unlink()
        try:
            handle = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w") as stream:
            stream.write(json.dumps(_this_process()))
        self._stop.clear()
        threading.Thread(target=self._beat, daemon=True).start()
        return True

    def _release(self) -> None:
        self._stop.set()
        self._path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            try:
                os.utime(self._path)
            except FileNotFoundError:
                return

    def _abandoned(self) -> bool:
        try:
            age = time.time() - self._path.stat().st_mtime
            holder = json.loads(self._path.read_text())
        except FileNotFoundError:
            return False
        except ValueError:  # killed between creating the file and writing it, or just being written
            return age > HEARTBEAT_S
        if holder["host"] == socket.gethostname():
            return not _lives(holder["pid"], holder["started"])
        return age > EXPIRES_S


def _this_process() -> dict[str, Any]:
    me = psutil.Process()
    return {"host": socket.gethostname(), "pid": me.pid, "started": me.create_time()}


def _lives(pid: int, started: float) -> bool:
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) < 2 and process.status() != "zombie"
    except psutil.NoSuchProcess:
        return False


def _sizes(folder: Path) -> dict[str, int]:
    return {
        str(file.relative_to(folder)): file.stat().st_size
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }


def _write_whole(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".part")
    with beside.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(path)
