"""What `plan` says of memory is what real engines, losses and layers take.

Run by a launcher, this file is what two workers do: `torchrun … test_estimate.py FOLDER`.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families_at_hand import VARIANTS, tiny_config
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st
from memory_meter import Meter, Saved
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from orchestrator import demand, estimate
from orchestrator.estimate import GB, STAGES, Run, model_states, remedy, training_memory, under
from trainers import activations, cache, checkpoints, engine, evaluate, losses, workers
from trainers.config import (
    DistillLoss,
    EngineSettings,
    HiddenCache,
    LiveSignal,
    SampledCache,
    Training,
)
from trainers.distill import Distillation
from trainers.pretrain import LanguageModelling
from trainers.shapes import Shape, shape_of
from trainers.teacher import LiveTeacher

ROOT = Path(__file__).parent.parent
LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
SMALL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


def training(**changes: Any) -> Training:
    usual = {"steps": 10, "batch_size": 8, "micro_batch_size": 2, "learning_rate": 1e-3}
    chosen = {name: changes.pop(name) for name in EngineSettings.model_fields if name in changes}
    return Training(**{**usual, "engine": EngineSettings(**chosen), **changes})


def run(config: dict[str, Any], context: int = 64, workers: int = 1, **changes: Any) -> Run:
    return Run(shape_of(config), training(**changes), context, workers)


# --- by the book -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "stage", "count", "bytes_a_parameter"),
    [
        ("fp32", 0, 1, 4 + 4 + 8),
        ("fp32", 0, 8, 4 + 4 + 8),
        ("fp32", 1, 8, 4 + 4 + (4 + 8) / 8),
        ("fp32", 2, 8, 4 + (4 + 4 + 8) / 8),
        ("fp32", 3, 8, (4 + 4 + 4 + 8) / 8),
        ("bf16", 1, 1, 2 + 2 + 4 + 4 + 8),
        ("bf16", 1, 8, 2 + 2 + 4 + (4 + 8) / 8),
        ("bf16", 2, 8, 2 + (4 + 4 + 8) / 8),
        ("bf16", 3, 8, (2 + 4 + 4 + 8) / 8),
    ],
)
def test_model_states_are_those_of_mixed_precision_adamw_shared_out_by_zero(
    precision: str, stage: int, count: int, bytes_a_parameter: float
) -> None:
    found = run(LLAMA_8B, workers=count, precision=precision)
    expected = bytes_a_parameter * found.student.parameters
    assert sum(model_states(found, stage)) == pytest.approx(expected)


def test_zero_table_1_is_reproduced_but_for_fp32_gradients() -> None:
    """Rajbhandari et al. 2020, figure 1: 7.5B parameters on 64 GPUs take 120, 31.4, 16.6 and 1.9 GB
    with gradients of 2 bytes; these take 4 more where they are whole, 2 where they are shared."""
    shape = replace(shape_of(LLAMA_8B), num_hidden_layers=1)
    billions = shape.parameters / 7.5e9
    found = Run(shape, training(precision="bf16", batch_size=64), 64, workers=64)
    more = {0: 4.0, 1: 4.0, 2: 2 / 64, 3: 2 / 64}
    table = {0: 120.0, 1: 31.4, 2: 16.6, 3: 1.9}
    for stage in STAGES:
        expected = (table[stage] + 7.5 * more[stage]) * billions * GB
        assert sum(model_states(found, stage)) == pytest.approx(expected, rel=0.02)


@given(st.sampled_from(["fp32", "bf16"]), st.integers(1, 6), st.booleans(), st.booleans())
@settings_of_hypothesis(max_examples=40, deadline=None)
def test_sharing_out_more_never_takes_more(
    precision: str, doublings: int, offload: bool, recompute: bool
) -> None:
    chosen = {"gradient_checkpointing": recompute, "zero_stage": 2, "offload_optimizer": offload}
    few = run(LLAMA_8B, precision=precision, batch_size=64, micro_batch_size=1, **chosen)
    many = replace(few, workers=2**doublings)
    for stage in STAGES[1:]:
        assert sum(model_states(many, stage)) <= sum(model_states(few, stage))
    assert sum(model_states(many, 3)) <= sum(model_states(many, 2)) <= sum(model_states(many, 1))


def test_a_gpu_hour_is_so_many_flops_at_the_stated_utilisation() -> None:
    assert estimate.gpu_hours(3600e15, peak_tflops=1000, utilisation=0.5) == pytest.approx(2)


def test_checkpointing_computes_every_layer_once_more() -> None:
    plain, again = run(SMALL), run(SMALL, gradient_checkpointing=True)
    assert estimate.recomputed_flops(plain) == 0
    tokens = 10 * 8 * 64
    expected = plain.student.forward_flops(tokens, 64, head=False)
    assert estimate.recomputed_flops(again) == expected


# --- the same numbers as what is run ---------------------------------------------------------


def test_constants_are_those_of_the_engine_and_the_stages() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    assert estimate.BUCKET == engine.BUCKET
    assert estimate.LOSS_CHUNK_TOKENS == losses.CHUNK_TOKENS
    zero = DeepSpeedZeroConfig()
    assert zero.max_live_parameters == estimate.LIVE_PARAMETERS
    assert zero.prefetch_bucket_size == estimate.PREFETCHED_PARAMETERS
    assert zero.sub_group_size == estimate.SUB_GROUP
    assert demand.BLOCKS_A_BATCH == evaluate.BLOCKS_A_BATCH
    assert demand.EVALUATED_LOGITS == evaluate.TOKENS_A_CHUNK
    assert demand.CACHED_LOGITS == cache.LOGITS_TOKENS
    assert demand.STREAM_BYTES == activations.STREAM_BYTES


@pytest.mark.parametrize(
    ("precision", "stage"),
    [*(("fp32", stage) for stage in (None, 0, 1, 2, 3)), *(("bf16", s) for s in (None, 1, 2, 3))],
)
def test_the_zero_stage_and_the_micro_batch_are_those_of_the_engine(
    precision: str, stage: int | None
) -> None:
    found = run(SMALL, workers=2, precision=precision, zero_stage=stage, micro_batch_size=None)
    assert found.zero_stage == engine.zero_stage(found.training)
    assert found.micro_batch_size == engine.micro_batch_size(found.training, 2)


# --- activations of real layers --------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in VARIANTS if not name.startswith("gemma2")])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_layer_keeps_what_is_estimated(name: str, precision: str) -> None:
    # Wide enough that matrices and not sums a head count; the difference of two depths is a layer.
    sizes = {"hidden_size": 64, "intermediate_size": 160}
    kept = []
    for layers in (1, 3):
        config = tiny_config(name) | sizes | {"num_hidden_layers": layers}
        config.pop("layer_types", None)
        model = checkpoints.new_model(config, seed=0).to(checkpoints.DTYPES[precision]).train()
        saved = Saved(model)
        with saved:
            hidden = checkpoints.final_hidden(model, torch.arange(2 * 32).view(2, 32) % 64)
        kept.append(saved.bytes)
        del hidden
    measured = (kept[1] - kept[0]) / 2 / (2 * 32)
    number = estimate.BYTES[precision]
    assert shape_of(config).kept_by_layer(number) / measured == pytest.approx(1, abs=0.15)


# --- whole steps of a real engine ------------------------------------------------------------


@pytest.fixture
def small_bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Buckets in proportion to a small model."""
    monkeypatch.setattr(engine, "BUCKET", 10_000)
    monkeypatch.setattr(estimate, "BUCKET", 10_000)
    yield


def tensors() -> dict[int, Tensor]:
    """All tensors that Python knows, gradients included, one for each storage."""
    gc.collect()
    found = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
    # Whatever was compiled in this process before has left some that have no bytes.
    found = [each for each in found if not isinstance(each, FakeTensor)]
    found += [each.grad for each in found if each.is_leaf and each.grad is not None]
    return {each.untyped_storage().data_ptr(): each for each in found}


def test_fake_tensors_that_others_left_are_not_counted() -> None:
    with FakeTensorMode():
        left = torch.zeros(3)
    assert not any(each is left for each in tensors().values())


def states_in_training(found: Run) -> int:
    """Bytes that a real engine holds between two steps' forward and backward passes, gradients
    included: what there is after the backward pass of a second step."""
    before = tensors()  # and they stay until the end, lest their addresses be given to others
    model = checkpoints.new_model(dict(found.student.config), seed=0)
    objective = LanguageModelling(model.to(checkpoints.DTYPES[found.training.precision]).train())
    engine._join_process_group()
    started = engine._start_engine(objective, found.training, found.micro_batch_size)
    try:
        ids_BL = torch.zeros(found.micro_batch_size, found.context, dtype=torch.long)
        blocks_B = torch.arange(found.micro_batch_size)
        steps = found.training.batch_size // (found.micro_batch_size * found.workers)
        for number in range(2 * steps):
            started.backward(started(ids_BL, blocks_B))
            if number < 2 * steps - 1:
                started.step()
        new = [each for place, each in tensors().items() if place not in before]
        return sum(each.untyped_storage().nbytes() for each in new)
    finally:
        started.destroy()


@pytest.mark.parametrize(
    ("precision", "stage"), [("fp32", 0), ("fp32", 3), ("bf16", 1), ("bf16", 2)]
)
@pytest.mark.usefixtures("small_bucket")
def test_a_real_engine_holds_the_model_states_that_are_estimated(
    precision: str, stage: int
) -> None:
    found = run(SMALL, 8, precision=precision, zero_stage=stage, batch_size=2)
    estimated = sum(model_states(found, stage))
    assert states_in_training(found) / estimated == pytest.approx(1, abs=0.1)


@pytest.mark.slow
def test_two_workers_hold_half_of_what_zero_2_shares_out(tmp_path: Path) -> None:
    line = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, *line, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(2):
        for stage, measured in json.loads((tmp_path / f"{rank}.json").read_text()).items():
            estimated = sum(model_states(_of_two(int(stage)), int(stage)))
            assert measured / estimated == pytest.approx(1, abs=0.1)


def _of_two(stage: int) -> Run:
    return run(SMALL, 8, 2, precision="bf16", zero_stage=stage, batch_size=4)


def _work(folder: Path) -> None:
    engine.BUCKET = 10_000
    workers.join()
    found = {stage: states_in_training(_of_two(stage)) for stage in (1, 2, 3)}
    (folder / f"{workers.rank_and_processes()[0]}.json").write_text(json.dumps(found))


# --- the fullest moment ----------------------------------------------------------------------

# One layer of Llama-3.1 8B's width, and of a student cut from it; blocks of 2,048 tokens.
WIDE = LLAMA_8B | {"num_hidden_layers": 2}
CUT = WIDE | {"hidden_size": 3072, "intermediate_size": 9216}


def fake_model(shape: Shape, precision: str) -> PreTrainedModel:
    settings = dict(shape.config)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    return AutoModelForCausalLM.from_config(config, dtype=checkpoints.DTYPES[precision])


def peak_of(found: Run, loss: DistillLoss) -> int:
    """Bytes at the fullest moment of a batch's second forward and backward pass, without running
    it: PyTorch's fake tensors have a size and no content."""
    with FakeTensorMode(), Meter() as meter:
        student = fake_model(found.student, found.training.precision).train()
        if found.training.engine.gradient_checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        assert found.teacher is not None
        teacher = fake_model(found.teacher, found.training.precision).eval()
        objective = Distillation(student, LiveTeacher(teacher), loss)
        ids_BL, blocks_B = torch.zeros(1, found.context, dtype=torch.long), torch.zeros(1)
        objective(ids_BL, blocks_B).backward()
        meter.peak = 0
        objective(ids_BL, blocks_B).backward()
    return meter.peak


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_fullest_moment_of_a_distillation_is_what_is_estimated(
    precision: str, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "ROWS_OF", 1 << 40)  # a GPU takes all of a chunk's logits at once
    found = Run(
        shape_of(CUT),
        training(precision=precision, gradient_checkpointing=recompute, micro_batch_size=1),
        2048,
        teacher=shape_of(WIDE),
    )
    expected = training_memory(found, 0)
    # Without an engine, there are gradients of the weights' precision and no optimizer.
    gradients = found.parameters * estimate.BYTES[precision]
    estimated = expected.total - expected.optimizer - expected.gradients + gradients
    assert estimated / peak_of(found, DistillLoss()) == pytest.approx(1, abs=0.1)


NEMOTRON = WIDE | {"model_type": "nemotron", "hidden_size": 3072, "intermediate_size": 12288}


@pytest.mark.parametrize("config", [WIDE, NEMOTRON], ids=["gated", "ungated"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_fullest_moment_of_a_forward_pass_is_what_is_estimated(
    config: dict[str, Any], precision: str
) -> None:
    shape = shape_of(config)
    with FakeTensorMode(), Meter() as meter, torch.no_grad():
        model = fake_model(shape, precision).eval()
        meter.peak = 0
        checkpoints.final_hidden(model, torch.zeros(4, 2048, dtype=torch.long))
    estimated = estimate.forward_memory([shape], precision, 4 * 2048)
    assert estimated.total / meter.peak == pytest.approx(1, abs=0.08)


# --- what helps ------------------------------------------------------------------------------


def student_of_8b(count: int = 64, **changes: Any) -> Run:
    """4.5B parameters in blocks of 8,192 tokens, beside the 8B that teaches it."""
    usual = {"precision": "bf16", "batch_size": 1152, "micro_batch_size": 1, "steps": 100}
    shape = shape_of(LLAMA_8B | {"hidden_size": 3072, "intermediate_size": 9216})
    return Run(shape, training(**{**usual, **changes}), 8192, count, shape_of(LLAMA_8B))


def test_what_fits_needs_nothing_else_and_what_is_offered_fits() -> None:
    found = student_of_8b()
    for room in (150, 100, 80, 70, 60, 50, 40, 30, 20):
        offered = remedy(found, room * GB, SampledCache())
        if offered is not None:
            assert training_memory(under(found, offered.settings)).total <= room * GB
            assert offered.memory == training_memory(under(found, offered.settings))


def test_no_setting_is_offered_that_is_not_needed() -> None:
    found = student_of_8b()
    for room in (80, 60, 40, 30, 20):
        offered = remedy(found, room * GB, SampledCache())
        for dotted in offered.settings if offered else ():
            fewer = {key: value for key, value in offered.settings.items() if key != dotted}
            assert training_memory(under(found, fewer)).total > room * GB


def helps(found: Run, cached: SampledCache | HiddenCache | None = None) -> list[str]:
    """The settings that are offered as the GPU gets smaller, from what just does not fit."""
    room, names = training_memory(found).total, list[str]()
    while offered := remedy(found, 0.999 * room, cached):
        names += [name for name in offered.settings if name not in names]
        room = offered.memory.total
    return names


def test_the_cheapest_setting_comes_first() -> None:
    names = helps(student_of_8b(count=8), SampledCache())
    assert names[:2] == ["training.engine.zero_stage", "training.engine.gradient_checkpointing"]
    assert set(names) == {
        "training.engine.zero_stage",
        "training.engine.gradient_checkpointing",
        "training.engine.shard_teacher",
        "signal",
        "training.engine.offload_optimizer",
        "resources.workers",
    }


def test_smaller_micro_batches_come_before_all_else() -> None:
    found = student_of_8b(micro_batch_size=9)
    offered = remedy(found, training_memory(found).total - 1, SampledCache())
    assert offered is not None and offered.settings == {"training.micro_batch_size": 6}


def test_more_workers_still_share_the_batch_evenly() -> None:
    everything = {"zero_stage": 3, "gradient_checkpointing": True, "offload_optimizer": True}
    found = student_of_8b(count=2, micro_batch_size=3, batch_size=36, **everything)
    found = replace(found, signal=SampledCache())
    room = training_memory(under(found, {"training.micro_batch_size": 1})).total
    offered = remedy(found, room - 1)
    assert offered is not None and "resources.workers" in offered.settings
    better = under(found, offered.settings)
    assert better.training.batch_size % (better.workers * better.micro_batch_size) == 0


def test_where_nothing_helps_nothing_is_offered() -> None:
    assert remedy(student_of_8b(), 1 * GB, SampledCache()) is None


def test_a_cached_teacher_takes_no_more_than_its_output_head() -> None:
    live = replace(student_of_8b(), signal=LiveSignal())
    teacher = shape_of(LLAMA_8B)
    head = 2 * teacher.vocab_size * teacher.hidden_size
    states = 2 * live.tokens * teacher.hidden_size
    assert training_memory(live).teacher == 2 * teacher.parameters + states
    assert training_memory(replace(live, signal=HiddenCache())).teacher == head + states
    assert training_memory(replace(live, signal=SampledCache())).teacher == 0


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
