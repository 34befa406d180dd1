"""Text to blocks: whole, disjoint, and in an order that depends on seed and step alone."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.normalizers import Replace

from trainers import corpus, language, tokenized
from trainers.checkpoints import load_tokenizer
from trainers.config import GeneratedCorpus, HubCorpus, TextCorpus
from trainers.contract import StageError

SPLITS = ("calibration", "training", "heldout")
GENERATED = GeneratedCorpus(
    block_length=24, training_blocks=40, calibration_blocks=7, heldout_blocks=9
)


@pytest.fixture
def texts(tmp_path: Path) -> TextCorpus:
    """Two small files in the words of the generated language."""
    for split, name in (("training", "train.txt"), ("heldout", "heldout.txt")):
        lines = language.documents(0, split, 60)
        (tmp_path / name).write_text("\n\n".join(lines) + "\n")
    return TextCorpus(
        train=tmp_path / "train.txt",
        heldout=tmp_path / "heldout.txt",
        block_length=10,
        calibration_blocks=5,
        heldout_blocks=4,
    )


@pytest.fixture
def hub(texts: TextCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubCorpus:
    """The same lines as a data set, read as one of the hub is, in a cache of its own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    for split, path in (("train", texts.train), ("test", texts.heldout)):
        rows = [json.dumps({"text": line}) for line in path.read_text().splitlines()]
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    return HubCorpus(
        dataset=str(tmp_path / "data"), block_length=10, calibration_blocks=5, heldout_blocks=4
    )


# --- blocks ----------------------------------------------------------------------------------


def test_generated_splits_have_the_asked_sizes_and_share_no_block(artifact: Path) -> None:
    found = {split: corpus.blocks(GENERATED, artifact / "model", split) for split in SPLITS}
    assert {split: tuple(blocks.shape) for split, blocks in found.items()} == {
        "calibration": (7, 24),
        "training": (40, 24),
        "heldout": (9, 24),
    }
    rows = [tuple(row.tolist()) for blocks in found.values() for row in blocks]
    assert len(set(rows)) == len(rows)


def test_generated_text_depends_on_the_language_seed_alone(artifact: Path) -> None:
    other = GENERATED.model_copy(update={"language_seed": 1})
    longer = GENERATED.model_copy(update={"training_blocks": 60})
    blocks = corpus.blocks(GENERATED, artifact / "model", "training")
    assert not torch.equal(blocks, corpus.blocks(other, artifact / "model", "training"))
    assert torch.equal(blocks, corpus.blocks(longer, artifact / "model", "training")[:40])


def test_text_blocks_are_the_file_in_order_without_gaps(texts: TextCorpus, artifact: Path) -> None:
    folder = artifact / "model"
    told = " ".join(texts.train.read_text().split())
    ids = language.tokenizer()(told, add_special_tokens=False)["input_ids"]
    calibration = corpus.blocks(texts, folder, "calibration")
    training = corpus.blocks(texts, folder, "training")
    assert calibration.shape == (5, 10)
    assert training.shape[1] == 10
    assert len(ids) - calibration.numel() - training.numel() < 10
    assert torch.cat([calibration, training]).flatten().tolist() == ids[: len(ids) // 10 * 10]


def test_held_out_blocks_come_from_the_other_file(texts: TextCorpus, artifact: Path) -> None:
    told = " ".join(texts.heldout.read_text().split())
    ids = language.tokenizer()(told, add_special_tokens=False)["input_ids"]
    heldout = corpus.blocks(texts, artifact / "model", "heldout")
    assert heldout.flatten().tolist() == ids[:40]


@pytest.mark.parametrize(
    ("split", "words"), [("calibration", 9), ("training", 59), ("heldout", 9), ("heldout", 0)]
)
def test_a_text_that_is_too_short_for_one_block_is_an_error(
    tmp_path: Path, artifact: Path, split: corpus.Split, words: int
) -> None:
    for name in ("train.txt", "heldout.txt"):
        (tmp_path / name).write_text("dog " * words)
    short = TextCorpus(
        train=tmp_path / "train.txt",
        heldout=tmp_path / "heldout.txt",
        block_length=10,
        calibration_blocks=5,
    )
    with pytest.raises(StageError, match=f"no {split} block of 10 tokens"):
        corpus.blocks(short, artifact / "model", split)


def test_only_a_generated_corpus_has_a_vocabulary_for_a_model_from_scratch(
    texts: TextCorpus,
) -> None:
    assert len(corpus.tokenizer_for(GENERATED)) == len(language.WORDS)
    with pytest.raises(StageError, match=r"kind: generated.*is text"):
        corpus.tokenizer_for(texts)


@pytest.mark.parametrize("split", SPLITS)
def test_a_text_becomes_blocks_once_for_all_copies_of_a_tokenizer(
    texts: TextCorpus, artifact: Path, tmp_path: Path, split: corpus.Split
) -> None:
    tokenizer = load_tokenizer(artifact / "model")
    tokenizer.save_pretrained(tmp_path / "copy")
    tokenizer.backend_tokenizer.normalizer = Replace("e", "x")  # no word any more
    tokenizer.save_pretrained(tmp_path / "other")
    first = corpus.blocks(texts, artifact / "model", split)
    assert corpus.blocks(texts, tmp_path / "copy", split) is first
    assert not torch.equal(corpus.blocks(texts, tmp_path / "other", split), first)


def test_generated_blocks_are_made_once_for_all_models(artifact: Path, tmp_path: Path) -> None:
    first = corpus.blocks(GENERATED, artifact / "model", "training")
    assert corpus.blocks(GENERATED, tmp_path / "no tokenizer", "training") is first


def test_a_hub_data_set_gives_the_blocks_of_its_lines(
    texts: TextCorpus, hub: HubCorpus, artifact: Path
) -> None:
    for split in SPLITS:
        mapped = corpus.blocks(hub, artifact / "model", split)
        assert torch.equal(mapped.long(), corpus.blocks(texts, artifact / "model", split))


def test_a_hub_data_set_is_tokenized_once_and_then_mapped_from_disk(
    hub: HubCorpus, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tokenized.tokens(hub, artifact / "model", False)
    assert isinstance(first, np.memmap)
    (file,) = (tmp_path / "cache" / "orchestrate-tokens").glob("*.int32")
    written = file.stat().st_mtime_ns
    monkeypatch.setattr(tokenized, "_write", None)  # would fail if it were called
    again = tokenized.tokens(hub, artifact / "model", False)
    assert np.array_equal(first, again) and file.stat().st_mtime_ns == written


def test_a_hub_data_set_is_tokenized_anew_for_another_tokenizer_and_not_for_another_save_of_one(
    hub: HubCorpus, artifact: Path, tmp_path: Path
) -> None:
    def files() -> int:
        return len(list((tmp_path / "cache" / "orchestrate-tokens").glob("*.int32")))

    first = tokenized.tokens(hub, artifact / "model", False)
    tokenizer = load_tokenizer(artifact / "model")
    tokenizer(["dog"], padding=True, truncation=True, max_length=1)  # and whoever calls it last
    tokenizer.save_pretrained(tmp_path / "again")
    saved = [
        folder / "tokenizer_config.json" for folder in (artifact / "model", tmp_path / "again")
    ]
    assert saved[0].read_bytes() != saved[1].read_bytes()
    assert np.array_equal(tokenized.tokens(hub, tmp_path / "again", False), first)
    assert files() == 1
    tokenizer.backend_tokenizer.normalizer = Replace("dog", "cat")
    tokenizer.save_pretrained(tmp_path / "other")
    assert not np.array_equal(tokenized.tokens(hub, tmp_path / "other", False), first)
    assert files() == 2


def test_a_reader_that_writes_into_its_blocks_spoils_no_other(
    hub: HubCorpus, artifact: Path
) -> None:
    first = tokenized.tokens(hub, artifact / "model", False)
    before = first.copy()
    first[:] = 0
    assert np.array_equal(tokenized.tokens(hub, artifact / "model", False), before)


# --- order -----------------------------------------------------------------------------------


def numbered(count: int) -> torch.Tensor:
    return torch.arange(count)[:, None].repeat(1, 3)


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_each_epoch_visits_each_block_once(count: int, batch_size: int, seed: int) -> None:
    blocks = numbered(count)
    steps = count * 3  # a whole number of epochs, whatever the batch size
    visits = [
        int(row[0]) for step in range(steps) for row in corpus.batch(blocks, step, batch_size, seed)
    ]
    epochs = [visits[start : start + count] for start in range(0, len(visits), count)]
    assert len(epochs) == 3 * batch_size
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=12), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_a_batch_depends_on_seed_and_step_alone(steps: list[int], seed: int) -> None:
    blocks = numbered(17)
    in_order = [corpus.batch(blocks, step, 4, seed) for step in range(51)]
    torch.manual_seed(steps[0])  # neither torch's own randomness nor the batches before matter
    for step in steps:
        torch.rand(1)
        assert torch.equal(corpus.batch(blocks, step, 4, seed), in_order[step])


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    blocks = numbered(12)
    orders = Counter(
        tuple(corpus.batch(blocks, epoch, 12, seed)[:, 0].tolist())
        for seed in range(5)
        for epoch in range(5)
    )
    assert max(orders.values()) == 1


@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 9), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_the_blocks_of_a_run_are_those_of_its_batches(
    count: int, steps: int, batch_size: int, seed: int
) -> None:
    read: set[int] = set()
    for step in range(steps):
        numbers = corpus.batch_blocks(count, step, batch_size, seed)
        rows = corpus.batch(numbered(count), step, batch_size, seed)
        assert rows[:, 0].tolist() == numbers.tolist()
        read |= set(numbers.tolist())
    assert corpus.drawn_blocks(count, steps, batch_size, seed).tolist() == sorted(read)
