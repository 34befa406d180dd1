"""Every benchmark runs, small, and says what others read of it: one line of JSON, last."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
PEERS = find_spec("trl") is not None
SIDES = ["hidden cache", "sampled cache", "cross-entropy"]
SIDES += ["live", "cache build", "GKDTrainer"] if PEERS else []
STEP = ["--tiny", "--tokens", "64", "--block-length", "32", "--rounds", "1"]
SMALL: dict[str, list[str]] = {
    "distill_step": [*STEP, "--sides", *SIDES],
    "loss_memory": ["--tokens", "512", "1024", "--vocabulary", "8192", "--hidden", "32"],
    "utilisation": STEP,
    "importance_pass": ["--precisions", "fp32", "--blocks", "1", "--block-length", "32"],
    "surgery_memory": ["--tiny"],
    "sharing": ["--only", "tiny", "--tiny-steps", "8"],
    "overhead": ["--trials", "20", "--first", "5"],
    "early_stopping": [],
    "evaluation": ["--limit", "4", "--batch-sizes", "2", "--rounds", "1"],
    "gpu": ["--tiny", "--batch", "1", "--block-length", "32", "--steps", "4", "--rounds", "1"],
}
NAMES: dict[str, set[str]] = {
    "distill_step": {"sampled_cache_cost_vs_cross_entropy"}
    | ({"live_speedup_vs_gkd", "hidden_cache_speedup_vs_gkd"} if PEERS else set()),
    "loss_memory": {"slope_vs_naive"},
    "utilisation": {"fraction_of_peak"},
    "importance_pass": {"cost_vs_forward"},
    "surgery_memory": {"peak_bytes_vs_largest_tensor"},
    "sharing": {"wall_speedup_vs_scripts"},
    "overhead": {"seconds_per_trial", "trials_per_second", "last_tenth_vs_first"},
    "early_stopping": {"tokens_vs_grid", "loss_gap"},
    "evaluation": {"speedup_vs_hflm", "answers_equal"},
    "gpu": {"speedup_vs_gkd_liger", "model_flops_utilisation", "peak_memory_vs_gkd_liger"},
}
ELSEWHERE = {"tracking_cost", "report_page"}  # it has tests of its own; it needs a browser


def start(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "MLFLOW_TRACKING_URI": "", "OMP_NUM_THREADS": "1"},
    )


def test_no_benchmark_is_left_out() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == {*SMALL, *ELSEWHERE}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_benchmark_prints_the_names_that_others_read(
    name: str, artifact: Path, tmp_path: Path
) -> None:
    if name == "sharing" and not PEERS:
        pytest.skip("its scripts need TRL: see benchmarks/requirements-peers.txt")
    arguments = list(SMALL[name])
    if name in ("evaluation", "importance_pass"):
        arguments += ["--model", str(artifact / "model")]
    if name == "evaluation":
        arguments += ["--questions", str(questions(tmp_path))]
    done = start(name, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert set(found) >= NAMES[name]
    if name != "gpu":  # without a GPU, or Liger, there is nothing to say
        assert None not in found.values()


def questions(folder: Path) -> Path:
    """Of words that the tiny model knows."""
    path = folder / "questions.jsonl"
    asked = {"query": "the small dog", "choices": ["sees", "see"], "gold": 0}
    path.write_text(4 * (json.dumps(asked) + "\n"))
    return path


@pytest.mark.slow
@pytest.mark.skipif(PEERS, reason="says what is missing where TRL is not installed")
def test_what_cannot_be_compared_is_refused_in_a_line() -> None:
    done = start("sharing", "--json")
    assert done.returncode == 2
    assert "requirements-peers.txt" in done.stderr and "Traceback" not in done.stderr
