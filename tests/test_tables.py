"""Tables say what the records say, and the same records give the same bytes."""

from __future__ import annotations

import csv
import io
import statistics
from dataclasses import replace
from pathlib import Path

import made_up
import pytest

from orchestrator import tables
from orchestrator.asked import Better, Claim
from orchestrator.ledger import Ledger
from orchestrator.records import Records, read_parquet, write_parquet
from orchestrator.selection import rank
from orchestrator.tables import Column, Table

RECORDS = made_up.records(questions=20)


def rows_of(table: Table) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(table.to_csv())))


def test_tables_rebuilt_from_parquet_are_byte_identical(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for trial in RECORDS.trials:
        ledger.trial(trial, (), [i for i in RECORDS.items if i.trial_id == trial.trial_id])
    for stage in RECORDS.stages:
        ledger.stage(stage)
    records = ledger.records("depth_ablation", "made_up", [t.trial_id for t in RECORDS.trials])
    write_parquet(records, tmp_path)
    rebuilt = read_parquet(tmp_path)
    first, again = (
        tables.write(tables.all_tables(each, rank(each)), tmp_path / name)
        for name, each in (("first", records), ("again", rebuilt))
    )
    assert [path.name for path in first] == [
        f"{table}.{end}"
        for table in ("trials", "main_effects", "configurations", "p2_t1", "cost")
        for end in ("md", "csv", "tex")
    ]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]


def test_the_trials_table_has_a_row_per_trial_with_raw_values_in_csv() -> None:
    rows = rows_of(tables.trials(RECORDS))
    assert [row["trial"] for row in rows] == [trial.trial_id for trial in RECORDS.trials]
    for row, trial in zip(rows, RECORDS.trials, strict=True):
        assert row["reason"] == (trial.reason or "")
        assert row["criterion"] == trial.axes.get("prune.depth.criterion", "")
        for metric in ("lm_loss.before", "lm_loss.after", "accuracy.knowledge", "accuracy.mean"):
            value = trial.metrics.get(metric)
            assert row[metric] == ("" if value is None else repr(value))
    assert (rows[1]["parameters"], rows[1]["dropped_layers"]) == ("540000", "1-3 6")


def test_every_completed_trial_has_a_half_width_and_a_failed_one_has_none() -> None:
    for row, trial in zip(rows_of(tables.trials(RECORDS)), RECORDS.trials, strict=True):
        assert bool(row["half width"]) == (trial.status == "completed")


def test_main_effects_are_means_over_the_trials_that_have_the_value() -> None:
    rows = {(row["axis"], row["value"]): row for row in rows_of(tables.main_effects(RECORDS))}
    assert set(rows) == {
        ("contiguous", "true"),
        *(("criterion", name) for name in made_up.CRITERIA),
        ("baseline", "teacher"),
        ("baseline", "random_layers"),
    }
    task = [
        t.metrics["accuracy.mean"] or 0.0
        for t in RECORDS.trials
        if t.trial_id in ("task-0", "task-1")
    ]
    row = rows["criterion", "task"]
    assert row["trials"] == "2"
    assert float(row["accuracy.mean"]) == pytest.approx(statistics.mean(task))
    assert float(row["accuracy.mean spread"]) == pytest.approx(statistics.stdev(task))
    assert rows["baseline", "teacher"]["accuracy.mean spread"] == ""


def test_the_spread_over_seeds_does_not_count_what_other_axes_do() -> None:
    # Both seeds of each configuration are 0.02 apart, the configurations 0.5.
    trials = [
        replace(
            RECORDS.trials[1],
            trial_id=f"{keep}-{seed}",
            seed=seed,
            axes={"keep": keep, "contiguous": True},
            metrics={"accuracy.mean": keep + 0.02 * seed},
        )
        for keep in (0.25, 0.75)
        for seed in (0, 1)
    ]
    spread = tables.pooled_spread(trials, "accuracy.mean")
    assert spread == pytest.approx(0.02 / 2**0.5)


def test_the_ranking_names_the_chosen_the_tied_and_the_teacher() -> None:
    records = made_up.records()
    rows = rows_of(tables.configurations(records, rank(records)))
    assert [(row["rank"], row["configuration"], row["verdict"]) for row in rows] == [
        ("1", "criterion=perplexity", "chosen"),
        ("2", "criterion=block_influence", "tied"),
        ("3", "criterion=task", ""),
        ("4", "random_layers", ""),
        ("", "teacher", "reference"),
    ]


def test_cost_counts_what_was_paid_once_and_used_often() -> None:
    rows = {row["stage"]: row for row in rows_of(tables.cost(RECORDS))}
    assert {k: rows["pretrain"][k] for k in ("asked", "run", "shared")} == {
        "asked": "10",
        "run": "1",
        "shared": "9",
    }
    assert float(rows["pretrain"]["saved_cpu_s"]) == 9 * 150.0
    paid = sum(stage.cpu_s for stage in RECORDS.stages)
    assert float(rows["all"]["cpu_s"]) == pytest.approx(paid)


def test_every_caption_states_the_scale() -> None:
    for table in tables.all_tables(RECORDS, rank(RECORDS)):
        assert "Profile made_up; 60 questions to select by and 60 to report" in table.caption
        assert "61,440 tokens trained a student" in table.caption


def test_tables_of_a_sweep_without_results_can_be_made() -> None:
    empty = Records("s", "p")
    for table in tables.all_tables(empty, rank(empty)):
        assert table.to_markdown() and table.to_csv() and table.to_latex()


CLAIMS: tuple[Claim, ...] = (
    Better(
        text="Perplexity is better than chance",
        practice=2,
        published="P1 T13",
        better={"prune.depth.criterion": "perplexity"},
        than={"baseline": "random_layers"},
        metric="accuracy.mean",
    ),
    Better(
        text="Nothing is measured",
        better={"prune.depth.criterion": "never"},
        than={"baseline": "random_layers"},
        metric="lm_loss.after",
    ),
)


def test_claims_are_a_table_of_verdicts_where_the_sweep_makes_some() -> None:
    assert [table.name for table in tables.all_tables(RECORDS, None)][-1] == "cost"
    assert [table.name for table in tables.all_tables(RECORDS, None, CLAIMS)][-1] == "claims"
    measured, not_measured = rows_of(tables.claims(RECORDS, CLAIMS))
    first, second = (
        [t.metrics["accuracy.mean"] or 0.0 for t in RECORDS.trials if t.trial_id in ids]
        for ids in (("perplexity-0", "perplexity-1"), ("random_layers-0", "random_layers-1"))
    )
    assert float(measured["effect"]) == pytest.approx(
        statistics.mean(first) - statistics.mean(second)
    )
    assert float(measured["low"]) < float(measured["effect"]) < float(measured["high"])
    assert {key: measured[key] for key in ("practice", "pairs", "seeds", "published")} == {
        "practice": "2", "pairs": "2", "seeds": "2", "published": "P1 T13",
    }  # fmt: skip
    assert (not_measured["verdict"], not_measured["effect"]) == ("no data", "")


ODD = Table(
    "odd",
    "50% of a_b",
    (Column("a|b"), Column("x", 1, 1e6, "M"), Column("never")),
    (("one\ntwo | \\", 1_500_000, None), (None, None, None)),
)


def test_markdown_keeps_its_columns_whatever_the_text() -> None:
    assert ODD.to_markdown() == (
        "50% of a_b\n\n"
        "| a\\|b | x [M] |\n"
        "| --- | ---: |\n"
        "| one two \\| \\\\ | 1.5 |\n"
        "| \N{EN DASH} | \N{EN DASH} |\n"
    )


def test_csv_keeps_raw_values_every_column_and_empty_cells() -> None:
    assert ODD.to_csv() == 'a|b,x,never\n"one\ntwo | \\",1500000,\n,,\n'


def test_latex_escapes_what_it_would_take_for_a_command() -> None:
    latex = ODD.to_latex()
    assert r"\caption{50\% of a\_b}" in latex
    assert r"one two | \textbackslash{} & 1.5 \\" in latex
    assert r"\begin{tabular}{lr}" in latex


def test_seeds_that_did_not_finish_have_a_column_where_there_are_some() -> None:
    failed = made_up.records()
    whole = replace(failed, trials=tuple(t for t in failed.trials if t.status == "completed"))
    for records, expected in ((failed, 1), (whole, None)):
        table = tables.configurations(records, rank(records))
        headings = [column.name for column in table.columns]
        assert ("unfinished" in headings) == (expected is not None)
        if expected:
            row = next(row for row in table.rows if row[1] == "criterion=task")
            assert row[headings.index("unfinished")] == expected
            assert "as if none had been" in table.caption
