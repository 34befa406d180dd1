"""The papers' tables: ours in the rows that ran, published figures in columns of their own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import made_up
import pytest

from orchestrator import papers, published, tables
from orchestrator.papers import LAYOUTS, Filled, Layout
from orchestrator.published import PublishedTable
from orchestrator.records import CurvePoint, Records, TrialRecord, read_parquet, write_parquet
from orchestrator.selection import over_seeds, rank
from orchestrator.space import enumerate_trials
from orchestrator.spec import load
from orchestrator.tables import Table

ROOT = Path(__file__).parent.parent
PUBLISHED_TABLES = [each for each in vars(published).values() if isinstance(each, PublishedTable)]
FED = sorted({feed.sweep for layout in LAYOUTS for feed in layout.feeds})


def trial(axes: dict[str, object], seed: int, baseline: str | None = None) -> TrialRecord:
    """A completed trial whose losses tell its axes and its seed apart."""
    name = f"{baseline or '-'.join(map(str, axes.values()))}-{seed}"
    loss = 2 + (sum(map(ord, name)) % 97) / 100 + seed / 10
    return replace(
        made_up.trial("perplexity", seed, seed, {"accuracy.mean": 1 / loss}),
        trial_id=name,
        baseline=baseline,
        axes=axes,
        metrics={"lm_loss.before": loss + 1, "lm_loss.after": loss, "kd_loss.after": loss - 1},
    )


def losses(*names: str, seeds: int = 3) -> Records:
    trials = [trial({"loss": name}, seed) for name in names for seed in range(seeds)]
    return Records("losses", "made_up", tuple(trials))


def named(found: tuple[Filled, ...], name: str) -> Filled:
    return next(each for each in found if each.name == name)


def cells(filled: Filled, column: str) -> dict[str, object]:
    """First cell of a row -> its cell in a column."""
    place = [name for name, _ in filled.columns].index(column)
    return {str(row[0]): row[place] for row in filled.rows}


@pytest.mark.parametrize("table", PUBLISHED_TABLES, ids=lambda table: table.name)
def test_a_published_row_has_a_cell_for_every_column(table: PublishedTable) -> None:
    assert len(table.measures) == len(table.digits)
    for label, figures in table.rows:
        assert (len(label), len(figures)) == (len(table.heads), len(table.measures))
    assert len({label for label, _ in table.rows}) == len(table.rows)


@pytest.mark.parametrize("sweep", FED)
def test_the_shipped_sweep_makes_every_row_that_a_layout_says_it_makes(sweep: str) -> None:
    space = enumerate_trials(load(ROOT / "sweeps" / f"{sweep}.yaml", "tiny"))
    trials = tuple(trial(dict(each.axes), each.seed, each.baseline) for each in space.trials)
    found = papers.filled(Records(sweep, "tiny", trials), None, "")
    for layout, feed in fed_by(sweep):
        filled = named(found, layout.table.name)
        heads = len(layout.table.heads)
        seeds = [name for name, _ in filled.columns].index("seeds")
        ran = {row[:heads] for row in filled.rows if row[seeds]}
        assert ran == {*feed.rows, *feed.more}
        assert feed.rows.keys() <= {label for label, _ in layout.table.rows}


def fed_by(sweep: str) -> Iterator[tuple[Layout, papers.Feed]]:
    for layout in LAYOUTS:
        for feed in layout.feeds:
            if feed.sweep == sweep:
                yield layout, feed


def test_a_row_is_the_mean_over_its_seeds_with_half_of_the_interval() -> None:
    records = losses("forward_kl", "reverse_kl")
    filled = named(papers.filled(records, None, ""), "p1_t16")
    for label, name in (("forward KL", "forward_kl"), ("reverse KL", "reverse_kl")):
        values = [t.metrics["lm_loss.after"] or 0.0 for t in records.trials if name in t.trial_id]
        expected = over_seeds(values)
        assert cells(filled, "lm_loss.after")[label] == pytest.approx(expected.value)
        shown = cells(filled, "lm_loss.after half width")[label]
        assert shown == pytest.approx(expected.half_width)
        assert cells(filled, "seeds")[label] == 3
    assert cells(filled, "LM loss, P1 table 16") == {"reverse KL": 2.665, "forward KL": 2.155}


def test_a_row_without_a_run_is_blank_and_its_published_figures_stay() -> None:
    failed = replace(
        trial({"loss": "cross_entropy_and_mse"}, 0), status="failed", reason="x", metrics={}
    )
    records = losses("forward_kl", seeds=1)
    records = replace(records, trials=(*records.trials, failed))
    filled = named(papers.filled(records, None, ""), "p1_t15")
    (row,) = [row for row in filled.rows if row[0] == "cross-entropy + MSE"]
    assert row == ("cross-entropy + MSE", 2.144, 9.007, *[None] * (len(filled.columns) - 3))
    # One seed has no interval, which is not an interval of no length.
    assert cells(filled, "lm_loss.after half width")["forward KL"] is None


def test_a_sweep_of_another_name_or_without_a_run_makes_no_paper_table() -> None:
    assert papers.filled(replace(losses("forward_kl"), sweep="mine"), None, "") == ()
    assert papers.filled(Records("losses", "made_up"), None, "") == ()


def test_trials_that_differ_in_more_than_the_seed_get_no_interval_over_seeds() -> None:
    trials = tuple(
        trial({"loss": "forward_kl", "distill.training.steps": steps}, seed)
        for steps in (60, 120)
        for seed in (0, 1)
    )
    filled = named(papers.filled(Records("losses", "made_up", trials), None, ""), "p1_t15")
    assert cells(filled, "lm_loss.after")["forward KL"] is not None
    assert cells(filled, "lm_loss.after half width")["forward KL"] is None
    assert cells(filled, "seeds")["forward KL"] == 2


CUTS = ("depth_by_perplexity", "depth_by_block_influence", "width", "depth_and_width")


def width_vs_depth(crossing: int, steps: int = 100) -> Records:
    """Four cuts; the training loss of `width` falls below that of both at step `crossing`."""
    trials = [trial({"cut": cut}, 0) for cut in CUTS]
    curves = [
        CurvePoint(each.trial_id, step, 10 * step, 0, "loss", level(each.axes["cut"], step))
        for each in trials
        for step in range(1, steps + 1)
        for level in [lambda cut, at: 2.5 if cut == "width" and at <= crossing else FINAL[cut]]
    ]
    return Records("width_vs_depth", "made_up", tuple(trials), curves=tuple(curves))


FINAL = {
    "depth_by_perplexity": 3.0, "depth_by_block_influence": 4.0, "width": 1.0,
    "depth_and_width": 2.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("crossing", "told"),
    [
        (30, "the rows are in their last order after 300 of 1,000 tokens."),
        (0, "the rows are in their last order throughout."),
    ],
)
def test_table_13_says_until_when_the_ranking_flips(crossing: int, told: str) -> None:
    filled = named(papers.filled(width_vs_depth(crossing), None, ""), "p1_t13")
    assert filled.caption.endswith(told)


def test_ranks_count_the_rows_that_ran_from_the_lowest_loss() -> None:
    records = width_vs_depth(0)
    records = replace(records, trials=records.trials[1:])
    filled = named(papers.filled(records, None, ""), "p1_t13")
    ranks = cells(filled, "rank by lm_loss.after")
    assert ranks.pop("depth, by perplexity") is None
    loss = cells(filled, "lm_loss.after")
    in_order = sorted(ranks, key=lambda label: float(str(loss[label])))
    assert [ranks[label] for label in in_order] == [1, 2, 3]


def test_the_grid_of_aggregations_holds_the_cells_of_the_list() -> None:
    kinds = ("l2", "mean", "variance")
    prefix = "prune.width.criterion"
    trials = tuple(
        trial({f"{prefix}.batch": batch, f"{prefix}.sequence": sequence}, seed)
        for batch in kinds
        for sequence in kinds
        for seed in (0, 1)
    )
    found = papers.filled(Records("importance_aggregation", "made_up", trials), None, "")
    listed, grid = named(found, "p1_t11"), named(found, "p1_t11_grid")
    names = [name for name, _ in listed.columns]
    for row in listed.rows:
        if row[1]:
            cell = cells(grid, str(row[1]))[str(row[0])]
            assert cell == row[names.index("lm_loss.before")]
            printed = cells(grid, f"{row[1]}, P1 table 11")[str(row[0])]
            assert printed == row[names.index("LM loss, P1 table 11")]


def test_accuracies_of_ours_are_those_of_the_questions_that_chose_nothing() -> None:
    records = made_up.records(questions=20)
    filled = named(papers.filled(records, rank(records), ""), "p2_t1")
    teacher = next(t for t in records.trials if t.baseline == "teacher")
    for task in made_up.TASKS:
        expected = 100 * (teacher.metrics[f"accuracy_report.{task}"] or 0.0)
        assert cells(filled, task)["teacher"] == pytest.approx(expected)
        assert cells(filled, task)["Llama-3.1-8B"] is None
    assert cells(filled, "winogrande")["Llama-3.1-8B"] == 77.3
    assert cells(filled, "winogrande")["teacher"] is None
    assert [row[0] for row in filled.rows if str(row[0]).startswith("winner")]


def paper_tables(records: Records) -> list[Table]:
    every = tables.all_tables(records, rank(records))
    return [table for table in every if papers.published_as(table.name)]


@pytest.mark.parametrize(
    "records",
    [losses("forward_kl", "reverse_kl"), width_vs_depth(30), made_up.records(questions=10)],
    ids=["losses", "width_vs_depth", "depth_ablation"],
)
def test_the_same_tables_come_out_of_the_parquet_files(records: Records, tmp_path: Path) -> None:
    write_parquet(records, tmp_path)
    made, rebuilt = paper_tables(records), paper_tables(read_parquet(tmp_path))
    assert made and [t.name for t in made] == [t.name for t in rebuilt]
    for first, again in zip(made, rebuilt, strict=True):
        assert first.to_markdown() == again.to_markdown()
        assert first.to_csv() == again.to_csv()
        assert first.to_latex() == again.to_latex()


@pytest.mark.parametrize("records", [losses("forward_kl"), width_vs_depth(30)], ids=["one", "two"])
def test_latex_has_as_many_cells_a_row_as_columns_and_no_bare_special(records: Records) -> None:
    for table in paper_tables(records):
        latex = table.to_latex()
        columns = len(re.search(r"\\begin\{tabular\}\{(\w+)\}", latex)[1])  # type: ignore[index]
        body = [line for line in latex.splitlines() if line.endswith(r"\\")]
        assert {len(re.findall(r"(?<!\\)&", line)) for line in body} == {columns - 1}
        for line in body:
            assert not re.search(r"(?<!\\)[%#_^~]", line), line
            assert line.isascii(), line
