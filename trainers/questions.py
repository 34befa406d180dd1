"""Downstream questions: lm-evaluation-harness asks, our checkpoints answer (`trainers.scorer`).

The harness loads the tasks, builds the prompts and computes the metrics. Our part is to judge
question by question, the split of the questions into a half to choose by and a half to report, and
to say beforehand which tasks cannot be had:

    python -m trainers.questions --check TASKS.json

reads a list of tasks as a sweep file has them and exits with 2 where one cannot be asked here.
"""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")

import numpy as np
import torch
from jinja2 import StrictUndefined
from jinja2.sandbox import SandboxedEnvironment
from lm_eval import utils as harness
from lm_eval.api import registry
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainers import language
from trainers.ablation import Block
from trainers.config import (
    ChoicesTask,
    GeneratedTask,
    HarnessTask,
    PartialTask,
    Task,
    hash_of,
)
from trainers.contract import StageError
from trainers.scorer import AblatedScorer, Scorer
from trainers.tasks import choices_task, partial_task

logging.getLogger("lm_eval").setLevel(logging.ERROR)

# A prompt is a template, which a sweep file may give. In the harness' own environment it could
# reach all of Python through the attributes of a string.
_sandbox = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
_sandbox.filters |= harness.env.filters
harness.env = _sandbox

FEWSHOT_SEED = 1234
BY_QUESTION = (
    "mean",
    "nanmean",
    "brier_score",
    "perplexity",
    "weighted_perplexity",
    "bits_per_byte",
)
"""The harness' ways to make one number of all answers that are, or have, one of each. Others, as
F1 or BLEU, say nothing of a single answer; of a perplexity, ours is the mean over documents."""
SEEDS = 0, 1234, 1234
"""Of Python, numpy and torch, as the harness' own command has them: some tasks shuffle choices."""


@dataclass(frozen=True)
class Answer:
    """One question answered. `correct`: the task's metric on this question, mostly 0 or 1. `score`:
    log-probability of the best right choice above the best wrong one."""

    task: str
    item_id: str
    split: Literal["select", "report"]
    correct: float
    score: float | None

    def row(self) -> dict[str, Any]:
        """As a line of items.jsonl."""
        return asdict(self)


def split_of(item_id: str) -> Literal["select", "report"]:
    """Half of all questions choose the winner, the other half report it: by hash of content."""
    return "select" if int(item_id[-1], 16) % 2 == 0 else "report"


def accuracies(
    answers: Sequence[Answer], split: str, apart: Collection[str] = ()
) -> dict[str, float]:
    """Accuracy of each task on one half, and their `mean`, in which every task counts the same but
    those `apart` do not count."""
    by_task: dict[str, list[float]] = {}
    for answer in answers:
        if answer.split == split:
            by_task.setdefault(answer.task, []).append(answer.correct)
    found = {task: sum(values) / len(values) for task, values in by_task.items()}
    counted = [value for task, value in found.items() if task not in apart]
    return found | ({"mean": sum(counted) / len(counted)} if counted else {})


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    progress: Callable[[int], None] = lambda done: None,
) -> list[Answer]:
    """Put every task's questions to the model. `progress` hears how many tasks are done."""
    scorer = Scorer(model, tokenizer)
    answers: list[Answer] = []
    for number, task in enumerate(tasks, 1):
        answers += _ask_one(scorer, task)
        progress(number)
    return answers


def ask_without(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    blocks: Sequence[Block],
    progress: Callable[[float], None] = lambda done: None,
) -> tuple[list[list[Answer]], list[int]]:
    """The answers of the intact model, then of the model without each block of layers in turn;
    and the length in tokens of every row that each of them scored.

    All of them score a task's requests together, on one pass of the layers before each block.
    `progress` hears which part of the work is done, from 0 to 1.
    """
    lower = better_when_lower(tasks)
    if lower:
        raise StageError(f"less is better for {', '.join(lower)}: no measure of layers by accuracy")
    scorer = AblatedScorer(model, tokenizer, blocks)
    answers: list[list[Answer]] = [[] for _ in range(1 + len(blocks))]
    for number, task in enumerate(tasks):
        scorer.progress = partial(_of_one_task, progress, number, len(tasks))
        for variant, found in enumerate(answers):
            scorer.variant = variant
            found += _ask_one(scorer, task)
    progress(1.0)
    return answers, scorer.lengths


def _of_one_task(progress: Callable[[float], None], number: int, tasks: int, part: float) -> None:
    progress((number + part) / tasks)


def samples_of(scorer: HFLM, task: Task) -> list[dict[str, Any]]:
    """The harness' own account of each question: its prompts, responses and metrics."""
    return [sample for _one, sample in _samples(scorer, task)]


def better_when_lower(tasks: Iterable[Task]) -> list[str]:
    """The names of the tasks whose metric is better when it is lower, as a perplexity is."""
    return [
        task.name
        for task in tasks
        if isinstance(task, HarnessTask)
        and any(
            each.higher_is_better().get(task.metric) is False
            for each in harness_task(task)["tasks"].values()
        )
    ]


def _ask_one(scorer: Scorer, task: Task) -> list[Answer]:
    seen = Counter[str]()
    return [_answer(task, one, sample, seen) for one, sample in _samples(scorer, task)]


@contextmanager
def _seeded() -> Iterator[None]:
    """While open, what is drawn at random is the same every time; afterwards as if nothing was."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    python, numpy, pytorch = SEEDS
    random.seed(python)
    np.random.seed(numpy)
    torch.default_generator.manual_seed(pytorch)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _samples(scorer: HFLM, task: Task) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Every question once, with the harness' task that it is of: a group has several."""
    loaded = harness_task(task)
    for each in loaded["tasks"].values():
        # Each question draws its examples from one generator: without a new start, a task asked
        # twice would show others the second time.
        each.set_fewshot_seed(seed=FEWSHOT_SEED)
    # `evaluate` and not `simple_evaluate`, which loads the data anew and inspects the machine each
    # time: ten times what the questions themselves cost a small model.
    with _seeded():
        results = evaluate(scorer, loaded, limit=task.limit, bootstrap_iters=0)
    for name, samples in results["samples"].items():
        each = loaded["tasks"][name]
        wanted = _filter(task, each)
        yield from ((each, sample) for sample in samples if sample["filter"] == wanted)


def _answer(task: Task, each: Any, sample: dict[str, Any], seen: Counter[str]) -> Answer:
    metric = _metric(task)
    if metric not in sample:
        raise StageError(
            f"task {task.name} has no metric {metric}; it has {', '.join(sample['metrics'])}"
        )
    value = sample[metric]
    if not isinstance(value, int | float):
        # What the harness makes one number of, here for one question: its words and log-likelihood.
        value = each.aggregation()[metric]([value])
    content = hash_of([task.name, json.loads(json.dumps(sample["doc"], default=str))])[:16]
    # A question that is in a data set twice is two questions, on the same side of the split.
    seen[content] += 1
    item_id = content if seen[content] == 1 else f"{seen[content]}-{content}"
    return Answer(task.name, item_id, split_of(item_id), float(value), _margin(each, sample))


def _margin(each: Any, sample: dict[str, Any]) -> float | None:
    """The best right choice's log-probability minus the best wrong one's; None where the task has
    no choices, or judges them in a way of its own."""
    own_way = callable(getattr(each.config, "process_results", None))
    if each.OUTPUT_TYPE != "multiple_choice" or own_way:
        return None
    doc = sample["doc"]
    choices = each.doc_to_choice(doc)
    contexts_differ = getattr(each, "multiple_input", 0)
    gold = each.doc_to_text(doc) if contexts_differ else each.doc_to_target(doc)
    right = {
        choices.index(place) if place in choices else place
        for place in (gold if isinstance(gold, list) else [gold])
    }
    # Behind the choices there may be others' likelihoods, which a metric sets them against.
    scores = [float(response[0]) for response in sample["filtered_resps"][: len(choices)]]
    told = [score for place, score in enumerate(scores) if place in right]
    others = [score for place, score in enumerate(scores) if place not in right]
    return max(told) - max(others) if told and others else None


# --- tasks -----------------------------------------------------------------------------------


@lru_cache(maxsize=32)
def harness_task(task: Task) -> Any:
    """The harness' task, with its questions in memory. Raises `StageError` where they are not to
    be had."""
    manager = _index(task)
    if isinstance(task, HarnessTask) and task.name not in manager.all_tasks:
        near = difflib.get_close_matches(task.name, manager.all_tasks, n=3, cutoff=0.0)
        raise StageError(
            f"lm-evaluation-harness has no task {task.name}; nearest: {', '.join(near)}"
        )
    try:
        with tempfile.TemporaryDirectory(prefix="questions-") as scratch, _seeded():
            found = manager.load([_prepared(task, Path(scratch))])
    except Exception as error:  # of the hub, of a file, of a package that the task's code wants
        raise StageError(
            f"cannot get the questions of task {task.name}: {_reason(error)}"
        ) from error
    for each in found["tasks"].values():
        if task.shots and each.get_config("num_fewshot") == 0:
            # The harness' own command leaves such a task at none, whatever is asked for.
            raise StageError(
                f"task {task.name} is defined with 0 shots: {task.shots} cannot be had"
            )
        each.set_config(key="num_fewshot", value=task.shots)
    return found


def _reason(error: BaseException) -> str:
    """The first line of what is at the bottom of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split("\n\n")[0].split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _prepared(task: Task, scratch: Path) -> str | dict[str, Any]:
    """The task as the harness takes it: a name it knows, or a whole description."""
    match task:
        case HarnessTask():
            return task.name
        case PartialTask():
            return partial_task(task.name, task.path)
        case ChoicesTask():
            return choices_task(task.name, task.path, task.prompt)
        case GeneratedTask():
            path = scratch / f"{task.name}.jsonl"
            rows = language.questions(task.language_seed, task.name, task.limit)
            language.write_questions(path, rows)
            description = choices_task(task.name, path, "{{query}}")
            # `datasets` knows what it cached by its path, and this one is never seen again.
            description["dataset_kwargs"] |= {"cache_dir": str(scratch), "keep_in_memory": True}
            return description


def _index(task: Task) -> TaskManager:
    """The harness' own index takes seconds to read, so it is read only where it is needed."""
    return _task_manager(isinstance(task, HarnessTask))


@lru_cache(maxsize=2)
def _task_manager(include_defaults: bool) -> TaskManager:
    return TaskManager(include_defaults=include_defaults)


def _metric(task: Task) -> str:
    return "acc" if isinstance(task, GeneratedTask | PartialTask) else task.metric


def _filter(task: Task, each: Any) -> str:
    """The name of the filter whose answers count: the one asked for, or the task's first."""
    names = [each_filter.name for each_filter in each._filters]
    wanted: str | None = task.filter if isinstance(task, HarnessTask) else None
    if wanted is not None and wanted not in names:
        raise StageError(f"task {task.name} has no filter {wanted}; it has {', '.join(names)}")
    return wanted or names[0]


# --- before anything starts ------------------------------------------------------------------


def missing(tasks: Iterable[Task]) -> list[str]:
    """One message for each task that cannot be asked here: unknown, without data, or without the
    metric, the filter or the examples that are asked for."""
    problems = []
    for task in dict.fromkeys(tasks):
        try:
            _check(task)
        except StageError as error:
            problems.append(str(error))
    return problems


def _check(task: Task) -> None:
    for each in harness_task(task)["tasks"].values():
        _filter(task, each)
        aggregations = each.aggregation()
        if _metric(task) not in aggregations and not _names_its_metrics_late(each):
            raise StageError(
                f"task {task.name} has no metric {_metric(task)}; it has {', '.join(aggregations)}"
            )
        if _is_of_all_questions(aggregations.get(_metric(task))):
            by_question = [name for name, a in aggregations.items() if not _is_of_all_questions(a)]
            raise StageError(
                f"task {task.name}: {_metric(task)} is of all questions at once, and none of its "
                f"halves has one; metrics of single questions: {', '.join(by_question) or 'none'}"
            )
        if getattr(each, "UNSAFE_CODE", False):
            raise StageError(f"task {task.name} runs code that the model wrote, which is not safe")
        if getattr(each, "MULTIMODAL", False):
            raise StageError(f"task {task.name} shows pictures or sound to the model")
        each.set_fewshot_seed(seed=FEWSHOT_SEED)
        try:
            each.build_all_requests(limit=1)
        except Exception as error:  # of a template, or of too few examples to show
            raise StageError(f"cannot ask task {task.name}: {_reason(error)}") from error


def _is_of_all_questions(aggregation: Callable[..., float] | None) -> bool:
    known = [registry.get_aggregation(name) for name in BY_QUESTION]
    return aggregation is not None and aggregation not in known


def _names_its_metrics_late(each: Any) -> bool:
    """Whether a metric is a function that may return several by names of its own."""
    return any(
        callable(entry["metric"]) or entry.get("hf_evaluate")
        for entry in each.config.metric_list or ()
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the tasks in a file. 0: all can be asked; 2: one message a line says which cannot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", type=Path, required=True, metavar="TASKS.json")
    path = parser.parse_args(arguments).check
    try:
        tasks = TypeAdapter(tuple[Task, ...]).validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        problems = [f"{path}: {error}"]
    else:
        problems = missing(tasks)
    for problem in problems:
        print(problem)
    return 2 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
