"""When the ranking of students stops changing while they are trained."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator
from scipy import stats

from orchestrator.canvas import (
    INK,
    PALETTE,
    SMALL,
    WIDTH,
    Drawing,
    brief,
    canvas,
    fit,
    series,
    tokens_axis,
)
from orchestrator.plots_training import points_of, setting
from orchestrator.records import Records, TrialRecord
from orchestrator.selection import Estimate, labels, over_seeds

FEWEST = 4
"""Fewer configurations hardly make a ranking."""
NAMED = 12
"""Configurations whose ranks are drawn; of more, those that end best."""
WINDOWS = 12
"""Parts of the training over which a training loss is averaged, since each step has other text."""
SETTLED = 0.9
"""Kendall's tau from which on two rankings count as the same."""

COMPARABLE: Mapping[str, tuple[str, ...]] = {
    "heldout_loss": (),
    "kd_loss": ("distill.loss.logits", "distill.loss.temperature", "distill.loss.top_k"),
    "ce_loss": (),
    "loss": ("distill.loss",),
}
"""Curves by which students may be ranked, best first -> settings that all must share for it."""
TEACHERS = ("source", "correct", "chain", "distill.teacher", "distill.signal")
"""Settings that all must share where the curve measures the distance from the teacher."""


@dataclass(frozen=True)
class RankHistory:
    """Ranks of configurations along their training.

    `tokens` has T places. `ranks` holds by configuration, best at the end first, its rank (1 is
    best) by the mean over seeds at each of them. `agreement` is Kendall's tau between the ranking
    there and the last one: found within each seed, then averaged, with its interval over seeds.
    """

    measure: str
    seeds: int
    tokens: tuple[int, ...]
    ranks: Mapping[str, tuple[float, ...]]
    agreement: tuple[Estimate, ...]

    @property
    def settled(self) -> int | None:
        """Tokens from which on the mean agreement never falls below `SETTLED`; None where it does
        until the end, as the last ranking agrees with itself."""
        low = [n for n, each in enumerate(self.agreement) if each.value < SETTLED]
        first = low[-1] + 1 if low else 0
        return self.tokens[first] if first < len(self.tokens) - 1 else None


def rank_history(records: Records) -> RankHistory | None:
    """Ranks by the first curve by which the students can be compared, None where there is none.

    Configurations that were trained on as many tokens and with as many seeds as most others; at
    least `FEWEST`.
    """
    label = labels(records)
    completed = {t.trial_id: t for t in records.trials if t.status == "completed"}
    for name in COMPARABLE:
        kept = _alike(_by_seed(records, name, completed))
        trials = [trial for trial in completed.values() if label[trial.trial_id] in kept]
        if len(kept) >= FEWEST and _comparable(trials, name):
            return _history(name, kept)
    return None


_Curve = Mapping[int, float]  # tokens -> value
_Seeds = Mapping[int, _Curve]


def _by_seed(
    records: Records, name: str, completed: Mapping[str, TrialRecord]
) -> dict[str, dict[int, _Curve]]:
    """Curves by configuration and seed."""
    return {
        label: {
            completed[trial].seed: {point.tokens: point.value for point in points}
            for trial, points in trials.items()
            if trial in completed
        }
        for label, trials in points_of(records, name).items()
    }


def _alike(by_label: Mapping[str, _Seeds]) -> dict[str, _Seeds]:
    """The largest set of configurations that share their seeds and their last token."""
    groups: dict[tuple[Any, ...], dict[str, _Seeds]] = {}
    for label, seeds in by_label.items():
        if seeds:
            key = (tuple(sorted(seeds)), min(max(curve) for curve in seeds.values()))
            groups.setdefault(key, {})[label] = seeds
    return max(groups.values(), key=len, default={})


def _comparable(trials: Sequence[TrialRecord], name: str) -> bool:
    settings = COMPARABLE[name] + (TEACHERS if name in ("kd_loss", "loss") else ())
    return all(len({setting(trial, each) for trial in trials}) == 1 for each in settings)


def _history(name: str, by_label: Mapping[str, _Seeds]) -> RankHistory | None:
    seeds = sorted(next(iter(by_label.values())))
    curves = [by_label[label][seed] for label in by_label for seed in seeds]
    common = sorted(set.intersection(*(set(curve) for curve in curves)))
    # Held-out text is the same at every point; of the training's own, windows are averaged.
    windows = [[t] for t in common] if name == "heldout_loss" else _windows(common)
    if len(windows) < 2:
        return None
    values_LST = np.array(
        [
            [[statistics.fmean(by_label[label][seed][t] for t in w) for w in windows]
             for seed in seeds]
            for label in by_label
        ]
    )  # fmt: skip
    ranks_LT = stats.rankdata(values_LST.mean(axis=1), axis=0)
    order = np.argsort(ranks_LT[:, -1], kind="stable")
    names = list(by_label)
    return RankHistory(
        measure=name,
        seeds=len(seeds),
        tokens=tuple(window[-1] for window in windows),
        ranks={names[row]: tuple(ranks_LT[row].tolist()) for row in order},
        agreement=tuple(_agreement(values_LST, place) for place in range(len(windows))),
    )


def _windows(tokens: Sequence[int]) -> list[list[int]]:
    return [part.tolist() for part in np.array_split(tokens, min(WINDOWS, len(tokens)))]


def _agreement(values_LST: Any, place: int) -> Estimate:
    """Kendall's tau with the last ranking, over seeds. Where all are equal there is no ranking,
    and nothing agrees."""
    taus = [
        float(stats.kendalltau(values_LT[:, place], values_LT[:, -1]).statistic)
        for values_LT in np.moveaxis(values_LST, 1, 0)
    ]
    return over_seeds([0.0 if np.isnan(tau) else tau for tau in taus])


def ranks_against_tokens(records: Records) -> Drawing | None:
    """When rankings stop flipping: how like the last one each is, and the ranks themselves."""
    history = rank_history(records)
    if history is None:
        return None
    named = list(history.ranks)[:NAMED]
    with canvas(WIDTH, 2.1 + 0.27 * len(named)) as figure:
        top, below = figure.subplots(
            2, 1, sharex=True, height_ratios=[1.5, 0.5 + 0.27 * len(named)]
        )
        _draw_agreement(top, history)
        _draw_ranks(below, history, named)
        tokens_axis(below)
    return Drawing("ranks_against_tokens", _ranks_caption(history, len(named)), figure)


def _draw_agreement(axes: Any, history: RankHistory) -> None:
    values = [each.value for each in history.agreement]
    known = [each for each in history.agreement if each.low is not None and each.high is not None]
    if len(known) == len(values):
        low = [max(-1.0, each.low or 0.0) for each in known]
        high = [min(1.0, each.high or 0.0) for each in known]
        axes.fill_between(history.tokens, low, high, color=PALETTE[0], alpha=0.18, linewidth=0)
    axes.plot(history.tokens, values, color=PALETTE[0], marker="o", markersize=3)
    axes.axhline(SETTLED, color=INK, linestyle=(0, (4, 3)), linewidth=0.8)
    _mark_settled(axes, history)
    axes.set_ylabel("agreement\n(Kendall's tau)")
    axes.set_ylim(min(0.0, *values) - 0.05, 1.05)


def _draw_ranks(axes: Any, history: RankHistory, named: Sequence[str]) -> None:
    title, short = brief(named)
    beside = {"textcoords": "offset points", "fontsize": SMALL, "annotation_clip": False}
    last, every = history.tokens[-1], max(1, len(history.tokens) // 12)
    for position, label in enumerate(named):
        # Markers at the last point and backwards from there.
        marks = slice((len(history.tokens) - 1) % every, None, every)
        axes.plot(
            history.tokens, history.ranks[label], **series(position), markersize=3.5,
            markevery=marks,
        )  # fmt: skip
        # Equal ranks share a place, but their names must not.
        place = (last, position + 1)
        axes.annotate(
            fit(short[label], 2.4), place, xytext=(8, 0), va="center", linespacing=0.95, **beside
        )
    axes.annotate(
        fit(title, 2.4), (last, 0.4), xytext=(8, 0), va="bottom", fontweight="bold", **beside
    )
    _mark_settled(axes, history)
    axes.set_ylabel("rank")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=3))
    axes.margins(x=0.02)
    axes.invert_yaxis()
    axes.grid(False)


def _mark_settled(axes: Any, history: RankHistory) -> None:
    if history.settled is not None:
        axes.axvline(history.settled, color=INK, linestyle=(0, (1, 1.5)), linewidth=1)


def _ranks_caption(history: RankHistory, named: int) -> str:
    by = {
        "heldout_loss": "held-out LM loss",
        "kd_loss": f"the training's loss on logits (averaged over {WINDOWS} parts of the training: "
        "no held-out points were recorded)",
        "ce_loss": f"the training's LM loss (averaged over {WINDOWS} parts of the training: no "
        "held-out points were recorded)",
        "loss": f"the training loss (averaged over {WINDOWS} parts of the training: no held-out "
        "points were recorded)",
    }[history.measure]
    count = len(history.ranks)
    over = (
        f"found within each of {history.seeds} seeds and averaged; band: its 95% interval, "
        "Student's t over seeds"
        if history.seeds > 1
        else "of one seed, so there is no interval"
    )
    settled = (
        f"It does not stay at {SETTLED} (dashed) or more before the end"
        if history.settled is None
        else f"From {history.settled:,} tokens on (dotted) it stays at {SETTLED} or more"
    )
    text = (
        f"When the ranking stops changing: {count} configurations by {by}. Above: Kendall's tau "
        f"between the ranking at each point and the last one, {over}. {settled}. Below: ranks by "
        "the mean over seeds, 1 is best"
    )
    return f"{text}; the {named} that end best." if named < count else f"{text}."
