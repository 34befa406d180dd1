"""The artifact store: whole or not there, one worker at a time, and no damage goes unnoticed."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fault_tools import cut_off, flip_bit
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from orchestrator.leases import Lease, LeaseHeldError, Pace, this_process
from orchestrator.store import DamagedArtifactError, Manifest, Store

FAST = Pace(heartbeat_s=0.05, expires_s=0.4, look_s=0.01)
SLEEPY = Pace(heartbeat_s=1000.0)
"""A holder whose heart never beats."""


def manifest(stage_id: str = "prune-1", **changed: Any) -> Manifest:
    values: dict[str, Any] = {
        "stage_id": stage_id,
        "kind": "prune",
        "requested_by": "sweep/tiny/abc",
        "config": {"a": 1, "shape": {"layers": [1, 2]}},
        "inputs": {"model": "pretrain-0"},
        "seed": None,
        "metrics": {"loss": 1.5},
        "tokens": 10,
        "flops": 1e3,
        "cpu_s": 1.0,
        "gpu_s": 0.0,
        "wall_s": 1.0,
        "peak_rss_mb": 5.0,
        "started_at": 1.0,
        "ended_at": 2.0,
        "files": {},
    }
    return Manifest(**values | changed)


def build(store: Store, stage_id: str = "prune-1", **changed: Any) -> Manifest:
    """An artifact with a file of each kind that stages write."""
    folder = store.working_folder(stage_id)
    (folder / "model").mkdir(parents=True)
    save_file({"w": torch.arange(512.0)}, folder / "model" / "model.safetensors")
    (folder / "rows.jsonl").write_text(json.dumps({"name": "loss", "value": 0.123}) + "\n")
    np.save(folder / "hidden.npy", np.arange(512, dtype=np.float32))
    return store.publish(manifest(stage_id, **changed))


# --- whole or not there ----------------------------------------------------------------------


def test_an_artifact_is_there_only_after_it_was_published(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.manifest("prune-1") is None
    store.working_folder("prune-1").mkdir(parents=True)
    assert store.manifest("prune-1") is None
    build(Store(tmp_path / "other"))
    found = Store(tmp_path / "other").manifest("prune-1")
    assert found is not None
    assert found.metrics == {"loss": 1.5}
    assert set(found.files) == {"model/model.safetensors", "rows.jsonl", "hidden.npy"}


FILES = ("model/model.safetensors", "rows.jsonl", "hidden.npy", "artifact.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [cut_off, flip_bit, Path.unlink], ids=lambda d: d.__name__)
def test_a_damaged_artifact_counts_as_absent_and_is_built_again_as_it_was(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    store = Store(tmp_path)
    build(store)
    whole = {file: (store.path("prune-1") / file).read_bytes() for file in FILES}
    assert store.found("prune-1") is not None
    damage(store.path("prune-1") / name)
    assert store.found("prune-1") is None
    with pytest.raises(DamagedArtifactError, match=r"not whole|not what was written"):
        store.fetch("prune-1")
    build(store)
    assert store.found("prune-1") is not None
    assert {file: (store.path("prune-1") / file).read_bytes() for file in FILES} == whole


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"stage_id": "prune-1"}', "\x00" * 900])
def test_a_manifest_of_garbage_counts_as_none(tmp_path: Path, text: str) -> None:
    store = Store(tmp_path)
    build(store)
    (store.path("prune-1") / "artifact.json").write_text(text)
    assert store.manifest("prune-1") is None


@given(place=st.integers(min_value=0), bit=st.integers(min_value=0, max_value=7))
def test_no_bit_of_a_manifest_can_turn_over_and_change_what_it_says(place: int, bit: int) -> None:
    written = manifest(metrics={"loss": 1.5, "accuracy.mean": 0.25}, crc32={"a": 7})
    data = bytearray(written.text().encode())
    data[place % len(data)] ^= 1 << bit
    try:
        read = Manifest.of(data.decode())
    except (ValueError, TypeError):
        return
    assert read == Manifest.of(written.text())  # a blank between two values, at most


def test_a_file_too_many_is_noticed_and_what_a_kill_left_beside_a_file_is_not_published(
    tmp_path: Path,
) -> None:
    store = Store(tmp_path)
    working = store.working_folder("prune-1")
    working.mkdir(parents=True)
    (working / "curve.part").write_text("half a cur")
    (working / "artifact.json.part").write_text('{"stage_')
    build(store)
    found = store.found("prune-1")
    assert found is not None and "curve.part" not in found.files
    assert not list(store.path("prune-1").rglob("*.part"))
    (store.path("prune-1") / "stray").touch()
    assert store.found("prune-1") is None


def test_an_artifact_of_before_there_were_checksums_is_still_read(tmp_path: Path) -> None:
    store = Store(tmp_path)
    build(store)
    file = store.path("prune-1") / "artifact.json"
    older = json.loads(file.read_text())
    del older["checksum"], older["crc32"]
    file.write_text(json.dumps(older))
    found = store.found("prune-1")
    assert found is not None and found.metrics == {"loss": 1.5}


def test_planning_reads_no_file_but_manifests_and_a_file_is_compared_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    build(store)
    file = store.path("prune-1") / "hidden.npy"
    before = file.stat()
    flip_bit(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a failing disk does it
    assert store.manifest("prune-1") is not None
    assert store.found("prune-1") is None
    flip_bit(file)
    assert store.found("prune-1") is not None
    kept = file.stat()
    flip_bit(file)
    os.utime(file, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert store.found("prune-1") is not None


def test_work_left_by_a_kill_is_still_there(tmp_path: Path) -> None:
    store = Store(tmp_path)
    checkpoint = store.working_folder("distill-1") / "checkpoints" / "whole"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text("step5")
    assert Store(tmp_path).working_folder("distill-1").joinpath("checkpoints/whole").exists()


def test_what_another_published_meanwhile_stays(tmp_path: Path) -> None:
    mine, other = Store(tmp_path), Store(tmp_path)
    mine.working_folder("prune-1").mkdir(parents=True)
    with mine.lease("prune-1"):
        work = mine.working_folder("prune-1")
        aside = work.rename(tmp_path / "aside")
        build(other, requested_by="the other")
        aside.rename(work)
        (work / "rows.jsonl").write_text("mine")
        assert mine.publish(manifest()).requested_by == "the other"
    found = mine.found("prune-1")
    assert found is not None and found.requested_by == "the other"
    assert not list((tmp_path / ".working").iterdir())


def test_only_what_one_has_seen_to_be_damaged_is_discarded(tmp_path: Path) -> None:
    store, other = Store(tmp_path), Store(tmp_path)
    build(store)
    store.fetch("prune-1")
    other.fetch("prune-1")
    other.discard("prune-1")
    assert store.manifest("prune-1") is None
    build(other)
    store.discard("prune-1")  # it saw the one before
    assert store.manifest("prune-1") is not None
    store.fetch("prune-1")
    store.discard("prune-1")
    assert store.manifest("prune-1") is None


# --- leases ----------------------------------------------------------------------------------


def test_only_one_of_many_threads_holds_a_lease(tmp_path: Path) -> None:
    store, inside, most = Store(tmp_path), list[int](), list[int]()

    def work() -> None:
        with store.lease("prune-1"):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert len(most) == 8
    assert not list((tmp_path / ".leases").iterdir())


def elsewhere(path: Path) -> Path:
    """A lease of a process on another machine that has this machine's name."""
    other = {**this_process(), "machine": "another boot/4026531836", "host": socket.gethostname()}
    path.write_text(json.dumps(other))
    return path


@contextmanager
def beating(path: Path, first: float, step: float) -> Any:
    """A heartbeat whose clock begins at `first` and goes on by `step` seconds each time."""
    done = threading.Event()

    def beat() -> None:
        now = first
        while not done.wait(0.05):
            now += step
            os.utime(path, (now, now))

    thread = threading.Thread(target=beat)
    thread.start()
    yield
    done.set()
    thread.join()


CLOCKS = {
    "right": (time.time(), 0.05),
    "an hour slow": (time.time() - 3600, 0.05),
    "an hour fast": (time.time() + 3600, 0.05),
    "running backwards": (time.time(), -60.0),
}


@pytest.mark.parametrize("clock", CLOCKS)
def test_a_heart_that_beats_keeps_its_lease_whatever_its_clock_says(
    tmp_path: Path, clock: str
) -> None:
    path = elsewhere(tmp_path / "lease")
    taken = threading.Event()

    def wait() -> None:
        with Lease(path, FAST).waiting():
            taken.set()

    with beating(path, *CLOCKS[clock]):
        with pytest.raises(LeaseHeldError, match=f"process {os.getpid()} on "):
            Lease(path, FAST).at_once().__enter__()
        waiter = threading.Thread(target=wait)
        waiter.start()
        assert not taken.wait(3 * FAST.expires_s)
    assert taken.wait(10)
    waiter.join()


@pytest.mark.parametrize("seconds", [-3600.0, 0.0, 3600.0])
@pytest.mark.parametrize("how", ["waiting", "at_once"])
def test_a_heart_that_stopped_loses_its_lease_after_a_while_whatever_its_clock_said(
    tmp_path: Path, seconds: float, how: str
) -> None:
    path = elsewhere(tmp_path / "lease")
    os.utime(path, (time.time() + seconds,) * 2)
    began = time.monotonic()
    lease = Lease(path, FAST)
    with lease.waiting() if how == "waiting" else lease.at_once():
        assert time.monotonic() - began > FAST.expires_s
    assert not list(tmp_path.iterdir())


def test_a_waiter_that_was_stopped_itself_does_not_take_that_for_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = elsewhere(tmp_path / "lease")
    pace = Pace(expires_s=30.0, look_s=0.01)
    later, slept = time.monotonic, list[float]()

    def stopped_for_an_hour(seconds: float) -> None:
        slept.append(seconds)
        monkeypatch.setattr(time, "monotonic", lambda: later() + 3600 * len(slept))
        if len(slept) == 10:
            raise InterruptedError

    monkeypatch.setattr(time, "sleep", stopped_for_an_hour)
    with pytest.raises(InterruptedError), Lease(path, pace).waiting():
        pass


def test_a_holder_on_this_machine_that_lives_keeps_what_is_asked_for_at_once(
    tmp_path: Path,
) -> None:
    """Two sweeps must not write one ledger, not even where one was stopped for a while."""
    with Lease(tmp_path / "lease", SLEEPY).waiting(), pytest.raises(LeaseHeldError):
        time.sleep(2 * FAST.expires_s)
        Lease(tmp_path / "lease", FAST).at_once().__enter__()


def test_who_was_taken_over_from_releases_nothing_and_is_told(tmp_path: Path) -> None:
    lost = threading.Event()
    pace = Pace(heartbeat_s=1.0, expires_s=0.3, look_s=0.01)
    first = Lease(tmp_path / "lease", pace, on_lost=lost.set)
    held = first.waiting()
    held.__enter__()
    with Lease(tmp_path / "lease", FAST).waiting() as second:
        assert second.generation == first.generation + 1 and second.follows_living
        assert lost.wait(10)
        held.__exit__(None, None, None)
        with pytest.raises(LeaseHeldError):
            Lease(tmp_path / "lease", FAST).at_once().__enter__()
    with Lease(tmp_path / "lease", FAST).at_once():
        pass
    assert not list(tmp_path.iterdir())


def test_a_lease_that_was_being_written_when_its_holder_died_expires(tmp_path: Path) -> None:
    (tmp_path / "lease").touch()
    with Lease(tmp_path / "lease", FAST).waiting():
        pass


def test_a_follower_goes_on_in_a_folder_of_its_own(tmp_path: Path) -> None:
    """Whoever may be alive keeps writing where he did; the follower has a copy."""
    first, second = Store(tmp_path, SLEEPY), Store(tmp_path, FAST)
    held = first.lease("distill-1")
    held.__enter__()
    old = first.working_folder("distill-1")
    old.mkdir(parents=True)
    (old / "whole").write_text("step5")
    with second.lease("distill-1"):
        new = second.working_folder("distill-1")
        assert new != old
        assert (new / "whole").read_text() == "step5"
        (old / "whole").write_text("written by the one before")
        assert (new / "whole").read_text() == "step5"
        assert first.working_folder("distill-1") == old
    assert Store(tmp_path).working_folder("distill-1") == new, "what was done last is gone on with"
