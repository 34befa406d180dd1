"""The artifact store: whole or not there, and one worker at a time."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from orchestrator.store import Lease, LeaseHeldError, Manifest, Store


def manifest(stage_id: str = "prune-1") -> Manifest:
    return Manifest(
        stage_id=stage_id,
        kind="prune",
        requested_by="sweep/tiny/abc",
        config={"a": 1},
        inputs={"model": "pretrain-0"},
        seed=None,
        metrics={"loss": 1.5},
        tokens=10,
        flops=1e3,
        cpu_s=1.0,
        gpu_s=0.0,
        wall_s=1.0,
        peak_rss_mb=5.0,
        started_at=1.0,
        ended_at=2.0,
        files={},
    )


def build(store: Store, text: str = "weights", stage_id: str = "prune-1") -> None:
    folder = store.working_folder(stage_id) / "model"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text(text)
    store.publish(manifest(stage_id))


def test_an_artifact_is_there_only_after_it_was_published(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.manifest("prune-1") is None
    store.working_folder("prune-1").mkdir(parents=True)
    assert store.manifest("prune-1") is None
    build(Store(tmp_path / "other"))
    found = Store(tmp_path / "other").manifest("prune-1")
    assert found is not None
    assert found.metrics == {"loss": 1.5}
    assert found.files == {"model/model.safetensors": 7}


@pytest.mark.parametrize("damage", ["truncated", "missing", "extra", "manifest"])
def test_a_damaged_artifact_counts_as_absent_and_can_be_built_again(
    tmp_path: Path, damage: str
) -> None:
    store = Store(tmp_path)
    build(store)
    file = store.path("prune-1") / "model" / "model.safetensors"
    match damage:
        case "truncated":
            file.write_text("w")
        case "missing":
            file.unlink()
        case "extra":
            (file.parent / "stray").touch()
        case "manifest":
            (store.path("prune-1") / "artifact.json").write_text('{"stage_id": "pru')
    assert store.manifest("prune-1") is None
    build(store, "anew")
    assert store.manifest("prune-1") is not None
    assert file.read_text() == "anew"


def test_work_left_by_a_kill_is_still_there(tmp_path: Path) -> None:
    store = Store(tmp_path)
    checkpoint = store.working_folder("distill-1") / "checkpoints" / "whole"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text("step5")
    assert Store(tmp_path).working_folder("distill-1").joinpath("checkpoints/whole").exists()


def test_only_one_of_many_threads_holds_a_lease(tmp_path: Path) -> None:
    store, inside, most = Store(tmp_path), [], []

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


def _hold_for_ever(path: str, ready: multiprocessing.synchronize.Event) -> None:
    with Lease(Path(path)).at_once():
        ready.set()
        time.sleep(60)


def test_a_living_holder_keeps_its_lease_and_a_killed_one_loses_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=_hold_for_ever, args=(str(tmp_path / "lease"), ready))
    holder.start()
    assert ready.wait(30)
    with pytest.raises(LeaseHeldError), Lease(tmp_path / "lease").at_once():
        pass
    holder.kill()
    holder.join()
    with Lease(tmp_path / "lease").at_once():
        pass


def test_a_holder_on_another_machine_loses_its_lease_when_its_heartbeat_stops(
    tmp_path: Path,
) -> None:
    path = tmp_path / "lease"
    elsewhere = {"host": f"not-{socket.gethostname()}", "pid": 1, "started": 0}
    path.write_text(json.dumps(elsewhere))
    with pytest.raises(LeaseHeldError), Lease(path).at_once():
        pass
    long_ago = time.time() - 3600
    os.utime(path, (long_ago, long_ago))
    with Lease(path).at_once():
        pass
