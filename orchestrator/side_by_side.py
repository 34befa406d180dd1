"""What `orchestrator.comparing` found, as tables for a terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from orchestrator.asked import lower_is_better
from orchestrator.claims import Verdict
from orchestrator.comparing import Answers, Claimed, Metric, Setting, Shared, Sweeps, Trials
from orchestrator.inference import CONFIDENCE, Estimate
from orchestrator.progress import VERDICTS, short_count

MISSING = "\N{EN DASH}"
SHOWN = 48
"""Letters of one setting; all of it is in --json."""


def tables_of(compared: Trials | Sweeps) -> list[RenderableType]:
    """Every table of a comparison, in the order in which it is read."""
    return _of_trials(compared) if isinstance(compared, Trials) else _of_sweeps(compared)


def _of_trials(found: Trials) -> list[RenderableType]:
    return [
        _about("trials", found.first, found.second),
        _settings(found.settings),
        _metrics(found.metrics),
        _answers(found.answers),
    ]


def _of_sweeps(found: Sweeps) -> list[RenderableType]:
    shown: list[RenderableType] = [
        _about("sweeps", *(_without_winner(each) for each in (found.first, found.second))),
        _settings(found.settings),
        _winners(found),
    ]
    if found.winners is not None:
        shown.append(_answers(found.winners.answers, "the winners on the questions of both"))
    if found.claims:
        shown.append(_claims(found.claims))
    return [*shown, _configurations(found)]


def _table(title: str, *columns: str, right: int = 0) -> Table:
    """A table whose last `right` columns are set flush right."""
    table = Table(title=title, title_justify="left")
    for place, name in enumerate(columns):
        flush = place >= len(columns) - right
        table.add_column(name, justify="right" if flush else "left", overflow="fold", no_wrap=flush)
    return table


# --- heads and settings ----------------------------------------------------------------------


def _without_winner(about: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in about.items() if name != "winner"}


def _about(title: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> Table:
    table = _table(title, "", "A", "B")
    for name in first:
        if first[name] is not None or second[name] is not None:
            table.add_row(name, *(_fact(name, each[name]) for each in (first, second)))
    return table


def _fact(name: str, value: Any) -> str:
    if name in ("parameters", "tokens_trained") and value is not None:
        return short_count(value)
    return _cell(round(value, 1) if isinstance(value, float) else value)


def _cell(value: Any) -> str:
    if value is None:
        return MISSING
    text = " ".join(value.split()) if isinstance(value, str) else json.dumps(value)
    return escape(text if len(text) <= SHOWN else text[: SHOWN - 1] + "…")


def _settings(settings: Sequence[Setting]) -> RenderableType:
    if not settings:
        return "settings: the same in both"
    table = _table("settings that differ", "setting", "A", "B")
    for each in settings:
        table.add_row(escape(each.key), _cell(each.first), _cell(each.second))
    return table


# --- trials ----------------------------------------------------------------------------------


def _metrics(metrics: Sequence[Metric]) -> Table:
    table = _table("metrics", "metric", "A", "B", "B - A", "better", right=4)
    for each in metrics:
        table.add_row(
            each.name,
            *(_number(value) for value in (each.first, each.second)),
            MISSING if each.difference is None else f"{each.difference:+.4g}",
            _better(each.name, each.difference),
        )
    return table


def _better(name: str, difference: float | None) -> str:
    if not difference:
        return ""
    return "B" if (difference < 0) == lower_is_better(name) else "A"


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.4g}"


def _answers(
    answers: Sequence[Answers], title: str = "questions that both answered"
) -> RenderableType:
    if not answers:
        return f"{title}: none"
    columns = ("task", "half", "questions", "A better", "B better", "A", "B", "B - A [95%]", "p")
    table = _table(title, *columns, right=7)
    for each in answers:
        table.add_row(
            escape(each.task),
            each.half,
            str(each.questions),
            str(each.first_better),
            str(each.second_better),
            f"{each.first:.3f}",
            f"{each.second:.3f}",
            _interval(each.difference, signed=True),
            _chance(each.p_value),
        )
    table.caption = "p: McNemar's exact test; of the mean over tasks, the same with drawn signs"
    table.caption_justify = "left"
    return table


def _interval(estimate: Estimate, signed: bool = False) -> str:
    value = f"{estimate.value:{'+' if signed else ''}.3f}"
    if estimate.low is None or estimate.high is None:
        return value
    return escape(f"{value} [{estimate.low:.3f}, {estimate.high:.3f}]")


def _chance(p_value: float | None) -> str:
    if p_value is None:
        return MISSING
    text = f"{p_value:.3f}" if p_value >= 0.001 else "<0.001"
    return f"[bold]{text}[/]" if p_value < 1 - CONFIDENCE else text


# --- sweeps ----------------------------------------------------------------------------------


def _winners(found: Sweeps) -> Table:
    table = _table("winners", "", "A", "B")
    sides = [each["winner"] for each in (found.first, found.second)]
    for name, show in (
        ("configuration", lambda won: escape(won["configuration"])),
        ("trial_id", lambda won: won["trial_id"]),
        ("over its seeds", lambda won: _of_json(won["over_seeds"])),
        ("its trial, other half of the questions", lambda won: _of_json(won["reported"])),
        ("parameters", lambda won: _fact("parameters", won["parameters"])),
        ("tokens_trained", lambda won: _fact("tokens_trained", won["tokens_trained"])),
        ("tied with it", lambda won: str(len(won["tied"]))),
    ):
        table.add_row(name, *("no winner" if won is None else show(won) for won in sides))
    return table


def _of_json(estimate: Mapping[str, Any] | None) -> str:
    return MISSING if estimate is None else _interval(Estimate(**estimate))


def _claims(claims: Sequence[Claimed]) -> Table:
    table = _table("claims", "claim", "A: effect [95%]", "", "B: effect [95%]", "")
    for each in claims:
        number = f"{each.practice}. " if each.practice is not None else ""
        table.add_row(escape(number + each.text), *_verdict(each.first), *_verdict(each.second))
    return table


def _verdict(verdict: Verdict | None) -> tuple[str, str]:
    if verdict is None:
        return MISSING, "[dim]not claimed[/]"
    effect = _interval(verdict.effect) if verdict.effect else MISSING
    return effect, VERDICTS[verdict.verdict]


def _configurations(found: Sweeps) -> RenderableType:
    title = f"configurations that both have, by {found.metric}"
    if not found.configurations:
        return f"{title}: none"
    table = _table(
        title, "configuration", "seeds", "A [95%]", "B [95%]", "B - A [95%]", "p", right=5
    )
    for each in found.configurations:
        table.add_row(*_shared(each))
    table.caption = "p: with the seeds and questions of both, after Holm's correction"
    table.caption_justify = "left"
    return table


def _shared(each: Shared) -> tuple[str, ...]:
    return (
        escape(each.label),
        "/".join(map(str, each.seeds)),
        _interval(each.first),
        _interval(each.second),
        MISSING if each.difference is None else _interval(each.difference, signed=True),
        _chance(each.p_value),
    )
