"""Records -> tables, figures, best.json and one HTML page that can be read without a network."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator import figures, page, tables, throughput
from orchestrator.asked import Claim
from orchestrator.page import shown
from orchestrator.records import Records
from orchestrator.selection import (
    Configuration,
    Estimate,
    Mode,
    Ranking,
    Winner,
    rank,
    report_metric,
    winner,
)

NAMED = 3
"""Tied configurations that the summary names; the page lists all of them."""


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
    written = (*tables.all_tables(records, ranking, claims), *throughput.tables(records, claims))
    drawn = figures.all_figures(records, ranking)
    paths = tables.write(written, folder / "tables")
    for old in set((folder / "tables").glob("claims.*")) - set(paths):
        old.unlink()  # a claim that the sweep no longer makes
    figures.write(drawn, folder / "figures")
    _write_best(folder / "best.json", records, ranking, chosen)
    resolved = folder / "sweep.yaml"
    outcome = page.Outcome(
        records=records,
        question=question,
        ranking=ranking,
        winner=chosen,
        summary=summary(chosen, select_metric),
        tables=written,
        drawings=drawn,
        claims=claims,
        command=command,
        sweep_yaml=resolved.read_text(encoding="utf-8") if resolved.is_file() else None,
    )
    _replace(folder / "report.html", page.render(outcome))
    return ranking


def summary(chosen: Winner | None, metric: str) -> str:
    """The outcome in two or three sentences, for the page and the terminal."""
    if chosen is None:
        return f"No trial completed with a value of {metric}, so there is no winner."
    configuration = chosen.configuration
    text = (
        f"{configuration.label} wins: {metric} {shown(configuration.estimate)} ({_over(chosen)})."
    )
    seeds, trial = len(configuration.trials), f"{chosen.trial.trial_id} (seed {chosen.trial.seed})"
    if seeds > 1 and chosen.over_seeds is not None:
        text += f" On the questions that took no part in choosing: {report_metric(metric)} "
        text += _beside(chosen.over_seeds, chosen.teacher_over_seeds, "the teacher")
        text += f" Its best seed is the trial {trial}: "
        text += _beside(chosen.reported, chosen.teacher_reported, "its own teacher")
    elif chosen.reported is not None:
        text += f" Its trial {trial} scores {report_metric(metric)} on the questions that took no "
        text += "part in choosing it: "
        text += _beside(chosen.reported, chosen.teacher_reported, "the teacher")
    if chosen.tied:
        text += f" Tied with it, and not cheaper: {_names(chosen.tied)}."
    if chosen.untested:
        text += f" Not tested against it, as nothing was repeated: {_names(chosen.untested)}."
    return text


def _over(chosen: Winner) -> str:
    seeds, left = len(chosen.configuration.trials), chosen.configuration.unfinished
    if left:
        return f"{seeds} of {seeds + left} seeds"
    return f"mean of {seeds} seeds" if seeds > 1 else "one seed"


def _beside(student: Estimate | None, teacher: Estimate | None, whose: str) -> str:
    text = shown(student) if student else "not measured"
    return f"{text}; {whose} {shown(teacher)}." if teacher else f"{text}."


def _names(configurations: Sequence[Configuration]) -> str:
    """The first few; labels have commas of their own."""
    names = [each.label for each in configurations[:NAMED]]
    more = len(configurations) - len(names)
    return "; ".join(names) + (f"; and {more} more" if more else "")


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
        "report": {
            "metric": report,
            **_estimate(chosen.reported),
            "over_seeds": _estimate(chosen.over_seeds),
        },
        "teacher": {
            "select": _estimate(chosen.teacher_selected),
            "report": _estimate(chosen.teacher_reported),
            "report_over_seeds": _estimate(chosen.teacher_over_seeds),
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


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
