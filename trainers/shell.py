"""Any stage by itself from a shell: `python -m trainers.STAGE --config FILE --out DIR`.

The config file (YAML or JSON) holds what `orchestrate plan --json` prints for a stage: its
`config`, its input folders by role under `inputs`, and its `seed`.

Stages that train or score run on several workers, too, which share the work and one folder:

    deepspeed --num_gpus 8 --module trainers.distill --config FILE --out DIR
    torchrun --nproc_per_node 8 -m trainers.distill --config FILE --out DIR

The same command goes on with what is half done in its folder; another config, input or seed needs
another folder.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from trainers.config import (
    CorrectConfig,
    DistillConfig,
    EvaluateConfig,
    ImportanceConfig,
    PretrainConfig,
    content_digest,
    identity,
)
from trainers.contract import (
    Runtime,
    Silent,
    StageContext,
    StageError,
    StageResult,
    read_rows,
    write_rows,
)

ConfigT = TypeVar("ConfigT", bound=BaseModel)
ASKED = "asked.json"
"""Says what the work in a folder was asked to be."""
ON_SEVERAL_WORKERS: frozenset[type[BaseModel]] = frozenset(
    {PretrainConfig, CorrectConfig, DistillConfig, EvaluateConfig, ImportanceConfig}
)
"""The stages that share their work out; of the others every process would do all of it."""


class _Lines:
    """Prints the state of a stage, at most about forty times."""

    def report(self, done: int, total: int, values: Mapping[str, float]) -> None:
        if done == total or done % max(1, total // 40) == 0:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            print(f"{done}/{total}  {shown}", flush=True)


def main(config_type: type[ConfigT], run: Callable[[StageContext[ConfigT]], StageResult]) -> None:
    """Parse the command line, run the stage here, print its result as JSON. Exit 2 on bad input.

    Under a launcher every process gets here: they work together, and the first speaks for all.
    """
    from trainers import workers

    arguments = _arguments(run.__doc__)
    rank, processes = workers.launched()
    try:
        runtime = Runtime(arguments.checkpoint_every)
        context = _context(config_type, arguments.config, arguments.out, runtime)
        _check_workers(config_type, processes)
        asked = _asked(context)
        _check_folder(context.out, asked)
    except (OSError, ValueError, yaml.YAMLError) as error:
        sys.exit(_usage_error(f"{arguments.config}: {error}" if rank == 0 else ""))
    with workers.joined():
        outcome = _run(run, context if rank == 0 else replace(context, reporter=Silent()), asked)
    if rank == 0:
        (arguments.out / "result.json").write_text(json.dumps(outcome))
        print(json.dumps(outcome))


def _arguments(description: str | None) -> argparse.Namespace:
    import torch

    parser = argparse.ArgumentParser(description=description, epilog=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="YAML or JSON: config, inputs")
    parser.add_argument("--out", type=Path, required=True, help="folder that the stage writes into")
    parser.add_argument("--threads", type=int, default=_threads(torch.get_num_threads()))
    parser.add_argument(
        "--checkpoint-every",
        type=float,
        default=Runtime.checkpoint_every_s,
        metavar="SECONDS",
        help="at least so long between two checkpoints (default: %(default)s)",
    )
    # The launchers of torch and DeepSpeed hand this to every process that they start.
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    return arguments


def _threads(usual: int, environment: Mapping[str, str] = os.environ) -> int:
    """This process' part of the machine's cores: processes that all take every core are several
    times slower than one alone. torchrun has divided them already, DeepSpeed has not."""
    here = environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or "1"
    if "OMP_NUM_THREADS" in environment:
        return usual
    return max(1, usual // int(here))


def _check_workers(config_type: type[BaseModel], processes: int) -> None:
    if processes > 1 and config_type not in ON_SEVERAL_WORKERS:
        raise ValueError(
            f"this stage runs on one worker, not on {processes}; on several run "
            + ", ".join(sorted(each.__name__.removesuffix("Config") for each in ON_SEVERAL_WORKERS))
        )


def _asked(context: StageContext[Any]) -> dict[str, Any]:
    """All that decides what the stage computes, by the names that the config file has for it."""
    return {
        "stage": type(context.config).__name__.removesuffix("Config").lower(),
        **{f"config.{name}": value for name, value in identity(context.config).items()},
        **{f"inputs.{role}": _known(folder) for role, folder in context.inputs.items()},
        "seed": context.seed,
    }


def _known(artifact: Path) -> str:
    """An input by what it was asked to be, where a shell made it, else by its place."""
    asked = artifact / ASKED
    return content_digest(asked) if asked.exists() else str(artifact.resolve())


def _check_folder(out: Path, asked: Mapping[str, Any]) -> None:
    """A stage goes on with what it finds half done: let that be its own."""
    if not (out / ASKED).exists() or len(list(out.iterdir())) == 1:
        return
    (found,) = read_rows(out / ASKED)
    names = sorted(name for name in {*asked, *found} if asked.get(name) != found.get(name))
    if names:
        raise ValueError(
            f"{out} holds work with another {', '.join(names)}: name another --out, or remove it"
        )


def _run(
    run: Callable[[StageContext[ConfigT]], StageResult],
    context: StageContext[ConfigT],
    asked: Mapping[str, Any],
) -> dict[str, object]:
    """The stage's result as it is printed. Exit 1 where the stage says why it has none."""
    from trainers import workers

    rank, _processes = workers.rank_and_processes()
    if rank == 0:
        context.out.mkdir(parents=True, exist_ok=True)
        write_rows(context.out / ASKED, [asked])
    workers.wait_for_all()
    try:
        result = run(context)
    except StageError as error:
        print(f"failed{f' on worker {rank}' if rank else ''}: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    return {"metrics": dict(result.metrics), "tokens": result.tokens, "flops": result.flops}


def _usage_error(message: str) -> int:
    if message:
        print(message, file=sys.stderr)
    return 2


def _context(
    config_type: type[ConfigT], path: Path, out: Path, runtime: Runtime
) -> StageContext[ConfigT]:
    described = yaml.safe_load(path.read_text())
    if not isinstance(described, dict) or not {"config"} <= set(described) <= {
        "config",
        "inputs",
        "seed",
    }:
        raise ValueError("needs the keys config and, where the stage has them, inputs and seed")
    try:
        config = config_type.model_validate(described["config"])
    except ValidationError as error:
        raise ValueError(str(error)) from error
    named = described.get("inputs") or {}
    if not isinstance(named, dict) or not all(isinstance(each, str) for each in named.values()):
        raise ValueError("inputs must name a folder for each role")
    seed = described.get("seed") or 0  # a plan says null for a stage that draws nothing
    if not isinstance(seed, int):
        raise ValueError(f"seed must be an integer: {seed!r}")
    inputs = {role: Path(folder) for role, folder in named.items()}
    for role, folder in inputs.items():
        if not any((folder / part).exists() for part in ("model", "scores.jsonl", "cache.json")):
            raise ValueError(f"inputs.{role}: {folder} is no artifact of a stage")
    return StageContext(config, inputs, out, seed, _Lines(), runtime)
