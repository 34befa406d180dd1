"""`orchestrate verify`: which row is meant, which trial that is today, and whether it came out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import made_up
import pytest
import small_sweep
from click.testing import CliRunner, Result

from orchestrator import verifying
from orchestrator.cli import app
from orchestrator.ledger import Ledger
from orchestrator.plan import plan_trial
from orchestrator.records import (
    CurvePoint,
    ItemRecord,
    Records,
    TrialRecord,
    read_parquet,
    write_parquet,
)
from orchestrator.space import Trial, enumerate_trials, next_rung
from orchestrator.spec import SpecError, load
from orchestrator.verifying import CannotVerifyError, Compared, Row
from trainers.config import for_record

TOLERANCE = 0.02


# --- which row -------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Made-up records of a sweep, published and the user's own, and of another profile."""
    records = made_up.records(questions=4)
    write_parquet(records, tmp_path / "published" / "depth_ablation" / "made_up")
    write_parquet(records, tmp_path / "depth_ablation" / "made_up")
    return tmp_path


def test_the_beginning_of_an_id_is_enough_and_published_rows_come_first(results: Path) -> None:
    row = verifying.find(results, "task-1")
    assert row.trial.trial_id == "task-1"
    assert row.folder == results / "published" / "depth_ablation" / "made_up"
    assert row.also == (results / "depth_ablation" / "made_up",)
    assert verifying.find(results, "perplexity-1").trial.trial_id == "perplexity-1"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("perplexety-0", "no trial perplexety-0 is recorded; nearest: perplexity-0"),
        ("task", "task may be any of 3 trials: task-0, task-1, task-2"),
        ("", "may be any of 10 trials"),
    ],
)
def test_an_id_that_is_none_or_several_is_refused(results: Path, wanted: str, message: str) -> None:
    with pytest.raises(CannotVerifyError, match=message):
        verifying.find(results, wanted)


def test_where_nothing_is_recorded_nothing_can_be_verified(tmp_path: Path) -> None:
    with pytest.raises(CannotVerifyError, match="no sweep has recorded anything"):
        verifying.find(tmp_path, "0")


def test_damaged_records_are_refused_by_name(results: Path) -> None:
    (results / "depth_ablation" / "made_up" / "trials.parquet").write_bytes(b"PAR1 no more PAR1")
    with pytest.raises(CannotVerifyError, match=r"trials.parquet cannot be read"):
        verifying.find(results, "task-0")


# --- which trial that is today ---------------------------------------------------------------


def recorded(
    folder: Path, sweep: dict[str, Any] | None = None, status: str = "completed", **profile: Any
) -> list[Row]:
    """A row for each trial of a sweep that ran in `folder`, without having run."""
    path = small_sweep.write(folder / "sweeps", sweep)
    asked = load(path, None, [f"{key}={json.dumps(value)}" for key, value in profile.items()])
    place = folder / "results" / asked.name / asked.profile
    place.mkdir(parents=True)
    (place / "sweep.yaml").write_text(asked.dump_yaml(relative_to=place))
    trials = list(enumerate_trials(asked).trials)
    for number in range(1, len(asked.scheduler.rungs)):
        first = [trial for trial in trials if trial.rung == 0]
        trials += list(next_rung(asked, first, number))
    records = Records(asked.name, asked.profile, tuple(_row_of(each, status) for each in trials))
    return [Row(place, trial, records) for trial in records.trials]


def _row_of(trial: Trial, status: str) -> TrialRecord:
    like = made_up.trial("task", trial.seed, 0, {})
    return replace(
        like,
        trial_id=trial.trial_id,
        baseline=trial.baseline,
        config=for_record(trial.config),
        axes=dict(trial.axes),
        status=status,  # type: ignore[arg-type]
        reason="the disk was full" if status == "failed" else None,
        metrics={},
    )


RACE = {
    **small_sweep.SWEEP,
    "select": {"metric": "lm_loss.after"},
    "scheduler": {
        "method": "race",
        "rungs": [
            {"name": "short", "set": {"distill.training.steps": 12}, "keep": 1},
            {"name": "full"},
        ],
    },
}


@pytest.mark.parametrize("sweep", [small_sweep.SWEEP, RACE], ids=["grid", "race"])
def test_every_row_leads_back_to_its_own_trial(tmp_path: Path, sweep: dict[str, Any]) -> None:
    for row in recorded(tmp_path, sweep):
        rebuilt = verifying.rebuild(row, tmp_path)
        assert rebuilt.plan.trial.trial_id == row.trial.trial_id
        assert for_record(rebuilt.plan.trial.config) == row.trial.config
        assert rebuilt.note is None


def older(row: Row, config: Mapping[str, Any]) -> Row:
    """The row as if an earlier version had made it from these settings."""
    return replace(row, trial=replace(row.trial, trial_id="0123456789ab", config=config))


def test_a_row_of_an_earlier_version_runs_by_its_own_settings_and_both_ids_are_named(
    tmp_path: Path,
) -> None:
    row = recorded(tmp_path)[1]
    config = {key: value for key, value in row.trial.config.items() if key != "correct"}
    config["distill"] = {**config["distill"], "training": {"steps": 7, "batch_size": 4,
                         "learning_rate": 0.001}}  # fmt: skip
    rebuilt = verifying.rebuild(older(row, config), tmp_path)
    trial = rebuilt.plan.trial
    assert trial.config.distill is not None and trial.config.distill.training.steps == 7
    assert trial.trial_id not in ("0123456789ab", row.trial.trial_id)
    assert rebuilt.note is not None
    assert "0123456789ab" in rebuilt.note and trial.trial_id in rebuilt.note
    assert "correct" in rebuilt.note


def test_a_row_whose_axes_are_gone_runs_by_its_own_settings(tmp_path: Path) -> None:
    row = recorded(tmp_path)[1]
    trial = replace(row.trial, axes={"distill.training.steps": 30})
    rebuilt = verifying.rebuild(replace(row, trial=trial), tmp_path)
    assert rebuilt.plan.trial.trial_id == row.trial.trial_id


def test_settings_that_are_no_more_are_refused_with_the_trial_that_is_asked_for_now(
    tmp_path: Path,
) -> None:
    row = recorded(tmp_path)[1]
    with pytest.raises(SpecError) as refused:
        verifying.rebuild(older(row, {**row.trial.config, "flavour": "sweet"}), tmp_path)
    assert "flavour: unknown key" in str(refused.value)
    assert "earlier version" in str(refused.value) and row.trial.trial_id in str(refused.value)


def test_a_row_that_failed_has_nothing_to_be_held_against(tmp_path: Path) -> None:
    row = recorded(tmp_path, status="failed")[1]
    with pytest.raises(SpecError, match=r"failed \(the disk was full\)"):
        verifying.rebuild(row, tmp_path)


def test_stages_that_are_computed_otherwise_now_are_named(tmp_path: Path) -> None:
    row = recorded(tmp_path)[1]
    asked = load(row.folder / "sweep.yaml")
    trial = next(
        each for each in enumerate_trials(asked).trials if each.trial_id == row.trial.trial_id
    )
    nodes = plan_trial(asked, trial).steps
    like = made_up.stages_of(made_up.trial("task", 0, 0, {}))[0]
    ran = [
        replace(like, trial_id=trial.trial_id, stage_id=node.stage_id)
        for step, node in nodes.items()
        if step != "after"
    ]
    before = replace(row, records=replace(row.records, stages=tuple(ran)))
    assert verifying.rebuild(before, tmp_path).note == (
        "computed by an earlier version of these stages: after"
    )


def with_text(folder: Path, text: str) -> dict[str, Any]:
    """A sweep that scores layers on text in files."""
    folder.mkdir(exist_ok=True)
    for name in ("train.txt", "heldout.txt"):
        (folder / name).write_text(text)
    corpus = {"kind": "text", "train": str(folder / "train.txt"), "block_length": 16,
              "heldout": str(folder / "heldout.txt"), "calibration_blocks": 8}  # fmt: skip
    trial = {**small_sweep.SWEEP["trial"], "importance": {"corpus": corpus}}
    return {**small_sweep.SWEEP, "trial": trial}


def test_files_are_known_again_by_their_content_and_not_by_their_place(tmp_path: Path) -> None:
    row = recorded(tmp_path, with_text(tmp_path / "text", "some text"))[1]
    config = {key: value for key, value in row.trial.config.items() if key != "correct"}
    rebuilt = verifying.rebuild(older(row, config), tmp_path)
    assert rebuilt.plan.trial.trial_id == row.trial.trial_id


def test_a_file_that_has_changed_is_named(tmp_path: Path) -> None:
    row = recorded(tmp_path, with_text(tmp_path / "text", "some text"))[1]
    with_text(tmp_path / "text", "some other text")
    with pytest.raises(SpecError, match=r"made with .*train.txt@sha256:.*does not lead to"):
        verifying.rebuild(row, tmp_path)


def test_a_file_that_is_not_here_is_named(tmp_path: Path) -> None:
    row = recorded(tmp_path, with_text(tmp_path / "text", "some text"))[1]
    (tmp_path / "text" / "train.txt").unlink()
    with pytest.raises(SpecError, match=r"no file '.*train\.txt'"):
        verifying.rebuild(row, tmp_path)


# --- whether it came out ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def records() -> Records:
    return made_up.records()


def row_of(records: Records, trial_id: str) -> Row:
    trial = next(each for each in records.trials if each.trial_id == trial_id)
    return Row(Path("made_up"), trial, records)


def again(row: Row, **metrics: float | None) -> Records:
    """A second run that measured the same, but for these metrics."""
    changed = {name.replace("__", "."): value for name, value in metrics.items()}
    return replace(row.own, trials=(replace(row.trial, metrics={**row.trial.metrics, **changed}),))


def compared(row: Row, now: Records, tolerance: float = TOLERANCE) -> dict[str, Compared]:
    return {each.name: each for each in verifying.compare(row, now, tolerance)}


@pytest.mark.parametrize("trial_id", ["teacher-0", "perplexity-0", "random_layers-1"])
def test_what_is_the_same_is_inside_and_bit_equal(records: Records, trial_id: str) -> None:
    row = row_of(records, trial_id)
    found = compared(row, again(row), tolerance=0.0)
    assert {"parameters", "lm_loss.after", "accuracy.mean"} <= set(found)
    assert all(each.inside and each.bit_equal for each in found.values())
    asked, points = verifying.answers(row, row.own), verifying.curve(row, row.own)
    assert asked.recorded == asked.both == asked.same == asked.bit_equal > 0
    assert points.recorded == points.bit_equal


def test_an_accuracy_is_held_against_the_bootstrap_over_its_questions(records: Records) -> None:
    row = row_of(records, "teacher-0")
    value = row.trial.metrics["accuracy.mean"]
    assert value is not None
    found = compared(row, again(row, accuracy__mean=value - 0.01), 0.0)["accuracy.mean"]
    assert found.by == "questions" and found.inside and not found.bit_equal
    share = sum(item.correct for item in row.own.items) / len(row.own.items)
    error = (share * (1 - share) / 180) ** 0.5
    assert found.recorded - found.low == pytest.approx(2 * error, rel=0.5)
    assert found.high <= 1
    assert not compared(row, again(row, accuracy__mean=value - 0.15))["accuracy.mean"].inside


def test_a_perplexity_among_the_tasks_is_held_against_its_own_interval(records: Records) -> None:
    row = row_of(records, "teacher-0")
    values = [20.0 + place % 11 for place in range(44)]
    items = [
        ItemRecord("teacher-0", "wikitext", f"{place:04d}", "select", value, None)
        for place, value in enumerate(values)
    ]
    trial = replace(row.trial, metrics={**row.trial.metrics, "accuracy.wikitext": 25.0})
    mine = replace(row.records, trials=(trial,), items=(*row.own.items, *items))
    asked = replace(row, trial=trial, records=mine)
    found = compared(asked, again(asked), tolerance=0.0)
    perplexity = found["accuracy.wikitext"]
    assert perplexity.inside and perplexity.bit_equal
    assert 23 < perplexity.low < 25 < perplexity.high < 27
    alone = compared(row, again(row), tolerance=0.0)["accuracy.mean"]
    assert found["accuracy.mean"] == alone


@pytest.mark.parametrize("metric", ["lm_loss.after", "accuracy.mean"])
def test_where_seeds_are_further_apart_the_interval_is_that_of_two_runs(
    records: Records, metric: str
) -> None:
    row, other = row_of(records, "perplexity-0"), row_of(records, "perplexity-1")
    found = compared(row, again(row), tolerance=0.0)[metric]
    there = other.trial.metrics[metric]
    assert found.by == "seeds" and there is not None
    # t of one degree of freedom, times sqrt 2, times a standard deviation of |difference| / sqrt 2.
    assert found.recorded - found.low == pytest.approx(
        12.706 * abs(there - found.recorded), rel=1e-3
    )
    assert found.low <= there <= found.high, "another seed is inside"


def test_rows_of_other_settings_that_are_asked_for_no_more_widen_no_interval(
    records: Records,
) -> None:
    row = row_of(records, "perplexity-0")
    before = compared(row, again(row))["lm_loss.after"]
    earlier = [
        replace(
            t, trial_id=f"earlier-{t.seed}", in_sweep=False, metrics={"lm_loss.after": 9.0 + t.seed}
        )
        for t in records.trials
        if t.trial_id.startswith("perplexity")
    ]
    crowded = replace(records, trials=(*records.trials, *earlier))
    assert compared(Row(row.folder, row.trial, crowded), again(row))["lm_loss.after"] == before


def test_the_tolerance_stands_where_there_are_no_seeds_and_is_the_least_there_is(
    records: Records,
) -> None:
    row = row_of(records, "teacher-0")
    found = compared(row, again(row, lm_loss__after=1.9 * 1.019))["lm_loss.after"]
    assert found.by == "tolerance" and found.inside
    assert not compared(row, again(row, lm_loss__after=1.9 * 1.021))["lm_loss.after"].inside
    for each in compared(row, again(row), tolerance=0.1).values():
        if each.by != "exact":
            assert each.low <= 0.9001 * each.recorded
            assert each.high >= min(1.0, 1.0999 * each.recorded)


def test_a_model_of_another_size_did_not_come_out(records: Records) -> None:
    row = row_of(records, "perplexity-0")
    now = again(row)
    larger = replace(now, trials=(replace(now.trials[0], parameters=540_001),))
    found = compared(row, larger)["parameters"]
    assert found.by == "exact" and not found.inside


def test_a_metric_that_is_not_measured_any_more_is_outside(records: Records) -> None:
    row = row_of(records, "perplexity-0")
    assert not compared(row, again(row, kd_loss__after=None))["kd_loss.after"].inside


def test_speed_and_memory_are_not_judged(records: Records) -> None:
    row = row_of(records, "perplexity-0")
    timed = {"throughput.mean": 1.8, "first_token_s.in64_out32_b4": 0.1, "peak_memory_mb.b": 900.0}
    before = replace(row, trial=replace(row.trial, metrics={**row.trial.metrics, **timed}))
    assert not set(timed) & set(compared(before, again(row)))


def test_answers_that_turned_and_margins_that_moved_are_counted(records: Records) -> None:
    row = row_of(records, "task-0")
    first, second, *others = row.own.items
    turned = replace(first, correct=1.0 - first.correct)
    moved = replace(second, score=(second.score or 0.0) + 1e-12)
    asked = verifying.answers(row, replace(row.own, items=(turned, moved, *others)))
    assert asked.recorded == asked.both == len(row.own.items)
    assert asked.same == asked.recorded - 1 and asked.bit_equal == asked.recorded - 2


def test_a_stopped_trial_is_held_against_its_curve_at_the_step_where_it_stopped(
    records: Records,
) -> None:
    row = row_of(records, "task-0")

    def heldout(step: int, value: float) -> CurvePoint:
        return CurvePoint("task-0", step, 768 * step, 0, "heldout_loss", value)

    stopped = replace(
        row.trial, status="stopped", tokens_trained=30_720, metrics={"lm_loss.stopped": 2.5}
    )
    before = Row(
        row.folder,
        stopped,
        replace(row.records, curves=(heldout(20, 2.9), heldout(40, 2.5))),
    )
    now = replace(again(row), curves=(heldout(20, 2.9), heldout(40, 2.51), heldout(80, 2.0)))
    found = compared(before, now)
    assert found["lm_loss.stopped"].now == 2.51 and found["lm_loss.stopped"].inside
    assert "tokens_trained" not in found, "it was stopped early, and its second run was not"


# --- the command -----------------------------------------------------------------------------


def verify(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


def test_help_shows_examples_and_says_what_the_exit_status_means() -> None:
    result = verify("--help")
    assert "orchestrate verify 6a73daded564" in result.output
    assert "Exit status" in result.output


def test_what_cannot_be_begun_is_one_message_and_exit_2(results: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (["taks-0", "--results", results], "nearest: task-0"),
        (["task-2", "--results", results], "failed"),
        (["task-0", "--results", results], "sweep.yaml"),
        (["task-0", "--results", results / "none"], "no sweep has recorded"),
    ):
        result = verify(*arguments)
        assert result.exit_code == 2 and message in result.output


def test_a_folder_that_holds_something_is_not_run_in(tmp_path: Path) -> None:
    row = recorded(tmp_path)[1]
    write_parquet(row.records, row.folder)
    used = tmp_path / "used"
    used.mkdir()
    (used / "artifacts").mkdir()
    wanted = row.trial.trial_id
    result = verify(wanted, "--results", tmp_path / "results", "--keep", used)
    assert result.exit_code == 2 and "is not empty" in result.output


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_row_comes_out_from_nothing_bit_by_bit_and_a_changed_one_does_not(tmp_path: Path) -> None:
    grid = {**small_sweep.SWEEP, "axes": {"prune.depth.criterion": ["perplexity"]}, "baselines": {}}
    sweep, results = small_sweep.write(tmp_path / "sweeps", grid), tmp_path / "results"
    assert small_sweep.run(sweep, results).returncode == 0
    folder = results / "small" / "micro"
    records = read_parquet(folder)
    student = next(each for each in records.trials if each.baseline is None)
    kept = tmp_path / "kept"
    done = small_sweep.run(Path("verify"), results, student.trial_id[:8], "--keep", str(kept))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    equal = len(student.metrics) + 3
    assert lines[-1] == (
        f"{student.trial_id}: {equal} of {equal} values within their intervals, {equal} of them "
        "bit-equal"
    )
    assert "questions answered the same: 80 of 80" in done.stdout
    second = read_parquet(kept / "small" / "micro")
    assert second.trials[0].metrics == student.metrics
    assert not any(stage.cached for stage in second.stages), "nothing was reused"
    assert set(Ledger(folder / "ledger.jsonl").trials()) == {t.trial_id for t in records.trials}

    loss = student.metrics["lm_loss.after"]
    assert loss is not None
    changed = replace(student, metrics={**student.metrics, "lm_loss.after": loss * 1.1})
    others = tuple(each if each is not student else changed for each in records.trials)
    write_parquet(replace(records, trials=others), folder)
    done = small_sweep.run(Path("verify"), results, student.trial_id)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith("outside: lm_loss.after")
