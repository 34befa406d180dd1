"""What the axes do: main effects, and the nine aggregations as heat maps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from matplotlib import colormaps
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from orchestrator.canvas import (
    INK,
    PALETTE,
    SMALL,
    WIDTH,
    Drawing,
    canvas,
    fit,
    within,
)
from orchestrator.published import P1_T11
from orchestrator.records import TEACHER, Records, TrialRecord
from orchestrator.selection import (
    Estimate,
    Measure,
    adjusted_means,
    axis_names,
    canonical,
    over_seeds,
    task_of,
    value_of,
)

# --- aggregations ----------------------------------------------------------------------------

BATCH = "prune.width.criterion.batch"
SEQUENCE = "prune.width.criterion.sequence"
AGGREGATIONS = ("l2", "mean", "variance")
OUTCOMES = {
    "lm_loss.before": "before retraining",
    "lm_loss.after": "after retraining",
}


@dataclass(frozen=True)
class HeatMap:
    """LM loss by (batch, sequence) aggregation, with intervals as `within_seeds` has them."""

    title: str
    cells: Mapping[tuple[str, str], Estimate]

    @property
    def best(self) -> tuple[str, str]:
        return min(self.cells, key=lambda pair: self.cells[pair].value)


def heat_maps(records: Records) -> tuple[HeatMap, ...]:
    """A map before and one after retraining, of the trials whose axes are the aggregations: the
    mean over each cell's trials of a seed, then over seeds. None with fewer than four cells."""
    maps = []
    for metric, title in OUTCOMES.items():
        cells: dict[tuple[str, str], dict[int, list[float]]] = {}  # pair -> seed -> losses
        for trial in records.trials:
            value = value_of(trial, metric)
            if (
                trial.baseline is None
                and {BATCH, SEQUENCE} <= trial.axes.keys()
                and value is not None
            ):
                pair = canonical(trial.axes[BATCH]), canonical(trial.axes[SEQUENCE])
                cells.setdefault(pair, {}).setdefault(trial.seed, []).append(value)
        if len(cells) >= 4:
            maps.append(HeatMap(title, within_seeds(cells)))
    return tuple(maps)


def aggregations(records: Records) -> Drawing | None:
    """The nine aggregations as heat maps (batch by sequence), beside the published one."""
    maps = heat_maps(records)
    if not maps:
        return None
    cells = {(batch.lower(), over.lower()): loss for (batch, over), (loss, _) in P1_T11.rows}
    known = {pair: Estimate(loss) for pair, loss in cells.items() if loss is not None}
    published = HeatMap("published, before retraining", known)
    batches = _ordered({batch for each in (*maps, published) for batch, _ in each.cells})
    with canvas(WIDTH, 2.5) as figure:
        panels = figure.subplots(1, len(maps) + 1, squeeze=False, sharey=True)[0]
        for axes, each in zip(panels, (*maps, published), strict=True):
            _draw_map(axes, each, batches)
        panels[0].set_ylabel("over the batch")
    seeds = {
        trial.seed for trial in records.trials if trial.baseline is None and BATCH in trial.axes
    }
    second = (
        f"mean over {len(seeds)} seeds, below it half the width of its 95% interval (Student's t "
        "over seeds, of the differences within a seed)"
        if len(seeds) > 1
        else "one seed, so no interval"
    )
    caption = (
        "LM loss in nats per token by how activations are aggregated over batch and sequence to "
        f"tell which units matter: {second}. Framed: the lowest of each map; the colours of each "
        "reach from its lowest (dark) to its highest. Published: Minitron 15B to 8B on the "
        f"training data, {P1_T11.source}."
    )
    return Drawing("aggregations", caption, figure)


def _draw_map(axes: Any, shown: HeatMap, batches: Sequence[str]) -> None:
    sequences = _ordered({sequence for _, sequence in shown.cells})
    values = [cell.value for cell in shown.cells.values()]
    lowest, reach = min(values), (max(values) - min(values)) or 1.0
    for (batch, sequence), cell in shown.cells.items():
        x, y, part = sequences.index(sequence), batches.index(batch), (cell.value - lowest) / reach
        red, green, blue, _ = colormaps["cividis"](0.1 + 0.85 * part)
        colour = (red, green, blue)
        axes.add_patch(_cell(x, y, colour))
        ink = "#101010" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "#FDFDFD"
        half = cell.half_width
        text = f"{cell.value:.2f}" if reach > 0.2 else f"{cell.value:.3f}"
        if half is not None:
            text += f"\n±{half:.2f}" if reach > 0.2 else f"\n±{half:.3f}"
        axes.text(x, y, text, ha="center", va="center", color=ink, fontsize=SMALL)
    x, y = sequences.index(shown.best[1]), batches.index(shown.best[0])
    axes.add_patch(_frame(x, y))
    axes.set_xlim(-0.53, len(sequences) - 0.47)
    axes.set_ylim(len(batches) - 0.47, -0.53)
    axes.set_xticks(range(len(sequences)), sequences)
    axes.set_yticks(range(len(batches)), batches)
    axes.set_title(shown.title, fontsize=SMALL)
    axes.set_xlabel("over the sequence")
    axes.set_aspect("equal")
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _cell(x: float, y: float, colour: tuple[float, ...]) -> Any:
    return Rectangle((x - 0.48, y - 0.48), 0.96, 0.96, facecolor=colour, linewidth=0)


def _frame(x: float, y: float) -> Any:
    return Rectangle(
        (x - 0.48, y - 0.48), 0.96, 0.96, facecolor="none", edgecolor=PALETTE[1], linewidth=2.2
    )


def _ordered(names: set[str]) -> list[str]:
    return [name for name in AGGREGATIONS if name in names] + sorted(names - set(AGGREGATIONS))


# --- main effects ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Effect:
    """A value of an axis: the metric's mean over the trials that have it, whatever their other
    axes, first within each seed, then over seeds."""

    axis: str
    value: str
    seeds: int
    estimate: Estimate


@dataclass(frozen=True)
class MainEffects:
    """`over` says what the intervals rest on. The teacher's mean stands beside, if measured."""

    metric: str
    effects: tuple[Effect, ...]
    over: Literal["seeds", "questions", "nothing"]
    teacher: float | None


BASELINES = "baselines"


def effects(records: Records, metric: str) -> MainEffects | None:
    """The main effects of all axes that vary, and the baselines beside the grid; None where no
    axis has two values with a measurement.

    With several seeds intervals are those of `within_seeds`; with one they are over questions,
    where the metric has some.
    """
    grid = [t for t in records.trials if t.baseline is None and value_of(t, metric) is not None]
    one_seed = len({trial.seed for trial in grid}) == 1
    # Other trials of the same seed are no repetitions, so a loss has no interval then.
    measure = Measure(records, metric) if one_seed and task_of(metric) else None
    found: list[Effect] = []
    for name, short in axis_names(records).items():
        with_axis = [trial for trial in grid if name in trial.axes]
        values = {
            value: [t for t in with_axis if canonical(t.axes[name]) == value]
            for value in _in_order(canonical(trial.axes[name]) for trial in with_axis)
        }
        if len(values) > 1:
            found += _of_axis(measure, metric, short, values)
    if not found:
        return None
    for baseline in dict.fromkeys(t.baseline for t in records.trials if t.baseline):
        mine = [t for t in records.trials if t.baseline == baseline]
        mine = [trial for trial in mine if value_of(trial, metric) is not None]
        if baseline != TEACHER and mine:
            pair = {baseline: mine, "": grid}
            found += _of_axis(measure, metric, BASELINES, pair)[:1]
    teacher = [value_of(trial, metric) for trial in records.trials if trial.baseline == TEACHER]
    known = [value for value in teacher if value is not None]
    mean = statistics.fmean(known) if known else None
    return MainEffects(metric, tuple(found), _over(found, one_seed), mean)


def _in_order(values: Iterable[str]) -> list[str]:
    """Numbers by size, other values in the order of the sweep file."""
    found = list(dict.fromkeys(values))
    try:
        return sorted(found, key=float)
    except ValueError:
        return found


def _over(found: Sequence[Effect], one_seed: bool) -> Literal["seeds", "questions", "nothing"]:
    if all(each.estimate.low is None for each in found):
        return "nothing"
    return "questions" if one_seed else "seeds"


def _of_axis(
    measure: Measure | None, metric: str, axis: str, values: Mapping[str, Sequence[TrialRecord]]
) -> list[Effect]:
    by_seed = {value: _by_seed(trials, metric) for value, trials in values.items()}
    found = []
    for value, known in within_seeds(by_seed).items():
        if measure is not None:
            questions = measure.estimate(values[value])
            known = Estimate(known.value, questions.low, questions.high)
        found.append(Effect(axis, value, len(by_seed[value]), known))
    return found


def _by_seed(trials: Sequence[TrialRecord], metric: str) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for trial in trials:
        value = value_of(trial, metric)
        if value is not None:
            found.setdefault(trial.seed, []).append(value)
    return found


Key = TypeVar("Key")


def within_seeds(values: Mapping[Key, Mapping[int, Sequence[float]]]) -> dict[Key, Estimate]:
    """Means of k values of an axis, given by value and seed: first within a seed, then over seeds,
    those that not every value has included as far as they are as hard (`adjusted_means`).

    The interval is Student's t over the seeds that all values have, of what is left of a value's
    mean when the mean of all values of its seed is taken off, times sqrt(k / (k - 1)) (Morey 2008):
    what the trials of a seed share, such as the teacher, says nothing of the axis. No interval
    with one seed.
    """
    means = {
        key: {seed: statistics.fmean(found) for seed, found in by_seed.items()}
        for key, by_seed in values.items()
    }
    common = sorted(set.intersection(*(set(each) for each in means.values())))
    shared = {seed: statistics.fmean(each[seed] for each in means.values()) for seed in common}
    wider = math.sqrt(len(means) / (len(means) - 1)) if len(means) > 1 else 1.0

    overall = dict(zip(means, adjusted_means(list(means.values())), strict=True))

    def estimate(key: Key) -> Estimate:
        each, mean = means[key], overall[key]
        if len(common) < 2:
            return Estimate(mean)
        own = over_seeds([each[seed] - shared[seed] for seed in common])
        reach = wider * (own.half_width or 0.0)
        return Estimate(mean, mean - reach, mean + reach)

    return {key: estimate(key) for key in means}


def main_effects(records: Records, metric: str) -> Drawing | None:
    """A dot and an interval per value of every axis, by axis."""
    known = effects(records, metric)
    if known is None:
        return None
    axes_shown = list(dict.fromkeys(each.axis for each in known.effects))
    height = 0.75 + 0.23 * len(known.effects) + 0.26 * len(axes_shown)
    with canvas(5.8, height) as figure:
        axes = figure.subplots()
        _draw_effects(axes, known, axes_shown)
        axes.set_xlabel(metric)
    return Drawing("main_effects", _effects_caption(known), figure)


def _draw_effects(axes: Any, known: MainEffects, axes_shown: Sequence[str]) -> None:
    y, places, names, bold = 0.0, [], [], []
    for position, axis in enumerate(axes_shown):
        colour = PALETTE[position % len(PALETTE)]
        places.append(y)
        names.append(fit(axis, 2.0, 1))
        bold.append(len(names) - 1)
        y += 0.9
        for each in (e for e in known.effects if e.axis == axis):
            value = each.estimate
            if value.low is not None and value.high is not None:
                axes.hlines(
                    y, *within(known.metric, value.value, value.low, value.high), color=colour
                )
            axes.plot([value.value], [y], marker="o", color=colour, linestyle="none")
            places.append(y)
            names.append(fit(each.value, 2.0, 1))
            y += 1
        y += 0.25
    if known.teacher is not None:
        axes.axvline(known.teacher, color=INK, linestyle=(0, (4, 3)), linewidth=1)
        axes.annotate(
            "teacher",
            (known.teacher, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            fontsize=SMALL,
        )
    axes.set_yticks(places, names)
    for number in bold:
        axes.get_yticklabels()[number].set_fontweight("bold")
    axes.set_ylim(y - 0.5, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(6))


def _effects_caption(known: MainEffects) -> str:
    seeds = max(each.seeds for each in known.effects)
    text = (
        f"Main effects on {known.metric}: means over the trials that have the value, whatever "
        f"their other axes, and over {seeds} {'seeds' if seeds > 1 else 'seed'}."
    )
    bars = {
        "seeds": "Bars: 95% intervals, Student's t over seeds, of the differences within a seed "
        "(what all trials of a seed share, such as its teacher, is taken off).",
        "questions": "Bars: 95% intervals over the questions to select by.",
        "nothing": "There is one seed and no question, so no interval.",
    }
    return f"{text} {bars[known.over]}"
