"""Artifacts that several machines share: one suite for a folder, and for object stores behind
folders of each machine. S3 is spoken to a server on this machine."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
import small_sweep
from asks_for_a_stage import PACE, RESULT
from fault_tools import cut_off, flip_bit
from moto.server import ThreadedMotoServer
from pyarrow import fs
from test_store import FILES, build, manifest
from test_store_faults import CUT, CUT_AGAIN, contents, run, with_teacher

from orchestrator import storage
from orchestrator.faults import StorageError, is_infrastructure
from orchestrator.spec import SpecError, load
from orchestrator.storage import RemoteStore, open_store
from orchestrator.store import DamagedArtifactError, Store

KEYS = "secret-of-the-object-store"


@dataclass
class S3:
    """A server of S3's protocol, whose contents outlive its stops."""

    server: ThreadedMotoServer
    port: int

    @property
    def endpoint(self) -> str:
        return f"endpoint_override=127.0.0.1:{self.port}&scheme=http&region=us-east-1"

    def stop(self) -> None:
        self.server.stop()

    def start(self) -> None:
        self.server = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self.server.start()


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", KEYS)
        patch.setenv("AWS_SECRET_ACCESS_KEY", KEYS)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        running = S3(server, server.get_host_and_port()[1])
        yield running
        running.stop()


@pytest.fixture
def bucket(s3: S3, request: pytest.FixtureRequest) -> str:
    """The URI of a place in a bucket of its own."""
    name = f"bucket-{abs(hash(request.node.nodeid))}"
    files = fs.S3FileSystem(
        endpoint_override=f"127.0.0.1:{s3.port}", scheme="http", allow_bucket_creation=True
    )
    files.create_dir(name)
    return f"s3://{name}/shared/artifacts?{s3.endpoint}"


Node = Callable[[str], Store]
"""The store as a machine of that name sees it."""


@pytest.fixture(params=["folder", "files behind a folder", "s3"])
def node(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    monkeypatch.setattr(storage, "SETTLE_S", 0.05)
    if request.param == "folder":
        return lambda name: open_store(tmp_path / name, str(tmp_path / "shared"))
    shared = f"file://{tmp_path}/shared"
    uri = request.getfixturevalue("bucket") if request.param == "s3" else shared
    return lambda name: RemoteStore(tmp_path / name, uri, PACE)


@pytest.fixture(params=["files behind a folder", "s3"])
def remote(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], RemoteStore]:
    monkeypatch.setattr(storage, "SETTLE_S", 0.05)
    shared = f"file://{tmp_path}/shared"
    uri = request.getfixturevalue("bucket") if request.param == "s3" else shared
    return lambda name: RemoteStore(tmp_path / name, uri, PACE)


# --- what is true of every store ---------------------------------------------------------------


def test_what_one_machine_built_another_finds_byte_by_byte(node: Node) -> None:
    one, other = node("one"), node("other")
    assert other.manifest("prune-1") is None and other.found("prune-1") is None
    build(one)
    for find in (other.manifest, other.found, other.fetch):
        found = find("prune-1")
        assert found is not None and found == one.manifest("prune-1")
    for name in FILES:
        file = other.path("prune-1") / name
        assert file.read_bytes() == (one.path("prune-1") / name).read_bytes()
    assert node("a third").file("prune-1", "rows.jsonl").read_text().startswith('{"name"')


def test_what_was_discarded_is_gone_for_all_and_can_be_built_again(node: Node) -> None:
    one, other = node("one"), node("other")
    build(one)
    other.fetch("prune-1")
    other.discard("prune-1")
    assert node("a third").found("prune-1") is None
    build(other, requested_by="the other")
    found = node("a third").found("prune-1")
    assert found is not None and found.requested_by == "the other"


def test_stages_run_where_their_inputs_were_not_made(node: Node, artifact: Path) -> None:
    one, other = node("one"), node("other")
    with_teacher(one, artifact)
    run(one, CUT)
    run(other, CUT_AGAIN)
    (record,) = run(one, CUT_AGAIN)
    assert record.stage_id == "prune-again"
    one.fetch("prune-again")
    assert contents(one, "prune-again") == contents(other, "prune-again")


def test_access_is_checked_without_leaving_a_trace(node: Node, tmp_path: Path) -> None:
    node("one").check_access()
    node("one").check_access()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# --- an object store behind folders ------------------------------------------------------------

Remotes = Callable[[str], RemoteStore]


def test_nothing_is_downloaded_before_it_is_needed(remote: Remotes) -> None:
    build(remote("one"))
    other = remote("other")
    assert other.found("prune-1") is not None
    other.file("prune-1", "rows.jsonl")
    assert not other.path("prune-1").exists()
    other.fetch("prune-1")
    assert other.path("prune-1").exists()


@pytest.mark.parametrize("damage", [cut_off, flip_bit, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_copy_is_downloaded_again(
    remote: Remotes, name: str, damage: Callable[[Path], None]
) -> None:
    one, other = remote("one"), remote("other")
    build(one)
    other.fetch("prune-1")
    damage(other.path("prune-1") / name)
    other.fetch("prune-1")
    whole, again = one.path("prune-1") / name, other.path("prune-1") / name
    assert whole.read_bytes() == again.read_bytes()


def test_what_is_damaged_in_the_object_store_is_never_used_and_is_built_again(
    remote: Remotes, artifact: Path
) -> None:
    one, other = remote("one"), remote("other")
    with_teacher(one, artifact)
    run(one, CUT)
    whole = contents(one, "prune-cut")
    version = one._remote.manifest("prune-cut")[0]
    one._remote.write(f"prune-cut/{version}/model/model.safetensors", "not what was written")
    with pytest.raises(DamagedArtifactError, match=r"prune-cut/model/model\.safetensors: CRC-32"):
        other.fetch("prune-cut")
    assert not other.path("prune-cut").exists()
    records = run(other, CUT_AGAIN, upstream=[CUT])
    assert [record.stage_id for record in records] == ["prune-cut", "prune-again"]
    assert contents(other, "prune-cut") == whole
    assert remote("a third").fetch("prune-cut").stage_id == "prune-cut"


def test_an_artifact_without_its_manifest_is_not_there(remote: Remotes) -> None:
    one = remote("one")
    build(one)
    one._remote.delete("prune-1/artifact.json")
    other = remote("other")
    assert other.manifest("prune-1") is None
    build(other)
    assert remote("a third").fetch("prune-1") == other.manifest("prune-1")


def test_an_object_store_that_cannot_be_reached_is_told_and_later_given_what_was_built(
    s3: S3, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "SETTLE_S", 0.05)
    one, other = (RemoteStore(tmp_path / name, bucket, PACE) for name in ("one", "other"))
    s3.stop()
    try:
        with pytest.raises(StorageError, match="s3://") as raised:
            build(one)
        assert is_infrastructure(raised.value)
        assert KEYS not in str(raised.value)
    finally:
        s3.start()
    assert other.found("prune-1") is None
    with one.lease("prune-1"):  # as whoever asks for it again takes it
        assert one.found("prune-1") is not None
    assert other.fetch("prune-1").metrics == manifest().metrics


def test_what_is_deleted_between_a_look_and_a_read_is_not_there(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = storage.Remote(bucket)
    remote.write("lease", "held")

    class Opened:
        """The real file system, in which the file is deleted as soon as it has been opened."""

        def __init__(self, files: Any) -> None:
            self._files = files

        def __getattr__(self, name: str) -> Any:
            return getattr(self._files, name)

        def open_input_stream(self, path: str) -> Any:
            stream = self._files.open_input_stream(path)
            self._files.delete_file(path)
            return stream

    monkeypatch.setattr(remote, "_files", Opened(remote._files))
    assert remote.read("lease") is None


def test_processes_of_several_machines_build_once_and_follow_one_that_is_killed(
    s3: S3, bucket: str, tmp_path: Path
) -> None:
    asks, log = Path(__file__).with_name("asks_for_a_stage.py"), tmp_path / "log"

    def ask(name: str, steps: int) -> subprocess.Popen[str]:
        arguments = [str(asks), str(tmp_path / name), str(log), name, str(steps), bucket]
        return subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True)

    killed = ask("killed", 1000)
    deadline = time.monotonic() + 60
    while not (log.exists() and "begins" in log.read_text()):
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    others = [ask(f"machine{number}", 4) for number in range(3)]
    killed.kill()
    killed.wait()
    said = sorted(other.communicate(timeout=60)[0].strip() for other in others)
    assert said == ["built", "found", "found"]
    assert log.read_text().count("begins") == 2
    store = RemoteStore(tmp_path / "last", bucket)
    store.fetch("prune-1")
    assert (store.path("prune-1") / "rows.jsonl").read_text() == RESULT


# --- in a sweep ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_on_s3_leaves_nothing_to_do_for_another_machine(
    bucket: str, tmp_path: Path
) -> None:
    sweep = small_sweep.write(tmp_path / "sweeps")
    at = ("--set", f"artifacts={bucket}")
    first = small_sweep.run(sweep, tmp_path / "one", *at)
    assert first.returncode == 0, first.stdout + first.stderr
    second = small_sweep.run(sweep, tmp_path / "two", *at)
    assert second.returncode == 0, second.stdout + second.stderr
    one, two = (tmp_path / name / "small" / "micro" for name in ("one", "two"))
    # Whoever asked for a stage first bears its cost, here as there: what it cost then.
    for name in ("stages", "trials"):
        first_rows, rows = (parquet.read_table(each / f"{name}.parquet") for each in (one, two))
        kept = [column for column in rows.column_names if column != "mlflow_run_id"]
        assert rows.select(kept).to_pylist() == first_rows.select(kept).to_pylist()
    weights = "best/model.safetensors"
    assert (one / weights).read_bytes() == (two / weights).read_bytes()


REFUSED = {
    "ftp://host/x": "is no place for artifacts",
    "s3://": "is no place for artifacts",
    "s3://key:secret@bucket/x": "must hold no credentials",
}


@pytest.mark.parametrize("place", REFUSED)
def test_a_place_that_cannot_be_is_refused_in_one_line(tmp_path: Path, place: str) -> None:
    sweep = small_sweep.write(tmp_path / "sweeps")
    with pytest.raises(SpecError, match=REFUSED[place]) as raised:
        load(sweep, overrides=[f"artifacts={place}"])
    assert len(raised.value.messages) == 1
    assert "secret" not in str(raised.value).replace(f"--set artifacts={place}", "")


def test_a_folder_of_artifacts_starts_at_the_profile_that_names_it(tmp_path: Path) -> None:
    sweep = small_sweep.write(tmp_path / "sweeps")
    profile = next((tmp_path / "sweeps" / "profiles").glob("*.yaml"))
    profile.write_text(profile.read_text() + "\nartifacts: ../../for-all\n")
    loaded = load(sweep)
    assert loaded.artifacts == str(tmp_path / "for-all")
    assert "for-all" not in loaded.dump_yaml()
    assert loaded.base == load(sweep, overrides=["artifacts=/elsewhere"]).base
