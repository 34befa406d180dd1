"""What a trial costs that has nothing left to do.

    OMP_NUM_THREADS=1 python benchmarks/overhead.py --json

A tiny sweep runs once. Then `--trials` trials (5,000) whose every stage is stored already go
through the same machinery: Ray Tune hands them to warm workers, these find their stages in the
store, the driver reads what they measured, writes ledger lines, each flushed to disk, and the
MLflow mirror writes their runs. Nothing is trained.

`seconds_per_trial` is the wall time between the first and the last end, a trial, of the first
`--first` trials; `trials_per_second` is over all; `last_tenth_vs_first` compares the time of the
last tenth with that of the first; `driver_growth_mb_per_1000` is the slope of the driver's
resident memory from the second tenth on. Start-up (Ray, workers) is printed, and left out of the
rest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from orchestrator import cli, plan, space, spec, tracking, tuning
from orchestrator.jobs import Job
from orchestrator.ledger import Ledger
from orchestrator.plan import TrialPlan
from orchestrator.store import Store

SWEEP = Path(__file__).parent.parent / "sweeps" / "depth_ablation.yaml"
SHORT = (
    "source.training.steps=4",
    "source.training.warmup_steps=1",
    "distill.training.steps=4",
    "distill.training.warmup_steps=1",
    "corpus.heldout_blocks=8",
    "evaluate.tasks_before=false",
    "evaluate.tasks=[{kind: generated, name: agreement, limit: 20}]",
    "axes.seed=[0]",
    "axes.prune.depth.criterion=[block_influence]",
)
"""Training of a few steps: the trials that follow find it done."""


@dataclass
class Clock:
    """Watches the queue: when each trial ended, and how much memory the driver held then."""

    began: float = field(default_factory=time.perf_counter)
    ends: list[float] = field(default_factory=list)
    memory_mb: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def waits(self, reason: str) -> None:
        """See `tuning.Watcher`."""

    def started(self, job_id: str) -> None:
        """See `tuning.Watcher`."""

    def advanced(
        self, job_id: str, stage: str, done: int, total: int, values: Mapping[str, float]
    ) -> None:
        """See `tuning.Watcher`."""

    def finished(self, job_id: str, outcome: str, reason: str | None) -> None:
        """See `tuning.Watcher`."""
        self.ends.append(time.perf_counter())
        self.memory_mb.append(psutil.Process().memory_info().rss / 1e6)
        if outcome != "completed":
            self.failures.append(f"{job_id}: {outcome} {reason}")
        if len(self.ends) % 500 == 0:
            print(f"{len(self.ends)} trials after {self.ends[-1] - self.began:.0f} s", flush=True)


def prepare(results: Path) -> TrialPlan:
    """Run a sweep of a moment, and give a trial of it whose stages are all stored."""
    arguments = [str(SWEEP), "--results", str(results)]
    for setting in SHORT:
        arguments += ["--set", setting]
    with redirect_stdout(sys.stderr):
        try:
            cli.app(arguments, standalone_mode=False)
        except SystemExit as stop:
            assert not stop.code, stop.code
    sweep = spec.load(SWEEP, None, SHORT)
    planned = plan.plan_sweep(sweep, space.enumerate_trials(sweep))
    return next(each for each in planned.trials if each.trial.baseline is None)


def copies(of: TrialPlan, trials: int, cpus: int) -> list[Job]:
    """The same trial under many names."""
    made = []
    for number in range(trials):
        name = f"{number:012x}"
        trial = replace(of, trial=replace(of.trial, trial_id=name))
        made.append(Job(name, trial, tuple(of.steps.values()), False, frozenset(), cpus))
    return made


def run(trials: int, folder: Path) -> Clock:
    """Run them all; gives the clock that watched."""
    results = folder / "results"
    stored = prepare(results)
    place = tuning.Place(
        "overhead", "tiny", results / "overhead" / "tiny", Store(results / "artifacts")
    )
    place.folder.mkdir(parents=True)
    ledger = Ledger(place.folder / "ledger.jsonl")
    uri = f"sqlite:///{results / 'mlflow.db'}"
    mirror = tracking.Mirror(uri, results / "mlartifacts", "overhead", "tiny", "", ledger.tracked)
    clock = Clock()
    resources = spec.Resources()
    tuning.run(copies(stored, trials, 1), place, ledger, mirror, clock, resources)
    mirror.close(timeout_s=1)
    assert not clock.failures, clock.failures[:3]
    assert len(ledger.finished_trials()) == trials
    return clock


def figures(clock: Clock, first: int) -> dict[str, float]:
    """The numbers of the module's docstring."""
    ends, count = clock.ends, len(clock.ends)
    tenth = max(2, count // 10)
    opening = ends[min(first, count) - 1] - ends[0]
    start_mb, end_mb = (
        statistics.median(clock.memory_mb[tenth : 2 * tenth]),
        statistics.median(clock.memory_mb[-tenth:]),
    )
    return {
        "seconds_per_trial": opening / (min(first, count) - 1),
        "trials_per_second": (count - 1) / (ends[-1] - ends[0]),
        "last_tenth_vs_first": (ends[-1] - ends[-tenth]) / (ends[tenth - 1] - ends[0]),
        "driver_growth_mb_per_1000": (end_mb - start_mb) / (count * 0.8) * 1000,
        "driver_mb": end_mb,
        "start_s": ends[0] - clock.began,
    }


def main() -> None:
    """Measure, print, and with --json one line of JSON last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=5000)
    parser.add_argument("--first", type=int, default=200, help="trials of seconds_per_trial")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = figures(run(arguments.trials, Path(folder)), arguments.first)
    _print(found)
    if arguments.json:
        print(json.dumps(found))


def _print(found: Mapping[str, Any]) -> None:
    for name, value in found.items():
        print(f"{name:<28} {value:10.3f}")


if __name__ == "__main__":
    main()
