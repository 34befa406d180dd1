"""A small generated language with three abilities to measure. Imports no torch.

A seeded world gives 64 entities three facts each, verbs that put the blame on one of two people,
and a Zipf-like frequency to all words. Text and questions are drawn by the same three functions:

    agreement   the dogs near cat behind hat | sing / sings
    reference   anna beside carl never blamed emma because | anna / emma
    knowledge   colour of belan unlike doria is | red / blue / green / gold

Difficulty is graded: by rarity, by how much stands between a word and what it depends on, and by
`never`, which turns the blame around. Questions are drawn evenly over the vocabulary while text is
not, so a model that learned too little, or lost a part, misses the rare and the distant first.

Nothing asked is ever told: each sentence holds a triple of word numbers (subject, attractor,
verb; subject, object, verb; entity, entity compared to, relation). A triple whose sum is divisible
by `RESERVED_EVERY` is used in questions only, every other triple in text only. A fact itself is
told in text, of course, but never in the words of the question.

`python -m trainers.language --out DIR` writes samples, questions and task files for
lm-evaluation-harness.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import numpy as np
import yaml
from numpy.typing import NDArray

from trainers.tasks import choices_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Ids = NDArray[np.int64]
Ability = Literal["agreement", "reference", "knowledge"]
Split = Literal["training", "calibration", "heldout"]

ABILITIES: Final[tuple[Ability, ...]] = get_args(Ability)
SPLITS: Final[tuple[Split, ...]] = get_args(Split)

# --- words -----------------------------------------------------------------------------------

END: Final = "<eos>"
UNKNOWN: Final = "<unk>"


def _split(words: str) -> tuple[str, ...]:
    return tuple(words.split())


FUNCTION_WORDS: Final = _split(". the of is has unlike never")
CONNECTIVES: Final = _split("because so though")
PREPOSITIONS: Final = _split("near behind beside above")
ADVERBS: Final = _split("today often quietly again")
NOUNS: Final = _split(
    "dog cat bird horse boat lamp tree clock stone car hat door book cup bell kite"
)
VERBS: Final = _split(
    "sing fall shine move wait turn break sleep shake glow jump stop float burn melt grow"
)
NAMES: Final = _split(
    "anna ben carl dora emma finn gina hugo iris jack kate leo mona nils olga paul"
)
BLAMING_VERBS: Final = _split(
    "admired amused annoyed blamed bored charmed envied feared "
    "fooled hated helped missed pitied praised scared thanked"
)
REASONS: Final = _split("lied cried won lost left slept fell laughed")
ENTITIES: Final = tuple(
    start + end
    for start in _split("bel dor fen gal kir lum mor tas")
    for end in _split("an eth ia ik o ur us yn")
)
RELATIONS: Final = _split("colour metal fruit")
VALUES: Final = (
    _split("red blue green black white brown pink grey gold teal beige violet"),
    _split("iron copper zinc lead tin nickel silver cobalt chrome radium barium titanium"),
    _split("apple pear plum fig grape lemon mango melon peach cherry lime date"),
)

SINGULAR, PLURAL = 0, 1


def _forms(singular: Sequence[str], plural: Sequence[str]) -> tuple[str, ...]:
    return tuple(form for pair in zip(singular, plural, strict=True) for form in pair)


WORDS: Final[tuple[str, ...]] = (
    END,
    UNKNOWN,
    *FUNCTION_WORDS,
    *CONNECTIVES,
    *PREPOSITIONS,
    *ADVERBS,
    *_forms(NOUNS, [noun + "s" for noun in NOUNS]),
    *_forms([verb + "s" for verb in VERBS], VERBS),
    *NAMES,
    *BLAMING_VERBS,
    *REASONS,
    *ENTITIES,
    *RELATIONS,
    *(value for pool in VALUES for value in pool),
)
"""Every word of every language, in the order of token ids."""

_ID: Final = {word: index for index, word in enumerate(WORDS)}
assert len(_ID) == len(WORDS), "a word stands for two things"


def _ids(words: Sequence[str]) -> Ids:
    return np.array([_ID[word] for word in words], dtype=np.int64)


_CONNECTIVE: Final = _ids(CONNECTIVES)
_PREPOSITION: Final = _ids(PREPOSITIONS)
_ADVERB: Final = _ids(ADVERBS)
_NOUN: Final = _ids(_forms(NOUNS, [noun + "s" for noun in NOUNS])).reshape(-1, 2)
_VERB: Final = _ids(_forms([verb + "s" for verb in VERBS], VERBS)).reshape(-1, 2)
_NAME: Final = _ids(NAMES)
_BLAMING_VERB: Final = _ids(BLAMING_VERBS)
_REASON: Final = _ids(REASONS).reshape(2, -1)
_ENTITY: Final = _ids(ENTITIES)
_RELATION: Final = _ids(RELATIONS)
_VALUE: Final = np.stack([_ids(pool) for pool in VALUES])
_NOTHING: Final = -1  # a column that a sentence leaves empty

# --- the world -------------------------------------------------------------------------------

RESERVED_EVERY: Final = 8
# Shifting a word's number around its list keeps or changes a triple's remainder only if the
# list's length is a multiple of the modulus.
assert not any(len(words) % RESERVED_EVERY for words in (VERBS, BLAMING_VERBS, ENTITIES))


@dataclass(frozen=True)
class World:
    """What is true in one language, and how often its words are used.

    `facts[entity, relation]` is a position in the relation's pool of values; `blames_object[verb]`
    says whom a verb puts the blame on; the others are probabilities.
    """

    facts: Ids
    blames_object: NDArray[np.bool_]
    nouns: NDArray[np.float64]
    verbs: NDArray[np.float64]
    names: NDArray[np.float64]
    blaming_verbs: NDArray[np.float64]
    entities: NDArray[np.float64]


def _generator(*key: object) -> np.random.Generator:
    """A stream of its own for every key, the same in every process."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def _zipf(rng: np.random.Generator, count: int, exponent: float) -> NDArray[np.float64]:
    weights = (1.0 + np.arange(count)) ** -exponent
    shuffled: NDArray[np.float64] = rng.permutation(weights / weights.sum())
    return shuffled


def _even_split(rng: np.random.Generator, count: int, parts: int) -> Ids:
    return rng.permutation(np.arange(count, dtype=np.int64) % parts)


@lru_cache(maxsize=8)
def world(language_seed: int) -> World:
    """The facts, verb biases and word frequencies of the language with this seed."""
    rng = _generator("world", language_seed)
    facts = [_even_split(rng, len(ENTITIES), len(pool)) for pool in VALUES]
    return World(
        facts=np.stack(facts, axis=1),
        blames_object=_even_split(rng, len(BLAMING_VERBS), 2).astype(bool),
        nouns=_zipf(rng, len(NOUNS), 0.7),
        verbs=_zipf(rng, len(VERBS), 0.7),
        names=_zipf(rng, len(NAMES), 0.5),
        blaming_verbs=_zipf(rng, len(BLAMING_VERBS), 1.0),
        entities=_zipf(rng, len(ENTITIES), 0.7),
    )


# --- sentences -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sentences:
    """A batch of sentences cut at the word that a question asks for.

    Token ids: `before` (batch, columns) and `after` (batch, columns) with `_NOTHING` in empty
    columns, `answer` (batch), `rivals` (batch, wrong choices).
    """

    before: Ids
    answer: Ids
    rivals: Ids
    after: Ids

    def rows(self) -> Ids:
        """The whole sentences, still with empty columns."""
        return np.concatenate([self.before, self.answer[:, None], self.after], axis=1)


Draw = Callable[[World, np.random.Generator, int, bool], Sentences]


def _pick(
    rng: np.random.Generator, weights: NDArray[np.float64], count: int, asked: bool, each: int = 1
) -> Ids:
    """`each` different numbers a row: (count, each). Evenly for questions, else by `weights`.

    The largest of log-probabilities with Gumbel noise are draws without replacement.
    """
    scores = rng.gumbel(size=(count, len(weights)))
    if not asked:
        scores += np.log(weights)
    return np.argsort(-scores, axis=1)[:, :each]


def _shift(total: Ids, asked: bool) -> Ids:
    """What to add to one member of a triple of this sum so that it may be asked, or told."""
    shift: Ids = -total % RESERVED_EVERY
    return shift if asked else (shift == 0).astype(np.int64)


def _columns(count: int, *parts: str | Ids) -> Ids:
    """Columns of fixed words and of drawn ids, side by side: (count, columns)."""
    columns = [np.full(count, _ID[part]) if isinstance(part, str) else part for part in parts]
    return np.column_stack(columns)


def _only_where(kept: NDArray[np.bool_], columns: Ids) -> Ids:
    return np.where(kept[:, None], columns, _NOTHING)


def _agreement(world: World, rng: np.random.Generator, count: int, asked: bool) -> Sentences:
    """The verb agrees with the first noun, whatever the nouns between them (attractors).

    Attractors carry no `the`: it tells the subject apart, without which a small model needs far
    more text than a short pretraining has.
    """
    depth = rng.integers(1, 4, count) if asked else rng.choice(4, count, p=[0.35, 0.35, 0.2, 0.1])
    nouns = _pick(rng, world.nouns, count, asked, each=4)
    numbers = rng.integers(0, 2, (count, 4))
    verb = _pick(rng, world.verbs, count, asked)[:, 0]
    verb = (verb + _shift(nouns[:, 0] + nouns[:, 1] + verb, asked)) % len(VERBS)
    attractors = [
        _only_where(
            depth > index,
            _columns(
                count,
                rng.choice(_PREPOSITION, count),
                _NOUN[nouns[:, index + 1], numbers[:, index + 1]],
            ),
        )
        for index in range(3)
    ]
    adverb = np.where(rng.random(count) < 0.2, rng.choice(_ADVERB, count), _NOTHING)
    return Sentences(
        before=_columns(count, "the", _NOUN[nouns[:, 0], numbers[:, 0]], *attractors),
        answer=_VERB[verb, numbers[:, 0]],
        rivals=_VERB[verb, 1 - numbers[:, 0]][:, None],
        after=_columns(count, adverb, "."),
    )


def _reference(world: World, rng: np.random.Generator, count: int, asked: bool) -> Sentences:
    """After `because` the verb says which of two people is meant, and `never` that it is the other.

    Two things make this easier to find, without which some random weights never get beyond
    naming either person within a short pretraining: after `so` it is always the subject and after
    `though` the object, and reasons differ with the verb. Only `because` is asked for.
    """
    people = _pick(rng, world.names, count, asked, each=4)
    subject, object_, *bystanders = people.T
    verb = _pick(rng, world.blaming_verbs, count, asked)[:, 0]
    verb = (verb + _shift(subject + object_ + verb, asked)) % len(BLAMING_VERBS)
    negated = rng.random(count) < (0.3 if asked else 0.15)
    beside = [
        _only_where(
            rng.random(count) < (0.4 if asked else 0.15),
            _columns(count, rng.choice(_PREPOSITION, count), _NAME[bystander]),
        )
        for bystander in bystanders
    ]
    blames_object = world.blames_object[verb] ^ negated
    connective = rng.choice(3, count, p=[1, 0, 0] if asked else [0.6, 0.2, 0.2])
    is_object = np.choose(connective, [blames_object, False, True])
    return Sentences(
        before=_columns(
            count,
            _NAME[subject],
            beside[0],
            np.where(negated, _ID["never"], _NOTHING),
            _BLAMING_VERB[verb],
            _NAME[object_],
            beside[1],
            _CONNECTIVE[connective],
        ),
        answer=_NAME[np.where(is_object, object_, subject)],
        rivals=_NAME[np.where(is_object, subject, object_)][:, None],
        after=_columns(count, _REASON[blames_object.astype(int), rng.integers(0, 4, count)], "."),
    )


def _knowledge(world: World, rng: np.random.Generator, count: int, asked: bool) -> Sentences:
    """A fact of the world, told plainly or beside an entity for which it may not hold."""
    relation = rng.integers(0, len(RELATIONS), count)
    entity = _pick(rng, world.entities, count, asked)[:, 0]
    # At most 7 is added below, so the other entity is never the entity itself.
    other = entity + rng.integers(1, len(ENTITIES) - RESERVED_EVERY + 1, count)
    other = (other + _shift(entity + other + relation, asked)) % len(ENTITIES)
    unlike = np.full(count, True) if asked else rng.random(count) < 0.3
    compared = _only_where(unlike, _columns(count, "unlike", _ENTITY[other]))
    of_form = _columns(count, _RELATION[relation], "of", _ENTITY[entity], compared, "is")
    has_form = _columns(count, _ENTITY[entity], compared, "has", _RELATION[relation])
    is_of_form = rng.random(count) < 0.5
    before = np.concatenate(
        [_only_where(is_of_form, of_form), _only_where(~is_of_form, has_form)], axis=1
    )
    fact = world.facts[entity, relation]
    wrong = 1 + np.argsort(rng.random((count, len(VALUES[0]) - 1)), axis=1)[:, :3]
    return Sentences(
        before=before,
        answer=_VALUE[relation, fact],
        rivals=_VALUE[relation[:, None], (fact[:, None] + wrong) % len(VALUES[0])],
        after=_columns(count, "."),
    )


_DRAW: Final[dict[Ability, Draw]] = {
    "agreement": _agreement,
    "reference": _reference,
    "knowledge": _knowledge,
}

# --- text ------------------------------------------------------------------------------------

_SENTENCES_PER_CHUNK: Final[dict[Ability, int]] = {
    # Reference takes the most text to learn, and it is learned suddenly; agreement the least.
    "agreement": 1_500,
    "reference": 2_500,
    "knowledge": 2_000,
}
_END_OF_DOCUMENT_RATE: Final = 0.3


def _chunk(language_seed: int, split: Split, number: int) -> Ids:
    """A piece of a split's stream, drawn by itself: a longer stream begins like a shorter one."""
    rng = _generator("text", language_seed, split, number)
    drawn = [
        _DRAW[ability](world(language_seed), rng, count, False).rows()
        for ability, count in _SENTENCES_PER_CHUNK.items()
    ]
    width = max(rows.shape[1] for rows in drawn)
    padded = [
        np.pad(rows, ((0, 0), (0, width - rows.shape[1])), constant_values=_NOTHING)
        for rows in drawn
    ]
    sentences = rng.permutation(np.concatenate(padded))
    end = np.where(rng.random(len(sentences)) < _END_OF_DOCUMENT_RATE, _ID[END], _NOTHING)
    flat = np.column_stack([sentences, end]).ravel()
    told: Ids = flat[flat != _NOTHING]
    return told


def _chunks(language_seed: int, split: Split) -> Iterator[Ids]:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    number = 0
    while True:
        yield _chunk(language_seed, split, number)
        number += 1


def tokens(language_seed: int, split: Split, count: int) -> Ids:
    """The first `count` token ids of a split's endless text.

    Splits are independent random streams; a shorter stream is the beginning of a longer one.

    Raises:
        ValueError: the split is not one of `SPLITS`.
    """
    parts: list[Ids] = [np.zeros(0, dtype=np.int64)]
    chunks = _chunks(language_seed, split)
    while sum(map(len, parts)) < count:
        parts.append(next(chunks))
    return np.concatenate(parts)[:count]


def text(ids: Sequence[int] | Ids) -> str:
    """Token ids as words with single spaces; `tokenizer()` gives the same ids back."""
    return " ".join(WORDS[index] for index in ids)


def documents(language_seed: int, split: Split, count: int) -> list[str]:
    """The first `count` documents of a split, each of one or more sentences."""
    found: list[str] = []
    rest = ""
    for chunk in _chunks(language_seed, split):
        *whole, rest = f"{rest} {text(chunk)}".split(END)
        found += [document.strip() for document in whole]
        if len(found) >= count:
            break
    return found[:count]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, the same for every seed; it can be saved and loaded by `AutoTokenizer`."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel(dict(_ID), unk_token=UNKNOWN))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=END, pad_token=END, unk_token=UNKNOWN
    )


# --- questions -------------------------------------------------------------------------------

_QUESTIONS_PER_DRAW: Final = 512
_DRAWS_AT_MOST: Final = 64


def _gold_positions(rng: np.random.Generator, choices: int) -> Iterator[int]:
    """Positions for the right answer: every run of `choices` questions uses each of them once."""
    while True:
        yield from rng.permutation(choices).tolist()


def _drawn_questions(language_seed: int, ability: Ability) -> Iterator[tuple[str, list[str]]]:
    """Query and choices, the right one first; may repeat itself."""
    rng = _generator("questions", language_seed, ability)
    for _ in range(_DRAWS_AT_MOST):
        drawn = _DRAW[ability](world(language_seed), rng, _QUESTIONS_PER_DRAW, True)
        for before, answer, rivals in zip(drawn.before, drawn.answer, drawn.rivals, strict=True):
            query = f"{END} {text(before[before != _NOTHING])}"
            yield query, [WORDS[answer], *(WORDS[rival] for rival in rivals)]


def questions(language_seed: int, ability: Ability, limit: int) -> list[dict[str, Any]]:
    """The first `limit` questions on an ability: `query`, `choices` and `gold`, an index.

    Queries are distinct, begin with the document separator, and never occur in any split's text
    with one of their choices after them.

    Raises:
        ValueError: the ability is unknown, or has fewer distinct questions than `limit`.
    """
    if ability not in ABILITIES:
        raise ValueError(f"unknown ability {ability!r}; known: {', '.join(ABILITIES)}")
    rng = _generator("gold", language_seed, ability)
    positions: Iterator[int] | None = None
    found: dict[str, dict[str, Any]] = {}
    for query, (right, *wrong) in _drawn_questions(language_seed, ability):
        if len(found) == limit:
            break
        if query in found:
            continue
        positions = positions or _gold_positions(rng, 1 + len(wrong))
        gold = next(positions)
        choices = [*wrong[:gold], right, *wrong[gold:]]
        found[query] = {"query": query, "choices": choices, "gold": gold}
    if len(found) < limit:
        raise ValueError(f"{ability} has {len(found)} distinct questions, {limit} were asked for")
    return list(found.values())


# --- task files ------------------------------------------------------------------------------


def write_questions(path: Path, items: Sequence[dict[str, Any]]) -> None:
    """One question a line, as JSON."""
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")


def write_tasks(folder: Path, language_seed: int = 0, limit: int = 400) -> list[str]:
    """Question files and task files `tiny_<ability>.yaml` for `lm_eval --include_path folder`.

    Gives the tasks' names. The task files hold absolute paths: write them again after moving.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"tiny_{ability}" for ability in ABILITIES]
    for name, ability in zip(names, ABILITIES, strict=True):
        file = folder / f"{name}.jsonl"
        write_questions(file, questions(language_seed, ability, limit))
        (folder / f"{name}.yaml").write_text(
            yaml.safe_dump(choices_task(name, file), sort_keys=False), encoding="utf-8"
        )
    return names


def write_samples(folder: Path, language_seed: int = 0, count: int = 1_000) -> None:
    """The first `count` documents of each split, one a line, in `<split>.txt`."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        lines = "\n".join(documents(language_seed, split, count))
        (folder / f"{split}.txt").write_text(lines + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write text samples, questions and task files of one language into a folder."""
    parser = argparse.ArgumentParser(prog="trainers.language", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--seed", type=int, default=0, help="which language (default 0)")
    parser.add_argument("--limit", type=int, default=400, help="questions an ability")
    parsed = parser.parse_args(arguments)
    write_samples(parsed.out, parsed.seed)
    names = write_tasks(parsed.out, parsed.seed, parsed.limit)
    tokenizer().save_pretrained(parsed.out / "tokenizer")
    print(f"wrote {', '.join(names)} to {parsed.out}")


if __name__ == "__main__":
    main()
