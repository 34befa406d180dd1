"""What a student is worth for what it costs: the Pareto front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from orchestrator.canvas import (
    INK,
    PALETTE,
    SMALL,
    SOFT,
    WIDTH,
    Drawing,
    brief,
    canvas,
    fit,
    inches,
    within,
)
from orchestrator.pareto import Point, points
from orchestrator.records import TEACHER, Records
from orchestrator.selection import task_of

COSTS = {
    "parameters": "parameters",
    "throughput.mean": "requests per second / teacher's",
    "first_token_ratio.mean": "time to first token / teacher's",
}
"""What a student costs or brings, where that was measured -> the axis."""
LONGEST = 4.0
"""Intervals are drawn in whole as long as they make the y axis at most so many times as long."""


def tradeoffs(records: Records, metric: str) -> dict[str, tuple[Point, ...]]:
    """By cost, the configurations and the teacher; without a cost that no two configurations
    differ in, as there is nothing to trade then."""
    found = {cost: points(records, cost, metric) for cost in COSTS if cost != metric}
    return {
        cost: each
        for cost, each in found.items()
        if len({point.x.value for point in each if point.baseline != TEACHER}) > 1
    }


def pareto(records: Records, metric: str) -> Drawing | None:
    """The metric against parameters and, where measured, throughput and latency."""
    shown = tradeoffs(records, metric)
    if not shown:
        return None
    front = [point.label for found in shown.values() for point in found if point.efficient]
    numbers = {label: number for number, label in enumerate(dict.fromkeys(front), 1)}
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    with canvas(WIDTH if columns > 1 else 5.6, 3.0 * rows) as figure:
        grid = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
        for axes, (cost, found) in zip(grid, shown.items(), strict=False):
            _draw(axes, found, numbers, metric, cost)
            axes.set_xlabel(COSTS[cost])
            axes.xaxis.set_major_locator(MaxNLocator(5))
            if cost == "parameters":
                axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        for axes in grid[len(shown) :]:
            axes.remove()
        for axes in grid[: len(shown) : columns]:
            axes.set_ylabel(metric)
        _key(figure, numbers)
    return Drawing("pareto", _caption(metric, shown), figure)


def _draw(
    axes: Any, found: Sequence[Point], numbers: Mapping[str, int], metric: str, cost: str
) -> None:
    students = [point for point in found if point.baseline != TEACHER]
    for point in students:
        x, y = point.x.value, point.y
        colour = PALETTE[0] if point.efficient else SOFT
        look = {"markersize": 6} if point.efficient else {"markerfacecolor": "none"}
        axes.plot([x], [y.value], linestyle="none", marker="o", color=colour, **look)
        if y.low is not None and y.high is not None:
            axes.vlines(x, *within(metric, y.value, y.low, y.high), color=colour, linewidth=0.8)
    axes.set_ylim(*reach(found))
    front = [point for point in students if point.efficient]
    places = [point.x.value for point in front], [point.y.value for point in front]
    axes.plot(*places, color=PALETTE[0], linewidth=1, linestyle=(0, (4, 2)), zorder=1)
    for point in front:
        axes.annotate(
            str(numbers[point.label]),
            (point.x.value, point.y.value),
            xytext=(5, 4),
            textcoords="offset points",
            fontweight="bold",
        )
    for teacher in (point for point in found if point.baseline == TEACHER):
        paid = teacher.x.value
        known = EngFormatter(places=1, sep="")(paid) if cost == "parameters" else f"{paid:.2f}"
        _draw_teacher(axes, teacher.y.value, f"teacher\n({known})")


def reach(found: Sequence[Point]) -> tuple[float, float]:
    """From where to where the y axis goes: all intervals, but where they are so long that the
    differences would be lost, the values alone; then they leave the figure."""
    values = [point.y.value for point in found]
    ends = [end for point in found for end in (point.y.low, point.y.high) if end is not None]
    wide, narrow = max([*values, *ends]) - min([*values, *ends]), max(values) - min(values)
    shown = [*values, *ends] if wide <= LONGEST * narrow else values
    room = 0.08 * (max(shown) - min(shown)) or 0.1
    return min(shown) - room, max(shown) + room


def _draw_teacher(axes: Any, value: float, name: str) -> None:
    # A line: at its own cost it would press all students into a corner.
    axes.axhline(value, color=INK, linestyle=(0, (4, 3)), linewidth=1)
    axes.annotate(
        name,
        (1.0, value),
        xycoords=("axes fraction", "data"),
        xytext=(3, 0),
        textcoords="offset points",
        va="center",
        fontsize=SMALL,
    )


def _key(figure: Any, numbers: Mapping[str, int]) -> None:
    """What the numbers on the front stand for, under the figure."""
    room = figure.get_figwidth() - 0.2
    title, short = brief(numbers)
    rows = [fit(f"{number}  {short[label]}", room, 1) for label, number in numbers.items()]
    # Two columns where all names are short enough.
    columns = 2 if len(rows) > 1 and max(inches(row) for row in rows) < room / 2 - 0.2 else 1
    height = -(-len(rows) // columns) + bool(title)
    figure.set_figheight(figure.get_figheight() + 0.16 * height + 0.1)
    figure.legend(
        [Line2D([], [], linestyle="none") for _ in rows],
        rows,
        title=fit(title, room, 1) or None,
        title_fontproperties={"size": SMALL, "weight": "bold"},
        alignment="left",
        loc="outside lower left",
        ncols=columns,
        handlelength=0,
        handletextpad=0,
        labelspacing=0.3,
    )


def _caption(metric: str, shown: Mapping[str, Sequence[Point]]) -> str:
    drawn = [point for found in shown.values() for point in found]
    counts = {len(point.trials) for point in drawn if point.baseline != TEACHER}
    few, many = min(counts), max(counts)
    seeds = f"{many}" if few == many else f"{few} to {many}"
    over = f"mean over {seeds} seeds" if many > 1 else "one seed"
    if all(point.y.low is None for point in drawn):
        bars = "; there is no interval"
    elif task_of(metric):
        bars = "; bars: 95% intervals, over questions and seeds where there are several"
    else:
        bars = "; bars: 95% intervals, Student's t over seeds"
    low, high = zip(*(reach(found) for found in shown.values()), strict=True)
    ends = [end for point in drawn for end in (point.y.low, point.y.high) if end is not None]
    if any(end < min(low) or end > max(high) for end in ends):
        bars += " (some leave the figure)"
    return (
        f"{metric} against what a student costs: a point per configuration, {over}{bars}. Filled "
        "and numbered: the Pareto front, those that no other equals in both and beats in one. "
        "Dashed: the teacher (in brackets: what it costs), not part of the front."
    )
