"""Records -> tables, figures, best.json and one HTML page that can be read without a network."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from orchestrator import figures, tables
from orchestrator.asked import Claim
from orchestrator.records import TEACHER, Records
from orchestrator.selection import Estimate, Mode, Ranking, Winner, rank, report_metric, winner


def write(
    records: Records,
    folder: Path,
    question: str,
    select_metric: str,
    mode: Mode,
    command: str,
    claims: Sequence[Claim] = (),
    among: Mapping[str, Any] | None = None,
) -> Ranking | None:
    """Write tables/, figures/, report.html and best.json into a results folder.

    Gives the ranking, or None where no trial completed with a value of `select_metric`; then there
    is no best.json. Only trials of the grid that are `among` those meant can win. The page shows
    the verdicts of the sweep's claims, if it makes some, and quotes the folder's sweep.yaml if it
    is there. Equal records give equal files.
    """
    ranking = rank(records, select_metric, mode, among)
    chosen = winner(ranking)
    written = tables.all_tables(records, ranking, claims)
    drawn = figures.all_figures(records)
    paths = tables.write(written, folder / "tables")
    for old in set((folder / "tables").glob("claims.*")) - set(paths):
        old.unlink()  # a claim that the sweep no longer makes
    figures.write(drawn, folder / "figures")
    _write_best(folder / "best.json", records, ranking, chosen)
    resolved = folder / "sweep.yaml"
    page = _page(
        records=records,
        question=question,
        ranking=ranking,
        winner=chosen,
        summary=summary(chosen, select_metric),
        tables={table.name: _html(table) for table in written},
        figures=[_figure(drawing) for drawing in drawn],
        counts=_counts(records),
        failures=[trial for trial in records.trials if trial.status == "failed"],
        command=command,
        sweep_yaml=resolved.read_text() if resolved.is_file() else None,
    )
    _replace(folder / "report.html", page)
    return ranking


def summary(chosen: Winner | None, metric: str) -> str:
    """The outcome in two or three sentences, for the page and the terminal."""
    if chosen is None:
        return f"No trial completed with a value of {metric}, so there is no winner."
    configuration = chosen.configuration
    seeds = len(configuration.trials)
    over = f"mean of {seeds} seeds" if seeds > 1 else "one seed"
    text = f"{configuration.label} wins: {metric} {_shown(configuration.estimate)} ({over})."
    if chosen.reported is not None:
        text += (
            f" Its trial {chosen.trial.trial_id} (seed {chosen.trial.seed}) scores "
            f"{report_metric(metric)} {_shown(chosen.reported)} on the questions that took no part "
            "in choosing it"
        )
        teacher = chosen.teacher_reported
        text += f"; the teacher {_shown(teacher)}." if teacher else "."
    if chosen.tied:
        others = ", ".join(each.label for each in chosen.tied)
        text += f" Tied with it, and not cheaper: {others}."
    return text


def _shown(value: Estimate) -> str:
    if value.low is None or value.high is None:
        return f"{value.value:.3f}"
    return f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"


# --- best.json -------------------------------------------------------------------------------


def _write_best(
    path: Path, records: Records, ranking: Ranking | None, chosen: Winner | None
) -> None:
    if ranking is None or chosen is None:
        # A winner of an earlier run must not outlive it.
        path.unlink(missing_ok=True)
        return
    best = best_of(records, ranking, chosen)
    _replace(path, json.dumps(best, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def best_of(records: Records, ranking: Ranking, chosen: Winner) -> dict[str, Any]:
    """The content of best.json: the winning trial, how it was chosen, and what stands beside it."""
    trial, report = chosen.trial, report_metric(ranking.metric)
    return {
        "sweep": records.sweep,
        "profile": records.profile,
        "trial_id": trial.trial_id,
        "seed": trial.seed,
        "configuration": {
            "label": chosen.configuration.label,
            "baseline": trial.baseline,
            "axes": dict(trial.axes),
        },
        "parameters": trial.parameters,
        "tokens_trained": trial.tokens_trained,
        "metrics": dict(trial.metrics),
        "select": {
            "metric": ranking.metric,
            "mode": ranking.mode,
            **_estimate(chosen.selected),
            "over_seeds": _estimate(chosen.configuration.estimate)
            | {"spread": chosen.configuration.spread, "seeds": len(chosen.configuration.trials)},
        },
        "report": {"metric": report, **_estimate(chosen.reported)},
        "teacher": {
            "select": _estimate(chosen.teacher_selected),
            "report": _estimate(chosen.teacher_reported),
        },
        "tied": [
            {"label": each.label, "trial_ids": [tied.trial_id for tied in each.trials]}
            for each in chosen.tied
        ],
        "tied_trial_ids": [tied.trial_id for each in chosen.tied for tied in each.trials],
        "config": dict(trial.config),
        "measured_until": max(each.ended_at for each in records.trials),
    }


def _estimate(value: Estimate | None) -> dict[str, float | None]:
    if value is None:
        return {"value": None, "low": None, "high": None}
    return {"value": value.value, "low": value.low, "high": value.high}


# --- the page --------------------------------------------------------------------------------


def _page(**known: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = _shown
    return environment.get_template("report.html.j2").render(**known)


def _html(table: tables.Table) -> Mapping[str, Any]:
    columns, rows = table.for_readers()
    right = [column.numeric for column in columns]
    return {
        "caption": table.caption,
        "head": list(zip([column.header for column in columns], right, strict=True)),
        "rows": [list(zip(row, right, strict=True)) for row in rows],
    }


def _figure(drawing: figures.Drawing) -> Mapping[str, str]:
    # An image of its own: inlined as markup, two figures' ids would clash.
    data = base64.b64encode(drawing.svg()).decode()
    return {"source": f"data:image/svg+xml;base64,{data}", "caption": drawing.caption}


def _counts(records: Records) -> str:
    trials: Sequence[Any] = [t for t in records.trials if t.baseline != TEACHER]
    parts = [
        f"{len(trials)} trials and the teacher"
        if len(trials) < len(records.trials)
        else f"{len(trials)} trials"
    ]
    for status in ("completed", "stopped", "failed"):
        count = sum(trial.status == status for trial in records.trials)
        if count:
            parts.append(f"{count} {status}")
    return ", ".join(parts)


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
