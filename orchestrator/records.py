"""What is known of the trials and stages that ran: typed records, the ledger, the parquet files.

The ledger is the truth: append-only JSON lines, one event a line, flushed to disk before the sweep
goes on. The parquet files are written from it and can be rebuilt at any time. The only module that
imports pyarrow.
"""

from __future__ import annotations

import json
import math
import os
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
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


# --- canonical form --------------------------------------------------------------------------


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True, allow_nan=False)


def _canonical(trial: TrialRecord) -> TrialRecord:
    """What ledger and parquet both keep of a trial: JSON values, finite metrics, milliseconds.
    A metric without a value is left out here; it is null in the parquet file."""
    metrics = sorted(trial.metrics.items())
    return replace(
        trial,
        config=json.loads(_json(trial.config)),
        axes=json.loads(_json(trial.axes)),
        metrics={k: float(v) for k, v in metrics if v is not None and math.isfinite(v)},
        started_at=round(trial.started_at, 3),
        ended_at=round(trial.ended_at, 3),
    )


Point = TypeVar("Point", CurvePoint, BlockScore)


def _measured(rows: Iterable[Point]) -> list[Point]:
    """In a table of one value a row, a value that is not finite has no row."""
    return [row for row in rows if math.isfinite(row.value)]


def _scored(items: Iterable[ItemRecord]) -> list[ItemRecord]:
    return [
        item if item.score is None or math.isfinite(item.score) else replace(item, score=None)
        for item in items
        if math.isfinite(item.correct)
    ]


def _trial(values: Mapping[str, Any]) -> TrialRecord:
    dropped = values.get("dropped_layers")
    whole = {**values, "dropped_layers": None if dropped is None else tuple(dropped)}
    return TrialRecord(**whole)


def _names(kind: type[Any], *without: str) -> list[str]:
    return [each.name for each in fields(kind) if each.name not in without]


def _columns(rows: Sequence[Any], names: Sequence[str]) -> dict[str, list[Any]]:
    return {name: [getattr(row, name) for row in rows] for name in names}


def _rows(kind: type[Any], columns: Mapping[str, list[Any]], **same: Any) -> list[Any]:
    return [
        kind(**same, **dict(zip(columns, values, strict=True)))
        for values in zip(*columns.values(), strict=True)
    ]


# --- the ledger ------------------------------------------------------------------------------

_AFTER_TORN = {"event": "torn"}
"""Written at the head of a fresh line: the line above it was cut off by a kill, as is known."""


class Ledger:
    """The events of one sweep, one JSON object a line, each flushed to disk before `append`
    returns. Nothing is ever rewritten, so a kill can cost at most the line being written.

    Reading is incremental: lines that another process appended are seen too. Safe to share
    between threads. The file appears with the first event.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._offset = 0
        self._line = 1
        self._trials: dict[str, tuple[TrialRecord, list[CurvePoint], list[ItemRecord]]] = {}
        self._stages: dict[tuple[str, str], StageRecord] = {}
        self._scores: dict[str, list[BlockScore]] = {}
        self._runs: dict[str | None, str] = {}

    # Writing.

    def trial(
        self,
        record: TrialRecord,
        curves: Sequence[CurvePoint] = (),
        items: Sequence[ItemRecord] = (),
    ) -> None:
        """A trial ended. It replaces what an earlier attempt at the same trial left."""
        self.append(
            {
                "event": "trial",
                "trial": asdict(_canonical(record)),
                "curves": _columns(_measured(curves), _names(CurvePoint, "trial_id")),
                "items": _columns(_scored(items), _names(ItemRecord, "trial_id")),
            }
        )

    def stage(self, record: StageRecord) -> None:
        """A stage that a trial asked for is done. Saying so twice changes nothing, but a stage
        that was really run replaces one found in the store: its cost was paid."""
        self.append({"event": "stage", "stage": asdict(record)})

    def scores(self, rows: Sequence[BlockScore]) -> None:
        """The block scores of one or more importance stages; the first of a stage stay."""
        columns = _columns(_measured(rows), _names(BlockScore))
        self.append({"event": "scores", "scores": columns})

    def tracked(self, trial_id: str | None, mlflow_run_id: str) -> None:
        """The MLflow run that shows a trial, or the whole sweep where `trial_id` is None."""
        self.append({"event": "tracked", "trial_id": trial_id, "mlflow_run_id": mlflow_run_id})

    def append(self, event: Mapping[str, Any]) -> None:
        """Add one event in one write and wait until the disk has it."""
        line = json.dumps(event, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        with self._lock:
            new = not self.path.exists()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                if _ends_in_mid_line(descriptor):
                    line = b"\n" + _json(_AFTER_TORN).encode() + b"\n" + line
                _write_all(descriptor, line)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if new:
                _sync_folder(self.path.parent)

    # Reading.

    def finished_trials(self) -> set[str]:
        """Ids of the trials that need not run again: completed, or stopped by the scheduler."""
        with self._lock:
            self._refresh()
            return {id_ for id_, (trial, _, _) in self._trials.items() if trial.status != "failed"}

    def scored_stages(self) -> set[str]:
        """Ids of the importance stages whose block scores are known."""
        with self._lock:
            self._refresh()
            return set(self._scores)

    def tracked_runs(self) -> dict[str | None, str]:
        """Trial id -> MLflow run id; the sweep's own parent run stands under None."""
        with self._lock:
            self._refresh()
            return dict(self._runs)

    def records(self, sweep: str, profile: str, order: Sequence[str] = ()) -> Records:
        """All that is known, trials in the given order of ids and then the others by id."""
        with self._lock:
            self._refresh()
            ids = _in_order({*self._trials, *(trial_id for trial_id, _ in self._stages)}, order)
            ended = [self._trials[id_] for id_ in ids if id_ in self._trials]
            by_trial: dict[str, list[StageRecord]] = {}
            for stage in self._stages.values():
                by_trial.setdefault(stage.trial_id, []).append(stage)
            stages = [stage for id_ in ids for stage in by_trial.get(id_, ())]
            scored = _in_order(set(self._scores), list(dict.fromkeys(s.stage_id for s in stages)))
            return Records(
                sweep=sweep,
                profile=profile,
                trials=tuple(self._with_run(trial) for trial, _, _ in ended),
                stages=tuple(stages),
                curves=tuple(point for _, curves, _ in ended for point in curves),
                items=tuple(item for _, _, items in ended for item in items),
                scores=tuple(score for id_ in scored for score in self._scores[id_]),
            )

    def _with_run(self, trial: TrialRecord) -> TrialRecord:
        run = self._runs.get(trial.trial_id, trial.mlflow_run_id)
        return replace(trial, mlflow_run_id=run)

    def _refresh(self) -> None:
        if not self.path.exists():
            return
        with self.path.open("rb") as stream:
            stream.seek(self._offset)
            *lines, rest = stream.read().split(b"\n")
        for position, line in enumerate(lines):
            torn = lines[position + 1 : position + 2] == [_json(_AFTER_TORN).encode()]
            if not self._apply(line) and not torn:
                self._warn()
            self._line += 1
            self._offset += len(line) + 1
        # A last line without its end was cut off, unless all but the line feed got through.
        if self._apply(rest):
            self._offset += len(rest)

    def _warn(self) -> None:
        text = f"{self.path}: line {self._line} is damaged and was left out"
        warnings.warn(text, stacklevel=4)

    def _apply(self, line: bytes) -> bool:
        """Take one line in; False where it is no event."""
        if not line:
            return True
        try:
            event = json.loads(line)
            kind = event["event"]
            if kind == "trial":
                self._take_trial(event)
            elif kind == "stage":
                self._take_stage(StageRecord(**event["stage"]))
            elif kind == "scores":
                self._take_scores(_rows(BlockScore, event["scores"]))
            elif kind == "tracked":
                self._runs[event["trial_id"]] = event["mlflow_run_id"]
            else:
                return bool(event == _AFTER_TORN)
        except (ValueError, TypeError, KeyError, AttributeError):
            return False
        return True

    def _take_trial(self, event: Mapping[str, Any]) -> None:
        trial = _trial(event["trial"])
        curves = _rows(CurvePoint, event["curves"], trial_id=trial.trial_id)
        items = _rows(ItemRecord, event["items"], trial_id=trial.trial_id)
        self._trials[trial.trial_id] = (trial, curves, items)

    def _take_stage(self, stage: StageRecord) -> None:
        key = (stage.trial_id, stage.stage_id)
        known = self._stages.get(key)
        if known is None or (known.cached and not stage.cached):
            self._stages[key] = stage

    def _take_scores(self, rows: Sequence[BlockScore]) -> None:
        by_stage: dict[str, list[BlockScore]] = {}
        for row in rows:
            by_stage.setdefault(row.stage_id, []).append(row)
        for stage_id, scores in by_stage.items():
            self._scores.setdefault(stage_id, scores)


def _in_order(ids: set[str], order: Sequence[str]) -> list[str]:
    place = {id_: position for position, id_ in enumerate(order)}
    return sorted(ids, key=lambda id_: (place.get(id_, len(place)), id_))


def _ends_in_mid_line(descriptor: int) -> bool:
    size = os.fstat(descriptor).st_size
    return size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"


def _write_all(descriptor: int, data: bytes) -> None:
    # One call writes it all, except on a disk that is nearly full.
    while data:
        data = data[os.write(descriptor, data) :]


def _sync_folder(folder: Path) -> None:
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
        "curves": _plain_table("curves", _measured(records.curves)),
        "items": _plain_table("items", _scored(records.items)),
        "importance": _plain_table("importance", _measured(records.scores)),
    }
    for name, table in tables.items():
        _replace_file(table.replace_schema_metadata(about), folder / f"{name}.parquet")
    _sync_folder(folder)


def read_parquet(folder: Path) -> Records:
    """The records that `write_parquet` left in a results folder, one's own or published.

    Raises FileNotFoundError where there are none and ValueError where a newer version wrote them.
    """
    if not (folder / "trials.parquet").is_file():
        raise FileNotFoundError(f"{folder} has no trials.parquet: no sweep has recorded into it")
    trials = _read_table(folder / "trials.parquet")
    rows = {
        name: tuple(_rows(kind, _read_table(folder / f"{name}.parquet").to_pydict()))
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


def _plain_table(name: str, rows: Sequence[Any]) -> pa.Table:
    schema = _schema_of(_TABLES[name])
    return pa.table(_columns(rows, schema.names), schema=schema)


def _trials_table(trials: Sequence[TrialRecord]) -> pa.Table:
    rows = [_flat(_canonical(trial)) for trial in trials]
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
    row["config"] = _json(trial.config)
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
        values = [_json(row[column.name]) if column.name in row else None for row in rows]
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

    plain = {name: row[name] for name in {**_IDENTITY, **_COUNTS, **_COSTS}}
    plain["config"] = json.loads(row["config"])
    plain["started_at"], plain["ended_at"] = row["started_at"] / 1000, row["ended_at"] / 1000
    return _trial({**plain, "axes": under("axis."), "metrics": under("metric.")})


def _read_table(path: Path) -> pa.Table:
    table = pq.read_table(path)
    version = int((table.schema.metadata or {}).get(b"orchestrate.schema_version", b"0"))
    if not 1 <= version <= SCHEMA_VERSION:
        raise ValueError(f"{path} has schema version {version}; known are 1 to {SCHEMA_VERSION}")
    return table


def _replace_file(table: pa.Table, path: Path) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with beside.open("wb") as stream:
        pq.write_table(table, stream, compression="zstd")
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(path)
