"""Whether a trial's workers find a place on the nodes of a Ray, and how many trials at a time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orchestrator import cluster
from orchestrator.spec import Resources

NODES_S = 600.0
"""How long the nodes of a cluster may take to join, or to be started, until a trial has room."""
LOOK_EVERY_S = 0.5
"""How often is looked whether they have."""


class NoRoomError(Exception):
    """The cluster is too small for one trial."""


@dataclass(frozen=True)
class Capacity:
    """What the nodes of a Ray hold: all their CPUs, those of the largest node that a worker may be
    on, and how many trials find a place at the same time."""

    cpus: int
    widest: int
    trials: int

    def at_once(self, resources: Resources, most: int | None) -> int:
        """How many trials may run at a time, `most` at the most where it is given."""
        at_once = most or (self.trials if resources.gpus_per_worker else self.cpus)
        if resources.workers > 1:
            # Ray Train makes placement groups that Tune knows nothing of: together they must fit.
            at_once = min(at_once, self.trials)
        return max(1, at_once)


def capacity_of(nodes: Sequence[cluster.Room], resources: Resources) -> Capacity:
    """What nodes hold of trials of such workers."""
    gpus = resources.gpus_per_worker
    widest = int(max((node.cpus for node in nodes if node.gpus >= gpus), default=0))
    cpus = resources.cpus_per_trial
    if resources.workers == 1:  # it makes do with the CPUs that there are
        cpus = max(1, min(cpus, widest))
    worker = cluster.Room(cpus, gpus)
    trials = sum(node.holds(worker) for node in nodes) // resources.workers
    return Capacity(int(sum(node.cpus for node in nodes)), widest, trials)


def wait_for(
    resources: Resources,
    address: str | None,
    waits: Callable[[str], None],
    stopping: Callable[[], bool],
) -> Capacity:
    """What the nodes of the Ray that this process has joined hold, once that is a trial.

    The cluster at an address is given a while for nodes that still join, or are started when they
    are needed; `waits` hears so. Raises `NoRoomError`, as Ray would wait for ever, and
    `KeyboardInterrupt` where the sweep is to stop.
    """
    nodes = cluster.rooms()
    if not capacity_of(nodes, resources).trials and address is not None:
        waits(f"{_lacking(resources, nodes)}; waiting for more, {NODES_S / 60:g} minutes")
        nodes = _more_nodes(resources, stopping)
    found = capacity_of(nodes, resources)
    if not found.trials:
        raise NoRoomError(f"resources: {_lacking(resources, nodes)}")
    return found


def _more_nodes(resources: Resources, stopping: Callable[[], bool]) -> tuple[cluster.Room, ...]:
    """The nodes when a trial has room on them, or has waited for long enough."""
    deadline = time.monotonic() + NODES_S
    worker = cluster.Room(resources.cpus_per_trial, resources.gpus_per_worker)
    with cluster.asked_for(worker, resources.workers):
        while not capacity_of(nodes := cluster.rooms(), resources).trials:
            if stopping():
                raise KeyboardInterrupt
            if time.monotonic() > deadline:
                break
            time.sleep(LOOK_EVERY_S)
    return nodes


def _lacking(resources: Resources, nodes: Sequence[cluster.Room]) -> str:
    worker = cluster.Room(resources.cpus_per_trial, resources.gpus_per_worker)
    several = f"{resources.workers} workers, each" if resources.workers > 1 else "one worker"
    found = ", ".join(f"{number} x {node}" for node, number in Counter(nodes).items())
    return f"there is no room for {several} of {worker}; the nodes: {found}"
