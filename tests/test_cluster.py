"""A sweep on a Ray of its own is alone with this machine; on a cluster, all nodes work for it."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow.parquet as parquet
import pytest
import small_sweep

from orchestrator import cluster

ROOT = Path(__file__).parent.parent


# --- what workers are told -------------------------------------------------------------------


def test_workers_elsewhere_get_the_settings_that_workers_here_inherit() -> None:
    environment = {"OMP_NUM_THREADS": "3", "NCCL_DEBUG": "WARN", "RAY_TRAIN_V2_ENABLED": "1"}
    sent = cluster.worker_environment(environment)
    assert sent == {**cluster.FOR_WORKERS, **environment}


def test_a_setting_of_the_users_own_wins() -> None:
    assert cluster.worker_environment({"MALLOC_TOP_PAD_": "1"})["MALLOC_TOP_PAD_"] == "1"


@pytest.mark.parametrize(
    "secret",
    ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "RAY_AUTH_TOKEN", "PATH"],
)
def test_secrets_stay_with_the_driver(secret: str) -> None:
    assert secret not in cluster.worker_environment({secret: "hidden"})


@pytest.mark.parametrize("address", ["nonsense", "ray://127.0.0.1:10001", ":6379", "host:", "a:b"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(cluster.UnreachableError, match="HOST:PORT"):
        cluster.check_address(address)


@pytest.mark.parametrize(
    ("address", "parts"),
    [("head:6379", ("head", 6379)), ("[::1]:6379", ("::1", 6379))],
)
def test_an_address_has_a_host_and_a_port(address: str, parts: tuple[str, int]) -> None:
    assert cluster.host_and_port(address) == parts


def test_a_node_shares_the_folders_in_which_it_sees_what_the_driver_wrote(tmp_path: Path) -> None:
    (tmp_path / "mark").touch()
    marks = {"shared": str(tmp_path / "mark"), "its own": str(tmp_path / "elsewhere" / "mark")}
    found = cluster._on_node(marks, has_gpus=False)
    assert found["shares"] == {"shared": True, "its own": False}
    assert found["hub_cache"] == str(cluster.hub_cache())
    assert [file.name for file in tmp_path.iterdir()] == ["mark"]


# --- a Ray of this machine alone -------------------------------------------------------------

LOCAL = """
import json, os, psutil
from orchestrator import cluster
with cluster.joined(None, dashboard=True):
    import ray
    sent = ray.get(ray.remote(lambda: os.environ.get("MALLOC_MMAP_MAX_")).remote())
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    doors = [c for p in family for c in p.net_connections("inet") if c.status == "LISTEN"]
    nodes = [n["NodeManagerAddress"] for n in ray.nodes()]
open_at = sorted({c.laddr.ip.removeprefix("::ffff:") for c in doors})
print(json.dumps({"doors": len(doors) > 5, "open_at": open_at, "sent": sent, "nodes": nodes}))
"""


@pytest.mark.slow
def test_a_ray_of_its_own_listens_on_127_0_0_1_alone_and_joins_no_other(tmp_path: Path) -> None:
    # Without an address, ray.init() would look for the cluster that this names.
    environment = {**os.environ, "RAY_ADDRESS": "127.0.0.2:1"}
    done = subprocess.run(
        [sys.executable, "-c", LOCAL], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    here = ["127.0.0.1"]
    assert found == {"doors": True, "open_at": here, "sent": "0", "nodes": here}


COLLECTED = """
import threading, time
import ray
from orchestrator import cluster

class Cycle:
    def __init__(self):
        self.me, self.held = self, ray.put(0)
    def __del__(self):
        time.sleep(1e-4)  # lets go of the interpreter, as whatever else has to be deleted may do

def in_another_thread_than(shutdown):
    import gc
    def both():
        threading.Thread(target=gc.collect, daemon=True).start()
        shutdown()
    return both

with cluster.joined(None, dashboard=False):
    for _ in range(500):  # too few for the collector to come by itself
        Cycle()
    ray.shutdown = in_another_thread_than(ray.shutdown)
print("wrote the report")
"""


@pytest.mark.slow
def test_what_is_collected_as_ray_is_left_does_not_end_the_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COLLECTED], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "wrote the report\n"), done.stderr


# --- two nodes on one machine ----------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.2", 0))
        return int(probe.getsockname()[1])


def documented() -> str:
    """The commands that docs/cluster.md gives, but the last, which would end other Rays, too."""
    text = (ROOT / "docs" / "cluster.md").read_text()
    (block,) = re.findall(r"^```bash two-nodes\n(.*?)^```", text, re.M | re.S)
    *commands, last = block.strip().splitlines()
    assert last.startswith("ray stop")
    return "\n".join(commands)


@pytest.fixture
def folders() -> Iterator[dict[str, Path]]:
    """A folder for each node's own files; whatever still works in them is ended afterwards."""
    # Not pytest's: the names of Unix sockets are short.
    made = {name: Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp")) for name in ("first", "second")}
    yield made
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = " ".join(process.cmdline())
            if any(str(folder) in words for folder in made.values()):
                process.kill()
    for folder in made.values():
        shutil.rmtree(folder, ignore_errors=True)


def trials_run_in(folder: Path) -> int:
    """Tune's actors that a node has had, by the logs that their processes left on it."""
    logs = folder.glob("session_2*/logs/worker-*.out")
    return sum("actor_name:ImplicitFunc" in log.read_text(errors="replace") for log in logs)


@pytest.mark.slow
def test_the_documented_commands_run_a_sweep_on_two_nodes(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    commands = documented().replace("6380", str(free_port())).replace("8270", str(free_port()))
    for name, folder in folders.items():
        commands = commands.replace(f"/tmp/ray-{name}", str(folder))
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SWEEP": str(small_sweep.write(tmp_path / "sweeps")),
        "RESULTS": str(tmp_path / "results"),
        "MLFLOW_TRACKING_URI": "",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=tmp_path,
        env=environment,
        # Not a pipe: Ray's servers outlive the commands and would keep it open.
        stdout=(tmp_path / "log").open("w"),
        stderr=subprocess.STDOUT,
        timeout=540,
    )
    said = (tmp_path / "log").read_text()
    assert done.returncode == 0, said
    assert "2 nodes" in said and said.count("1 CPU, 0 GPUs, shares ") == 2
    trials = parquet.read_table(tmp_path / "results" / "small" / "micro" / "trials.parquet")
    assert trials.column("status").to_pylist() == ["completed"] * 6
    assert all(trials_run_in(folder) for folder in folders.values()), said
