"""Where artifacts are: a folder, or an object store that is reached by URI (s3://, gs://).

An object store has no rename and no lock. An artifact's files are uploaded under a name of their
own, and its manifest, which tells that name, comes last: it is there as a whole, or not. In front
is a folder of each machine, from which stages read and in which they write; nothing in it is
needed by others. Only here and in `records` is pyarrow imported.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from orchestrator.faults import StorageError
from orchestrator.leases import Pace, Silence, this_process
from orchestrator.store import (
    MANIFEST,
    DamagedArtifactError,
    Manifest,
    Store,
    crc32_of,
    first_damaged,
    remove,
    renamed,
)

SETTLE_S = 1.0
"""An object store has no way to make a file only where there is none: whoever writes a lease looks
after this time whether it is still there."""
TOKEN_BYTES = 1024
"""All have one size: pyarrow asks for an object's size and then for so many bytes, and fails where
the object was written anew in between with another size."""
SELDOM = Pace(look_s=1.0)
"""To look costs a request."""

P = ParamSpec("P")
T = TypeVar("T")


def open_store(folder: Path, location: str | None = None) -> Store:
    """The store at a location: the folder itself where there is none, another folder (also as
    file://), or an object store with `folder` in front of it."""
    if location is None:
        return Store(folder)
    scheme, found, rest = location.partition("://")
    if found and scheme != "file":
        return RemoteStore(folder, location)
    return Store(Path(rest if found else location))


class RemoteStore(Store):
    """The artifacts of an object store, with those of this machine in a folder in front of it."""

    def __init__(self, folder: Path, uri: str, pace: Pace = SELDOM) -> None:
        # Another URI is another store: what was uploaded to the one is not in the other.
        place = hashlib.sha256(uri.encode()).hexdigest()[:8]
        super().__init__(folder / f"remote-{place}", pace)
        self.folder, self.uri = folder, uri
        self._remote: Remote = Remote(uri)

    def manifest(self, stage_id: str) -> Manifest | None:
        """See `Store.manifest`. Asks this machine first, then the object store."""
        here = self._here(stage_id) if self._mark(stage_id).exists() else None
        return here or self._remote.manifest(stage_id)[1]

    def fetch(self, stage_id: str) -> Manifest:
        """See `Store.fetch`. Downloads what is not here, or was damaged here."""
        with suppress(DamagedArtifactError):
            return self._kept(stage_id)
        held = stage_id in self._held
        # One process of this machine downloads for all.
        with nullcontext() if held else Store.lease(self, stage_id):
            with suppress(DamagedArtifactError):
                return self._kept(stage_id)
            self._download(stage_id)
        return self._kept(stage_id)

    def found(self, stage_id: str) -> Manifest | None:
        """See `Store.found`. What is not on this machine is not downloaded for that."""
        if self._here(stage_id) is None:
            return self._remote.manifest(stage_id)[1]
        return super().found(stage_id)

    def file(self, stage_id: str, name: str) -> Path:
        """See `Store.file`. Of what is not on this machine, downloads this file alone. Raises
        `DamagedArtifactError`."""
        if self._here(stage_id) is not None:
            return self.path(stage_id) / name
        version, manifest = self._remote.manifest(stage_id)
        if version is None or manifest is None:
            raise DamagedArtifactError(f"{self.uri}: {stage_id} is not there, or was damaged")
        target = self.root / ".files" / stage_id / version / name
        if name in manifest.files and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            beside = target.with_name(f"{target.name}.{uuid.uuid4().hex}.part")
            self._remote.download_file(f"{stage_id}/{version}/{name}", beside)
            if crc32_of(beside) != manifest.crc32.get(name):
                beside.unlink()
                raise DamagedArtifactError(f"{self.uri}: {stage_id}/{name}: CRC-32 differs")
            beside.replace(target)
        return target

    def publish(self, manifest: Manifest) -> Manifest:
        """See `Store.publish`. An upload that fails is made up for by whoever next asks for the
        stage on this machine."""
        self._mark(manifest.stage_id).unlink(missing_ok=True)
        published = super().publish(manifest)
        self._upload(manifest.stage_id)
        return published

    def check_access(self) -> None:
        """See `Store.check_access`."""
        super().check_access()
        probe = f".access-{uuid.uuid4().hex}"
        self._remote.write(probe, "")
        self._remote.delete(probe)

    def discard(self, stage_id: str) -> None:
        """See `Store.discard`. What is here is only a copy."""
        with self.lease(stage_id):
            version = self._remote.manifest(stage_id)[0]
            if self._seen.get(stage_id, version) == version:
                self._remote.drop(stage_id)
            self._mark(stage_id).unlink(missing_ok=True)
            remove(self.path(stage_id))

    @contextmanager
    def lease(self, stage_id: str) -> Iterator[None]:
        """See `Store.lease`: among the processes of this machine, and, as well as an object store
        can, among machines. Where two of them come to hold it, both build, and one's stays."""
        with _TokenLease(self._remote, stage_id, self._pace).waiting(), super().lease(stage_id):
            if self._here(stage_id) is not None and not self._mark(stage_id).exists():
                self._upload(stage_id)
            yield

    def _upload(self, stage_id: str) -> None:
        try:
            manifest = self._sound(stage_id)
        except DamagedArtifactError:
            remove(self.path(stage_id))
            return
        version = self._remote.upload(stage_id, self.path(stage_id), manifest)
        self._set_mark(stage_id, version)

    def _download(self, stage_id: str) -> None:
        version, manifest = self._remote.manifest(stage_id)
        if version is None or manifest is None:
            raise DamagedArtifactError(f"{self.uri}: {stage_id} is not there, or was damaged")
        beside = self.root / ".incoming" / f"{stage_id}-{uuid.uuid4().hex}"
        beside.mkdir(parents=True)
        try:
            self._remote.download(f"{stage_id}/{version}", beside)
            if (damaged := first_damaged(beside, manifest)) is not None:
                name = damaged.relative_to(beside)
                raise DamagedArtifactError(f"{self.uri}: {stage_id}/{name}: CRC-32 differs")
            (beside / MANIFEST).write_text(manifest.text())
            while not renamed(beside, self.path(stage_id)):
                remove(self.path(stage_id))
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        self._set_mark(stage_id, version)

    def _kept(self, stage_id: str) -> Manifest:
        """See `Store.fetch`: of an artifact that is here, and in the object store, too."""
        try:
            self._seen[stage_id] = self._mark(stage_id).read_text()
        except FileNotFoundError:
            raise DamagedArtifactError(f"{self.path(stage_id)}: not uploaded") from None
        return self._sound(stage_id)

    def _mark(self, stage_id: str) -> Path:
        """Says under which name the object store has the files of the artifact that is here."""
        return self.root / ".uploaded" / stage_id

    def _set_mark(self, stage_id: str, version: str) -> None:
        self._mark(stage_id).parent.mkdir(parents=True, exist_ok=True)
        self._mark(stage_id).write_text(version)


def _told(call: Callable[P, T]) -> Callable[P, T]:
    """Whatever pyarrow makes of a failing object store, as one kind of error."""

    def told(*args: P.args, **named: P.kwargs) -> T:
        try:
            return call(*args, **named)
        except FileNotFoundError:
            raise
        except OSError as error:
            first = next(iter(str(error).splitlines()), "")
            raise StorageError(f"{getattr(args[0], 'uri', '')}: {first}") from error

    return told


class Remote:
    """The files of an object store below a URI; each call is as it comes from there."""

    @_told
    def __init__(self, uri: str) -> None:
        from pyarrow import fs

        self.uri = uri.partition("?")[0]
        self._files, self._base = fs.FileSystem.from_uri(uri)
        self._here = fs.LocalFileSystem()
        self._copy = fs.copy_files

    def manifest(self, stage_id: str) -> tuple[str | None, Manifest | None]:
        """Under which name an artifact's files are, and its manifest; None where it is not there,
        or its manifest was damaged."""
        try:
            described = json.loads(self.read(f"{stage_id}/{MANIFEST}") or "null")
            return str(described["files"]), Manifest.of(json.dumps(described["manifest"]))
        except (ValueError, TypeError, KeyError):
            return None, None

    @_told
    def upload(self, stage_id: str, folder: Path, manifest: Manifest) -> str:
        """Every file, and then the manifest; gives the name under which the files are."""
        version = uuid.uuid4().hex
        target = self._path(f"{stage_id}/{version}")
        self._files.create_dir(target)
        self._copy(
            str(folder), target, source_filesystem=self._here, destination_filesystem=self._files
        )
        described = {"files": version, "manifest": json.loads(manifest.text())}
        self.write(f"{stage_id}/{MANIFEST}", json.dumps(described, indent=1))
        return version

    @_told
    def download(self, name: str, folder: Path) -> None:
        """Every file below a name."""
        self._copy(
            self._path(name),
            str(folder),
            source_filesystem=self._files,
            destination_filesystem=self._here,
        )

    @_told
    def download_file(self, name: str, target: Path) -> None:
        """One file."""
        with self._files.open_input_stream(self._path(name)) as stream, target.open("wb") as out:
            shutil.copyfileobj(stream, out, 1 << 20)

    @_told
    def drop(self, stage_id: str) -> None:
        """The manifest, and then every file."""
        self.delete(f"{stage_id}/{MANIFEST}")
        with suppress(FileNotFoundError):
            self._files.delete_dir(self._path(stage_id))

    @_told
    def read(self, name: str) -> str | None:
        """A text; None where there is none."""
        try:
            with self._files.open_input_stream(self._path(name)) as stream:
                return bytes(stream.read()).decode()
        except OSError:
            # Opening only asks whether it is there: it may be gone before it is read, and what
            # pyarrow then says is not always that.
            if self._files.get_file_info(self._path(name)).is_file:
                raise
            return None

    @_told
    def write(self, name: str, text: str) -> None:
        """A text, whole or not at all."""
        path = self._path(name)
        self._files.create_dir(path.rpartition("/")[0])
        with self._files.open_output_stream(path) as stream:
            stream.write(text.encode())

    @_told
    def delete(self, name: str) -> None:
        """A text, if it is there."""
        with suppress(FileNotFoundError):
            self._files.delete_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._base}/{name}"


class _TokenLease:
    """A lease as an object: written, and after a while read back. Best effort; see `orchestrator.
    leases` for what a file system makes possible."""

    def __init__(self, remote: Remote, stage_id: str, pace: Pace) -> None:
        self._remote, self._name, self._pace = remote, f".leases/{stage_id}", pace
        self._holder = this_process()
        self._beats = 0
        self._released = threading.Event()
        self._writing = threading.Lock()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Hold the lease, waiting for it as long as its holder's heart beats."""
        silence = Silence()
        while not self._acquire(silence):
            time.sleep(self._pace.look_s)
        threading.Thread(target=self._beat, daemon=True).start()
        try:
            yield
        finally:
            self._released.set()
            with suppress(OSError), self._writing:  # or a last heartbeat would bring it back
                if self._is_mine():
                    self._remote.delete(self._name)

    def _acquire(self, silence: Silence) -> bool:
        text = self._remote.read(self._name)
        if text is not None:
            holder, beats = _token(text)
            silence.look(holder, (beats,))
            if silence.lives is not False and silence.seconds <= self._pace.expires_s:
                return False
        self._write()
        time.sleep(SETTLE_S)
        return self._is_mine()

    def _write(self) -> None:
        text = json.dumps({"holder": self._holder, "beats": self._beats})
        self._remote.write(self._name, text.ljust(TOKEN_BYTES))

    def _is_mine(self) -> bool:
        text = self._remote.read(self._name)
        return text is not None and _token(text)[0] == json.dumps(self._holder)

    def _beat(self) -> None:
        while not self._released.wait(self._pace.heartbeat_s):
            with suppress(OSError), self._writing:  # the storage may answer again
                if not self._is_mine() or self._released.is_set():
                    return
                self._beats += 1
                self._write()


def _token(text: str) -> tuple[str, Any]:
    try:
        token = json.loads(text)
        return json.dumps(token["holder"]), token["beats"]
    except (ValueError, TypeError, KeyError):
        return text, 0
