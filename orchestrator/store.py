"""Artifacts on disk: a folder for each stage id, whole or not there.

A stage writes into a working folder that outlives a kill, so that it can go on; the manifest is
written last and the folder is then moved to its final name in one step. Whoever works on a stage
holds its lease. The manifest has a checksum of every file and of itself: what was damaged since is
noticed before anything is made from it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from orchestrator.faults import is_infrastructure
from orchestrator.leases import Lease, Pace, generation_path, generations

MANIFEST = "artifact.json"
LEFTOVERS = "*.part"
"""What is written beside a file before it takes the file's name; a kill can leave it."""
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST)

_read_before: dict[str, tuple[int, ...]] = {}
"""Files whose checksum this process has compared, as they were then."""


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
    crc32: Mapping[str, int] = field(default_factory=dict)
    """CRC-32 of every file; empty in manifests written before there were any."""

    def text(self) -> str:
        """The manifest as it stands in its file."""
        values = asdict(self)
        return json.dumps(values | {"checksum": _checksum(values)}, indent=1)

    @staticmethod
    def of(text: str) -> Manifest:
        """What a text says. Raises `ValueError` or `TypeError` where the text was damaged."""
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("not a manifest")
        checksum = values.pop("checksum", None)
        if checksum is not None and checksum != _checksum(values):
            raise ValueError("the manifest's checksum differs")
        return Manifest(**values)


class DamagedArtifactError(Exception):
    """An artifact is not there as it was written. The text says what is wrong with it."""


class Store:
    """The artifacts under one folder, of this machine or shared by several."""

    def __init__(self, root: Path, pace: Pace = Pace()) -> None:  # noqa: B008 (frozen)
        self.root, self._pace = root, pace
        self.folder = root
        """What the store is opened with; `uri` says where artifacts are if not there alone."""
        self.uri: str | None = None
        self._held: dict[str, int] = {}
        self._seen: dict[str, object] = {}

    def path(self, stage_id: str) -> Path:
        """Where the finished artifact stands."""
        return self.root / stage_id

    def working_folder(self, stage_id: str) -> Path:
        """Where the stage writes until it is done; kept over a kill. The folder is the holder's
        own: one that is taken over from, and wakes, writes on into another than its follower."""
        work = self._work(stage_id)
        newest = max(generations(work), default=0)
        return generation_path(work, self._held.get(stage_id, newest))

    def manifest(self, stage_id: str) -> Manifest | None:
        """The manifest of a finished artifact whose files have their sizes; None where there is
        none. Quick: it reads no file but the manifest."""
        return self._here(stage_id)

    def fetch(self, stage_id: str) -> Manifest:
        """The manifest of an artifact that is on this machine with every byte as it was written;
        this process reads a file for that only once. Raises `DamagedArtifactError`."""
        self._seen[stage_id] = self._version(stage_id)
        return self._sound(stage_id)

    def found(self, stage_id: str) -> Manifest | None:
        """The manifest of an artifact that need not be built; None where it is not there, or was
        damaged."""
        try:
            return self.fetch(stage_id)
        except DamagedArtifactError:
            return None

    def file(self, stage_id: str, name: str) -> Path:
        """One file of a finished artifact, on this machine."""
        return self.path(stage_id) / name

    def publish(self, manifest: Manifest) -> Manifest:
        """Turn the working folder into the finished artifact: manifest last, then one rename.

        Gives the manifest that is in place: another's, where another that took this stage over has
        published it meanwhile. Both artifacts have the same id, so either serves.
        """
        stage_id = manifest.stage_id
        working, final = self.working_folder(stage_id), self.path(stage_id)
        for leftover in working.rglob(LEFTOVERS):
            leftover.unlink()
        described = replace(manifest, files=_sizes(working), crc32=_checksums(working))
        _write_whole(working / MANIFEST, described.text())
        while not renamed(working, final):
            try:
                described = self._sound(stage_id)
                break
            except DamagedArtifactError:  # or it would not have been built again
                remove(final)
        self._forget_work(stage_id)
        return described

    def check_access(self) -> None:
        """Write something and remove it. Raises `OSError` where that cannot be done."""
        self.root.mkdir(parents=True, exist_ok=True)
        probe = self.root / f".access-{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()

    def discard(self, stage_id: str) -> None:
        """Forget an artifact that turned out to be damaged, so that it is built again; but not one
        that another has built since `fetch` last gave it. Whoever has its files open keeps them."""
        with self.lease(stage_id):
            version = self._version(stage_id)
            if self._seen.get(stage_id, version) == version:
                remove(self.path(stage_id))

    @contextmanager
    def lease(self, stage_id: str) -> Iterator[None]:
        """Hold the only right to work on a stage; waits while a living holder has it."""
        work = self._work(stage_id)
        file = self.root / ".leases" / stage_id
        lease = Lease(file, self._pace, first=lambda: max(generations(work), default=0))
        with lease.waiting():
            self._held[stage_id] = lease.generation
            try:
                _take_over(work, lease)
                yield
            finally:
                self._held.pop(stage_id, None)

    def _work(self, stage_id: str) -> Path:
        return self.root / ".working" / stage_id

    def _here(self, stage_id: str) -> Manifest | None:
        folder = self.path(stage_id)
        try:
            manifest = Manifest.of((folder / MANIFEST).read_text())
        except OSError as error:
            if is_infrastructure(error):  # else all would be built again while the storage is lost
                raise
            return None
        except (ValueError, TypeError):
            return None
        return manifest if _sizes(folder) == dict(manifest.files) else None

    def _sound(self, stage_id: str) -> Manifest:
        """See `fetch`."""
        manifest = self._here(stage_id)
        if manifest is None:
            raise DamagedArtifactError(f"{self.path(stage_id)}: not there, or not whole")
        damaged = first_damaged(self.path(stage_id), manifest)
        if damaged is not None:
            raise DamagedArtifactError(f"{damaged}: it is not what was written (CRC-32 differs)")
        return manifest

    def _version(self, stage_id: str) -> object:
        """Tells one artifact from another that takes its place."""
        try:
            stat = (self.path(stage_id) / MANIFEST).stat()
        except FileNotFoundError:
            return None
        return stat.st_ino, stat.st_mtime_ns

    def _forget_work(self, stage_id: str) -> None:
        work = self._work(stage_id)
        for generation in generations(work):
            shutil.rmtree(generation_path(work, generation), ignore_errors=True)


def _take_over(work: Path, lease: Lease) -> None:
    """Give the holder of a lease a working folder of its own, with what the one before had done.

    A copy where that one may be at work still; only where it is known to be dead the folder itself.
    """
    mine = generation_path(work, lease.generation)
    earlier = [each for each in generations(work) if each < lease.generation]
    if not earlier or mine.exists():
        return
    before = generation_path(work, earlier[-1])
    if not lease.follows_living:
        before.rename(mine)
        return
    beside = work.with_name(f".{mine.name}-{uuid.uuid4().hex}")
    try:
        shutil.copytree(before, beside, symlinks=True)
        beside.rename(mine)
    except (OSError, shutil.Error) as error:
        shutil.rmtree(beside, ignore_errors=True)
        if is_infrastructure(error):
            raise
        # Files went away while they were copied: somebody is at work there. Begin anew.


def first_damaged(folder: Path, manifest: Manifest) -> Path | None:
    """The first file that is not what the manifest says, byte by byte; None where all are."""
    return next(
        (folder / name for name, crc32 in manifest.crc32.items() if not _is(folder / name, crc32)),
        None,
    )


def _is(file: Path, crc32: int) -> bool:
    try:
        stat = file.stat()
    except FileNotFoundError:
        return False
    sign = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, crc32)
    if _read_before.get(str(file)) == sign:
        return True
    if crc32_of(file) != crc32:
        return False
    _read_before[str(file)] = sign
    return True


def crc32_of(file: Path) -> int:
    """CRC-32 of a file."""
    crc = 0
    with file.open("rb") as stream:
        while part := stream.read(1 << 20):
            crc = zlib.crc32(part, crc)
    return crc


def _checksum(values: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(values).encode())


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file != folder / MANIFEST:
            yield str(file.relative_to(folder)), file


def _sizes(folder: Path) -> dict[str, int]:
    return {name: file.stat().st_size for name, file in _files(folder)}


def _checksums(folder: Path) -> dict[str, int]:
    return {name: crc32_of(file) for name, file in _files(folder)}


def renamed(folder: Path, final: Path) -> bool:
    """Whether the folder could take its final name; False where that is taken."""
    try:
        folder.rename(final)
    except OSError as error:
        if error.errno not in _TAKEN:
            raise
        return False
    return True


def remove(folder: Path) -> None:
    """Out of the way in one step, then gone."""
    aside = folder.with_name(f".{folder.name}.damaged-{uuid.uuid4().hex}")
    with suppress(FileNotFoundError):  # another may have done so at the same moment
        folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _write_whole(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".part")
    with beside.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(path)
