"""The stage `cache`: what it keeps is what the teacher says, whenever it says it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import MakeContext, SaveArtifact
from families_at_hand import tiny_model
from pydantic import ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from trainers import cache, checkpoints, corpus, distill, language, surgery
from trainers.config import (
    CacheConfig,
    DistillConfig,
    DistillLoss,
    GeneratedCorpus,
    HiddenCache,
    HiddenLoss,
    LiveSignal,
    SampledCache,
    TopKCache,
    Training,
)
from trainers.contract import Interrupted, StageError, read_rows
from trainers.shapes import cache_bytes, shape_of
from trainers.signals import open_cache
from trainers.teacher import DenseTargets, LiveTeacher, OutputHead, SparseTargets

CORPUS = GeneratedCorpus(block_length=16, training_blocks=40)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four blocks a chunk."""
    monkeypatch.setattr("trainers.shapes.CHUNK_TOKENS", 4 * 16)


def config_of(signal: Any = None, **how: Any) -> CacheConfig:
    settings = {"steps": 5, "batch_size": 3} | how
    return CacheConfig(corpus=CORPUS, signal=signal or HiddenCache(), **settings)


def step_of(artifact: Path, step: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The token ids and numbers of the blocks that a training step of `config_of()` reads."""
    blocks_NL = corpus.blocks(CORPUS, artifact / "model", "training")
    numbers_B = corpus.batch_blocks(len(blocks_NL), step, 3, seed)
    return blocks_NL[numbers_B], numbers_B


def naive_logits(model: PreTrainedModel, input_ids_BL: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids_BL).logits[:, :-1].flatten(0, 1)


# --- hidden states ---------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_hidden_cache_is_what_the_live_teacher_says_bit_by_bit(
    artifact: Path, make_context: MakeContext, precision: str
) -> None:
    states = ("attention.1", "embedding", "input.2", "output.3")
    config = config_of(states=states, precision=precision)
    context = make_context(config, model=artifact)
    cache.run(context)
    live = LiveTeacher(checkpoints.load_model(artifact / "model", precision), states)
    blocks_NL = corpus.blocks(CORPUS, artifact / "model", "training")
    drawn_B = corpus.drawn_blocks(40, 5, 3, 0)
    for numbers_B in torch.split(drawn_B, 4):  # as they were computed: batches change roundings
        expected = live.targets(blocks_NL[numbers_B], numbers_B)
        found = open_cache(context.out, HiddenCache()).targets(blocks_NL[numbers_B], numbers_B)
        assert isinstance(found, DenseTargets)
        assert torch.equal(found.hidden_ND, expected.hidden_ND)
        assert torch.equal(found.logits(slice(3, 9)), expected.logits(slice(3, 9)))
        assert set(found.states) == set(states)
        for name in states:
            assert torch.equal(found.states[name], expected.states[name])


@pytest.mark.parametrize("family", ["llama", "gemma2", "nemotron", "gpt_neox"])
def test_its_logits_are_the_models_at_every_temperature(
    save_artifact: SaveArtifact, make_context: MakeContext, family: str
) -> None:
    small = tiny_model(family).config.to_dict() | {"vocab_size": len(language.WORDS)}
    artifact = save_artifact(checkpoints.new_model(small, seed=1))
    context = make_context(config_of(), model=artifact)
    cache.run(context)
    model = checkpoints.load_model(artifact / "model")
    for step in range(5):
        input_ids_BL, numbers_B = step_of(artifact, step)
        found = open_cache(context.out, HiddenCache()).targets(input_ids_BL, numbers_B)
        assert isinstance(found, DenseTargets)
        logits = found.logits(slice(0, 1000))
        for temperature in (0.1, 1.0, 3.0):
            torch.testing.assert_close(
                (logits / temperature).softmax(-1),
                (naive_logits(model, input_ids_BL) / temperature).softmax(-1),
                rtol=1e-4,
                atol=1e-6,
            )


# --- samples ---------------------------------------------------------------------------------


def targets_of(logits_NV: Tensor) -> DenseTargets:
    """Targets with these logits."""
    return DenseTargets(logits_NV, {}, OutputHead(torch.eye(logits_NV.shape[-1])))


def test_samples_give_the_gradient_of_the_forward_kl_on_average() -> None:
    torch.manual_seed(0)
    teacher_NV, student_NV = 2 * torch.randn(6, 9), torch.randn(6, 9)
    student_NV.requires_grad_()
    kl = F.kl_div(
        student_NV.log_softmax(-1), teacher_NV.log_softmax(-1), log_target=True, reduction="sum"
    )
    (exact,) = torch.autograd.grad(kl, student_NV)
    found, draws = torch.zeros_like(exact), 0
    for seed in range(400):
        uniform_NK = cache.uniform(torch.tensor([3, 7]), 3, 5, seed)
        ids_NK = cache.sampled(targets_of(teacher_NV), uniform_NK)["ids"]
        loss = -student_NV.log_softmax(-1).gather(-1, ids_NK).mean(-1).sum()
        found += torch.autograd.grad(loss, student_NV)[0]
        draws += 5
    deviation = (teacher_NV.softmax(-1) * (1 - teacher_NV.softmax(-1)) / draws).sqrt()
    assert ((found / 400 - exact).abs() < 4.5 * deviation + 1e-6).all()
    assert (deviation < 0.012).all()  # so the bound is a narrow one


def test_an_impossible_token_is_never_drawn_and_a_certain_one_always() -> None:
    logits_NV = torch.full((4, 5), -1e9)
    logits_NV[:, 2] = 0
    uniform_NK = torch.tensor([[0.0, 0.5, 1 - 2**-53]], dtype=torch.float64).expand(4, 3)
    assert (cache.sampled(targets_of(logits_NV), uniform_NK)["ids"] == 2).all()


def test_positions_samples_blocks_and_seeds_have_draws_of_their_own() -> None:
    numbers = torch.cat([cache.uniform(torch.tensor([0, 1, 2]), 4, 5, seed) for seed in (0, 1)])
    assert numbers.flatten().unique().numel() == 2 * 3 * 4 * 5


def tokens_of(folder: Path, signal: Any, batch: tuple[Tensor, Tensor]) -> SparseTargets:
    found = open_cache(folder, signal).targets(*batch)
    assert isinstance(found, SparseTargets)
    return found


def test_what_is_drawn_for_a_block_depends_on_the_seed_alone(
    artifact: Path, make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal, batch = SampledCache(samples=7), step_of(artifact, 0)
    found = []
    for name, chunk, steps in (("short", 4, 5), ("long", 4, 12), ("large chunks", 9, 5)):
        monkeypatch.setattr("trainers.shapes.CHUNK_TOKENS", chunk * 16)
        context = make_context(config_of(signal, steps=steps), out=name, model=artifact)
        cache.run(context)
        found.append(tokens_of(context.out, signal, batch).ids_NK)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    other = make_context(config_of(signal, steps=40), out="other", model=artifact, seed=1)
    cache.run(other)  # so many steps draw every block
    assert not torch.equal(found[0], tokens_of(other.out, signal, batch).ids_NK)


def test_samples_weigh_the_same_and_the_entropy_is_the_teachers(
    artifact: Path, model: PreTrainedModel, make_context: MakeContext
) -> None:
    signal, batch = SampledCache(samples=600), step_of(artifact, 2)
    context = make_context(config_of(signal), model=artifact)
    cache.run(context)
    found = tokens_of(context.out, signal, batch)
    teacher = torch.distributions.Categorical(logits=naive_logits(model, batch[0]))
    assert (found.weights_NK == 1 / 600).all()
    assert found.entropy_N is not None
    torch.testing.assert_close(found.entropy_N, teacher.entropy(), rtol=1e-4, atol=1e-5)
    # The mean surprise at samples of a distribution tends to its entropy.
    surprise_N = -teacher.logits.gather(-1, found.ids_NK).mean(-1)
    torch.testing.assert_close(surprise_N.mean(), found.entropy_N.mean(), rtol=0.03, atol=0)


def test_the_likeliest_tokens_come_with_the_teachers_probabilities(
    artifact: Path, model: PreTrainedModel, make_context: MakeContext
) -> None:
    signal, batch = TopKCache(k=5), step_of(artifact, 4)
    context = make_context(config_of(signal), model=artifact)
    cache.run(context)
    found = tokens_of(context.out, signal, batch)
    for ids, weights, entropy, logits in zip(
        found.ids_NK,
        found.weights_NK,
        found.entropy_N if found.entropy_N is not None else [],
        naive_logits(model, batch[0]),
        strict=True,
    ):
        probabilities = logits.softmax(-1)
        order = probabilities.argsort(descending=True)[:5]
        assert ids.tolist() == order.tolist()
        torch.testing.assert_close(weights, probabilities[order], rtol=1e-4, atol=1e-6)
        expected = -(probabilities * probabilities.log()).sum()
        torch.testing.assert_close(entropy, expected, rtol=1e-4, atol=1e-5)


def test_more_of_the_likeliest_than_there_are_words_is_an_error(
    artifact: Path, make_context: MakeContext
) -> None:
    with pytest.raises(StageError, match="9999 likeliest tokens are more than the vocabulary"):
        cache.run(make_context(config_of(TopKCache(k=9999)), model=artifact))


# --- the stage -------------------------------------------------------------------------------


SIGNALS = {"hidden": HiddenCache(), "sampled": SampledCache(), "likeliest": TopKCache()}


@pytest.mark.parametrize("kind", SIGNALS)
def test_it_tells_its_tokens_flops_and_bytes(
    artifact: Path, tiny_config: dict[str, Any], make_context: MakeContext, kind: str
) -> None:
    signal = SIGNALS[kind]
    states = ("embedding", "output.1") if kind == "hidden" else ()
    context = make_context(config_of(signal, states=states), model=artifact)
    result = cache.run(context)
    shape, blocks = shape_of(tiny_config), 5 * 3
    assert result.tokens == blocks * 16
    assert result.flops == shape.forward_flops(result.tokens, 16, head=kind != "hidden")
    planned = cache_bytes(shape, signal, blocks, 16, "fp32", len(states))
    assert result.metrics == {"bytes": planned}
    assert sum(file.stat().st_size for file in context.out.glob("*.npy")) == planned


def test_it_leaves_the_teachers_words_but_not_its_weights(
    artifact: Path, make_context: MakeContext
) -> None:
    context = make_context(config_of(), model=artifact)
    cache.run(context)
    folders = context.out / "teacher", artifact / "model"
    kept, known = (checkpoints.load_tokenizer(folder).get_vocab() for folder in folders)
    assert kept == known
    assert checkpoints.read_config(folders[0]) == checkpoints.read_config(folders[1])
    assert not list(context.out.rglob("*.safetensors*"))


def test_a_run_of_several_epochs_keeps_each_block_once(
    artifact: Path, make_context: MakeContext
) -> None:
    result = cache.run(make_context(config_of(SampledCache(), steps=100), model=artifact))
    assert result.tokens == 40 * 16


class StopsAfter:
    """A reporter that ends the stage when so many blocks are done."""

    def __init__(self, blocks: int, error: BaseException) -> None:
        self._blocks, self._error = blocks, error
        self.seen: list[int] = []

    def report(self, done: int, total: int, values: Mapping[str, float]) -> None:
        assert total == 15
        self.seen.append(done)
        if done >= self._blocks:
            raise self._error


@pytest.mark.parametrize("kind", SIGNALS)
@pytest.mark.parametrize(
    ("error", "first_again"), [(Interrupted(), 12), (RuntimeError("killed"), 4)], ids=str
)
def test_a_stopped_stage_goes_on_to_the_same_bytes(
    artifact: Path, make_context: MakeContext, kind: str, error: BaseException, first_again: int
) -> None:
    """An interrupt is announced and all work is kept; after a kill, what was saved before is."""
    config = config_of(SIGNALS[kind])
    whole = make_context(config, out="whole", model=artifact)
    cache.run(whole)
    with pytest.raises(type(error)):
        cache.run(make_context(config, model=artifact, reporter=StopsAfter(8, error)))
    watcher = StopsAfter(1000, error)
    again = make_context(config, model=artifact, reporter=watcher)
    cache.run(again)
    assert watcher.seen[0] == first_again
    files = [file.relative_to(whole.out) for file in whole.out.rglob("*") if file.is_file()]
    for file in files:
        assert (again.out / file).read_bytes() == (whole.out / file).read_bytes()


def test_a_killed_stage_goes_on_after_what_it_saved_last(
    artifact: Path, make_context: MakeContext
) -> None:
    stopped = StopsAfter(8, RuntimeError("killed"))
    with pytest.raises(RuntimeError, match="killed"):
        cache.run(
            make_context(config_of(), model=artifact, reporter=stopped, checkpoint_every_s=0.0)
        )
    watcher = StopsAfter(1000, RuntimeError())
    cache.run(make_context(config_of(), model=artifact, reporter=watcher))
    assert watcher.seen == [8, 12, 15]  # the four blocks that were not yet safe are computed again


def test_a_finished_stage_that_is_run_again_runs_no_teacher(
    artifact: Path, make_context: MakeContext
) -> None:
    cache.run(make_context(config_of(), model=artifact))
    watcher = StopsAfter(0, AssertionError("computed again"))
    result = cache.run(make_context(config_of(), model=artifact, reporter=watcher))
    assert result.tokens == 15 * 16


def test_a_teacher_that_says_nothing_finite_is_an_error(
    tiny_config: dict[str, Any], save_artifact: SaveArtifact, make_context: MakeContext
) -> None:
    broken = checkpoints.new_model(tiny_config, seed=0)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(StageError, match="not finite"):
        cache.run(make_context(config_of(), model=save_artifact(broken)))


# --- learning from it ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pruned(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model without its layers 1 and 2."""
    folder = tmp_path_factory.mktemp("pruned")
    surgery.operate(artifact / "model", folder / "model", surgery.Cut(layers=(0, 3)))
    return folder


def curve(folder: Path) -> list[float]:
    rows = read_rows(folder / "curve.jsonl")
    return [row["value"] for row in rows if row["name"] == "loss"]


def distilled(
    make_context: MakeContext, signal: Any, out: str, loss: DistillLoss, **inputs: Path
) -> list[float]:
    """The curve of a distillation of 20 steps."""
    training = Training(steps=20, batch_size=6, micro_batch_size=3, learning_rate=3e-3)
    config = DistillConfig(corpus=CORPUS, training=training, loss=loss, signal=signal)
    context = make_context(config, out=out, seed=2, **inputs)
    distill.run(context)
    return curve(context.out)


@pytest.mark.parametrize(
    "loss",
    [
        DistillLoss(),
        DistillLoss(logits="reverse_kl", temperature=3.0, cross_entropy_weight=0.5),
        DistillLoss(hidden=HiddenLoss(states=("embedding", "output"), mapping={"last": "last-1"})),
    ],
    ids=["forward_kl", "reverse_kl", "hidden_states"],
)
def test_a_student_learns_from_hidden_states_on_disk_as_from_a_live_teacher(
    artifact: Path, pruned: Path, make_context: MakeContext, loss: DistillLoss
) -> None:
    live = distilled(make_context, LiveSignal(), "live", loss, model=pruned, teacher=artifact)
    states = ("embedding", "output.2") if loss.hidden else ()
    config = config_of(steps=20, batch_size=6, states=states)
    cached = make_context(config, out="cached", seed=2, model=artifact)
    cache.run(cached)
    inputs = {"model": pruned, "signals": cached.out}
    found = distilled(make_context, HiddenCache(), "student", loss, **inputs)
    assert len(found) == 20
    assert found == pytest.approx(live, abs=1e-4)
    assert found[-1] < 0.9 * found[0]


def test_a_student_learns_from_samples_nearly_as_from_a_live_teacher(
    artifact: Path, pruned: Path, make_context: MakeContext
) -> None:
    loss, signal = DistillLoss(), SampledCache(samples=200)
    live = distilled(make_context, LiveSignal(), "live", loss, model=pruned, teacher=artifact)
    config = config_of(signal, steps=20, batch_size=6)
    cached = make_context(config, out="cached", seed=2, model=artifact)
    cache.run(cached)
    inputs = {"model": pruned, "signals": cached.out}
    found = distilled(make_context, signal, "student", loss, **inputs)
    assert found == pytest.approx(live, rel=0.1)


# --- its settings ----------------------------------------------------------------------------


def test_the_order_of_states_makes_no_other_cache() -> None:
    one = config_of(states=("output.3", "embedding", "input.2"))
    assert one == config_of(states=("embedding", "input.2", "output.3", "input.2"))


@pytest.mark.parametrize("state", ["outputs.1", "output", "output.-1", "embedding.0", "input.1x"])
def test_a_state_that_there_is_not_is_refused(state: str) -> None:
    with pytest.raises(ValidationError, match="states"):
        config_of(states=(state,))


def test_only_a_hidden_cache_holds_states() -> None:
    with pytest.raises(ValidationError, match="sampled_cache holds no hidden states"):
        config_of(SampledCache(), states=("embedding",))
