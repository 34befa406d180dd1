"""What MLflow's runs hold: names that grow with a sweep, settings, data sets, and the champion."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from urllib.request import url2pathname

import made_up
import pytest

from orchestrator import registry, report, runs, tracking
from orchestrator.inputs import inputs_of
from orchestrator.records import CurvePoint, Records, read_parquet
from orchestrator.selection import rank, winner

PUBLISHED = Path(__file__).parent.parent / "results" / "published"
WHOLE = made_up.records(questions=5)
KEPT = ("teacher-0", "perplexity-0", "task-0", "task-2")
RECORDS = replace(WHOLE, trials=tuple(t for t in WHOLE.trials if t.trial_id in KEPT))
NAME = "depth_ablation.made_up"


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow store with nothing in it: to make one takes seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    runs.new_client(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def results(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A results folder with its own MLflow store."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copyfile(empty_store, tmp_path / "mlflow.db")
    yield tmp_path


def client_of(results: Path) -> Any:
    return runs.new_client(tracking.tracking_uri(results))


def show(records: Records, results: Path) -> tracking.Mirrored:
    return tracking.mirror(
        records,
        results / records.sweep / records.profile,
        tracking.tracking_uri(results),
        tracking.artifact_location(results),
        "name: depth_ablation\n",
    )


def children(results: Path) -> dict[str, Any]:
    """The runs of trials, by trial; fails where a trial has two."""
    client = client_of(results)
    experiment = client.get_experiment_by_name("depth_ablation")
    found = client.search_runs([experiment.experiment_id], f"tags.`{runs.TRIAL_TAG}` LIKE '%'")
    by_trial = {run.data.tags[runs.TRIAL_TAG]: run for run in found}
    assert len(by_trial) == len(found)
    return by_trial


def with_axis(records: Records, name: str, value: Any) -> Records:
    """The same trials in a sweep that has gained an axis."""
    trials = [
        trial if trial.baseline else replace(trial, axes={**trial.axes, name: value})
        for trial in records.trials
    ]
    return replace(records, trials=tuple(trials))


# --- names and settings ------------------------------------------------------------------------


def test_runs_under_the_names_of_an_earlier_version_are_replaced_once(results: Path) -> None:
    client = client_of(results)
    experiment = client.create_experiment("depth_ablation", str(results / "mlartifacts"))
    tags = {runs.SWEEP_TAG: "depth_ablation/made_up"}
    parent = client.create_run(experiment, tags=tags).info.run_id
    old = {}
    for trial in RECORDS.trials:
        tags = {"mlflow.parentRunId": parent, runs.TRIAL_TAG: trial.trial_id}
        run = client.create_run(experiment, tags=tags, run_name=trial.trial_id)
        client.log_param(run.info.run_id, "prune.depth.criterion", "perplexity")
        status, end = runs.STATUS[trial.status], round(trial.ended_at * 1000)
        client.set_terminated(run.info.run_id, status, end)
        old[trial.trial_id] = run.info.run_id
    assert show(RECORDS, results) == tracking.Mirrored(4, 4, True, None)
    shown = children(results)
    assert set(shown) == set(old)
    for trial_id, run in shown.items():
        assert run.info.run_id != old[trial_id]
        assert "prune.depth.criterion" not in run.data.params
        assert run.data.tags["mlflow.parentRunId"] == parent
    assert show(RECORDS, results).written == 0
    assert {id_: run.info.run_id for id_, run in children(results).items()} == {
        id_: run.info.run_id for id_, run in shown.items()
    }


def test_a_sweep_that_gains_an_axis_keeps_its_runs_and_names_the_axis(results: Path) -> None:
    show(RECORDS, results)
    before = children(results)
    show(with_axis(RECORDS, "distill.loss.temperature", 3.0), results)
    after = children(results)
    for trial_id, run in after.items():
        assert run.info.run_id == before[trial_id].info.run_id
        assert run.data.metrics == before[trial_id].data.metrics
    grid = after["perplexity-0"]
    assert grid.data.params["temperature"] == "3"
    assert "temperature=3" in grid.info.run_name
    assert after["teacher-0"].data.params == {"group": "teacher", "seed": "0"}


def test_where_a_short_name_becomes_ambiguous_the_run_is_written_anew(results: Path) -> None:
    show(RECORDS, results)
    show(with_axis(RECORDS, "chain.criterion", "task"), results)
    (grid, teacher) = (children(results)[id_] for id_ in ("perplexity-0", "teacher-0"))
    assert grid.data.params == {
        "chain.criterion": "task",
        "depth.criterion": "perplexity",
        "contiguous": "true",
        "group": "grid",
        "seed": "0",
    }
    assert teacher.data.params == {"group": "teacher", "seed": "0"}


def test_artifacts_that_cannot_be_kept_cost_no_metric_and_are_made_up_for(results: Path) -> None:
    (results / "mlartifacts").write_text("a file where a folder is wanted")
    done = show(RECORDS, results)
    assert done.problem is not None and not done.reached
    client = client_of(results)
    for trial in RECORDS.trials:
        run = children(results)[trial.trial_id]
        assert run.info.status == runs.STATUS[trial.status]
        assert {k: v for k, v in run.data.metrics.items() if "." in k} == trial.metrics
    (results / "mlartifacts").unlink()
    assert show(RECORDS, results) == tracking.Mirrored(4, 4, True, None)
    for run in children(results).values():
        assert [each.path for each in client.list_artifacts(run.info.run_id)] == [runs.CONFIG]
    assert show(RECORDS, results).written == 0


# --- attempts ----------------------------------------------------------------------------------


def attempt(status: Literal["stopped", "completed"], metrics: dict[str, float], at: int) -> Records:
    """One trial that began at a time and was measured at two steps."""
    began = made_up.START + at
    trial = next(trial for trial in RECORDS.trials if trial.trial_id == "perplexity-0")
    trial = replace(
        trial, status=status, metrics=metrics, started_at=began, ended_at=began + len(metrics)
    )
    curves = tuple(
        CurvePoint(
            trial.trial_id, step, 10 * step, round(1000 * began) + step, "heldout_loss", 6.0 - step
        )
        for step in (1, 2)
    )
    return replace(RECORDS, trials=(trial,), curves=curves)


STOPPED = attempt("stopped", {"lm_loss.before": 6.0, "lm_loss.stopped": 4.7}, 0)
COMPLETED = attempt("completed", {"lm_loss.before": 6.0, "lm_loss.after": 4.1}, 500)


def assert_shows(results: Path, records: Records) -> str:
    """MLflow shows the one trial as recorded, and nothing else; gives the run's id."""
    (record,), (run,) = records.trials, children(results).values()
    assert run.info.status == runs.STATUS[record.status]
    assert run.info.start_time == round(record.started_at * 1000)
    assert run.info.end_time == round(record.ended_at * 1000)
    assert {k: v for k, v in run.data.metrics.items() if "." in k} == record.metrics
    history = client_of(results).get_metric_history(run.info.run_id, "heldout_loss")
    assert [(m.step, m.timestamp, m.value) for m in history] == [
        (p.step, p.time_ms, p.value) for p in records.curves
    ]
    return str(run.info.run_id)


def test_a_trial_that_went_on_shows_nothing_of_the_attempt_that_was_stopped(results: Path) -> None:
    show(STOPPED, results)
    stopped = assert_shows(results, STOPPED)
    for written in (1, 0):
        assert show(COMPLETED, results).written == written
        completed = assert_shows(results, COMPLETED)
    assert completed != stopped
    assert client_of(results).get_run(stopped).info.lifecycle_stage == "deleted"


@pytest.mark.parametrize(("begun", "kept"), [(COMPLETED, True), (STOPPED, False)])
def test_a_run_that_a_kill_left_half_written_is_completed_if_it_is_of_the_same_attempt(
    begun: Records, kept: bool, results: Path
) -> None:
    client = client_of(results)
    experiment = client.create_experiment("depth_ablation", str(results / "mlartifacts"))
    tags = {runs.SWEEP_TAG: "depth_ablation/made_up"}
    parent = client.create_run(experiment, tags=tags).info.run_id
    (record,) = begun.trials
    tags = {"mlflow.parentRunId": parent, runs.TRIAL_TAG: record.trial_id}
    half = client.create_run(experiment, round(record.started_at * 1000), tags).info.run_id
    for name, value in record.metrics.items():
        client.log_metric(half, name, value, round(record.ended_at * 1000), 0)
    show(COMPLETED, results)
    assert (assert_shows(results, COMPLETED) == half) is kept


# --- data sets ---------------------------------------------------------------------------------


def trial_of(sweep: str, profile: str, baseline: str | None) -> Any:
    trials = read_parquet(PUBLISHED / sweep / profile).trials
    return next(trial for trial in trials if trial.baseline == baseline)


def test_data_sets_are_shown_with_role_content_hash_and_a_source_that_mlflow_knows(
    results: Path,
) -> None:
    from mlflow.data import get_source

    trial = replace(trial_of("depth_ablation", "smollm2_local", None), sweep="depth_ablation")
    records = replace(RECORDS, trials=(trial,))
    for _ in range(2):
        show(records, results)
        run = children(results)[trial.trial_id]
        found = {
            (each.tags[0].value, each.dataset.name, each.dataset.digest): each
            for each in run.inputs.dataset_inputs
        }
        assert set(found) == {
            ("training", "wikitext2_valid.txt", "f0737ed31fc1"),
            ("heldout", "wikitext2_test.txt", "d790b833ef8c"),
            ("evaluation", "winogrande", "ea1592526f3b"),
            ("evaluation", "arc_easy", "d2d12e59543a"),
            ("evaluation", "piqa", "d2870e73aec5"),
        }
        assert len(run.inputs.dataset_inputs) == len(found)
    for each in found.values():
        assert each.tags[0].key == "mlflow.data.context"
        assert get_source(each).to_dict()["uri"].startswith(each.dataset.name.split(".")[0])


@pytest.mark.parametrize("sweep", ["depth_ablation/smollm2_local", "teacher_correction/tiny"])
def test_every_trial_has_a_heldout_text_and_a_digest_for_each_data_set(sweep: str) -> None:
    for trial in read_parquet(PUBLISHED / sweep).trials:
        found = inputs_of(trial.config)
        roles = [each.role for each in found]
        assert roles.count("heldout") == 1
        assert roles.count("evaluation") == len(trial.config["evaluate"]["tasks"])
        assert ("training" in roles) >= bool(trial.tokens_trained)
        assert ("pretraining" in roles) == (trial.config["source"].get("corpus") is not None)
        assert all(0 < len(each.digest) <= 36 for each in found)


def test_a_data_set_changes_its_digest_with_what_it_follows_from() -> None:
    config = dict(trial_of("depth_ablation", "tiny", None).config)
    other = {**config, "corpus": {**config["corpus"], "language_seed": 1}}
    one, two = ({(i.name, i.digest) for i in inputs_of(each)} for each in (config, other))
    assert len(one - two) == len(two - one) == 2
    assert {i.digest for i in inputs_of(config)} == {i.digest for i in inputs_of(dict(config))}


def test_a_model_that_was_not_trained_here_has_no_training_data() -> None:
    teacher = trial_of("depth_ablation", "smollm2_local", "teacher")
    assert {each.role for each in inputs_of(teacher.config)} == {"heldout", "evaluation"}


def test_a_corpus_of_the_hub_is_named_by_configuration_split_and_revision() -> None:
    corpus = {
        "kind": "hub", "dataset": "wikitext", "name": "wikitext-2-raw-v1", "revision": "b08601e",
        "train_split": "train", "heldout_split": "test",
    }  # fmt: skip
    harness = {"kind": "harness", "name": "arc_easy", "metric": "acc", "shots": 5, "limit": None}
    found = inputs_of({"corpus": corpus, "distill": {}, "evaluate": {"tasks": [harness]}})
    assert [(each.role, each.name, each.digest) for each in found[:1]] == [
        ("heldout", "wikitext/wikitext-2-raw-v1/test", "b08601e")
    ]
    assert found[0].source["path"] == "wikitext" and found[0].source_type == "hugging_face"
    fewer = {"evaluate": {"tasks": [{**harness, "shots": 0}]}}
    assert found[1].name == "arc_easy" != found[1].digest != inputs_of(fewer)[0].digest


# --- the champion ------------------------------------------------------------------------------


def won(results: Path, records: Records, weights: bytes) -> Path:
    """A sweep that has run: best.json and best/."""
    folder = results / "depth_ablation" / "made_up"
    ranking = rank(records)
    chosen = winner(ranking)
    assert ranking is not None and chosen is not None
    (folder / "best").mkdir(parents=True, exist_ok=True)
    best = json.dumps(report.best_of(records, ranking, chosen))
    (folder / "best.json").write_text(best)
    (folder / "best" / "config.json").write_text("{}")
    (folder / "best" / "model.safetensors").write_bytes(weights)
    return folder / "best"


def without(records: Records, trial_id: str) -> Records:
    trials = tuple(trial for trial in records.trials if trial.trial_id != trial_id)
    items = tuple(item for item in records.items if item.trial_id != trial_id)
    return replace(records, trials=trials, items=items)


def test_the_winner_is_the_champion_and_a_new_winner_takes_its_place(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.artifacts import download_artifacts

    best = won(results, RECORDS, b"perplexity")
    for _ in range(2):  # the same winner again is no new version
        assert show(RECORDS, results).problem is None
        client = client_of(results)
        (version,) = client.search_model_versions(f"name = '{NAME}'")
        champion = client.get_model_version_by_alias(NAME, registry.CHAMPION)
        assert champion.version == version.version
    assert Path(url2pathname(champion.source.removeprefix("file://"))) == best
    assert champion.run_id == children(results)["perplexity-0"].info.run_id
    told = json.loads((best.parent / "best.json").read_text())
    assert champion.tags[runs.TRIAL_TAG] == "perplexity-0"
    assert champion.tags["select.metric"] == "accuracy.mean"
    assert float(champion.tags["select.value"]) == told["select"]["value"]
    interval = [told["select"]["low"], told["select"]["high"]]
    assert json.loads(champion.tags["select.interval"]) == interval
    assert champion.tags["report.metric"] == "accuracy_report.mean"

    before = sorted(best.iterdir())
    uri = tracking.tracking_uri(results)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert Path(download_artifacts(f"models:/{NAME}@champion")) == best
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert sorted(best.iterdir()) == before

    fewer = without(RECORDS, "perplexity-0")
    won(results, fewer, b"task")
    show(fewer, results)
    champion = client.get_model_version_by_alias(NAME, registry.CHAMPION)
    assert (str(champion.version), champion.tags[runs.TRIAL_TAG]) == ("2", "task-0")
    replaced = client.get_model_version(NAME, "1")
    assert replaced.tags[registry.REPLACED_TAG] == "2"
    assert replaced.tags[runs.TRIAL_TAG] == "perplexity-0"


def test_a_champion_that_a_kill_left_half_registered_is_completed(results: Path) -> None:
    best = won(results, RECORDS, b"perplexity")
    best.rename(best.with_name("elsewhere"))
    show(RECORDS, results)
    best.with_name("elsewhere").rename(best)
    client = client_of(results)
    client.create_registered_model(NAME)
    run_id = children(results)["perplexity-0"].info.run_id
    tags = {runs.TRIAL_TAG: "perplexity-0"}
    client.create_model_version(NAME, best.resolve().as_uri(), run_id, tags)
    show(RECORDS, results)
    champion = client.get_model_version_by_alias(NAME, registry.CHAMPION)
    assert str(champion.version) == "1"
    assert champion.tags["seed"] == "0"


def test_the_champion_follows_its_run_when_that_is_replaced(results: Path) -> None:
    won(results, RECORDS, b"perplexity")
    show(RECORDS, results)
    grown = with_axis(RECORDS, "chain.criterion", "task")  # no short name stays as it was
    for _ in range(2):
        show(grown, results)
        client = client_of(results)
        champion = client.get_model_version_by_alias(NAME, registry.CHAMPION)
        assert str(champion.version) == "2"
        assert champion.run_id == children(results)["perplexity-0"].info.run_id
    assert client.get_run(champion.run_id).info.lifecycle_stage == "active"
    assert client.get_model_version(NAME, "1").tags[registry.REPLACED_TAG] == "2"


def aliases(results: Path) -> dict[str, str]:
    (model,) = client_of(results).search_registered_models(filter_string=f"name = '{NAME}'")
    return {alias: str(version) for alias, version in model.aliases.items()}


def parent_tags(results: Path) -> Mapping[str, str]:
    run_id = next(iter(children(results).values())).data.tags["mlflow.parentRunId"]
    tags: Mapping[str, str] = client_of(results).get_run(run_id).data.tags
    return tags


@pytest.mark.parametrize("lost", [("best",), ("best.json", "best"), ("best.json",)])
def test_a_champion_that_is_gone_or_has_not_won_is_champion_no_longer(
    lost: tuple[str, ...], results: Path
) -> None:
    folder = won(results, RECORDS, b"perplexity").parent
    show(RECORDS, results)
    assert aliases(results) == {registry.CHAMPION: "1"}
    for name in lost:
        (folder / name).rename(results / name)
    for _ in range(2):
        assert show(RECORDS, results).problem is None
        assert aliases(results) == {}
        assert (runs.WINNER_TAG in parent_tags(results)) == ("best.json" not in lost)
    for name in lost:
        (results / name).rename(folder / name)
    show(RECORDS, results)
    assert aliases(results) == {registry.CHAMPION: "1"}
    assert parent_tags(results)[runs.WINNER_TAG] == "perplexity-0"


def test_results_without_a_checkpoint_leave_the_champion_of_other_results_alone(
    results: Path,
) -> None:
    won(results, RECORDS, b"perplexity")
    show(RECORDS, results)
    published = results / "published" / "depth_ablation" / "made_up"
    uri, artifacts = tracking.tracking_uri(results), tracking.artifact_location(results)
    assert tracking.mirror(RECORDS, published, uri, artifacts, "").problem is None
    assert aliases(results) == {registry.CHAMPION: "1"}


@pytest.mark.parametrize("lacking", ["best", "best.json"])
def test_without_winner_or_checkpoint_nothing_is_registered(lacking: str, results: Path) -> None:
    best = won(results, RECORDS, b"perplexity")
    if lacking == "best":
        shutil.rmtree(best)
    else:
        (best.parent / lacking).unlink()
    assert show(RECORDS, results).problem is None
    assert client_of(results).search_registered_models() == []


def test_a_checkpoint_of_another_trial_is_not_registered_as_the_winners(results: Path) -> None:
    best = won(results, RECORDS, b"an earlier winner")
    (best.parent / "best.trial").write_text("task-0\n")
    show(RECORDS, results)
    assert client_of(results).search_registered_models() == []
    (best.parent / "best.trial").write_text("perplexity-0\n")
    show(RECORDS, results)
    assert len(client_of(results).search_registered_models()) == 1


@pytest.mark.parametrize(
    ("uri", "takes"),
    [
        ("sqlite:////results/mlflow.db", True),
        ("postgresql+psycopg2://me:secret@host/runs", True),
        ("http://127.0.0.1:5000", False),
        ("databricks", False),
    ],
)
def test_only_a_database_points_to_folders_of_this_machine(uri: str, takes: bool) -> None:
    assert registry.takes_folders(uri) is takes


def test_curves_are_shown_whole_but_for_the_learning_rate_which_the_settings_tell() -> None:
    curves = [
        CurvePoint("t", step, step, step, name, 1.0 / step)
        for step in range(1, 121)
        for name in ("loss", "kd_loss", "learning_rate")
    ]
    shown = runs.points_of(curves)
    for name, steps in (("loss", range(1, 121)), ("learning_rate", range(10, 121, 10))):
        assert [point.step for point in shown if point.name == name] == [*steps]
    assert [point for point in shown if point.name == "kd_loss"] == [
        point for point in curves if point.name == "kd_loss"
    ]
    assert [p.step for p in runs.points_of(curves[: 3 * 7]) if p.name == "learning_rate"] == [7]
