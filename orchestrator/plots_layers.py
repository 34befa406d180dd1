"""What leaving out layers does: after figures 5 and 6 of the Llama-3.1-Minitron article."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from matplotlib.ticker import MaxNLocator
from scipy import stats

from orchestrator.canvas import (
    INK,
    SMALL,
    WIDTH,
    Drawing,
    canvas,
    fit,
    legend_below,
    series,
    within,
)
from orchestrator.records import BlockScore, Records
from orchestrator.selection import Estimate, labels, over_seeds

SCORES = {
    "lm_loss": ("LM loss [nats per token]", "LM loss"),
    "accuracy": ("accuracy", "Accuracy"),
    "block_influence": ("1 - cosine(input, output)", "Block Influence"),
}
"""What is measured without a block of layers -> the axis, and the word that begins the caption."""

PANELS = 4
"""More groups of importance stages than these are not drawn."""


@dataclass(frozen=True)
class BlockLine:
    """Values without a block of `length` layers, by the layer (from 1) where the block ends."""

    length: int
    layers: tuple[int, ...]
    values: tuple[Estimate, ...]


@dataclass(frozen=True)
class Blocks:
    """Importance stages that differ in nothing but the seed, taken together.

    `seeds` counts them. `interval` says what the values' intervals rest on: the seeds, the
    `questions` that were asked without each block, or nothing.
    """

    title: str
    seeds: int
    interval: Literal["seeds", "questions", "none"]
    questions: int | None
    intact: Estimate | None
    lines: tuple[BlockLine, ...]


# --- data ------------------------------------------------------------------------------------


def blocks(records: Records, name: str) -> tuple[Blocks, ...]:
    """What was measured without blocks of layers: lm_loss, accuracy or block_influence."""
    by_stage: dict[str, list[BlockScore]] = {}
    for score in records.scores:
        if score.name == name:
            by_stage.setdefault(score.stage_id, []).append(score)
    return tuple(
        _together(records, name, title, [by_stage[stage] for stage in stages])
        for title, stages in _repeated(records, by_stage)
    )


def _repeated(
    records: Records, by_stage: Mapping[str, Sequence[BlockScore]]
) -> Iterator[tuple[str, list[str]]]:
    """Titles and stages that are each other's repetitions: they measured the same blocks by the
    same criterion for the same configurations, with one seed each."""
    label = labels(records)
    seed = {trial.trial_id: trial.seed for trial in records.trials}
    asked: dict[str, set[tuple[str, int]]] = {stage_id: set() for stage_id in by_stage}
    for stage in records.stages:
        if stage.stage_id in asked and stage.trial_id in label:
            asked[stage.stage_id].add((label[stage.trial_id], seed[stage.trial_id]))
    groups: dict[tuple[Any, ...], list[str]] = {}
    times: dict[tuple[Any, ...], int] = {}
    for stage_id, scores in by_stage.items():
        names = tuple(sorted({name for name, _ in asked[stage_id]}))
        seeds = tuple(sorted({seed for _, seed in asked[stage_id]}))
        places = frozenset((score.block_length, score.last) for score in scores)
        kind = (scores[0].criterion, names, places)
        # A trial that prunes in several rounds measures in each: the n-th goes with the n-th.
        round_ = times[kind, seeds] = times.get((kind, seeds), 0) + 1
        groups.setdefault((*kind, round_), []).append(stage_id)
    several = len(groups) > 1
    for (criterion, names, _, round_), stages in groups.items():
        yield (_title(criterion, names, round_) if several else ""), stages


def _title(criterion: str, names: Sequence[str], round_: int) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    again = f", round {round_}" if round_ > 1 else ""
    return f"{criterion}{again}: {names[0]}{more}" if names else f"{criterion}{again}"


def _together(
    records: Records, name: str, title: str, stages: Sequence[Sequence[BlockScore]]
) -> Blocks:
    values: dict[tuple[int, int], list[float]] = {}
    for scores in stages:
        for score in scores:
            values.setdefault((score.block_length, score.last + 1), []).append(score.value)
    questions = None
    if name == "accuracy" and len(stages) == 1:
        questions = _questions(records, stages[0])
    estimates = {place: _estimate(found, questions) for place, found in values.items()}
    lengths = _shown_lengths({length for length, _ in values if length > 0})
    return Blocks(
        title=title,
        seeds=len(stages),
        interval="seeds" if len(stages) > 1 else "questions" if questions else "none",
        questions=questions,
        intact=estimates.get((0, 0)),
        lines=tuple(_line(length, estimates) for length in lengths),
    )


def _estimate(values: Sequence[float], questions: int | None) -> Estimate:
    """Student's t over seeds; of a single accuracy Wilson's interval over its questions."""
    if questions is None:
        return over_seeds(values)
    (value,) = values
    test = stats.binomtest(round(value * questions), questions)
    low, high = test.proportion_ci(0.95, method="wilson")
    return Estimate(value, float(low), float(high))


def _questions(records: Records, scores: Sequence[BlockScore]) -> int | None:
    """How many questions the stage asked, where the trials' settings tell: the sum of its tasks'
    limits. A task may have fewer than its limit; then its accuracies are no such fractions."""
    asked_by = {s.trial_id for s in records.stages if s.stage_id == scores[0].stage_id}
    for trial in records.trials:
        if trial.trial_id in asked_by:
            tasks = (trial.config.get("importance") or {}).get("tasks") or []
            limits = [task.get("limit") for task in tasks]
            count = sum(limits) if limits and None not in limits else 0
            hits = [score.value * count for score in scores]
            whole = all(abs(each - round(each)) < 1e-6 for each in hits)
            return count if count and whole else None
    return None


def _line(length: int, estimates: Mapping[tuple[int, int], Estimate]) -> BlockLine:
    ends = sorted(end for found, end in estimates if found == length)
    return BlockLine(length, tuple(ends), tuple(estimates[length, end] for end in ends))


def _shown_lengths(lengths: set[int]) -> list[int]:
    """Block Influence knows blocks of every length: of more than a few, 1, 2, and the quarter and
    the half of the layers are drawn."""
    if len(lengths) <= 4:
        return sorted(lengths)
    layers = max(lengths)
    return sorted(lengths & {1, 2, round(layers / 4), round(layers / 2)})


# --- drawing ---------------------------------------------------------------------------------


def layer_importance(records: Records, name: str) -> Drawing | None:
    """What is left when a block of layers is left out, by the layer where the block ends.

    `name` is what was measured: lm_loss, accuracy or block_influence. A panel per group of
    importance stages that differ in more than the seed.
    """
    found = blocks(records, name)
    shown = found[:PANELS]
    if not shown:
        return None
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    lengths = sorted({line.length for each in shown for line in each.lines})
    with canvas(WIDTH if columns > 1 else 5.6, 2.9 * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
        panels = list(grid.flat)
        for position, length in enumerate(lengths):  # the legend is in their order
            label = f"{length} layer" if length == 1 else f"{length} layers"
            panels[0].plot([], [], label=label, **series(position))
        for axes, each in zip(panels, shown, strict=False):
            _draw(axes, each, name, lengths)
            axes.set_title(fit(each.title, WIDTH / columns - 0.6), fontsize=SMALL)
            axes.set_xlabel("layer where the left-out block ends")
        for axes in panels[len(shown) :]:
            axes.remove()
        for row in grid:
            row[0].set_ylabel(SCORES[name][0])
        legend_below(figure, *panels[: len(shown)])
    return Drawing(
        f"layer_importance_{name}",
        _caption(name, shown, len(found), records.teachers_have_seeds),
        figure,
    )


def _draw(axes: Any, shown: Blocks, name: str, lengths: Sequence[int]) -> None:
    for position, line in enumerate(shown.lines):
        style = series(lengths.index(line.length))
        # Side by side, lest the intervals of several lengths hide one another.
        aside = (position - (len(shown.lines) - 1) / 2) * 0.12 if shown.interval != "none" else 0.0
        places = [layer + aside for layer in line.layers]
        axes.plot(places, [each.value for each in line.values], **style)
        for place, value in zip(places, line.values, strict=True):
            if value.low is not None and value.high is not None:
                ends = within(name, value.value, value.low, value.high)
                axes.vlines(place, *ends, color=style["color"], linewidth=0.9, alpha=0.6)
    if shown.intact is not None:
        axes.axhline(
            shown.intact.value, color=INK, linestyle=(0, (4, 3)), linewidth=1, label="intact model"
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _caption(name: str, shown: Sequence[Blocks], found: int, teachers_have_seeds: bool) -> str:
    text = (
        f"{SCORES[name][1]} when a block of consecutive layers is left out and nothing is "
        "retrained, by the layer where the block ends (the first layer is 1)."
    )
    seeds = {each.seeds for each in shown}
    if max(seeds) > 1:
        few, many = min(seeds), max(seeds)
        count = f"{many}" if few == many else f"{few} to {many}"
        if teachers_have_seeds:
            repeated, over = f"{count} teachers, one a seed", "teachers"
        else:
            repeated, over = f"{count} draws of calibration texts, one a seed", "draws"
        text += f" Means over {repeated}; bars: 95% intervals, Student's t over the {over}."
    elif shown[0].questions:
        text += (
            f" One teacher; bars: 95% intervals (Wilson) over its {shown[0].questions} questions."
        )
    else:
        text += " One teacher, so there is no interval."
    if found > len(shown):
        text += f" The first {len(shown)} of {found} groups of importance stages."
    return text
