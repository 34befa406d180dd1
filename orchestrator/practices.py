"""All claims of all sweeps -> one page: the best practices, what was published, and what ours say.

`gather` reads; the rest is pure, and what has not changed gives the same bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.markup import escape
from rich.table import Table as Shown

from orchestrator import papers
from orchestrator.asked import Claim
from orchestrator.claims import Outcome, Verdict, judge
from orchestrator.published import PAPERS, PRACTICES, Practice, PublishedTable
from orchestrator.recorded import Asked, read_asked, results_folders
from orchestrator.records import read_parquet
from orchestrator.selection import Estimate
from orchestrator.tables import Column, Table

Overall = Literal["supported", "contradicted", "mixed", "undecided", "no data", "no run"]

RULE = (
    "A claim is *decided* where its 95% interval lies on one side and there are several seeds. A "
    "practice is *supported* where every decided claim supports it and at least one does, "
    "*contradicted* where every decided claim contradicts it and at least one does, *mixed* where "
    "decided claims disagree, *undecided* where claims have data and none is decided; without data "
    "it has no verdict. Each claim counts once for every profile that it has been run at."
)

MARKS: dict[Overall, str] = {
    "supported": "[green]supported[/]",
    "contradicted": "[red]contradicted[/]",
    "mixed": "[magenta]mixed[/]",
    "undecided": "[yellow]undecided[/]",
    "no data": "[dim]no data[/]",
    "no run": "[dim]no run[/]",
}


@dataclass(frozen=True)
class Line:
    """A claim of a sweep, and what its trials at a profile say; nothing where it has no run."""

    sweep: str
    claim: Claim
    profile: str | None = None
    folder: Path | None = None
    verdict: Verdict | None = None


@dataclass(frozen=True)
class PaperTable:
    """A paper's table that a results folder has, with ours in it, and the practices it bears on."""

    title: str
    practices: tuple[int, ...]
    path: Path


@dataclass(frozen=True)
class Gathered:
    """All that the page is made of."""

    lines: tuple[Line, ...]
    tables: tuple[PaperTable, ...]


# --- reading ---------------------------------------------------------------------------------


def gather(results: Path, sweeps: Path) -> Gathered:
    """The claims of every sweep that is recorded below `results`, one's own before published ones
    of the same name and profile, and those of the files in `sweeps` that have no run.

    What a folder claims is what its sweep.yaml says; where that makes no claim, what the sweep's
    file says now. Of a comparison that both make, the words, the practice and the published figures
    are those of the sweep's file, for they may be newer.

    Raises LocatedError for a sweep file and ValueError for records that cannot be read.
    """
    files = (_asked(path) for path in sorted(sweeps.glob("*.yaml")))
    asked = {each.name: each.claims for each in files}
    lines: list[tuple[int, Line]] = []
    tables: list[PaperTable] = []
    recorded = list(results_folders(results).values())
    for folder in recorded:
        sweep, profile = folder.parent.name, folder.name
        claims = _claims_of(folder, asked.get(sweep, ()))
        verdicts = judge(read_parquet(folder).asked, claims)
        lines += [
            (place, Line(sweep, claim, profile, folder, verdict))
            for place, (claim, verdict) in enumerate(zip(claims, verdicts, strict=True))
        ]
        tables += [
            PaperTable(_title(known, path.stem, sweep, profile), known.practices, path)
            for path in sorted((folder / "tables").glob("*.md"))
            if (known := papers.published_as(path.stem)) is not None
        ]
    ran = {folder.parent.name for folder in recorded}
    for name in asked.keys() - ran:
        lines += [(place, Line(name, claim)) for place, claim in enumerate(asked[name])]
    # The profiles of a claim stand together, in the order of the sweep file.
    lines.sort(key=lambda each: (each[1].sweep, each[0], each[1].profile or ""))
    return Gathered(tuple(line for _, line in lines), tuple(tables))


def _title(known: PublishedTable, name: str, sweep: str, profile: str) -> str:
    grid = "" if name == known.name else " as a grid"
    return f"{known.source}{grid}: {sweep} at {profile}"


def _asked(path: Path) -> Asked:
    return read_asked(path, ("name", "claims"))


def _claims_of(folder: Path, newer: Sequence[Claim]) -> list[Claim]:
    claims = _asked(folder / "sweep.yaml").claims
    same = {_comparison(claim): claim for claim in newer}
    return [same.get(_comparison(claim), claim) for claim in claims or newer]


def _comparison(claim: Claim) -> str:
    """What is compared, without what is said about it."""
    about = claim.model_dump(mode="json", exclude={"text", "practice", "published"})
    return json.dumps(about, sort_keys=True)


# --- verdicts --------------------------------------------------------------------------------


def overall(lines: Iterable[Line]) -> Overall:
    """The verdict of a practice, by `RULE`."""
    found: set[Outcome] = {line.verdict.verdict for line in lines if line.verdict is not None}
    decided = found & {"supported", "contradicted"}
    if len(decided) > 1:
        return "mixed"
    if decided:
        return decided.pop()
    return "undecided" if "undecided" in found else "no data" if found else "no run"


def _of(gathered: Gathered, practice: int) -> list[Line]:
    return [line for line in gathered.lines if line.claim.practice == practice]


def _tables_of(gathered: Gathered, practice: Practice) -> list[PaperTable]:
    return [each for each in gathered.tables if practice.number in each.practices]


def _others(gathered: Gathered) -> list[Line]:
    known = {practice.number for practice in PRACTICES}
    return [line for line in gathered.lines if line.claim.practice not in known]


def _profiles(gathered: Gathered) -> list[str]:
    return sorted({line.profile for line in gathered.lines if line.profile is not None})


def _decided(lines: Iterable[Line]) -> str:
    """How many of the claims that ran are decided, to be put behind the verdict."""
    outcomes = [line.verdict.verdict for line in lines if line.verdict is not None]
    count = sum(outcome in ("supported", "contradicted") for outcome in outcomes)
    return f", {count} of {len(outcomes)}" if outcomes else ""


def _at(lines: Iterable[Line], profile: str) -> list[Line]:
    return [line for line in lines if line.profile == profile]


# --- the page --------------------------------------------------------------------------------


def page(gathered: Gathered, beside: Path) -> str:
    """The page in Markdown; links start at the folder `beside` which it lies in."""
    parts = [_head(), _overview(gathered)]
    parts += [_section(gathered, practice, beside) for practice in PRACTICES]
    if others := _others(gathered):
        caption = "What the sweeps claim beyond the published practices."
        table = _claims_table(others, caption, beside)
        parts.append(f"## Other claims\n\n{table.to_markdown()}")
    return "\n".join(parts)


def _head() -> str:
    sources = "; ".join(f"{short} is {title}" for short, title in PAPERS.items())
    return (
        "# The best practices, and what the sweeps here say of them\n\n"
        f"Written by `orchestrate practices` from the records beside it. {sources}.\n\n{RULE}\n\n"
        "Effects are positive where they speak for the claim, in the metric's unit (losses: nats a "
        "token); of rankings they are Kendall's tau.\n"
    )


def _overview(gathered: Gathered) -> str:
    profiles = _profiles(gathered)
    rows: list[tuple[int | str, ...]] = []
    for practice in PRACTICES:
        lines = _of(gathered, practice.number)
        at_each = (_at(lines, profile) for profile in profiles)
        verdicts = (f"{overall(found)}{_decided(found)}" for found in at_each)
        whole = f"**{overall(lines)}**{_decided(lines)}"
        rows.append((practice.number, practice.text, *verdicts, whole))
    columns = (Column("number", 0, title="#"), *map(Column, ("practice", *profiles, "all")))
    caption = "The verdicts, by profile and over all, each with how many of the claims are decided."
    return Table("overview", caption, columns, tuple(rows)).to_markdown()


def _section(gathered: Gathered, practice: Practice, beside: Path) -> str:
    lines = _of(gathered, practice.number)
    evidence = "\n".join(f"- {each.figures} ({each.source})" for each in practice.evidence)
    parts = [
        f"## {practice.number}. {practice.text}\n",
        f"**Verdict: {overall(lines)}.** {_counted(lines)}\n",
        f"Published ({practice.source}):\n\n{evidence}\n",
    ]
    if lines:
        parts.append(_claims_table(lines, "Ours:", beside).to_markdown())
    if tables := _tables_of(gathered, practice):
        links = "\n".join(f"- [{each.title}]({_link(each.path, beside)})" for each in tables)
        parts.append(f"The papers' tables with ours beside:\n\n{links}\n")
    return "\n".join(parts)


def _counted(lines: Sequence[Line]) -> str:
    """How many claims say what."""
    outcomes = [line.verdict.verdict for line in lines if line.verdict is not None]
    if not lines:
        return "No sweep asks."
    if not outcomes:
        return "No sweep that asks has been run."
    kinds: tuple[Outcome, ...] = ("supported", "contradicted", "undecided", "no data")
    told = (f"{outcomes.count(kind)} {kind}" for kind in kinds if kind in outcomes)
    return f"Judged {len(outcomes)} times: {', '.join(told)}."


def _claims_table(lines: Sequence[Line], caption: str, beside: Path) -> Table:
    columns = (
        *(Column(name) for name in ("claim", "sweep", "metric", "effect [95%]")),
        Column("pairs", 0),
        Column("seeds", 0),
        *(Column(name) for name in ("verdict", "published", "note")),
    )
    return Table("claims", caption, columns, tuple(_row(line, beside) for line in lines))


def _row(line: Line, beside: Path) -> tuple[str | int | None, ...]:
    claim, verdict = line.claim, line.verdict
    if verdict is None or line.folder is None:
        blank = (None, None, None)
        return (claim.text, line.sweep, None, *blank, "no run", claim.published, None)
    return (
        claim.text,
        f"[{line.sweep} at {line.profile}]({_link(line.folder, beside)})",
        verdict.metric,
        None if verdict.effect is None else _interval(verdict.effect),
        verdict.pairs,
        verdict.seeds,
        verdict.verdict,
        claim.published,
        verdict.note,
    )


def _interval(effect: Estimate) -> str:
    if effect.low is None or effect.high is None:
        return f"{effect.value:.3f}"
    return f"{effect.value:.3f} [{effect.low:.3f}, {effect.high:.3f}]"


def _link(target: Path, beside: Path) -> str:
    return Path(os.path.relpath(target, beside)).as_posix()


# --- terminal and JSON -----------------------------------------------------------------------


def as_table(gathered: Gathered) -> Shown:
    """The verdicts for the terminal."""
    profiles = _profiles(gathered)
    table = Shown(title="best practices", title_justify="left")
    for name in ("practice", *profiles, "all"):
        table.add_column(name, overflow="fold")
    for practice in PRACTICES:
        lines = _of(gathered, practice.number)
        groups = [*(_at(lines, profile) for profile in profiles), lines]
        marks = (f"{MARKS[overall(group)]}{_decided(group)}" for group in groups)
        table.add_row(escape(f"{practice.number}. {practice.text}"), *marks)
    return table


def as_json(gathered: Gathered, beside: Path) -> dict[str, Any]:
    """All that the page says; missing values are null, and paths start at `beside`."""
    return {
        "rule": RULE,
        "practices": [
            {
                **asdict(practice),
                "verdict": overall(_of(gathered, practice.number)),
                "claims": [_described(line, beside) for line in _of(gathered, practice.number)],
                "tables": [_link(each.path, beside) for each in _tables_of(gathered, practice)],
            }
            for practice in PRACTICES
        ],
        "others": [_described(line, beside) for line in _others(gathered)],
    }


def _described(line: Line, beside: Path) -> dict[str, Any]:
    verdict = line.verdict
    return {
        "sweep": line.sweep,
        "profile": line.profile,
        "folder": None if line.folder is None else _link(line.folder, beside),
        "claim": line.claim.text,
        "published": line.claim.published,
        "metric": verdict and verdict.metric,
        "effect": asdict(verdict.effect) if verdict and verdict.effect else None,
        "pairs": verdict and verdict.pairs,
        "seeds": verdict and verdict.seeds,
        "verdict": verdict.verdict if verdict else "no run",
        "note": verdict and verdict.note,
    }


def write(text: str, path: Path) -> None:
    """The page, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
