"""A sweep that runs for real in seconds: a random Llama of four thin layers, pretrained briefly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

PROFILE: dict[str, Any] = {
    "description": "as small as can be",
    "trial": {
        "source": {
            "kind": "scratch",
            "seed": 0,
            "shape": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 4,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "initializer_range": 0.12,
            },
            "training": {"steps": 40, "batch_size": 4, "learning_rate": 2e-3, "warmup_steps": 4},
        },
        "corpus": {
            "kind": "generated",
            "block_length": 32,
            "training_blocks": 400,
            "calibration_blocks": 8,
            "heldout_blocks": 8,
        },
        "importance": {
            "samples": 8,
            "tasks": [{"kind": "generated", "name": "agreement", "limit": 12}],
        },
        "distill": {
            "training": {"steps": 30, "batch_size": 4, "learning_rate": 2e-3, "warmup_steps": 3}
        },
        "evaluate": {
            "tasks": [
                {"kind": "generated", "name": "agreement", "limit": 40},
                {"kind": "generated", "name": "knowledge", "limit": 40},
            ]
        },
    },
    "resources": {"checkpoint_every_s": 0.2},
}

SWEEP: dict[str, Any] = {
    "name": "small",
    "question": "Does a sweep of the smallest size run to its end?",
    "profile": "micro",
    "trial": {"prune": {"depth": {"keep": 0.5, "criterion": "perplexity"}}},
    "axes": {
        "prune.depth.criterion": ["perplexity", "block_influence"],
        "prune.depth.contiguous": [True, False],
    },
    "baselines": {"random_layers": {"prune": {"depth": {"criterion": "random"}}}},
}


def write(folder: Path, sweep: dict[str, Any] | None = None, name: str = "small") -> Path:
    """The sweep file, with its profile beside it."""
    (folder / "profiles").mkdir(parents=True, exist_ok=True)
    (folder / "profiles" / "micro.yaml").write_text(yaml.safe_dump(PROFILE))
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(sweep or SWEEP, sort_keys=False))
    return path


def command(sweep: Path, results: Path, *options: str) -> list[str]:
    """The command line that runs the sweep."""
    return [
        sys.executable,
        "-m",
        "orchestrator.cli",
        str(sweep),
        "--results",
        str(results),
        *options,
    ]


def run(sweep: Path, results: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the sweep to its end as a user would, from a shell."""
    return subprocess.run(
        command(sweep, results, *options),
        capture_output=True,
        text=True,
        timeout=540,
        env={**os.environ, "MLFLOW_TRACKING_URI": ""},
    )
