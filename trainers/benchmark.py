"""Stage `benchmark`: how fast a model generates beside its teacher, in turns and in one process.

A time says little by itself: the machine's clock, its temperature and whatever else runs change it
from minute to minute. So each round times both models one after the other, the next round in the
other order, and what counts is the ratio within a round; the median over rounds is given with the
lowest and the highest. Of independent rounds those two enclose the median with probability
1 - 2^(1 - rounds): 97% for six. The absolute figures are medians, too.

A round of a model is two calls on the same random prompts: one new token, which is the time to the
first, and then all of them. Metrics, each for every load (`<name>.in64_out64_b4`):

    throughput, throughput_low, throughput_high   requests a second, as a ratio to the teacher's
    first_token_ratio, peak_memory_ratio          ratios to the teacher's; low is good
    requests_per_s, tokens_per_s, first_token_s, peak_memory_mb          the model's own; tokens
                                                  are new ones, and a MB has 1e6 bytes
    teacher_requests_per_s, teacher_tokens_per_s, teacher_first_token_s, teacher_peak_memory_mb

and of the ratios the geometric mean over all loads (`throughput.mean`).

Peak memory is measured where a GPU's allocator tells it, under transformers. Elsewhere it is
computed: weights and the keys and values of all tokens. A process on a CPU keeps what it freed, and
vLLM takes a fixed share of the GPU, so neither says what one of two models takes.

On a CPU a model generates with the threads that the worker was given. The sweep lets nothing of its
own run beside this stage (`StageType.runs_alone`); of other programs nothing is known here.

What was measured is kept like any other artifact: the same command run again takes it from the
store and times nothing, so that a sweep is told by the timings that it was told by before. The id
does not know the machine. To time anew, on another machine too, use another seed (each draws other
prompts and is a repetition) or another results folder.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainers import generation, shell, workers
from trainers.checkpoints import read_config
from trainers.config import WITH_MEAN, BenchmarkConfig, Load
from trainers.contract import StageContext, StageError, StageResult, Ticker, write_rows
from trainers.generation import Generator
from trainers.shapes import Shape, benchmark_cost, shape_of

MB = 1e6


@dataclass(frozen=True)
class Timing:
    """Seconds until the first new token of a batch of requests, and until all of them."""

    first_token_s: float
    seconds: float


@dataclass(frozen=True)
class Round:
    """Both models on the same requests, one right after the other."""

    model: Timing
    teacher: Timing


@dataclass(frozen=True)
class Peaks:
    """Bytes that each model took at most."""

    model: float
    teacher: float


@workers.metered
def run(context: StageContext[BenchmarkConfig]) -> StageResult:
    """Time the model in role `model` beside the one in role `teacher`."""
    config, folders = context.config, (context.model("model"), context.model("teacher"))
    sides = tuple(generation.open_model(folder, config) for folder in folders)
    shapes = tuple(shape_of(read_config(folder)) for folder in folders)
    vocabulary = min(shape.vocab_size for shape in shapes)
    random = torch.Generator().manual_seed(context.seed)
    tick = Ticker(context.reporter, len(config.loads) * (config.warmup + config.rounds))
    found: dict[Load, tuple[list[Round], Peaks]] = {}
    for load in config.loads:
        turns = _turns(config, load, sides, vocabulary, random, tick)
        rounds = list(turns)[config.warmup :]
        found[load] = rounds, _peaks(config, load, sides, shapes)
    _write(context, found)
    tokens, flops = benchmark_cost(config, *shapes)
    return StageResult(metrics_of(found), tokens, flops)


# --- measuring -------------------------------------------------------------------------------

Sides = tuple[Generator, ...]
"""The model, then its teacher."""


def _turns(
    config: BenchmarkConfig,
    load: Load,
    sides: Sides,
    vocabulary: int,
    random: torch.Generator,
    tick: Callable[[int], None],
) -> Iterator[Round]:
    """Warm-up rounds and measured ones: model before teacher, teacher before model, and so on."""
    for number in range(config.warmup + config.rounds):
        prompts = generation.prompts(load, vocabulary, random)
        timings: dict[int, Timing] = {}
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            timings[side] = timed(sides[side], prompts[side], load.output)
        tick(1)
        yield Round(timings[0], timings[1])


def timed(side: Generator, prompts_BI: Tensor, new_tokens: int) -> Timing:
    """How long the model takes for one new token of each request, and for all of them. Raises
    `StageError` where it makes another number of tokens than was asked for."""
    return Timing(_call(side, prompts_BI, 1), _call(side, prompts_BI, new_tokens))


def _call(side: Generator, prompts_BI: Tensor, new_tokens: int) -> float:
    began = time.perf_counter()
    made = side.generate(prompts_BI, new_tokens)
    seconds = time.perf_counter() - began
    if made.shape != (len(prompts_BI), new_tokens):
        wanted = f"{new_tokens} for each of {len(prompts_BI)} requests"
        raise StageError(f"generation gave {tuple(made.shape)} tokens, not {wanted}")
    return seconds


def _peaks(config: BenchmarkConfig, load: Load, sides: Sides, shapes: Sequence[Shape]) -> Peaks:
    """What was measured while the load was answered; where nothing tells, what it comes to."""
    peaks = []
    for side, shape, batch in zip(sides, shapes, (load.batch, load.teacher_batch), strict=True):
        computed = shape.generation_bytes(config.precision, batch * (load.input + load.output))
        peaks.append(side.peak_bytes() or computed)
    return Peaks(*peaks)


# --- from seconds to metrics -----------------------------------------------------------------


def metrics_of(found: Mapping[Load, tuple[Sequence[Round], Peaks]]) -> dict[str, float]:
    """The metrics by name, as the head of this file lists them. Pure."""
    by_load = {load.name: _of_load(load, rounds, peaks) for load, (rounds, peaks) in found.items()}
    metrics = {
        f"{metric}.{name}": value
        for name, values in by_load.items()
        for metric, value in values.items()
    }
    for metric in WITH_MEAN:
        ratios = [values[metric] for values in by_load.values()]
        metrics[f"{metric}.mean"] = statistics.geometric_mean(ratios)
    return metrics


def _of_load(load: Load, rounds: Sequence[Round], peaks: Peaks) -> dict[str, float]:
    speed = [load.batch / each.model.seconds for each in rounds]
    teacher_speed = [load.teacher_batch / each.teacher.seconds for each in rounds]
    ratios = [own / other for own, other in zip(speed, teacher_speed, strict=True)]
    first = [each.model.first_token_s / each.teacher.first_token_s for each in rounds]
    requests, teacher_requests = statistics.median(speed), statistics.median(teacher_speed)
    return {
        "throughput": statistics.median(ratios),
        "throughput_low": min(ratios),
        "throughput_high": max(ratios),
        "first_token_ratio": statistics.median(first),
        "peak_memory_ratio": peaks.model / peaks.teacher,
        "requests_per_s": requests,
        "tokens_per_s": requests * load.output,
        "first_token_s": statistics.median(each.model.first_token_s for each in rounds),
        "peak_memory_mb": peaks.model / MB,
        "teacher_requests_per_s": teacher_requests,
        "teacher_tokens_per_s": teacher_requests * load.output,
        "teacher_first_token_s": statistics.median(each.teacher.first_token_s for each in rounds),
        "teacher_peak_memory_mb": peaks.teacher / MB,
    }


def _write(
    context: StageContext[BenchmarkConfig],
    found: Mapping[Load, tuple[Sequence[Round], Peaks]],
) -> None:
    """Every round as it was, and the machine that it was on: for people who ask later."""
    rows = [
        {"load": load.name, "round": number, "side": side, **vars(getattr(each, side))}
        for load, (rounds, _) in found.items()
        for number, each in enumerate(rounds)
        for side in ("model", "teacher")
    ]
    write_rows(context.out / "rounds.jsonl", rows)
    device = workers.device()
    machine = {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    (context.out / "machine.json").write_text(json.dumps(machine))


if __name__ == "__main__":
    shell.main(BenchmarkConfig, run)
