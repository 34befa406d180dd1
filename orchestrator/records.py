"""What is known of the trials and stages that ran: typed records and the parquet files.

The parquet files are written from the ledger (`orchestrator.ledger`) and can be rebuilt at any
time. The only module that imports pyarrow.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

Status = Literal["completed", "stopped", "failed"]

TEACHER = "teacher"
"""Name of the baseline that every sweep has: the source model, neither pruned nor distilled."""


@dataclass(frozen=True)
class TrialRecord:
    """A trial that ended. A failed one has a reason and no metrics. Times are Unix seconds."""

    trial_id: str
    sweep: str
    profile: str
    seed: int
    status: Status
    reason: str | None
    baseline: str | None
    """Name under `baselines:` in the sweep file, `teacher`, or None for a trial of the grid."""
    config: Mapping[str, Any]
    axes: Mapping[str, Any]
    """Dotted axis name -> this trial's value (without `seed`); absent where the axis is off."""
    parameters: int | None
    parameters_non_embedding: int | None
    tokens_trained: int | None
    metrics: Mapping[str, float | None]
    cpu_s: float
    gpu_s: float
    wall_s: float
    started_at: float
    ended_at: float
    mlflow_run_id: str | None = None
    dropped_layers: tuple[int, ...] | None = None
    """The teacher's layers that the student lacks, counted from 0; None where none were chosen."""
    in_sweep: bool = True
    """Whether the sweep file still asks for it: a row of a larger form of the sweep stays."""

    def __post_init__(self) -> None:
        if self.status == "failed" and self.metrics:
            raise ValueError(f"trial {self.trial_id} failed, so it has no metrics")
        if self.status == "failed" and not self.reason:
            raise ValueError(f"trial {self.trial_id} failed without a reason")


@dataclass(frozen=True)
class StageRecord:
    """A stage that a trial asked for. Where `cached`, it cost this trial nothing."""

    stage_id: str
    trial_id: str
    kind: str
    cached: bool
    cpu_s: float
    gpu_s: float
    wall_s: float
    peak_rss_mb: float
    tokens: int
    flops: float


@dataclass(frozen=True)
class CurvePoint:
    """One value of a training curve; `time_ms` is fixed when it is measured."""

    trial_id: str
    step: int
    tokens: int
    time_ms: int
    name: str
    value: float


@dataclass(frozen=True)
class ItemRecord:
    """One question answered by one trial's final model. `score` is the margin of the gold choice
    over the best other one in log-probability, where the task has choices."""

    trial_id: str
    task: str
    item_id: str
    split: Literal["select", "report"]
    correct: float
    score: float | None


@dataclass(frozen=True)
class BlockScore:
    """What leaving out the block of `block_length` layers that ends at layer `last` (0-based)
    does. `name` says what `value` is: lm_loss, block_influence, accuracy, or importance (higher =
    matters more, whatever the criterion). The intact model stands as block_length 0, last -1."""

    stage_id: str
    criterion: str
    block_length: int
    last: int
    name: str
    value: float


@dataclass(frozen=True)
class Records:
    """All that a sweep has recorded, in a fixed order: what reports are made from."""

    sweep: str
    profile: str
    trials: tuple[TrialRecord, ...] = ()
    stages: tuple[StageRecord, ...] = ()
    curves: tuple[CurvePoint, ...] = ()
    items: tuple[ItemRecord, ...] = ()
    scores: tuple[BlockScore, ...] = field(default=())

    @property
    def teachers_have_seeds(self) -> bool:
        """Whether every seed has a teacher of its own, as where it is trained and not loaded."""
        teachers = [trial for trial in self.trials if trial.baseline == TEACHER]
        # Those of the other seeds may not have been recorded yet.
        return len({trial.seed for trial in teachers}) > 1 or any(map(_trained, teachers))

    @property
    def asked(self) -> Records:
        """Without the trials that the sweep does not ask for any more."""
        outside = {trial.trial_id for trial in self.trials if not trial.in_sweep}
        if not outside:
            return self
        stages = tuple(each for each in self.stages if each.trial_id not in outside)
        measured_by = {each.stage_id for each in stages}
        return replace(
            self,
            trials=tuple(each for each in self.trials if each.in_sweep),
            stages=stages,
            curves=tuple(each for each in self.curves if each.trial_id not in outside),
            items=tuple(each for each in self.items if each.trial_id not in outside),
            scores=tuple(each for each in self.scores if each.stage_id in measured_by),
        )


# --- canonical form --------------------------------------------------------------------------


def _trained(teacher: TrialRecord) -> bool:
    source = teacher.config.get("source") or {}
    return source.get("kind") == "scratch" and source.get("seed") is None


def json_text(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True, allow_nan=False)


def canonical(trial: TrialRecord) -> TrialRecord:
    """What ledger and parquet both keep of a trial: JSON values, finite metrics, milliseconds.
    A metric without a value is left out here; it is null in the parquet file."""
    metrics = sorted(trial.metrics.items())
    return replace(
        trial,
        config=json.loads(json_text(trial.config)),
        axes=json.loads(json_text(trial.axes)),
        metrics={k: float(v) for k, v in metrics if v is not None and math.isfinite(v)},
        started_at=round(trial.started_at, 3),
        ended_at=round(trial.ended_at, 3),
    )


Point = TypeVar("Point", CurvePoint, BlockScore)


def measured(rows: Iterable[Point]) -> list[Point]:
    """In a table of one value a row, a value that is not finite has no row."""
    return [row for row in rows if math.isfinite(row.value)]


def scored(items: Iterable[ItemRecord]) -> list[ItemRecord]:
    return [
        item if item.score is None or math.isfinite(item.score) else replace(item, score=None)
        for item in items
        if math.isfinite(item.correct)
    ]


def trial_from(values: Mapping[str, Any]) -> TrialRecord:
    dropped = values.get("dropped_layers")
    whole = {**values, "dropped_layers": None if dropped is None else tuple(dropped)}
    return TrialRecord(**whole)


def names(kind: type[Any], *without: str) -> list[str]:
    return [each.name for each in fields(kind) if each.name not in without]


def columns(rows: Sequence[Any], names: Sequence[str]) -> dict[str, list[Any]]:
    return {name: [getattr(row, name) for row in rows] for name in names}


def rows_from(kind: type[Any], columns: Mapping[str, list[Any]], **same: Any) -> list[Any]:
    return [
        kind(**same, **dict(zip(columns, values, strict=True)))
        for values in zip(*columns.values(), strict=True)
    ]


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- the parquet files -----------------------------------------------------------------------

SCHEMA_VERSION = 1
"""In the metadata of every parquet file, as `orchestrate.schema_version`."""

CORE_METRICS = (
    "lm_loss.before",
    "lm_loss.after",
    "kd_loss.before",
    "kd_loss.after",
    "accuracy.mean",
    "accuracy_report.mean",
)
"""Columns that trials.parquet has even where no trial has a value."""

_MOMENT = pa.timestamp("ms", tz="UTC")
_IDENTITY = {
    **dict.fromkeys(("trial_id", "sweep", "profile"), pa.string()),
    "seed": pa.int64(),
    **dict.fromkeys(("status", "reason", "baseline", "config"), pa.string()),
}
_COUNTS = {
    **dict.fromkeys(("parameters", "parameters_non_embedding", "tokens_trained"), pa.int64()),
    "dropped_layers": pa.list_(pa.int64()),
    "in_sweep": pa.bool_(),
}
_COSTS = {
    **dict.fromkeys(("cpu_s", "gpu_s", "wall_s"), pa.float64()),
    "mlflow_run_id": pa.string(),
    **dict.fromkeys(("started_at", "ended_at"), _MOMENT),
}
_AS_JSON = {"orchestrate.encoding": "json"}
"""Marks an axis whose values have no one type: each stands as JSON."""

_TABLES: Mapping[str, type[Any]] = {
    "stages": StageRecord,
    "curves": CurvePoint,
    "items": ItemRecord,
    "importance": BlockScore,
}
"""Tables that have exactly the fields of their record, in the same order."""

TABLES = tuple(f"{name}.parquet" for name in ("trials", *_TABLES))

_ARROW = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64()}


def _schema_of(kind: type[Any]) -> pa.Schema:
    types = {each.name: str(each.type).removesuffix(" | None") for each in fields(kind)}
    return pa.schema([(name, _ARROW.get(type_, pa.string())) for name, type_ in types.items()])


def write_parquet(records: Records, folder: Path) -> None:
    """Write trials, stages, curves, items and importance.parquet, each whole or not at all.
    Equal records give equal bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "orchestrate.schema_version": str(SCHEMA_VERSION),
        "orchestrate.sweep": records.sweep,
        "orchestrate.profile": records.profile,
    }
    tables = {
        "trials": _trials_table(records.trials),
        "stages": _plain_table("stages", records.stages),
        "curves": _plain_table("curves", measured(records.curves)),
        "items": _plain_table("items", scored(records.items)),
        "importance": _plain_table("importance", measured(records.scores)),
    }
    for name, table in tables.items():
        _replace_file(table.replace_schema_metadata(about), folder / f"{name}.parquet")
    sync_folder(folder)


def read_parquet(folder: Path) -> Records:
    """The records that `write_parquet` left in a results folder, one's own or published.

    Raises FileNotFoundError where there are none and ValueError where a newer version wrote them
    or a file is damaged.
    """
    if not (folder / "trials.parquet").is_file():
        raise FileNotFoundError(f"{folder} has no trials.parquet: no sweep has recorded into it")
    trials = _read_table(folder / "trials.parquet")
    rows = {
        name: tuple(rows_from(kind, _read_table(folder / f"{name}.parquet").to_pydict()))
        for name, kind in _TABLES.items()
        if (folder / f"{name}.parquet").is_file()
    }
    return Records(
        sweep=trials.schema.metadata[b"orchestrate.sweep"].decode(),
        profile=trials.schema.metadata[b"orchestrate.profile"].decode(),
        trials=_trials_of(trials),
        stages=rows.get("stages", ()),
        curves=rows.get("curves", ()),
        items=rows.get("items", ()),
        scores=rows.get("importance", ()),
    )


def read_trials(folder: Path) -> tuple[TrialRecord, ...]:
    """The trials of a results folder alone, without curves and questions. Raises ValueError where
    a newer version wrote them or the file is damaged."""
    return _trials_of(_read_table(folder / "trials.parquet"))


def _plain_table(name: str, rows: Sequence[Any]) -> pa.Table:
    schema = _schema_of(_TABLES[name])
    return pa.table(columns(rows, schema.names), schema=schema)


def _trials_table(trials: Sequence[TrialRecord]) -> pa.Table:
    rows = [_flat(canonical(trial)) for trial in trials]
    names = sorted({name for row in rows for name in row})
    metrics = {name for name in names if name.startswith("metric.")}
    metrics.update(f"metric.{name}" for name in CORE_METRICS)
    schema = pa.schema(
        [
            *_IDENTITY.items(),
            *(_axis_field(name, rows) for name in names if name.startswith("axis.")),
            *_COUNTS.items(),
            *((name, pa.float64()) for name in sorted(metrics)),
            *_COSTS.items(),
        ]
    )
    return pa.table([_column(each, rows) for each in schema], schema=schema)


def _flat(trial: TrialRecord) -> dict[str, Any]:
    """One row of trials.parquet. A name that is absent is null there."""
    row = {name: getattr(trial, name) for name in {**_IDENTITY, **_COUNTS, **_COSTS}}
    row["config"] = json_text(trial.config)
    row["started_at"], row["ended_at"] = (
        round(moment * 1000) for moment in (trial.started_at, trial.ended_at)
    )
    row.update({f"axis.{name}": value for name, value in trial.axes.items()})
    row.update({f"metric.{name}": value for name, value in trial.metrics.items()})
    return row


def _axis_field(name: str, rows: Sequence[Mapping[str, Any]]) -> pa.Field:
    """The values' own type where they share one, integers and floats together as floats."""
    values = [row[name] for row in rows if name in row]
    kinds = {type(value) for value in values}
    exact = all(abs(value) <= 2**53 for value in values if type(value) is int)
    for kind, column in ((str, pa.string()), (bool, pa.bool_()), (float, pa.float64())):
        if kinds == {kind}:
            return pa.field(name, column)
    if exact and kinds == {int}:
        return pa.field(name, pa.int64())
    if exact and kinds == {int, float}:
        return pa.field(name, pa.float64())
    return pa.field(name, pa.string(), metadata=_AS_JSON)


def _is_json(column: pa.Field) -> bool:
    return b"orchestrate.encoding" in (column.metadata or {})


def _column(column: pa.Field, rows: Sequence[Mapping[str, Any]]) -> pa.Array:
    if _is_json(column):
        values = [json_text(row[column.name]) if column.name in row else None for row in rows]
    else:
        values = [row.get(column.name) for row in rows]
    return pa.array(values, column.type)


def _trials_of(table: pa.Table) -> tuple[TrialRecord, ...]:
    columns = {}
    for each in table.schema:
        column = table[each.name]
        values = (column.cast(pa.int64()) if each.type == _MOMENT else column).to_pylist()
        if _is_json(each):
            values = [value if value is None else _Json(json.loads(value)) for value in values]
        columns[each.name] = values
    names = list(columns)
    rows = (dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True))
    return tuple(_unflat(row) for row in rows)


@dataclass(frozen=True)
class _Json:
    """A value read from JSON, so that its null is told from an axis that is off."""

    value: Any


def _unflat(row: Mapping[str, Any]) -> TrialRecord:
    def under(prefix: str) -> dict[str, Any]:
        found = {n.removeprefix(prefix): v for n, v in row.items() if n.startswith(prefix)}
        return {
            name: value.value if isinstance(value, _Json) else value
            for name, value in found.items()
            if value is not None
        }

    row = {"in_sweep": True, **row}  # a file from before there was such a column
    plain = {name: row[name] for name in {**_IDENTITY, **_COUNTS, **_COSTS}}
    plain["config"] = json.loads(row["config"])
    plain["started_at"], plain["ended_at"] = row["started_at"] / 1000, row["ended_at"] / 1000
    return trial_from({**plain, "axes": under("axis."), "metrics": under("metric.")})


def _read_table(path: Path) -> pa.Table:
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    version = int((table.schema.metadata or {}).get(b"orchestrate.schema_version", b"0"))
    if not 1 <= version <= SCHEMA_VERSION:
        raise ValueError(f"{path} has schema version {version}; known are 1 to {SCHEMA_VERSION}")
    return table


def _replace_file(table: pa.Table, path: Path) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with beside.open("wb") as stream:
        pq.write_table(table, stream, compression="zstd", write_page_checksum=True)
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(path)
