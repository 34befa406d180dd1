"""Text -> tokens -> packed blocks, in disjoint splits and a seeded order."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trainers import language, tokenized
from trainers.checkpoints import load_tokenizer
from trainers.config import Corpus, GeneratedCorpus, HubCorpus, TextCorpus
from trainers.contract import StageError

Split = Literal["calibration", "training", "heldout"]


def tokenizer_for(corpus: Corpus) -> PreTrainedTokenizerBase:
    """The tokenizer that a model pretrained from nothing on this corpus uses."""
    if isinstance(corpus, GeneratedCorpus):
        return language.tokenizer()
    raise StageError(
        f"a model from scratch needs a corpus with a vocabulary of its own (kind: generated); "
        f"this one is {corpus.kind}"
    )


def blocks(corpus: Corpus, tokenizer_folder: Path, split: Split) -> Tensor:
    """The split's token ids, packed without padding into (blocks, block_length); not to be written.
    Training blocks may be int32, mapped from disk: make those that are used `long`.

    The splits are disjoint: calibration blocks come before the training blocks of the same text,
    held-out blocks from another text. Raises `StageError` where the text is too short.
    """
    found = _blocks(corpus, _tokenizer_of(corpus, tokenizer_folder), split)
    if len(found) == 0:
        raise StageError(f"the corpus has no {split} block of {corpus.block_length} tokens")
    return found


@dataclass(frozen=True)
class _Tokenizer:
    """Known by what it does to text: every student has a copy in a folder of its own."""

    content: str
    folder: Path = field(compare=False)


def _tokenizer_of(corpus: Corpus, folder: Path) -> _Tokenizer | None:
    """What the corpus' blocks depend on besides itself; nothing where it is made of tokens."""
    if isinstance(corpus, GeneratedCorpus):
        return None
    return _Tokenizer(tokenized.content(folder), folder)


@lru_cache(maxsize=8)
def _blocks(corpus: Corpus, tokenizer: _Tokenizer | None, split: Split) -> Tensor:
    if isinstance(corpus, GeneratedCorpus):
        count = {
            "calibration": corpus.calibration_blocks,
            "training": corpus.training_blocks,
            "heldout": corpus.heldout_blocks,
        }[split]
        tokens = language.tokens(corpus.language_seed, split, count * corpus.block_length)
        return _pack(tokens, corpus.block_length)
    assert tokenizer is not None
    packed = _pack(_tokenize(corpus, tokenizer, split == "heldout"), corpus.block_length)
    if split == "heldout":
        return packed[: corpus.heldout_blocks].long()
    if split == "calibration":
        return packed[: corpus.calibration_blocks].long()
    return packed[corpus.calibration_blocks :]


def _pack(tokens: np.ndarray, block_length: int) -> Tensor:
    count = len(tokens) // block_length
    return torch.from_numpy(tokens[: count * block_length].reshape(count, block_length))


@lru_cache(maxsize=4)
def _tokenize(corpus: TextCorpus | HubCorpus, known: _Tokenizer, heldout: bool) -> np.ndarray:
    if isinstance(corpus, HubCorpus):
        return tokenized.tokens(corpus, known.folder, heldout)
    tokenizer = load_tokenizer(known.folder)
    path = corpus.heldout if heldout else corpus.train
    # One call on the whole text would warn of its length and hold it all; lines are independent
    # enough, and joined with their newlines they give the text back.
    lines = [line for line in path.read_text(encoding="utf-8").splitlines(True) if line.strip()]
    ids = tokenizer(lines, add_special_tokens=False)["input_ids"] if lines else []
    return np.fromiter((token for line in ids for token in line), dtype=np.int64)


def batch(blocks_BL: Tensor, step: int, batch_size: int, seed: int) -> Tensor:
    """The `batch_size` blocks of training step `step` (from 0), see `batch_blocks`."""
    return blocks_BL[batch_blocks(len(blocks_BL), step, batch_size, seed)]


def batch_blocks(number: int, step: int, batch_size: int, seed: int) -> Tensor:
    """Which of `number` blocks training step `step` (from 0) reads, (batch_size) of int64.

    Each epoch is a permutation drawn from (seed, epoch), so the order depends on nothing but the
    arguments and a resumed run reads what an undisturbed one would have read.
    """
    first = step * batch_size
    drawn = [
        _permutation(number, seed, place // number)[place % number]
        for place in range(first, first + batch_size)
    ]
    return torch.stack(drawn)


def drawn_blocks(number: int, steps: int, batch_size: int, seed: int) -> Tensor:
    """The distinct blocks, of `number`, that `steps` steps read between them, in rising order."""
    read = steps * batch_size
    if read >= number:
        return torch.arange(number)
    return _permutation(number, seed, 0)[:read].sort().values


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    return torch.randperm(count, generator=generator)
