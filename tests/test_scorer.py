"""Shared beginnings, packed rows, read positions: `HFLM`'s answers for every family of models."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from families_at_hand import VARIANTS, tiny_config, tiny_model
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel

from trainers import checkpoints, language, scorer
from trainers.contract import StageError
from trainers.scorer import Request, Scorer, Tokens

TOKENIZER = language.tokenizer()
VOCABULARY = 64
WINDOWED = [name for name, settings in VARIANTS.items() if "sliding_window" in settings]


def tokens(random_: random.Random, count: int) -> list[int]:
    return [random_.randrange(VOCABULARY) for _ in range(count)]


def asked() -> list[Request]:
    """Questions behind the same examples; choices that begin alike, or differ in one last token; a
    question asked twice, one that goes on another, and one that is too long for the models."""
    draw = random.Random(0)
    examples = tokens(draw, 20)
    found: list[Request] = []
    for number in range(6):
        context = examples + tokens(draw, 5 + number)
        begins = tokens(draw, 2)
        found += [(None, context, begins + tokens(draw, length)) for length in (1, 1, 3)]
        found += [(None, context, [last]) for last in range(3)]
    _pair, context, choice = found[0]
    found += [found[3], (None, context + choice, tokens(draw, 2))]
    found += [(None, tokens(draw, 70), tokens(draw, length)) for length in (1, 4)]
    return found


def harness(model: PreTrainedModel, batch_size: int = 5) -> HFLM:
    return HFLM(pretrained=model, tokenizer=TOKENIZER, batch_size=batch_size, device="cpu")


def same_as_the_harness(model: PreTrainedModel) -> None:
    requests = asked()
    ours = Scorer(model, TOKENIZER)._loglikelihood_tokens(requests)
    theirs = harness(model)._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


# --- the same answers ------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_every_family_is_scored_as_the_harness_does(name: str) -> None:
    same_as_the_harness(tiny_model(name))


@pytest.mark.parametrize("name", WINDOWED)
def test_beginnings_are_shared_within_a_sliding_window(name: str) -> None:
    settings = tiny_config(name) | {"sliding_window": 40}
    model = checkpoints.new_model(settings, seed=3).eval()
    assert scorer.longest_shared(model) == 40
    same_as_the_harness(model)


def test_capped_logits_are_read_as_the_model_gives_them() -> None:
    model = tiny_model("gemma2")
    model.config.final_logit_softcapping = 0.5
    same_as_the_harness(model)


def test_the_size_of_batches_changes_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, requests = tiny_model("llama"), asked()
    together = Scorer(model, TOKENIZER)._loglikelihood_tokens(requests)
    for name in ("TOKENS_A_BATCH", "TOKENS_A_ROW", "POSITIONS_A_CHUNK"):
        monkeypatch.setattr(scorer, name, 1)
        alone = Scorer(model, TOKENIZER)._loglikelihood_tokens(requests)
        assert [value for value, _ in alone] == pytest.approx(
            [value for value, _ in together], abs=1e-4
        )


def test_bf16_scores_nearly_the_same() -> None:
    model, requests = tiny_model("llama"), asked()
    full = Scorer(model, TOKENIZER)._loglikelihood_tokens(requests)
    half = Scorer(model.to(torch.bfloat16), TOKENIZER)._loglikelihood_tokens(requests)
    for (value, _), (exact, _) in zip(half, full, strict=True):
        assert value == pytest.approx(exact, rel=0.05, abs=0.1)
    assert half != full


def test_a_choice_without_a_token_is_an_error() -> None:
    with pytest.raises(StageError, match="a choice without any token"):
        Scorer(tiny_model("llama"), TOKENIZER)._loglikelihood_tokens([(None, [1, 2], [])])


# --- whole texts, and texts of the model's own -----------------------------------------------


def instances(kind: Any, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=number)
        for number, each in enumerate(arguments)
    ]


def test_whole_texts_are_scored_as_the_harness_does_beyond_the_models_length(
    model: PreTrainedModel,
) -> None:
    texts = [("the dog sings .",), ("the cats near the dog sleep . " * 30,), ("sings",)]
    requests = instances("loglikelihood_rolling", texts)
    assert model.config.max_position_embeddings == 128
    ours = Scorer(model, TOKENIZER).loglikelihood_rolling(requests)
    theirs = harness(model).loglikelihood_rolling(requests, disable_tqdm=True)
    assert ours == pytest.approx(theirs, abs=1e-3)


def test_texts_are_generated_in_batches_as_one_by_one(model: PreTrainedModel) -> None:
    contexts = ["the dog", "the cats near the dog", "sings", "the dog sleeps . the cats"] * 5
    how = {"until": ["."], "max_gen_toks": 6, "do_sample": False}
    requests = instances("generate_until", [(context, how) for context in contexts])
    ours = Scorer(model, TOKENIZER).generate_until(requests)
    assert ours == harness(model, batch_size=1).generate_until(requests, disable_tqdm=True)
    assert len(set(ours)) > 1


# --- rows ------------------------------------------------------------------------------------


def unrolled(batches: list[list[scorer.Row]]) -> list[Tokens]:
    """The sequences in all rows, each read along its path; parents agree with the paths."""
    found = []
    for batch in batches:
        for row in batch:
            for sequence, path in row.paths.items():
                assert [row.parents[place] for place in path] == [-1, *path[:-1]]
                assert tuple(row.tokens[place] for place in path) == sequence
                found.append(sequence)
    return found


@pytest.mark.parametrize("seed", range(20))
def test_rows_hold_every_sequence_once_within_their_size(seed: int) -> None:
    draw = random.Random(seed)
    stems = [tuple(draw.choices(range(5), k=draw.randrange(40))) for _ in range(5)]
    sequences = {
        draw.choice(stems) + tuple(draw.choices(range(5), k=draw.randint(1, 12))) for _ in range(60)
    } | {tuple(range(700))}
    longest = draw.choice([0, 20, 2048])
    size = draw.choice([64, 512])
    batches = scorer.batches_of(sequences, draw.choice([1, 32, 4096]), longest, size)
    assert sorted(unrolled(batches)) == sorted(sequences)
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(map(len, batch)) <= size
        for row in batch:
            assert len(row) <= scorer.TOKENS_A_ROW
            assert len(row.paths) == 1 or max(map(len, row.paths)) <= longest


def test_what_choices_share_stands_once() -> None:
    context = tuple(range(30))
    choices = [(*context, 40, 41), (*context, 40, 42, 43), (*context, 50)]
    [[row]] = scorer.batches_of(choices, 64, 2048, 512)
    assert len(row) == 30 + 4 + 1


def test_questions_share_the_examples_shown_before_them() -> None:
    examples = tuple(range(100))
    questions = [(*examples, *[200 + number] * 20, last) for number in range(8) for last in (1, 2)]
    [[row]] = scorer.batches_of(questions, 576, 2048, 512)
    assert len(row) == 100 + 8 * 22


def test_choices_share_a_context_that_is_longer_than_a_row() -> None:
    context = tuple(range(3000))
    batches = scorer.batches_of([(*context, last) for last in range(4)], 576, 10_000, 512)
    assert [len(row) for batch in batches for row in batch] == [3004]


def test_rows_are_filled_up() -> None:
    draw = random.Random(1)
    sequences = [(number, *draw.choices(range(5), k=draw.randint(5, 60))) for number in range(300)]
    batches = scorer.batches_of(sequences, 1, 2048, 512)
    padded = sum(len(batch) * max(map(len, batch)) for batch in batches)
    assert sum(map(len, sequences)) > 0.95 * padded


def test_a_model_whose_attention_takes_no_mask_shares_nothing() -> None:
    model = tiny_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    assert scorer.longest_shared(model) == 0
    batches = scorer.batches_of({(1, 2, 3), (1, 2, 4), (5,)}, 64, 0, 512)
    assert len(unrolled(batches)) == 3
    assert all(scorer.inputs_of(batch, model).keys() == {"input_ids"} for batch in batches)
