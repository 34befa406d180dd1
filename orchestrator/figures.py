"""Records -> the figures of a sweep, as PNG and SVG: which there are, and their files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from orchestrator.canvas import Drawing
from orchestrator.plots_cost import cost_by_stage
from orchestrator.plots_effects import aggregations, main_effects
from orchestrator.plots_layers import SCORES, layer_importance
from orchestrator.plots_pareto import pareto
from orchestrator.plots_ranks import ranks_against_tokens
from orchestrator.plots_throughput import throughput
from orchestrator.plots_training import loss_curves
from orchestrator.records import Records
from orchestrator.selection import Ranking, rank


def all_figures(records: Records, ranking: Ranking | None = None) -> tuple[Drawing, ...]:
    """The figures for which there is something to draw.

    Main effects and the Pareto front are of the ranking's metric, of accuracy.mean without one.
    """
    ranking = ranking or rank(records)
    drawn = [
        *(
            (
                main_effects(records, ranking.metric),
                aggregations(records),
                pareto(records, ranking.metric),
            )
            if ranking
            else ()
        ),
        throughput(records),
        loss_curves(records),
        ranks_against_tokens(records),
        *(layer_importance(records, name) for name in SCORES),
        cost_by_stage(records),
    ]
    return tuple(each for each in drawn if each is not None)


def write(drawings: Sequence[Drawing], folder: Path) -> list[Path]:
    """Write every figure as `<name>.png` and `<name>.svg`; gives the paths. One of an earlier run
    that is not drawn any more goes."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for drawing in drawings:
        for kind, data in (("png", drawing.png()), ("svg", drawing.svg())):
            paths.append(folder / f"{drawing.name}.{kind}")
            paths[-1].write_bytes(data)
    for old in {*folder.glob("*.png"), *folder.glob("*.svg")} - set(paths):
        old.unlink()
    return paths
