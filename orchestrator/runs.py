"""A sweep's runs in MLflow: one experiment a sweep, a parent run a profile, a child run a trial.

Runs are found again by their tags, so writing them twice leaves no duplicates. What a child holds
is made for MLflow's compare page, which draws the parameters that differ, the first three by name,
and cuts their values to ten characters: a child's parameters are the axes under short names,
`group` (`grid`, or the baseline's name) and `seed`. All other settings are in its `config.json`: as
parameters, a hundred that are equal would bury those. Sizes are metrics, as they are outcomes.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator import registry
from orchestrator.inputs import inputs_of
from orchestrator.records import CurvePoint, Records, TrialRecord, canonical, measured
from orchestrator.registry import TRIAL_TAG
from orchestrator.wording import shortest_names

OnTracked = Callable[[str | None, str], None]
"""Told the MLflow run id of a trial, or of the whole sweep where the trial id is None."""

SWEEP_TAG = "orchestrate.sweep_profile"
WINNER_TAG = "orchestrate.winner"
REASON_TAG = "orchestrate.reason"
CONFIG_TAG = "orchestrate.config"
"""The artifact with a trial's settings, once it is there."""
CONFIG = "config.json"

LEARNING_RATE = "learning_rate"

STATUS = {"completed": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
PARAMETER_LENGTH = 6000
"""How long MLflow allows a parameter to be."""
NAME_LENGTH = 250
NOTE_LENGTH = 8000


def quiet_environment() -> None:
    """A dead server is given up on in seconds, where MLflow's own defaults take minutes."""
    # Not again by itself: a run that a slow server did make would be made twice.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    # Nothing about a sweep leaves the machine unasked.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # It prints the server's address, password included, for every run that ends.
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    # What goes wrong is said once, by `close`; MLflow's own word on a full disk is a traceback.
    for name in ("alembic", "mlflow.store.db.utils", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def new_client(uri: str) -> Any:
    """MLflow's client, with the registry where the runs are."""
    quiet_environment()
    from mlflow.tracking import MlflowClient

    if not gc.get_freeze_count():
        # Half a million objects that stay. The garbage collector would walk through them after
        # every twenty trials or so: more than a tenth of what it costs to write these.
        gc.freeze()
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def is_refusal(error: Exception) -> bool:
    """Whether MLflow itself said no, so that the next trial may fare better."""
    code = getattr(error, "error_code", None)
    return code not in (None, "INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED")


def one_line(error: Exception) -> str:
    """What a person wants to know of a failure: of a server that is not there, just that."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, TimeoutError):
            return "it does not answer"
        if isinstance(cause, ConnectionError | socket.gaierror) and cause.strerror:
            return f"it cannot be reached ({cause.strerror.lower()})"
        if isinstance(cause, OSError) and cause.strerror:
            return f"{cause.strerror.lower()}: {cause.filename or ''}".rstrip(": ")
        cause = cause.__cause__ or cause.__context__
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:300]}"


# --- what a trial's run is called and holds --------------------------------------------------


def parameters_of(trial: TrialRecord, short: Mapping[str, str]) -> dict[str, str]:
    """The trial's axes under their short names, `group` and `seed`. An axis that is off is absent.

    An axis of such a name keeps it: then the group or the seed is in the run's name alone.
    """
    axes = {short[axis]: as_text(value) for axis, value in trial.axes.items()}
    whole = {"group": trial.baseline or "grid", "seed": str(trial.seed), **axes}
    return {_name(key): value[:PARAMETER_LENGTH] for key, value in whole.items()}


def metrics_of(trial: TrialRecord) -> dict[str, float]:
    """The recorded metrics, and the model's size and training as metrics, so that accuracy can be
    drawn over them. None for a failed trial; what was not measured is absent."""
    if trial.status == "failed":
        return {}
    sizes = {"parameters": trial.parameters, "tokens_trained": trial.tokens_trained}
    # MLflow's compare page draws the first: the mean stands before its tasks.
    first = sorted(trial.metrics, key=lambda name: (name != "accuracy.mean", name))
    found = {**{name: trial.metrics[name] for name in first}, **sizes}
    return {name: float(value) for name, value in found.items() if value is not None}


def points_of(curves: Sequence[CurvePoint]) -> list[CurvePoint]:
    """What is shown of a trial's curves: all that was measured, and every tenth point of the
    learning rate, which the settings determine. Points are most of what a run costs."""
    rates = [point for point in curves if point.name == LEARNING_RATE]
    return [point for point in curves if point.name != LEARNING_RATE] + rates[::-10][::-1]


def run_name(trial: TrialRecord, short: Mapping[str, str]) -> str:
    """What tells a trial from the others, for people, and its id."""
    axes = [f"{short[axis]}={as_text(trial.axes[axis])}" for axis in sorted(trial.axes)]
    what = ", ".join([*([trial.baseline] if trial.baseline else []), *axes, f"seed={trial.seed}"])
    end = f" ({trial.trial_id})"
    return what[: NAME_LENGTH - len(end)] + end


def as_text(value: Any) -> str:
    """A value as it stands in a table: a variant as its settings and its kind, so that what tells
    it from the same kind with other settings is not cut off."""
    if isinstance(value, Mapping):
        settings = [f"{key}={as_text(value[key])}" for key in sorted(value) if key != "kind"]
        return " ".join([*settings, *([str(value["kind"])] if "kind" in value else [])]) or "{}"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)  # the same value, whether the ledger or a table tells it
    return value if isinstance(value, str) else json.dumps(value)


def _name(key: str) -> str:
    # The characters that MLflow allows in names, and their greatest length.
    return re.sub(r"[^\w\-. :/]", "_", key)[:NAME_LENGTH]


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


# --- the runs --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Child:
    """The run of a trial, and what tells whether it is up to date."""

    run_id: str
    status: str
    start_ms: int | None
    end_ms: int | None
    name: str
    parameters: Mapping[str, str]
    tags: Mapping[str, str]

    def shows(self, record: TrialRecord, name: str, parameters: Mapping[str, str]) -> bool:
        """A run is ended last of all, at the time when the trial did."""
        named = (self.name, self.parameters) == (name, parameters)
        return self._ended_as(record) and named and CONFIG_TAG in self.tags

    def fits(self, record: TrialRecord, parameters: Mapping[str, str]) -> bool:
        """Whether it can be made to show this trial: MLflow changes no parameter and removes no
        metric, so that what it was told of another attempt would stay."""
        begun = self.start_ms == _ms(record.started_at)
        same = begun and (self.end_ms is None or self._ended_as(record))
        return same and self.parameters.items() <= parameters.items()

    def _ended_as(self, record: TrialRecord) -> bool:
        return (self.status, self.end_ms) == (STATUS[record.status], _ms(record.ended_at))


class Runs:
    """The experiment, the parent run and its children, and the winner in the model registry. Used
    by one thread.

    `artifacts` is where they go where there is no server, `resolved_yaml` the resolved sweep file's
    text. `on_tracked` is told of every run.
    """

    def __init__(
        self,
        uri: str,
        artifacts: Path | None,
        sweep: str,
        profile: str,
        resolved_yaml: str,
        on_tracked: OnTracked,
    ) -> None:
        self._uri, self._artifacts, self._yaml = uri, artifacts, resolved_yaml
        self._sweep, self._profile = sweep, profile
        self._on_tracked = on_tracked
        self._told: dict[str | None, str] = {}
        self._client: Any = None
        self._experiment = self._parent = ""
        self._children: dict[str, _Child] = {}
        self._axes: frozenset[str] = frozenset()
        self._short: Mapping[str, str] = {}
        self._unattached: Exception | None = None
        """Why artifacts cannot be written: a server may keep them elsewhere than runs."""
        self.written = 0
        self.alive_at = 0.0
        """When something was last written, by the monotonic clock."""

    @property
    def open(self) -> bool:
        """Whether the parent run is there."""
        return bool(self._parent)

    def forget(self) -> None:
        """Look for all runs again before anything else is written."""
        self._parent, self._unattached = "", None

    def trial(self, record: TrialRecord, curves: Sequence[CurvePoint]) -> None:
        """Write a child run, unless it shows this trial already."""
        self._connect()
        record = canonical(record)
        self._know([record])
        child = self._children.get(record.trial_id)
        name, parameters = run_name(record, self._short), parameters_of(record, self._short)
        if child is None or not child.shows(record, name, parameters):
            child = self._write(record, measured(curves), child, name, parameters)
            self._children[record.trial_id] = child
            self.written += 1
        if record.mlflow_run_id != child.run_id:
            self._tell(record.trial_id, child.run_id)
        self.alive_at = time.monotonic()

    def finish(self, folder: Path, records: Records) -> str | None:
        """Write what is not shown yet, the parent run and the winner's model; gives the first of
        MLflow's refusals."""
        self._connect()
        self._unattached = None
        self._know(records.trials)
        curves: defaultdict[str, list[CurvePoint]] = defaultdict(list)
        for point in records.curves:
            curves[point.trial_id].append(point)
        refused: str | None = None
        for record in records.trials:
            try:
                self.trial(record, curves[record.trial_id])
            except Exception as error:
                if not is_refusal(error):
                    raise
                refused = refused or f"trial {record.trial_id}: {one_line(error)}"
        self._show_parent(folder)
        self._register(folder)
        self._show_files(folder)
        if self._unattached is not None and refused is None:
            refused = f"{CONFIG}: {one_line(self._unattached)}"
        return refused

    def _know(self, trials: Sequence[TrialRecord]) -> None:
        """Names are short as long as they are unambiguous, which all axes together decide."""
        axes = self._axes.union(*(trial.axes for trial in trials))
        if axes != self._axes:
            self._axes, self._short = axes, shortest_names(axes)

    def _show_parent(self, folder: Path) -> None:
        note = folder / "tables" / "configurations.md"
        if note.is_file():
            text = note.read_text(encoding="utf-8")[:NOTE_LENGTH]
            self._client.set_tag(self._parent, "mlflow.note.content", text)
        if (folder / "best.json").is_file():
            self._show_winner(json.loads((folder / "best.json").read_text(encoding="utf-8")))
        elif WINNER_TAG in self._client.get_run(self._parent).data.tags:
            self._client.delete_tag(self._parent, WINNER_TAG)
        self._client.set_terminated(self._parent, "FINISHED")

    def _register(self, folder: Path) -> None:
        """The winner's checkpoint, where the results folder has it: published results do not."""
        best, checkpoint, held = (folder / name for name in ("best.json", "best", "best.trial"))
        if not registry.takes_folders(self._uri):
            return
        name = registry.model_name(self._sweep, self._profile)
        if not (best.is_file() and checkpoint.is_dir()):
            registry.uncrown(self._client, name, checkpoint)
            return
        won = json.loads(best.read_text(encoding="utf-8"))
        # `best.json` follows the records at once, the checkpoint only when the sweep has run.
        if held.is_file() and held.read_text(encoding="utf-8").strip() != won["trial_id"]:
            return
        child = self._children.get(won["trial_id"])
        registry.crown(self._client, name, won, checkpoint, child.run_id if child else None)
        self.alive_at = time.monotonic()

    def _show_files(self, folder: Path) -> None:
        # Last, as artifacts may be kept by another server than runs are.
        self._client.log_text(self._parent, self._yaml, "sweep.yaml")
        for name in ("tables", "figures"):
            if (folder / name).is_dir():
                self._client.log_artifacts(self._parent, str(folder / name), name)
                self.alive_at = time.monotonic()
        for name in ("report.html", "best.json"):
            if (folder / name).is_file():
                self._client.log_artifact(self._parent, str(folder / name))

    def _show_winner(self, best: Mapping[str, Any]) -> None:
        self._client.set_tag(self._parent, WINNER_TAG, best["trial_id"])
        # Stamped with the sweep's own end: the same winner again is no new point, and a later
        # winner is the latest one.
        summary = _summary(best["metrics"], best["measured_until"])
        self._client.log_batch(self._parent, metrics=summary)

    def _connect(self) -> None:
        if self._parent:
            return
        self._client = new_client(self._uri)
        self.alive_at = time.monotonic()  # the import alone takes seconds
        self._experiment = self._find_experiment()
        self.alive_at = time.monotonic()
        parent = self._find_parent()
        self._children = self._find_children(parent)
        self._parent = parent
        self._tell(None, parent)
        self.alive_at = time.monotonic()

    def _tell(self, trial_id: str | None, run_id: str) -> None:
        if self._told.get(trial_id) != run_id:
            self._on_tracked(trial_id, run_id)
            self._told[trial_id] = run_id

    def _find_experiment(self) -> str:
        found = self._client.get_experiment_by_name(self._sweep)
        if found is None:
            place = None if self._artifacts is None else (self._artifacts / self._sweep).as_uri()
            return str(self._client.create_experiment(self._sweep, artifact_location=place))
        if found.lifecycle_stage == "deleted":
            self._client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def _find_parent(self) -> str:
        name = f"{self._sweep}/{self._profile}"
        found = list(self._search(f"tags.`{SWEEP_TAG}` = '{name}'"))
        if not found:
            tags = {SWEEP_TAG: name, "orchestrate.profile": self._profile}
            run = self._client.create_run(self._experiment, tags=tags, run_name=name)
            return str(run.info.run_id)
        kept, *extra = sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))
        for run in extra:
            for child in self._search(_children_of(run.info.run_id)):
                self._client.delete_run(child.info.run_id)
            self._client.delete_run(run.info.run_id)
        self._client.update_run(kept.info.run_id, status="RUNNING")
        return str(kept.info.run_id)

    def _find_children(self, parent: str) -> dict[str, _Child]:
        """One run for each trial. A server that answered too late may have made a second."""
        found: dict[str, _Child] = {}
        for run in self._search(_children_of(parent)):
            if (trial_id := run.data.tags.get(TRIAL_TAG)) is None:
                continue
            info, data = run.info, run.data
            child = _Child(
                info.run_id,
                info.status,
                info.start_time,
                info.end_time,
                info.run_name,
                data.params,
                data.tags,
            )
            known = found.get(trial_id)
            if known is not None:
                child, extra = (child, known) if known.end_ms is None else (known, child)
                self._client.delete_run(extra.run_id)
            found[trial_id] = child
        return found

    def _search(self, condition: str) -> Iterator[Any]:
        token = None
        while True:
            page = self._client.search_runs(
                [self._experiment], condition, max_results=1000, page_token=token
            )
            yield from page
            token = page.token
            if not token:
                return

    def _write(
        self,
        record: TrialRecord,
        curves: Sequence[CurvePoint],
        known: _Child | None,
        name: str,
        parameters: Mapping[str, str],
    ) -> _Child:
        from mlflow.entities import Metric, Param, RunTag

        # A run under other names, as an earlier version or a smaller sweep wrote it, is replaced,
        # and so is that of another attempt at the trial.
        kept = known if known is not None and known.fits(record, parameters) else None
        run_id = kept.run_id if kept else self._new_child(record, name)
        if kept and kept.name != name:
            self._client.update_run(run_id, name=name)
        has = kept.parameters if kept else {}
        missing = {key: value for key, value in parameters.items() if key not in has}
        tags = {CONFIG_TAG: CONFIG} if self._attached(run_id, record.config) else {}
        if record.reason:
            tags[REASON_TAG] = record.reason
        points = [Metric(_name(p.name), p.value, p.time_ms, p.step) for p in points_of(curves)]
        self._client.log_batch(
            run_id,
            metrics=[*_summary(metrics_of(record), record.ended_at), *points],
            params=[Param(key, value) for key, value in missing.items()],
            tags=[RunTag(key, value) for key, value in tags.items()],
        )
        if data_sets := _data_sets(record.config):
            self._client.log_inputs(run_id, data_sets)
        status, end_ms = STATUS[record.status], _ms(record.ended_at)
        self._client.set_terminated(run_id, status, end_ms)
        if known and not kept:
            self._client.delete_run(known.run_id)
        start_ms = _ms(record.started_at)
        return _Child(run_id, status, start_ms, end_ms, name, parameters, tags)

    def _attached(self, run_id: str, config: Mapping[str, Any]) -> bool:
        """Whether a trial's settings are with its run. If not, all else is shown none the less,
        `finish` says why, and the next mirror tries again."""
        if self._unattached is None:
            try:
                text = json.dumps(config, indent=1, sort_keys=True)
                self._client.log_text(run_id, text, CONFIG)
            except Exception as error:
                self._unattached = error
        return self._unattached is None

    def _new_child(self, record: TrialRecord, name: str) -> str:
        tags = {"mlflow.parentRunId": self._parent, TRIAL_TAG: record.trial_id}
        if record.baseline:
            tags["orchestrate.baseline"] = record.baseline
        run = self._client.create_run(self._experiment, _ms(record.started_at), tags, run_name=name)
        return str(run.info.run_id)


def _children_of(parent: str) -> str:
    return f"tags.`mlflow.parentRunId` = '{parent}'"


def _summary(metrics: Mapping[str, float | None], at: float) -> list[Any]:
    from mlflow.entities import Metric

    return [Metric(_name(k), v, _ms(at), 0) for k, v in metrics.items() if v is not None]


def _data_sets(config: Mapping[str, Any]) -> list[Any]:
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

    return [
        DatasetInput(
            Dataset(
                each.name,
                each.digest,
                each.source_type,
                json.dumps(each.source),
                profile=json.dumps(each.settings, sort_keys=True),
            ),
            [InputTag(MLFLOW_DATASET_CONTEXT, each.role)],
        )
        for each in inputs_of(config)
    ]
