"""`python dies_at.py EVENT MOMENT ARGUMENT…` is `orchestrate ARGUMENT…` with an end of its own: the
command kills itself, as `kill -9` would, while it writes an event of its ledger.

EVENT counts from 1. MOMENT is in the `middle` of the event's bytes, or `after` they are on the
disk. With fewer events than that, the command ends as it always does.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from orchestrator import cli, ledger


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _write_half(descriptor: int, data: bytes) -> None:
    os.write(descriptor, data[: len(data) // 2])
    _die()


class _Counted(ledger.Ledger):
    """A ledger that knows which event is the last one."""

    last: int
    moment: str
    written = 0

    def append(self, event: Any) -> None:
        with self._lock:
            _Counted.written += 1
            due = _Counted.written == self.last
            if due and self.moment == "middle":
                ledger._write_all = _write_half
            super().append(event)
            if due:
                _die()


if __name__ == "__main__":
    _Counted.last, _Counted.moment = int(sys.argv[1]), sys.argv[2]
    ledger.Ledger = _Counted  # type: ignore[misc]
    sys.argv = ["orchestrate", *sys.argv[3:]]
    cli.main()
