"""The training loop: what a plain PyTorch loop would do, and the same after any interruption."""

from __future__ import annotations

import errno
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from torch import Tensor, nn

from trainers import checkpoints, corpus, correct, distill, engine, pretrain
from trainers.config import (
    CorrectConfig,
    DistillConfig,
    EngineSettings,
    GeneratedCorpus,
    LlamaShape,
    PretrainConfig,
    Training,
)
from trainers.contract import Interrupted, Runtime, Silent, StageContext, StageError
from trainers.pretrain import LanguageModelling

WORDS, LENGTH = 13, 6
BLOCKS = torch.randint(WORDS, (21, LENGTH), generator=torch.Generator().manual_seed(5))
NEVER, ALWAYS = 1e9, 0.0


class Bigram(nn.Module):
    """The smallest language model: the next word from the last one alone."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(WORDS, WORDS)

    def forward(self, ids_BL: Tensor, blocks_B: Tensor) -> Tensor:
        return F.cross_entropy(self.table(ids_BL[:, :-1]).flatten(0, 1), ids_BL[:, 1:].flatten())


def settings_of(**changes: Any) -> Training:
    usual = {
        "steps": 12,
        "batch_size": 4,
        "learning_rate": 0.05,
        "minimum_learning_rate": 0.01,
        "warmup_steps": 3,
        "weight_decay": 0.1,
    }
    return Training(**{**usual, **changes})


@dataclass
class StopAt:
    """A reporter that lets `error` out of one step."""

    step: int
    error: BaseException
    done: list[int] = field(default_factory=list)

    def report(self, done: int, total: int, values: Mapping[str, float]) -> None:
        self.done.append(done)
        if done == self.step:
            raise self.error


def train(
    objective: nn.Module,
    training: Training,
    out: Path,
    reporter: Any = None,
    checkpoint_every_s: float = NEVER,
    blocks: Tensor = BLOCKS,
) -> engine.Trained:
    out.mkdir(exist_ok=True, parents=True)
    runtime = Runtime(checkpoint_every_s=checkpoint_every_s)
    return engine.train(objective, blocks, training, 7, out, reporter or Silent(), runtime)


def curve(out: Path, name: str = "loss") -> list[tuple[int, int, float]]:
    rows = [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]
    return [(row["step"], row["tokens"], row["value"]) for row in rows if row["name"] == name]


def losses(out: Path) -> list[float]:
    return [value for _, _, value in curve(out)]


# --- the schedule ----------------------------------------------------------------------------


def test_the_learning_rate_warms_up_to_its_peak_and_falls_to_its_minimum() -> None:
    training = settings_of(
        steps=9, warmup_steps=4, learning_rate=1.0, minimum_learning_rate=0.2, batch_size=1
    )
    found = [engine.learning_rate_factor(step, training) for step in range(9)]
    warm_up = [0.25, 0.5, 0.75, 1.0]
    # A quarter, a half and three quarters of the way down: 0.2 + 0.8 * (1 + cos(pi x)) / 2.
    half_cosine = [
        1.0,
        0.2 + 0.4 * (1 + math.sqrt(0.5)),
        0.6,
        0.2 + 0.4 * (1 - math.sqrt(0.5)),
        0.2,
    ]
    assert found == pytest.approx(warm_up + half_cosine)


@given(st.integers(1, 300), st.data())
@settings(max_examples=60, deadline=None)
def test_the_learning_rate_never_leaves_its_bounds(steps: int, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(0, steps - 1))
    floor = data.draw(st.floats(0, 1))
    training = settings_of(
        steps=steps, warmup_steps=warmup, learning_rate=1.0, minimum_learning_rate=floor
    )
    factors = [engine.learning_rate_factor(step, training) for step in range(steps)]
    assert max(factors) == pytest.approx(1.0)
    assert all(0 < factor <= 1 for factor in factors[:warmup])
    assert all(floor - 1e-12 <= factor <= 1 for factor in factors[warmup:])
    if steps - warmup > 1:
        assert factors[-1] == pytest.approx(floor)


def test_the_curve_tells_the_learning_rate_that_each_step_used(tmp_path: Path) -> None:
    training = settings_of()
    train(Bigram(), training, tmp_path)
    rates = [value for _, _, value in curve(tmp_path, "learning_rate")]
    factors = [engine.learning_rate_factor(step, training) for step in range(training.steps)]
    assert rates == pytest.approx([factor * training.learning_rate for factor in factors])


# --- the step --------------------------------------------------------------------------------


def plain_adamw_losses(objective: nn.Module, training: Training, blocks: Tensor) -> list[float]:
    """The same training as a PyTorch user would write it down, without any engine."""
    optimizer = torch.optim.AdamW(
        objective.parameters(),
        lr=training.learning_rate,
        betas=(training.beta1, training.beta2),
        weight_decay=training.weight_decay,
    )
    found = []
    for step in range(training.steps):
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * engine.learning_rate_factor(step, training)
        numbers_B = corpus.batch_blocks(len(blocks), step, training.batch_size, 7)
        loss = objective(blocks[numbers_B], numbers_B)
        loss.backward()
        if training.gradient_clip:
            torch.nn.utils.clip_grad_norm_(objective.parameters(), training.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("clip", [0.0, 0.05, 1.0])
def test_a_deepspeed_step_equals_a_plain_adamw_step(tmp_path: Path, clip: float) -> None:
    training = settings_of(gradient_clip=clip)
    ours, naive = Bigram(), Bigram()
    trained = train(ours, training, tmp_path)
    expected = plain_adamw_losses(naive, training, BLOCKS)
    assert losses(tmp_path) == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(ours.table.weight, naive.table.weight, rtol=0, atol=1e-5)
    assert trained.steps == 12
    assert trained.tokens == 12 * 4 * LENGTH
    assert trained.final_loss == pytest.approx(expected[-1], abs=1e-5)


def test_a_transformer_trains_as_with_a_plain_adamw_loop(
    tmp_path: Path, tiny_config: dict[str, Any]
) -> None:
    blocks = torch.randint(tiny_config["vocab_size"], (9, 10))
    training = settings_of(steps=6, learning_rate=2e-3, minimum_learning_rate=0.0)
    ours, naive = (
        LanguageModelling(checkpoints.new_model(tiny_config, seed=3).train()) for _ in range(2)
    )
    train(ours, training, tmp_path, blocks=blocks)
    expected = plain_adamw_losses(naive, training, blocks)
    assert losses(tmp_path) == pytest.approx(expected, abs=1e-5)
    assert expected[-1] < expected[0]


def test_clipping_changes_what_is_learned(tmp_path: Path) -> None:
    for name, clip in (("none", 0.0), ("hard", 1e-9)):
        train(Bigram(), settings_of(gradient_clip=clip, weight_decay=0.0), tmp_path / name)
    # Clipped to less than Adam's epsilon, a gradient moves next to nothing.
    assert losses(tmp_path / "none")[-1] < losses(tmp_path / "hard")[-1] - 0.1


@pytest.mark.parametrize("micro", [1, 2])
def test_accumulated_micro_batches_equal_the_full_batch(tmp_path: Path, micro: int) -> None:
    full, parts = Bigram(), Bigram()
    train(full, settings_of(), tmp_path / "full")
    train(parts, settings_of(micro_batch_size=micro), tmp_path / "parts")
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "full"), abs=1e-6)
    torch.testing.assert_close(parts.table.weight, full.table.weight, rtol=0, atol=1e-6)


def test_the_same_seed_trains_the_same_model_and_another_reads_in_another_order(
    tmp_path: Path,
) -> None:
    once, again, other = Bigram(), Bigram(), Bigram()
    train(once, settings_of(), tmp_path / "once")
    train(again, settings_of(), tmp_path / "again")
    other_order = tmp_path / "other"
    other_order.mkdir()
    engine.train(other, BLOCKS, settings_of(), 8, other_order, Silent(), Runtime())
    assert torch.equal(once.table.weight, again.table.weight)
    assert losses(tmp_path / "once") == losses(tmp_path / "again")
    assert not torch.equal(once.table.weight, other.table.weight)


# --- stopping and going on -------------------------------------------------------------------


def stopped_and_resumed(
    start: Callable[[], nn.Module],
    training: Training,
    out: Path,
    stops: list[tuple[int, BaseException]],
    checkpoint_every_s: float,
) -> tuple[nn.Module, engine.Trained]:
    """Run, let each stop happen, and start from nothing again each time, as a new process does."""
    for step, error in stops:
        with pytest.raises(type(error)):
            train(start(), training, out, StopAt(step, error), checkpoint_every_s)
    objective = start()
    return objective, train(objective, training, out, None, checkpoint_every_s)


def assert_undisturbed(
    found: tuple[nn.Module, engine.Trained], out: Path, training: Training, undisturbed: Path
) -> None:
    whole = Bigram()
    trained = train(whole, training, undisturbed)
    objective, resumed = found
    assert resumed == trained
    assert torch.equal(objective.table.weight, whole.table.weight)
    for name in ("loss", "learning_rate"):
        assert curve(out, name) == curve(undisturbed, name)


@given(stops=st.lists(st.integers(1, 229), min_size=1, max_size=3, unique=True).map(sorted))
@settings(max_examples=4, deadline=None)
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(
    tmp_path_factory: pytest.TempPathFactory, stops: list[int]
) -> None:
    # More steps than the curve has points: a stop may fall between two of them.
    training = settings_of(steps=230)
    folder = tmp_path_factory.mktemp("interrupted")
    found = stopped_and_resumed(
        Bigram, training, folder / "out", [(stop, Interrupted()) for stop in stops], NEVER
    )
    assert_undisturbed(found, folder / "out", training, folder / "undisturbed")


@given(stops=st.lists(st.integers(1, 11), min_size=1, max_size=2, unique=True).map(sorted))
@settings(max_examples=4, deadline=None)
def test_a_killed_run_goes_on_from_its_last_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, stops: list[int]
) -> None:
    training = settings_of(steps=12, micro_batch_size=2)
    folder = tmp_path_factory.mktemp("killed")
    kills: list[tuple[int, BaseException]] = [(stop, RuntimeError("killed")) for stop in stops]
    found = stopped_and_resumed(Bigram, training, folder / "out", kills, ALWAYS)
    assert_undisturbed(found, folder / "out", training, folder / "undisturbed")


def test_a_killed_run_repeats_only_the_step_after_its_last_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        train(Bigram(), settings_of(), tmp_path, StopAt(5, RuntimeError()), ALWAYS)
    heard = StopAt(-1, RuntimeError())
    train(Bigram(), settings_of(), tmp_path, heard)
    assert heard.done == [5, 6, 7, 8, 9, 10, 11, 12]


def test_a_half_written_checkpoint_is_removed_and_not_gone_on_from(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(Bigram(), settings_of(), tmp_path / "out", StopAt(4, Interrupted()))
    # A kill during a save leaves a folder that `whole` does not name yet.
    torn = tmp_path / "out" / "checkpoints" / "step5"
    torn.mkdir()
    (torn / "mp_rank_00_model_states.pt").write_bytes(b"half of")
    heard = StopAt(5, RuntimeError("killed"))
    with pytest.raises(RuntimeError, match="killed"):
        train(Bigram(), settings_of(), tmp_path / "out", heard)
    assert heard.done == [5]
    kept = [path.name for path in (tmp_path / "out" / "checkpoints").glob("step*")]
    assert kept == ["step4"], "no save succeeded since, and the disk may be full"
    objective = Bigram()
    trained = train(objective, settings_of(), tmp_path / "out")
    assert_undisturbed(
        (objective, trained), tmp_path / "out", settings_of(), tmp_path / "undisturbed"
    )


def test_a_kill_between_curve_and_checkpoint_leaves_no_point_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = engine.deepspeed.DeepSpeedEngine.save_checkpoint

    def killed_at_4(self: Any, folder: str, tag: str, **rest: Any) -> Any:
        if tag == "step4":
            raise RuntimeError("killed")
        return save(self, folder, tag=tag, **rest)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(engine.deepspeed.DeepSpeedEngine, "save_checkpoint", killed_at_4)
        train(Bigram(), settings_of(), tmp_path / "out", None, ALWAYS)
    assert [step for step, _, _ in curve(tmp_path / "out")] == [1, 2, 3, 4]
    objective, heard = Bigram(), StopAt(-1, RuntimeError())
    trained = train(objective, settings_of(), tmp_path / "out", heard)
    assert heard.done[0] == 4, "the checkpoint of step 3 is as good as it was"
    assert_undisturbed(
        (objective, trained), tmp_path / "out", settings_of(), tmp_path / "undisturbed"
    )


@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "random0.pt", "curve.jsonl"])
def test_a_damaged_checkpoint_is_noticed_and_the_run_starts_anew(
    tmp_path: Path, name: str, how: str
) -> None:
    with pytest.raises(Interrupted):
        train(Bigram(), settings_of(), tmp_path / "out", StopAt(5, Interrupted()))
    file = tmp_path / "out" / "checkpoints" / "step5" / name
    whole = file.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    file.write_bytes(flipped if how == "flip" else whole[:middle])
    if how == "remove":
        file.unlink()
    objective, heard = Bigram(), StopAt(-1, RuntimeError())
    trained = train(objective, settings_of(), tmp_path / "out", heard)
    assert heard.done[0] == 1
    found, undisturbed = (objective, trained), tmp_path / "undisturbed"
    assert_undisturbed(found, tmp_path / "out", settings_of(), undisturbed)


@pytest.mark.parametrize("said", ["", "step", "..", "\x00\x00"])
def test_a_note_of_the_last_checkpoint_that_names_none_is_noticed(
    tmp_path: Path, said: str
) -> None:
    with pytest.raises(Interrupted):
        train(Bigram(), settings_of(), tmp_path / "out", StopAt(5, Interrupted()))
    (tmp_path / "out" / "checkpoints" / "whole").write_text(said)
    objective, heard = Bigram(), StopAt(-1, RuntimeError())
    trained = train(objective, settings_of(), tmp_path / "out", heard)
    assert heard.done[0] == 1
    found, undisturbed = (objective, trained), tmp_path / "undisturbed"
    assert_undisturbed(found, tmp_path / "out", settings_of(), undisturbed)


def test_one_checkpoint_is_kept_until_it_is_forgotten(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    class Watch:
        def report(self, done: int, total: int, values: Mapping[str, float]) -> None:
            seen.append(sorted(path.name for path in (tmp_path / "checkpoints").glob("step*")))

    train(Bigram(), settings_of(steps=5), tmp_path, Watch(), ALWAYS)
    assert seen == [[], ["step1"], ["step2"], ["step3"], ["step4"]]
    assert (tmp_path / "checkpoints" / "whole").read_text() == "step4"
    engine.forget(tmp_path)
    assert not (tmp_path / "checkpoints").exists()


CORPUS = GeneratedCorpus(block_length=12, training_blocks=21)
SHAPE = LlamaShape(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
)
STAGES: dict[ModuleType, BaseModel] = {
    pretrain: PretrainConfig(shape=SHAPE, corpus=CORPUS, training=settings_of()),
    correct: CorrectConfig(corpus=CORPUS, training=settings_of()),
    distill: DistillConfig(corpus=CORPUS, training=settings_of()),
}
"""Every stage that trains."""


@pytest.mark.parametrize("stage", STAGES)
def test_a_training_whose_model_cannot_be_saved_repeats_one_interval_at_most(
    tmp_path: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch, stage: ModuleType
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def run(out: Path) -> list[int]:
        out.mkdir(exist_ok=True)
        heard, runtime = StopAt(-1, Interrupted()), Runtime(checkpoint_every_s=ALWAYS)
        stage.run(StageContext(STAGES[stage], inputs, out, 3, heard, runtime))
        return heard.done

    inputs = {"model": artifact, "teacher": artifact}
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(stage, "save_model", full)
        run(tmp_path / "out")
    assert run(tmp_path / "out") == [settings_of().steps], "all but the last step was saved"
    assert not (tmp_path / "out" / "checkpoints").exists()
    run(tmp_path / "undisturbed")
    weights = "model/model.safetensors"
    found, expected = (tmp_path / name / weights for name in ("out", "undisturbed"))
    assert found.read_bytes() == expected.read_bytes()


def test_bf16_goes_on_exactly_too(tmp_path: Path) -> None:
    training = settings_of(precision="bf16")

    def start() -> nn.Module:
        return Bigram().bfloat16()

    objective, resumed = stopped_and_resumed(
        start, training, tmp_path / "out", [(5, Interrupted())], NEVER
    )
    whole = start()
    assert train(whole, training, tmp_path / "undisturbed") == resumed
    assert torch.equal(objective.table.weight, whole.table.weight)
    assert curve(tmp_path / "out") == curve(tmp_path / "undisturbed")


class Noisy(Bigram):
    """A model that draws from every source of random numbers in every call."""

    def forward(self, ids_BL: Tensor, blocks_B: Tensor) -> Tensor:
        drawn = float(torch.rand(())) + float(np.random.rand()) + random.random()
        return super().forward(ids_BL, blocks_B) * (1 + drawn)


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    def start(shuffle: int) -> Noisy:
        objective = Noisy()
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(shuffle)
        return objective

    whole = start(1)
    trained = train(whole, settings_of(), tmp_path / "undisturbed")
    with pytest.raises(Interrupted):
        train(start(1), settings_of(), tmp_path / "out", StopAt(5, Interrupted()))
    objective = start(2)  # a new process draws other numbers
    assert train(objective, settings_of(), tmp_path / "out") == trained
    assert torch.equal(objective.table.weight, whole.table.weight)
    assert curve(tmp_path / "out") == curve(tmp_path / "undisturbed")


# --- what the loss is made of ------------------------------------------------------------------


class InParts(Bigram):
    """A loss that tells its halves: the means of what was seen since it was last asked."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def forward(self, ids_BL: Tensor, blocks_B: Tensor) -> Tensor:
        loss = super().forward(ids_BL, blocks_B)
        self.seen.append(loss.item())
        return loss

    def parts(self) -> dict[str, float]:
        mean = sum(self.seen) / len(self.seen)
        self.seen.clear()
        return {"third": mean / 3, "rest": mean * 2 / 3}


def test_the_parts_of_a_loss_enter_the_curve_and_survive_a_stop(tmp_path: Path) -> None:
    training = settings_of(steps=230, micro_batch_size=2)
    train(InParts(), training, tmp_path / "undisturbed")
    whole = losses(tmp_path / "undisturbed")
    for name, share in (("third", 1 / 3), ("rest", 2 / 3)):
        found = [value for _, _, value in curve(tmp_path / "undisturbed", name)]
        assert found == pytest.approx([share * loss for loss in whole])
    # Between two points of the curve, which has one every second step.
    with pytest.raises(Interrupted):
        train(InParts(), training, tmp_path / "out", StopAt(91, Interrupted()))
    train(InParts(), training, tmp_path / "out")
    assert curve(tmp_path / "out", "third") == curve(tmp_path / "undisturbed", "third")


def test_the_objective_is_told_which_blocks_it_sees(tmp_path: Path) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    class Watch(Bigram):
        def forward(self, ids_BL: Tensor, blocks_B: Tensor) -> Tensor:
            seen.append((ids_BL, blocks_B))
            return super().forward(ids_BL, blocks_B)

    train(Watch(), settings_of(micro_batch_size=2), tmp_path)
    assert len(seen) == 24
    for ids_BL, blocks_B in seen:
        assert blocks_B.dtype == torch.int64
        assert torch.equal(ids_BL, BLOCKS[blocks_B])


# --- settings of the engine --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "expected"),
    [(8, None, 1, 8), (8, None, 2, 4), (8, 2, 4, 2), (8, 1, 8, 1)],
)
def test_each_worker_takes_its_share_of_the_global_batch(
    batch: int, micro: int | None, processes: int, expected: int
) -> None:
    training = settings_of(batch_size=batch, micro_batch_size=micro)
    assert engine.micro_batch_size(training, processes) == expected


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "message"),
    [
        (8, None, 3, "batch_size 8 cannot be shared by 3 workers: .* a multiple of 3, such as 6"),
        (2, None, 4, "a multiple of 4, such as 4"),
        (12, 4, 2, r"micro_batch_size 4 does not divide the 6 .* allowed: \[1, 2, 3, 6\]"),
    ],
)
def test_a_batch_that_cannot_be_shared_says_what_is_allowed(
    batch: int, micro: int | None, processes: int, message: str
) -> None:
    training = settings_of(batch_size=batch, micro_batch_size=micro)
    with pytest.raises(StageError, match=message):
        engine.micro_batch_size(training, processes)


@pytest.mark.parametrize(
    ("precision", "asked", "stage"), [("fp32", None, 0), ("bf16", None, 1), ("bf16", 3, 3)]
)
def test_bf16_is_trained_under_zero_1_unless_a_stage_is_asked_for(
    precision: str, asked: int | None, stage: int
) -> None:
    training = settings_of(precision=precision, engine=EngineSettings(zero_stage=asked))
    assert engine.deepspeed_config(training, 1)["zero_optimization"]["stage"] == stage


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_liger_without_a_gpu_says_what_is_missing(
    tmp_path: Path, tiny_config: dict[str, Any]
) -> None:
    objective = LanguageModelling(checkpoints.new_model(tiny_config, seed=3).train())
    training = settings_of(engine=EngineSettings(liger=True))
    with pytest.raises(StageError, match=r"engine\.liger needs a GPU"):
        train(objective, training, tmp_path)


LIGER = """\
from transformers.models.llama import modeling_llama

def to_llama(model):
    modeling_llama.apply_rotary_pos_emb = None
    modeling_llama.LlamaMLP = None
    model.patched = True

MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": to_llama}

def _apply_liger_kernel_to_instance(model):
    MODEL_TYPE_TO_APPLY_LIGER_FN[model.config.model_type](model)
"""


def test_liger_changes_the_model_at_hand_and_no_other_and_refuses_what_it_does_not_know(
    tmp_path: Path, tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in that patches as Liger does, which runs on a GPU alone."""
    package = tmp_path / "liger_kernel" / "transformers"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "monkey_patch.py").write_text(LIGER)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = checkpoints.new_model(tiny_config, seed=3)
    before = dict(vars(sys.modules[type(model).__module__]))
    engine._use_liger(model)
    assert model.patched is True
    assert vars(sys.modules[type(model).__module__]) == before
    model.config.model_type = "nemotron"
    with pytest.raises(StageError, match="knows no nemotron; it knows llama"):
        engine._use_liger(model)


@pytest.mark.slow
def test_compiled_layers_train_the_same(tmp_path: Path, tiny_config: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(tiny_config["vocab_size"], (9, 10), generator=generator)
    for name, chosen in (("plain", False), ("compiled", True)):
        objective = LanguageModelling(checkpoints.new_model(tiny_config, seed=3).train())
        training = settings_of(engine=EngineSettings(compile=chosen))
        torch._dynamo.utils.counters.clear()
        train(objective, training, tmp_path / name, blocks=blocks)
        assert bool(torch._dynamo.utils.counters["stats"]["calls_captured"]) == chosen
    # Fused kernels round otherwise, and a dozen steps at a high rate carry that on.
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=2e-4)


SHAPES = """
import json, sys, torch
from functools import partial
from trainers import checkpoints, engine

torch.compile = partial(torch.compile, backend="eager")
for width in range(8, 48, 4):
    config = json.loads(sys.argv[1]) | {"intermediate_size": width}
    model = checkpoints.new_model(config, seed=0)
    engine._compile_layers(model)
    model(torch.arange(6)[None], use_cache=False)
print(torch._dynamo.utils.counters["stats"]["unique_graphs"])
"""


def test_a_process_keeps_compiling_however_many_shapes_it_meets(
    tiny_config: dict[str, Any],
) -> None:
    # In a process of its own: what was compiled, and how, stays with a process.
    command = [sys.executable, "-c", SHAPES, json.dumps(tiny_config)]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    compiled = int(found.stdout.splitlines()[-1])
    assert compiled == 10 > 8, "eight is what PyTorch keeps by itself"


# --- numbers gone wrong, and few bits --------------------------------------------------------


class NanAt(Bigram):
    """A model whose loss leaves the numbers at one of its calls."""

    def __init__(self, call: int) -> None:
        super().__init__()
        self.call, self.calls = call, 0

    def forward(self, ids_BL: Tensor, blocks_B: Tensor) -> Tensor:
        self.calls += 1
        loss = super().forward(ids_BL, blocks_B)
        return loss * math.nan if self.calls == self.call else loss


@pytest.mark.parametrize(("micro", "call"), [(None, 3), (2, 6), (2, 5)])
def test_a_loss_that_is_not_a_number_stops_the_stage_and_names_the_step(
    tmp_path: Path, micro: int | None, call: int
) -> None:
    with pytest.raises(StageError, match=r"nan at step 3$"):
        train(NanAt(call), settings_of(micro_batch_size=micro), tmp_path, None, ALWAYS)
    assert (tmp_path / "checkpoints" / "whole").read_text() == "step2"


class Drift(nn.Module):
    """Weights of one whose every gradient is one, so that each step takes off the learning rate."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))

    def forward(self, ids_BL: Tensor, blocks_B: Tensor) -> Tensor:
        return self.weight.sum()


def test_bf16_keeps_master_weights_that_small_updates_add_up_in(tmp_path: Path) -> None:
    rate, steps = 1e-3, 100
    training = settings_of(
        steps=steps,
        learning_rate=rate,
        minimum_learning_rate=rate,
        warmup_steps=0,
        weight_decay=0.0,
        precision="bf16",
    )
    one = torch.ones((), dtype=torch.bfloat16)
    assert one - rate == one, "a single update must be lost in bf16 for this test to mean anything"
    objective = Drift().bfloat16()
    train(objective, training, tmp_path)
    expected = torch.full((64,), 1 - rate * steps)
    torch.testing.assert_close(objective.weight.float(), expected, rtol=0, atol=4e-3)


def test_bf16_learns_nearly_as_fp32_does(tmp_path: Path) -> None:
    for precision in ("fp32", "bf16"):
        objective = Bigram().to(checkpoints.DTYPES[precision])
        train(objective, settings_of(steps=60, precision=precision), tmp_path / precision)
    full, half = losses(tmp_path / "fp32"), losses(tmp_path / "bf16")
    assert half == pytest.approx(full, abs=0.05)
    assert full[-1] < full[0] - 0.3


def test_a_long_curve_has_about_a_hundred_points_that_are_means(tmp_path: Path) -> None:
    training = settings_of(steps=250)
    each: list[float] = []

    class Listen:
        def report(self, done: int, total: int, values: Mapping[str, float]) -> None:
            each.append(values["loss"])

    train(Bigram(), training, tmp_path, Listen())
    points = curve(tmp_path)
    assert len(points) == 125
    assert [value for _, _, value in points] == pytest.approx(
        [(each[place] + each[place + 1]) / 2 for place in range(0, 250, 2)]
    )
    assert [(step, tokens) for step, tokens, _ in points[:2]] == [(2, 48), (4, 96)]
