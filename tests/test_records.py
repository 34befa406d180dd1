"""The ledger survives a kill at any moment; ledger, records and parquet say the same."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import made_up
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.ledger import Ledger
from orchestrator.records import (
    SCHEMA_VERSION,
    CurvePoint,
    ItemRecord,
    Records,
    StageRecord,
    TrialRecord,
    read_parquet,
    write_parquet,
)

RECORDS = made_up.records(questions=5)
ORDER = [trial.trial_id for trial in RECORDS.trials]
PARQUET = ("trials", "stages", "curves", "items", "importance")


def fill(ledger: Ledger, records: Records = RECORDS) -> Ledger:
    ledger.scores(records.scores)
    for trial in records.trials:
        for stage in records.stages:
            if stage.trial_id == trial.trial_id:
                ledger.stage(stage)
        ledger.trial(
            trial,
            [point for point in records.curves if point.trial_id == trial.trial_id],
            [item for item in records.items if item.trial_id == trial.trial_id],
        )
    return ledger


def read(ledger: Ledger, order: list[str] = ORDER) -> Records:
    return ledger.records("depth_ablation", "made_up", order)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return fill(Ledger(tmp_path / "new" / "ledger.jsonl"))


def a_trial(**changes: Any) -> TrialRecord:
    return replace(RECORDS.trials[1], **changes)


# --- ledger ---


def test_a_ledger_read_again_gives_the_records_that_went_in(ledger: Ledger) -> None:
    again = read(Ledger(ledger.path))
    assert again.trials == RECORDS.trials
    assert again.stages == RECORDS.stages
    assert again.curves == RECORDS.curves
    assert again.items == RECORDS.items
    assert set(again.scores) == set(RECORDS.scores)


def test_the_order_of_trials_is_the_given_one_and_the_unknown_come_last(ledger: Ledger) -> None:
    first = ORDER[5]
    ids = [trial.trial_id for trial in read(ledger, [first]).trials]
    assert ids == [first, *sorted(set(ORDER) - {first})]


def test_a_ledger_without_a_file_is_empty_and_makes_none(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert ledger.finished_trials() == set()
    assert read(ledger) == Records("depth_ablation", "made_up")
    assert not ledger.path.exists()


@pytest.mark.parametrize("cut", [1, 2, 10, 200])
def test_a_line_cut_off_by_a_kill_costs_only_itself(ledger: Ledger, cut: int) -> None:
    whole = ledger.path.read_bytes()
    ledger.trial(a_trial(trial_id="lost"))
    ledger.path.write_bytes(ledger.path.read_bytes()[: len(whole) + cut])

    after = Ledger(ledger.path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(after).trials == RECORDS.trials
        after.trial(a_trial(trial_id="next"))
        assert [t.trial_id for t in read(after).trials] == [*ORDER, "next"]
        assert [t.trial_id for t in read(Ledger(ledger.path)).trials] == [*ORDER, "next"]


def test_a_last_line_that_lacks_only_its_line_feed_counts(ledger: Ledger) -> None:
    ledger.path.write_bytes(ledger.path.read_bytes().removesuffix(b"\n"))
    after = Ledger(ledger.path)
    assert read(after).trials == RECORDS.trials
    after.trial(a_trial(trial_id="next"))
    assert len(read(after).trials) == len(read(Ledger(ledger.path)).trials) == len(ORDER) + 1


@pytest.mark.parametrize("damage", [b'{"event":"tri', b"\xff\x00", b"[]", b'{"event":"trial"}'])
def test_a_damaged_line_in_the_middle_is_left_out_with_its_number(
    ledger: Ledger, damage: bytes
) -> None:
    lines = ledger.path.read_bytes().split(b"\n")
    lines[2:2] = [damage]
    ledger.path.write_bytes(b"\n".join(lines))
    with pytest.warns(UserWarning, match=r"ledger\.jsonl: line 3 is damaged"):
        assert read(Ledger(ledger.path)).trials == RECORDS.trials


def test_a_failed_trial_tried_again_leaves_nothing_of_the_first_attempt(ledger: Ledger) -> None:
    failed = RECORDS.trials[-1]
    assert failed.trial_id not in ledger.finished_trials()
    ledger.trial(replace(failed, status="completed", reason=None, metrics={"lm_loss.after": 2.0}))
    assert failed.trial_id in ledger.finished_trials()
    (again,) = [t for t in read(ledger).trials if t.trial_id == failed.trial_id]
    assert (again.status, again.metrics) == ("completed", {"lm_loss.after": 2.0})


def test_a_stage_found_in_the_store_does_not_replace_the_run_that_was_paid_for(
    ledger: Ledger,
) -> None:
    stage = RECORDS.stages[0]
    assert not stage.cached
    ledger.stage(replace(stage, cached=True, cpu_s=0.0))
    # The order of a trial's stages is that in which they were last named.
    assert set(read(ledger).stages) == set(RECORDS.stages)
    shared = next(each for each in RECORDS.stages if each.cached)
    ledger.stage(replace(shared, cached=False, cpu_s=3.0))
    assert sum(not s.cached for s in read(ledger).stages) == 1 + sum(
        not s.cached for s in RECORDS.stages
    )


def test_another_reader_sees_what_is_appended_after_it_opened(ledger: Ledger) -> None:
    other = Ledger(ledger.path)
    before = other.finished_trials()
    ledger.trial(a_trial(trial_id="next"))
    assert other.finished_trials() == before | {"next"}


def test_the_mlflow_run_is_known_by_trial_and_for_the_whole_sweep(ledger: Ledger) -> None:
    ledger.tracked(ORDER[0], "run-0")
    ledger.tracked(None, "parent")
    assert read(ledger).trials[0].mlflow_run_id == "run-0"
    assert ledger.tracked_runs() == {ORDER[0]: "run-0", None: "parent"}


def test_what_is_not_finite_is_no_number(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    trial = a_trial(metrics={"lm_loss.after": math.nan, "kd_loss.after": math.inf, "x": 1.0})
    point = replace(RECORDS.curves[0], value=math.nan)
    item = replace(RECORDS.items[0], score=-math.inf)
    ledger.trial(trial, [point], [item])
    records = read(ledger)
    assert records.trials[0].metrics == {"x": 1.0}
    assert (records.curves, records.items[0].score) == ((), None)
    write_parquet(replace(RECORDS, trials=(trial,)), tmp_path)
    table = pq.read_table(tmp_path / "trials.parquet")
    assert table["metric.lm_loss.after"].to_pylist() == [None]


def test_a_failed_trial_has_a_reason_and_no_metrics() -> None:
    with pytest.raises(ValueError, match="no metrics"):
        a_trial(status="failed", reason="out of memory")
    with pytest.raises(ValueError, match="without a reason"):
        a_trial(status="failed", metrics={})


TEXT = st.text(max_size=8)
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
COUNT = st.integers(min_value=0, max_value=2**62)
PLAIN = st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), NUMBER, TEXT)
VALUE = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3), max_leaves=4)
TRIAL = st.builds(
    TrialRecord,
    trial_id=TEXT,
    sweep=TEXT,
    profile=TEXT,
    seed=COUNT,
    status=st.sampled_from(["completed", "stopped"]),
    reason=st.none() | TEXT,
    baseline=st.none() | TEXT,
    config=st.dictionaries(TEXT, VALUE, max_size=3),
    axes=st.dictionaries(st.sampled_from(["a", "b.c", "b.d"]), VALUE, max_size=3),
    parameters=st.none() | COUNT,
    parameters_non_embedding=st.none() | COUNT,
    tokens_trained=st.none() | COUNT,
    metrics=st.dictionaries(st.sampled_from(["lm_loss.after", "x", "y z"]), NUMBER, max_size=3),
    cpu_s=NUMBER,
    gpu_s=NUMBER,
    wall_s=NUMBER,
    started_at=st.integers(0, 2**42).map(lambda ms: ms / 1000),
    ended_at=st.integers(0, 2**42).map(lambda ms: ms / 1000),
    mlflow_run_id=st.none() | TEXT,
    dropped_layers=st.none() | st.lists(COUNT, max_size=3).map(tuple),
    in_sweep=st.booleans(),
)
POINT = st.builds(CurvePoint, TEXT, COUNT, COUNT, COUNT, TEXT, NUMBER)
ITEM = st.builds(
    ItemRecord, TEXT, TEXT, TEXT, st.sampled_from(["select", "report"]), NUMBER, st.none() | NUMBER
)
STAGE = st.builds(
    StageRecord, TEXT, TEXT, TEXT, st.booleans(), NUMBER, NUMBER, NUMBER, NUMBER, COUNT, NUMBER
)
TRIALS = st.lists(TRIAL, max_size=4, unique_by=lambda trial: trial.trial_id)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    trials=TRIALS,
    points=st.lists(POINT, max_size=3),
    items=st.lists(ITEM, max_size=3),
    stages=st.lists(STAGE, max_size=3, unique_by=lambda s: (s.trial_id, s.stage_id)),
)
def test_any_record_comes_back_equal_from_ledger_and_parquet(
    tmp_path_factory: pytest.TempPathFactory,
    trials: list[TrialRecord],
    points: list[CurvePoint],
    items: list[ItemRecord],
    stages: list[StageRecord],
) -> None:
    folder = tmp_path_factory.mktemp("any")
    ledger = Ledger(folder / "ledger.jsonl")
    for trial in trials:
        mine = [replace(point, trial_id=trial.trial_id) for point in points]
        ledger.trial(trial, mine, [replace(item, trial_id=trial.trial_id) for item in items])
    for stage in stages:
        ledger.stage(stage)
    records = Ledger(ledger.path).records("s", "p", [trial.trial_id for trial in trials])
    assert list(records.trials) == trials
    assert sorted(records.stages, key=str) == sorted(stages, key=str)
    write_parquet(records, folder)
    assert read_parquet(folder) == records


# --- parquet ---


def test_parquet_files_give_back_the_records(tmp_path: Path) -> None:
    write_parquet(RECORDS, tmp_path)
    assert read_parquet(tmp_path) == RECORDS


def test_equal_records_give_equal_bytes(tmp_path: Path, ledger: Ledger) -> None:
    for name in ("a", "b"):
        write_parquet(read(ledger), tmp_path / name)
    write_parquet(read_parquet(tmp_path / "a"), tmp_path / "c")
    for name in PARQUET:
        first, *others = ((tmp_path / x / f"{name}.parquet").read_bytes() for x in "abc")
        assert all(other == first for other in others), name


def test_the_order_in_which_settings_were_named_changes_no_byte(tmp_path: Path) -> None:
    def backwards(trial: TrialRecord) -> TrialRecord:
        axes, metrics = (dict(reversed(x.items())) for x in (trial.axes, trial.metrics))
        return replace(trial, axes=axes, metrics=metrics)

    write_parquet(RECORDS, tmp_path / "a")
    trials = tuple(backwards(trial) for trial in RECORDS.trials)
    write_parquet(replace(RECORDS, trials=trials), tmp_path / "b")
    names = ("a", "b")
    first, second = ((tmp_path / name / "trials.parquet").read_bytes() for name in names)
    assert first == second


def test_a_folder_left_by_a_write_holds_only_whole_files(tmp_path: Path) -> None:
    write_parquet(RECORDS, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{n}.parquet" for n in PARQUET)


def test_trials_parquet_has_the_columns_that_others_read(tmp_path: Path) -> None:
    write_parquet(RECORDS, tmp_path)
    schema = pq.read_schema(tmp_path / "trials.parquet")
    assert schema.metadata[b"orchestrate.schema_version"] == str(SCHEMA_VERSION).encode()
    text, whole, real = pa.string(), pa.int64(), pa.float64()
    moment = pa.timestamp("ms", tz="UTC")
    accuracy = [
        f"{n}.{t}"
        for n in ("accuracy", "accuracy_report")
        for t in sorted((*made_up.TASKS, "mean"))
    ]
    losses = [f"{kind}.{when}" for kind in ("kd_loss", "lm_loss") for when in ("after", "before")]
    assert [(each.name, each.type) for each in schema] == [
        *((name, text) for name in ("trial_id", "sweep", "profile")),
        ("seed", whole),
        *((name, text) for name in ("status", "reason", "baseline", "config")),
        ("axis.prune.depth.contiguous", pa.bool_()),
        ("axis.prune.depth.criterion", text),
        *((n, whole) for n in ("parameters", "parameters_non_embedding", "tokens_trained")),
        ("dropped_layers", pa.list_(whole)),
        ("in_sweep", pa.bool_()),
        *((f"metric.{name}", real) for name in (*accuracy, *losses)),
        *((name, real) for name in ("cpu_s", "gpu_s", "wall_s")),
        ("mlflow_run_id", text),
        ("started_at", moment),
        ("ended_at", moment),
    ]


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("stages", "stage_id trial_id kind cached cpu_s gpu_s wall_s peak_rss_mb tokens flops"),
        ("curves", "trial_id step tokens time_ms name value"),
        ("items", "trial_id task item_id split correct score"),
        ("importance", "stage_id criterion block_length last name value"),
    ],
)
def test_the_other_files_have_the_fields_of_their_records(
    tmp_path: Path, name: str, columns: str
) -> None:
    write_parquet(Records("s", "p"), tmp_path)
    schema = pq.read_schema(tmp_path / f"{name}.parquet")
    assert schema.names == columns.split()
    kinds = {"cached": pa.bool_()} | dict.fromkeys(
        ("tokens", "step", "time_ms", "block_length", "last"), pa.int64()
    )
    real = {"cpu_s", "gpu_s", "wall_s", "peak_rss_mb", "flops", "value", "correct", "score"}
    for each in schema:
        default = pa.float64() if each.name in real else pa.string()
        assert each.type == kinds.get(each.name, default), each.name


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["a", "b"], pa.string()),
        ([1, 2], pa.int64()),
        ([0.5, 1], pa.float64()),
        ([True, False], pa.bool_()),
        ([1, "a"], pa.string()),
        ([[1, 2], [3]], pa.string()),
        ([None, 0.5], pa.string()),
    ],
)
def test_an_axis_keeps_its_own_type_where_it_has_one(
    tmp_path: Path, values: list[Any], kind: pa.DataType
) -> None:
    trials = [a_trial(trial_id=str(i), axes={"x": value}) for i, value in enumerate(values)]
    off = a_trial(trial_id="off", axes={})
    write_parquet(replace(RECORDS, trials=(*trials, off)), tmp_path)
    assert pq.read_schema(tmp_path / "trials.parquet").field("axis.x").type == kind
    back = read_parquet(tmp_path).trials
    assert [dict(trial.axes) for trial in back] == [{"x": value} for value in values] + [{}]


def test_times_are_moments_in_utc(tmp_path: Path) -> None:
    write_parquet(RECORDS, tmp_path)
    first = pq.read_table(tmp_path / "trials.parquet")["started_at"].cast(pa.int64())[0].as_py()
    assert first == round(made_up.START * 1000)


def test_a_folder_without_records_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no sweep has recorded"):
        read_parquet(tmp_path)


def test_files_of_a_newer_version_are_not_guessed_at(tmp_path: Path) -> None:
    write_parquet(RECORDS, tmp_path)
    path = tmp_path / "trials.parquet"
    newer = {"orchestrate.schema_version": "99", "orchestrate.sweep": "s"}
    pq.write_table(pq.read_table(path).replace_schema_metadata(newer), path)
    with pytest.raises(ValueError, match="schema version 99"):
        read_parquet(tmp_path)


def test_every_ledger_line_is_one_json_object(ledger: Ledger) -> None:
    lines = ledger.path.read_text().splitlines()
    assert all(isinstance(json.loads(line), dict) for line in lines)
