"""Whose failure it is where a trial of several workers fails: its own, or a machine's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RaySystemError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from orchestrator import workers
from orchestrator.faults import InfrastructureError
from trainers.contract import DamagedInputError, Interrupted, StageError

DEAD = WorkerHealthCheckFailedError(
    "A worker health check failed.", RaySystemError("The node was terminated unexpectedly.")
)
PEER = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4711")


def failed(reason: str, ended_at: float, **more: Any) -> dict[str, Any]:
    told = {"outcome": "failed", "reason": reason, "ended_at": ended_at}
    return {"damaged": None, "machine": False, **told, **more}


def of(**failures: Exception) -> WorkerGroupError:
    """Ray Train's error where these ranks failed."""
    by_rank = {int(name.removeprefix("rank")): error for name, error in failures.items()}
    return WorkerGroupError("[Rank 1 Error Snippet]:\n...", by_rank)


def test_a_worker_that_died_is_the_machines_whatever_the_others_say() -> None:
    survivor = {0: failed("RuntimeError: the group is broken", 1.0)}
    with pytest.raises(
        InfrastructureError, match=r"^worker 2 of 2 died: .*The node was terminated"
    ):
        workers._result(survivor, 2, of(rank0=PEER, rank1=DEAD))


def test_workers_that_cannot_be_started_are_the_machines() -> None:
    with pytest.raises(InfrastructureError, match=r"the workers failed: .*timed out"):
        workers._result({}, 2, ControllerError(WorkerGroupStartupTimeoutError(2)))


def test_a_failure_of_its_own_is_told_before_the_connections_that_it_cost() -> None:
    # By a clock that is behind, the other was first.
    lost = failed("Connection closed by peer", 1.0, machine=True)
    own = failed("the loss is nan at step 3", 2.0)
    with pytest.raises(StageError, match="the loss is nan") as raised:
        workers._result({0: lost, 1: own}, 2, of(rank0=PEER, rank1=StageError("nan")))
    assert not isinstance(raised.value, InfrastructureError)


def test_workers_that_all_blame_the_machine_are_believed() -> None:
    lost = {rank: failed("Connection closed by peer", 1.0, machine=True) for rank in (0, 1)}
    with pytest.raises(InfrastructureError, match="Connection closed by peer"):
        workers._result(lost, 2, of(rank0=PEER, rank1=PEER))


def test_a_damaged_input_is_told_as_such() -> None:
    found = {0: failed("changed on disk", 1.0, damaged="model")}
    with pytest.raises(DamagedInputError, match="changed on disk") as raised:
        workers._result(found, 2, of(rank0=StageError("changed on disk")))
    assert raised.value.role == "model"


def test_an_interruption_is_no_failure() -> None:
    with pytest.raises(Interrupted):
        workers._result({rank: {"outcome": "interrupted"} for rank in (0, 1)}, 2, None)


def test_an_answer_that_was_cut_off_is_none(tmp_path: Path) -> None:
    (tmp_path / workers.ANSWER.format(0)).write_text(json.dumps({"outcome": "completed"})[:9])
    assert workers._answer(tmp_path, 0) is None and workers._answer(tmp_path, 1) is None
