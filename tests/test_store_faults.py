"""The artifact store against real processes, real damage and file systems that fail."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fault_tools as faults
import pytest
import small_sweep
from asks_for_a_stage import PACE, RESULT

from orchestrator.execute import run_stage, run_stages
from orchestrator.faults import InfrastructureError, StorageError, explain, is_infrastructure
from orchestrator.records import StageRecord
from orchestrator.steps import StageNode
from orchestrator.store import Manifest, Store
from trainers.contract import DamagedInputError, Runtime, StageError

ASKS = Path(__file__).with_name("asks_for_a_stage.py")

# --- several processes -----------------------------------------------------------------------


class Askers:
    """Processes that ask one store for one stage."""

    def __init__(self, folder: Path) -> None:
        self.store, self.log = Store(folder / "store", PACE), folder / "log"

    def ask(self, name: str, steps: int = 4, before: Sequence[str] = ()) -> subprocess.Popen[str]:
        arguments = [str(ASKS), str(self.store.root), str(self.log), name, str(steps)]
        command = [*before, sys.executable, *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def said(self, what: str) -> list[str]:
        """Who said so."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line for line in lines if what in line]

    def begun(self) -> list[str]:
        """Who began to build, and at which step."""
        return self.said("begins")

    def until(self, reached: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 60
        while not reached():
            assert time.monotonic() < deadline, self.begun()
            time.sleep(0.01)

    def steps_of(self, name: str) -> int:
        """How far the work in a working folder is."""
        try:
            return int((self.store.root / ".working" / name / "steps").read_text())
        except (FileNotFoundError, ValueError):
            return 0

    def one_whole_artifact_and_nothing_else(self) -> None:
        assert self.store.found("prune-1") is not None
        assert (self.store.path("prune-1") / "rows.jsonl").read_text() == RESULT
        left = {path.name: list(path.iterdir()) for path in self.store.root.iterdir()}
        assert set(left) == {"prune-1", ".working", ".leases"}
        assert not left[".working"] and not left[".leases"]


@pytest.fixture
def askers(tmp_path: Path) -> Askers:
    return Askers(tmp_path)


def ended(*processes: subprocess.Popen[str]) -> list[str]:
    said = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert all(process.returncode == 0 for process in processes)
    return sorted(said)


def test_four_processes_that_ask_at_once_build_once(askers: Askers) -> None:
    said = ended(*(askers.ask(f"p{number}") for number in range(4)))
    assert said == ["built", "found", "found", "found"]
    assert len(askers.begun()) == 1
    askers.one_whole_artifact_and_nothing_else()


def test_a_killed_holder_is_followed_at_once_and_its_work_gone_on_with(askers: Askers) -> None:
    first = askers.ask("first", 1000)
    askers.until(lambda: askers.steps_of("prune-1") > 3)
    others = [askers.ask(f"p{number}", 40) for number in range(2)]
    askers.until(lambda: len(askers.said("asks")) == 3)
    assert len(askers.begun()) == 1
    first.kill()
    first.wait()
    killed = time.monotonic()
    askers.until(lambda: len(askers.begun()) == 2)
    assert time.monotonic() - killed < PACE.expires_s / 2, "a dead process need not expire"
    assert ended(*others) == ["built", "found"]
    assert int(askers.begun()[1].split()[-1]) > 3
    askers.one_whole_artifact_and_nothing_else()


@pytest.mark.parametrize("wakes", ["while the other builds", "after the other has built"])
def test_a_holder_that_is_stopped_is_followed_and_does_no_harm_when_it_wakes(
    askers: Askers, wakes: str
) -> None:
    first = askers.ask("first", 60)
    askers.until(lambda: askers.steps_of("prune-1") > 3)
    os.kill(first.pid, signal.SIGSTOP)
    second = askers.ask("second", 60)
    askers.until(lambda: len(askers.begun()) == 2)
    assert int(askers.begun()[1].split()[-1]) > 3, "it begins where the first was"
    if wakes == "while the other builds":
        os.kill(first.pid, signal.SIGCONT)
        ended(first, second)
    else:
        assert ended(second) == ["built"]
        built = (askers.store.path("prune-1") / "artifact.json").stat()
        os.kill(first.pid, signal.SIGCONT)
        assert ended(first) == ["found"]
        now = (askers.store.path("prune-1") / "artifact.json").stat()
        assert (now.st_ino, now.st_mtime_ns) == (built.st_ino, built.st_mtime_ns)
    assert len(askers.begun()) == 2
    askers.one_whole_artifact_and_nothing_else()


CONTAINER = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


def test_a_holder_in_another_container_is_known_by_its_heartbeat_alone(askers: Askers) -> None:
    """Two containers may share a host name, and one's process 1 is not the other's."""
    if subprocess.run([*CONTAINER, "true"], capture_output=True).returncode:
        pytest.skip("a namespace of processes cannot be made here")
    first = askers.ask("first", 1000, CONTAINER)
    askers.until(lambda: askers.steps_of("prune-1") > 3)
    second = askers.ask("second", 40)
    askers.until(lambda: len(askers.said("asks")) == 2)
    time.sleep(1.5 * PACE.expires_s)
    assert len(askers.begun()) == 1, "its heart beats"
    first.kill()
    first.wait()
    killed = time.monotonic()
    askers.until(lambda: len(askers.begun()) == 2)
    assert time.monotonic() - killed > PACE.expires_s / 2
    assert ended(second) == ["built"]
    askers.one_whole_artifact_and_nothing_else()


# --- damage ----------------------------------------------------------------------------------

HALF = {"depth": {"num_hidden_layers": 2, "choice": {"kind": "layers", "drop": [1, 2]}}}
NARROW = {"width": {"intermediate_size": 24, "choice": {"kind": "random"}}}
CUT = StageNode("prune-cut", "prune", HALF, {"model": "pretrain-teacher"}, 0)
CUT_AGAIN = StageNode("prune-again", "prune", NARROW, {"model": "prune-cut"}, 0)


@pytest.fixture
def chain(tmp_path: Path, artifact: Path) -> Store:
    """A store with a teacher, from which one student is cut and from it another."""
    return with_teacher(Store(tmp_path / "store"), artifact)


def with_teacher(store: Store, artifact: Path) -> Store:
    shutil.copytree(artifact, store.working_folder("pretrain-teacher"))
    store.publish(
        Manifest(
            "pretrain-teacher", "pretrain", "s", {}, {}, 0, {}, 0, 0, 0, 0, 0, 0, 0, 0, files={}
        )
    )
    return store


def run(store: Store, *nodes: StageNode, upstream: Sequence[StageNode] = ()) -> list[StageRecord]:
    def one(node: StageNode) -> StageRecord:
        return run_stage(node, store, "t", "s/p/t", lambda *_: None, Runtime())

    return list(run_stages(nodes, one, store, upstream))


def contents(store: Store, *stage_ids: str) -> dict[str, bytes]:
    """Every file of some artifacts, times and costs apart."""
    return {
        f"{stage_id}/{file.relative_to(store.path(stage_id))}": file.read_bytes()
        for stage_id in stage_ids
        for file in store.path(stage_id).rglob("*")
        if file.is_file() and file.name != "artifact.json"
    }


@pytest.mark.parametrize("damage", [faults.cut_off, faults.flip_bit, Path.unlink])
@pytest.mark.parametrize("name", ["model/model.safetensors", "model/config.json", "artifact.json"])
def test_a_damaged_student_is_cut_again_and_all_ends_as_it_would_have(
    chain: Store, name: str, damage: Callable[[Path], None]
) -> None:
    run(chain, CUT, CUT_AGAIN)
    whole = contents(chain, "prune-cut", "prune-again")
    damage(chain.path("prune-cut") / name)
    damage(chain.path("prune-again") / name)
    records = run(chain, CUT, CUT_AGAIN)
    assert [record.stage_id for record in records] == ["prune-cut", "prune-again"]
    assert contents(chain, "prune-cut", "prune-again") == whole


@pytest.mark.parametrize("damage", [faults.cut_off, faults.flip_bit, Path.unlink])
def test_an_input_that_another_job_made_is_made_again_where_it_is_needed(
    chain: Store, damage: Callable[[Path], None]
) -> None:
    run(chain, CUT)
    whole = contents(chain, "prune-cut")
    damage(chain.path("prune-cut") / "model" / "model.safetensors")
    records = run(chain, CUT_AGAIN, upstream=[CUT, CUT_AGAIN])
    assert [record.stage_id for record in records] == ["prune-cut", "prune-again"]
    assert contents(chain, "prune-cut") == whole


def test_an_input_that_nobody_can_make_again_is_told_by_file_and_costs_nothing_else(
    chain: Store,
) -> None:
    weights = chain.path("pretrain-teacher") / "model" / "model.safetensors"
    faults.flip_bit(weights)
    with pytest.raises(DamagedInputError, match=f"{weights}: it is not what was written"):
        run(chain, CUT)
    assert chain.manifest("prune-cut") is None


DAMAGE: dict[str, tuple[str, Callable[[Path], None]]] = {
    "pretrain": ("model/model.safetensors", faults.flip_bit),
    "cache": ("hidden.npy", faults.flip_bit),
    "prune": ("artifact.json", faults.cut_off),
    "distill": ("model/model.safetensors", faults.cut_off),
    "evaluate": ("items.jsonl", faults.flip_bit),
}


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_sweep_mends_what_was_damaged_and_ends_as_it_would_have(tmp_path: Path) -> None:
    sweep = small_sweep.write(tmp_path / "sweeps", faults.SWEEP, faults.NAME)
    calm = faults.start(sweep, tmp_path / "calm")
    calm.ends(0)
    faults.copy_artifacts(calm.results, tmp_path / "rough")
    store, there = Store(tmp_path / "rough" / "artifacts"), faults.manifests(calm.results)
    for kind, (name, damage) in DAMAGE.items():
        damage(store.path(next(i for i, m in there.items() if m["kind"] == kind)) / name)
    rough = faults.start(sweep, tmp_path / "rough")
    rough.ends(0)
    assert_same_ending(rough, calm)

    # The trial of the winner is done, and its checkpoint damaged: the same command makes it again.
    best = (calm.folder / "best" / "model.safetensors").read_bytes()
    (won,) = (
        file
        for stage_id in there
        if (file := store.path(stage_id) / "model" / "model.safetensors").exists()
        and file.read_bytes() == best
    )
    faults.flip_bit(won)
    again = faults.start(sweep, tmp_path / "rough")
    again.ends(0)
    assert won.read_bytes() == best
    assert_same_ending(again, calm)


def assert_same_ending(run: faults.Run, calm: faults.Run) -> None:
    """The same measurements, tables and winner; who bore the cost of what may differ."""
    ours, theirs = faults.lasting(run.folder), faults.lasting(calm.folder)
    for name in ("trials", "curves", "items", "importance"):
        assert ours[name] == theirs[name], f"{name}.parquet differs"
    best = Path("best") / "model.safetensors"
    assert (run.folder / best).read_bytes() == (calm.folder / best).read_bytes()


# --- file systems that fail ------------------------------------------------------------------


def test_a_full_disk_is_told_leaves_nothing_half_published_and_once_there_is_room_it_goes_on(
    tmp_path: Path, artifact: Path
) -> None:
    with faults.small_disk(tmp_path / "disk", 1) as disk:
        store = with_teacher(Store(disk / "store"), artifact)
        faults.fill(disk)
        with pytest.raises(InfrastructureError, match=r"^No space left on device: .*free 0\.0 GB"):
            run(store, CUT)
        ballast = disk / ".ballast"
        os.truncate(ballast, ballast.stat().st_size - 3 * 4096)  # room to begin, not to end
        with pytest.raises(InfrastructureError, match="No space left on device") as raised:
            run(store, CUT)
        assert is_infrastructure(raised.value)
        assert not store.path("prune-cut").exists()
        assert not list((store.root / ".leases").iterdir())
        ballast.unlink()
        run(store, CUT)
        assert store.found("prune-cut") is not None
        assert contents(store, "prune-cut") == fresh(tmp_path / "calm", artifact)


def test_a_file_system_that_is_lost_for_writing_is_told_and_found_again(
    tmp_path: Path, artifact: Path
) -> None:
    with faults.small_disk(tmp_path / "disk", 4) as disk:
        store = with_teacher(Store(disk / "store"), artifact)
        faults.make_read_only(disk)
        with pytest.raises(InfrastructureError, match=r"^Read-only file system: ") as raised:
            run(store, CUT)
        assert is_infrastructure(raised.value)
        faults.make_writable(disk)
        run(store, CUT)
        assert contents(store, "prune-cut") == fresh(tmp_path / "calm", artifact)


def test_a_file_system_that_is_lost_while_an_artifact_is_published_loses_no_work(
    tmp_path: Path,
) -> None:
    with faults.small_disk(tmp_path / "disk", 1) as disk:
        store = Store(disk / "store")
        with store.lease("prune-1"):
            work = store.working_folder("prune-1")
            work.mkdir(parents=True)
            (work / "rows.jsonl").write_text(RESULT)
            faults.fill(disk)
            described = Manifest(
                "prune-1", "prune", "s", {}, {}, 0, {}, 0, 0, 0, 0, 0, 0, 0, 0, files={}
            )
            with pytest.raises(OSError, match="No space left") as raised:
                store.publish(described)
            assert is_infrastructure(raised.value)
            assert store.manifest("prune-1") is None
            (disk / ".ballast").unlink()
            store.publish(described)
        assert (store.path("prune-1") / "rows.jsonl").read_text() == RESULT
        assert store.found("prune-1") is not None


def fresh(root: Path, artifact: Path) -> dict[str, bytes]:
    """The student as it is cut where nothing happens."""
    store = with_teacher(Store(root), artifact)
    run(store, CUT)
    return contents(store, "prune-cut")


# --- whose failure it is ---------------------------------------------------------------------

INFRASTRUCTURE = [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/x"),
    OSError(errno.EIO, os.strerror(errno.EIO)),
    OSError(errno.EROFS, os.strerror(errno.EROFS)),
    OSError(errno.ESTALE, os.strerror(errno.ESTALE)),
    OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
    ConnectionResetError("gone"),
    TimeoutError(),
    StorageError("s3://bucket: AWS Error"),
    InfrastructureError("told already"),
    # As safetensors and torch.save say it.
    RuntimeError("I/O error: No space left on device (os error 28)"),
    RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    # As gloo and NCCL say that another worker is gone.
    RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4711"),
    RuntimeError("NCCL error: remote process exited or there was a network error"),
    # As it comes back from another process.
    StageError("OSError: [Errno 28] No space left on device: '/x'"),
]
OWN = [
    ValueError("the loss is nan at step 3"),
    StageError("the loss is nan at step 3"),
    FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/x"),
    PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/x"),
    MemoryError(),
    DamagedInputError("model", "it is not what was written"),
]


@pytest.mark.parametrize("error", INFRASTRUCTURE, ids=repr)
def test_what_the_machine_did_is_told_from_what_a_trial_did(error: Exception) -> None:
    assert is_infrastructure(error)
    wrapped = RuntimeError("a stage failed")
    wrapped.__cause__ = error
    assert is_infrastructure(wrapped)


@pytest.mark.parametrize("error", OWN, ids=repr)
def test_what_a_trial_did_itself_is_not_blamed_on_the_machine(error: Exception) -> None:
    assert not is_infrastructure(error)


def test_a_real_failure_to_save_weights_on_a_full_disk_is_known_for_what_it_is(
    tmp_path: Path,
) -> None:
    """Whatever the libraries that write weights make of it, in words of their own."""
    import torch
    from safetensors.torch import save_file

    weights = {"w": torch.zeros(1 << 20)}
    with faults.small_disk(tmp_path / "disk", 1) as disk:
        for save in (
            lambda: save_file(weights, disk / "w.safetensors"),
            lambda: torch.save(weights, disk / "w.pt"),
            lambda: (disk / "w.bin").write_bytes(bytes(1 << 22)),
        ):
            with pytest.raises(Exception) as raised:
                save()
            assert is_infrastructure(raised.value), repr(raised.value)
            assert "free 0.0 GB of 0.0 GB" in explain(raised.value, disk)


def test_a_lost_disk_is_not_taken_for_an_empty_one(tmp_path: Path, artifact: Path) -> None:
    """What cannot be read for a moment is not built again."""
    store = with_teacher(Store(tmp_path / "store"), artifact)
    manifest = store.path("pretrain-teacher") / "artifact.json"
    manifest.unlink()
    manifest.symlink_to("/proc/self/mem")  # reading it at 0 is an I/O error
    with pytest.raises(OSError, match="Input/output error"):
        store.manifest("pretrain-teacher")
