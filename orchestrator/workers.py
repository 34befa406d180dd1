"""One stage on several workers: Ray Train's TorchTrainer inside the Tune trial that runs the job.

Every worker runs the stage's own entry point; the engine finds the process group that Ray Train
has made. What the workers came to is left in files beside the artifact, so that a failure is told
in the stage's words and not in Ray's.
"""

from __future__ import annotations

import json
import math
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.execute import Costs, Launched, entry_point, reason_of
from orchestrator.faults import InfrastructureError, explain, is_infrastructure
from orchestrator.stages import STAGES
from orchestrator.steps import StageNode
from trainers.contract import (
    DamagedInputError,
    Interrupted,
    Runtime,
    StageContext,
    StageError,
    StageResult,
)

LOOKS = 500
"""About how often in a stage the workers agree whether to report and whether to stop."""
REPORT_EVERY_S = 4.0
"""A report waits for Ray Train's controller, which looks every two seconds."""
ANSWER = "worker{}.json"
WAITING_CPU = 0.01
"""What a job takes that only waits for its workers; Tune refuses 0."""
REASON_LENGTH = 300
"""Of what Ray says of a dead worker: the rest is in the log."""


@dataclass(frozen=True)
class Workers:
    """How many processes train together, what each of them gets, and for which job."""

    count: int
    cpus: int
    gpus: float
    stop_file: str
    early_stop_file: str
    job_id: str


def launch(node: StageNode, context: StageContext[Any], workers: Workers) -> Launched:
    """The stage's result, with the costs of all its workers. Raises `StageError` where one failed,
    `InfrastructureError` where one was lost, `Interrupted` where the sweep was asked to stop."""
    from ray import train
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    work = {
        "node": asdict(node),
        "inputs": {role: str(path) for role, path in context.inputs.items()},
        "out": str(context.out),
        "workers": asdict(workers),
        "runtime": asdict(context.runtime),
    }
    _forget(context.out)
    # The job that waits for the workers holds a little, too, and all must fit the machine's cores.
    resources = {"CPU": workers.cpus - WAITING_CPU}
    if workers.gpus:
        resources["GPU"] = workers.gpus
    with tempfile.TemporaryDirectory(prefix="orchestrate-train-") as scratch:
        trainer = TorchTrainer(
            _work,
            train_loop_config=work,
            torch_config=_no_group(),
            scaling_config=train.ScalingConfig(
                num_workers=workers.count,
                use_gpu=workers.gpus > 0,
                resources_per_worker=resources,
            ),
            run_config=train.RunConfig(
                storage_path=scratch,
                callbacks=[TuneReportCallback()],
                # By default a controller that cannot start its workers tries for ever.
                failure_config=train.FailureConfig(max_failures=0, controller_failure_limit=0),
            ),
        )
        error: Exception | None = None
        try:
            trainer.fit()
        except Exception as raised:  # the workers' own answers say more, where there are any
            error = raised
    found = {rank: _answer(context.out, rank) for rank in range(workers.count)}
    _forget(context.out)
    answers = {rank: answer for rank, answer in found.items() if answer}
    return _result(answers, workers.count, error)


def _result(answers: Mapping[int, dict[str, Any]], count: int, error: Exception | None) -> Launched:
    # A worker that fails leaves an answer: who left none was lost, by a kill or with its node.
    failures: Mapping[int, Exception] = getattr(error, "worker_failures", {})
    lost = sorted(set(failures) - set(answers))
    told = [answer for answer in answers.values() if answer["outcome"] == "failed"]
    if lost:
        what = str(failures[lost[0]]).strip().splitlines()[-1:]
        reason = f"worker {lost[0] + 1} of {count} died: {' '.join(what)}"
        raise InfrastructureError(reason[:REASON_LENGTH]) from error
    if told:
        # Where one worker fails, the others fail for want of it: the first to fail has the reason.
        # They may well lose their connections, and clocks differ: a failure of its own comes first.
        first = min(told, key=lambda answer: (answer["machine"], answer["ended_at"]))
        if first["damaged"]:
            raise DamagedInputError(first["damaged"], first["reason"])
        raise (InfrastructureError if first["machine"] else StageError)(first["reason"])
    if error is not None:
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = f"the workers failed: {' '.join(lines[:2])}"
        raise InfrastructureError(reason[:REASON_LENGTH]) from error
    if any(answer["outcome"] == "interrupted" for answer in answers.values()):
        raise Interrupted
    if len(answers) < count:
        raise InfrastructureError(f"only {len(answers)} of {count} workers came to an end")
    costs = Costs(
        cpu_s=sum(answer["cpu_s"] for answer in answers.values()),
        gpu_s=sum(answer["gpu_s"] for answer in answers.values()),
        peak_rss_mb=max(answer["peak_rss_mb"] for answer in answers.values()),
    )
    return Launched(StageResult(**answers[0]["result"]), costs)


def _answer(out: Path, rank: int) -> dict[str, Any] | None:
    """None where the worker left none, or was killed or out of disk while it wrote."""
    try:
        answer: dict[str, Any] = json.loads((out / ANSWER.format(rank)).read_text())
    except (FileNotFoundError, ValueError):
        return None
    return answer


def _forget(out: Path) -> None:
    for path in out.glob(ANSWER.format("*")):
        path.unlink()


def _no_group() -> Any:
    """Has Ray Train start the workers and leave it to them to make one process group."""
    from ray.train.backend import Backend
    from ray.train.torch import TorchConfig

    class NoGroup(Backend):  # type: ignore[misc]
        share_cuda_visible_devices = True  # as Ray Train's own for PyTorch

    class Workers(TorchConfig):  # type: ignore[misc]
        @property
        def backend_cls(self) -> type[NoGroup]:
            return NoGroup

    return Workers()


# --- in each worker --------------------------------------------------------------------------


def _work(work: Mapping[str, Any]) -> None:
    """What Ray Train runs in every worker: the stage, with its outcome in a file."""
    import torch
    from ray import train

    torch.set_num_threads(work["workers"]["cpus"])
    rank, out = train.get_context().get_world_rank(), Path(work["out"])
    node = StageNode(**work["node"])
    stage = STAGES[node.kind]
    context: StageContext[Any] = StageContext(
        config=stage.config.model_validate(node.config),
        inputs={role: Path(folder) for role, folder in work["inputs"].items()},
        out=out,
        seed=node.seed or 0,
        reporter=_Together(node.kind, Workers(**work["workers"])),
        runtime=Runtime(**work["runtime"]),
    )
    meter = Costs.meter()
    answer: dict[str, Any] = {"outcome": "completed", "damaged": None, "result": None}
    try:
        with _process_group("nccl" if work["workers"]["gpus"] else "gloo"):
            answer["result"] = asdict(entry_point(stage.entry_point)(context))
    except Interrupted:
        answer["outcome"] = "interrupted"
    except Exception as error:
        damaged = error.role if isinstance(error, DamagedInputError) else None
        machine = damaged is None and is_infrastructure(error)
        reason = explain(error, out) if machine else reason_of(error)
        answer |= {"outcome": "failed", "reason": reason, "damaged": damaged, "machine": machine}
        raise  # so that Ray ends the other workers, which may be waiting for this one
    finally:
        used = (answer["result"] or {}).get("gpu_s", 0.0)
        costs = asdict(meter(used)) | {"ended_at": time.time()}
        with suppress(OSError):
            (out / ANSWER.format(rank)).write_text(json.dumps(answer | costs))


@contextmanager
def _process_group(backend: str) -> Iterator[None]:
    """While open, the workers are one process group of torch.distributed.

    Made by itself, its store would listen on every address of the first worker's machine. Here it
    listens on that of its Ray node: 127.0.0.1 where Ray is of this machine alone.
    """
    import ray
    from ray import train
    from ray.train.collective import broadcast_from_rank_zero
    from torch import distributed
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    context = train.get_context()
    rank, processes = context.get_world_rank(), context.get_world_size()
    door = socket.create_server((ray.util.get_node_ip_address(), 0)) if rank == 0 else None
    host, port = broadcast_from_rank_zero(door.getsockname()[:2] if door else None)
    store = TCPStore(
        host, port, processes, rank == 0, master_listen_fd=door.detach() if door else None
    )
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
    }
    distributed.init_process_group(backend, store=store, rank=rank, world_size=processes)
    yield
    # Not where a worker failed: the others may be waiting for it, and Ray is about to end them.
    distributed.destroy_process_group()


class _Together:
    """Reports now and then, and what was measured always, on all workers at the same steps, and
    stops all of them at the same."""

    def __init__(self, kind: str, workers: Workers) -> None:
        self._kind, self._job_id = kind, workers.job_id
        self._stop_files = [Path(workers.stop_file), Path(workers.early_stop_file)]
        self._told = -math.inf

    def report(self, done: int, total: int, values: Mapping[str, float]) -> None:
        """See `trainers.contract.Reporter`."""
        import torch
        from ray import train

        measured = "heldout_loss" in values
        if done % max(1, total // LOOKS) and done != total and not measured:
            return
        now = time.monotonic()
        # Clocks differ and the file may appear between two looks: what one sees, all do.
        seen = (any(file.exists() for file in self._stop_files), now - self._told > REPORT_EVERY_S)
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        flags = torch.tensor(seen, dtype=torch.float32, device=device)
        torch.distributed.all_reduce(flags)
        stop, due = (bool(flag) for flag in flags.tolist())
        if due or measured:
            self._told = now
            progress = json.dumps([self._kind, done, total, dict(values)])
            train.report({"job_id": self._job_id, "progress": progress})
        if stop:
            raise Interrupted
