"""The sweep on the terminal: a live table, or plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:  # statistics take a second to import, and a plan has none
    from orchestrator.claims import Verdict
    from orchestrator.selection import Configuration, Estimate, Ranking, Winner

MARKS = {
    "waiting": "[dim]waiting[/]",
    "running": "[cyan]running[/]",
    "completed": "[green]completed[/]",
    "failed": "[red]failed[/]",
    "stopped": "[green]stopped[/]",
    "lost": "[yellow]lost, tried again[/]",
    "interrupted": "[yellow]interrupted[/]",
}
VERDICTS = {
    "supported": "[green]supported[/]",
    "contradicted": "[red]contradicted[/]",
    "undecided": "[yellow]undecided[/]",
    "no data": "[dim]no data[/]",
}
PLAIN_EVERY_S = 10.0


@dataclass
class Row:
    """What is shown of one job."""

    title: str
    state: str = "waiting"
    stage: str = ""
    done: int = 0
    total: int = 0
    values: Mapping[str, float] = field(default_factory=dict)
    started_at: float = 0.0
    stage_started_at: float = 0.0
    ended_at: float = 0.0
    reason: str | None = None

    def seconds_left(self, now: float) -> float | None:
        """Time left of the running stage, from its pace so far."""
        if self.state != "running" or not self.done:
            return None
        return (now - self.stage_started_at) / self.done * (self.total - self.done)

    def seconds(self, now: float) -> float:
        """How long the job has run."""
        return (self.ended_at or now) - self.started_at if self.started_at else 0.0


class Board:
    """The state of every job, drawn as a live table or told in lines. A `tuning.Watcher`."""

    def __init__(self, console: Console, titles: Mapping[str, str]) -> None:
        self._console = console
        self._rows = {job_id: Row(title) for job_id, title in titles.items()}
        self._began = time.monotonic()
        self._told: dict[str, float] = {}
        self._live = console.is_terminal

    def add(self, titles: Mapping[str, str]) -> None:
        """Jobs that came up while others ran."""
        self._rows |= {job_id: Row(title) for job_id, title in titles.items()}

    def shown(self) -> AbstractContextManager[object]:
        """While this is entered, the live table is on the screen."""
        if not self._live:
            return nullcontext()
        return Live(
            get_renderable=self.table,
            console=self._console,
            refresh_per_second=2,
            vertical_overflow="visible",
        )

    def waits(self, reason: str) -> None:
        """No job can be begun yet."""
        self._console.print(reason, highlight=False, soft_wrap=True, markup=False)

    def started(self, job_id: str) -> None:
        """A worker has taken the job."""
        row = self._rows[job_id]
        row.state, row.started_at = "running", time.monotonic()
        self._say(f"started    {row.title}")

    def advanced(
        self, job_id: str, stage: str, done: int, total: int, values: Mapping[str, float]
    ) -> None:
        """A stage of the job is `done` of `total` units far."""
        row, now = self._rows[job_id], time.monotonic()
        if stage != row.stage:
            row.stage_started_at = now
        row.stage, row.done, row.total, row.values = stage, done, total, dict(values)
        if now - self._told.get(job_id, row.started_at) > PLAIN_EVERY_S:
            self._told[job_id] = now
            self._say(f"running    {row.title}  {_progress(row)}  {_values(row, now)}")

    def finished(self, job_id: str, outcome: str, reason: str | None) -> None:
        """The job has ended."""
        row, now = self._rows[job_id], time.monotonic()
        row.state, row.reason, row.ended_at = outcome, reason, now
        tail = f": {reason}" if reason else ""
        self._say(f"{outcome:<10} {row.title}  {clock(row.seconds(now))}{tail}")

    def table(self) -> Table:
        """The live table: running jobs in full, the others as long as the screen has room."""
        now = time.monotonic()
        table = Table(title=self._summary(now), title_justify="left", expand=False)
        for name in ("job", "state", "stage", "step", "loss", "tokens/s", "time", "left"):
            table.add_column(name, justify="left" if name in ("job", "state", "stage") else "right")
        for row in self._visible():
            table.add_row(*_cells(row, now))
        return table

    def _visible(self) -> Sequence[Row]:
        room = max(6, self._console.size.height - 6)
        rank = {"running": 0, "failed": 1, "waiting": 2, "lost": 2, "interrupted": 2}
        rows = list(self._rows.values())
        kept = sorted(range(len(rows)), key=lambda i: (rank.get(rows[i].state, 3), i))[:room]
        return [rows[i] for i in sorted(kept)]

    def _summary(self, now: float) -> str:
        states = [row.state for row in self._rows.values()]
        counts = [f"{states.count(s)} {s}" for s in MARKS if states.count(s)]
        return f"{', '.join(counts)}; {clock(now - self._began)} elapsed{self._left(now)}"

    def _left(self, now: float) -> str:
        """Time left of the sweep: open trials at the pace of the finished ones."""
        ended = [row for row in self._rows.values() if row.state == "completed"]
        waiting = [row for row in self._rows.values() if row.state in ("waiting", "running")]
        running = sum(row.state == "running" for row in self._rows.values())
        if not ended or not running or not waiting:
            return ""
        mean = sum(row.seconds(now) for row in ended) / len(ended)
        return f", about {clock(mean * len(waiting) / running)} left"

    def _say(self, line: str) -> None:
        if not self._live:
            self._console.print(line, highlight=False, soft_wrap=True, markup=False)


def _cells(row: Row, now: float) -> list[str]:
    left = row.seconds_left(now)
    running = row.state == "running"
    return [
        escape(row.title),
        MARKS[row.state] + (f" [red]{escape(row.reason[:60])}[/]" if row.reason else ""),
        row.stage if running else "",
        f"{row.done}/{row.total}" if running and row.total else "",
        f"{row.values['loss']:.3f}" if "loss" in row.values else "",
        f"{row.values['tokens_per_s']:,.0f}" if running and "tokens_per_s" in row.values else "",
        clock(row.seconds(now)) if row.started_at else "",
        clock(left) if left is not None else "",
    ]


def _progress(row: Row) -> str:
    return f"{row.stage} {row.done}/{row.total}" if row.total else row.stage


def _values(row: Row, now: float) -> str:
    parts = [f"{name} {value:.4g}" for name, value in row.values.items()]
    if (left := row.seconds_left(now)) is not None:
        parts.append(f"{clock(left)} left")
    return "  ".join(parts)


def clock(seconds: float) -> str:
    """`75` -> `1:15`, `3700` -> `1:01:40`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


WIDE_ENOUGH_FOR_STAGES = 110
"""Columns of a terminal that also shows which stages a trial has, and which needs most."""


def plan_table(described: Mapping[str, Any], width: int = 120) -> list[Table]:
    """The plan (as `orchestrate plan --json` prints it) as tables for a terminal of so many
    columns: trials; stages that several of them share; and where there are GPUs, what each trial
    takes of them."""
    tables = [_trials_table(described, width >= WIDE_ENOUGH_FOR_STAGES), _shared_table(described)]
    if described["total"]["gpu_hours"] is not None:
        tables.append(_gpu_table(described, width >= WIDE_ENOUGH_FOR_STAGES))
    return tables


def _trials_table(described: Mapping[str, Any], with_stages: bool) -> Table:
    table = Table(title="trials", title_justify="left")
    table.add_column("trial", overflow="fold", min_width=16)
    table.add_column("parameters and shape", overflow="fold", min_width=16)
    for name in ("tokens", "FLOPs"):
        table.add_column(name, justify="right", no_wrap=True)
    if with_stages:
        table.add_column("stages", overflow="fold")
    table.add_column("done", no_wrap=True)
    for trial in described["trials"]:
        counted = " ".join(_counted([stage["kind"] for stage in trial["stages"]]))
        table.add_row(
            f"[dim]{trial['trial_id']}[/]\n{escape(trial['label'])}",
            "\n".join(map(_shape, [*trial["chain"], trial])),
            short_count(trial["tokens"]),
            f"{trial['flops']:.2g}",
            *([counted] if with_stages else []),
            "yes" if trial["done"] else "",
        )
    return table


def _shared_table(described: Mapping[str, Any]) -> Table:
    table = Table(title="stages that several trials share", title_justify="left")
    table.add_column("stage", overflow="fold")
    for name in ("asked for by", "tokens", "FLOPs"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("stored", no_wrap=True)
    seen = {stage["stage_id"]: stage for t in described["trials"] for stage in t["stages"]}
    for stage in seen.values():
        if stage["trials"] > 1:
            table.add_row(
                stage["stage_id"],
                f"{stage['trials']} trials",
                short_count(stage["tokens"]),
                f"{stage['flops']:.2g}",
                "yes" if stage["stored"] else "",
            )
    return table


def _gpu_table(described: Mapping[str, Any], with_stages: bool) -> Table:
    """GB of a GPU that training takes under each ZeRO stage, and what the fullest stage takes with
    the settings as they are; GPU-hours."""
    short = {trial for warning in described["warnings"] for trial in warning["trials"]}
    title = "GB of each GPU: training under ZeRO 0 to 3, and the fullest stage as set"
    table = Table(title=title, title_justify="left")
    table.add_column("trial", overflow="fold", min_width=16)
    for name in ("0", "1", "2", "3", "as set"):
        table.add_column(name, justify="right", no_wrap=True)
    if with_stages:
        table.add_column("fullest")
    table.add_column("GPU-hours", justify="right", no_wrap=True)
    for trial in described["trials"]:
        as_set = f"{trial['fullest']['memory_gb']:.1f}"
        table.add_row(
            escape(trial["label"]),
            *("-" if each is None else f"{each:.1f}" for each in trial["memory_gb"].values()),
            f"[red]{as_set} !![/]" if trial["trial_id"] in short else as_set,
            *([trial["fullest"]["step"]] if with_stages else []),
            f"{trial['gpu_hours']:,.1f}",
        )
    return table


def short_count(number: float) -> str:
    """`4512746496` -> `4.51B`, `404736` -> `405k`: three digits and a unit."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            return f"{number / size:#.3g}".rstrip(".") + unit
    return f"{number:g}"


def _shape(model: Mapping[str, Any]) -> str:
    """`4.51B: 16 x 3072, MLP 9216, heads 32/8`."""
    heads, groups = model["num_attention_heads"], model["num_key_value_heads"]
    return (
        f"{short_count(model['parameters'])}: {model['num_hidden_layers']} x "
        f"{model['hidden_size']}, MLP {model['intermediate_size']}, heads {heads}/{groups}"
    )


def _counted(kinds: Sequence[str]) -> list[str]:
    """Each kind once, with how often it comes where that is more than once."""
    counts = Counter(kinds)
    return [kind if count == 1 else f"{kind} x{count}" for kind, count in counts.items()]


def outcome_table(ranking: Ranking | None, chosen: Winner | None) -> Table:
    """How the configurations came out, best first; all columns are in tables/configurations."""
    table = Table(title="configurations, best first", title_justify="left")
    metric = ranking.metric if ranking else "metric"
    for name in ("configuration", f"{metric} [95%]", "seeds", "lm_loss.after", "verdict"):
        table.add_column(name, overflow="fold")
    for each in ranking.configurations if ranking else ():
        won = chosen is not None and each is chosen.configuration
        table.add_row(
            escape(each.label),
            escape(_interval(each.estimate)),
            _seeds(each),
            _mean([trial.metrics.get("lm_loss.after") for trial in each.trials]),
            "winner" if won else "tied" if each.tied else "untested" if each.untested else "",
        )
    return table


def _seeds(each: Configuration) -> str:
    count = len(each.trials)
    of = f" of {count + each.unfinished}" if each.unfinished else ""
    return f"{count}{of}" + (f" (sd {each.spread:.3f})" if each.spread is not None else "")


def claims_table(verdicts: Sequence[Verdict]) -> Table:
    """What the trials say of each claim; all columns are in tables/claims."""
    table = Table(title="claims", title_justify="left")
    for name in ("claim", "metric", "effect [95%]", "pairs", "seeds", "verdict"):
        table.add_column(name, overflow="fold")
    for each in verdicts:
        number = f"{each.practice}. " if each.practice is not None else ""
        table.add_row(
            escape(number + each.text),
            each.metric,
            escape(_interval(each.effect)) if each.effect else "-",
            str(each.pairs),
            str(each.seeds),
            VERDICTS[each.verdict] + (f": {escape(each.note)}" if each.note else ""),
        )
    return table


def _interval(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.3f}" if known else "-"
