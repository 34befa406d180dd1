"""What every figure is drawn on: sizes, colours, legends, and how it becomes a file.

Figures have a canvas of their own, without pyplot's global state, and carry no date, so the same
drawing gives the same bytes. An SVG has no ground and follows the reader's light or dark scheme by
a style sheet of its own; a PNG is for print, on white.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from PIL import Image

WIDTH = 5.8
"""Inches that a figure may be wide: a page's text. Print would shrink the type of a wider one."""
SMALL = 8.0
"""Points of the smallest type."""
DOTS = 200
"""Dots an inch of a PNG."""
COLOURS = 128
"""Colours of a PNG."""
FONTS = "'DejaVu Sans',Verdana,Arial,sans-serif"
"""Matplotlib's own font is among the widest, so that text set in another finds room."""

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F5F00", "#000001")
"""Okabe and Ito's colours, the yellow made darker for paper. (Matplotlib writes no pure black.)"""
MARKERS = "osD^vPX*"
DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 1.5)),
    (0, (1, 1.2)),
    (0, (6, 1.5, 1, 1.5)),
    (0, (3, 1, 1, 1, 1, 1)),
    (0, (9, 2)),
    (0, (2, 2)),
    (0, (8, 1.5, 2, 1.5)),
)
INK, SOFT, GREY, GRID = "#1C1C1E", "#62626A", "#B4B4BA", "#DCDCE0"

DARK: Mapping[str, str] = {
    INK: "#ECECF0",
    SOFT: "#A2A2AC",
    GREY: "#63636B",
    GRID: "#3A3A42",
    **dict(
        zip(
            PALETTE,
            (
                "#4FA3E0",
                "#F57F3C",
                "#1FC296",
                "#E39CC6",
                "#F2B632",
                "#A8DDFB",
                "#C9B458",
                "#FFFFFF",
            ),
            strict=True,
        )
    ),
}
"""What each colour becomes on a dark page: as far apart as before, and light enough."""

STYLE: Mapping[str, Any] = {
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "text.parse_math": False,  # a configuration's name may hold a dollar sign
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "savefig.dpi": DOTS,
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Drawing:
    """A figure with its file name (without ending) and what a reader must know to read it."""

    name: str
    caption: str
    figure: Figure

    def svg(self) -> bytes:
        """The figure as SVG, light or dark as its reader is. Text stays text: it can be found, and
        letters drawn as paths would be most of the file."""
        drawn = self._render("svg", {"Date": None, "Creator": None}, "none")
        return _with_style_sheet(_shortened_numbers(drawn))

    def png(self) -> bytes:
        """The figure as PNG on white, at 200 dots an inch, in few colours."""
        out = io.BytesIO()
        with Image.open(io.BytesIO(self._render("png", {"Software": None}, "white"))) as image:
            _few_colours(image.convert("RGB")).save(out, "png", optimize=True, dpi=(DOTS, DOTS))
        return out.getvalue()

    def _render(self, kind: str, metadata: Mapping[str, None], ground: str) -> bytes:
        out = io.BytesIO()
        # Two figures in one page must not share the names of their parts.
        with matplotlib.rc_context({**STYLE, "svg.hashsalt": self.name}):
            self.figure.savefig(out, format=kind, metadata=dict(metadata), facecolor=ground)
        return out.getvalue()


def _few_colours(image: Image.Image) -> Image.Image:
    """A third of the file, with the colours that mean something as they are."""
    exact = [int(name[n : n + 2], 16) for name in ("#FFFFFF", *DARK) for n in (1, 3, 5)]
    blends = COLOURS - len(exact) // 3
    found = (image.quantize(blends, dither=Image.Dither.NONE).getpalette() or [])[: 3 * blends]
    palette_N3 = np.array([*exact, *found]).reshape(-1, 3)
    # Pillow's own search for the nearest colour of a palette is a rough one.
    packed_HW = np.asarray(image).astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
    used_C, places = np.unique(packed_HW, return_inverse=True)
    used_C3 = np.stack([used_C >> 16, used_C >> 8 & 255, used_C & 255], axis=1)
    squares_CN = ((used_C3[:, None] - palette_N3[None]) ** 2).sum(axis=2)
    indices = squares_CN.argmin(axis=1)[places].reshape(packed_HW.shape).astype(np.uint8)
    few = Image.fromarray(indices)
    few.putpalette(palette_N3.ravel().tolist())
    return few


_TAG = re.compile(rb"<[^>]*>")
_LONG_NUMBER = re.compile(rb"scale\([^)]*\)|(\d+\.\d\d)\d+")
_OF_EVERY_TEXT = re.compile(rb" font-family: [^;]*;| transform=\"rotate\(-0 [^\"]*\"")


def _shortened_numbers(svg: bytes) -> bytes:
    """Without the digits below a hundredth of a point, which make up a third of the file. What
    stands between the tags is for people and stays."""

    # Scales turn a marker's own units into points: a hundredth there would be seen.
    def shortened(tag: re.Match[bytes]) -> bytes:
        return _LONG_NUMBER.sub(lambda number: number[1] or number[0], tag[0])

    return _TAG.sub(shortened, svg)


def _with_style_sheet(svg: bytes) -> bytes:
    """With the fonts said once, and colours that change on a dark screen.

    Colours stay written out where they are used, so that a program which knows no media queries
    shows the light ones.
    """
    # No `svg` before the brackets: a marker that is used again has no such ancestor in a browser.
    rules = "".join(
        f'[style*="{what}: {light.lower()}"]{{{what}:{dark.lower()}!important}}'
        for light, dark in DARK.items()
        for what in ("fill", "stroke")
    )
    sheet = (
        f"<style>text{{font-family:{FONTS}}}"
        f"@media screen and (prefers-color-scheme:dark){{{rules}}}</style>"
    )
    plain = _OF_EVERY_TEXT.sub(b"", svg)
    return plain.replace(b"</style>", b"</style>" + sheet.encode(), 1)


# --- canvas ----------------------------------------------------------------------------------


@contextmanager
def canvas(width: float, height: float) -> Iterator[Figure]:
    """An empty figure of so many inches, to be filled while the style holds."""
    with matplotlib.rc_context(dict(STYLE)):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        # Laid out once, and not again for each file.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")


def series(position: int) -> dict[str, Any]:
    """Colour, marker and dashes of the n-th of several lines: they can be told apart by each."""
    # The ninth has the first one's colour, and so another marker and other dashes.
    other = position + position // len(PALETTE)
    return {
        "color": PALETTE[position % len(PALETTE)],
        "marker": MARKERS[other % len(MARKERS)],
        "linestyle": DASHES[other % len(DASHES)],
    }


def tokens_axis(axes: Any) -> None:
    """Name the x axis and count it in k, M and G."""
    axes.set_xlabel("tokens trained")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def loss_axis(axes: Any, lowest: float, highest: float) -> None:
    """A logarithmic y axis where values lie far apart, with plain numbers."""
    if lowest <= 0 or highest / lowest < 5:
        return
    axes.set_yscale("log")
    few = highest / lowest < 200
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def within(axis: str, value: float, low: float, high: float) -> tuple[float, float]:
    """A value's interval as far as it means something: no accuracy lies outside of 0 and 1. What a
    task measures may be a perplexity, which is no accuracy."""
    share = axis.startswith("accuracy") and 0 <= value <= 1
    return (max(0.0, low), min(1.0, high)) if share else (low, high)


# --- text ------------------------------------------------------------------------------------


def inches(text: str, size: float = SMALL) -> float:
    """How wide a line of text is."""
    width, _, _ = text_to_path.get_text_width_height_descent(text, FontProperties(size=size), False)
    return float(width) / 72


def fit(text: str, room: float, lines: int = 2, size: float = SMALL) -> str:
    """The text broken at spaces into at most so many lines, none wider than `room` inches.

    What is too long loses its middle, since names of configurations differ at either end.
    """
    rows: list[str] = []
    for word in text.split():
        longer = f"{rows[-1]} {word}" if rows else word
        if rows and len(rows) < lines and inches(longer, size) > room:
            rows.append(word)
        else:
            rows[-1:] = [longer]
    return "\n".join(_shortened(row, room, size) for row in rows)


def brief(names: Iterable[str]) -> tuple[str, dict[str, str]]:
    """Names of configurations without what all of them repeat: a=1, b=2 -> a, b and 1, 2.

    Gives the names of the axes, to stand above, and a short name for each; nothing to stand above
    where the configurations have not all the same axes. Baselines keep their names.
    """
    parts = {name: [part.partition("=") for part in name.split(", ")] for name in names}
    axes = {tuple(key for key, _, _ in found) for found in parts.values() if found[0][1]}
    if len(axes) != 1:
        return "", {name: name for name in parts}
    (keys,) = axes
    return ", ".join(keys), {
        name: ", ".join(value for _, _, value in found) if found[0][1] else name
        for name, found in parts.items()
    }


def _shortened(row: str, room: float, size: float) -> str:
    kept = len(row)
    short = row
    while inches(short, size) > room and kept > 2:
        kept -= 1
        short = f"{row[: kept - kept // 2]}\N{HORIZONTAL ELLIPSIS}{row[-(kept // 2) :]}"
    return short


# --- legends ---------------------------------------------------------------------------------

_HANDLE = 0.55
"""Inches of a legend's entry beside its text, at 8 points."""
_ROW = 0.17
"""Inches of a legend's row."""


def legend_below(figure: Figure, *panels: Any) -> None:
    """One legend for all panels under the figure, which grows by as much. What the names of
    configurations repeat stands above."""
    entries: dict[str, Any] = {}
    for axes in panels:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(name, handle)
    if not entries:
        return
    room = figure.get_figwidth() - 0.1
    title, short = brief(entries)
    names = [fit(short[name], room - _HANDLE) for name in entries]
    columns = _columns(
        [_HANDLE + max(inches(row) for row in name.split("\n")) for name in names], room
    )
    rows = math.ceil(len(names) / columns)
    extra = sum(name.count("\n") for name in names) / columns
    rows += bool(title)
    figure.set_figheight(figure.get_figheight() + _ROW * (rows + extra) + 0.1)
    figure.legend(
        list(entries.values()),
        names,
        title=fit(title, room, 1) or None,
        title_fontproperties={"size": SMALL, "weight": "bold"},
        alignment="left",
        loc="outside lower center",
        ncols=columns,
        handlelength=2.6,
        columnspacing=1.4,
        labelspacing=0.35,
    )


def _columns(widths: Sequence[float], room: float) -> int:
    """The most columns in which entries of these widths, set column by column, find room."""
    for columns in range(len(widths), 1, -1):
        rows, longer = divmod(len(widths), columns)
        heights = [rows + 1] * longer + [rows] * (columns - longer)
        starts = [sum(heights[:column]) for column in range(columns)]
        needed = (max(widths[s : s + h]) for s, h in zip(starts, heights, strict=True))
        if sum(needed) <= room:
            return columns
    return 1
