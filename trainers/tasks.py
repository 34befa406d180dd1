"""Descriptions of tasks over local question files, as lm-evaluation-harness reads them.

Plain data: they go to the harness as they are, or into a YAML file for `lm_eval --include_path`.
They load with no network. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def choices_task(name: str, questions: Path, prompt: str = "{{query}}") -> dict[str, Any]:
    """Multiple choice over a JSON-lines file of `query`, `choices` and `gold` (an index).

    The delimiter between prompt and choice is one space, which belongs to the choice: subword
    tokenizers want it there and word-level ones ignore it.
    """
    fields = {"doc_to_text": prompt, "doc_to_choice": "choices", "doc_to_target": "gold"}
    return _local(name, questions, ("acc", "acc_norm")) | fields


def partial_task(name: str, questions: Path) -> dict[str, Any]:
    """Which of several contexts makes a continuation likeliest, over a JSON-lines file of
    `context_options`, `continuation` and `gold` (an index)."""
    fields = {
        "doc_to_text": "gold",
        "doc_to_choice": "context_options",
        "doc_to_target": "continuation",
    }
    return _local(name, questions, ("acc",)) | fields


def _local(name: str, questions: Path, metrics: Sequence[str]) -> dict[str, Any]:
    # No num_fewshot: a task that says 0 itself is deaf to the command line's.
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(questions.resolve())}},
        "test_split": "test",
        # Named, lest a question be shown with its answer among its own examples.
        "fewshot_split": "test",
        "output_type": "multiple_choice",
        "target_delimiter": " ",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in metrics
        ],
        "metadata": {"version": 1},
    }
