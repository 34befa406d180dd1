"""Where there is no effect, at most one claim in twenty gets a verdict.

Made-up sweeps whose questions and seeds are both noisy: a question suits one way of making models
more than another, a seed may be lucky for one of them, and each answer is a draw of its own. By
construction none of that favours either way in the long run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import made_up
import numpy as np
import pytest
from pydantic import TypeAdapter
from scipy import stats

from orchestrator.asked import Claim
from orchestrator.claims import Verdict, judge
from orchestrator.records import ItemRecord, Records, TrialRecord

SWEEPS = 300
ALLOWED = int(stats.binom.ppf(0.99, SWEEPS, 0.05))
"""Of a hundred tests of a rule that is wrong in exactly one case of twenty, one is above this."""

WITHIN = 0.05
ADAPTER: TypeAdapter[Claim] = TypeAdapter(Claim)
BETTER = {"better": {"way": "new"}, "than": {"way": "old"}}
NO_BETTER = {"no_better": {"way": "new"}, "than": {"way": "old"}, "within": WITHIN}
RANKING = {"ranking": {"first": "lm_loss.before", "then": "lm_loss.after", "agreement_below": 0.9}}
GAINS = {"better": 0.0, "no_better": WITHIN}
KINDS = {"better": BETTER, "no_better": NO_BETTER}


def trial(way: Any, seed: int, metrics: Mapping[str, float]) -> TrialRecord:
    whole = made_up.trial("perplexity", seed, 0, {})
    return replace(whole, trial_id=f"{way}-{seed}", axes={"way": way}, metrics=metrics)


def by_loss(draw: np.random.Generator, seeds: int, gain: float) -> Records:
    """Losses that depend on the seed, and on the seed and the way together."""
    shared = draw.normal(2, 0.5, seeds)
    found = [
        trial(way, seed, {"lm_loss.after": shared[seed] - better + draw.normal(0, 0.1)})
        for way, better in (("new", gain), ("old", 0.0))
        for seed in range(seeds)
    ]
    return Records("s", "p", trials=tuple(found))


def by_questions(
    draw: np.random.Generator, seeds: int, gain: float, luck: float, questions: int = 25
) -> Records:
    """Answers to three tasks; `luck` is how far a seed may move a way's chance to be right."""
    found, items = [], []
    chance = draw.uniform(0.35, 0.6, (3, questions))
    for way, better in (("new", gain), ("old", 0.0)):
        suits = draw.uniform(luck - 0.3, 0.3 - luck, chance.shape)
        for seed in range(seeds):
            right = chance + suits + better + draw.uniform(-luck, luck)
            correct = (draw.random(chance.shape) < right).astype(float)
            found.append(trial(way, seed, {"accuracy.mean": float(correct.mean())}))
            items += [
                ItemRecord(f"{way}-{seed}", f"task{task}", f"{item:03d}", "select", float(c), None)
                for task, row in enumerate(correct)
                for item, c in enumerate(row)
            ]
    return Records("s", "p", trials=tuple(found), items=tuple(items))


def verdict_on(records: Records, keys: Mapping[str, Any], metric: str | None) -> Verdict:
    more = {} if metric is None else {"metric": metric}
    claim = ADAPTER.validate_python({"text": "?", **keys, **more})
    (verdict,) = judge(records, [claim])
    return verdict


def false_verdicts(
    make: Callable[[np.random.Generator], Records], keys: Mapping[str, Any], metric: str | None
) -> int:
    draw = np.random.default_rng(11)
    found = (verdict_on(make(draw), keys, metric).verdict for _ in range(SWEEPS))
    return sum(verdict != "undecided" for verdict in found)


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_of_losses(kind: str, seeds: int) -> None:
    def make(draw: np.random.Generator) -> Records:
        return by_loss(draw, seeds, GAINS[kind])

    assert false_verdicts(make, KINDS[kind], "lm_loss.after") <= ALLOWED


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("opponents", [2, 8])
def test_of_the_best_of_several(opponents: int, seeds: int) -> None:
    """All are equal: neither may one be called the best, nor another better than it."""

    def make(draw: np.random.Generator) -> Records:
        shared = draw.normal(2, 0.5, seeds)
        found = [
            trial(way, seed, {"lm_loss.after": shared[seed] + draw.normal(0, 0.1)})
            for way in range(1 + opponents)
            for seed in range(seeds)
        ]
        return Records("s", "p", trials=tuple(found))

    best = {"better": {"way": 0}, "than_each": "others"}
    assert false_verdicts(make, best, "lm_loss.after") <= ALLOWED


@pytest.mark.parametrize(("seeds", "luck"), [(1, 0.1), (2, 0.1), (3, 0.0), (3, 0.1), (8, 0.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_of_accuracies(kind: str, seeds: int, luck: float) -> None:
    def make(draw: np.random.Generator) -> Records:
        return by_questions(draw, seeds, GAINS[kind], luck)

    assert false_verdicts(make, KINDS[kind], "accuracy.mean") <= ALLOWED


@pytest.mark.parametrize("step", [0.0, 0.03, 0.3], ids=["all_equal", "close", "apart"])
@pytest.mark.parametrize(("configurations", "seeds"), [(4, 1), (4, 3), (10, 2), (10, 3)])
def test_of_rankings_that_do_not_change(configurations: int, seeds: int, step: float) -> None:
    """The two metrics rank alike: that the ranking changes may not be supported; where all are
    equal, nothing may be said. Noise is 0.1, and where there is an order 0.3 of the last."""

    def make(draw: np.random.Generator) -> Records:
        shared = draw.normal(0, 0.5, (2, seeds))
        loss = step * np.arange(configurations)
        noise = np.where(loss == loss[-1], 0.3, 0.1) if step else np.full(configurations, 0.1)
        found = [
            trial(way, seed, {
                "lm_loss.before": 3 + loss[way] + shared[0, seed] + draw.normal(0, noise[way]),
                "lm_loss.after": 2 + loss[way] + shared[1, seed] + draw.normal(0, noise[way]),
            })
            for way in range(configurations)
            for seed in range(seeds)
        ]  # fmt: skip
        return Records("s", "p", trials=tuple(found))

    draw = np.random.default_rng(11)
    verdicts = [verdict_on(make(draw), RANKING, None).verdict for _ in range(SWEEPS)]
    false = {"supported"} if step else {"supported", "contradicted"}
    assert sum(verdict in false for verdict in verdicts) <= ALLOWED


@pytest.mark.parametrize("metric", ["lm_loss.after", "accuracy.mean"])
def test_an_effect_that_is_there_is_found_more_often_than_not(metric: str) -> None:
    def make(draw: np.random.Generator) -> Records:
        if metric == "lm_loss.after":
            return by_loss(draw, 3, 0.6)
        return by_questions(draw, 3, 0.25, 0.03)

    draw = np.random.default_rng(11)
    found = [verdict_on(make(draw), BETTER, metric).verdict for _ in range(100)]
    assert found.count("supported") > 50
    assert found.count("contradicted") == 0
