"""Questions: the harness' own answers, in less time, and a fair split of them."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import MakeContext, SaveArtifact
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel

from trainers import ablation, checkpoints, language, prune, questions
from trainers.config import (
    ByList,
    ChoicesTask,
    DepthCut,
    GeneratedTask,
    PartialTask,
    PruneConfig,
    Task,
)
from trainers.language import ABILITIES
from trainers.scorer import Scorer

TOKENIZER = language.tokenizer()
QUESTIONS = 24


@pytest.fixture(scope="module")
def choices_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Choices of one to three words; some differ in their last word alone, some in their first."""
    rows = [
        {
            "query": row["query"],
            "choices": [" ".join([*extra, choice]) for choice in row["choices"] for extra in tails],
            "gold": row["gold"],
        }
        for number, row in enumerate(language.questions(1, "knowledge", QUESTIONS))
        for tails in [[["the"]] if number % 2 else [[], ["the", "dog"]]]
    ]
    return written(tmp_path_factory.mktemp("choices") / "choices.jsonl", rows)


@pytest.fixture(scope="module")
def partial_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        {
            "context_options": [f"{row['query']} {choice}" for choice in row["choices"]],
            "continuation": "was blamed today ." if number % 2 else "slept",
            "gold": row["gold"],
        }
        for number, row in enumerate(language.questions(1, "reference", QUESTIONS))
    ]
    return written(tmp_path_factory.mktemp("partial") / "partial.jsonl", rows)


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(params=[*ABILITIES, "choices", "choices_norm", "partial", "shots", "partial_shots"])
def task(request: pytest.FixtureRequest, choices_file: Path, partial_file: Path) -> Task:
    match request.param:
        case "choices":
            return ChoicesTask(name="choices", path=choices_file, prompt="the cat . {{query}}")
        case "choices_norm":
            return ChoicesTask(name="choices", path=choices_file, metric="acc_norm")
        case "partial":
            return PartialTask(name="partial", path=partial_file)
        case "shots":
            return ChoicesTask(name="choices", path=choices_file, shots=2, limit=9)
        case "partial_shots":
            return PartialTask(name="partial", path=partial_file, shots=1, limit=9)
        case ability:
            return GeneratedTask(name=ability, limit=QUESTIONS)


def harness(model: PreTrainedModel, batch_size: int = 5) -> HFLM:
    return HFLM(pretrained=model, tokenizer=TOKENIZER, batch_size=batch_size, device="cpu")


# --- the same answers ------------------------------------------------------------------------


def test_every_answer_equals_the_harness_own(model: PreTrainedModel, task: Task) -> None:
    metric = getattr(task, "metric", "acc")
    theirs = questions.samples_of(harness(model), task)
    ours = questions.samples_of(Scorer(model, TOKENIZER), task)
    answers = questions.ask(model, TOKENIZER, [task])
    assert len(answers) == len(ours) == len(theirs) == (task.limit or QUESTIONS)
    for answer, mine, other in zip(answers, ours, theirs, strict=True):
        assert mine["arguments"] == other["arguments"]
        for (value, greedy), (expected, expected_greedy) in zip(
            mine["filtered_resps"], other["filtered_resps"], strict=True
        ):
            assert value == pytest.approx(expected, abs=1e-4)
            assert greedy == expected_greedy
        assert answer.correct == mine[metric] == other[metric]
        gold = other["doc"]["gold"]
        values = [value for value, _ in other["filtered_resps"]]
        best_other = max(value for place, value in enumerate(values) if place != gold)
        assert answer.score == pytest.approx(values[gold] - best_other, abs=1e-4)


def test_accuracies_equal_the_harness_own_on_task_files(
    tmp_path: Path, model: PreTrainedModel
) -> None:
    names = language.write_tasks(tmp_path, limit=QUESTIONS)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    theirs = simple_evaluate(harness(model), tasks=names, task_manager=manager, bootstrap_iters=0)
    answers = questions.ask(
        model, TOKENIZER, [GeneratedTask(name=name, limit=QUESTIONS) for name in ABILITIES]
    )
    for ability in ABILITIES:
        correct = [answer.correct for answer in answers if answer.task == ability]
        found = theirs["results"][f"tiny_{ability}"]["acc,none"]
        assert sum(correct) / len(correct) == pytest.approx(found)


def test_a_model_without_some_layers_answers_as_its_pruned_checkpoint_does(
    model: PreTrainedModel, save_artifact: SaveArtifact, make_context: MakeContext
) -> None:
    cut = PruneConfig(depth=DepthCut(num_hidden_layers=2, choice=ByList(drop=(1, 2))))
    context = make_context(cut, model=save_artifact(model))
    prune.run(context)
    tasks = [GeneratedTask(name="agreement", limit=QUESTIONS)]
    with ablation.left_out(model, 1, 2):
        found = questions.ask(model, TOKENIZER, tasks)
    expected = questions.ask(checkpoints.load_model(context.out / "model"), TOKENIZER, tasks)
    assert [a.item_id for a in found] == [a.item_id for a in expected]
    assert [a.score for a in found] == pytest.approx([a.score for a in expected], abs=1e-5)


def test_long_contexts_are_cut_on_the_left_as_the_harness_does(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    # Longer than max_position_embeddings, 128; each question of another length.
    rows = [
        {"query": "the dog " * (62 + number), "choices": ["sings .", "sing today"], "gold": 1}
        for number in range(6)
    ]
    task = ChoicesTask(name="long", path=written(tmp_path / "long.jsonl", rows))
    ours, theirs = (
        [
            value
            for sample in questions.samples_of(scorer, task)
            for value, _ in sample["filtered_resps"]
        ]
        for scorer in (Scorer(model, TOKENIZER), harness(model))
    )
    assert ours == pytest.approx(theirs, abs=1e-4)


# --- which questions -------------------------------------------------------------------------


def test_questions_have_ids_of_their_own_whoever_answers(
    model: PreTrainedModel, tiny_config: dict[str, Any]
) -> None:
    tasks = [GeneratedTask(name=name, limit=QUESTIONS) for name in ABILITIES]
    ids = [answer.item_id for answer in questions.ask(model, TOKENIZER, tasks)]
    assert len(set(ids)) == len(ids) == 3 * QUESTIONS
    other = checkpoints.new_model(tiny_config, seed=9).eval()
    assert [answer.item_id for answer in questions.ask(other, TOKENIZER, tasks)] == ids


def test_generated_questions_are_in_memory_and_leave_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, scratch = tmp_path / "cache", tmp_path / "scratch"
    cache.mkdir()
    scratch.mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    questions.harness_task.cache_clear()
    loaded = questions.harness_task(GeneratedTask(name="knowledge", limit=QUESTIONS))
    assert set(tmp_path.rglob("*")) == {cache, scratch}
    docs = [doc for each in loaded["tasks"].values() for doc in each.eval_docs]
    assert docs == list(language.questions(0, "knowledge", QUESTIONS))


def test_a_limit_asks_the_first_questions(model: PreTrainedModel, choices_file: Path) -> None:
    def ids(limit: int | None) -> list[str]:
        task = ChoicesTask(name="choices", path=choices_file, limit=limit)
        return [answer.item_id for answer in questions.ask(model, TOKENIZER, [task])]

    assert len(ids(None)) == QUESTIONS
    assert ids(7) == ids(None)[:7]


def test_an_id_depends_on_the_question_and_not_on_its_place(
    model: PreTrainedModel, choices_file: Path, tmp_path: Path
) -> None:
    lines = choices_file.read_text().splitlines(True)
    turned = tmp_path / "turned.jsonl"
    turned.write_text("".join(reversed(lines)))
    found = [
        [answer.item_id for answer in questions.ask(model, TOKENIZER, [task])]
        for task in (
            ChoicesTask(name="choices", path=choices_file),
            ChoicesTask(name="choices", path=turned),
        )
    ]
    assert found[0] == found[1][::-1]


def test_shots_put_other_questions_and_their_answers_before_the_question(
    model: PreTrainedModel, choices_file: Path
) -> None:
    rows = [json.loads(line) for line in choices_file.read_text().splitlines()]
    scorer = Scorer(model, TOKENIZER)
    plain = questions.samples_of(scorer, ChoicesTask(name="choices", path=choices_file))
    shown = questions.samples_of(scorer, ChoicesTask(name="choices", path=choices_file, shots=2))
    for without, with_shots in zip(plain, shown, strict=True):
        prompt, longer = without["arguments"][0][0], with_shots["arguments"][0][0]
        assert longer.endswith(prompt)
        before = longer.removesuffix(prompt)
        told = [row for row in rows if f"{row['query']} {row['choices'][row['gold']]}" in before]
        assert len(told) == 2
        assert without["doc"] not in told


def test_halves_are_split_by_content_and_about_even() -> None:
    ids = [questions.hash_of(["a question", number])[:16] for number in range(2000)]
    count = Counter(map(questions.split_of, ids))
    assert count.keys() == {"select", "report"}
    assert 900 < count["select"] < 1100
    assert [questions.split_of(item_id) for item_id in ids] == [*map(questions.split_of, ids)]


def test_accuracies_are_means_of_each_task_then_of_the_tasks() -> None:
    def answers(task: str, split: Any, correct: list[float]) -> list[questions.Answer]:
        return [
            questions.Answer(task, str(n), split, value, None) for n, value in enumerate(correct)
        ]

    told = [
        *answers("long", "select", [1, 1, 1, 0]),
        *answers("short", "select", [0]),
        *answers("short", "report", [1]),
    ]
    assert questions.accuracies(told, "select") == {"long": 0.75, "short": 0.0, "mean": 0.375}
    assert questions.accuracies(told, "report") == {"short": 1.0, "mean": 1.0}
    assert questions.accuracies([], "select") == {}


def test_a_continuation_that_is_a_number_is_not_taken_for_the_right_answer(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    rows = [
        {"context_options": ["the dog", "the cats near"], "continuation": "7", "gold": gold}
        for gold in (0, 1)
    ]
    task = PartialTask(name="digits", path=written(tmp_path / "digits.jsonl", rows))
    first, second = questions.ask(model, TOKENIZER, [task])
    assert first.score == pytest.approx(-second.score)
    assert first.correct + second.correct == 1


def test_progress_counts_tasks(model: PreTrainedModel, choices_file: Path) -> None:
    heard: list[int] = []
    tasks = [
        ChoicesTask(name="choices", path=choices_file, limit=2),
        GeneratedTask(name="agreement", limit=2),
    ]
    questions.ask(model, TOKENIZER, tasks, heard.append)
    assert heard == [1, 2]
