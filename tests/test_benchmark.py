"""Generation is timed in turns, of exactly the tokens asked for, and becomes ratios."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeContext, SaveArtifact
from pydantic import ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from trainers import benchmark, checkpoints, generation
from trainers.benchmark import Peaks, Round, Timing
from trainers.config import BenchmarkConfig, Load, RequestLengths
from trainers.contract import StageError, read_rows
from trainers.generation import Transformers
from trainers.shapes import benchmark_cost, shape_of

LENGTHS = (RequestLengths(input=6, output=5), RequestLengths(input=3, output=2))
SMALL = BenchmarkConfig(lengths=LENGTHS, batch_sizes=(1, 3), rounds=3)
LOAD = Load(input=6, output=5, batch=3, teacher_batch=3)
PROMPTS = torch.arange(7, 25).reshape(3, 6)  # none is the padding, 0


def deep(layers: int, tiny_config: dict[str, Any], save_artifact: SaveArtifact, **how: Any) -> Path:
    model = checkpoints.new_model({**tiny_config, "num_hidden_layers": layers, **how}, seed=0)
    return save_artifact(model)


# --- what is generated -------------------------------------------------------------------------


@torch.no_grad()
def greedy(model: PreTrainedModel, prompts_BI: Tensor, new_tokens: int) -> Tensor:
    """Without a cache: the likeliest token after everything so far, again and again."""
    ids = prompts_BI
    for _ in range(new_tokens):
        likeliest_B = model(ids).logits[:, -1].argmax(dim=-1)
        ids = torch.cat([ids, likeliest_B[:, None]], dim=1)
    return ids[:, prompts_BI.shape[1] :]


def test_generation_is_greedy(artifact: Path, model: PreTrainedModel) -> None:
    made = Transformers(artifact / "model", "fp32").generate(PROMPTS, 5)
    assert torch.equal(made, greedy(model, PROMPTS, 5))


def test_no_end_of_text_ends_an_answer_early(
    artifact: Path, model: PreTrainedModel, tiny_config: dict[str, Any], save_artifact: SaveArtifact
) -> None:
    likeliest = int(greedy(model, PROMPTS[:1], 1))
    ends = deep(4, tiny_config, save_artifact, eos_token_id=likeliest)
    plain = checkpoints.load_model(ends / "model")
    by_itself = plain.generate(PROMPTS[:1], max_new_tokens=5, do_sample=False)
    assert by_itself.shape[1] < PROMPTS.shape[1] + 5, "the checkpoint itself would stop"
    made = Transformers(ends / "model", "fp32").generate(PROMPTS[:1], 5)
    assert torch.equal(made, greedy(model, PROMPTS[:1], 5))


def test_prompts_are_drawn_with_the_seed_and_shared_by_both_models() -> None:
    load = Load(input=7, output=1, batch=4, teacher_batch=2)
    own, teachers = generation.prompts(load, 50, torch.Generator().manual_seed(3))
    again, _ = generation.prompts(load, 50, torch.Generator().manual_seed(3))
    other, _ = generation.prompts(load, 50, torch.Generator().manual_seed(4))
    assert own.shape == (4, 7) and torch.equal(teachers, own[:2])
    assert torch.equal(own, again) and not torch.equal(own, other)
    assert int(own.min()) >= 0 and int(own.max()) < 50


# --- how it is timed ---------------------------------------------------------------------------


class Noted(Transformers):
    """A model that notes in a common list when it was asked for how much."""

    def __init__(self, name: str, folder: Path, calls: list[tuple[str, int]]) -> None:
        super().__init__(folder, "fp32")
        self._name, self._calls = name, calls

    def generate(self, prompts_BI: Tensor, new_tokens: int) -> Tensor:
        self._calls.append((self._name, new_tokens))
        return super().generate(prompts_BI, new_tokens)


def test_models_take_turns_and_each_goes_first_in_every_other_round(artifact: Path) -> None:
    calls: list[tuple[str, int]] = []
    sides = tuple(Noted(name, artifact / "model", calls) for name in ("model", "teacher"))
    config = BenchmarkConfig(lengths=LENGTHS[:1], batch_sizes=(3,), warmup=1, rounds=3)
    random = torch.Generator().manual_seed(0)
    turns = list(benchmark._turns(config, LOAD, sides, 50, random, lambda _: None))
    assert len(turns) == 4
    assert [new for _, new in calls] == [1, 5] * 8
    order = [name for name, _ in calls[::2]]
    assert order == ["model", "teacher", "teacher", "model"] * 2


class Short(Transformers):
    """A model that makes a token too few."""

    def generate(self, prompts_BI: Tensor, new_tokens: int) -> Tensor:
        return super().generate(prompts_BI, new_tokens)[:, :-1]


def test_a_wrong_number_of_tokens_is_a_failure_and_no_speed(artifact: Path) -> None:
    with pytest.raises(StageError, match=r"\(3, 0\) tokens, not 1 for each of 3"):
        benchmark.timed(Short(artifact / "model", "fp32"), PROMPTS, 5)


def test_fewer_layers_are_faster_and_smaller(
    tiny_config: dict[str, Any], save_artifact: SaveArtifact, make_context: MakeContext
) -> None:
    thin, thick = (deep(layers, tiny_config, save_artifact) for layers in (1, 16))
    context = make_context(SMALL, model=thin, teacher=thick)
    result = benchmark.run(context)
    assert set(result.metrics) == set(SMALL.metrics)
    assert all(math.isfinite(value) and value > 0 for value in result.metrics.values())
    for load in SMALL.loads:
        low, middle, high = (
            result.metrics[f"{name}.{load.name}"]
            for name in ("throughput_low", "throughput", "throughput_high")
        )
        assert low <= middle <= high
        assert result.metrics[f"peak_memory_ratio.{load.name}"] < 0.5
    # A sixteenth of the layers: even on a busy machine, whose pauses are longer than these calls.
    assert result.metrics["throughput.mean"] > 1 > result.metrics["first_token_ratio.mean"]
    rows = read_rows(context.out / "rounds.jsonl")
    assert len(rows) == len(SMALL.loads) * SMALL.rounds * 2, "warm-up rounds are not measured"
    assert json.loads((context.out / "machine.json").read_text())["threads"] >= 1


def test_progress_is_told_by_round(artifact: Path, make_context: MakeContext) -> None:
    told: list[tuple[int, int]] = []

    class Listener:
        def report(self, done: int, total: int, values: Any) -> None:
            told.append((done, total))

    benchmark.run(make_context(SMALL, reporter=Listener(), model=artifact, teacher=artifact))
    assert told == [(done, 16) for done in range(1, 17)]


# --- from seconds to metrics -------------------------------------------------------------------


def rounds_of(*seconds: tuple[float, float]) -> list[Round]:
    """Rounds in which the model took the first, its teacher the second."""
    return [Round(Timing(own / 10, own), Timing(other / 10, other)) for own, other in seconds]


def test_a_machine_that_slows_down_leaves_the_ratio() -> None:
    rounds = rounds_of((1, 2), (10, 20), (3, 6), (100, 200))
    found = benchmark.metrics_of({LOAD: (rounds, Peaks(1e6, 4e6))})
    for name in ("throughput", "throughput_low", "throughput_high"):
        assert found[f"{name}.{LOAD.name}"] == pytest.approx(2)
    assert found[f"first_token_ratio.{LOAD.name}"] == pytest.approx(0.5)
    assert found[f"peak_memory_ratio.{LOAD.name}"] == pytest.approx(0.25)


def test_one_round_that_was_disturbed_moves_the_spread_and_not_the_median() -> None:
    rounds = rounds_of((1, 2), (1, 2), (1, 2), (1, 2), (50, 2))
    found = benchmark.metrics_of({LOAD: (rounds, Peaks(1, 1))})
    assert found[f"throughput.{LOAD.name}"] == pytest.approx(2)
    assert found[f"throughput_low.{LOAD.name}"] == pytest.approx(0.04)
    assert found[f"throughput_high.{LOAD.name}"] == pytest.approx(2)


def test_speeds_count_requests_and_new_tokens_of_the_batch_that_was_answered() -> None:
    load = Load(input=8, output=5, batch=6, teacher_batch=2)
    found = benchmark.metrics_of({load: (rounds_of((3, 4), (3, 4)), Peaks(2e6, 8e6))})
    by_name = {name.removesuffix(f".{load.name}"): value for name, value in found.items()}
    assert load.name == "in8_out5_b6t2"
    assert by_name["requests_per_s"] == pytest.approx(2)
    assert by_name["tokens_per_s"] == pytest.approx(10)
    assert by_name["teacher_requests_per_s"] == pytest.approx(0.5)
    assert by_name["throughput"] == pytest.approx(4)
    assert by_name["first_token_s"] == pytest.approx(0.3)
    assert by_name["peak_memory_mb"] == pytest.approx(2)


def test_the_mean_over_loads_is_geometric() -> None:
    other = Load(input=1, output=1, batch=1, teacher_batch=1)
    found = benchmark.metrics_of(
        {
            LOAD: (rounds_of((1, 8), (1, 8)), Peaks(1, 1)),
            other: (rounds_of((2, 1), (2, 1)), Peaks(1, 1)),
        }
    )
    assert found["throughput.mean"] == pytest.approx(2)  # of 8 and 1/2


# --- memory and work, from the shape alone -----------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_computed_memory_is_that_of_the_weights_and_of_the_cache(
    artifact: Path, tiny_config: dict[str, Any], precision: str
) -> None:
    model = checkpoints.load_model(artifact / "model", precision)
    cache = model(PROMPTS).past_key_values
    tensors = [*model.parameters(), *itertools.chain(*((c.keys, c.values) for c in cache.layers))]
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert shape_of(tiny_config).generation_bytes(precision, PROMPTS.numel()) == held


def test_an_answer_costs_its_tokens_once_and_the_head_for_the_new_ones(
    tiny_config: dict[str, Any],
) -> None:
    shape = shape_of(tiny_config)
    head = 2 * shape.vocab_size * shape.hidden_size
    layers = shape.forward_flops(8, 8, head=False)
    assert shape.generation_flops(read=8, made=1) == layers + head
    assert shape.generation_flops(read=5, made=4) == layers + 4 * head


def test_the_cost_is_that_of_every_call(artifact: Path, make_context: MakeContext) -> None:
    result = benchmark.run(make_context(SMALL, model=artifact, teacher=artifact))
    shape = shape_of(checkpoints.read_config(artifact / "model"))
    assert (result.tokens, result.flops) == benchmark_cost(SMALL, shape, shape)
    # Both models, four rounds, batches of 1 and 3: a call for one token and one for all.
    assert result.tokens == 2 * 4 * (1 + 3) * ((6 + 1) + (6 + 5) + (3 + 1) + (3 + 2))


# --- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lengths": ()}, "at least one of lengths"),
        ({"lengths": ({"input": 0, "output": 4},)}, "greater than 0"),
        ({"batch_sizes": (0,)}, "greater than 0"),
        ({"batch_sizes": (2, 2)}, "the same twice"),
        ({"teacher_batch_sizes": (1,)}, "1 sizes for the 2"),
        ({"rounds": 1}, "greater than or equal to 2"),
        ({"precision": "fp8"}, "fp8 needs backend: vllm"),
    ],
)
def test_what_cannot_be_measured_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        BenchmarkConfig.model_validate({**SMALL.model_dump(), **settings})


def test_vllm_that_is_not_there_is_told_in_one_sentence(artifact: Path) -> None:
    config = BenchmarkConfig.model_validate({**SMALL.model_dump(), "backend": "vllm"})
    with pytest.raises(StageError, match=r"vllm is not installed; `pip install"):
        generation.open_model(artifact / "model", config)
