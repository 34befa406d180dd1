"""Records -> the table of generation speeds, in the manner of P2's figure 8: ratios to the teacher.

What is measured, and how, is told in `trainers.benchmark`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from orchestrator.asked import BASELINE, Better, Claim, key_of, keys_meant
from orchestrator.records import TEACHER, Records, TrialRecord
from orchestrator.selection import groups, labels, over_seeds, value_of
from orchestrator.tables import Cell, Column, Table
from trainers.config import Load

METRIC = "throughput"
MEAN = f"{METRIC}.mean"
OTHER = {"first_token_ratio.mean": "first token", "peak_memory_ratio.mean": "memory"}
_NAME = re.compile(rf"{METRIC}\.in(\d+)_out(\d+)_b(\d+)(?:t(\d+))?")


def combos(records: Records) -> list[Load]:
    """Every load that any trial was timed at, in order of lengths and batch sizes."""
    names = {name for trial in records.trials for name in trial.metrics}
    found = [match.groups() for name in names if (match := _NAME.fullmatch(name)) is not None]
    loads = [
        Load(int(read), int(made), int(batch), int(other or batch))
        for read, made, batch, other in found
    ]
    return sorted(loads, key=lambda load: tuple(vars(load).values()))


def timed_at(load: Load) -> str:
    """The metric: requests per second relative to the teacher's."""
    return f"{METRIC}.{load.name}"


def title(load: Load) -> str:
    """For people: `64 → 32, batch 4`."""
    apart = f" (teacher {load.teacher_batch})" if load.teacher_batch != load.batch else ""
    return f"{load.input} \N{RIGHTWARDS ARROW} {load.output}, batch {load.batch}{apart}"


def tables(records: Records, asked: Sequence[Claim] = ()) -> tuple[Table, ...]:
    """The table, where anything was timed; none otherwise."""
    timed = combos(records)
    return (_table(records, timed, asked),) if timed else ()


def _table(records: Records, timed: Sequence[Load], asked: Sequence[Claim]) -> Table:
    names = labels(records)
    measured = [trial for trial in records.trials if value_of(trial, MEAN) is not None]
    per, unit = _unit(trial.parameters for trial in measured)
    columns = (
        Column("configuration"),
        Column("parameters", 2 if unit else 0, per, unit),
        Column("seeds", 0),
        Column(MEAN, 2, title="all, geometric mean"),
        Column("low", 2),
        Column("high", 2),
        *(Column(timed_at(load), 2, title=title(load)) for load in timed),
        *(Column(name, 2, title=shown) for name, shown in OTHER.items()),
        Column("published"),
    )
    rows = [
        (
            names[trials[0].trial_id],
            trials[0].parameters,
            len(trials),
            *_cells(trials, MEAN),
            *(_mean(trials, timed_at(load)) for load in timed),
            *(_mean(trials, name) for name in OTHER),
            _published(trials[0], records, asked),
        )
        for trials in groups(measured)
    ]
    return Table(
        "throughput",
        f"Throughput. Profile {records.profile}. Requests a second, as a ratio to the teacher "
        "timed in turns with it (the teacher: to a second copy of itself), by tokens read "
        "\N{RIGHTWARDS ARROW} made and requests at once; means over seeds, each of which is a "
        "measurement of its own. Low, high: 95% interval of the geometric mean, Student's t over "
        "seeds. First token, memory: the model's time to its first token and its peak memory, as "
        "ratios to the teacher's. Published: what the authors measured.",
        columns,
        tuple(rows),
    )


def _unit(counts: Iterable[int | None]) -> tuple[float, str]:
    largest = max((count for count in counts if count is not None), default=0)
    units = ((1e9, "B"), (1e6, "M"), (1e3, "k"))
    return next(((per, unit) for per, unit in units if largest >= per), (1.0, ""))


def _cells(trials: Sequence[TrialRecord], metric: str) -> tuple[Cell, Cell, Cell]:
    values = [value for trial in trials if (value := value_of(trial, metric)) is not None]
    if not values:
        return None, None, None
    found = over_seeds(values)
    return found.value, found.low, found.high


def _mean(trials: Sequence[TrialRecord], metric: str) -> Cell:
    return _cells(trials, metric)[0]


def _published(trial: TrialRecord, records: Records, asked: Iterable[Claim]) -> str | None:
    """What a claim quotes that sets this configuration beside the teacher."""
    for claim in asked:
        if not isinstance(claim, Better) or not claim.metric.startswith(f"{METRIC}."):
            continue
        if claim.than == {BASELINE: TEACHER} and _meant(trial, claim.better, records):
            return claim.published
    return None


def _meant(trial: TrialRecord, group: Mapping[str, object], records: Records) -> bool:
    settings = {**trial.axes, **({BASELINE: trial.baseline} if trial.baseline else {})}
    tried = {
        name: {key_of(each.axes[name]) for each in records.trials if name in each.axes}
        for name in group
    }
    return all(
        name in settings and key_of(settings[name]) in keys_meant(wanted, tried[name])
        for name, wanted in group.items()
    )
