"""Any stage by itself from a shell: `python -m trainers.STAGE --config FILE --out DIR`.

The config file (YAML or JSON) holds what `orchestrate plan --json` prints for a stage: its
`config`, its input folders by role under `inputs`, and its `seed`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from trainers.contract import Runtime, StageContext, StageError, StageResult

ConfigT = TypeVar("ConfigT", bound=BaseModel)


class _Lines:
    """Prints the state of a stage, at most about forty times."""

    def report(self, done: int, total: int, values: Mapping[str, float]) -> None:
        if done == total or done % max(1, total // 40) == 0:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            print(f"{done}/{total}  {shown}", flush=True)


def main(config_type: type[ConfigT], run: Callable[[StageContext[ConfigT]], StageResult]) -> None:
    """Parse the command line, run the stage here, print its result as JSON. Exit 2 on bad input."""
    import torch

    parser = argparse.ArgumentParser(description=run.__doc__, epilog=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="YAML or JSON: config, inputs")
    parser.add_argument("--out", type=Path, required=True, help="folder that the stage writes into")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    # The launchers of torch and DeepSpeed hand this to every process that they start.
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        context = _context(config_type, arguments.config, arguments.out, arguments.threads)
    except (OSError, ValueError, yaml.YAMLError) as error:
        sys.exit(_usage_error(f"{arguments.config}: {error}"))
    try:
        result = run(context)
    except StageError as error:
        print(f"failed: {error}", file=sys.stderr)
        sys.exit(1)
    if os.environ.get("RANK", "0") == "0":  # under a launcher every process gets here
        outcome = {"metrics": dict(result.metrics), "tokens": result.tokens, "flops": result.flops}
        (arguments.out / "result.json").write_text(json.dumps(outcome))
        print(json.dumps(outcome))


def _usage_error(message: str) -> int:
    print(message, file=sys.stderr)
    return 2


def _context(
    config_type: type[ConfigT], path: Path, out: Path, threads: int
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
        if not (folder / "model").is_dir() and not (folder / "scores.jsonl").is_file():
            raise ValueError(f"inputs.{role}: {folder} is no artifact of a stage")
    out.mkdir(parents=True, exist_ok=True)
    return StageContext(config, inputs, out, seed, _Lines(), Runtime(threads=threads))
