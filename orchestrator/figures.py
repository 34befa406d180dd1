"""Records -> figures, as PNG and SVG, readable in print and by the colour-blind.

Figures are drawn on their own canvas, without pyplot's global state, and carry no date, so the
same records give the same files.
"""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from orchestrator.records import BlockScore, CurvePoint, Records
from orchestrator.selection import labels

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F5F00", "#000000")
"""Okabe and Ito's colours, the yellow made darker for paper."""

STYLE: Mapping[str, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "savefig.dpi": 200,
    "svg.hashsalt": "orchestrate",
}
GREY = "#BBBBBB"
BINS = 160
"""Points a line has at most; more are averaged, since print shows no more."""

SCORES = {
    "lm_loss": ("LM loss [nats per token]", "LM loss"),
    "accuracy": ("accuracy", "Accuracy"),
    "block_influence": ("1 - cosine similarity of input and output", "Block Influence"),
}
CURVES = {
    "kd_loss": "KL to the teacher [nats per token]",
    "lm_loss": "LM loss [nats per token]",
    "loss": "training loss [nats per token]",
}


@dataclass(frozen=True)
class Drawing:
    """A figure with its file name (without ending) and a sentence on what it shows."""

    name: str
    caption: str
    figure: Figure

    def svg(self) -> bytes:
        """The figure as SVG, with text as paths so that it looks the same everywhere."""
        return self._render("svg", {"Date": None, "Creator": None})

    def png(self) -> bytes:
        """The figure as PNG at 200 dots an inch."""
        return self._render("png", {"Software": None})

    def _render(self, kind: str, metadata: Mapping[str, None]) -> bytes:
        out = io.BytesIO()
        with matplotlib.rc_context(dict(STYLE)):
            self.figure.savefig(out, format=kind, metadata=dict(metadata))
        return out.getvalue()


def all_figures(records: Records) -> tuple[Drawing, ...]:
    """The figures for which there is something to draw."""
    drawn = [loss_curves(records), *(layer_importance(records, name) for name in SCORES)]
    return tuple(each for each in drawn if each is not None)


def write(drawings: Sequence[Drawing], folder: Path) -> list[Path]:
    """Write every figure as `<name>.png` and `<name>.svg`; gives the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for drawing in drawings:
        for kind, data in (("png", drawing.png()), ("svg", drawing.svg())):
            paths.append(folder / f"{drawing.name}.{kind}")
            paths[-1].write_bytes(data)
    return paths


# --- loss curves -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Line:
    """Mean, lowest and highest value over seeds, by tokens."""

    label: str
    tokens: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def loss_curves(records: Records) -> Drawing | None:
    """Losses by tokens trained, a line per configuration and a panel per loss."""
    names = {point.name for point in records.curves}
    shown = [name for name in CURVES if name in names]
    # The training loss repeats the others where they are recorded on their own.
    shown = [name for name in shown if name != "loss" or len(shown) == 1]
    if not shown:
        return None
    with matplotlib.rc_context(dict(STYLE)):
        legend = 0.2 * min(len(set(labels(records).values())), len(PALETTE))
        figure = _canvas(4.6 * len(shown), 3.2 + legend / len(shown))
        panels = figure.subplots(1, len(shown), squeeze=False)[0]
        many = False
        for axes, name in zip(panels, shown, strict=True):
            lines = _lines(records, name)
            many = many or len(lines) > len(PALETTE)
            _draw_lines(axes, lines)
            axes.set_xlabel("tokens trained")
            axes.set_ylabel(CURVES[name])
            axes.set_yscale("log")  # students start far apart and end close together
            axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
        _legend_below(figure, panels[0])
    grey = " Grey: the configurations that ended higher." if many else ""
    caption = (
        "Loss during distillation by tokens trained. Lines are means over seeds, bands reach from "
        f"the lowest to the highest seed.{grey}"
    )
    return Drawing("loss_curves", caption, figure)


def _lines(records: Records, name: str) -> list[_Line]:
    """A line per configuration in the order of the sweep file."""
    label = labels(records)
    by_label: dict[str, dict[str, list[CurvePoint]]] = {}
    for point in records.curves:
        if point.name == name and point.trial_id in label:
            trials = by_label.setdefault(label[point.trial_id], {})
            trials.setdefault(point.trial_id, []).append(point)
    return [_line(text, list(trials.values())) for text, trials in by_label.items()]


def _line(label: str, seeds: Sequence[Sequence[CurvePoint]]) -> _Line:
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
    return _Line(label, list(tokens), list(mean), list(low), list(high))


def _binned(rows: Sequence[tuple[float, ...]]) -> list[tuple[float, ...]]:
    width = -(-len(rows) // BINS)
    bins = [rows[start : start + width] for start in range(0, len(rows), width)]
    return [tuple(statistics.fmean(column) for column in zip(*b, strict=True)) for b in bins]


def _draw_lines(axes: Any, lines: Sequence[_Line]) -> None:
    drawn = [line for line in lines if line.tokens]
    # With more lines than colours, those that end lowest are told apart and the rest are grey.
    colours = dict(zip((line.label for line in drawn), PALETTE, strict=False))
    if len(drawn) > len(PALETTE):
        lowest = sorted(drawn, key=lambda line: line.mean[-1])[: len(PALETTE) - 1]
        colours = dict(zip((line.label for line in lowest), PALETTE, strict=False))
    for line in drawn:
        colour = colours.get(line.label)
        if colour is None:
            axes.plot(line.tokens, line.mean, color=GREY, linewidth=0.7, zorder=1)
            continue
        axes.fill_between(line.tokens, line.low, line.high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(line.tokens, line.mean, color=colour, label=line.label)


# --- layers ----------------------------------------------------------------------------------


def layer_importance(records: Records, name: str) -> Drawing | None:
    """What is left when a block of layers is left out, by the layer where the block ends.

    `name` is what was measured: lm_loss, accuracy or block_influence. A panel per importance
    stage that measured it (at most three). After figures 5 and 6 of the Llama-3.1-Minitron
    article.
    """
    stages = dict.fromkeys(score.stage_id for score in records.scores if score.name == name)
    if not stages:
        return None
    shown = list(stages)[:3]
    axis_label, title = SCORES[name]
    with matplotlib.rc_context(dict(STYLE)):
        figure = _canvas(max(5.2, 4.2 * len(shown)), 3.6)
        panels = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
        for axes, stage_id in zip(panels, shown, strict=True):
            scores = [s for s in records.scores if (s.stage_id, s.name) == (stage_id, name)]
            _draw_blocks(axes, scores)
            axes.set_xlabel("layer where the left-out block ends")
            if len(shown) > 1:
                axes.set_title(f"{scores[0].criterion}, {_asked_by(records, stage_id)}", fontsize=8)
        panels[0].set_ylabel(axis_label)
        _legend_below(figure, panels[0])
    caption = (
        f"{title} when a block of consecutive layers is left out and nothing is retrained, by the "
        "layer where the block ends (the first layer is 1)."
    )
    return Drawing(f"layer_importance_{name}", caption, figure)


def _asked_by(records: Records, stage_id: str) -> str:
    """Whose scores these are: of the one seed that asked for them, or of the stage."""
    trials = {stage.trial_id for stage in records.stages if stage.stage_id == stage_id}
    seeds = {trial.seed for trial in records.trials if trial.trial_id in trials}
    return f"seed {seeds.pop()}" if len(seeds) == 1 else stage_id.rpartition("-")[2][:6]


def _shown_lengths(lengths: set[int]) -> list[int]:
    """Block Influence knows blocks of every length: of more than a few, 1, 2, and the quarter and
    the half of the layers are drawn."""
    if len(lengths) <= 4:
        return sorted(lengths)
    layers = max(lengths)
    return sorted(lengths & {1, 2, round(layers / 4), round(layers / 2)})


def _draw_blocks(axes: Any, scores: Sequence[BlockScore]) -> None:
    markers = "osD^vPX*"
    lengths = _shown_lengths({score.block_length for score in scores if score.block_length > 0})
    for position, length in enumerate(lengths):
        mine = sorted((s.last + 1, s.value) for s in scores if s.block_length == length)
        layers, values = zip(*mine, strict=True)
        axes.plot(
            layers,
            values,
            color=PALETTE[position % len(PALETTE)],
            marker=markers[position % len(markers)],
            markersize=4,
            label=f"{length} layer" if length == 1 else f"{length} layers",
        )
    for intact in (score.value for score in scores if score.block_length == 0):
        axes.axhline(intact, color="#444444", linestyle="--", linewidth=1.1, label="intact model")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


# --- canvas ----------------------------------------------------------------------------------


def _canvas(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _legend_below(figure: Figure, axes: Any) -> None:
    handles, names = axes.get_legend_handles_labels()
    unique = dict(zip(names, handles, strict=True))
    # Inches at this size of type: an entry's line and margins, and a letter.
    widths = [0.55 + 0.068 * len(name) for name in unique]
    width = figure.get_figwidth()
    columns = len(unique) if sum(widths) < width else int(width / max(widths))
    columns = max(1, columns)
    figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=columns)
