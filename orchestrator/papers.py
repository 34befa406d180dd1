"""The papers' tables with ours beside them: published figures in columns of their own. Pure.

A layout says which sweep feeds a table and which trials make each of its rows, by the values of
their axes: a sweep of that name fills the table at any profile. A row that no completed trial makes
stays blank, and so does a figure that the papers do not print.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator import published
from orchestrator.asked import BASELINE, key_of, keys_meant
from orchestrator.published import P2_T1, PublishedTable
from orchestrator.records import TEACHER, Records, TrialRecord
from orchestrator.selection import (
    Estimate,
    Ranking,
    adjusted_means,
    configuration_key,
    estimate,
    value_of,
    winner,
)

Cell = str | int | float | None
Group = Mapping[str, Any]
Label = tuple[str, ...]

CURVES = {"heldout_loss": "held-out loss", "loss": "training loss"}
"""Curves that rank rows which are trained by one loss, the better first."""

HALF_WIDTH = " half width"
"""Ends the name of a column with half of the 95% interval of the one before it."""

WINDOWS = 20
"""Stretches of training in which rows are ranked by their curves: means, for a step is noisy."""


@dataclass(frozen=True)
class Filled:
    """A table's raw cells. A column has a name, and digits where it holds numbers."""

    name: str
    caption: str
    columns: tuple[tuple[str, int | None], ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Feed:
    """How a sweep fills a table: a row as it is printed -> the trials that make it ours. `more` are
    rows that the papers do not have; `note` says what else sets ours apart, for the caption."""

    sweep: str
    rows: Mapping[Label, Group]
    more: Mapping[Label, Group] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Layout:
    """A published table, the metrics that we set beside it, and the sweeps that measure them.
    Where `ranked`, rows are also ranked before and after retraining."""

    table: PublishedTable
    measures: tuple[str, ...]
    feeds: tuple[Feed, ...] = ()
    ranked: bool = False


def _cut(name: str) -> Group:
    return {"cut": name}


def _aggregated(batch: str, sequence: str) -> Group:
    return {"prune.width.criterion.batch": batch, "prune.width.criterion.sequence": sequence}


def _rounds(count: int, residual: bool) -> Group:
    return {"prune.iterations": count, "prune.width.head_residual": residual}


def _started(initialise: str, training: str) -> Group:
    return {"prune.initialise": initialise, "training": training}


def _states(cut: str, states: str) -> Group:
    return {"cut": cut, "states": states}


AGGREGATIONS = {"L2": "l2", "mean": "mean", "variance": "variance"}

LAYOUTS = (
    Layout(
        published.P1_T1,
        ("kd_loss.before", "kd_loss.after", "lm_loss.after"),
        (
            Feed(
                "width_vs_depth",
                {
                    ("DEP + MLP + ATT + EMB",): _cut("depth_and_all_widths"),
                    ("MLP + ATT + EMB",): _cut("all_widths"),
                    ("MLP + ATT",): _cut("heads_and_mlp"),
                    ("DEP",): _cut("depth_by_perplexity"),
                    ("random weights",): {BASELINE: "random_init"},
                },
                {
                    ("MLP + EMB",): _cut("width"),
                    ("DEP + MLP + EMB",): _cut("depth_and_width"),
                },
                "Here layers are chosen by perplexity, and random weights are in the shape of "
                "MLP + EMB.",
            ),
        ),
    ),
    Layout(
        published.P1_T11,
        ("lm_loss.before", "lm_loss.after"),
        (
            Feed(
                "importance_aggregation",
                {
                    (batch, sequence): _aggregated(AGGREGATIONS[batch], AGGREGATIONS[sequence])
                    for batch in AGGREGATIONS
                    for sequence in AGGREGATIONS
                },
                {("units chosen at random", ""): {BASELINE: "random_units"}},
            ),
        ),
    ),
    Layout(
        published.P1_T12,
        ("lm_loss.before", "lm_loss.after"),
        (
            Feed(
                "importance_iterations",
                {(f"T = {count}",): _rounds(count, False) for count in (1, 2, 4)},
                {
                    (f"T = {count}, removed heads folded in",): _rounds(count, True)
                    for count in (1, 2, 4)
                },
            ),
        ),
    ),
    Layout(
        published.P1_T13,
        ("lm_loss.before", "lm_loss.after"),
        (
            Feed(
                "width_vs_depth",
                {
                    ("depth, by perplexity",): _cut("depth_by_perplexity"),
                    ("depth, by Block Influence",): _cut("depth_by_block_influence"),
                    ("width",): _cut("width"),
                    ("depth and width",): _cut("depth_and_width"),
                },
            ),
        ),
        ranked=True,
    ),
    Layout(
        published.P1_T14,
        ("accuracy.mean", "lm_loss.after"),
        (
            Feed(
                "initialisation",
                {
                    ("random weights, trained conventionally", "150B"): _started(
                        "random", "conventional"
                    ),
                    ("pruned, trained conventionally", "150B"): _started(
                        "inherited", "conventional"
                    ),
                    ("pruned, distilled", "100B"): _started("inherited", "distilled"),
                },
                {("random weights, distilled", ""): _started("random", "distilled")},
            ),
            Feed(
                "chain",
                {
                    ("random weights, trained conventionally", "150B"): {BASELINE: "from_scratch"},
                    ("pruned, distilled", "100B"): {"path": "direct"},
                    ("pruned from the closer source, distilled", "100B"): {
                        "path": "by_medium_taught_by_the_largest"
                    },
                },
                {
                    ("pruned from the closer source, and taught by it", ""): {
                        "path": "by_medium_taught_by_it"
                    }
                },
            ),
            Feed(
                "closest_source",
                {
                    ("pruned, distilled", "100B"): {"source_size": "large"},
                    ("pruned from the closer source, distilled", "100B"): {"source_size": "medium"},
                },
            ),
        ),
    ),
    Layout(
        published.P1_T15,
        ("lm_loss.after", "kd_loss.after"),
        (
            Feed(
                "losses",
                {
                    ("cross-entropy + MSE",): {"loss": "cross_entropy_and_mse"},
                    ("cross-entropy + reverse KL",): {"loss": "cross_entropy_and_reverse_kl"},
                    ("cross-entropy + cosine",): {"loss": "cross_entropy_and_cosine"},
                    ("cross-entropy + forward KL",): {"loss": "cross_entropy_and_forward_kl"},
                    ("forward KL",): {"loss": "forward_kl"},
                },
                {
                    ("cross-entropy",): {"loss": "cross_entropy"},
                    ("reverse KL",): {"loss": "reverse_kl"},
                },
            ),
        ),
    ),
    Layout(
        published.P1_T16,
        ("lm_loss.after", "kd_loss.after"),
        (
            Feed(
                "losses",
                {
                    ("reverse KL",): {"loss": "reverse_kl"},
                    ("forward KL",): {"loss": "forward_kl"},
                },
            ),
        ),
    ),
    Layout(
        published.P1_T17,
        ("lm_loss.after", "kd_loss.after"),
        (
            Feed(
                "hidden_losses",
                {
                    ("logits", ""): _states("depth", "logits"),
                    ("logits + output", "29:13"): _states("depth", "output_last_2"),
                    ("logits + output + embedding", "31:15"): _states(
                        "depth", "output_and_embedding_last"
                    ),
                    ("logits + output + embedding", "29:13"): _states(
                        "depth", "output_and_embedding_last_2"
                    ),
                    ("logits + output + embedding + input", "29:13"): _states(
                        "depth", "input_output_and_embedding_last_2"
                    ),
                },
                {
                    ("logits + output", "every block"): _states("depth", "output_proportional"),
                    ("logits + attention", "every block"): _states(
                        "depth", "attention_proportional"
                    ),
                },
                "Here 31:15 stands for the last blocks, and 29:13 for the last but two.",
            ),
        ),
    ),
    Layout(
        published.P1_T18,
        ("accuracy.mean", "lm_loss.after"),
        (
            Feed(
                "hidden_losses",
                {
                    ("logits + hidden states", "18.9B"): _states(
                        "width", "output_and_embedding_last_2"
                    ),
                    ("logits", "18.9B"): _states("width", "logits"),
                },
                note="Here hidden states are those of the embedding and of the last block but two.",
            ),
        ),
    ),
    Layout(
        published.P1_T20,
        ("accuracy.mean", "lm_loss.after"),
        (
            Feed(
                "phases",
                {
                    ("first phase; both phases", "113B"): {"pruned": "first_phase"},
                    ("last phase; last phase", "94B"): {"pruned": "last_phase"},
                },
                {
                    ("first phase; last phase, taught by the first", ""): {
                        "pruned": "first_phase_taught_by_it"
                    },
                },
                "Here all are retrained on the data of the last phase, for as many tokens each.",
            ),
        ),
    ),
)

TEACHER_AND_STUDENTS: Mapping[str, Mapping[str, tuple[str, Group]]] = {
    "width_vs_depth": {
        "width": ("Llama-3.1-Minitron-4B-Width", _cut("width")),
        "depth": ("Llama-3.1-Minitron-4B-Depth", _cut("depth_by_perplexity")),
    },
    "depth_ablation": {
        "depth": (
            "Llama-3.1-Minitron-4B-Depth",
            {"prune.depth.criterion": "task", "prune.depth.contiguous": True},
        ),
    },
}
"""Sweep -> the students of P2 table 1 as it makes them: kind of cut -> the published model that was
cut so, and our trials."""


def published_as(name: str) -> PublishedTable | None:
    """The published table that a table of ours is filled from; None for any other table."""
    known = (*(layout.table for layout in LAYOUTS), P2_T1)
    return next((each for each in known if name in (each.name, _grid_name(each))), None)


def filled(records: Records, ranking: Ranking | None, about: str) -> tuple[Filled, ...]:
    """The papers' tables that this sweep has a row for; `about` is the scale, for the captions."""
    found = [
        table
        for layout in LAYOUTS
        for feed in layout.feeds
        if feed.sweep == records.sweep
        for table in _tables(records, layout, feed, about)
    ]
    return (*found, *_accuracies(records, ranking, about))


# --- rows ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    label: Label
    figures: tuple[float | None, ...]
    trials: tuple[TrialRecord, ...]


def _tables(records: Records, layout: Layout, feed: Feed, about: str) -> list[Filled]:
    rows = _rows(records, layout, feed)
    if not any(row.trials for row in rows):
        return []
    found = [_filled(records, layout, rows, about, feed.note)]
    if layout.table is published.P1_T11:
        found.append(_grid(records, layout, rows, about))
    return found


def _rows(records: Records, layout: Layout, feed: Feed) -> list[_Row]:
    """The printed rows in their order, then ours."""
    blank = (None,) * len(layout.table.measures)
    printed = [
        _Row(label, figures, _made_by(records, layout, feed.rows.get(label)))
        for label, figures in layout.table.rows
    ]
    own = [
        _Row(label, blank, _made_by(records, layout, group)) for label, group in feed.more.items()
    ]
    return printed + own


def _made_by(records: Records, layout: Layout, group: Group | None) -> tuple[TrialRecord, ...]:
    """The completed trials of a group that have any of the layout's metrics."""
    return tuple(
        trial
        for trial in records.trials
        if group is not None
        and _fits(trial, group)
        and any(value_of(trial, metric) is not None for metric in layout.measures)
    )


def _fits(trial: TrialRecord, group: Group) -> bool:
    known = {name: key_of(value) for name, value in trial.axes.items()}
    if trial.baseline is not None:
        known[BASELINE] = key_of(trial.baseline)
    return (BASELINE in group) == (BASELINE in known) and all(
        name in known and known[name] in keys_meant(wanted, {known[name]})
        for name, wanted in group.items()
    )


def _filled(
    records: Records, layout: Layout, rows: Sequence[_Row], about: str, note: str
) -> Filled:
    ranks = [_ranks(records, rows, metric) for metric in layout.measures] if layout.ranked else []
    table = layout.table
    counted = (("seeds", 0), ("parameters", 0), ("tokens", 0))
    ranked = tuple((f"rank by {metric}", 0) for metric in layout.measures) if layout.ranked else ()
    told = [_caption(table, about), note, _when_settled(records, rows) if layout.ranked else ""]
    return Filled(
        table.name,
        " ".join(filter(None, told)),
        (*_heads(table), *counted, *_ours(layout), *ranked),
        tuple(
            (
                *row.label,
                *row.figures,
                *_counts(row.trials),
                *_measured(records, row.trials, layout.measures),
                *(each[position] for each in ranks),
            )
            for position, row in enumerate(rows)
        ),
    )


def _caption(table: PublishedTable, about: str) -> str:
    return (
        f"{table.title}: {table.source}, and ours. {about} Ours: the mean, with half of its 95% "
        "interval after it. A dash: no run, or nothing published."
    )


def _heads(table: PublishedTable) -> tuple[tuple[str, int | None], ...]:
    """What a row is, then the published figures under their source."""
    place = _place(table)
    measures = zip(table.measures, table.digits, strict=True)
    return (
        *((head, None) for head in table.heads),
        *((f"{measure}, {place}", digits) for measure, digits in measures),
    )


def _place(table: PublishedTable) -> str:
    """The source without its other numbering."""
    return table.source.partition(" (")[0]


def _ours(layout: Layout) -> tuple[tuple[str, int | None], ...]:
    return tuple((name, 3) for metric in layout.measures for name in (metric, metric + HALF_WIDTH))


def _counts(trials: Sequence[TrialRecord]) -> tuple[Cell, Cell, Cell]:
    """Seeds, parameters of the largest and tokens of the longest; blank where nothing ran."""
    return (
        len({trial.seed for trial in trials}) or None,
        max((t.parameters for t in trials if t.parameters is not None), default=None),
        max((t.tokens_trained for t in trials if t.tokens_trained is not None), default=None),
    )


def _measured(
    records: Records, trials: Sequence[TrialRecord], metrics: Iterable[str]
) -> list[float | None]:
    """Of each metric the mean and half of its interval."""
    found = (_estimate(records, trials, metric) for metric in metrics)
    return [cell for each in found for cell in ((each.value, each.half_width) if each else _NONE)]


_NONE = (None, None)


def _estimate(records: Records, trials: Sequence[TrialRecord], metric: str) -> Estimate | None:
    known = estimate(records, trials, metric)
    if known is None or len({configuration_key(trial) for trial in trials}) == 1:
        return known
    # The sweep has axes beyond the table's: seeds are not all that these trials differ in.
    return Estimate(known.value)


# --- rankings --------------------------------------------------------------------------------


def _ranks(records: Records, rows: Sequence[_Row], metric: str) -> list[int | None]:
    """The place of each row that ran, the lowest loss first."""
    measured = {i: by for i, row in enumerate(rows) if (by := _by_seed(row.trials, metric))}
    known = dict(zip(measured, adjusted_means(list(measured.values())), strict=True))
    order = sorted(known, key=lambda position: known[position])
    return [order.index(i) + 1 if i in known else None for i in range(len(rows))]


def _by_seed(trials: Sequence[TrialRecord], metric: str) -> dict[int, float]:
    """The mean of each seed's trials that have a value."""
    found: dict[int, list[float]] = {}
    for trial in trials:
        if (value := value_of(trial, metric)) is not None:
            found.setdefault(trial.seed, []).append(value)
    return {seed: statistics.fmean(values) for seed, values in found.items()}


def _when_settled(records: Records, rows: Sequence[_Row]) -> str:
    """A sentence on how long the rows' order during training differed from the last one."""
    for name, title in CURVES.items():
        lines = [_curve(records, row.trials, name) for row in rows if row.trials]
        common = sorted(set.intersection(*map(set, lines))) if len(lines) > 1 else []
        if len(common) > 1:
            return _sentence(title, lines, common)
    return ""


def _sentence(title: str, lines: Sequence[Mapping[int, float]], tokens: Sequence[int]) -> str:
    width = -(-len(tokens) // WINDOWS)
    windows = [tokens[start : start + width] for start in range(0, len(tokens), width)]
    orders = [_order(lines, window) for window in windows]
    unlike = [window[-1] for window, o in zip(windows, orders, strict=True) if o != orders[-1]]
    start = f"By the {title}, the rows are"
    if not unlike:
        return f"{start} in their last order throughout."
    return f"{start} in their last order after {unlike[-1]:,} of {tokens[-1]:,} tokens."


def _order(lines: Sequence[Mapping[int, float]], window: Sequence[int]) -> list[int]:
    means = [statistics.fmean(line[token] for token in window) for line in lines]
    return sorted(range(len(lines)), key=lambda position: means[position])


def _curve(records: Records, trials: Sequence[TrialRecord], name: str) -> dict[int, float]:
    """Tokens -> the mean over trials, where all of them have been."""
    ids = {trial.trial_id for trial in trials}
    values: dict[int, list[float]] = {}
    for point in records.curves:
        if point.name == name and point.trial_id in ids:
            values.setdefault(point.tokens, []).append(point.value)
    return {at: statistics.fmean(v) for at, v in values.items() if len(v) == len(ids)}


# --- tables of their own shape ---------------------------------------------------------------


def _grid_name(table: PublishedTable) -> str:
    return f"{table.name}_grid"


def _grid(records: Records, layout: Layout, rows: Sequence[_Row], about: str) -> Filled:
    """The same as a grid, batch by sequence: ours before retraining, and what was published."""
    metric, place = layout.measures[0], _place(layout.table)
    by_label = {row.label: row for row in rows}
    columns = [("batch", None)] + [
        column
        for sequence in AGGREGATIONS
        for column in ((sequence, 3), (sequence + HALF_WIDTH, 3), (f"{sequence}, {place}", 2))
    ]
    return Filled(
        _grid_name(layout.table),
        f"{_caption(layout.table, about)} Of {metric}, a column for each way over the sequence.",
        tuple(columns),
        tuple(
            (
                batch,
                *(
                    cell
                    for sequence in AGGREGATIONS
                    for row in [by_label[batch, sequence]]
                    for cell in (*_measured(records, row.trials, [metric]), row.figures[0])
                ),
            )
            for batch in AGGREGATIONS
        ),
    )


def _accuracies(records: Records, ranking: Ranking | None, about: str) -> list[Filled]:
    """P2 table 1: published models, then our teacher, its students, and the winner."""
    students = TEACHER_AND_STUDENTS.get(records.sweep)
    if students is None:
        return []
    ours = _models(records, ranking, students)
    if not any(trials for _, _, trials in ours):
        return []
    known = list(P2_T1.measures)
    tasks = known + sorted(_tasks(records) - set(known))
    figures = {label: dict(zip(known, row, strict=True)) for (label,), row in P2_T1.rows}
    printed = [
        (name, P2_T1.source, None, None, None, *(row.get(task) for task in tasks), *_NONE)
        for name, row in figures.items()
    ]
    measured = [
        (name, source, *_counts(trials), *_percent(records, trials, tasks))
        for name, source, trials in ours
    ]
    columns = (("model", None), ("source", None), ("seeds", 0))
    sizes = (("parameters", 0), ("tokens", 0))
    shown = ((task, 1) for task in (*tasks, "mean", "mean" + HALF_WIDTH))
    caption = (
        f"{P2_T1.title} in percent: {P2_T1.source}, and ours. {about} Ours: on the questions that "
        "chose nothing; after the mean over our tasks half of its 95% interval. Trained tokens are "
        "those of distillation."
    )
    return [Filled(P2_T1.name, caption, (*columns, *sizes, *shown), (*printed, *measured))]


def _models(
    records: Records, ranking: Ranking | None, students: Mapping[str, tuple[str, Group]]
) -> list[tuple[str, str, tuple[TrialRecord, ...]]]:
    """Name, the published model that it stands for, and trials, of our teacher and students."""
    teacher = tuple(t for t in records.trials if t.baseline == TEACHER and _asked(t))
    found = [("teacher", "ours, in place of Llama-3.1-8B", teacher)]
    for kind, (like, group) in students.items():
        trials = tuple(t for t in records.trials if _fits(t, group) and _asked(t))
        found.append((f"{kind} cut", f"ours, in place of {like}", trials))
    chosen = winner(ranking)
    if chosen is not None:
        trials = tuple(t for t in chosen.configuration.trials if _asked(t))
        found.append((f"winner: {chosen.configuration.label}", "ours", trials))
    return found


REPORTED = "accuracy_report."


def _asked(trial: TrialRecord) -> bool:
    return value_of(trial, f"{REPORTED}mean") is not None


def _tasks(records: Records) -> set[str]:
    names = {name for trial in records.trials for name in trial.metrics}
    tasks = {name.removeprefix(REPORTED) for name in names if name.startswith(REPORTED)}
    return tasks - {"mean"}


def _percent(
    records: Records, trials: Sequence[TrialRecord], tasks: Sequence[str]
) -> list[float | None]:
    means = [_estimate(records, trials, f"{REPORTED}{task}") for task in tasks]
    mean, half = _measured(records, trials, [f"{REPORTED}mean"])
    values = [*(each.value if each else None for each in means), mean, half]
    return [None if value is None else 100 * value for value in values]
