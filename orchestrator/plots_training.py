"""What is seen while students are trained: their losses."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.canvas import (
    GREY,
    PALETTE,
    WIDTH,
    Drawing,
    canvas,
    legend_below,
    loss_axis,
    series,
    tokens_axis,
)
from orchestrator.records import CurvePoint, Records, TrialRecord
from orchestrator.selection import labels

BINS = 60
"""Points a line has at most; more are averaged, since print shows no more."""

CURVES = {
    "heldout_loss": "held-out LM loss [nats per token]",
    "kd_loss": "loss on logits [nats per token]",
    "lm_loss": "LM loss [nats per token]",
    "ce_loss": "training LM loss [nats per token]",
    "loss": "training loss [nats per token]",
}
SHOWN = ("heldout_loss", "kd_loss", "lm_loss")
"""Curves that are drawn where there are any."""
FOR_THE_REST = ("ce_loss", "loss")
"""Curves that are drawn where a configuration has none of those."""
DIVERGENCES = {
    "forward_kl": "KL to the teacher [nats per token]",
    "reverse_kl": "reverse KL to the teacher [nats per token]",
}


@dataclass(frozen=True)
class Line:
    """Mean, lowest and highest value over seeds, by tokens."""

    label: str
    seeds: int
    tokens: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def lines(records: Records, name: str) -> list[Line]:
    """A line per configuration that has the curve, in the order of the sweep file: over the seeds
    that completed, where any did, so that one that was stopped does not cut the others short."""
    completed = {trial.trial_id for trial in records.trials if trial.status == "completed"}
    found = []
    for label, trials in points_of(records, name).items():
        whole = [points for trial_id, points in trials.items() if trial_id in completed]
        found.append(_line(label, whole or list(trials.values())))
    return [line for line in found if line.tokens]


def points_of(records: Records, name: str) -> dict[str, dict[str, list[CurvePoint]]]:
    """A curve's points by configuration and trial."""
    label = labels(records)
    found: dict[str, dict[str, list[CurvePoint]]] = {}
    for point in records.curves:
        if point.name == name and point.trial_id in label:
            trials = found.setdefault(label[point.trial_id], {})
            trials.setdefault(point.trial_id, []).append(point)
    return found


def _line(label: str, seeds: Sequence[Sequence[CurvePoint]]) -> Line:
    by_tokens: dict[int, list[float]] = {}
    for points in seeds:
        for point in points:
            by_tokens.setdefault(point.tokens, []).append(point.value)
    # A seed that ended early would pull the mean: only tokens that all seeds reached count.
    common = sorted(t for t, values in by_tokens.items() if len(values) >= len(seeds))
    rows = [
        (float(t), statistics.fmean(by_tokens[t]), min(by_tokens[t]), max(by_tokens[t]))
        for t in common
    ]
    tokens, mean, low, high = zip(*_binned(rows), strict=True) if rows else ((), (), (), ())
    return Line(label, len(seeds), tokens, mean, low, high)


def _binned(rows: Sequence[tuple[float, ...]]) -> list[tuple[float, ...]]:
    width = -(-len(rows) // BINS)
    bins = [rows[start : start + width] for start in range(0, len(rows), width)]
    return [tuple(statistics.fmean(column) for column in zip(*b, strict=True)) for b in bins]


def loss_curves(records: Records) -> Drawing | None:
    """Losses by tokens trained, a line per configuration and a panel per loss."""
    by_name = _panels(records)
    if not by_name:
        return None
    shown = list(by_name)
    styled = _styled(list(by_name.values()))
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    with canvas(WIDTH if columns > 1 else 5.6, 3.0 * rows) as figure:
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes in panels[len(shown) :]:
            axes.remove()
        panels = panels[: len(shown)]
        for axes, name in zip(panels, shown, strict=True):
            _draw_lines(axes, by_name[name], styled)
            tokens_axis(axes)
            axes.set_ylabel(_axis(records, name))
            # Students start far apart and end close together.
            values = [value for line in by_name[name] for value in (*line.low, *line.high)]
            loss_axis(axes, min(values), max(values))
        legend_below(figure, *panels)
    drawn = [line for panel in by_name.values() for line in panel]
    seeds = {line.seeds for line in drawn}
    grey = any(line.label not in styled for line in drawn)
    return Drawing("loss_curves", _curves_caption(seeds, grey), figure)


def _panels(records: Records) -> dict[str, list[Line]]:
    """Curves and their lines, so that every configuration that has a curve has a line."""
    known = {name: lines(records, name) for name in (*SHOWN, *FOR_THE_REST)}
    found = {name: known[name] for name in SHOWN if known[name]}
    for name in FOR_THE_REST:
        told = {line.label for panel in found.values() for line in panel}
        if {line.label for line in known[name]} - told:
            found[name] = known[name]
    return found


def _axis(records: Records, name: str) -> str:
    if name != "kd_loss":
        return CURVES[name]
    measured = {point.trial_id for point in records.curves if point.name == name}
    kinds = {setting(t, "distill.loss.logits") for t in records.trials if t.trial_id in measured}
    return DIVERGENCES.get(kinds.pop(), CURVES[name]) if len(kinds) == 1 else CURVES[name]


def _curves_caption(seeds: set[int], grey: bool) -> str:
    text = "Losses during distillation by tokens trained. "
    if max(seeds) > 1:
        few, many = min(seeds), max(seeds)
        count = f"{many}" if few == many else f"{few} to {many}"
        text += f"Lines: means over {count} seeds; bands: from the lowest to the highest seed."
    else:
        text += "One seed each, so there is no interval."
    return f"{text} Grey: configurations whose lines end higher." if grey else text


def _styled(panels: Sequence[Sequence[Line]]) -> dict[str, int]:
    """Configurations that are told apart, with the number of their style, the same in all panels.
    With more than there are colours, those that end lowest in the first panel that has them."""
    ends: dict[str, float] = {}
    for panel in panels:
        ends = {**{line.label: line.mean[-1] for line in panel}, **ends}
    in_order = list(dict.fromkeys(line.label for panel in panels for line in panel))
    if len(in_order) > len(PALETTE):
        in_order = sorted(in_order, key=lambda label: ends[label])[: len(PALETTE) - 1]
    return {label: number for number, label in enumerate(in_order)}


def _draw_lines(axes: Any, drawn: Sequence[Line], styled: Mapping[str, int]) -> None:
    for line in drawn:
        if line.label not in styled:
            axes.plot(line.tokens, line.mean, color=GREY, linewidth=0.8, zorder=1)
            continue
        style = {**series(styled[line.label]), "marker": None}
        band = {"color": style["color"], "alpha": 0.13, "linewidth": 0}
        if line.seeds > 1:
            axes.fill_between(line.tokens, line.low, line.high, **band)
        axes.plot(line.tokens, line.mean, label=line.label, **style)


def setting(trial: TrialRecord, name: str) -> str:
    """A text for a dotted setting of the trial."""
    value: Any = trial.config
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
