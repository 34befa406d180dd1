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
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from jinja2 import StrictUndefined
from jinja2.sandbox import SandboxedEnvironment
from lm_eval import utils as harness
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import distributed
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainers import language
from trainers.ablation import Block, hidden_without, left_out
from trainers.checkpoints import final_hidden, output_head, softcapped
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
from trainers.workers import rank_and_processes

logging.getLogger("lm_eval").setLevel(logging.ERROR)

# A prompt is a template, which a sweep file may give. In the harness' own environment it could
# reach all of Python through the attributes of a string.
_sandbox = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
_sandbox.filters |= harness.env.filters
harness.env = _sandbox

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


def ask_without(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    blocks: Sequence[Block],
    progress: Callable[[float], None] = lambda done: None,
) -> tuple[list[list[Answer]], list[int]]:
    """The answers of the intact model, then of the model without each block of layers in turn;
    and the length in tokens of every sequence that each of them scored.

    All of them score a task's requests together, on one pass of the layers before each block.
    `progress` hears which part of the work is done, from 0 to 1.
    """
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


Tokens = tuple[int, ...]
Request = tuple[Any, list[int], list[int]]
"""What the harness calls it, the context's tokens, and the continuation's."""
Response = tuple[float, bool]
"""The continuation's log-probability, and whether it is what the model would say itself."""


class Scorer(HFLM):  # type: ignore[misc]
    """`HFLM` that runs the output head on the continuation's positions alone.

    Requests are packed by length, and choices that differ in nothing but their last token share
    one forward pass. Answers equal `HFLM`'s; rolling likelihood and generation are inherited.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        device = str(model.device)
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=16, device=device)

    def _loglikelihood_tokens(self, requests: list[Request], **_: Any) -> list[Response]:
        found = self._score(requests)
        return [found[number][0] for number in range(len(requests))]

    @torch.no_grad()
    def _score(self, requests: list[Request]) -> dict[int, list[Response]]:
        """By the request's number: the response of each variant of the model."""
        passes: dict[Tokens, list[int]] = {}
        for number, (_pair, context, continuation) in enumerate(requests):
            whole = (context + continuation)[-(self.max_length + 1) :]
            passes.setdefault(tuple(whole[:-1]), []).append(number)
        found: dict[int, list[Response]] = defaultdict(list)
        for batch in self._share(_packed(sorted(passes, key=len))):
            for hidden_BLD in self._hidden(_padded(batch).to(self.model.device)):
                for tokens, hidden_LD in zip(batch, hidden_BLD, strict=True):
                    for number in passes[tokens]:
                        response = self._read(hidden_LD[: len(tokens)], requests[number][2])
                        found[number].append(response)
        return found

    def _share(self, batches: list[list[Tokens]]) -> Iterator[list[Tokens]]:
        """The batches to run here."""
        yield from batches

    def _hidden(self, tokens_BL: torch.Tensor) -> Iterator[torch.Tensor]:
        """Final hidden states of each variant of the model: here there is one."""
        yield final_hidden(self.model, tokens_BL)

    def _read(self, hidden_LD: torch.Tensor, continuation: list[int]) -> Response:
        logits = torch.nn.functional.linear(
            hidden_LD[-len(continuation) :], output_head(self.model)
        )
        log_probabilities = torch.log_softmax(softcapped(logits, self.model).float(), dim=-1)
        gold = torch.tensor(continuation, device=hidden_LD.device)
        total = log_probabilities.gather(1, gold[:, None]).sum()
        return float(total), bool((log_probabilities.argmax(-1) == gold).all())


class AblatedScorer(Scorer):
    """Answers for the model (`variant` 0) and for the model without `blocks[variant - 1]`.

    The first variant to be asked scores the requests for all of them; of that only the responses
    are kept, for the others to be asked the same. Where torch.distributed runs, every process must
    ask the same and each scores its share of the batches.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        blocks: Sequence[Block],
    ) -> None:
        super().__init__(model, tokenizer)
        self.variant = 0
        self.progress: Callable[[float], None] = lambda part: None
        self.lengths: list[int] = []
        self._blocks = blocks
        self._table: dict[str, dict[int, list[Response]]] = {}

    def _loglikelihood_tokens(self, requests: list[Request], **_: Any) -> list[Response]:
        asked = hash_of([[context, continuation] for _pair, context, continuation in requests])
        if asked not in self._table:
            self._table[asked] = _gathered(self._score(requests))
        found = self._table[asked]
        return [found[number][self.variant] for number in range(len(requests))]

    def _share(self, batches: list[list[Tokens]]) -> Iterator[list[Tokens]]:
        rank, processes = rank_and_processes()
        self.lengths += [len(tokens) for batch in batches for tokens in batch]
        mine = batches[rank::processes]
        for number, batch in enumerate(mine):
            self.progress(number / len(mine))
            yield batch

    def _hidden(self, tokens_BL: torch.Tensor) -> Iterator[torch.Tensor]:
        yield from hidden_without(self.model, tokens_BL, self._blocks)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """`HFLM`'s, by the model without the variant's block: nothing is shared here."""
        if self.variant == 0:
            return list(super().generate_until(requests, disable_tqdm))
        with left_out(self.model, *self._blocks[self.variant - 1]):
            return list(super().generate_until(requests, disable_tqdm))


def _gathered(found: dict[int, list[Response]]) -> dict[int, list[Response]]:
    """What all processes found."""
    _rank, processes = rank_and_processes()
    if processes == 1:
        return found
    parts: list[Any] = [None] * processes
    distributed.all_gather_object(parts, found)
    return {number: responses for part in parts for number, responses in part.items()}


def _padded(batch: list[Tokens]) -> torch.Tensor:
    # Padding stands on the right, where causal attention never looks back at it.
    longest = max(map(len, batch))
    return torch.tensor([list(tokens) + [0] * (longest - len(tokens)) for tokens in batch])


def _packed(sequences: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Neighbours in length, together until they would pad to more than `TOKENS_A_BATCH`."""
    batches: list[list[tuple[int, ...]]] = []
    for tokens in sequences:
        if batches and len(tokens) * (len(batches[-1]) + 1) <= TOKENS_A_BATCH:
            batches[-1].append(tokens)
        else:
            batches.append([tokens])
    return batches
