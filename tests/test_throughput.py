"""A sweep that times generation: what it refuses, who runs beside whom, what it records."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import made_up
import pytest
import small_sweep

from orchestrator import throughput
from orchestrator.asked import Better, Select, lower_is_better
from orchestrator.demand import demands, shortages
from orchestrator.jobs import Job, JobQueue, make_jobs
from orchestrator.plan import SweepPlan, plan_sweep
from orchestrator.records import Records, TrialRecord, read_parquet
from orchestrator.space import enumerate_trials
from orchestrator.spec import SpecError, Sweep, load
from orchestrator.store import Store
from trainers.config import identity

TIMED: dict[str, Any] = {
    "lengths": [{"input": 4, "output": 3}],
    "batch_sizes": [1, 2],
    "rounds": 2,
}


def sweep_of(timed: dict[str, Any] | None = TIMED, **changes: Any) -> dict[str, Any]:
    """The small sweep, with a benchmark in every trial."""
    sweep = {**copy.deepcopy(small_sweep.SWEEP), **changes}
    if timed is not None:
        sweep["trial"]["benchmark"] = timed
    return sweep


def plan_of(folder: Path, sweep: dict[str, Any], *overrides: str) -> tuple[Sweep, SweepPlan]:
    loaded = load(small_sweep.write(folder, sweep), overrides=overrides)
    return loaded, plan_sweep(loaded, enumerate_trials(loaded))


# --- what is planned ---------------------------------------------------------------------------


def test_a_benchmark_is_the_last_step_beside_the_original_model(tmp_path: Path) -> None:
    _, plan = plan_of(tmp_path, sweep_of())
    teacher, student = plan.trials[0].steps, plan.trials[1].steps
    assert list(student)[-1] == "benchmark" == student["benchmark"].kind
    assert student["benchmark"].inputs == {
        "model": student["distill"].stage_id,
        "teacher": student["source"].stage_id,
    }
    assert set(teacher["benchmark"].inputs.values()) == {teacher["source"].stage_id}


def test_without_a_benchmark_a_trial_is_what_it_was_before_there_were_any(tmp_path: Path) -> None:
    _, without = plan_of(tmp_path, sweep_of(None))
    _, timed = plan_of(tmp_path, sweep_of())
    for plain, with_it in zip(without.trials, timed.trials, strict=True):
        assert "benchmark" not in plain.steps
        assert "benchmark" not in identity(plain.trial.config)
        assert identity(with_it.trial.config)["benchmark"]["rounds"] == 2
        assert plain.trial.trial_id != with_it.trial.trial_id
        rest = {step: node for step, node in with_it.steps.items() if step != "benchmark"}
        assert rest == plain.steps


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("benchmark.rounds=4", {"benchmark"}),
        ("benchmark.warmup=2", {"benchmark"}),
        ("benchmark.precision=bf16", {"benchmark"}),
        ("benchmark.batch_sizes=[1, 4]", {"benchmark"}),
        ("benchmark.teacher_batch_sizes=[1, 1]", {"benchmark"}),
        ("benchmark.lengths=[{input: 4, output: 4}]", {"benchmark"}),
        ("distill.loss.temperature=2.0", {"distill", "after", "benchmark"}),
        ("seeds=[1]", {"cache", "distill", "after", "benchmark"}),
        ("resources.cpus_per_trial=2", set()),
    ],
)
def test_a_setting_changes_the_identity_of_the_benchmark_where_it_determines_it(
    tmp_path: Path, override: str, changed: set[str]
) -> None:
    sweep = sweep_of(axes={}, baselines={})
    before, after = (
        plan_of(tmp_path, sweep, *overrides)[1].trials[1].steps for overrides in ([], [override])
    )
    assert {step for step in before if before[step].stage_id != after[step].stage_id} == changed


def test_the_plan_counts_tokens_flops_and_memory_of_both_models(tmp_path: Path) -> None:
    sweep, plan = plan_of(tmp_path, sweep_of())
    student = plan.trials[1]
    found = demands(student.trial.config, student.steps, sweep.resources)["benchmark"]
    # Two models, three rounds, batches of 1 and 2: a call for one token and one for three.
    assert student.steps["benchmark"].tokens == 2 * 3 * (1 + 2) * ((4 + 1) + (4 + 3))
    assert found.flops == student.steps["benchmark"].flops > 0
    assert found.memory.weights == 4 * student.shape.parameters
    assert found.memory.teacher == 4 * plan.trials[0].shape.parameters
    assert found.memory.activations > 0


def test_the_teacher_is_timed_with_its_own_batches_on_both_sides(tmp_path: Path) -> None:
    _, plan = plan_of(tmp_path, sweep_of({**TIMED, "teacher_batch_sizes": [3, 3]}))
    asked = plan.trials[0].steps["benchmark"].config
    assert (asked["batch_sizes"], asked["teacher_batch_sizes"]) == ([3], None)


def test_where_requests_do_not_fit_a_gpu_the_plan_says_how_many_do(tmp_path: Path) -> None:
    many = {**TIMED, "lengths": [{"input": 1024, "output": 1024}], "batch_sizes": [4096]}
    gpus = ("resources.gpus_per_worker=1", "resources.gpu_memory_gb=0.5")
    sweep, plan = plan_of(tmp_path, sweep_of(many), *gpus)
    trial = plan.trials[1]
    found = demands(trial.trial.config, trial.steps, sweep.resources)
    (short,) = shortages(trial.trial.config, found, sweep.resources)
    assert short.step == "benchmark" and short.then is not None and short.settings is not None
    (setting,) = short.settings
    assert setting == "benchmark.batch_sizes"
    assert "; with benchmark.batch_sizes=[" in short.text(0.5)
    _, fitting = plan_of(tmp_path, sweep_of(many), *gpus, short.remedy)
    trial = fitting.trials[1]
    found = demands(trial.trial.config, trial.steps, sweep.resources)
    assert shortages(trial.trial.config, found, sweep.resources) == []
    assert found["benchmark"].memory.total == short.then


# --- what is refused ---------------------------------------------------------------------------

HEAD = "name: small\nquestion: q\nprofile: micro\n"
REFUSED = {
    "no tokens": ("lengths: [{input: 0, output: 3}]", 8, "must be greater than 0"),
    "no lengths": ("lengths: []", 5, "needs at least one of lengths"),
    "a misspelt key": ("lengths: [{inputs: 4, output: 3}]", 8, "did you mean 'input'?"),
    "no requests": ("batch_sizes: [0]", 8, "must be greater than 0"),
    "one round": ("rounds: 1", 8, "must be at least 2"),
    "fp8 on a CPU": ("precision: fp8", 5, "fp8 needs backend: vllm"),
    "the same twice": ("batch_sizes: [2, 2]", 5, "the same twice"),
    "another number of batches": ("teacher_batch_sizes: [1, 2]", 5, "2 sizes for the 1"),
    "vllm that is not installed": ("backend: vllm", 8, "vllm is not installed"),
    "more tokens than positions": (
        "lengths: [{input: 2000, output: 49}]",
        8,
        "2000 + 49 tokens are more than the model's 2048",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_benchmark_is_refused_with_file_and_line(tmp_path: Path, case: str) -> None:
    setting, line, message = REFUSED[case]
    path = small_sweep.write(tmp_path)
    settings = {"lengths": "[{input: 4, output: 3}]", "batch_sizes": "[1]"}
    settings.pop(setting.partition(":")[0], None)
    block = [f"    {name}: {value}" for name, value in settings.items()]
    while len(block) < 2:
        block.insert(0, "    warmup: 1")
    text = ["trial:", "  benchmark:", *block, f"    {setting}"]
    path.write_text(HEAD + "\n".join(text) + "\n")
    with pytest.raises(SpecError) as raised:
        loaded = load(path)
        plan_sweep(loaded, enumerate_trials(loaded))
    assert any(f"small.yaml:{line}: " in each and message in each for each in raised.value.messages)


def test_vllm_without_a_gpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a machine where it is installed: no engine is started by a plan.
    (tmp_path / "vllm.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    served = {**TIMED, "backend": "vllm", "precision": "fp8"}
    with pytest.raises(SpecError, match=r"precision: fp8 needs a GPU, and resources\.gpus_per_"):
        plan_of(tmp_path, sweep_of(served))
    _, plan = plan_of(tmp_path, sweep_of(served), "resources.gpus_per_worker=1")
    assert plan.trials[1].steps["benchmark"].config["precision"] == "fp8"


def test_a_metric_that_is_not_timed_cannot_choose_the_winner(tmp_path: Path) -> None:
    choosing = {"select": {"metric": "throughput.mean"}}
    with pytest.raises(SpecError, match=r"is not measured: there is no trial\.benchmark"):
        plan_of(tmp_path, sweep_of(None, **choosing))
    plan_of(tmp_path, sweep_of(**choosing))
    choosing["select"]["metric"] = "throughput.in4_out3_b7"
    with pytest.raises(SpecError, match=r"did you mean 'throughput\.in4_out3_b"):
        plan_of(tmp_path, sweep_of(**choosing))


def test_speed_is_best_high_and_waiting_and_memory_are_best_low() -> None:
    assert Select(metric="throughput.mean").mode == "max"
    assert lower_is_better("first_token_ratio.mean") and lower_is_better("teacher_first_token_s.x")
    assert lower_is_better("peak_memory_mb.in4_out3_b1")
    assert not lower_is_better("requests_per_s.in4_out3_b1")


def test_a_profile_gives_one_sweep_seeds_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = {**small_sweep.PROFILE, "seeds": [0], "for_sweep": {"small": {"seeds": [3, 4]}}}
    monkeypatch.setattr(small_sweep, "PROFILE", profile)
    assert load(small_sweep.write(tmp_path)).seeds == (3, 4)
    other = {**small_sweep.SWEEP, "name": "other"}
    assert load(small_sweep.write(tmp_path, other)).seeds == (0,)


# --- who runs beside whom ----------------------------------------------------------------------


def queue_of(folder: Path, sweep: dict[str, Any]) -> JobQueue:
    loaded, plan = plan_of(folder, sweep)
    return JobQueue(make_jobs(plan, set(), Store(folder / "store"), loaded.resources))


def drained(queue: JobQueue, at_once: int) -> list[list[Job]]:
    """Every job handed out, as the sets that ran together; the oldest of them ends first."""
    together: list[list[Job]] = []
    while True:
        while len(queue.running) < at_once and queue.take() is not None:
            together.append(list(queue.running.values()))
        if not queue.running:
            return together
        queue.finish(next(iter(queue.running)), "completed", None)


def test_nothing_runs_beside_a_timing_and_everything_else_runs_in_parallel(tmp_path: Path) -> None:
    queue = queue_of(tmp_path, sweep_of())
    together = drained(queue, at_once=2)
    assert queue.exhausted and not queue.failed
    timings = [jobs for jobs in together if any(job.alone for job in jobs)]
    assert all(len(jobs) == 1 for jobs in timings)
    assert len(timings) == len({jobs[0].job_id for jobs in timings}) == 6
    assert max(len(jobs) for jobs in together) == 2


def test_what_is_timed_was_distilled_by_the_same_trial_before(tmp_path: Path) -> None:
    together = drained(queue_of(tmp_path, sweep_of()), at_once=1)
    jobs = [job for (job,) in together if not job.shared]
    for job in (job for job in jobs if job.alone):
        first = next(each for each in jobs if each.job_id == job.job_id)
        assert not first.alone and first.then == job
        assert (*first.nodes, job.trial.steps["benchmark"]) == job.nodes


def test_a_trial_that_fails_or_is_stopped_is_not_timed(tmp_path: Path) -> None:
    for outcome in ("failed", "stopped"):
        queue = queue_of(tmp_path, sweep_of(axes={}, baselines={}))
        queue.waiting = [job for job in queue.waiting if not job.shared]
        queue.done |= {need for job in queue.waiting for need in job.needs}
        while (job := queue.take()) is not None:
            assert not job.alone
            assert queue.finish(job.job_id, outcome, "why") == []  # type: ignore[arg-type]
        assert queue.exhausted


def test_a_timing_that_several_trials_share_runs_alone_too(tmp_path: Path) -> None:
    sweep = sweep_of(axes={"evaluate.tasks_before": [True, False]}, baselines={})
    together = drained(queue_of(tmp_path, sweep), at_once=2)
    (shared,) = [jobs for jobs in together if any(job.alone and job.shared for job in jobs)]
    assert [job.nodes[0].kind for job in shared] == ["benchmark"]
    assert len([jobs for jobs in together if any(job.alone for job in jobs)]) == 2, "the teacher's"


def test_a_sweep_without_timings_has_no_job_in_two_parts(tmp_path: Path) -> None:
    queue = queue_of(tmp_path, sweep_of(None))
    assert not any(job.alone or job.then for job in queue.waiting)


# --- a sweep that runs -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep that distils and times, with two workers, chosen by speed."""
    folder = tmp_path_factory.mktemp("timed")
    claim = {
        "text": "Fewer layers are faster",
        "better": {"prune.depth.keep": 1},
        "than": {"baseline": "teacher"},
        "metric": "throughput.mean",
        "published": "2.7 times",
    }
    sweep = sweep_of(
        axes={"prune.depth.keep": [1, 3], "seed": [0, 1]},
        baselines={},
        select={"metric": "throughput.mean"},
        claims=[claim],
    )
    done = small_sweep.run(
        small_sweep.write(folder, sweep), folder / "results", "--max-concurrent", "2"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_the_stages_of_a_sweep_never_overlap_a_timing(finished: Path) -> None:
    folder = finished / "results" / "small" / "micro"
    store = Store(finished / "results" / "artifacts")
    ids = {stage.stage_id for stage in read_parquet(folder).stages}
    ran = [manifest for each in ids if (manifest := store.manifest(each)) is not None]
    timings = [each for each in ran if each.kind == "benchmark"]
    assert len(timings) == 5  # the teacher is pretrained with one seed
    for timing in timings:
        for other in ran:
            apart = other.ended_at <= timing.started_at or timing.ended_at <= other.started_at
            assert other is timing or apart, f"{other.kind} ran beside a timing"


@pytest.mark.slow
def test_timings_are_metrics_like_any_other(finished: Path) -> None:
    folder = finished / "results" / "small" / "micro"
    records = read_parquet(folder)
    for trial in records.trials:
        assert trial.status == "completed"
        for name in ("throughput.in4_out3_b2", "throughput.mean", "tokens_per_s.in4_out3_b1"):
            assert math.isfinite(trial.metrics[name]) and trial.metrics[name] > 0
        assert {"lm_loss.after", "accuracy.mean"} <= set(trial.metrics)
        mine = [stage for stage in records.stages if stage.trial_id == trial.trial_id]
        assert mine[-1].kind == "benchmark"
        assert len({stage.stage_id for stage in mine}) == len(mine), "each stage is told once"
        assert trial.cpu_s == pytest.approx(sum(stage.cpu_s for stage in mine))
    written = (folder / "tables" / "throughput.md").read_text()
    assert "4 \N{RIGHTWARDS ARROW} 3, batch 2" in written and "2.7 times" in written
    assert '"throughput.mean"' in (folder / "best.json").read_text()


@pytest.mark.slow
def test_the_same_command_times_nothing_again(finished: Path) -> None:
    path = finished / "results" / "small" / "micro" / "trials.parquet"
    before = path.read_bytes()
    done = small_sweep.run(finished / "small.yaml", finished / "results")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 of them done already" in done.stdout
    assert path.read_bytes() == before


# --- the table ---------------------------------------------------------------------------------


def timed_records() -> Records:
    """Made-up trials whose first criterion is twice as fast as the teacher, and one untimed."""
    records = made_up.records()

    def timed(trial: TrialRecord) -> TrialRecord:
        speed = {None: 1.0, "perplexity": 2.0, "block_influence": 1.5}.get(
            trial.axes.get("prune.depth.criterion")
        )
        if speed is None or trial.status != "completed" or trial.baseline == "random_layers":
            return trial
        speed += trial.seed / 10
        ratios = {"throughput.in64_out32_b4": speed, "throughput.in64_out32_b16t4": 2 * speed}
        means = {"throughput.mean": 1.4 * speed, "peak_memory_ratio.mean": 0.5}
        return replace(trial, metrics={**trial.metrics, **ratios, **means})

    return replace(records, trials=tuple(map(timed, records.trials)))


CLAIM = Better(
    text="Half of the layers are faster",
    better={"prune.depth.criterion": ["perplexity"]},
    than={"baseline": "teacher"},
    metric="throughput.mean",
    published="2.7",
)


def test_the_table_has_ratios_by_load_and_the_published_figure_beside_its_configuration() -> None:
    (table,) = throughput.tables(timed_records(), (CLAIM,))
    header = [column.header for column in table.columns]
    loads = [name for name in header if "batch" in name]
    arrow = "\N{RIGHTWARDS ARROW}"
    assert loads == [f"64 {arrow} 32, batch 4", f"64 {arrow} 32, batch 16 (teacher 4)"]
    rows = {row[0]: dict(zip(header, row, strict=True)) for row in table.rows}
    assert len(rows) == 3, "what was not timed has no row"
    first = next(row for name, row in rows.items() if "perplexity" in str(name))
    assert first[loads[0]] == pytest.approx(2.05) and first["seeds"] == 2
    assert [row["published"] for row in rows.values()] == [None, "2.7", None]
    assert first["first token"] is None, "what was not measured is missing, and not 0"


def test_a_sweep_that_times_nothing_has_no_such_table() -> None:
    assert throughput.tables(made_up.records(), (CLAIM,)) == ()
