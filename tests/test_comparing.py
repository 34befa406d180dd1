"""`orchestrate compare`: two trials or two sweeps, found by whatever names them, side by side."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import made_up
import pytest
import yaml
from click.testing import CliRunner, Result

from orchestrator.cli import app
from orchestrator.comparing import CannotCompareError, Sweeps, Trials, compare, find
from orchestrator.inference import mcnemar
from orchestrator.records import ItemRecord, Records, TrialRecord, write_parquet

RECORDS = made_up.records(questions=20)
CLAIM = {
    "text": "Perplexity is better than chance",
    "practice": 2,
    "better": {"prune.depth.criterion": "perplexity"},
    "than": {"baseline": "random_layers"},
    "metric": "lm_loss.after",
}
ASKED = {"select": {"metric": "accuracy.mean", "mode": "max"}, "claims": [CLAIM]}


def recorded(folder: Path, records: Records = RECORDS, asked: Any = ASKED) -> Path:
    """A results folder as a sweep leaves it; gives the folder."""
    write_parquet(records, folder)
    (folder / "sweep.yaml").write_text(yaml.safe_dump({"name": folder.parent.name, **asked}))
    return folder


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """`depth_ablation` at two profiles, and published once more."""
    for place in ("depth_ablation/tiny", "depth_ablation/large", "published/depth_ablation/tiny"):
        recorded(tmp_path / place)
    other = [replace(trial, trial_id=f"published-{trial.trial_id}") for trial in RECORDS.trials]
    recorded(tmp_path / "published/width/tiny", replace(RECORDS, trials=tuple(other), items=()))
    return tmp_path


def trials(results: Path, first: str, second: str) -> Trials:
    found = compare(results, first, second)
    assert isinstance(found, Trials)
    return found


def sweeps(results: Path, first: str, second: str) -> Sweeps:
    found = compare(results, first, second)
    assert isinstance(found, Sweeps)
    return found


# --- what is meant ---


@pytest.mark.parametrize(
    ("wanted", "place", "trial"),
    [
        ("perplexity-0", "depth_ablation/tiny", "perplexity-0"),
        ("published-perplexity-1", "published/width/tiny", "published-perplexity-1"),
        ("random_layers-1", "depth_ablation/tiny", "random_layers-1"),
        ("published-te", "published/width/tiny", "published-teacher-0"),
        ("width", "published/width/tiny", None),
        ("width@tiny", "published/width/tiny", None),
        ("depth_ablation@tiny", "depth_ablation/tiny", None),
        ("depth_ablation@large", "depth_ablation/large", None),
    ],
)
def test_a_trial_is_found_by_how_its_id_begins_and_a_sweep_by_its_name(
    results: Path, wanted: str, place: str, trial: str | None
) -> None:
    found = find(results, wanted)
    assert found.trial_id == trial
    if trial is None:
        assert found.folder == results / place
    else:
        assert found.folder.name in ("tiny", "large")
        assert "published" not in found.folder.parts or "published" in place


@pytest.mark.parametrize("below", [".", "depth_ablation/.."])
def test_a_trial_is_found_from_wherever_one_stands(
    results: Path, monkeypatch: pytest.MonkeyPatch, below: str
) -> None:
    monkeypatch.chdir(results)
    own, published = (find(Path(below), wanted) for wanted in ("task-0", "published-task-0"))
    assert own.folder.resolve().parent == results / "depth_ablation"
    assert published.folder.resolve() == results / "published/width/tiny"


def test_a_sweep_is_found_by_its_file_and_by_its_folder(results: Path, tmp_path: Path) -> None:
    file = tmp_path / "any.yaml"
    file.write_text("name: depth_ablation\nprofile: large\n")
    assert find(results, str(file)).folder == results / "depth_ablation/large"
    assert find(results, f"{file}@tiny").folder == results / "depth_ablation/tiny"
    published = results / "published/depth_ablation/tiny"
    assert find(results, str(published)).folder == published


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ("depth_ablation", "say which: depth_ablation@large, depth_ablation@tiny"),
        ("depth_ablation@huge", "not recorded at profile huge; there is depth_ablation@large"),
        ("perplexity", "begins 2 trials' ids: perplexity-0, perplexity-1"),
        ("perplexity-7", "nearest trials: perplexity-"),
        ("widht", "nearest sweeps: width@tiny"),
        ("nowhere.yaml", "nowhere.yaml"),
    ],
)
def test_what_cannot_be_found_is_told_with_what_is_near(
    results: Path, wanted: str, told: str
) -> None:
    with pytest.raises(CannotCompareError) as raised:
        find(results, wanted)
    assert told in str(raised.value)


def test_a_trial_and_a_sweep_are_not_compared(results: Path) -> None:
    with pytest.raises(CannotCompareError, match="task-0 is a trial and width a sweep"):
        compare(results, "width", "task-0")


# --- two trials ---


def test_only_settings_that_differ_are_listed(results: Path) -> None:
    found = trials(results, "perplexity-0", "task-1")
    assert {(s.key, s.first, s.second) for s in found.settings} == {
        ("prune.depth.criterion", "perplexity", "task"),
        ("seed", 0, 1),
    }
    whole = {s.key: s for s in trials(results, "teacher-0", "task-0").settings}
    assert whole["prune.depth.keep"].first is None
    assert whole["prune.depth.keep"].second == 0.5


def test_metrics_stand_side_by_side_and_a_missing_one_has_no_difference(results: Path) -> None:
    found = {m.name: m for m in trials(results, "teacher-0", "task-0").metrics}
    loss, before = found["lm_loss.after"], found["lm_loss.before"]
    assert loss.first == 1.9 and loss.second is not None
    assert loss.difference == pytest.approx(loss.second - 1.9)
    assert (before.first, before.difference) == (None, None)


def answered(trial_id: str, right: Sequence[int], task: str = "t") -> list[ItemRecord]:
    return [
        ItemRecord(trial_id, task, f"{task}{item:03d}", "select", float(each), None)
        for item, each in enumerate(right)
    ]


def two(tmp_path: Path, items: Sequence[ItemRecord]) -> Trials:
    mean = {"accuracy.mean": 0.5, "accuracy.t": 0.5}
    both = tuple(
        replace(made_up.trial("task", 0, 0, mean), trial_id=id_) for id_ in ("one", "other")
    )
    recorded(tmp_path / "s/p", Records("s", "p", trials=both, items=tuple(items)))
    return trials(tmp_path, "one", "other")


def test_on_the_questions_of_both_the_test_is_mcnemars(tmp_path: Path) -> None:
    one, other = [1] * 10 + [0] * 10, [0] * 1 + [1] * 18 + [0]
    (found,) = two(tmp_path, answered("one", one) + answered("other", other)).answers
    assert (found.questions, found.first_better, found.second_better) == (20, 1, 9)
    assert (found.first, found.second) == (0.5, 0.9)
    assert found.difference.value == pytest.approx(0.4)
    assert found.difference.low is not None and found.difference.low > 0
    assert found.p_value == mcnemar(1, 9)


def test_a_question_that_one_of_them_lacks_does_not_count(tmp_path: Path) -> None:
    items = answered("one", [1, 0, 1, 1]) + answered("other", [1, 0])
    (found,) = two(tmp_path, items).answers
    assert (found.questions, found.first, found.difference.value) == (2, 0.5, 0.0)


def test_means_over_different_tasks_have_no_difference(tmp_path: Path) -> None:
    found = two(tmp_path, answered("one", [1, 0], "t") + answered("other", [1, 0], "u"))
    assert found.answers == ()
    metrics = {m.name: m.difference for m in found.metrics}
    assert metrics["accuracy.mean"] == 0.0

    def renamed(trial: TrialRecord) -> TrialRecord:
        return replace(trial, metrics={"accuracy.mean": 0.5, "accuracy.u": 0.5})

    teacher, *_, last = RECORDS.trials
    assert last.status == "failed"
    records = replace(RECORDS, trials=(teacher, renamed(RECORDS.trials[1])), items=())
    recorded(tmp_path / "more/p", records)
    more = trials(tmp_path, "teacher-0", "perplexity-0")
    assert {m.name: m.difference for m in more.metrics}["accuracy.mean"] is None


def test_several_tasks_have_their_mean_on_each_half(results: Path) -> None:
    found = trials(results, "perplexity-0", "random_layers-0").answers
    assert [(each.half, each.task) for each in found] == [
        (half, task) for half in ("select", "report") for task in (*made_up.TASKS, "mean")
    ]
    mean = found[3]
    assert mean.questions == 60
    assert mean.difference.value == pytest.approx(
        sum(each.difference.value for each in found[:3]) / 3
    )


def test_a_task_that_is_better_when_lower_does_not_count_in_the_mean_of_both(
    tmp_path: Path,
) -> None:
    perplexity = answered("one", [30, 40], "w") + answered("other", [31, 39], "w")
    accuracies = answered("one", [1, 0], "t") + answered("other", [1, 0], "t")
    found = two(tmp_path, accuracies + perplexity).answers
    assert [each.task for each in found] == ["t", "w"], "a mean of one task is that task"
    more = answered("one", [1, 0], "u") + answered("other", [0, 1], "u")
    found = two(tmp_path, accuracies + more + perplexity).answers
    assert [each.task for each in found] == ["t", "u", "w", "mean"]
    assert (found[-1].questions, found[-1].first, found[-1].second) == (4, 0.5, 0.5)


def test_a_comparison_the_other_way_round_is_the_same_with_the_signs_turned(results: Path) -> None:
    there = trials(results, "perplexity-0", "task-0")
    back = trials(results, "task-0", "perplexity-0")
    for one, other in zip(there.answers, back.answers, strict=True):
        assert other.difference.value == pytest.approx(-one.difference.value)
        assert other.difference.low == pytest.approx(-(one.difference.high or 0))
        assert (other.p_value, other.first_better) == (one.p_value, one.second_better)


# --- two sweeps ---


def test_a_sweep_beside_itself_differs_in_nothing(results: Path) -> None:
    own, published = results / "depth_ablation/tiny", results / "published/depth_ablation/tiny"
    found = sweeps(results, str(own), str(published))
    assert found.settings == ()
    assert len(found.configurations) == 5  # the teacher, three criteria, random layers
    for each in found.configurations:
        assert each.first == each.second
        assert each.difference is not None and each.difference.value == 0.0
        assert each.p_value == 1.0
    assert found.winners is not None
    assert all(each.difference.value == 0.0 for each in found.winners.answers)


def test_claims_stand_by_their_text_with_both_verdicts(results: Path) -> None:
    other = {**CLAIM, "text": "Another one", "practice": None}
    recorded(results / "later/tiny", asked={**ASKED, "claims": [CLAIM, other]})
    both, only = sweeps(results, "depth_ablation@tiny", "later").claims
    assert (both.text, both.practice) == (CLAIM["text"], 2)
    assert both.first is not None and both.second is not None
    assert both.first.verdict == both.second.verdict
    assert (only.text, only.first) == ("Another one", None)


def test_a_configuration_that_became_worse_is_found(results: Path) -> None:
    worse = [replace(i, correct=0.0) if i.trial_id.startswith("task") else i for i in RECORDS.items]
    by_trial: dict[str, list[ItemRecord]] = {}
    for item in worse:
        by_trial.setdefault(item.trial_id, []).append(item)
    changed = [
        replace(t, metrics={**t.metrics, **made_up.accuracies(by_trial[t.trial_id])})
        if t.status == "completed"
        else t
        for t in RECORDS.trials
    ]
    recorded(results / "changed/tiny", replace(RECORDS, trials=tuple(changed), items=tuple(worse)))
    found = sweeps(results, "depth_ablation@tiny", "changed").configurations
    p_values = {each.label: each.p_value for each in found}
    p_values.pop("criterion=task")
    (task,) = (each for each in found if each.label == "criterion=task")
    assert task.second.value == 0.0
    assert task.difference is not None and task.difference.value == -task.first.value
    assert task.difference.high is not None and task.difference.high < 0
    # Two seeds are few, and five configurations many: the test is corrected for both.
    assert task.p_value is not None and task.p_value < 0.1
    assert all(p == 1.0 for p in p_values.values())


def one_trial(folder: Path, right: Sequence[int]) -> None:
    share = sum(right) / len(right)
    trial = made_up.trial("task", 0, 0, {"accuracy.mean": share, "accuracy.t": share})
    items = tuple(answered(trial.trial_id, right))
    recorded(folder, Records("s", "p", trials=(trial,), items=items))


def test_who_was_asked_more_questions_is_compared_on_those_of_both(tmp_path: Path) -> None:
    few = [1] * 60 + [0] * 40
    one_trial(tmp_path / "few/p", few)
    one_trial(tmp_path / "same/p", few + [1] * 300)
    one_trial(tmp_path / "better/p", [1] * 80 + [0] * 320)
    (same,) = sweeps(tmp_path, "few", "same").configurations
    assert (same.first.value, same.second.value) == (0.6, 0.9)
    assert same.difference is not None and same.p_value == 1.0
    assert (same.difference.value, same.difference.low, same.difference.high) == (0.0, 0.0, 0.0)
    (better,) = sweeps(tmp_path, "few", "better").configurations
    assert better.second.value < better.first.value
    assert better.difference is not None and better.difference.value == pytest.approx(0.2)
    assert better.difference.low is not None and better.difference.low > 0.1
    assert better.p_value == mcnemar(0, 20)


def test_settings_of_sweeps_are_all_values_that_their_trials_have(results: Path) -> None:
    fewer = tuple(t for t in RECORDS.trials if "task" not in t.trial_id and t.seed == 0)
    recorded(results / "fewer/tiny", replace(RECORDS, trials=fewer))
    found = {s.key: s for s in sweeps(results, "depth_ablation@tiny", "fewer").settings}
    assert found["seed"].first == [0, 1, 2] and found["seed"].second == 0
    criterion = found["prune.depth.criterion"]
    assert criterion.first == ["block_influence", "perplexity", "task"]
    assert criterion.second == ["block_influence", "perplexity"]


# --- the command ---


def run(results: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["compare", *words, "--results", str(results)])


def test_the_command_prints_tables(results: Path) -> None:
    done = run(results, "perplexity-0", "task-0")
    assert done.exit_code == 0, done.output
    for text in ("settings that differ", "prune.depth.criterion", "accuracy.mean", "McNemar"):
        assert text in done.output
    done = run(results, "depth_ablation@tiny", "depth_ablation@large")
    assert done.exit_code == 0, done.output
    for text in ("settings: the same", "winners", CLAIM["text"], "configurations that both have"):
        assert str(text)[:20] in done.output


@pytest.mark.parametrize(
    ("words", "kind"),
    [(("perplexity-0", "task-2"), "trials"), (("width", "depth_ablation@tiny"), "sweeps")],
)
def test_the_json_is_whole_and_strict(results: Path, words: Sequence[str], kind: str) -> None:
    done = run(results, *words, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.output, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["kind"] == kind
    assert found["first"]["profile"] == "made_up"


def test_what_cannot_be_compared_exits_with_2(results: Path) -> None:
    done = run(results, "perplexity-0", "nothing")
    assert done.exit_code == 2
    assert "nothing: no trial, sweep or results folder" in done.stderr
    (results / "width.yaml").write_text("a: [")
    assert run(results, str(results / "width.yaml"), "width").exit_code == 2


def test_a_damaged_file_is_told_and_exits_with_2(results: Path) -> None:
    (results / "depth_ablation/tiny/trials.parquet").write_bytes(b"PAR1 not PAR1")
    done = run(results, "depth_ablation@tiny", "width")
    assert done.exit_code == 2
    assert "trials.parquet cannot be read" in done.stderr


@pytest.mark.slow
def test_comparing_imports_neither_torch_nor_ray(results: Path) -> None:
    code = (
        "import sys\n"
        "from orchestrator.cli import app\n"
        f"app(['compare', 'task-0', 'task-1', '--results', {str(results)!r}],"
        " standalone_mode=False)\n"
        "heavy = {'torch', 'ray', 'mlflow', 'transformers', 'deepspeed'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
