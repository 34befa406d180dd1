"""The benchmark of tracking runs, charges every piece, and leaves no cost out of its sum."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "tracking_cost.py"
STEPS = 12


@pytest.mark.slow
def test_the_fraction_is_the_sum_of_all_that_is_charged() -> None:
    command = [sys.executable, str(BENCHMARK), "--json", "--steps", str(STEPS)]
    done = subprocess.run(
        [*command, "--rounds", "1", "--trials", "2", "--skip-135m"],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    a_step = sum(found[f"{name}_s_a_step"] for name in ("curve", "report", "driver"))
    whole = (a_step + found["trial_s"] / STEPS) / found["step_s"]
    assert found["fraction_of_step"] == pytest.approx(whole)
    assert 0 < found["trial_s"] < 5
    assert found["step_s"] > 0 and found["report_s_a_step"] > 0 and found["curve_s_a_step"] > 0
