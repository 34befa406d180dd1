"""What a live teacher says, and which teachers a student can have."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SaveArtifact
from families_at_hand import MODEL_TYPES, VARIANTS, tiny_model
from transformers import PreTrainedModel

from trainers import checkpoints
from trainers.contract import StageError
from trainers.teacher import DenseTargets, LiveTeacher, OutputHead, check_same_words

EVERY_FAMILY = pytest.mark.parametrize("name", sorted({*MODEL_TYPES, *VARIANTS}))
IDS = torch.arange(1, 25).reshape(2, 12)
BLOCKS = torch.tensor([7, 3])


@EVERY_FAMILY
@torch.no_grad()
def test_the_targets_logits_are_the_models_at_the_positions_that_predict(name: str) -> None:
    model = tiny_model(name)
    expected = model(IDS).logits[:, :-1].flatten(0, 1)
    targets = LiveTeacher(model).targets(IDS, BLOCKS)
    assert targets.hidden_ND.shape == (22, model.config.hidden_size)
    for place in (slice(0, 22), slice(5, 9), slice(20, 40)):
        torch.testing.assert_close(targets.logits(place), expected[place], rtol=1e-4, atol=1e-5)


def test_nothing_that_a_teacher_says_has_a_gradient() -> None:
    model = tiny_model("llama")
    targets = LiveTeacher(model, ["embedding", "output.1"]).targets(IDS, BLOCKS)
    said = [targets.hidden_ND, targets.logits(slice(0, 4)), *targets.states.values()]
    assert not any(tensor.requires_grad for tensor in said)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_teacher_says_the_states_that_were_asked_for_as_they_are() -> None:
    model = tiny_model("llama")
    targets = LiveTeacher(model, ["output.1", "embedding"]).targets(IDS, BLOCKS)
    states = model(IDS, output_hidden_states=True).hidden_states
    assert set(targets.states) == {"embedding", "output.1"}
    torch.testing.assert_close(targets.states["embedding"], states[0])
    torch.testing.assert_close(targets.states["output.1"], states[2])
    assert LiveTeacher(model).targets(IDS, BLOCKS).states == {}


def test_an_output_head_that_is_given_stands_for_the_models() -> None:
    model = tiny_model("gemma2")
    own = OutputHead.of(model)
    other = OutputHead(2 * own.weight_VD, softcap=1.5)
    said = LiveTeacher(model, head=other).targets(IDS, BLOCKS).logits(slice(0, 22))
    hidden = LiveTeacher(model).targets(IDS, BLOCKS).hidden_ND
    torch.testing.assert_close(said, 1.5 * torch.tanh(2 * hidden @ own.weight_VD.T / 1.5))


def test_vocabularies_of_different_sizes_are_an_error_that_names_both(
    artifact: Path, tiny_config: dict[str, Any], save_artifact: SaveArtifact
) -> None:
    words = tiny_config["vocab_size"]
    other = save_artifact(checkpoints.new_model(tiny_config | {"vocab_size": 300}, seed=0))
    with pytest.raises(StageError, match=f"{words} in the student, 300 in the teacher"):
        check_same_words(artifact / "model", other / "model")


def test_a_model_without_a_tokenizer_is_compared_by_the_size_of_its_vocabulary(
    artifact: Path, model: PreTrainedModel, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "bare")
    check_same_words(artifact / "model", tmp_path / "bare")
    check_same_words(tmp_path / "bare", artifact / "model")


def test_a_word_that_only_one_tokenizer_has_is_named(artifact: Path, tmp_path: Path) -> None:
    shutil.copytree(artifact / "model", tmp_path / "other")
    tokenizer = checkpoints.load_tokenizer(tmp_path / "other")
    tokenizer.add_tokens(["aardvark"])
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(StageError, match=r"'aardvark' is no word in the student, \d+ in the"):
        check_same_words(artifact / "model", tmp_path / "other")


@pytest.mark.parametrize("window", [1, 4, 7, 100])
def test_logits_asked_for_a_few_at_a_time_are_those_of_all_at_once(
    monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    monkeypatch.setattr("trainers.teacher.CHUNK_TOKENS", window)
    hidden_ND, head_VD = torch.randn(11, 5), torch.randn(9, 5)
    targets = DenseTargets(hidden_ND, {}, OutputHead(head_VD))
    for start, stop in [(0, 2), (2, 4), (3, 9), (8, 11), (0, 11), (4, 5)]:
        expected = hidden_ND[start:stop] @ head_VD.T
        torch.testing.assert_close(targets.logits(slice(start, stop)), expected)
