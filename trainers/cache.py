"""Stage `cache`: what the teacher (role `model`) says of every block that a run draws, on disk.

The teacher runs once for all trials and workers that read it; see `trainers.signals` for the files.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from trainers import corpus, shell, workers
from trainers.checkpoints import load_model, read_config
from trainers.config import CacheConfig, HiddenCache, SampledCache, TopKCache
from trainers.contract import Interrupted, Reporter, StageContext, StageError, StageResult
from trainers.shapes import Shape, blocks_a_chunk, cache_arrays, shape_of
from trainers.signals import CacheWriter, Header
from trainers.teacher import DenseTargets, LiveTeacher, OutputHead

LOGITS_TOKENS = 256
"""At so many tokens at a time, the teacher's distributions are drawn from."""

WORDS_OF_TEACHER = {".json", ".jinja", ".model", ".txt"}
"""Endings of a checkpoint's files that hold no weights."""

Chunk = dict[str, Tensor]


@workers.metered
def run(context: StageContext[CacheConfig]) -> StageResult:
    """Run the teacher over the blocks that the training draws, and keep what the signal needs."""
    config, folder = context.config, context.model("model")
    blocks_NL = corpus.blocks(config.corpus, folder, "training")
    drawn_B = corpus.drawn_blocks(len(blocks_NL), config.steps, config.batch_size, context.seed)
    shape = shape_of(read_config(folder))
    _check_vocabulary(config, shape)
    model = load_model(folder, config.precision).to(workers.device())
    header = header_of(config, shape, len(drawn_B), OutputHead.of(model).softcap)
    describe_teacher(folder, context.out / "teacher")
    chunks = _Chunks(model, config, header, blocks_NL, drawn_B, context.seed)
    writer = CacheWriter(context.out, header)
    try:
        _write(writer, chunks, context.reporter, context.runtime.checkpoint_every_s)
    finally:
        writer.close()
    tokens = len(drawn_B) * blocks_NL.shape[1]
    head = not isinstance(config.signal, HiddenCache)
    flops = shape.forward_flops(tokens, blocks_NL.shape[1], head=head)
    return StageResult({"bytes": float(header.file_bytes)}, tokens, flops)


def header_of(config: CacheConfig, shape: Shape, blocks: int, softcap: float | None) -> Header:
    """What a cache of so many blocks is made of."""
    length = config.corpus.block_length
    return Header(
        signal=config.signal,
        block_length=length,
        blocks_a_chunk=blocks_a_chunk(length),
        softcap=softcap,
        arrays=cache_arrays(shape, config.signal, blocks, length, config.precision, config.states),
    )


def describe_teacher(checkpoint: Path, folder: Path) -> None:
    """Copy what a checkpoint says of its model, the tokenizer included, but no weights."""
    folder.mkdir(exist_ok=True)
    for file in checkpoint.iterdir():
        if file.suffix in WORDS_OF_TEACHER and not file.name.endswith(".index.json"):
            shutil.copyfile(file, folder / file.name)


def _check_vocabulary(config: CacheConfig, shape: Shape) -> None:
    if isinstance(config.signal, TopKCache) and config.signal.k > shape.vocab_size:
        raise StageError(
            f"the {config.signal.k} likeliest tokens are more than the vocabulary's "
            f"{shape.vocab_size}"
        )


def _write(writer: CacheWriter, chunks: _Chunks, reporter: Reporter, every_s: float) -> None:
    for name, values in chunks.whole().items():
        writer.put(name, values)
    saved_at = time.monotonic()
    while writer.done < chunks.number:
        writer.append(chunks[writer.done])
        try:
            reporter.report(chunks.blocks_until(writer.done), chunks.blocks, {})
        except (Interrupted, KeyboardInterrupt, SystemExit):
            writer.flush()
            raise
        if time.monotonic() - saved_at > every_s:
            writer.flush()
            saved_at = time.monotonic()
    writer.finish()


class _Chunks:
    """What the teacher says, chunk by chunk. A chunk depends on nothing but its number, so that a
    cache which was interrupted becomes what it would have been."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: CacheConfig,
        header: Header,
        blocks_NL: Tensor,
        drawn_B: Tensor,
        seed: int,
    ) -> None:
        self._teacher = LiveTeacher(model, config.states)
        self._head, self._device = OutputHead.of(model), model.device
        self._header, self._blocks, self._drawn, self._seed = header, blocks_NL, drawn_B, seed
        self.number, self.blocks = header.chunks, header.blocks

    def whole(self) -> Chunk:
        """The arrays that have no row a block."""
        head = {"head": self._head.weight_VD} if "head" in self._header.arrays else {}
        return {"blocks": self._drawn, **head}

    def blocks_until(self, chunk: int) -> int:
        """How many blocks come before a chunk."""
        return min(chunk * self._header.blocks_a_chunk, self.blocks)

    def __getitem__(self, chunk: int) -> Chunk:
        numbers_B = self._drawn[self._header.rows(chunk)]
        input_ids_BL = self._blocks[numbers_B].long().to(self._device)
        targets = self._teacher.targets(input_ids_BL, numbers_B)
        if not bool(torch.isfinite(targets.hidden_ND).all()):
            raise StageError(f"the teacher's hidden states of chunk {chunk} are not finite")
        match self._header.signal:
            case HiddenCache():
                found = {"hidden": targets.hidden_ND, **targets.states}
            case SampledCache(samples=samples):
                uniform_NK = uniform(numbers_B, input_ids_BL.shape[1] - 1, samples, self._seed)
                found = sampled(targets, uniform_NK.to(self._device))
            case TopKCache(k=k):
                found = likeliest(targets, k)
        return {
            name: values.reshape(len(numbers_B), *self._header.arrays[name].shape[1:])
            for name, values in found.items()
        }


def uniform(blocks_B: Tensor, positions: int, samples: int, seed: int) -> Tensor:
    """Numbers in [0, 1) for every position of these blocks, (blocks * positions, samples), fp64.

    Each block has a stream of its own, so that the draws do not depend on what else is in a batch.
    """
    streams = (np.random.default_rng((seed, block)) for block in blocks_B.tolist())
    return torch.from_numpy(np.concatenate([each.random((positions, samples)) for each in streams]))


def sampled(targets: DenseTargets, uniform_NK: Tensor) -> Chunk:
    """For each position as many independent draws from the teacher's distribution as there are
    numbers in its row, and the distribution's entropy in nats.

    With cross-entropy against them, the gradient is an unbiased estimate of the forward KL's.
    """

    def drawn(probabilities_NV: Tensor, place: slice) -> Chunk:
        # In fp64: over 100,000 words a sum in fp32 would lose the rare ones.
        cumulative_NV = probabilities_NV.cumsum(-1, dtype=torch.float64)
        reached_NK = uniform_NK[place] * cumulative_NV[:, -1:]
        ids_NK = torch.searchsorted(cumulative_NV, reached_NK, right=True)
        return {"ids": ids_NK.clamp(max=probabilities_NV.shape[-1] - 1)}

    return _by_position(targets, drawn)


def likeliest(targets: DenseTargets, k: int) -> Chunk:
    """For each position the k likeliest tokens with their probabilities, and the distribution's
    entropy in nats."""

    def top(probabilities_NV: Tensor, _place: slice) -> Chunk:
        values_NK, ids_NK = probabilities_NV.topk(k, dim=-1)
        return {"ids": ids_NK, "probabilities": values_NK}

    return _by_position(targets, top)


def _by_position(targets: DenseTargets, pick: Callable[[Tensor, slice], Chunk]) -> Chunk:
    parts = list(_parts(targets, pick))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@torch.no_grad()
def _parts(targets: DenseTargets, pick: Callable[[Tensor, slice], Chunk]) -> Iterator[Chunk]:
    number = len(targets.hidden_ND)
    for start in range(0, number, LOGITS_TOKENS):
        place = slice(start, min(start + LOGITS_TOKENS, number))
        probabilities_NV = targets.logits(place).float().softmax(-1)
        entropy_N = torch.special.entr(probabilities_NV).sum(-1)
        yield pick(probabilities_NV, place) | {"entropy": entropy_N}


if __name__ == "__main__":
    shell.main(CacheConfig, run)
