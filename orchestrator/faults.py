"""Which failures are the machine's and not the trial's own: they alone are worth another try."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from trainers.contract import StageError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
LOST = frozenset({errno.EIO, errno.EROFS, errno.ESTALE, errno.ENOTCONN, errno.EREMOTEIO})
UNREACHABLE = frozenset(
    {
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ETIMEDOUT,
    }
)
EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOLCK})

# safetensors and Ray Train tell of a full disk in words alone, torch.save not even in these.
_IN_WORDS = {os.strerror(number): number for number in sorted(FULL | LOST)}
_PEER_LOST = re.compile(
    r"Connection (closed|reset) by peer|remote process exited or there was a network error"
)
"""How gloo and NCCL say that another worker of the trial cannot be reached any more."""
_TORCH_CANNOT_WRITE = re.compile(r"PytorchStreamWriter failed|inline_container\.cc.*unexpected pos")


class InfrastructureError(StageError):
    """A stage could not be run for a reason that lies in the machine: it may pass."""


class StorageError(OSError):
    """Storage that is reached over the network did not do what it was asked."""


def is_infrastructure(error: BaseException) -> bool:
    """Whether a failure, or one that led to it, is the machine's: a disk that is full or read-only,
    a file system, a server or another worker that is lost, no more open files."""
    return any(_is_machines(each) for each in _chain(error))


def explain(error: BaseException, near: Path) -> str:
    """What happened to which file, as one line: `No space left on device: /data/x, free 0.0 GB of
    2.0 GB`. A failure that names no file was `near` a path."""
    told = next((each for each in _chain(error) if _is_machines(each)), error)
    number, place = _errno(told), Path(getattr(told, "filename", None) or near)
    if number is None and not _TORCH_CANNOT_WRITE.search(str(told)):
        return next(iter(str(told).strip().splitlines()), type(told).__name__)
    what = os.strerror(number) if number else "a file could not be written"
    return f"{what}: {place}{_room(place) if number is None or number in FULL else ''}"


def _is_machines(error: BaseException) -> bool:
    if isinstance(error, InfrastructureError | StorageError | ConnectionError | TimeoutError):
        return True
    if _errno(error) in FULL | LOST | UNREACHABLE | EXHAUSTED:
        return True
    return bool(_TORCH_CANNOT_WRITE.search(str(error)) or _PEER_LOST.search(str(error)))


def _errno(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    text = str(error)
    return next((number for words, number in _IN_WORDS.items() if words in text), None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what led to it, the last first."""
    seen = set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        hidden = error.__suppress_context__
        error = error.__cause__ or (None if hidden else error.__context__)


def _room(path: Path) -> str:
    there = next((folder for folder in (path, *path.parents) if folder.exists()), None)
    if there is None:
        return ""
    disk = shutil.disk_usage(there)
    return f", free {disk.free / 1e9:.1f} GB of {disk.total / 1e9:.1f} GB"
