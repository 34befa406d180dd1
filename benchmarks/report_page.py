"""How long a reader waits for report.html.

    OMP_NUM_THREADS=1 python benchmarks/report_page.py --json

A made-up sweep of `--trials` trials (500: three numeric axes, three seeds, questions, curves) is
written as a report and opened from disk in headless Chromium `--repeats` times (5) after one time
that does not count. `open_s` is the median time from the start of the navigation until the page is
loaded, its scripts run and first drawn; `sort_s` and `filter_s` are the medians until a click on a
column, or words typed into the filter, are drawn. `write_s` is what it took to make the page with
its tables and figures, `megabytes` its size. Needs Chromium with its driver (`make browser`).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import browser  # noqa: E402

from orchestrator import report  # noqa: E402
from orchestrator.records import (  # noqa: E402
    TEACHER,
    CurvePoint,
    ItemRecord,
    Records,
    StageRecord,
    TrialRecord,
)

SEEDS, TASKS, QUESTIONS, POINTS = 3, ("arc_easy", "piqa", "winogrande"), 40, 40
KINDS = ("acquire", "importance", "prune", "cache", "distill", "evaluate")


def made_up(trials: int) -> Records:
    """A sweep of that many trials and a teacher: questions, curves and stages of each."""
    draw = random.Random(0)
    made = [_trial(TEACHER, 0, {}, draw)]
    for number in range(trials):
        configuration, seed = divmod(number, SEEDS)
        rate, temperature, keep = configuration % 8, configuration // 8 % 8, configuration // 64
        axes = {
            "distill.training.learning_rate": 1e-4 * 2**rate,
            "distill.loss.temperature": 0.5 + temperature / 4,
            "prune.depth.keep": 0.5 + keep / 16,
        }
        made.append(_trial(f"{number:012x}", seed, axes, draw))
    return Records(
        "made_up",
        "tiny",
        tuple(made),
        stages=tuple(stage for each in made for stage in _stages(each)),
        curves=tuple(point for each in made[1:] for point in _curve(each, draw)),
        items=tuple(item for each in made for item in _items(each, draw)),
    )


def _trial(trial_id: str, seed: int, axes: dict[str, float], draw: random.Random) -> TrialRecord:
    known = {f"accuracy.{task}": draw.random() for task in TASKS}
    losses = ("lm_loss.before", "lm_loss.after", "kd_loss.before", "kd_loss.after")
    return TrialRecord(
        trial_id=trial_id,
        sweep="made_up",
        profile="tiny",
        seed=seed,
        status="completed",
        reason=None,
        baseline=None if axes else TEACHER,
        config={},
        axes=axes,
        parameters=draw.randrange(60_000_000, 130_000_000),
        parameters_non_embedding=50_000_000,
        tokens_trained=1_000_000 if axes else 0,
        metrics={
            **known,
            "accuracy.mean": statistics.fmean(known.values()),
            "accuracy_report.mean": draw.random(),
            **{name: 2 + draw.random() for name in losses},
        },
        cpu_s=60.0,
        gpu_s=0.0,
        wall_s=60 * draw.random(),
        started_at=1_750_000_000.0,
        ended_at=1_750_000_060.0,
    )


def _stages(trial: TrialRecord) -> list[StageRecord]:
    return [
        StageRecord(
            f"{kind}-{trial.trial_id}", trial.trial_id, kind, False, 9, 0, 9, 900, 1000, 1e12
        )
        for kind in KINDS
    ]


def _curve(trial: TrialRecord, draw: random.Random) -> list[CurvePoint]:
    end = draw.random()
    return [
        CurvePoint(trial.trial_id, step, 1000 * step, 100 * step, name, end + 3 * 0.9**step)
        for step in range(1, POINTS + 1)
        for name in ("kd_loss", "lm_loss")
    ]


def _items(trial: TrialRecord, draw: random.Random) -> list[ItemRecord]:
    return [
        ItemRecord(trial.trial_id, task, f"{n:04d}", split, float(draw.random() < 0.5), None)
        for task in TASKS
        for split in ("select", "report")
        for n in range(QUESTIONS)
    ]


OPENED = """
const [load] = performance.getEntriesByType("navigation");
const paint = performance.getEntriesByName("first-contentful-paint")[0];
return Math.max(load.loadEventEnd, paint ? paint.startTime : 0) / 1000;
"""
DRAWN = """
const done = arguments[arguments.length - 1], began = performance.now();
{act}
requestAnimationFrame(() => setTimeout(() => done((performance.now() - began) / 1000)));
"""
SORT = "document.querySelector('#table-trials thead th:nth-child(3) button').click();"
FILTER = """
const field = document.querySelector(".filter input");
field.value = "0.75";
field.dispatchEvent(new Event("input", { bubbles: true }));
"""


def opened(page: Path, repeats: int) -> dict[str, float]:
    """Medians over the repeats, after one that is not counted."""
    with tempfile.TemporaryDirectory() as profile:
        chromium = browser.start(Path(profile))
        try:
            rounds = [_once(chromium, page) for _ in range(repeats + 1)][1:]
        finally:
            chromium.driver.quit()
    names = ("open_s", "sort_s", "filter_s")
    return dict(zip(names, map(statistics.median, zip(*rounds, strict=True)), strict=True))


def _once(chromium: browser.Browser, page: Path) -> tuple[float, float, float]:
    chromium.open(page)
    # The load event's own end is written after it: wait for a frame.
    acts = [
        chromium.driver.execute_async_script(DRAWN.replace("{act}", act))
        for act in ("", SORT, FILTER)
    ]
    return chromium.run(OPENED), acts[1], acts[2]


def main() -> None:
    """Print the times, and with `--json` one line of JSON last."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    if reason := browser.missing():
        sys.exit(reason)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        report.write(made_up(asked.trials), Path(folder), "?", "accuracy.mean", "max", "none")
        page = Path(folder) / "report.html"
        found = {"trials": asked.trials, "write_s": time.perf_counter() - began}
        found |= {"megabytes": page.stat().st_size / 1e6, **opened(page, asked.repeats)}
    for name, value in found.items():
        print(f"{name:>10}  {value:.3g}")
    if asked.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
