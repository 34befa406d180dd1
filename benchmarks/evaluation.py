"""How fast questions are answered beside lm-evaluation-harness' own `HFLM`, and whether equally.

    python benchmarks/evaluation.py --model results/artifacts/acquire-…/model \
        --questions arc_easy.jsonl --limit 100 --json

Both sides run the same checkpoint in the same precision on the same questions, in turn, in one
process. `speedup_vs_hflm` is HFLM's time divided by ours, at the best of its batch sizes.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from lm_eval.models.huggingface import HFLM

from trainers import questions
from trainers.checkpoints import load_model, load_tokenizer
from trainers.config import ChoicesTask
from trainers.scorer import Scorer


def answers(scorer: HFLM, task: ChoicesTask) -> tuple[float, list[dict[str, Any]]]:
    """Seconds, and the harness' samples in the order of the questions."""
    began = time.perf_counter()
    found = questions.samples_of(scorer, task)
    return time.perf_counter() - began, sorted(found, key=lambda sample: sample["doc_id"])


def main() -> None:
    """Measure, print a table, and with --json one line of JSON last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    model = load_model(arguments.model, arguments.precision)
    tokenizer = load_tokenizer(arguments.model)
    task = ChoicesTask(
        name="questions",
        path=arguments.questions,
        prompt="Question: {{query}}\nAnswer:",
        limit=arguments.limit,
    )
    sides: dict[str, HFLM] = {"ours": Scorer(model, tokenizer)}
    for size in arguments.batch_sizes:
        sides[f"HFLM, batch {size}"] = HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=size, device="cpu"
        )
    questions.harness_task(task)  # reading the questions is no part of answering them
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    samples: dict[str, list[dict[str, Any]]] = {}
    for _ in range(arguments.rounds):
        for name, scorer in sides.items():
            took, samples[name] = answers(scorer, task)
            seconds[name].append(took)
    best = {name: min(times) for name, times in seconds.items()}
    equal = {
        name: [s["acc"] for s in found] == [s["acc"] for s in samples["ours"]]
        for name, found in samples.items()
    }
    print(f"{task.limit} questions, {arguments.precision}, {torch.get_num_threads()} threads,")
    print(f"torch {torch.__version__}, transformers {transformers.__version__},", end=" ")
    print(f"{platform.processor() or platform.machine()}")
    for name, took in best.items():
        print(f"{name:<16} {took:8.2f} s   same answers as ours: {equal[name]}")
    peer = min(took for name, took in best.items() if name != "ours")
    if arguments.json:
        outcome = {"speedup_vs_hflm": peer / best["ours"], "answers_equal": all(equal.values())}
        print(json.dumps(outcome))


if __name__ == "__main__":
    main()
