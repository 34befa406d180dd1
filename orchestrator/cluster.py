"""How a sweep comes to a Ray: one of this machine alone, or a running cluster of several machines.

Workers on other machines inherit nothing of the driver's environment and may hold another version
of this code, so both are sent along.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

PACKAGES = ("orchestrator", "trainers")
SAME_EVERYWHERE = ("ray", "torch", "deepspeed", "transformers")
"""Distributions whose versions decide what a trial computes, or whether workers talk at all."""

FOR_WORKERS = {
    # Who was granted no GPU sees none: plans and grants would else not say what runs where.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    # By default glibc gives every large tensor back to the system when it is freed, and the page
    # faults of getting it again cost a third of a step with 49k words.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
"""What every worker's environment holds unless the driver's says otherwise."""
PASSED_ON = (
    *FOR_WORKERS,
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NCCL_",
    "GLOO_",
    "RAY_TRAIN_",
    "DS_LOG_LEVEL",
    "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE",
)
"""Names, or their beginnings, that go from the driver's environment to workers elsewhere. Named one
by one: what is sent stands readable in Ray's dashboard, and tokens are set on the nodes."""

SETTLE_S = 0.5
"""Before Ray is left, for what it still hears of its actors' ends."""
CONNECT_S = 5.0
LOOK_S = 120.0


class UnreachableError(Exception):
    """There is no Ray at the address; the message says why."""


# --- joining ---------------------------------------------------------------------------------


def worker_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What workers need of the driver's environment."""
    passed = {name: value for name, value in environment.items() if name.startswith(PASSED_ON)}
    return {**FOR_WORKERS, **passed}


@dataclass(frozen=True)
class Joined:
    """A Ray that this process has joined, and where its dashboard should be."""

    dashboard: str | None


@contextmanager
def joined(address: str | None, dashboard: bool) -> Iterator[Joined]:
    """While open, this process is the driver of a Ray of this machine alone, or of the cluster at
    `address`.

    The first listens on 127.0.0.1 only. Raises `UnreachableError` where no Ray answers.
    """
    if address is not None:
        check_address(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    settings = _local(dashboard) if address is None else _elsewhere(address)
    import ray

    try:
        context = ray.init(log_to_driver=False, logging_level="ERROR", **settings)
    except Exception as error:  # of many types, and all of them mean the same to whoever asked
        where = f"at {address}" if address else "could be started"
        raise UnreachableError(f"no Ray {where}: {first_line(error)}") from error
    try:
        yield Joined(context.dashboard_url or None)
    finally:
        _leave()


def _leave() -> None:
    """Shut Ray down, with nothing of it left for another thread to find.

    Ray ends the whole process, with status 1 and without a word, where a thread lets go of a
    reference to one of its objects in the moment of its end (ray-project/ray, pull request 19115).
    Tune's are in cycles, and the garbage collector runs in whichever thread happens to need it.
    """
    import ray

    collects = gc.isenabled()
    gc.disable()
    try:
        time.sleep(SETTLE_S)
        gc.collect()
        ray.shutdown()
    finally:
        if collects:
            gc.enable()


def first_line(error: Exception) -> str:
    """The first line of what an exception says, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _local(dashboard: bool) -> dict[str, Any]:
    """Settings of a Ray that no other machine can talk to. Its workers inherit the environment."""
    os.environ.update(worker_environment(os.environ))
    # Ray's servers listen on the address of their node. That is 127.0.0.1 only where Ray believes
    # that no machine will join, which this variable says on every system, whatever its name.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    loopback = "lo" if platform.system() == "Linux" else "lo0"
    for library in ("GLOO", "NCCL"):
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", loopback)
    # Without "local", Ray would join what RAY_ADDRESS names or `ray start` left running.
    return {"address": "local", "include_dashboard": dashboard, "dashboard_host": "127.0.0.1"}


def _elsewhere(address: str) -> dict[str, Any]:
    """Settings that bring this code and environment to workers on every node."""
    here = Path(__file__).parent.parent
    return {
        "address": address,
        "runtime_env": {
            "env_vars": worker_environment(os.environ),
            "py_modules": [str(here / package) for package in PACKAGES],
            "excludes": ["__pycache__"],
        },
    }


def check_address(address: str) -> None:
    """Raise `UnreachableError` where `address` is none of a Ray cluster, or nothing listens there.

    Ray itself tries for a minute before it says so.
    """
    if address == "auto":
        return
    host, port = host_and_port(address)
    try:
        socket.create_connection((host, port), CONNECT_S).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise UnreachableError(f"nothing listens at {address}: {reason}") from error


def host_and_port(address: str) -> tuple[str, int]:
    """The parts of `HOST:PORT`. Raises `UnreachableError` for anything else."""
    host, colon, port = address.rpartition(":")
    if "://" in address or not (host and colon and port.isdigit()):
        raise UnreachableError(
            f"{address!r} is no address of a Ray cluster: give HOST:PORT or auto"
        )
    return host.strip("[]"), int(port)


# --- room ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Room:
    """CPUs and GPUs: those of a node, or those that a worker takes."""

    cpus: float
    gpus: float

    def __str__(self) -> str:
        return f"{self.cpus:g} CPUs" + (f" and {self.gpus:g} GPUs" if self.gpus else "")

    def holds(self, worker: Room) -> int:
        """How many such workers find a place here."""
        by_cpu = int(self.cpus // worker.cpus)
        return min(by_cpu, int(self.gpus / worker.gpus)) if worker.gpus else by_cpu


def rooms() -> tuple[Room, ...]:
    """The nodes of the Ray that this process has joined."""
    import ray

    return tuple(_room(node) for node in ray.nodes() if node["Alive"])


def _room(node: Mapping[str, Any]) -> Room:
    has = node["Resources"]
    return Room(float(has.get("CPU", 0)), float(has.get("GPU", 0)))


@contextmanager
def asked_for(worker: Room, workers: int) -> Iterator[None]:
    """While open, a cluster that starts nodes when they are needed is told that these are."""
    from ray.autoscaler.sdk import request_resources

    wanted = {"CPU": worker.cpus} | ({"GPU": worker.gpus} if worker.gpus else {})
    request_resources(bundles=[wanted] * workers)
    try:
        yield
    finally:
        request_resources(bundles=[])


# --- looking ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, as a process on it found it."""

    name: str
    cpus: float
    gpus: float
    visible_gpus: int | None
    """Those that torch can use there; None where Ray has none to give."""
    versions: Mapping[str, str]
    compiler: bool
    shares: Mapping[str, bool]
    """Of each folder whether it sees what the driver writes there, and can write there."""
    hub_cache: str
    """Where its processes keep models of the Hugging Face hub."""
    problem: str | None
    """Why nothing could be run there."""


@dataclass(frozen=True)
class View:
    """A Ray as it was found. `dashboard` is its address where it answers."""

    nodes: tuple[Node, ...]
    dashboard: str | None


def view(address: str | None, folders: Sequence[Path], patience_s: float = LOOK_S) -> View:
    """Start or join a Ray, run a task on each of its nodes, which looks at the `folders`, too, and
    leave again.

    In a process of its own, with an end: a Ray that cannot be reached may take that process down or
    never answer. Raises `UnreachableError`.
    """
    if address is not None:
        check_address(address)
    request = json.dumps({"address": address, "folders": [str(folder) for folder in folders]})
    command = [sys.executable, "-c", "from orchestrator import cluster; cluster.main()", request]
    # -c looks for modules in the working folder first, and a checkout need not be installed.
    here = str(Path(__file__).parent.parent)
    try:
        done = subprocess.run(
            command, cwd=here, capture_output=True, text=True, timeout=patience_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise UnreachableError(f"no answer within {patience_s:.0f} s") from error
    answer = _last_json(done.stdout)
    if answer is None or "problem" in answer:
        lines = done.stderr.strip().splitlines() or [f"the process ended with {done.returncode}"]
        raise UnreachableError(answer["problem"] if answer else lines[-1])
    nodes = tuple(Node(**node) for node in answer["nodes"])
    return View(nodes, answer["dashboard"])


def _last_json(text: str) -> dict[str, Any] | None:
    lines = text.strip().splitlines()
    if not lines or not lines[-1].startswith("{"):
        return None
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def main() -> None:
    """Print the `View` that the JSON on the command line asks for, or a `problem`."""
    asked = json.loads(sys.argv[1])
    try:
        answer = asdict(_look(asked["address"], asked["folders"]))
    except UnreachableError as error:
        answer = {"problem": str(error)}
    print(json.dumps(answer), flush=True)


def _look(address: str | None, folders: Sequence[str]) -> View:
    with joined(address, dashboard=True) as found, ExitStack() as files:
        import ray

        marks = {
            folder: files.enter_context(NamedTemporaryFile(dir=folder, prefix=".doctor-")).name
            for folder in folders
        }
        nodes = [_node(node, marks) for node in ray.nodes() if node["Alive"]]
        answers = found.dashboard is not None and _answers(f"http://{found.dashboard}")
        return View(tuple(nodes), found.dashboard if answers else None)


def _node(node: Mapping[str, Any], marks: Mapping[str, str]) -> Node:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    room = _room(node)
    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(_on_node)
    found: dict[str, Any] = {"visible_gpus": None, "versions": {}}
    found |= {"compiler": False, "shares": dict.fromkeys(marks, False), "hub_cache": ""}
    problem = None
    try:
        found = ray.get(task.remote(marks, room.gpus > 0), timeout=LOOK_S / 2)
    except Exception as error:  # whatever keeps a node from working is what is asked for here
        problem = first_line(error)
    name = node["NodeName"] or node["NodeManagerAddress"]
    return Node(name, room.cpus, room.gpus, problem=problem, **found)


def _on_node(marks: Mapping[str, str], has_gpus: bool) -> dict[str, Any]:
    """What a process on a node finds there. `marks` are files of the driver's, by folder."""
    visible = None
    if has_gpus:
        import torch

        visible = torch.cuda.device_count()
    return {
        "visible_gpus": visible,
        "versions": versions(SAME_EVERYWHERE),
        "compiler": shutil.which(os.environ.get("CXX", "c++")) is not None,
        "shares": {folder: _shares_folder_of(Path(mark)) for folder, mark in marks.items()},
        "hub_cache": str(hub_cache()),
    }


def hub_cache() -> Path:
    """Where this process keeps models of the Hugging Face hub."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _shares_folder_of(mark: Path) -> bool:
    probe = mark.with_name(f"{mark.name}-{socket.gethostname()}-{os.getpid()}")
    try:
        probe.touch()
        probe.unlink()
    except OSError:
        return False
    return mark.exists()


def versions(distributions: Sequence[str]) -> dict[str, str]:
    """The installed versions; a distribution that is missing is left out."""
    found = {"python": platform.python_version()}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _answers(url: str) -> bool:
    """Whether a server is there, be it to say that one may not look."""
    try:
        urllib.request.urlopen(url, timeout=CONNECT_S).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True
