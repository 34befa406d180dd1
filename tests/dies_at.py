"""`python dies_at.py KIND NUMBER MOMENT ARGUMENT…` is `orchestrate ARGUMENT…` with an end of its
own: the command kills itself, as `kill -9` would, while it writes an event of its ledger.

NUMBER counts the events of that KIND from 1: the driver and the mirror write theirs in no fixed
order. MOMENT is in the `middle` of the event's bytes, or `after` they are on the disk. With fewer
such events, the command ends as it always does.
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

    kind: str
    last: int
    moment: str
    written = 0

    def append(self, event: Any) -> None:
        with self._lock:
            _Counted.written += event["event"] == self.kind
            due = event["event"] == self.kind and _Counted.written == self.last
            if due and self.moment == "middle":
                ledger._write_all = _write_half
            super().append(event)
            if due:
                _die()


if __name__ == "__main__":
    _Counted.kind, _Counted.last, _Counted.moment = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    ledger.Ledger = _Counted  # type: ignore[misc]
    sys.argv = ["orchestrate", *sys.argv[4:]]
    cli.main()
