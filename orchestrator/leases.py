"""Who works on what: a lease is a small file that its holder keeps fresh by a heartbeat.

No two clocks are compared. A waiter looks at the heartbeat again and again, and counts by its own
monotonic clock for how long it has not changed; a clock that is set back, or that differs between
machines, makes no difference. A holder that is seen to be dead is followed at once.

Whoever follows leaves the holder's file and makes that of the next generation (`name`, `name~1`,
`name~2`, …); the highest generation holds. So nobody can take the file of another for his own, and
a holder that was only stopped, and wakes, works on under a generation that is nobody else's.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil

LONGEST_LOOK_S = 1.0
"""A waiter that was itself stopped between two looks has waited for no more than this."""


@dataclass(frozen=True)
class Pace:
    """Seconds between two heartbeats, from the last one until its holder counts as gone, and
    between two looks of a waiter."""

    heartbeat_s: float = 5.0
    expires_s: float = 60.0
    look_s: float = 0.2


class LeaseHeldError(Exception):
    """Another living process holds the lease."""


class Lease:
    """The right to work on something, which one process has at a time.

    `first` gives the generation to begin with where there is no holder. `on_lost` is called, from
    another thread, once another has taken the lease over.
    """

    def __init__(
        self,
        path: Path,
        pace: Pace = Pace(),
        first: Callable[[], int] = lambda: 0,
        on_lost: Callable[[], None] | None = None,
    ) -> None:
        self._path, self._pace, self._first, self._on_lost = path, pace, first, on_lost
        self._released = threading.Event()
        self._text = ""
        self.generation = -1
        self.follows_living = False
        """Whether the holder before may be at work still: its heartbeat stopped, but nobody saw
        that it is dead."""

    @contextmanager
    def waiting(self) -> Iterator[Lease]:
        """Hold the lease, waiting for it as long as its holder's heart beats."""
        silence = Silence()
        while not self._acquire(silence):
            time.sleep(self._pace.look_s)
        try:
            yield self
        finally:
            self._release()

    @contextmanager
    def at_once(self) -> Iterator[Lease]:
        """Hold the lease, or raise `LeaseHeldError`. A holder on this machine that lives keeps it,
        also one that is stopped; any other is watched until its heart beats or it has expired."""
        silence = Silence()
        while not self._acquire(silence, only_if_dead=True):
            if silence.lives or silence.beats:
                raise LeaseHeldError(silence.holder)
            time.sleep(self._pace.look_s)
        try:
            yield self
        finally:
            self._release()

    def _acquire(self, silence: Silence, only_if_dead: bool = False) -> bool:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        held = generations(self._path)
        if held and not self._gone(held[-1], silence, only_if_dead):
            return False
        generation = held[-1] + 1 if held else self._first()
        if not self._create(generation):
            return False
        if generations(self._path)[-1] > generation:  # another was faster, by two generations
            generation_path(self._path, generation).unlink(missing_ok=True)
            return False
        self.generation, self.follows_living = generation, bool(held) and silence.lives is not False
        for older in held:
            generation_path(self._path, older).unlink(missing_ok=True)
        self._released.clear()
        threading.Thread(target=self._beat, daemon=True).start()
        return True

    def _gone(self, generation: int, silence: Silence, only_if_dead: bool) -> bool:
        """Whether the holder of a generation may be followed."""
        file = generation_path(self._path, generation)
        try:
            # Opening makes a network file system ask its server; looking at the name may not.
            with file.open() as stream:
                text, stat = stream.read(), os.fstat(stream.fileno())
        except FileNotFoundError:
            return False
        silence.look(text, (generation, stat.st_ino, stat.st_mtime_ns))
        if silence.lives and only_if_dead:
            return False
        return silence.lives is False or silence.seconds > self._pace.expires_s

    def _create(self, generation: int) -> bool:
        file = generation_path(self._path, generation)
        self._text = json.dumps(this_process())
        try:
            handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            with os.fdopen(handle, "w") as stream:
                stream.write(self._text)
        except OSError:
            with suppress(OSError):
                file.unlink()
            raise
        return True

    def _release(self) -> None:
        self._released.set()
        # Where the storage is lost the file stays, and expires.
        with suppress(OSError):
            if self._is_mine():
                generation_path(self._path, self.generation).unlink()

    def _is_mine(self) -> bool:
        return generation_path(self._path, self.generation).read_text() == self._text

    def _beat(self) -> None:
        while not self._released.wait(self._pace.heartbeat_s):
            try:
                if self._is_mine():
                    os.utime(generation_path(self._path, self.generation))
                    continue
            except FileNotFoundError:
                pass
            except OSError:  # the storage does not answer; it may again
                continue
            if self._on_lost is not None and not self._released.is_set():
                self._on_lost()
            return


class Silence:
    """How long a holder has given no sign of life, as one waiter has seen it."""

    def __init__(self) -> None:
        self._last: tuple[Any, ...] | None = None
        self._looked_at = 0.0
        self.seconds = 0.0
        self.beats = False
        """Whether the heart has been seen to beat since the first look."""
        self.lives: bool | None = None
        """Whether the holder's process lives, where that can be known."""
        self.holder = "unknown"

    def look(self, text: str, beat: tuple[Any, ...]) -> None:
        """Take in what a lease says now: its text, and what every heartbeat changes."""
        now, sign = time.monotonic(), (text, *beat)
        if sign == self._last:
            self.seconds += min(now - self._looked_at, LONGEST_LOOK_S)
        else:
            same_holder = self._last is not None and self._last[0] == text
            self.seconds, self.beats = 0.0, same_holder
        self._last, self._looked_at = sign, now
        self.lives, self.holder = _standing(text)


def generation_path(path: Path, generation: int) -> Path:
    """`name` for generation 0, `name~1`, `name~2`, … for those after it."""
    return path.with_name(f"{path.name}~{generation}") if generation else path


def generations(path: Path) -> list[int]:
    """The generations of `path` that are there, in rising order."""
    start = f"{path.name}~"
    names = [each.name for each in path.parent.iterdir()] if path.parent.exists() else []
    later = [name.removeprefix(start) for name in names if name.startswith(start)]
    return [0] * (path.name in names) + sorted(int(each) for each in later if each.isdecimal())


# --- processes -------------------------------------------------------------------------------


def this_process() -> dict[str, Any]:
    """What a lease says of its holder."""
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "token": uuid.uuid4().hex,
    }


def _standing(text: str) -> tuple[bool | None, str]:
    """Whether the holder that a lease names lives (None where that cannot be known), and who it
    is. A text that cannot be read is being written, or was by a process that was killed."""
    try:
        holder = json.loads(text)
        who = f"process {holder['pid']} on {holder['host']}"
        if holder["machine"] != _machine():
            return None, who
        return _started(holder["pid"]) == holder["started"], who
    except (ValueError, KeyError, TypeError):
        return None, "unknown"


@cache
def _machine() -> str:
    """Where a process number means what it means here: this boot of this machine, and in it this
    container, by its namespace of processes. Two containers may have one host name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:  # not Linux
        return socket.gethostname()


def _started(pid: int) -> str | None:
    """When a process was started; None where none lives. In ticks since the boot, which a change of
    the clock leaves alone; psutil's time of creation moves with the clock."""
    if not Path("/proc/self/stat").exists():
        return str(psutil.Process(pid).create_time()) if psutil.pid_exists(pid) else None
    try:
        state, *others = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else others[18]
