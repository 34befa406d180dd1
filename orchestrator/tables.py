"""Records -> tables in Markdown, CSV and LaTeX; the same records give the same bytes.

CSV holds raw values (a missing one is empty); Markdown and LaTeX hold rounded ones in readable
units (a missing one is a dash).
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator import papers
from orchestrator.asked import Claim
from orchestrator.claims import Verdict, judge
from orchestrator.records import TEACHER, Records, StageRecord, TrialRecord
from orchestrator.selection import (
    Configuration,
    Estimate,
    Measure,
    Ranking,
    axis_names,
    canonical,
    estimate,
    groups,
    spread,
    value_of,
    winner,
)

Cell = str | int | float | None
MISSING = "\N{EN DASH}"
LOSSES = ("lm_loss.before", "lm_loss.after", "kd_loss.before", "kd_loss.after")
CALIBRATION = "calibration_error.after"
OUTCOMES = ("accuracy.mean", "lm_loss.after", "kd_loss.after")


@dataclass(frozen=True)
class Column:
    """`name` heads the column in CSV, and for readers where there is no `title`. Readers see
    values divided by `per`, in `unit`, rounded to `digits`."""

    name: str
    digits: int | None = None
    per: float = 1.0
    unit: str = ""
    title: str = ""

    @property
    def header(self) -> str:
        """The title with its unit, for readers."""
        return f"{self.title or self.name} [{self.unit}]" if self.unit else self.title or self.name

    @property
    def numeric(self) -> bool:
        """Whether the column is set flush right."""
        return self.digits is not None

    def show(self, cell: Cell) -> str:
        """The cell for readers."""
        if cell is None:
            return MISSING
        if isinstance(cell, str) or self.digits is None:
            return str(cell)
        return f"{cell / self.per:.{self.digits}f}"


@dataclass(frozen=True)
class Table:
    """A caption that states the scale, columns, and a tuple of raw cells a row."""

    name: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def for_readers(self) -> tuple[tuple[Column, ...], list[list[str]]]:
        """Columns and shown rows, without the columns in which no row has a value."""
        filled = [any(row[i] is not None for row in self.rows) for i in range(len(self.columns))]
        kept = tuple(itertools.compress(self.columns, filled)) if self.rows else self.columns
        rows = [
            [column.show(cell) for column, cell in zip(self.columns, row, strict=True)]
            for row in self.rows
        ]
        return kept, [list(itertools.compress(row, filled)) for row in rows]

    def to_markdown(self) -> str:
        """A GitHub table with the caption above it."""
        columns, rows = self.for_readers()
        rule = ["---:" if column.numeric else "---" for column in columns]
        head = [column.header for column in columns]
        lines = ["| " + " | ".join(map(_markdown, row)) + " |" for row in (head, rule, *rows)]
        return f"{self.caption}\n\n" + "\n".join(lines) + "\n"

    def to_csv(self) -> str:
        """Raw values under plain names."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([column.name for column in self.columns])
        writer.writerows([["" if cell is None else cell for cell in row] for row in self.rows])
        return out.getvalue()

    def to_latex(self) -> str:
        """A `table` with `booktabs` rules."""
        columns, rows = self.for_readers()
        align = "".join("r" if column.numeric else "l" for column in columns)
        head = " & ".join(_latex(column.header) for column in columns)
        body = [" & ".join(map(_latex, row)) + r" \\" for row in rows]
        lines = [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_latex(self.caption)}}}",
            rf"\label{{tab:{self.name}}}",
            rf"\begin{{tabular}}{{{align}}}",
            r"\toprule",
            rf"{head} \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
        return "\n".join(lines) + "\n"


def write(tables: Iterable[Table], folder: Path) -> list[Path]:
    """Write every table as `<name>.md`, `.csv` and `.tex`; gives the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for table in tables:
        for end, text in (
            ("md", table.to_markdown()),
            ("csv", table.to_csv()),
            ("tex", table.to_latex()),
        ):
            paths.append(folder / f"{table.name}.{end}")
            paths[-1].write_text(text, encoding="utf-8")
    return paths


def all_tables(
    records: Records, ranking: Ranking | None, asked: Sequence[Claim] = ()
) -> tuple[Table, ...]:
    """Every table of a sweep: trials, main effects, configurations, the papers' tables that it
    has a row for, cost and, where the sweep makes some, claims."""
    return (
        trials(records),
        main_effects(records),
        configurations(records, ranking),
        *map(_paper, papers.filled(records, ranking, scale(records))),
        cost(records),
        *((claims(records, asked),) if asked else ()),
    )


# --- the scale -------------------------------------------------------------------------------


def scale(records: Records) -> str:
    """One sentence on how large the experiment was: it stands in every caption."""
    asked: dict[str, dict[str, set[str]]] = {}
    for item in records.items:
        asked.setdefault(item.split, {}).setdefault(item.task, set()).add(item.item_id)
    select, report = (
        sum(len(ids) for ids in asked.get(split, {}).values()) for split in ("select", "report")
    )
    tasks = len({task for by_task in asked.values() for task in by_task})
    tokens = {
        t.tokens_trained for t in records.trials if t.baseline != TEACHER and t.tokens_trained
    }
    parts = [f"Profile {records.profile}"]
    if tasks:
        noun = "task" if tasks == 1 else "tasks"
        parts.append(f"{select} questions to select by and {report} to report, in {tasks} {noun}")
    if tokens:
        few, many = (f"{count:,}" for count in (min(tokens), max(tokens)))
        parts.append(f"{many if few == many else f'{few} to {many}'} tokens trained a student")
    return "; ".join(parts) + "."


def _magnitude(name: str, values: Iterable[int | None], digits: int = 2) -> Column:
    """A column of counts in thousands, millions or billions, as the largest asks for."""
    largest = max((value for value in values if value is not None), default=0)
    for per, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if largest >= per:
            return Column(name, digits, per, unit)
    return Column(name, 0)


# --- trials ----------------------------------------------------------------------------------


def trials(records: Records) -> Table:
    """A row per trial, in the order of the sweep file."""
    rows = records.trials
    axes = axis_names(records)
    tasks = sorted(
        {n for t in rows for n in t.metrics if n.startswith("accuracy.")} - {OUTCOMES[0]}
    )
    calibrated = any(CALIBRATION in trial.metrics for trial in rows)
    measured = (*LOSSES, *([CALIBRATION] if calibrated else []), *tasks, "accuracy.mean")
    measure = Measure(records, "accuracy.mean")
    columns = (
        Column("trial"),
        Column("baseline"),
        *(Column(short) for short in axes.values()),
        Column("seed", 0),
        Column("status"),
        Column("dropped_layers", title="dropped layers"),
        _magnitude("parameters", (t.parameters for t in rows)),
        _magnitude("tokens", (t.tokens_trained for t in rows)),
        *(Column(name, 3) for name in measured),
        Column("half width", 3),
        Column("minutes", 1),
        Column("reason"),
    )
    return Table(
        "trials",
        f"Trials. {scale(records)} Layers are counted from 0. Half width: of the 95% "
        "bootstrap interval of accuracy.mean over the questions to select by.",
        columns,
        tuple(
            (
                trial.trial_id,
                trial.baseline,
                *(_axis(trial, name) for name in axes),
                trial.seed,
                trial.status,
                _ranges(trial.dropped_layers),
                trial.parameters,
                trial.tokens_trained,
                *(trial.metrics.get(name) for name in measured),
                _half_width(measure, trial),
                trial.wall_s / 60,
                trial.reason,
            )
            for trial in rows
        ),
    )


def _axis(trial: TrialRecord, name: str) -> str | None:
    return canonical(trial.axes[name]) if name in trial.axes else None


def _ranges(layers: Sequence[int] | None) -> str | None:
    """1, 2, 3, 6 as `1-3 6`."""
    if layers is None:
        return None
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return " ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def _half_width(measure: Measure, trial: TrialRecord) -> float | None:
    return measure.estimate([trial]).half_width if measure.values([trial]) else None


# --- main effects ----------------------------------------------------------------------------


def main_effects(records: Records) -> Table:
    """A row per value of every axis, and one per baseline: means over the trials that have it."""
    axes = axis_names(records)
    grid = [trial for trial in records.trials if trial.baseline is None]
    rows: list[tuple[Cell, ...]] = []
    for name, short in axes.items():
        with_axis = [trial for trial in grid if name in trial.axes]
        for value in dict.fromkeys(canonical(trial.axes[name]) for trial in with_axis):
            mine = [trial for trial in with_axis if canonical(trial.axes[name]) == value]
            rows.append((short, value, *_effects(mine)))
    for baseline in dict.fromkeys(t.baseline for t in records.trials if t.baseline is not None):
        mine = [trial for trial in records.trials if trial.baseline == baseline]
        rows.append(("baseline", baseline, *_effects(mine)))
    outcomes = [(Column(name, 3), Column(f"{name} spread", 3)) for name in OUTCOMES]
    return Table(
        "main_effects",
        f"Main effects. {scale(records)} Each value is the mean over the completed trials that "
        "have the axis value, whatever their other axes. Spread: the standard deviation over "
        "seeds, pooled over the configurations among them (trials equal in all but the seed), "
        "with n - 1 degrees of freedom each.",
        (
            Column("axis"),
            Column("value"),
            Column("trials", 0),
            *(c for pair in outcomes for c in pair),
        ),
        tuple(rows),
    )


def _effects(trials: Sequence[TrialRecord]) -> list[Cell]:
    completed = [trial for trial in trials if trial.status == "completed"]
    cells: list[Cell] = [len(completed)]
    for metric in OUTCOMES:
        values = _values(completed, metric)
        cells += [statistics.fmean(values) if values else None, pooled_spread(completed, metric)]
    return cells


def _values(trials: Iterable[TrialRecord], metric: str) -> list[float]:
    values = (value_of(trial, metric) for trial in trials)
    return [value for value in values if value is not None]


def pooled_spread(trials: Sequence[TrialRecord], metric: str) -> float | None:
    """Standard deviation over seeds, pooled over configurations; None without repeated seeds."""
    repeated = [v for v in (_values(group, metric) for group in groups(trials)) if len(v) > 1]
    if not repeated:
        return None
    squares = math.fsum((len(values) - 1) * statistics.variance(values) for values in repeated)
    return math.sqrt(squares / sum(len(values) - 1 for values in repeated))


# --- configurations --------------------------------------------------------------------------


def configurations(records: Records, ranking: Ranking | None) -> Table:
    """The ranking: mean over seeds with its interval, distance from the best, ties, the choice."""
    metric = ranking.metric if ranking else "accuracy.mean"
    chosen = winner(ranking)
    listed = ranking.configurations if ranking else ()
    unequal = any(each.unfinished for each in listed)
    columns = (
        Column("rank", 0),
        Column("configuration"),
        Column("verdict"),
        Column("seeds", 0),
        *((Column("unfinished", 0),) if unequal else ()),
        Column(metric, 3),
        Column("low", 3),
        Column("high", 3),
        Column("spread", 3),
        Column("behind best", 3),
        Column("behind low", 3),
        Column("behind high", 3),
        _magnitude("parameters", (each.parameters for each in listed)),
        _magnitude("tokens", (each.tokens_trained for each in listed)),
    )
    rows: list[tuple[Cell, ...]] = [
        (
            place,
            each.label,
            _verdict(each, chosen is not None and each is chosen.configuration),
            len(each.trials),
            *((each.unfinished,) if unequal else ()),
            *_cells(each.estimate),
            each.spread,
            *(_cells(each.behind) if place > 1 else (None, None, None)),
            each.parameters,
            each.tokens_trained,
        )
        for place, each in enumerate(listed, 1)
    ]
    teacher = [trial for trial in records.trials if trial.baseline == TEACHER]
    if (known := estimate(records, teacher, metric)) is not None:
        values, blank = _values(teacher, metric), (None, None, None)
        size = max((t.parameters for t in teacher if t.parameters is not None), default=None)
        rows.append(
            (
                None,
                TEACHER,
                "reference",
                len(values),
                *((len(teacher) - len(values),) if unequal else ()),
                *_cells(known),
                spread(values),
                *blank,
                size,
                None,
            )
        )
    return Table("configurations", _ranking_caption(records, ranking), columns, tuple(rows))


def _ranking_caption(records: Records, ranking: Ranking | None) -> str:
    if ranking is None:
        return f"Configurations. {scale(records)} No trial completed, so there is no ranking."
    kind = (
        "95% interval over seeds (Student's t) and the questions to select by (bootstrap)"
        if ranking.metric.startswith("accuracy")
        else "95% Student's t interval over seeds"
    )
    order = "highest" if ranking.mode == "max" else "lowest"
    text = (
        f"Configurations by {ranking.metric}, {order} first. {scale(records)} Mean over seeds with "
        f"its {kind}; spread: standard deviation over seeds. Behind best: paired difference with "
        "its interval; tied: the tests against the best (the noise of all seeds, after Holm's "
        "correction, and the pair's own) do not both tell them apart; untested: nothing was "
        "repeated, so that this may be luck. Chosen: the cheapest of the tied."
    )
    if any(each.unfinished for each in ranking.configurations):
        text += (
            " Unfinished: seeds that failed or were stopped; the ranking is as if none had been."
        )
    return text


def _verdict(each: Configuration, chosen: bool) -> str:
    return "chosen" if chosen else "tied" if each.tied else "untested" if each.untested else ""


def _cells(value: Estimate) -> tuple[Cell, Cell, Cell]:
    return value.value, value.low, value.high


# --- cost ------------------------------------------------------------------------------------


def cost(records: Records) -> Table:
    """What each kind of stage cost, and what it would have cost the trials that shared one."""
    kinds = dict.fromkeys(stage.kind for stage in records.stages)
    paid = {stage.stage_id: stage for stage in records.stages if not stage.cached}
    by_kind = [[s for s in records.stages if s.kind == kind] for kind in kinds]
    rows = [_cost_row(kind, stages, paid) for kind, stages in zip(kinds, by_kind, strict=True)]
    rows.append(_cost_row("all", records.stages, paid))
    return Table(
        "cost",
        f"Cost by kind of stage. {scale(records)} Asked: by how many trials. Saved: what the "
        "trials that found a stage done would have paid for it, where this sweep paid it once.",
        (
            Column("stage"),
            *(Column(name, 0) for name in ("asked", "run", "shared")),
            Column("cpu_s", 1, 60, "min", "CPU"),
            Column("saved_cpu_s", 1, 60, "min", "CPU saved"),
            Column("gpu_s", 1, 60, "min", "GPU"),
            Column("saved_gpu_s", 1, 60, "min", "GPU saved"),
            Column("wall_s", 1, 60, "min", "wall clock, one after the other"),
        ),
        tuple(rows),
    )


def _cost_row(
    kind: str, stages: Sequence[StageRecord], paid: Mapping[str, StageRecord]
) -> tuple[Cell, ...]:
    run = [stage for stage in stages if not stage.cached]
    shared = [paid[stage.stage_id] for stage in stages if stage.cached and stage.stage_id in paid]

    def total(of: Iterable[StageRecord], cost: Callable[[StageRecord], float]) -> float:
        return math.fsum(cost(stage) for stage in of)

    return (
        kind,
        len(stages),
        len(run),
        len(stages) - len(run),
        total(run, lambda stage: stage.cpu_s),
        total(shared, lambda stage: stage.cpu_s),
        total(run, lambda stage: stage.gpu_s),
        total(shared, lambda stage: stage.gpu_s),
        total(run, lambda stage: stage.wall_s),
    )


# --- claims ----------------------------------------------------------------------------------


def claims(records: Records, asked: Sequence[Claim]) -> Table:
    """A row per claim of the sweep, in its order: the effect with its interval, and the verdict."""
    return Table(
        "claims",
        f"Claims. {scale(records)} Effect: the difference between trials that differ in nothing "
        "else, positive where it speaks for the claim, in the metric's unit; of rankings Kendall's "
        "tau. Low, high: its 95% interval over seeds, and over questions where the metric has "
        "them; of rankings, what the seeds establish. Undecided: the interval reaches both sides, "
        "there is none, or there is one seed.",
        (
            Column("practice", 0),
            Column("claim"),
            Column("metric"),
            *(Column(name, 3) for name in ("effect", "low", "high")),
            Column("verdict"),
            Column("pairs", 0),
            Column("seeds", 0),
            Column("published"),
            Column("note"),
        ),
        tuple(_claim_row(verdict) for verdict in judge(records, asked)),
    )


def _claim_row(verdict: Verdict) -> tuple[Cell, ...]:
    effect = _cells(verdict.effect) if verdict.effect else (None, None, None)
    return (
        verdict.practice,
        verdict.text,
        verdict.metric,
        *effect,
        verdict.verdict,
        verdict.pairs,
        verdict.seeds,
        verdict.published,
        verdict.note,
    )


# --- the papers' tables ----------------------------------------------------------------------


def _paper(filled: papers.Filled) -> Table:
    """A paper's table with ours beside it; counts in readable units."""

    def column(position: int, name: str, digits: int | None) -> Column:
        if name not in ("parameters", "tokens"):
            half = name.endswith(papers.HALF_WIDTH)
            return Column(name, digits, title="\N{PLUS-MINUS SIGN}" if half else "")
        counts = (row[position] for row in filled.rows)
        return _magnitude(name, (count for count in counts if isinstance(count, int)))

    columns = (column(i, *each) for i, each in enumerate(filled.columns))
    return Table(filled.name, filled.caption, tuple(columns), filled.rows)


# --- escaping --------------------------------------------------------------------------------


def _markdown(text: str) -> str:
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").split())


_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    MISSING: "--",
    "\N{PLUS-MINUS SIGN}": r"$\pm$",
}


def _latex(text: str) -> str:
    return " ".join("".join(_LATEX.get(character, character) for character in text).split())
