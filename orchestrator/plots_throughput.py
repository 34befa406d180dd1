"""How fast the students are: after figure 8 of the article on Llama-3.1-Minitron 4B."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.canvas import INK, MARKERS, PALETTE, SOFT, WIDTH, Drawing, canvas, legend_below
from orchestrator.records import TEACHER, Records, TrialRecord
from orchestrator.selection import Estimate, groups, labels, over_seeds, value_of
from orchestrator.throughput import METRIC, combos, timed_at
from trainers.config import Load

REFERENCES = (("depth", 2.7, (0, (6, 2))), ("width", 1.8, (0, (1.5, 1.5))))
"""Requests per second of Llama-3.1-Minitron 4B, pruned so, as a ratio to Llama 3.1 8B: TensorRT-LLM
on one H100, P2 (arXiv 2408.11796) and the article's figure 8."""


def ratios(records: Records) -> dict[str, dict[Load, Estimate]]:
    """Requests per second relative to the teacher's, by configuration and load: the mean over
    seeds with Student's t; of one seed the lowest and highest ratio of its rounds."""
    asked, label = combos(records), labels(records)
    found: dict[str, dict[Load, Estimate]] = {}
    for trials in groups(records.trials):
        for load in asked:
            measured = [t for t in trials if value_of(t, timed_at(load)) is not None]
            values = [v for t in measured if (v := value_of(t, timed_at(load))) is not None]
            if values:
                known = over_seeds(values)
                if len(values) == 1:
                    ends = (f"{METRIC}_{end}.{load.name}" for end in ("low", "high"))
                    known = Estimate(values[0], *map(measured[0].metrics.get, ends))
                found.setdefault(label[trials[0].trial_id], {})[load] = known
    return found


def throughput(records: Records) -> Drawing | None:
    """Requests per second relative to the teacher, by input and output length: after figure 8 of
    the article on Llama-3.1-Minitron 4B."""
    measured, asked = ratios(records), combos(records)
    if not measured:
        return None
    batches = len({(load.batch, load.teacher_batch) for load in asked}) > 1
    shown = sorted(measured, key=lambda name: (name == TEACHER, -_mean(measured[name])))
    with canvas(WIDTH, 3.2) as figure:
        axes = figure.subplots()
        for position, name in enumerate(shown[: len(PALETTE)]):
            _draw_ratios(axes, measured[name], asked, position, min(len(shown), len(PALETTE)), name)
        _draw_references(axes)
        axes.set_xticks(range(len(asked)), [_tick(load, batches) for load in asked])
        axes.set_xlim(-0.5, len(asked) - 0.5)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens in / tokens out" + ("" if batches else f", batch {asked[0].batch}"))
        axes.set_ylabel("requests per second,\nrelative to the teacher")
        axes.grid(False, axis="x")
        legend_below(figure, axes)
    return Drawing("throughput", _throughput_caption(_times(records), len(shown)), figure)


def _times(records: Records) -> list[int]:
    """With how many seeds each configuration was timed, at whichever load that is most."""
    return [
        most
        for trials in groups(records.trials)
        if (most := max(_timed(trials, load) for load in combos(records)))
    ]


def _timed(trials: Sequence[TrialRecord], load: Load) -> int:
    return sum(value_of(trial, timed_at(load)) is not None for trial in trials)


def _tick(load: Load, batches: bool) -> str:
    """For an axis; with the batch where it varies."""
    of_teacher = f" ({load.teacher_batch})" if load.teacher_batch != load.batch else ""
    lengths = f"{load.input}/{load.output}"
    return f"{lengths}\nbatch {load.batch}{of_teacher}" if batches else lengths


def _mean(known: Mapping[Load, Estimate]) -> float:
    return statistics.fmean(each.value for each in known.values())


def _draw_ratios(
    axes: Any, known: Mapping[Load, Estimate], asked: Sequence[Load], position: int, of: int,
    name: str,
) -> None:  # fmt: skip
    colour = SOFT if name == TEACHER else PALETTE[position]
    width = 0.8 / of
    places = [n + (position - (of - 1) / 2) * width for n, c in enumerate(asked) if c in known]
    values = [known[load] for load in asked if load in known]
    axes.bar(places, [v.value for v in values], width=0.88 * width, color=colour, alpha=0.35)
    axes.plot(
        places, [v.value for v in values], linestyle="none", color=colour,
        marker=MARKERS[position], label=name,
    )  # fmt: skip
    for place, value in zip(places, values, strict=True):
        if value.low is not None and value.high is not None:
            axes.vlines(place, value.low, value.high, color=colour, linewidth=1.2)


def _draw_references(axes: Any) -> None:
    axes.axhline(1, color=INK, linewidth=0.8)
    for name, ratio, dashes in REFERENCES:
        axes.axhline(
            ratio, color=INK, linewidth=1, linestyle=dashes, label=f"published, {name}: {ratio}"
        )


def _throughput_caption(times: Sequence[int], count: int) -> str:
    rounds = "from the lowest to the highest ratio of its rounds"
    bars = f"one seed; lines: {rounds}"
    if max(times) > 1:
        bars = (
            f"means over {max(times)} seeds (each timed anew); lines: 95% intervals, Student's t "
            "over seeds"
        )
        if min(times) == 1:
            bars = f"{bars}, and of what was timed once {rounds}"
    text = (
        "Requests per second relative to the teacher, measured in turns in the same run, by tokens "
        f"in and out: {bars}. Teacher: beside a copy of itself; how far it is from 1 says how far "
        "to trust the rest. Published: Llama-3.1-Minitron 4B pruned in depth (2.7) and in width "
        "(1.8) beside Llama 3.1 8B, TensorRT-LLM on one H100, P2 (arXiv 2408.11796) and the "
        "article's figure 8."
    )
    return f"{text} The {len(PALETTE)} fastest." if count > len(PALETTE) else text
