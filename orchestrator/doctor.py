"""Whether a machine or a cluster has what a sweep will need, found by trying it.

Every check is a function that gives a `Check`; none of them raises for what it looks for.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import sysconfig
import threading
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from rich.markup import escape
from rich.table import Table

from orchestrator import cluster, footprint, tracking
from orchestrator.cluster import Node, Room, UnreachableError, View
from orchestrator.plan import SweepPlan
from orchestrator.spec import Resources
from orchestrator.store import Store

MAIN = ("torch", "ray", "deepspeed", "transformers", "lm_eval", "mlflow", "pyarrow")
OP = "deepspeed_shm_comm"
"""What DeepSpeed compiles on a machine without a GPU, at the first start of its engine."""
MLFLOW_S = 5.0
STORAGE_S = 30.0
SPARE_GB = 1.0
"""Disk that is wanted even where nothing is known of the sweep."""


@dataclass(frozen=True)
class Check:
    """One thing that was tried: what was found, and what to do about it where it is not well.

    A sweep can run without what is not `required`.
    """

    name: str
    ok: bool
    found: str
    remedy: str = ""
    required: bool = True


@dataclass(frozen=True)
class Needs:
    """What a sweep asks of the machine. Bytes are of what is not in the store yet."""

    workers: int = 1
    cpus: int = 1
    gpus: float = 0.0
    """CPUs and GPUs are for each worker."""
    cache_bytes: int = 0
    model_bytes: int = 0
    checkpoint_bytes: int = 0
    """Of the training checkpoints that there are at the same time."""
    from_hub: bool = False
    """Whether a model comes from the Hugging Face hub: artifacts are then links into its cache."""


def needs_of(
    plan: SweepPlan,
    resources: Resources,
    stored: Collection[str],
    cores: int = os.cpu_count() or 1,
) -> Needs:
    """What the planned sweep asks for, beyond the `stored` stages. So many trials run at once as
    the resources say, or as so many `cores` take."""
    models, checkpoints = dict[str, int](), dict[str, int]()
    for trial in plan.trials:
        models |= footprint.model_bytes(trial)
        checkpoints |= footprint.checkpoint_bytes(trial, resources)
    at_once = cores // (resources.workers * resources.cpus_per_trial)
    at_once = max(1, resources.max_concurrent or at_once)
    left = [node for node in plan.nodes() if node.stage_id not in stored]
    largest = sorted((checkpoints.get(node.stage_id, 0) for node in left), reverse=True)
    return Needs(
        workers=resources.workers,
        cpus=resources.cpus_per_trial,
        gpus=resources.gpus_per_worker,
        cache_bytes=sum(node.disk_bytes for node in left),
        model_bytes=sum(models.get(node.stage_id, 0) for node in left),
        checkpoint_bytes=sum(largest[:at_once]),
        from_hub=any(
            node.kind == "acquire" and node.config["source"]["kind"] == "hub"
            for node in plan.nodes()
        ),
    )


def examine(
    results: Path, needs: Needs, address: str | None, store: Store | None = None
) -> Iterator[Check]:
    """Every check, one after the other, as they are done.

    Without an `address` it is this machine that is to run the sweep. `store` is where its artifacts
    go, where that is known.
    """
    yield packages()
    if address is None:
        yield gpus(needs.gpus * needs.workers)
        yield from op(_torch_gpus() > 0)
    writable = shared_folder(results)
    yield writable
    folders = [results.resolve()]
    if store is not None:
        yield (usable := artifacts(store))
        if usable.ok and not _is_inside(store.root, results):
            folders.append(store.root.resolve())
    if address is not None and needs.from_hub:
        yield (usable := shared_folder(cluster.hub_cache(), "Hugging Face cache", "HF_HOME"))
        if usable.ok:
            folders.append(cluster.hub_cache())
    yield from disks(results, needs, store)
    yield mlflow_store(tracking.tracking_uri(results))
    if writable.ok:
        yield from ray_checks(address, folders, needs)


# --- this machine ----------------------------------------------------------------------------


def packages() -> Check:
    """Whether the installed packages are those that the project asks for."""
    name = "packages"
    try:
        asked = [Requirement(text) for text in metadata.requires("orchestrate") or ()]
    except metadata.PackageNotFoundError:
        remedy = "install it: pip install -c constraints.txt -e ."
        return Check(name, False, "the package orchestrate is not installed", remedy)
    wrong = [problem for each in asked if (problem := _unmet(each))]
    remedy = "install the pinned set: pip install -c constraints.txt -e ."
    if wrong:
        return Check(name, False, "; ".join(wrong), remedy)
    have = ", ".join(f"{each} {metadata.version(each)}" for each in MAIN)
    return Check(name, True, f"Python {sys.version.split()[0]}, {have}")


def _unmet(asked: Requirement) -> str | None:
    if asked.marker and not asked.marker.evaluate({"extra": ""}):
        return None
    try:
        have = metadata.version(asked.name)
    except metadata.PackageNotFoundError:
        return f"{asked.name} is missing"
    fits = asked.specifier.contains(have, prereleases=True)
    return None if fits else f"{asked.name} is {have}, and {asked.specifier} is asked for"


def op(has_gpu: bool) -> Iterator[Check]:
    """What DeepSpeed's own op needs to be compiled: where there is a GPU, it is not used."""
    built = _built()
    yield compiler(required=not (built or has_gpu))
    yield ninja(required=not has_gpu)
    later = "not built yet: the first engine on this machine takes about a minute longer"
    unused = "not needed with a GPU" if has_gpu else later
    yield Check("DeepSpeed's op", True, f"built, {built}" if built else unused, required=False)


def _built() -> Path | None:
    """Where torch keeps the compiled op."""
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    places = [Path(chosen)] if chosen else _default_extension_folders()
    files = (folder / OP / f"{OP}.so" for folder in places)
    return next((file for file in files if file.is_file()), None)


def _default_extension_folders() -> list[Path]:
    from torch.utils.cpp_extension import get_default_build_root

    python = f"py{sys.version_info.major}{sys.version_info.minor}{sys.abiflags}"
    return sorted(Path(get_default_build_root()).glob(f"{python}_*"))


def compiler(required: bool) -> Check:
    """Whether a C++ compiler finds Python's headers."""
    name, command = "C++ compiler", os.environ.get("CXX", "c++")
    path = shutil.which(command)
    if path is None:
        remedy = "install one (Debian: apt install g++), or name it in CXX"
        return Check(name, False, f"no {command} on the PATH", remedy, required)
    include = sysconfig.get_path("include")
    done = subprocess.run(
        [path, "-fsyntax-only", "-x", "c++", "-std=c++17", f"-I{include}", "-"],
        input="#include <Python.h>\n#include <string>\n",
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        remedy = "install Python's headers (Debian: apt install python3-dev) and the C++ library"
        errors = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr]
        return Check(name, False, f"{path}: {errors[0].strip()}", remedy, required)
    return Check(name, True, path, required=required)


def ninja(required: bool) -> Check:
    """Whether ninja runs; it may stand beside the interpreter alone."""
    path = shutil.which("ninja", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if path is None:
        return Check("ninja", False, "not found", "install it: pip install ninja", required)
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    if done.returncode:
        remedy = "install it again: pip install --force-reinstall ninja"
        return Check("ninja", False, f"{path} does not run", remedy, required)
    return Check("ninja", True, path, required=required)


def gpus(needed: float) -> Check:
    """The GPUs of this machine that torch can use."""
    import torch

    count = _torch_gpus()
    names = ", ".join(
        f"{torch.cuda.get_device_name(i)} "
        f"({torch.cuda.get_device_properties(i).total_memory / 1e9:.0f} GB)"
        for i in range(count)
    )
    if not count and shutil.which("nvidia-smi") and Path("/proc/driver/nvidia").exists():
        remedy = "install a torch built for this driver: see https://pytorch.org/get-started"
        found = f"there is an NVIDIA driver, and torch {torch.__version__} sees no GPU"
        return Check("GPUs", False, found, remedy, needed > 0)
    if count < needed:
        remedy = "join a cluster that has them (--address), or set resources.gpus_per_worker lower"
        return Check("GPUs", False, f"{count}, and a trial takes {needed:g}", remedy)
    return Check("GPUs", True, names or "none: everything runs on the CPU", required=needed > 0)


def _torch_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


# --- results ---------------------------------------------------------------------------------


def shared_folder(folder: Path, name: str = "results folder", named_by: str = "--results") -> Check:
    """Whether files can be made once, replaced whole and moved in the results folder, as leases
    and artifacts are, or in another one."""
    probe = folder / f".doctor-{uuid.uuid4().hex}"
    remedy = f"give another folder with {named_by}, or the right to write into this one"
    try:
        probe.mkdir(parents=True)
        wrong = _misbehaves(probe)
    except OSError as error:
        return Check(name, False, f"{folder}: {error.strerror or error}", remedy)
    finally:
        shutil.rmtree(probe, ignore_errors=True)
    if wrong:
        remedy = "use a file system with POSIX semantics: a local disk, NFS 4, Lustre"
        return Check(name, False, f"{folder}: {wrong}", remedy)
    return Check(name, True, f"{folder.resolve()}: creates, replaces and moves files whole")


def _misbehaves(probe: Path) -> str | None:
    """What the file system of the empty folder `probe` does not do as POSIX has it."""
    lease = probe / "lease"
    with lease.open("x") as stream:
        stream.write("held")
        stream.flush()
        os.fsync(stream.fileno())
    try:
        lease.open("x").close()
        return "a file can be created twice, so that two could hold one lease"
    except FileExistsError:
        pass
    (probe / "part").write_text("whole")
    (probe / "part").replace(lease)
    if lease.read_text() != "whole" or (probe / "part").exists():
        return "a file does not replace another in one step"
    (probe / "working").mkdir()
    (probe / "working" / "file").write_text("kept")
    (probe / "working").rename(probe / "final")
    if (probe / "final" / "file").read_text() != "kept":
        return "a folder does not keep its files when it is renamed"
    os.utime(lease)
    return None


def artifacts(store: Store, timeout_s: float = STORAGE_S) -> Check:
    """Whether artifacts can be written where the profile has them, be it an object store."""
    name, place = "artifacts", store.uri or store.root

    def write() -> str | None:
        try:
            store.check_access()
        except OSError as error:
            return cluster.first_line(error)
        return None

    problem = _within(timeout_s, write)
    if problem is None:
        return Check(name, True, f"{place}: can be written")
    remedy = "set the profile's artifacts to another place, or give this machine access to it"
    return Check(name, False, f"{place}: {problem}", remedy)


def _is_inside(folder: Path, other: Path) -> bool:
    return folder.resolve().is_relative_to(other.resolve())


def disks(results: Path, needs: Needs, store: Store | None = None) -> Iterator[Check]:
    """Whether there is room where artifacts go and, where that is elsewhere, for the records."""
    if store is None or _is_inside(store.root, results):
        yield disk(store.root if store else results, needs)
        return
    yield disk(results, Needs())
    yield disk(store.root, needs, "disk of artifacts")


def disk(folder: Path, needs: Needs, name: str = "disk") -> Check:
    """Whether what the sweep will store fits the disk."""
    there = next(each for each in (folder.resolve(), *folder.resolve().parents) if each.exists())
    free = shutil.disk_usage(there).free / 1e9
    caches, models = needs.cache_bytes / 1e9, needs.model_bytes / 1e9
    training = needs.checkpoint_bytes / 1e9
    wanted = max(caches + models + training, SPARE_GB)
    found = f"{free:,.3g} GB free in {there}"
    if caches or models or training:
        found += (
            f"; the sweep stores caches of {caches:.3g} GB, models of {models:.3g} GB and training "
            f"checkpoints of {training:.3g} GB"
        )
    remedy = (
        "free some, give another disk with --results or artifacts, or set "
        "resources.largest_cache_gb lower (a live teacher needs no cache)"
    )
    return Check(name, True, found) if free >= wanted else Check(name, False, found, remedy)


# --- MLflow ----------------------------------------------------------------------------------


def mlflow_store(uri: str, timeout_s: float = MLFLOW_S) -> Check:
    """Whether runs can be shown in MLflow. Says so within seconds, whatever is at `uri`."""
    if uri.startswith(("http:", "https:")):
        problem, good = _server_problem(uri, timeout_s), "answers"
        remedy = "start the server (docs/cluster.md), or unset MLFLOW_TRACKING_URI"
    elif uri.startswith("sqlite:"):
        path = Path(uri.removeprefix("sqlite:///"))
        good = "opens" if path.exists() else "not there yet; the first run makes it"
        problem = _sqlite_problem(path, timeout_s)
        remedy = "move the file away: `orchestrate mirror` writes it anew from the records"
    else:
        problem, good = _database_problem(uri, timeout_s), "opens"
        remedy = "start the database, or unset MLFLOW_TRACKING_URI"
    if problem is None:
        return Check("MLflow", True, tracking.without_secrets(f"{uri}: {good}", uri))
    return Check("MLflow", False, tracking.without_secrets(f"{uri}: {problem}", uri), remedy)


def _server_problem(uri: str, timeout_s: float) -> str | None:
    parts = urllib.parse.urlsplit(uri)
    plain = parts._replace(netloc=parts.netloc.rpartition("@")[2])
    address = f"{plain.geturl().rstrip('/')}/api/2.0/mlflow/experiments/search?max_results=1"
    request = urllib.request.Request(address, headers=_credentials(parts))
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            json.loads(answer.read(1 << 20))
    except urllib.error.HTTPError as error:
        return f"answers with {error.code} {error.reason}"
    except ValueError:
        return "answers, but not as an MLflow server does"
    except OSError as error:
        reason = getattr(error, "reason", error)
        return f"does not answer within {timeout_s:g} s ({reason})"
    return None


def _credentials(parts: urllib.parse.SplitResult) -> dict[str, str]:
    """What MLflow's own client would send to prove who asks."""
    user = parts.username or os.environ.get("MLFLOW_TRACKING_USERNAME")
    password = parts.password or os.environ.get("MLFLOW_TRACKING_PASSWORD")
    if user and password:
        encoded = base64.b64encode(f"{user}:{password}".encode()).decode()
        return {"Authorization": f"Basic {encoded}"}
    if token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        return {"Authorization": f"Bearer {token}"}
    return {}


def _sqlite_problem(path: Path, timeout_s: float) -> str | None:
    if not path.exists():
        return None
    try:
        with sqlite3.connect(f"file:{path}?mode=rw", uri=True, timeout=timeout_s) as database:
            database.execute("SELECT count(*) FROM sqlite_master").fetchone()
            database.execute("BEGIN IMMEDIATE")
            database.rollback()
    except sqlite3.Error as error:
        return str(error)
    return None


def _database_problem(uri: str, timeout_s: float) -> str | None:
    """Databases of other kinds have time limits of their own, some of them none."""

    def connect() -> str | None:
        import sqlalchemy

        try:
            sqlalchemy.create_engine(uri).connect().close()
        except Exception as error:  # of the driver's own types; a missing driver is one, too
            return cluster.first_line(error)
        return None

    return _within(timeout_s, connect)


def _within(timeout_s: float, attempt: Callable[[], str | None]) -> str | None:
    answers: list[str | None] = []
    thread = threading.Thread(target=lambda: answers.append(attempt()), daemon=True)
    thread.start()
    thread.join(timeout_s)
    return answers[0] if answers else f"does not answer within {timeout_s:g} s"


# --- Ray -------------------------------------------------------------------------------------


def ray_checks(address: str | None, folders: Sequence[Path], needs: Needs) -> Iterator[Check]:
    """Whether Ray starts here, or is reached at `address`, and can run a trial on its nodes, all
    of which share the `folders`."""
    try:
        seen = cluster.view(address, folders)
    except UnreachableError as error:
        remedy = (
            "look at what `ray status --address HOST:PORT` says; a cluster that asks for a token "
            "needs RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH here, too"
            if address
            else "look into /tmp/ray/session_latest/logs; free memory and processes may be short"
        )
        yield Check("Ray", False, str(error), remedy)
        return
    yield _nodes(seen, address)
    yield _dashboard(seen, needs)
    yield _room(seen, needs)
    if address is not None:
        together = needs.from_hub and len(seen.nodes) > 1
        hub_cache = str(cluster.hub_cache()) if together else None
        yield from (_node(node, hub_cache) for node in seen.nodes)


def _nodes(seen: View, address: str | None) -> Check:
    cpus, gpus = sum(n.cpus for n in seen.nodes), sum(n.gpus for n in seen.nodes)
    where = f"at {address}" if address else "starts here"
    found = ", ".join((_count(len(seen.nodes), "node"), _count(cpus, "CPU"), _count(gpus, "GPU")))
    return Check("Ray", True, f"{where}: {found}")


def _count(number: float, what: str) -> str:
    return f"{number:g} {what}{'' if number == 1 else 's'}"


def _dashboard(seen: View, needs: Needs) -> Check:
    """Without it, a trial of several workers that is stopped keeps its place for ever."""
    name, needed = "Ray's dashboard", needs.workers > 1
    if seen.dashboard:
        return Check(name, True, f"http://{seen.dashboard}", required=needed)
    remedy = "install ray[default], and start the head with --include-dashboard=true"
    return Check(name, False, "does not answer", remedy, required=needed)


def _room(seen: View, needs: Needs) -> Check:
    """Whether all workers of one trial find a place."""
    name = "room for a trial"
    asked = f"{_count(needs.workers, 'worker')} of {_count(needs.cpus, 'CPU')}"
    asked += f" and {_count(needs.gpus, 'GPU')}" if needs.gpus else ""
    fitting = sum(_fitting(node, needs) for node in seen.nodes)
    if fitting >= needs.workers:
        return Check(name, True, f"{asked}: {fitting // needs.workers} at the same time")
    found = f"{asked}: only {fitting} of them find a place"
    remedy = (
        "add nodes, wait until all have joined, or set resources.workers or cpus_per_trial lower"
    )
    return Check(name, False, found, remedy)


def _fitting(node: Node, needs: Needs) -> int:
    """How many workers the node takes."""
    return Room(node.cpus, node.gpus).holds(Room(needs.cpus, needs.gpus))


def _node(node: Node, hub_cache: str | None = None) -> Check:
    """Whether a node of a cluster can work with the others, and reads models of the hub from the
    same cache, if from any."""
    name = f"node {node.name}"
    ours = cluster.versions(cluster.SAME_EVERYWHERE)
    other = [
        f"{each} {version} here, {node.versions.get(each, 'none')} there"
        for each, version in ours.items()
        if node.versions.get(each) != version
    ]
    if node.problem:
        remedy = "install the pinned set there: pip install -c constraints.txt -e ."
        return Check(name, False, node.problem, remedy)
    if other:
        remedy = "install the same versions everywhere: pip install -c constraints.txt -e ."
        return Check(name, False, "; ".join(other), remedy)
    if missing := [folder for folder, is_shared in node.shares.items() if not is_shared]:
        remedy = (
            "mount the same storage at the same path on every node, and name it in --results, in "
            "the profile's artifacts or in HF_HOME"
        )
        found = f"does not see {', '.join(missing)}, or cannot write there"
        return Check(name, False, found, remedy)
    if hub_cache not in (None, node.hub_cache):
        found = f"its models of the hub are in {node.hub_cache}, those here in {hub_cache}"
        remedy = "set HF_HOME alike on all nodes and here, to a folder on the storage that all see"
        return Check(name, False, found, remedy)
    if not node.gpus and not node.compiler:
        remedy = (
            "install one there (Debian: apt install g++): DeepSpeed compiles an op without a GPU"
        )
        return Check(name, False, "no C++ compiler", remedy)
    if node.visible_gpus is not None and node.visible_gpus < node.gpus:
        found = f"Ray has {node.gpus:g} GPUs there, torch sees {node.visible_gpus}"
        return Check(name, False, found, "install a torch built for the node's driver")
    has = f"{_count(node.cpus, 'CPU')}, {_count(node.gpus, 'GPU')}"
    return Check(name, True, f"{has}, shares {', '.join(node.shares)}")


# --- for people and programs -----------------------------------------------------------------


def as_json(checks: Sequence[Check]) -> str:
    """The checks as a JSON list."""
    return json.dumps([asdict(check) for check in checks], indent=1)


def as_table(checks: Sequence[Check]) -> Table:
    """A line for each check; under one that failed, what to do."""
    table = Table(box=None, show_header=False, padding=(0, 1))
    for column in ("mark", "name", "found"):
        table.add_column(column, overflow="fold", no_wrap=column == "mark")
    for check in checks:
        mark = (
            "[green]ok[/]" if check.ok else "[red]FAILS[/]" if check.required else "[yellow]no[/]"
        )
        table.add_row(mark, escape(check.name), escape(check.found))
        if not check.ok:
            table.add_row("", "", f"[bold]→[/] {escape(check.remedy)}")
    return table
