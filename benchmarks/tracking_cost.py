"""What MLflow and the ledger take from a step of training.

    OMP_NUM_THREADS=1 python benchmarks/tracking_cost.py --json

A trial of the `tiny` profile (240 steps of 768 tokens) is distilled in a Ray Tune worker, as in a
sweep, with nothing said of it (off) and with all (on), in turns; both must come to the same loss. A
difference of one percent between two runs would drown in their noise, so each piece of the tracking
is metered by itself, in CPU seconds of all threads:

    curve    keeping the training curve, and writing it at the end (in the worker)
    report   telling the driver how far the trial is, every four seconds at most (in the worker)
    driver   what the driver and Ray's own processes use more while the worker reports than while it
             does not: taking the report in, and passing it on. The few reports of a trial drown in
             what Ray does anyway, so the cost of one is measured at eight times as many (often)
    trial    once a trial: reading its measurements, writing them and its stages to the ledger, each
             line flushed to disk, and the whole run with its curves to MLflow (sqlite, the default)

`fraction_of_step` is the sum of all four, shared by the steps of a trial, over the CPU seconds of a
step. `fraction_of_step_135m` is the same for the cheapest step there is with SmolLM2-135M: 1,024
tokens, bf16, 11 of its 30 layers, cross-entropy without a teacher, 50 steps a trial.

Printed, and left out of the fractions, as it is paid once a sweep and not by any step: importing
MLflow and making its database (`start_s`), and showing report, tables and figures (`finish_s`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil

from orchestrator import execute, plan, report, space, spec, tracking, tuning
from orchestrator.ledger import Ledger
from orchestrator.plan import TrialPlan
from orchestrator.records import StageRecord
from orchestrator.steps import StageNode
from orchestrator.store import Store
from orchestrator.tracking import Mirror
from trainers.contract import Runtime, StageContext

SWEEP = Path(__file__).parent.parent / "sweeps" / "depth_ablation.yaml"
SHORT_TEACHER = ("source.training.steps=20", "source.training.warmup_steps=2")
"""What the student is distilled from costs the same, however well it was taught."""
STEPS_135M = 50
"""Steps of a trial in the profile `smollm2`."""
TOKENS_135M, BLOCK_135M = 1024, 256

RUNTIME = Runtime(checkpoint_every_s=1e9)


# --- in the worker ---------------------------------------------------------------------------


class Meter:
    """A sink of progress: notes when steps end, and what passing each on costs. CPU seconds."""

    def __init__(self, sink: execute.Sink | None) -> None:
        self._sink = sink
        self.ended: list[float] = []
        self.cost = 0.0

    def __call__(self, stage: str, done: int, total: int, values: Mapping[str, float]) -> None:
        """A step has ended."""
        began = time.process_time()
        self.ended.append(began)
        if self._sink is not None:
            self._sink(stage, done, total, values)
            self.cost += time.process_time() - began


@dataclass(frozen=True)
class Distilled:
    """One run of the trial: CPU seconds of its steps and of its reports, and what it came to."""

    mode: str
    step_s: float
    report_s: float
    wall_s: float
    loss: float


def alternate(config: Mapping[str, Any]) -> None:
    """The Tune trial: distils off and on in turns, and tells the driver when it begins which."""
    import torch
    from ray import tune

    torch.set_num_threads(1)
    usual, found = tuning.REPORT_EVERY_S, []
    # The first run is not counted: Ray still starts processes beside it.
    for mode in ("warm-up", *("off", "on", "often", "often", "on", "off") * config["rounds"]):
        tune.report({"phase": mode, "pid": os.getpid()})
        tuning.REPORT_EVERY_S = tuning.LOOK_EVERY_S if mode == "often" else usual
        found.append(asdict(_distil(mode, config)))
    tune.report({"phase": "end", "pid": os.getpid(), "found": json.dumps(found)})


def _distil(mode: str, config: Mapping[str, Any]) -> Distilled:
    nothing = Path(config["store"]) / "no-such-file"
    throttled = tuning._Throttled("trial", nothing, nothing)
    meter = Meter(throttled if mode in ("on", "often") else None)
    node, store = StageNode(**json.loads(config["node"])), Store(Path(config["store"]))
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as out:
        result = execute.launch_here(node, _context(node, store, Path(out), meter)).result
    wall_s = time.monotonic() - began
    # The first step also pays for what later ones reuse; the cost of a report is not the step's.
    steps = [late - early for early, late in zip(meter.ended[1:], meter.ended[2:], strict=False)]
    return Distilled(mode, statistics.median(steps), meter.cost, wall_s, result.metrics["loss"])


def _context(node: StageNode, store: Store, out: Path, sink: execute.Sink) -> StageContext[Any]:
    from orchestrator.stages import STAGES

    return StageContext(
        config=STAGES[node.kind].config.model_validate(node.config),
        inputs={role: store.path(stage_id) for role, stage_id in node.inputs.items()},
        out=out,
        seed=node.seed or 0,
        reporter=execute._StageReporter(node.kind, sink),
        runtime=RUNTIME,
    )


# --- in the driver ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Reporting:
    """What a trial's steps and reports cost, in CPU seconds. `driver_s` is for all of a trial."""

    step_s: float
    report_s: float
    driver_s: float
    wall_s: float


def _rest_of_the_machine(worker: int) -> float:
    """CPU seconds of this process and of those that Ray started, but for the worker."""
    me = psutil.Process()
    others = [child for child in me.children(recursive=True) if child.pid != worker]
    used = 0.0
    for process in (me, *others):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        used += times.user + times.system
    return used


@dataclass(frozen=True)
class Mark:
    """When a phase began, and until then: the CPU seconds that all but the worker had used, and how
    many reports had come."""

    phase: str
    used_s: float
    at_s: float
    reports: int


@dataclass(frozen=True)
class Phase:
    """CPU seconds a second that all but the worker use, and reports a trial."""

    rate: float
    reports: float

    @classmethod
    def of(cls, marks: Sequence[Mark], phase: str) -> Phase:
        """Over all trials of the phase."""
        spans = [(begin, end) for begin, end in pairwise(marks) if begin.phase == phase]
        used = sum(end.used_s - begin.used_s for begin, end in spans)
        reports = sum(end.reports - begin.reports for begin, end in spans)
        return cls(used / sum(end.at_s - begin.at_s for begin, end in spans), reports / len(spans))


def _watch(marks: list[Mark], found: list[Distilled]) -> Any:
    """Tune's callback: notes the CPU clock at every change of phase, as the driver does its work of
    reading reports."""
    from ray.tune import Callback

    class Watch(Callback):  # type: ignore[misc]
        reports = 0

        def on_trial_result(self, *_: Any, result: Mapping[str, Any], **__: Any) -> None:
            if "phase" in result:
                used = _rest_of_the_machine(result["pid"])
                marks.append(Mark(result["phase"], used, time.monotonic(), self.reports))
                found.extend(Distilled(**row) for row in json.loads(result.get("found", "[]")))
            elif "progress" in result:
                self.reports += 1
                json.loads(result["progress"])

    return Watch()


def measure_reporting(node: StageNode, store: Store, rounds: int) -> Reporting:
    """Distil in a worker of Ray Tune, off and on in turns."""
    from ray import tune

    marks: list[Mark] = []
    found: list[Distilled] = []
    given = {"store": str(store.root), "node": json.dumps(asdict(node)), "rounds": rounds}
    with tuning._ray(None, False), tuning._scratch() as scratch:
        ended = tune.Tuner(
            tune.with_resources(alternate, {"cpu": 1}),
            param_space=given,
            run_config=tune.RunConfig(
                storage_path=str(scratch),
                callbacks=[_watch(marks, found)],
                verbose=0,
                log_to_file=False,
            ),
        ).fit()
    if ended.errors:
        raise ended.errors[0]
    assert len({run.loss for run in found}) == 1, [run.loss for run in found]
    told = [run for run in found if run.mode == "on"]
    off, on, often = (Phase.of(marks, mode) for mode in ("off", "on", "often"))
    often_s = statistics.mean(run.wall_s for run in found if run.mode == "often")
    return Reporting(
        step_s=statistics.median(run.step_s for run in found if run.mode == "off"),
        report_s=statistics.mean(run.report_s for run in told),
        driver_s=max(0.0, often.rate - off.rate) * often_s / often.reports * on.reports,
        wall_s=statistics.mean(run.wall_s for run in told),
    )


def measure_curve(folder: Path, steps: int) -> float:
    """CPU seconds of keeping a trial's curve and writing it."""
    from trainers.engine import _Curve

    began = time.process_time()
    curve = _Curve(folder / "curve.jsonl", 0, steps, {})
    for step in range(1, steps + 1):
        curve.add(step, step * 768, {"loss": 1.0 + 1.0 / step}, 1e-3)
    curve.flush()
    return time.process_time() - began


@dataclass(frozen=True)
class Writing:
    """CPU seconds of ledger and MLflow: once a trial, and once a sweep before and after."""

    trial_s: float
    start_s: float
    finish_s: float


def _cpu_of(what: Callable[[], Any]) -> float:
    began = time.process_time()
    what()
    return time.process_time() - began


def measure_writing(
    trial: TrialPlan, stages: Sequence[StageRecord], store: Store, results: Path, trials: int
) -> Writing:
    """Record a finished trial as the driver does, under many ids."""
    folder = results / "sweep" / "tiny"
    ledger = Ledger(folder / "ledger.jsonl")
    mirror = Mirror(
        tracking.tracking_uri(results),
        tracking.artifact_location(results),
        "sweep",
        "tiny",
        "name: sweep\n",
        ledger.tracked,
    )

    def record(number: int) -> None:
        found = execute.collect(trial, store, stages, "sweep", "tiny")
        trial_id = f"trial-{number}"
        for stage in stages:
            ledger.stage(replace(stage, trial_id=trial_id))
        ended = replace(found.trial, trial_id=trial_id)
        ledger.trial(ended, found.curves, found.items)
        mirror.trial(ended, found.curves)
        deadline = time.monotonic() + 60
        while mirror.written <= number:
            assert time.monotonic() < deadline, mirror.close()
            time.sleep(0.005)

    first, *each = [_cpu_of(partial(record, number)) for number in range(trials + 1)]
    trial_s = statistics.mean(each)
    records = ledger.records("sweep", "tiny")
    report.write(records, folder, "What does it cost?", "accuracy.mean", "max", "orchestrate …")
    mirror.finish(folder, records)
    problems: list[str] = []
    finish_s = _cpu_of(lambda: problems.extend(mirror.close()))
    assert not problems, problems
    return Writing(trial_s, first - trial_s, finish_s)


# --- the trial -------------------------------------------------------------------------------


def plan_trial(steps: int | None) -> TrialPlan:
    """A trial of the `tiny` profile."""
    overrides = [*SHORT_TEACHER, *([f"distill.training.steps={steps}"] if steps else [])]
    sweep = spec.load(SWEEP, "tiny", overrides)
    trials = space.enumerate_trials(sweep).trials
    chosen = next(t for t in trials if t.axes.get("prune.depth.criterion") == "block_influence")
    return plan.plan_trial(sweep, chosen)


@dataclass(frozen=True)
class Made:
    """What a process that trains leaves: the records of the trial's stages, and CPU seconds of
    keeping its curve."""

    stages: list[StageRecord]
    curve_s: float


def make(folder: Path, steps: int | None) -> Made:
    """Run the trial's stages. In a process of its own: the driver of a sweep holds no torch, and
    what it holds, Python's garbage collector walks through."""
    trial, store = plan_trial(steps), Store(folder)
    trial_id = trial.trial.trial_id
    made = [
        execute.run_stage(node, store, trial_id, "benchmark", Meter(None), RUNTIME)
        for node in trial.steps.values()
    ]
    return Made(made, measure_curve(folder, trial.steps["distill"].config["training"]["steps"]))


def step_135m(rounds: int) -> float:
    """CPU seconds of a step of the cheapest kind, in a process of its own."""
    import distill_step

    with tempfile.TemporaryDirectory() as folder:
        setting = distill_step.Setting(
            folder=Path(folder),
            steps=rounds + distill_step.WARM_UP,
            batch_size=TOKENS_135M // BLOCK_135M,
            block_length=BLOCK_135M,
            precision="bf16",
            threads=1,
        )
        distill_step.make_models(setting.folder, "depth", tiny=False)
        side = distill_step.Side("cross-entropy", setting)
        try:
            for _ in range(setting.steps):
                side.step()
        finally:
            side.close()
    return side.median


# --- the figures -----------------------------------------------------------------------------


@contextmanager
def quiet_mlflow() -> Iterator[None]:
    """The default store, whatever server the user has."""
    before = os.environ.pop("MLFLOW_TRACKING_URI", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before


def main() -> None:
    """Measure, print a table, and with --json one line of JSON last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=2, help="of a trial off, on, often, often, on, off"
    )
    parser.add_argument("--trials", type=int, default=20, help="that are recorded")
    parser.add_argument("--steps", type=int, help="of a trial; the profile's own by default")
    parser.add_argument("--skip-135m", action="store_true", help="tiny alone")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, quiet_mlflow():
        folder = Path(scratch)
        trial, store = plan_trial(arguments.steps), Store(folder / "artifacts")
        node = trial.steps["distill"]
        steps = node.config["training"]["steps"]
        with ProcessPoolExecutor(1, get_context("spawn")) as apart:
            made = apart.submit(make, store.root, arguments.steps).result()
        reporting = measure_reporting(node, store, arguments.rounds)
        writing = measure_writing(trial, made.stages, store, folder, arguments.trials)
        curve_s = made.curve_s
    found = {
        "fraction_of_step": fraction(reporting, curve_s, writing, steps, reporting.step_s),
        "step_s": reporting.step_s,
        "curve_s_a_step": curve_s / steps,
        "report_s_a_step": reporting.report_s / steps,
        "driver_s_a_step": reporting.driver_s / steps,
        "trial_s": writing.trial_s,
        "start_s": writing.start_s,
        "finish_s": writing.finish_s,
    }
    if not arguments.skip_135m:
        cpu_s = step_135m(rounds=3)
        # Reports come by the second, so what they cost a step goes with its length; one thread that
        # has a core to itself takes as long as it computes.
        longer = cpu_s * steps / reporting.wall_s
        slower = replace(
            reporting,
            report_s=reporting.report_s * longer * STEPS_135M / steps,
            driver_s=reporting.driver_s * longer * STEPS_135M / steps,
        )
        found["step_s_135m"] = cpu_s
        found["fraction_of_step_135m"] = fraction(
            slower, curve_s / steps * STEPS_135M, writing, STEPS_135M, cpu_s
        )
    for name, value in found.items():
        print(f"{name:<24} {value:.3g}")
    if arguments.json:
        print(json.dumps(found))


def fraction(
    reporting: Reporting, curve_s: float, writing: Writing, steps: int, step_s: float
) -> float:
    """All that tracking costs a trial, over what its steps cost."""
    paid = curve_s + reporting.report_s + reporting.driver_s + writing.trial_s
    return paid / (steps * step_s)


if __name__ == "__main__":
    main()
