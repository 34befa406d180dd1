"""The ledger of a sweep: append-only JSON lines, one event a line, flushed to disk before the sweep
goes on. It is the truth; the parquet files are written from it.
"""

from __future__ import annotations

import json
import os
import re
import threading
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from orchestrator.records import (
    BlockScore,
    CurvePoint,
    ItemRecord,
    Records,
    StageRecord,
    TrialRecord,
    canonical,
    columns,
    json_text,
    measured,
    names,
    rows_from,
    scored,
    sync_folder,
    trial_from,
)

_AFTER_TORN = {"event": "torn"}
"""Written at the head of a fresh line: the line above it was cut off by a kill, as is known."""


class Ledger:
    """The events of one sweep, one JSON object a line, each flushed to disk before `append`
    returns. Nothing is ever rewritten, so a kill can cost at most the line being written. Each line
    has a checksum: one that a disk changed is left out with a warning, and its trial runs again.

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
                "trial": asdict(canonical(record)),
                "curves": columns(measured(curves), names(CurvePoint, "trial_id")),
                "items": columns(scored(items), names(ItemRecord, "trial_id")),
            }
        )

    def stage(self, record: StageRecord) -> None:
        """A stage that a trial asked for is done. Saying so twice changes nothing, but a stage
        that was really run replaces one found in the store: its cost was paid."""
        self.append({"event": "stage", "stage": asdict(record)})

    def scores(self, rows: Sequence[BlockScore]) -> None:
        """The block scores of one or more importance stages; the first of a stage stay."""
        scores = columns(measured(rows), names(BlockScore))
        self.append({"event": "scores", "scores": scores})

    def tracked(self, trial_id: str | None, mlflow_run_id: str) -> None:
        """The MLflow run that shows a trial, or the whole sweep where `trial_id` is None."""
        self.append({"event": "tracked", "trial_id": trial_id, "mlflow_run_id": mlflow_run_id})

    def append(self, event: Mapping[str, Any]) -> None:
        """Add one event in one write and wait until the disk has it."""
        line = _with_checksum(event) + b"\n"
        with self._lock:
            new = not self.path.exists()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                if _ends_in_mid_line(descriptor):
                    line = b"\n" + json_text(_AFTER_TORN).encode() + b"\n" + line
                _write_all(descriptor, line)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if new:
                sync_folder(self.path.parent)

    # Reading.

    def trials(self) -> dict[str, TrialRecord]:
        """Every trial that ended, by id."""
        with self._lock:
            self._refresh()
            return {id_: trial for id_, (trial, _, _) in self._trials.items()}

    def finished_trials(self, stopped: bool = True) -> set[str]:
        """Ids of the trials that need not run again: completed or, unless a sweep does not stop
        any, stopped by the scheduler."""
        over = ("completed", "stopped") if stopped else ("completed",)
        return {id_ for id_, trial in self.trials().items() if trial.status in over}

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
            torn = lines[position + 1 : position + 2] == [json_text(_AFTER_TORN).encode()]
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
            event = _checked(line)
            kind = event["event"]
            if kind == "trial":
                self._take_trial(event)
            elif kind == "stage":
                self._take_stage(StageRecord(**event["stage"]))
            elif kind == "scores":
                self._take_scores(rows_from(BlockScore, event["scores"]))
            elif kind == "tracked":
                self._runs[event["trial_id"]] = event["mlflow_run_id"]
            else:
                return bool(event == _AFTER_TORN)
        except (ValueError, TypeError, KeyError, AttributeError):
            return False
        return True

    def _take_trial(self, event: Mapping[str, Any]) -> None:
        trial = trial_from(event["trial"])
        curves = rows_from(CurvePoint, event["curves"], trial_id=trial.trial_id)
        items = rows_from(ItemRecord, event["items"], trial_id=trial.trial_id)
        self._trials[trial.trial_id] = (trial, curves, items)

    def _take_stage(self, stage: StageRecord) -> None:
        key = (stage.trial_id, stage.stage_id)
        known = self._stages.get(key, stage)
        ended = self._trials.get(stage.trial_id)
        if ended is None or ended[0].status == "failed":
            # To the end: a trial names all its stages in order just before its row, whatever was
            # said of some of them before, in this run or in one that was killed.
            self._stages.pop(key, None)
        self._stages[key] = stage if known.cached else known

    def _take_scores(self, rows: Sequence[BlockScore]) -> None:
        by_stage: dict[str, list[BlockScore]] = {}
        for row in rows:
            by_stage.setdefault(row.stage_id, []).append(row)
        for stage_id, scores in by_stage.items():
            self._scores.setdefault(stage_id, scores)


def _in_order(ids: set[str], order: Sequence[str]) -> list[str]:
    place = {id_: position for position, id_ in enumerate(order)}
    return sorted(ids, key=lambda id_: (place.get(id_, len(place)), id_))


_CHECKSUM = re.compile(rb',"crc32":(\d+)\}$')


def _with_checksum(event: Mapping[str, Any]) -> bytes:
    line = json.dumps(event, separators=(",", ":"), allow_nan=False).encode()
    return line[:-1] + b',"crc32":%d}' % zlib.crc32(line)


def _checked(line: bytes) -> dict[str, Any]:
    """The event that a line holds. Raises `ValueError` where it is not what was written; a line
    from before there were checksums has no more keys than its event."""
    event: dict[str, Any] = json.loads(line)
    found = _CHECKSUM.search(line)
    if found is None:
        if set(event) - _KEYS:
            raise ValueError("a key that no event has")
        return event
    if int(found[1]) != zlib.crc32(line[: found.start()] + b"}"):
        raise ValueError("the checksum differs")
    del event["crc32"]
    return event


_KEYS = {"event", "trial", "curves", "items", "stage", "scores", "trial_id", "mlflow_run_id"}


def _ends_in_mid_line(descriptor: int) -> bool:
    size = os.fstat(descriptor).st_size
    return size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"


def _write_all(descriptor: int, data: bytes) -> None:
    # One call writes it all, except on a disk that is nearly full.
    while data:
        data = data[os.write(descriptor, data) :]
