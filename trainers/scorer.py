"""`HFLM`'s answers, without computing what nobody reads and without computing anything twice.

A question's choices share its context, and questions share the examples shown before them. Requests
become trees of tokens (`Row`) in which every shared beginning stands once; attention sees a token's
ancestors alone, so each request is scored as if it stood by itself. The output head runs on the
positions that predict a continuation, for a whole batch in one product.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, TypeVar

import numpy as np
import torch
from lm_eval import utils as harness
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor, distributed
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainers.ablation import Block, hidden_without, left_out
from trainers.checkpoints import output_head, softcapped
from trainers.config import hash_of
from trainers.contract import StageError
from trainers.workers import rank_and_processes

TOKENS_A_BATCH = 512
"""About how many tokens a model gets at a time, of four bytes a number (twice as many of two): what
passes between two layers stays in a core's cache."""
TOKENS_A_ROW = 2048
"""Up to how many tokens share their beginnings, as attention sees all pairs of a row's; a quarter
more than its own where one sequence is longer."""
POSITIONS_A_CHUNK = 256
"""Of how many positions the logits are held at a time."""
REQUESTS_A_BATCH = 16
"""How many texts are generated at a time."""
MASKED_ATTENTION = ("eager", "sdpa")
"""The implementations of attention that take a mask for each pair of tokens."""

Tokens = tuple[int, ...]
Request = tuple[Any, list[int], list[int]]
"""What the harness calls it, the context's tokens, and the continuation's."""
Response = tuple[float, bool]
"""The continuation's log-probability, and whether it is what the model would say itself."""
Found = TypeVar("Found")


# --- rows ------------------------------------------------------------------------------------


@dataclass
class Row:
    """Sequences in one row of a batch, as trees: a beginning that several share stands once.

    `parents` says behind which place of the row a token comes (-1: it is the first of its
    sequence), and `paths` where the tokens of each sequence stand. Parents stand before children.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    paths: dict[Tokens, list[int]] = field(default_factory=dict)

    def add(self, sequence: Tokens, shared: Sequence[int] = ()) -> None:
        """Take in a sequence whose first tokens stand at `shared`."""
        new = range(len(self.tokens), len(self.tokens) + len(sequence) - len(shared))
        path = [*shared, *new]
        self.parents += [
            path[depth - 1] if depth else -1 for depth in range(len(shared), len(path))
        ]
        self.tokens += sequence[len(shared) :]
        self.paths[sequence] = path

    def join(self, other: Row) -> None:
        """Take in another row's sequences behind the own, sharing nothing with them."""
        ahead = len(self.tokens)
        self.tokens += other.tokens
        self.parents += [parent + ahead if parent >= 0 else -1 for parent in other.parents]
        for sequence, path in other.paths.items():
            self.paths[sequence] = [place + ahead for place in path]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def branches(self) -> bool:
        """Whether anything but plain causal attention is needed."""
        return self.parents != list(range(-1, len(self) - 1))


def batches_of(
    sequences: Iterable[Tokens], hidden_size: int, longest_shared: int, size: int
) -> list[list[Row]]:
    """The sequences in rows of about equal length, and those in batches of about `size` tokens.

    A sequence of more than `longest_shared` tokens has a row of its own.
    """
    alone, others = list[Row](), list[Tokens]()
    for sequence in sequences:
        if len(sequence) > longest_shared:
            alone.append(Row())
            alone[-1].add(sequence)
        else:
            others.append(sequence)
    batches: list[list[Row]] = []
    for row in sorted(alone, key=len):
        if batches and len(row) * (len(batches[-1]) + 1) <= size:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches + _filled(_trees(others, hidden_size), size)


def _trees(sequences: Iterable[Tokens], hidden_size: int) -> list[Row]:
    """Rows whose sequences share beginnings, where that saves more than it costs.

    With d channels a token costs about 12 d^2 multiplications a layer and a pair of tokens in one
    row 2 d, in products that are a few times slower: to run `shared` tokens once is worth
    d * shared pairs.
    """
    trees: list[Row] = []
    previous: Tokens = ()
    # In alphabetical order nothing before a sequence shares more with it than its neighbour.
    for sequence in sorted(sequences):
        shared = _common(previous, sequence)
        new = len(sequence) - shared
        tree = trees[-1] if shared else Row()
        pays = shared * hidden_size >= new * len(tree)
        if shared and pays and len(tree) + new <= max(TOKENS_A_ROW, len(sequence) * 5 // 4):
            tree.add(sequence, tree.paths[previous][:shared])
        else:
            trees.append(Row())
            trees[-1].add(sequence)
        previous = sequence
    return trees


def _common(one: Tokens, other: Tokens) -> int:
    """How many first tokens are the same."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _filled(trees: Iterable[Row], size: int) -> list[list[Row]]:
    """Batches of rows that are as long as the longest tree left, filled up with shorter ones:
    what is left empty would be run for nothing."""
    left = sorted(trees, key=len)
    lengths = [len(tree) for tree in left]
    batches: list[list[Row]] = []
    while left:
        width = lengths[-1]
        batch: list[Row] = []
        while left and (len(batch) + 1) * width <= max(size, width):
            row = Row()
            while fitting := bisect_right(lengths, width - len(row)):
                row.join(left.pop(fitting - 1))
                lengths.pop(fitting - 1)
            batch.append(row)
        batches.append(batch)
    return batches


def inputs_of(batch: Sequence[Row], model: PreTrainedModel) -> dict[str, Tensor]:
    """What the model is called with: tokens (batch, length), and where rows branch each token's
    position in its sequence and a mask (batch, 1, length, length) that is 0 on its ancestors."""
    length = max(map(len, batch))
    # Padding stands on the right, where no token looks.
    tokens_BL = torch.tensor([row.tokens + [0] * (length - len(row)) for row in batch])
    if not any(row.branches for row in batch):
        return {"input_ids": tokens_BL.to(model.device)}
    sees_BLL = np.zeros((len(batch), length, length), dtype=bool)
    # A token of the padding sees itself, lest it attend to nothing at all.
    sees_BLL[:, np.arange(length), np.arange(length)] = True
    for row, sees_LL in zip(batch, sees_BLL, strict=True):
        for place, parent in enumerate(row.parents):
            if parent >= 0:
                sees_LL[place] |= sees_LL[parent]
    sees = torch.from_numpy(sees_BLL).to(model.device)
    positions_BL = sees.sum(-1) - 1
    hidden = torch.full((), torch.finfo(model.dtype).min, dtype=model.dtype, device=model.device)
    mask_BLL = torch.where(sees, torch.zeros_like(hidden), hidden)
    return {
        "input_ids": tokens_BL.to(model.device),
        "position_ids": positions_BL,
        "attention_mask": mask_BLL[:, None],
    }


def longest_shared(model: PreTrainedModel) -> int:
    """Up to how many tokens a sequence may stand in a tree: within the model's sliding window, as a
    mask of ancestors knows of no window; none where attention takes no such mask."""
    if model.config._attn_implementation not in MASKED_ATTENTION:
        return 0
    window: int | None = getattr(model.config, "sliding_window", None)
    return sys.maxsize if window is None else window


# --- scoring ---------------------------------------------------------------------------------


class Scorer(HFLM):  # type: ignore[misc]
    """`HFLM` that shares beginnings and runs the output head on the continuation's positions alone.

    Answers equal `HFLM`'s; of a model in bf16, log-probabilities are still added up in fp32, where
    its default rounds them to 8 bits and makes ties. Where torch.distributed runs, every process
    must ask the same; each scores or generates its share, and all of them get all answers.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        device = str(model.device)
        super().__init__(
            pretrained=model, tokenizer=tokenizer, batch_size=REQUESTS_A_BATCH, device=device
        )

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[Response]:
        """Each continuation's log-probability after its context."""
        return list(super().loglikelihood(requests, disable_tqdm))

    def _loglikelihood_tokens(self, requests: list[Request], **_: Any) -> list[Response]:
        found = gathered(self._score(requests))
        return [found[number][0] for number in range(len(requests))]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """The log-probability of each whole text, in windows as `HFLM` cuts them."""
        windows = [self._windows(request.args[0]) for request in requests]
        scored = iter(self._loglikelihood_tokens([each for text in windows for each in text]))
        return [sum(next(scored)[0] for _ in text) for text in windows]

    def _windows(self, text: str) -> list[Request]:
        tokens = self.tok_encode(text)
        pairs = harness.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
        return [(None, *harness.make_disjoint_window(pair)) for pair in pairs]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """What the model says after each context, up to a word to stop at."""
        rank, processes = rank_and_processes()
        mine = requests[rank::processes]
        said = super().generate_until(mine, disable_tqdm) if mine else []
        found = gathered(dict(zip(range(rank, len(requests), processes), said, strict=True)))
        return [found[number] for number in range(len(requests))]

    @torch.no_grad()
    def _score(self, requests: list[Request]) -> dict[int, list[Response]]:
        """By the request's number: the response of each variant of the model."""
        asked: dict[Tokens, list[int]] = defaultdict(list)
        for number, (_pair, context, continuation) in enumerate(requests):
            if not continuation:
                raise StageError("a question has a choice without any token")
            whole = (context + continuation)[-(self.max_length + 1) :]
            asked[tuple(whole[:-1])].append(number)
        batches = batches_of(
            asked,
            self.model.config.hidden_size,
            longest_shared(self.model),
            TOKENS_A_BATCH * 4 // self.model.dtype.itemsize,
        )
        found: dict[int, list[Response]] = defaultdict(list)
        for batch in self._share(batches):
            wanted = _wanted(batch, asked, requests)
            for hidden_BLD in self._hidden(inputs_of(batch, self.model)):
                for number, response in wanted.read(self.model, hidden_BLD):
                    found[number].append(response)
        return dict(found)

    def _share(self, batches: list[list[Row]]) -> Iterator[list[Row]]:
        """The batches to run here."""
        rank, processes = rank_and_processes()
        yield from batches[rank::processes]

    def _hidden(self, inputs: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """Final hidden states of each variant of the model: here there is one."""
        yield self.model.base_model(**inputs, use_cache=False).last_hidden_state


class AblatedScorer(Scorer):
    """Answers for the model (`variant` 0) and for the model without `blocks[variant - 1]`.

    The first variant to be asked scores the requests for all of them; of that only the responses
    are kept, for the others to be asked the same.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        blocks: Sequence[Block],
    ) -> None:
        super().__init__(model, tokenizer)
        self.variant = 0
        self.progress: Callable[[float], None] = lambda part: None
        self.lengths: list[int] = []
        self._blocks = blocks
        self._table: dict[str, dict[int, list[Response]]] = {}

    def _loglikelihood_tokens(self, requests: list[Request], **_: Any) -> list[Response]:
        asked = hash_of([[context, continuation] for _pair, context, continuation in requests])
        if asked not in self._table:
            self._table[asked] = gathered(self._score(requests))
        found = self._table[asked]
        return [found[number][self.variant] for number in range(len(requests))]

    def _share(self, batches: list[list[Row]]) -> Iterator[list[Row]]:
        self.lengths += [len(row) for batch in batches for row in batch]
        mine = list(super()._share(batches))
        for number, batch in enumerate(mine):
            self.progress(number / len(mine))
            yield batch

    def _hidden(self, inputs: Mapping[str, Tensor]) -> Iterator[Tensor]:
        how = {name: values for name, values in inputs.items() if name != "input_ids"}
        yield from hidden_without(self.model, inputs["input_ids"], self._blocks, **how)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """By the model without the variant's block: nothing is shared here."""
        if self.variant == 0:
            return super().generate_until(requests, disable_tqdm)
        with left_out(self.model, *self._blocks[self.variant - 1]):
            return super().generate_until(requests, disable_tqdm)


def gathered(found: dict[int, Found]) -> dict[int, Found]:
    """What all processes found, by number."""
    _rank, processes = rank_and_processes()
    if processes == 1:
        return found
    parts: list[Any] = [None] * processes
    distributed.all_gather_object(parts, found)
    return {number: answer for part in parts for number, answer in part.items()}


# --- reading ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Wanted:
    """What is read of a batch's hidden states: of request `numbers[i]` the next `lengths[i]` of
    the N predictions in all, at `places_N` (of the flattened batch) of the tokens `gold_N`."""

    numbers: list[int]
    lengths: list[int]
    places_N: Tensor
    gold_N: Tensor

    def read(self, model: PreTrainedModel, hidden_BLD: Tensor) -> Iterator[tuple[int, Response]]:
        """Each request's number and response."""
        values_N, greedy_N = self._predictions(model, hidden_BLD.flatten(0, 1))
        values, greedy = (torch.split(each.cpu(), self.lengths) for each in (values_N, greedy_N))
        for number, value, same in zip(self.numbers, values, greedy, strict=True):
            yield number, (float(value.sum()), bool(same.all()))

    def _predictions(self, model: PreTrainedModel, hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of every gold token, and whether it is the likeliest."""
        # Choices that differ in their last token alone are read from one place.
        unique_U, which_N = torch.unique(self.places_N.to(hidden_ND.device), return_inverse=True)
        gold_N = self.gold_N.to(hidden_ND.device)
        values_N = torch.empty(len(gold_N), device=hidden_ND.device)
        greedy_N = torch.empty(len(gold_N), dtype=torch.bool, device=hidden_ND.device)
        for start in range(0, len(unique_U), POSITIONS_A_CHUNK):
            part = hidden_ND[unique_U[start : start + POSITIONS_A_CHUNK]]
            logits_UV = softcapped(torch.nn.functional.linear(part, output_head(model)), model)
            logits_UV = logits_UV.float()
            here = (which_N >= start) & (which_N < start + POSITIONS_A_CHUNK)
            row, gold = which_N[here] - start, gold_N[here]
            values_N[here] = logits_UV[row, gold] - logits_UV.logsumexp(-1)[row]
            greedy_N[here] = logits_UV.argmax(-1)[row] == gold
        return values_N, greedy_N


def _wanted(
    batch: Sequence[Row], asked: Mapping[Tokens, list[int]], requests: Sequence[Request]
) -> _Wanted:
    length = max(map(len, batch))
    numbers: list[int] = []
    continuations: list[list[int]] = []
    places: list[int] = []
    for line, row in enumerate(batch):
        for sequence, path in row.paths.items():
            for number in asked[sequence]:
                continuation = requests[number][2]
                numbers.append(number)
                continuations.append(continuation)
                places += [line * length + place for place in path[-len(continuation) :]]
    gold = [token for continuation in continuations for token in continuation]
    lengths = [len(continuation) for continuation in continuations]
    return _Wanted(numbers, lengths, torch.tensor(places), torch.tensor(gold))
