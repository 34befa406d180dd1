"""Downstream questions: lm-evaluation-harness asks, our checkpoints answer.

The harness loads the tasks, builds the prompts and computes the metrics. Our part is `Scorer`,
which gives `HFLM`'s answers without computing logits that nobody reads, and the split of the
questions into a half to choose by and a half to report.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainers import language
from trainers.checkpoints import final_hidden, output_head
from trainers.config import (
    ChoicesTask,
    GeneratedTask,
    HarnessTask,
    PartialTask,
    Task,
    hash_of,
)
from trainers.contract import StageError
from trainers.tasks import choices_task, partial_task

logging.getLogger("lm_eval").setLevel(logging.ERROR)

TOKENS_A_BATCH = 2048
FEWSHOT_SEED = 1234


@dataclass(frozen=True)
class Answer:
    """One question answered. `score`: log-probability of the gold choice above the best other."""

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


def accuracies(answers: Sequence[Answer], split: str) -> dict[str, float]:
    """Accuracy of each task on one half, and their `mean`: every task counts the same."""
    by_task: dict[str, list[float]] = {}
    for answer in answers:
        if answer.split == split:
            by_task.setdefault(answer.task, []).append(answer.correct)
    found = {task: sum(values) / len(values) for task, values in by_task.items()}
    return found | {"mean": sum(found.values()) / len(found)} if found else {}


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


def _ask_one(scorer: Scorer, task: Task) -> list[Answer]:
    return [_answer(task, sample) for sample in samples_of(scorer, task)]


def samples_of(scorer: HFLM, task: Task) -> list[dict[str, Any]]:
    """The harness' own account of each question: its prompts, responses and metrics."""
    loaded = harness_task(task)
    for found in loaded["tasks"].values():
        # Each question draws its examples from one generator: without a new start, a task asked
        # twice would show others the second time.
        found.set_fewshot_seed(seed=FEWSHOT_SEED)
    # `evaluate` and not `simple_evaluate`, which loads the data anew and inspects the machine each
    # time: ten times what the questions themselves cost a small model.
    results = evaluate(scorer, loaded, limit=task.limit, bootstrap_iters=0)
    return [sample for found in results["samples"].values() for sample in found]


def _answer(task: Task, sample: dict[str, Any]) -> Answer:
    metric = "acc" if isinstance(task, GeneratedTask | PartialTask) else task.metric
    if metric not in sample:
        raise StageError(
            f"task {task.name} has no metric {metric}; it has {', '.join(sample['metrics'])}"
        )
    item_id = hash_of([task.name, json.loads(json.dumps(sample["doc"], default=str))])[:16]
    return Answer(task.name, item_id, split_of(item_id), float(sample[metric]), _margin(sample))


def _margin(sample: dict[str, Any]) -> float | None:
    """Gold log-probability minus the best other choice's; None where the task has no choices."""
    choices = sample["filtered_resps"]
    gold = sample["doc"].get("gold", sample["target"])  # a target may also be the answer's text
    if isinstance(gold, str) and gold.isdigit():
        gold = int(gold)
    if not isinstance(gold, int) or len(choices) < 2 or not isinstance(choices[0], (tuple, list)):
        return None
    scores = [float(choice[0]) for choice in choices]
    return scores[gold] - max(score for place, score in enumerate(scores) if place != gold)


# --- tasks -----------------------------------------------------------------------------------


@lru_cache(maxsize=32)
def harness_task(task: Task) -> Any:
    """The harness' task, with its questions in memory. Raises `StageError` where they are not to
    be had."""
    try:
        with tempfile.TemporaryDirectory(prefix="questions-") as scratch:
            found = _index(task).load([_prepared(task, Path(scratch))])
    except (ConnectionError, OSError) as error:
        raise StageError(f"cannot get the questions of task {task.name}: {error}") from error
    for each in found["tasks"].values():
        each.set_config(key="num_fewshot", value=task.shots)
    return found


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
            return choices_task(task.name, path, "{{query}}")


def _index(task: Task) -> TaskManager:
    """The harness' own index takes seconds to read, so it is read only where it is needed."""
    return _task_manager(isinstance(task, HarnessTask))


@lru_cache(maxsize=2)
def _task_manager(include_defaults: bool) -> TaskManager:
    return TaskManager(include_defaults=include_defaults)


# --- scoring ---------------------------------------------------------------------------------


class Scorer(HFLM):  # type: ignore[misc]
    """`HFLM` that runs the output head on the continuation's positions alone.

    Requests are packed by length, and choices that differ in nothing but their last token share
    one forward pass. Answers equal `HFLM`'s; rolling likelihood and generation are inherited.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=16, device="cpu")

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        passes: dict[tuple[int, ...], list[int]] = {}
        for number, (_pair, context, continuation) in enumerate(requests):
            whole = (context + continuation)[-(self.max_length + 1) :]
            passes.setdefault(tuple(whole[:-1]), []).append(number)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for batch in _packed(sorted(passes, key=len)):
            for tokens, hidden_LD in zip(batch, self._hidden(batch), strict=True):
                for number in passes[tokens]:
                    answers[number] = self._read(hidden_LD[: len(tokens)], requests[number][2])
        return answers

    def _hidden(self, batch: list[tuple[int, ...]]) -> torch.Tensor:
        longest = max(map(len, batch))
        # Padding stands on the right, where causal attention never looks back at it.
        padded = [list(tokens) + [0] * (longest - len(tokens)) for tokens in batch]
        return final_hidden(self.model, torch.tensor(padded))

    def _read(self, hidden_LD: torch.Tensor, continuation: list[int]) -> tuple[float, bool]:
        logits = torch.nn.functional.linear(
            hidden_LD[-len(continuation) :], output_head(self.model)
        )
        log_probabilities = torch.log_softmax(logits.float(), dim=-1)
        gold = torch.tensor(continuation)
        total = log_probabilities.gather(1, gold[:, None]).sum()
        return float(total), bool((log_probabilities.argmax(-1) == gold).all())


def _packed(sequences: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Neighbours in length, together until they would pad to more than `TOKENS_A_BATCH`."""
    batches: list[list[tuple[int, ...]]] = []
    for tokens in sequences:
        if batches and len(tokens) * (len(batches[-1]) + 1) <= TOKENS_A_BATCH:
            batches[-1].append(tokens)
        else:
            batches.append([tokens])
    return batches
