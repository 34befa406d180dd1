"""A process of its own that asks for a stage, as a worker does:

    python tests/asks_for_a_stage.py STORE LOG NAME STEPS [URI]

It builds the stage where nobody has, in so many steps of 50 ms, and prints whether it did. In LOG
everybody says that he asks, and every builder that it begins, and at which step.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.execute import Costs, Launched, run_stage
from orchestrator.leases import Pace
from orchestrator.steps import StageNode
from orchestrator.storage import RemoteStore
from orchestrator.store import Store
from trainers.contract import Runtime, StageContext, StageResult

PACE = Pace(heartbeat_s=0.1, expires_s=4.0, look_s=0.02)
PATIENT = replace(PACE, expires_s=60.0)
"""Where nobody expires: on a busy machine a request to the object store may take seconds."""
RESULT = "the same, whoever writes it\n" * 1000
NODE = StageNode("prune-1", "prune", {"depth": None, "width": None}, {}, None)


def main(root: str, log: str, name: str, steps: str, uri: str | None = None) -> None:
    """Ask for the stage."""
    store = RemoteStore(Path(root), uri, PATIENT) if uri else Store(Path(root), PACE)

    def say(what: str) -> None:
        with Path(log).open("a") as stream:
            stream.write(f"{name} {what}\n")

    def launch(node: StageNode, context: StageContext[Any]) -> Launched:
        done = context.out / "steps"
        first = int(done.read_text()) if done.exists() else 0
        say(f"begins at {first}")
        for step in range(first, int(steps)):
            beside = done.with_suffix(".part")
            beside.write_text(str(step))
            beside.replace(done)
            time.sleep(0.05)
        done.unlink()
        (context.out / "rows.jsonl").write_text(RESULT)
        return Launched(StageResult({"loss": 1.5}), Costs(0.0, 0.0, 0.0))

    say("asks")
    record = run_stage(NODE, store, name, name, lambda *_: None, Runtime(), launch)
    print("found" if record.cached else "built")


if __name__ == "__main__":
    main(*sys.argv[1:])
