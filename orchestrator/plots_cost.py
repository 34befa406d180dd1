"""What was spent on each kind of stage, and what sharing saved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator.canvas import (
    PALETTE,
    SMALL,
    WIDTH,
    Drawing,
    canvas,
    legend_below,
)
from orchestrator.records import Records, StageRecord

# --- cost by stage ---------------------------------------------------------------------------

Unit = Literal["cpu_s", "gpu_s"]
UNITS: Mapping[Unit, str] = {"cpu_s": "CPU", "gpu_s": "GPU"}
SCALES = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


@dataclass(frozen=True)
class StageCost:
    """Seconds that stages of a kind took, and what the trials that found one done would have
    paid for it. `run` and `shared` count them."""

    kind: str
    run: int
    shared: int
    spent: float
    saved: float


def stage_costs(records: Records, unit: Unit) -> tuple[StageCost, ...]:
    """By kind of stage, in the order in which trials first ask for them. What another sweep paid
    is not known here and counts as nothing."""
    paid = {stage.stage_id: stage for stage in records.stages if not stage.cached}

    def seconds(stages: Sequence[StageRecord]) -> float:
        return math.fsum(getattr(stage, unit) for stage in stages)

    found = []
    for kind in dict.fromkeys(stage.kind for stage in records.stages):
        mine = [stage for stage in records.stages if stage.kind == kind]
        run = [stage for stage in mine if not stage.cached]
        shared = [paid[s.stage_id] for s in mine if s.cached and s.stage_id in paid]
        found.append(StageCost(kind, len(run), len(shared), seconds(run), seconds(shared)))
    return tuple(found)


def cost_by_stage(records: Records) -> Drawing | None:
    """Bars by kind of stage: spent, and saved by sharing; a panel of its own for the GPU."""
    by_unit = {unit: stage_costs(records, unit) for unit in UNITS}
    shown = {u: costs for u, costs in by_unit.items() if any(c.spent + c.saved for c in costs)}
    if not shown:
        return None
    kinds = [cost.kind for cost in next(iter(shown.values()))]
    with canvas(WIDTH if len(shown) > 1 else 5.8, 0.7 + 0.3 * len(kinds)) as figure:
        panels = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
        for axes, (unit, costs) in zip(panels, shown.items(), strict=True):
            _draw_costs(axes, costs, UNITS[unit])
        panels[0].set_yticks(range(len(kinds)), kinds)
        panels[0].invert_yaxis()
        legend_below(figure, panels[0])
    return Drawing("cost_by_stage", _cost_caption(records, shown), figure)


def scaled(largest: float) -> tuple[float, str]:
    """Seconds in the unit in which so many are named, and its name."""
    return next((each for each in SCALES if largest >= 1.5 * each[0]), SCALES[-1])


def _draw_costs(axes: Any, costs: Sequence[StageCost], what: str) -> None:
    per, unit = scaled(max(cost.spent + cost.saved for cost in costs))
    spent, saved = [c.spent / per for c in costs], [c.saved / per for c in costs]
    places = range(len(costs))
    axes.barh(places, spent, height=0.62, color=PALETTE[0], label="spent")
    seen = [place for place in places if saved[place] > 0]
    label = "saved by sharing" if seen else None
    axes.barh(
        seen, [saved[n] for n in seen], left=[spent[n] for n in seen], height=0.62,
        facecolor="none", edgecolor=PALETTE[1], hatch="////", linewidth=0.8,
        label=label,
    )  # fmt: skip
    for place, cost, one, other in zip(places, costs, spent, saved, strict=True):
        text = _short(one) + (f" + {_short(other)} saved" if other > 0 else "")
        text = text if cost.run else "found done"
        axes.annotate(
            text, (one + other, place), xytext=(4, 0), textcoords="offset points", va="center",
            fontsize=SMALL,
        )  # fmt: skip
    axes.set_xlim(0, max(a + b for a, b in zip(spent, saved, strict=True)) * 1.32)
    axes.set_xlabel(f"{what} {unit}")
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)


def _short(value: float) -> str:
    return f"{value:.1f}" if value >= 0.05 or value == 0 else "<0.1"


def _cost_caption(records: Records, shown: Mapping[Unit, Sequence[StageCost]]) -> str:
    parts = []
    for unit, costs in shown.items():
        spent, saved = (math.fsum(getattr(c, n) for c in costs) for n in ("spent", "saved"))
        per, name = scaled(spent + saved)
        part = saved / (spent + saved)
        parts.append(
            f"{spent / per:.1f} {UNITS[unit]} {name} instead of {(spent + saved) / per:.1f} "
            f"({part:.0%} saved)"
        )
    run = sum(cost.run for cost in next(iter(shown.values())))
    asked = len(records.stages)
    return (
        f"Cost by kind of stage over all {len(records.trials)} trials and seeds: {run} of {asked} "
        f"stages asked for were run, {' and '.join(parts)}. Saved: what trials that found a stage "
        "done would have paid for it; sums, so there is no interval. What another sweep had paid "
        "is not counted."
    )
