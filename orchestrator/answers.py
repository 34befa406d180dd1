"""Answers to the questions of the tasks, by trial, and the metrics that are made of them. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import chain, combinations, groupby, islice
from typing import Literal

import numpy as np

from orchestrator.inference import Array, Resamples
from orchestrator.records import Records, TrialRecord

Answered = Mapping[tuple[str, str], float]
"""By task and id of the question, how it was answered."""
MOST_TRIED = 10_000
"""Sets of tasks, of which one may be what a mean leaves out."""


def task_of(metric: str) -> tuple[str, Literal["select", "report"]] | None:
    """`accuracy.<task>` and `accuracy_report.<task>` -> the task (or `mean`) and the half."""
    kind, _, task = metric.partition(".")
    if kind == "accuracy":
        return task, "select"
    return (task, "report") if kind == "accuracy_report" else None


def value_of(trial: TrialRecord, metric: str) -> float | None:
    """The trial's metric where it completed and has a finite value."""
    value = trial.metrics.get(metric)
    known = trial.status == "completed" and value is not None and math.isfinite(value)
    return value if known else None


class Questions:
    """The answers of one half of the questions.

    `task` is a task's name, or `mean` for all tasks that count in it. Every group is seen on the
    same questions (those that all of them answered) and the same resamples, so differences between
    groups are paired.
    """

    def __init__(self, records: Records, task: str, split: Literal["select", "report"]) -> None:
        # A trial that was stopped may have fewer answers, which must not narrow the comparison.
        completed = {trial.trial_id for trial in records.trials if trial.status == "completed"}
        self._answers: dict[str, dict[tuple[str, str], float]] = {}
        self.apart = frozenset[str]()
        """The tasks that do not count in the mean, and so are better when lower."""
        for item in records.items:
            wanted = item.split == split and task in ("mean", item.task)
            if wanted and item.trial_id in completed:
                answers = self._answers.setdefault(item.trial_id, {})
                answers[item.task, item.item_id] = item.correct
        if task == "mean":
            self._leave_out(records, split)

    def _leave_out(self, records: Records, split: Literal["select", "report"]) -> None:
        kind = "accuracy" if split == "select" else "accuracy_report"
        means = {trial.trial_id: value_of(trial, f"{kind}.mean") for trial in records.trials}
        self.apart = not_counted(self._answers, means)
        if not any(means.get(trial_id) is not None for trial_id in self._answers):
            tasks = {task for answers in self._answers.values() for task, _ in answers}
            self.apart = frozenset(tasks)  # none of them made a mean
        if out := self.apart:
            self._answers = {
                trial_id: {key: value for key, value in answers.items() if key[0] not in out}
                for trial_id, answers in self._answers.items()
            }

    @cached_property
    def are_shares(self) -> bool:
        """Whether every answer is from 0 to 1, as no perplexity is."""
        return all(0 <= each <= 1 for found in self._answers.values() for each in found.values())

    @cached_property
    def common(self) -> list[tuple[str, str]]:
        """The questions that every trial with answers has, by task and id."""
        sets = [set(answers) for answers in self._answers.values()]
        return sorted(set.intersection(*sets)) if sets else []

    def answers(self, trial_ids: Iterable[str]) -> dict[str, Array] | None:
        """Each trial's answers to the common questions; None where one of them has none."""
        wanted = set(trial_ids)
        if not self.common or not wanted or not self._answers.keys() >= wanted:
            return None
        return {
            trial_id: np.array([self._answers[trial_id][key] for key in self.common])
            for trial_id in sorted(wanted)
        }

    def answered_more(self, trial_id: str) -> bool:
        """Whether a trial with answers has others than those to the common questions."""
        return len(self._answers[trial_id]) > len(self.common)

    @cached_property
    def resamples(self) -> Resamples:
        """Resamples of the common questions."""
        return Resamples([len(list(rows)) for _, rows in groupby(self.common, lambda key: key[0])])


def not_counted(
    answers: Mapping[str, Answered], means: Mapping[str, float | None]
) -> frozenset[str]:
    """The tasks that do not count in the mean over tasks, as those that are better when lower do
    not: the fewest without which the answers of every trial have its recorded mean. Empty where no
    tasks explain the means.

    Values alone would not tell: a Brier score, which does not count, is from 0 to 1, and BLEU,
    which does, is not.
    """
    known = [
        (_by_task(found), mean)
        for trial_id, found in answers.items()
        if (mean := means.get(trial_id)) is not None
    ]
    tasks = sorted(set().union(*(found for found, _ in known)))
    fewest_first = chain.from_iterable(combinations(tasks, count) for count in range(len(tasks)))
    for out in islice(fewest_first, MOST_TRIED):
        if all(_is_mean(mean, found, out) for found, mean in known):
            return frozenset(out)
    return frozenset()


def _by_task(answers: Answered) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for (task, _), value in answers.items():
        found.setdefault(task, []).append(value)
    return {task: statistics.fmean(values) for task, values in found.items()}


def _is_mean(mean: float, by_task: Mapping[str, float], out: Sequence[str]) -> bool:
    counted = [value for task, value in by_task.items() if task not in out]
    return bool(counted) and math.isclose(statistics.fmean(counted), mean, rel_tol=1e-9)
