"""A small sweep that is disturbed: run as real processes, watched, and compared with a calm run."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as parquet
import pytest
import small_sweep

from orchestrator.records import Records, read_parquet
from orchestrator.runs import TRIAL_TAG
from orchestrator.selection import rank
from orchestrator.tables import all_tables

NAME = "faults"
STEPS = 300
TRIALS = 3
"""The teacher and two students that learn at different rates; they share all but the learning."""

PATIENCE_S = 240.0
OF_ONE_RUN = {"cpu_s", "gpu_s", "wall_s", "peak_rss_mb", "started_at", "ended_at", "time_ms"}
"""Columns that differ from run to run, beside `mlflow_run_id`, a random name."""

SWEEP: dict[str, Any] = {
    "name": NAME,
    "question": "Does a sweep that is disturbed end like one that is not?",
    "profile": "micro",
    "trial": {
        "prune": {"depth": {"keep": 0.5, "criterion": "block_influence"}},
        "distill": {
            "training": {**small_sweep.PROFILE["trial"]["distill"]["training"], "steps": STEPS}
        },
    },
    "axes": {"distill.training.learning_rate": [2e-3, 1e-3]},
}


_NUMBER = itertools.count()


# --- the processes ---------------------------------------------------------------------------


@dataclass
class Run:
    """A sweep that runs; what it prints goes to a file, so that a full pipe never holds it up."""

    process: subprocess.Popen[bytes]
    log: Path
    results: Path

    @property
    def folder(self) -> Path:
        """The results of the sweep."""
        return self.results / NAME / "micro"

    @property
    def output(self) -> str:
        """All that was printed so far."""
        return self.log.read_text(errors="replace")

    def tree(self) -> list[psutil.Process]:
        """The command and everything that it started, Ray's processes included."""
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            return [root, *root.children(recursive=True)]
        return []

    def workers(self, kind: str = "ImplicitFunc") -> list[psutil.Process]:
        """The warm workers that run jobs, or Ray's other processes of that kind."""
        return [process for process in self.tree() if f"ray::{kind}" in title(process)]

    def until(self, reached: Callable[[], Any], what: str) -> None:
        """Wait for a point inside the sweep; fails where the sweep ends before it."""
        deadline = time.monotonic() + PATIENCE_S
        while not reached():
            assert self.process.poll() is None, f"it ended before {what}:\n{self.output}"
            assert time.monotonic() < deadline, f"it never came so far: {what}:\n{self.output}"
            time.sleep(0.01)

    def ends(self, status: int, within_s: float = PATIENCE_S) -> str:
        """Wait for the end, which must have that status; gives what was printed."""
        try:
            ended = self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"still running after {within_s:.0f} s:\n{self.output}")
        assert ended == status, f"exit status {ended}:\n{self.output}"
        assert "Traceback" not in self.output, self.output
        return self.output

    def kill(self) -> None:
        """kill -9 of the command and everything that it started."""
        kill(self.tree())
        self.process.wait()


def title(process: psutil.Process) -> str:
    """The command line of a process, empty where it has just ended."""
    with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return " ".join(process.cmdline())
    return ""


def kill(processes: Sequence[psutil.Process]) -> None:
    """kill -9, of those that still live."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def start(
    sweep: Path, results: Path, *options: str, command: Sequence[str] = (), **variables: str
) -> Run:
    """Start the sweep as a user would, in a session of its own as a terminal gives it; `command`
    comes in place of the usual one."""
    log = sweep.parent / f"{next(_NUMBER)}.log"  # not with the results: their disk may be full
    usual = small_sweep.command(sweep, results, *options)
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*command, *usual[3:]] if command else usual,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "MLFLOW_TRACKING_URI": "", **variables},
        )
    return Run(process, log, results)


# --- what is there ---------------------------------------------------------------------------


def steps(results: Path) -> dict[str, int]:
    """Unfinished distillation -> the step of its last whole checkpoint."""
    found: dict[str, int] = {}
    for whole in (results / "artifacts" / ".working").glob("distill-*/checkpoints/whole"):
        with suppress(OSError, IndexError):
            tag = whole.read_text().split()[0]
            stage_id = whole.parent.parent.name.partition("~")[0]  # less the holder's generation
            found[stage_id] = max(found.get(stage_id, 0), int(tag.removeprefix("step")))
    return found


def furthest(results: Path) -> int:
    """The step of the whole checkpoint that is furthest, 0 without any."""
    return max(steps(results).values(), default=0)


def manifests(results: Path) -> dict[str, dict[str, Any]]:
    """The manifests of all finished artifacts."""
    found = (results / "artifacts").glob("*/artifact.json")
    return {path.parent.name: json.loads(path.read_text()) for path in found}


def of_students(results: Path) -> set[str]:
    """The artifacts that no two trials share: distillations, and what was measured after them."""
    there = manifests(results)
    distilled = {id_ for id_, manifest in there.items() if manifest["kind"] == "distill"}
    after = {id_ for id_, m in there.items() if distilled & set(m["inputs"].values())}
    return distilled | after


def copy_artifacts(source: Path, target: Path, leave_out: Collection[str] = ()) -> None:
    """The finished artifacts of one results folder for another."""
    for stage_id in manifests(source):
        if stage_id not in leave_out:
            shutil.copytree(
                source / "artifacts" / stage_id,
                target / "artifacts" / stage_id,
                dirs_exist_ok=True,
            )


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    """A parquet file of a results folder."""
    return parquet.read_table(folder / f"{name}.parquet").to_pylist()


def mirrored(results: Path) -> list[tuple[str, str]]:
    """Every trial that MLflow shows, with its run."""
    asked = "select value, run_uuid from tags join runs using (run_uuid) where key = ?"
    with closing(sqlite3.connect(results / "mlflow.db")) as store:
        return sorted(store.execute(f"{asked} and lifecycle_stage = 'active'", (TRIAL_TAG,)))


# --- what must be left -----------------------------------------------------------------------


def nothing_lost(run: Run, calm: Run) -> None:
    """The records equal those of the undisturbed run: no row lost, none doubled, no number other
    than it was; each stage ran once; nothing half-done is left lying about."""
    ours, theirs = lasting(run.folder), lasting(calm.folder)
    for name in theirs:
        assert ours[name] == theirs[name], f"{name}.parquet differs"
    assert tables(run.folder) == tables(calm.folder)
    ran = Counter(stage["stage_id"] for stage in rows(run.folder, "stages") if not stage["cached"])
    assert set(ran.values()) == {1}
    working = run.results / "artifacts" / ".working"
    left = [path.name for path in working.iterdir()] if working.exists() else []
    assert not left, f"half-done stages are left: {left}"


def lasting(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """All parquet files, less what a clock or chance put there."""
    left_out = OF_ONE_RUN | {"mlflow_run_id"}
    return {
        name: [{k: v for k, v in row.items() if k not in left_out} for row in rows(folder, name)]
        for name in ("trials", "stages", "curves", "items", "importance")
    }


TIMED = ("trials", "cost")
"""Tables with columns of time: these are compared as made from records whose times are zero."""


def tables(folder: Path) -> dict[str, bytes]:
    """Every table of a results folder in every format, times apart."""
    found = {
        path.name: path.read_bytes()
        for path in sorted((folder / "tables").iterdir())
        if path.stem not in TIMED
    }
    records = timeless(read_parquet(folder))
    for table in all_tables(records, rank(records)):
        if table.name in TIMED:
            made = (table.to_markdown(), table.to_csv(), table.to_latex())
            found |= {f"{table.name}{number}": text.encode() for number, text in enumerate(made)}
    return found


def timeless(records: Records) -> Records:
    """The records of a machine on which nothing takes any time."""
    none = {"cpu_s": 0.0, "gpu_s": 0.0, "wall_s": 0.0}
    return replace(
        records,
        trials=tuple(replace(trial, **none) for trial in records.trials),
        stages=tuple(replace(stage, **none, peak_rss_mb=0.0) for stage in records.stages),
    )


@dataclass
class Finished:
    """What was finished at the moment of a fault: none of it may be done again."""

    artifacts: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, results: Path) -> Finished:
        """What is finished now."""
        return cls(manifests(results))

    def is_untouched(self, results: Path) -> None:
        """Every artifact is still the one that it was."""
        now = manifests(results)
        for stage_id, manifest in self.artifacts.items():
            assert now.get(stage_id) == manifest, f"{stage_id} was made a second time"


# --- file systems ----------------------------------------------------------------------------


@contextmanager
def small_disk(where: Path, megabytes: int) -> Iterator[Path]:
    """A file system of that size in memory. Skips the test where mounting is not allowed."""
    where.mkdir(parents=True)
    try:
        _mount("-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(where))
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a file system cannot be mounted here: {error}")
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True, capture_output=True)


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


def fill(disk: Path) -> None:
    """Take all the room that is left."""
    for size in (1 << 20, 1 << 12, 1):
        with suppress(OSError), (disk / ".ballast").open("ab", buffering=0) as stream:
            while stream.write(b"\0" * size) == size:
                pass


def enlarge(disk: Path, megabytes: int) -> None:
    """Give the file system more room while it is in use."""
    _mount("-o", f"remount,size={megabytes}m", str(disk))


def make_read_only(folder: Path) -> None:
    """From now on no file below can be opened for writing, as where a server is lost."""
    # Mounted over itself: the file system itself cannot be made read-only while it is written to.
    _mount("--bind", str(folder), str(folder))
    deadline = time.monotonic() + 10
    command = ["mount", "-o", "remount,bind,ro", folder]
    while subprocess.run(command, capture_output=True).returncode:
        assert time.monotonic() < deadline, "a file was opened between two commands, many times"


def make_writable(folder: Path) -> None:
    """Writes succeed again."""
    subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


# --- damage ----------------------------------------------------------------------------------


def flip_bit(path: Path, at: float | bytes = 0.5) -> None:
    """Turn over one bit: at that share of the file's length, or after the last such bytes."""
    data = bytearray(path.read_bytes())
    place = int(len(data) * at) if isinstance(at, float) else data.rindex(at) + len(at)
    data[place] ^= 1
    path.write_bytes(data)


def cut_off(path: Path, share: float = 0.6) -> None:
    """Leave only the first part of the file."""
    os.truncate(path, int(path.stat().st_size * share))
