"""A sweep's outcome -> one HTML page that needs nothing beside itself, network included.

The template, its style and its script stand beside this file. Whatever comes from a sweep is
escaped, and the page's own policy lets a browser fetch nothing and run no script but ours.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import jinja2
from markupsafe import Markup

from orchestrator.asked import Better, BetterThanEach, Claim, NoBetter
from orchestrator.records import TEACHER, Records, TrialRecord
from orchestrator.selection import Estimate, Ranking, Winner, axis_names, labels
from orchestrator.tables import Cell, Column, Table

HERE = Path(__file__).parent
PLACED = ("claims", "configurations", "main_effects", "trials", "cost")
"""Tables that have a place of their own on the page; any other follows the figures."""

LONG = 40
"""Letters from which on a column of text is wrapped."""
MOST_CHOICES = 24
"""Values that a column may have to be filtered by choosing one."""
SIGNS = {"supported": ("✓", "good"), "contradicted": ("✗", "bad"), "undecided": ("?", "undecided")}


class Drawing(Protocol):
    """A figure: its name, a sentence on what it shows, and itself as SVG."""

    @property
    def name(self) -> str: ...

    @property
    def caption(self) -> str: ...

    def svg(self) -> bytes: ...


@dataclass(frozen=True)
class Outcome:
    """All that the page shows."""

    records: Records
    question: str
    ranking: Ranking | None
    winner: Winner | None
    summary: str
    tables: Sequence[Table]
    drawings: Sequence[Drawing]
    claims: Sequence[Claim]
    command: str
    sweep_yaml: str | None


def render(outcome: Outcome) -> str:
    """The page. Equal outcomes give equal bytes."""
    records, tables = outcome.records, {table.name: table for table in outcome.tables}
    won = _names(outcome.winner)
    grids = {name: _grid(table, won) for name, table in tables.items()}
    script = (HERE / "report.js").read_text(encoding="utf-8")
    return _template().render(
        records=records,
        question=outcome.question,
        summary=outcome.summary,
        counts=counts(records),
        measured_until=_moment(records),
        ranking=outcome.ranking,
        winner=outcome.winner,
        sizes=_sizes(outcome.winner),
        claims=_claims(tables.get("claims"), outcome.claims),
        verdicts=_verdicts(tables.get("claims")),
        tables=grids,
        others=[grid for name, grid in grids.items() if name not in PLACED],
        choices=_choices(records, grids["trials"]),
        figures=[_figure(drawing) for drawing in outcome.drawings],
        failures=_failures(records),
        saved=_saved(tables["cost"]),
        command=outcome.command,
        sweep_yaml=outcome.sweep_yaml,
        style=Markup((HERE / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        policy=_policy(script),
    )


def shown(value: Estimate) -> str:
    """A value with its interval in brackets, where it has one."""
    if value.low is None or value.high is None:
        return f"{value.value:.3f}"
    return f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"


def counts(records: Records) -> str:
    """How many trials there are, and how they ended."""
    trials = [trial for trial in records.trials if trial.baseline != TEACHER]
    teacher = " and the teacher" if len(trials) < len(records.trials) else ""
    ended = Counter(trial.status for trial in records.trials)
    how = [f"{ended[s]} {s}" for s in ("completed", "stopped", "failed") if ended[s]]
    return ", ".join([f"{len(trials)} trials{teacher}", *how])


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(shown=shown, breakable=_breakable)
    return environment.get_template("report.html.j2")


def _breakable(name: str) -> Markup:
    """A dotted name that may be broken into lines after its dots."""
    return Markup("<wbr>").join(re.split(r"(?<=\.)(?=\w)", name))


def _policy(script: str) -> str:
    """Nothing is fetched, and only the script with this hash runs."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _names(winner: Winner | None) -> frozenset[str]:
    """What heads the winner's row, in a table of trials or of configurations."""
    if winner is None:
        return frozenset()
    return frozenset({winner.trial.trial_id, winner.configuration.label})


def _moment(records: Records) -> str | None:
    if not records.trials:
        return None
    last = max(trial.ended_at for trial in records.trials)
    return datetime.fromtimestamp(last, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _sizes(winner: Winner | None) -> list[tuple[str, str]]:
    """What the winner is, beside what it scores."""
    if winner is None:
        return []
    trial = winner.trial
    known = [
        ("winner's trial", trial.trial_id),
        ("seed", str(trial.seed)),
        ("parameters", None if trial.parameters is None else f"{trial.parameters:,}"),
        ("tokens trained", None if trial.tokens_trained is None else f"{trial.tokens_trained:,}"),
    ]
    return [(name, value) for name, value in known if value is not None]


def _figure(drawing: Drawing) -> Mapping[str, str]:
    # An image of its own: inlined as markup, two figures' ids would clash.
    data = base64.b64encode(drawing.svg()).decode()
    name = drawing.name.replace("_", " ")
    return {
        "source": f"data:image/svg+xml;base64,{data}",
        "name": name,
        "caption": drawing.caption,
    }


def _failures(records: Records) -> list[tuple[TrialRecord, str]]:
    label = labels(records)
    return [(t, label[t.trial_id]) for t in records.trials if t.status == "failed"]


def _saved(cost: Table) -> str | None:
    """What all stages cost, and what they would have cost with nothing shared."""
    everything = next((row for row in _by_name(cost) if row["stage"] == "all"), None)
    if everything is None:
        return None
    parts = []
    for kind, name in (("CPU", "cpu_s"), ("GPU", "gpu_s")):
        spent, saved = everything[name], everything[f"saved_{name}"]
        if isinstance(spent, float) and isinstance(saved, float) and spent > 0:
            times = (spent + saved) / spent
            parts.append(
                f"{spent / 60:.1f} {kind} minutes were spent. Without sharing stages between "
                f"trials it would have been {(spent + saved) / 60:.1f}, {times:.1f} times as much."
            )
    return " ".join(parts) or None


def _by_name(table: Table | None) -> list[dict[str, Cell]]:
    """Raw rows of a table, by the names of its columns."""
    if table is None:
        return []
    names = [column.name for column in table.columns]
    return [dict(zip(names, row, strict=True)) for row in table.rows]


# --- tables ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """A cell: its text, what it sorts by where it is a number, and whether it is good or bad."""

    text: str
    missing: bool
    number: str | None
    tone: str


@dataclass(frozen=True)
class Heading:
    """A column: `kind` is `number`, `long` (text that is wrapped) or empty."""

    name: str
    kind: str
    heads_rows: bool


@dataclass(frozen=True)
class Row:
    """`marked` rows are what was chosen."""

    cells: tuple[Shown, ...]
    marked: bool


@dataclass(frozen=True)
class Grid:
    """A table as the page shows it."""

    name: str
    title: str
    caption: str
    columns: tuple[Heading, ...]
    rows: tuple[Row, ...]


def _grid(table: Table, marked: frozenset[str]) -> Grid:
    columns, texts = table.for_readers()
    # The same objects, without those columns in which no row has a value.
    kept = [any(column is each for each in columns) for column in table.columns]
    raw = [[cell for cell, keep in zip(row, kept, strict=True) if keep] for row in table.rows]
    kinds = [
        _kind(column, [row[i] for row in raw], [row[i] for row in texts])
        for i, column in enumerate(columns)
    ]
    head = next((i for i, kind in enumerate(kinds) if kind != "number"), -1)
    return Grid(
        table.name,
        re.split(r"[.:;]\s", table.caption)[0],
        table.caption,
        tuple(
            Heading(column.header, kind, i == head)
            for i, (column, kind) in enumerate(zip(columns, kinds, strict=True))
        ),
        tuple(
            Row(
                tuple(map(_cell, columns, cells, row, kinds)),
                marked=row[head] in marked if row else False,
            )
            for cells, row in zip(raw, texts, strict=True)
        ),
    )


def _kind(column: Column, raw: Sequence[Cell], texts: Sequence[str]) -> str:
    known = [cell for cell in raw if cell is not None]
    # The values of an axis are texts; where all of them are numbers, they sort as such.
    if column.numeric or (known and all(_number(cell) is not None for cell in known)):
        return "number"
    return "long" if any(len(text) > LONG for text in texts) else ""


def _number(cell: Cell) -> float | None:
    try:
        value = math.nan if cell is None else float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _cell(column: Column, cell: Cell, text: str, kind: str) -> Shown:
    value = _number(cell) if kind == "number" else None
    tone = {"failed": "bad", "chosen": "good"}.get(str(cell), "")
    return Shown(text, cell is None, None if value is None else f"{value:.9g}", tone)


@dataclass(frozen=True)
class Choice:
    """A column, and the texts in it that one can ask for."""

    name: str
    column: int
    texts: tuple[str, ...]


def _choices(records: Records, trials: Grid) -> list[Choice]:
    """Columns that trials are chosen by: baseline, status, seed and axes of not too many values."""
    wanted = {"baseline", "status", "seed", *axis_names(records).values()}
    found = []
    for position, column in enumerate(trials.columns):
        cells = {row.cells[position] for row in trials.rows}
        if column.name in wanted and 1 < len(cells) <= MOST_CHOICES:
            texts = tuple(cell.text for cell in sorted(cells, key=_order))
            found.append(Choice(column.name, position, texts))
    return found


def _order(cell: Shown) -> tuple[bool, float, str]:
    return cell.missing, float(cell.number) if cell.number else 0.0, cell.text


# --- claims ----------------------------------------------------------------------------------


def _claims(table: Table | None, asked: Sequence[Claim]) -> list[Mapping[str, Any]]:
    if table is None:
        return []
    return [_claim(row, claim) for row, claim in zip(_by_name(table), asked, strict=True)]


def _claim(row: Mapping[str, Cell], claim: Claim) -> Mapping[str, Any]:
    sign, tone = SIGNS.get(str(row["verdict"]), ("\N{EN DASH}", "undecided"))
    value, low, high = (_number(row[name]) for name in ("effect", "low", "high"))
    effect = None if value is None else Estimate(value, low, high)
    return {
        "sign": sign,
        "tone": tone,
        "verdict": row["verdict"],
        "text": row["claim"],
        "practice": row["practice"],
        "metric": row["metric"],
        "published": row["published"],
        "note": row["note"],
        "effect": shown(effect) if effect else None,
        "plot": _plot(effect, claim) if effect else None,
        "counted": f"{_several(row['pairs'], 'pair')}, {_several(row['seeds'], 'seed')}",
    }


def _verdicts(table: Table | None) -> str:
    found = Counter(str(row["verdict"]) for row in _by_name(table))
    return ", ".join(f"{count} {verdict}" for verdict, count in found.items())


def _several(count: Cell, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _plot(effect: Estimate, claim: Claim, width: float = 200.0) -> Mapping[str, str] | None:
    """Where the interval lies beside what would support the claim, in a strip `width` wide."""
    if effect.low is None or effect.high is None:
        return None
    limit, above = _limit(claim)
    least, most = min(effect.low, limit, 0.0), max(effect.high, limit, 0.0)
    margin = 0.12 * (most - least) or 1.0
    start, scale = least - margin, width / (most - least + 2 * margin)

    def at(value: float) -> float:
        return (value - start) * scale

    near, far = (at(limit), width) if above else (0.0, at(limit))
    places = {
        "meant_from": near,
        "meant_width": far - near,
        "zero": at(limit),
        "low": at(effect.low),
        "high": at(effect.high),
        "value": at(effect.value),
    }
    side = "above" if above else "below"
    label = f"Interval from {effect.low:.3f} to {effect.high:.3f}; supported {side} {limit:g}"
    return {"label": label, **{name: f"{place:.1f}" for name, place in places.items()}}


def _limit(claim: Claim) -> tuple[float, bool]:
    """What the whole interval has to pass, and whether upwards."""
    if isinstance(claim, Better | BetterThanEach):
        return 0.0, True
    if isinstance(claim, NoBetter):
        return claim.within, False
    return claim.ranking.agreement_below, False
