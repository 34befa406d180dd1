"""Tasks as lm-evaluation-harness describes them: groups, several filters, metrics of all kinds.

The descriptions are local ones in the manner of mmlu, gsm8k, truthfulqa_mc2, lambada and wikitext.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from datasets import Dataset, DatasetDict
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel

from trainers import checkpoints, language, questions
from trainers.config import HarnessTask
from trainers.contract import StageError

TOKENIZER = language.tokenizer()
QUESTIONS = 12
ROWS = language.questions(3, "knowledge", QUESTIONS + 4)
JUDGE = """
import math
import random

def shuffled(docs):
    def one(doc):
        order = random.sample(range(len(doc["choices"])), len(doc["choices"]))
        choices = [doc["choices"][place] for place in order]
        return doc | {"choices": choices, "gold": order.index(doc["gold"])}
    return docs.map(one, load_from_cache_file=False)

def of_all(items):
    return len(items)

def process_results(doc, results):
    masses = [math.exp(value) for value, _ in results]
    true = [mass for mass, label in zip(masses, doc["labels"]) if label]
    return {"acc": sum(true) / sum(masses)}

def detokenized(doc):
    return doc["query"]
"""

Describe = Callable[..., None]


@pytest.fixture
def describe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Describe]:
    """Writes a description of a task over local questions, for the harness to find."""
    (tmp_path / "judge.py").write_text(JUDGE)

    def write(name: str, rows: list[dict[str, Any]] | None = None, **description: Any) -> None:
        if rows is not None:
            data = tmp_path / f"{name}.jsonl"
            data.write_text("".join(json.dumps(row) + "\n" for row in rows))
            examples = tmp_path / f"{name}_examples.jsonl"
            examples.write_text("".join(json.dumps(row) + "\n" for row in rows[QUESTIONS:]))
            files = {"test": str(data), "dev": str(examples)}
            description = {
                "task": name,
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": files},
                "test_split": "test",
                "fewshot_split": "dev",
                "doc_to_text": "{{query}}",
                **description,
            }
        text = yaml.safe_dump(description).replace("'!function", "!function")
        text = "\n".join(
            line.rstrip("'") if "!function" in line else line for line in text.split("\n")
        )
        (tmp_path / f"{name}.yaml").write_text(text)

    def manager(_include_defaults: bool) -> TaskManager:
        return TaskManager(include_path=str(tmp_path), include_defaults=False)

    monkeypatch.setattr(questions, "_task_manager", manager)
    questions.harness_task.cache_clear()
    yield write
    questions.harness_task.cache_clear()


def metrics(*names: str, higher: bool = True) -> list[dict[str, Any]]:
    return [{"metric": n, "aggregation": "mean", "higher_is_better": higher} for n in names]


def choices(**more: Any) -> dict[str, Any]:
    return {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": metrics("acc", "acc_norm"),
    } | more


def harness_results(model: PreTrainedModel, tmp_path: Path, name: str, **how: Any) -> Any:
    scorer = HFLM(pretrained=model, tokenizer=TOKENIZER, batch_size=5, device="cpu")
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    return simple_evaluate(
        scorer,
        tasks=[name],
        task_manager=manager,
        bootstrap_iters=0,
        fewshot_random_seed=1234,
        **how,
    )


def mean(answers: list[questions.Answer]) -> float:
    return sum(answer.correct for answer in answers) / len(answers)


def test_a_group_is_asked_whole_with_its_shots(
    describe: Describe, model: PreTrainedModel, tmp_path: Path
) -> None:
    sampled = {"fewshot_config": {"sampler": "first_n"}}
    describe("little_law", ROWS, **choices(**sampled))
    describe("little_anatomy", ROWS, **choices(**sampled, doc_to_text="now {{query}}"))
    pooled = [{"metric": "acc", "weight_by_size": True}]
    describe(
        "little",
        group="little",
        task=["little_law", "little_anatomy"],
        aggregate_metric_list=pooled,
    )
    task = HarnessTask(name="little", shots=3)
    assert questions.missing([task]) == []
    answers = questions.ask(model, TOKENIZER, [task])
    theirs = harness_results(model, tmp_path, "little", num_fewshot=3)
    assert len(answers) == 2 * len(ROWS)
    assert {answer.task for answer in answers} == {"little"}
    assert mean(answers) == pytest.approx(theirs["results"]["little"]["acc,none"])
    # The two tasks hold the same questions here, which stay two and on one side of the split.
    assert len({answer.item_id for answer in answers}) == len(answers)
    sides = {answer.item_id[-16:]: answer.split for answer in answers}
    assert all(sides[answer.item_id[-16:]] == answer.split for answer in answers)
    few = questions.ask(model, TOKENIZER, [HarnessTask(name="little", shots=3, limit=4)])
    assert len(few) == 8


@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_a_metric_is_the_one_asked_for(
    describe: Describe, model: PreTrainedModel, tmp_path: Path, metric: str
) -> None:
    rows = [
        row
        | {
            "choices": [
                f"{choice} {'the dog ' * place}" for place, choice in enumerate(row["choices"])
            ]
        }
        for row in ROWS
    ]
    describe("longer", rows, **choices())
    answers = questions.ask(model, TOKENIZER, [HarnessTask(name="longer", shots=0, metric=metric)])
    theirs = harness_results(model, tmp_path, "longer")
    assert mean(answers) == pytest.approx(theirs["results"]["longer"][f"{metric},none"])
    if metric == "acc":
        assert all((answer.score > 0) == bool(answer.correct) for answer in answers)  # type: ignore[operator]


def test_a_generated_answer_is_read_by_the_first_filter_or_the_one_named(
    describe: Describe, model: PreTrainedModel, tmp_path: Path
) -> None:
    def written(rows: list[dict[str, Any]]) -> None:
        def read(place: int, name: str) -> dict[str, Any]:
            regex = {"function": "regex", "regex_pattern": r"([a-z]+)", "group_select": place}
            return {"name": name, "filter": [regex, {"function": "take_first"}]}

        describe(
            "sums",
            rows,
            output_type="generate_until",
            doc_to_target="{{answer}}",
            generation_kwargs={"until": ["?"], "max_gen_toks": 6, "do_sample": False},
            metric_list=metrics("exact_match"),
            filter_list=[read(0, "strict-match"), read(-1, "flexible-extract")],
        )

    written([row | {"answer": "nothing"} for row in ROWS])
    said = harness_results(model, tmp_path, "sums", num_fewshot=2)["samples"]["sums"]
    first = {
        s["doc"]["query"]: s["filtered_resps"][0] for s in said if s["filter"] == "strict-match"
    }
    written([row | {"answer": first[row["query"]]} for row in ROWS])
    for name in (None, "strict-match", "flexible-extract"):
        task = HarnessTask(name="sums", shots=0, metric="exact_match", filter=name)
        questions.harness_task.cache_clear()
        assert questions.missing([task]) == []
        answers = questions.ask(model, TOKENIZER, [task])
        theirs = harness_results(model, tmp_path, "sums")
        assert len(answers) == len(ROWS)
        key = f"exact_match,{name or 'strict-match'}"
        assert mean(answers) == pytest.approx(theirs["results"]["sums"][key])
        assert all(answer.score is None for answer in answers)


def test_a_task_may_judge_in_a_way_of_its_own(
    describe: Describe, model: PreTrainedModel, tmp_path: Path
) -> None:
    rows = [row | {"labels": [1, 1, *[0] * (len(row["choices"]) - 2)]} for row in ROWS]
    own = {"process_results": "!function judge.process_results", "metric_list": metrics("acc")}
    describe("truths", rows, **choices(doc_to_target=0, **own))
    answers = questions.ask(model, TOKENIZER, [HarnessTask(name="truths", shots=0)])
    theirs = harness_results(model, tmp_path, "truths")
    assert mean(answers) == pytest.approx(theirs["results"]["truths"]["acc,none"], abs=1e-4)
    assert 0 < answers[0].correct < 1
    assert answers[0].score is None


def test_the_next_word_is_right_where_the_model_would_say_it(
    describe: Describe, model: PreTrainedModel, tmp_path: Path
) -> None:
    describe(
        "words",
        ROWS,
        output_type="loglikelihood",
        doc_to_target=" {{choices[gold]}}",
        metric_list=[
            *metrics("acc"),
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        ],
    )
    task = HarnessTask(name="words", shots=0)
    theirs = harness_results(model, tmp_path, "words")["results"]["words"]
    assert mean(questions.ask(model, TOKENIZER, [task])) == pytest.approx(theirs["acc,none"])
    assert questions.better_when_lower([task]) == []


def test_a_perplexity_is_told_and_kept_out_of_the_mean(
    describe: Describe, model: PreTrainedModel, tmp_path: Path
) -> None:
    describe(
        "texts",
        ROWS,
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="!function judge.detokenized",
        metric_list=[{"metric": "bits_per_byte"}],
    )
    describe("chosen", ROWS, **choices())
    task = HarnessTask(name="texts", metric="bits_per_byte", shots=0)
    tasks = [task, HarnessTask(name="chosen", shots=0)]
    answers = questions.ask(model, TOKENIZER, tasks)
    theirs = harness_results(model, tmp_path, "texts")["samples"]["texts"]
    expected = [
        -value / length / 0.6931471805599453
        for value, length in (s["bits_per_byte"] for s in theirs)
    ]
    mine = [answer.correct for answer in answers if answer.task == "texts"]
    assert mine == pytest.approx(expected, abs=1e-4)
    assert questions.better_when_lower(tasks) == ["texts"]
    found = questions.accuracies(answers, "select", questions.better_when_lower(tasks))
    assert found.keys() == {"texts", "chosen", "mean"}
    assert found["mean"] == found["chosen"]
    with pytest.raises(StageError, match="less is better for texts"):
        questions.ask_without(model, TOKENIZER, tasks, [(1, 1)])


def test_a_task_that_shuffles_its_choices_is_the_same_every_time(
    model: PreTrainedModel, describe: Describe
) -> None:
    describe("mixed", ROWS, **choices(process_docs="!function judge.shuffled"))
    found = []
    for seed in (1, 2):
        random.seed(seed)
        expected = random.Random(seed).random()
        questions.harness_task.cache_clear()
        found.append(questions.ask(model, TOKENIZER, [HarnessTask(name="mixed", shots=0)]))
        assert random.random() == expected, "what others draw is left alone"
    assert found[0] == found[1]


# --- what cannot be had ----------------------------------------------------------------------


def test_what_cannot_be_asked_is_told_before_anything_starts(
    describe: Describe, tmp_path: Path
) -> None:
    describe("chosen", ROWS, **choices())
    describe("elsewhere", ROWS, **choices(dataset_path="nobody/nothing", dataset_kwargs={}))
    describe("pictures", ROWS, **choices(doc_to_image="choices"))
    describe("programs", ROWS, **choices(unsafe_code=True))
    describe("misspelt", ROWS, **choices(doc_to_text="{{qwery}}"))
    describe("locked", ROWS, **choices(num_fewshot=0))
    whole = {"metric": "mcc", "aggregation": "matthews_corrcoef", "higher_is_better": True}
    own = whole | {"metric": "acc_norm", "aggregation": "!function judge.of_all"}
    describe("whole", ROWS, **choices(metric_list=[*metrics("acc"), whole, own]))
    told = {
        HarnessTask(name="chosen", shots=1): None,
        HarnessTask(name="chosin", shots=1): "has no task chosin; nearest: chosen",
        HarnessTask(name="elsewhere", shots=0): "cannot get the questions of task elsewhere: ",
        HarnessTask(
            name="chosen", shots=0, metric="exact"
        ): "no metric exact; it has acc, acc_norm",
        HarnessTask(name="chosen", shots=0, filter="strict"): "no filter strict; it has none",
        HarnessTask(name="chosen", shots=99): "cannot ask task chosen: ",
        HarnessTask(name="pictures", shots=0): "shows pictures or sound",
        HarnessTask(name="programs", shots=0): "runs code that the model wrote",
        HarnessTask(name="misspelt", shots=0): "qwery",
        HarnessTask(name="locked", shots=0): None,
        HarnessTask(name="locked", shots=2): "defined with 0 shots: 2 cannot be had",
        HarnessTask(name="whole", shots=0): None,
        HarnessTask(
            name="whole", shots=0, metric="mcc"
        ): "mcc is of all questions at once, and none of its halves has one; metrics of single "
        "questions: acc",
        HarnessTask(name="whole", shots=0, metric="acc_norm"): "acc_norm is of all questions",
    }
    expected = [message for message in told.values() if message]
    for message, part in zip(questions.missing(told), expected, strict=True):
        assert part in message
        assert "\n" not in message


def test_a_check_from_a_shell_says_what_is_missing_with_status_2(
    describe: Describe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    describe("chosen", ROWS, **choices())
    asked = tmp_path / "asked.json"
    task = {"kind": "harness", "name": "chosen", "shots": 0}
    for tasks, status, said in (
        ([task], 0, ""),
        ([task, task | {"metric": "f1"}], 2, "task chosen has no metric f1"),
        ([{"kind": "harness"}], 2, "name"),
    ):
        asked.write_text(json.dumps(tasks))
        assert questions.main(["--check", str(asked)]) == status
        assert said in capsys.readouterr().out


# --- the harness' own descriptions -----------------------------------------------------------


def _fact(number: int) -> dict[str, Any]:
    """A row that has the fields of mmlu, gsm8k and truthfulqa at once."""
    truths = {"choices": ["the dog sings .", "the cat sleeps .", "sings"], "labels": [1, 1, 0]}
    return {
        "question": f"{ROWS[number]['query']} ?",
        "choices": ["dog", "cat", "dogs", "cats"],
        "answer": number % 4,
        "mc1_targets": truths,
        "mc2_targets": truths,
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "count"),
    [
        (HarnessTask(name="mmlu_stem", shots=5, limit=2), 2 * 19),
        (HarnessTask(name="gsm8k", shots=5, metric="exact_match", filter="flexible-extract"), 6),
        (HarnessTask(name="truthfulqa_mc2", shots=0), 6),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_descriptions_that_ship_with_the_harness_are_asked_with_explicit_shots(
    monkeypatch: pytest.MonkeyPatch, tiny_config: dict[str, Any], task: HarnessTask, count: int
) -> None:
    # Their questions are on the hub; rows of the same form stand in for them.
    def rows(path: str, **_: Any) -> DatasetDict:
        facts = [_fact(number) for number in range(6)]
        if path == "openai/gsm8k":
            facts = [{"question": f["question"], "answer": f"#### {f['answer']}"} for f in facts]
        split = Dataset.from_list(facts)
        return DatasetDict(dict.fromkeys(("train", "dev", "validation", "test"), split))

    monkeypatch.setattr(datasets, "load_dataset", rows)
    questions.harness_task.cache_clear()
    model = checkpoints.new_model(tiny_config | {"max_position_embeddings": 512}, seed=1).eval()
    assert questions.missing([task]) == []
    answers = questions.ask(model, TOKENIZER, [task])
    assert len(answers) == len({answer.item_id for answer in answers}) == count
    assert all(0 <= answer.correct <= 1 for answer in answers)
    questions.harness_task.cache_clear()
