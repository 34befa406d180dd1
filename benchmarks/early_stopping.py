"""What asynchronous successive halving saves, and what it costs in the winner.

    python benchmarks/early_stopping.py --json                    on the recorded curves
    python benchmarks/early_stopping.py --through-ray --json      and one seed for real (4 minutes)
    python benchmarks/early_stopping.py --run --json              on curves made now (20 minutes)

The whole grid of `sweeps/early_stopping.yaml` (16 configurations of the `tiny` profile, 5 seeds,
each with a teacher of its own) measures its held-out loss every 20 steps. For each seed the 16
curves are then told to the judge that a sweep asks, as `--workers` workers of equal speed would
have measured them, and who is stopped is cut off. Training is deterministic, so this is what a
sweep with `scheduler: {method: asha}` does. With `--through-ray` one seed is also run that way,
and every trial that it completes must come to the loss that it has in the whole grid.

`tokens_vs_grid`: tokens of distillation with stopping over tokens without, a mean over seeds.
`loss_gap`: how far the held-out loss of the winner is above that of the grid's winner, as a
fraction of it; the largest of the seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.records import Records, read_parquet
from orchestrator.scheduling import Scheduler
from orchestrator.spec import load
from orchestrator.stopping import HELDOUT, judge_of

ROOT = Path(__file__).parent.parent
SWEEP = ROOT / "sweeps" / "early_stopping.yaml"
RECORDED = ROOT / "results" / "published" / "early_stopping" / "tiny"

Curve = Sequence[tuple[int, float]]
"""Tokens and held-out loss, in order."""


@dataclass(frozen=True)
class Outcome:
    """A seed's search: tokens as a share of the grid's, and the gap of its winner's loss."""

    tokens: float
    gap: float
    stopped: int
    same_winner: bool


def curves_of(records: Records) -> dict[int, dict[str, Curve]]:
    """Seed -> trial id -> curve of the grid's trials."""
    seeds = {t.trial_id: t.seed for t in records.trials if t.baseline is None and t.in_sweep}
    found: dict[int, dict[str, list[tuple[int, float]]]] = {}
    for point in records.curves:
        if point.name == HELDOUT and point.trial_id in seeds:
            by_trial = found.setdefault(seeds[point.trial_id], {})
            by_trial.setdefault(point.trial_id, []).append((point.tokens, point.value))
    return {seed: {t: sorted(c) for t, c in trials.items()} for seed, trials in found.items()}


def stopped_early(curves: Mapping[str, Curve], scheduler: Scheduler, workers: int) -> Outcome:
    """Replay: each worker measures the next point of its trial in turn, then takes another."""
    longest = max(curve[-1][0] for curve in curves.values())
    judge = judge_of(scheduler, longest)
    waiting, running = list(curves), dict[str, int]()
    spent: dict[str, int] = {}
    final: dict[str, float] = {}
    while waiting or running:
        while waiting and len(running) < workers:
            running[waiting.pop(0)] = 0
        for trial, place in list(running.items()):
            tokens, loss = curves[trial][place]
            spent[trial] = tokens
            stop = judge.stops(trial, 0, tokens, loss)
            if place + 1 == len(curves[trial]):
                final[trial] = loss
            if stop or trial in final:
                del running[trial]
            else:
                running[trial] = place + 1
    best = {trial: curve[-1][1] for trial, curve in curves.items()}
    winner, of_grid = min(final, key=lambda t: final[t]), min(best, key=lambda t: best[t])
    return Outcome(
        tokens=sum(spent.values()) / sum(curve[-1][0] for curve in curves.values()),
        gap=(final[winner] - best[of_grid]) / best[of_grid],
        stopped=len(curves) - len(final),
        same_winner=winner == of_grid,
    )


def run_sweep(results: Path, *settings: str) -> Records:
    """Run the sweep as a user would, and read its records."""
    command = [sys.executable, "-m", "orchestrator.cli", str(SWEEP), "--results", str(results)]
    for setting in settings:
        command += ["--set", setting]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return read_parquet(results / "early_stopping" / "tiny")


def check_real(grid: Records, results: Path) -> None:
    """Run one seed with early stopping through Ray: whoever completes came to the same loss."""
    found = run_sweep(results, "scheduler.method=asha", "axes.seed=[0]")
    whole = {trial.trial_id: trial for trial in grid.trials}
    counts = {"completed": 0, "stopped": 0}
    for trial in found.trials:
        if trial.baseline is not None:
            continue
        counts[trial.status] += 1
        if trial.status == "completed":
            loss, known = (t.metrics["lm_loss.after"] for t in (trial, whole[trial.trial_id]))
            assert loss is not None and known is not None and abs(loss - known) < 1e-4
    tokens = sum(t.tokens_trained or 0 for t in found.trials if t.baseline is None)
    mine = [whole[t.trial_id] for t in found.trials if t.baseline is None]
    share = tokens / sum(t.tokens_trained or 0 for t in mine)
    print(f"through Ray, seed 0: {counts}, {share:.3f} of the tokens")


def main() -> None:
    """Measure, print, and with --json one line of JSON last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--curves", type=Path, default=RECORDED, help="folder of a sweep's results")
    parser.add_argument("--run", action="store_true", help="make the curves now")
    parser.add_argument("--through-ray", action="store_true", help="run one seed for real, too")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    scheduler = load(SWEEP).scheduler.model_copy(update={"method": "asha"})
    with tempfile.TemporaryDirectory() as folder:
        grid = Path(folder) / "grid"
        records = run_sweep(grid) if arguments.run else read_parquet(arguments.curves)
        if arguments.through_ray:
            check_real(records, Path(folder) / "asha")
    outcomes = {
        seed: stopped_early(curves, scheduler, arguments.workers)
        for seed, curves in sorted(curves_of(records).items())
    }
    for seed, each in outcomes.items():
        same = "the grid's winner" if each.same_winner else f"a loss {each.gap:.2%} above"
        print(f"seed {seed}: {each.tokens:.3f} of the tokens, {each.stopped} stopped, {same}")
    found = {
        "tokens_vs_grid": statistics.fmean(each.tokens for each in outcomes.values()),
        "loss_gap": max(each.gap for each in outcomes.values()),
    }
    for name, value in found.items():
        print(f"{name:<16} {value:.4f}")
    if arguments.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
