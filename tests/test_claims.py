"""A claim gets the verdict that the trials bear out, and no more than that."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import made_up
import numpy as np
import pytest
import small_sweep
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from scipy import stats

from orchestrator.asked import Claim
from orchestrator.axes import parse_axes
from orchestrator.claims import Verdict, judge
from orchestrator.records import TEACHER, ItemRecord, Records, TrialRecord
from orchestrator.space import enumerate_trials
from orchestrator.spec import SpecError, load

LOSS, ACCURACY = "lm_loss.after", "accuracy.mean"
NEW_BETTER = {"better": {"way": "new"}, "than": {"way": "old"}}
NEW_NO_BETTER = {"no_better": {"way": "new"}, "than": {"way": "old"}, "within": 0.1}
ADAPTER: TypeAdapter[Claim] = TypeAdapter(Claim)


def asked(keys: Mapping[str, Any], **more: Any) -> Claim:
    """A claim as a sweep file would hold it."""
    metric = {} if "ranking" in keys else {"metric": LOSS}
    return ADAPTER.validate_python({"text": "new is better", **metric, **keys, **more})


def trial(
    seed: int, value: float, metric: str = LOSS, baseline: str | None = None, **axes: Any
) -> TrialRecord:
    name = ",".join([baseline or "grid", *(f"{n}={v}" for n, v in axes.items()), str(seed)])
    whole = made_up.trial("perplexity", seed, 0, {})
    return replace(whole, trial_id=name, baseline=baseline, axes=axes, metrics={metric: value})


def trials(way: str, values: Sequence[float], metric: str = LOSS, **axes: Any) -> list[TrialRecord]:
    """One trial a seed, from seed 0 on."""
    return [trial(seed, value, metric, way=way, **axes) for seed, value in enumerate(values)]


def judged(found: Sequence[TrialRecord], claim: Claim, items: Sequence[ItemRecord] = ()) -> Verdict:
    (verdict,) = judge(Records("s", "p", trials=tuple(found), items=tuple(items)), [claim])
    return verdict


def interval(verdict: Verdict) -> tuple[float, float, float]:
    effect = verdict.effect
    assert effect is not None and effect.low is not None and effect.high is not None
    return effect.value, effect.low, effect.high


# --- the effect and its verdict ---


def test_the_effect_is_the_paired_difference_with_students_interval_over_seeds() -> None:
    new, old = [2.0, 2.3, 2.1], [2.5, 2.6, 2.7]
    verdict = judged(trials("new", new) + trials("old", old), asked(NEW_BETTER))
    naive = stats.ttest_rel(old, new)  # a lower loss is better
    expected = np.mean(np.subtract(old, new)), *naive.confidence_interval(0.95)
    assert interval(verdict) == pytest.approx(expected)
    assert (verdict.pairs, verdict.seeds, verdict.metric) == (3, 3, LOSS)


@pytest.mark.parametrize(
    ("metric", "new", "old", "expected"),
    [
        (LOSS, [2.0, 2.1, 2.05], [2.5, 2.62, 2.53], "supported"),
        (LOSS, [2.5, 2.62, 2.53], [2.0, 2.1, 2.05], "contradicted"),
        (LOSS, [2.0, 2.6, 2.1], [2.3, 2.2, 2.4], "undecided"),
        ("throughput.b1", [80.0, 82.0, 81.0], [40.0, 41.0, 42.5], "supported"),
        ("throughput.b1", [40.0, 41.0, 42.5], [80.0, 82.0, 81.0], "contradicted"),
    ],
)
def test_a_claim_is_supported_contradicted_or_undecided(
    metric: str, new: list[float], old: list[float], expected: str
) -> None:
    found = trials("new", new, metric) + trials("old", old, metric)
    assert judged(found, asked(NEW_BETTER, metric=metric)).verdict == expected


@pytest.mark.parametrize(
    ("gain", "expected"), [(0.0, "supported"), (0.5, "contradicted"), (0.1, "undecided")]
)
def test_no_better_asks_whether_the_gain_stays_within_what_matters(
    gain: float, expected: str
) -> None:
    old = [2.5, 2.6, 2.4]
    noise = [0.01, -0.01, 0.005]
    new = [value - gain + each for value, each in zip(old, noise, strict=True)]
    assert judged(trials("new", new) + trials("old", old), asked(NEW_NO_BETTER)).verdict == expected


def test_less_of_a_perplexity_among_the_tasks_is_better() -> None:
    found, items = [], []
    for seed in range(3):
        for way, (perplexity, right) in {"new": (20.0, 0.5), "old": (30.0, 0.6)}.items():
            each = trial(seed, 0.0, way=way)
            values = {"accuracy.text": perplexity + seed, "accuracy.quiz": right}
            found.append(replace(each, metrics={**values, "accuracy.mean": right}))
            items += [
                ItemRecord(each.trial_id, metric.partition(".")[2], "0", "select", value, None)
                for metric, value in values.items()
            ]
    assert judged(found, asked(NEW_BETTER, metric="accuracy.text"), items).verdict == "supported"
    assert judged(found, asked(NEW_BETTER, metric="accuracy.quiz"), items).effect.value < 0


def test_being_worse_supports_no_better() -> None:
    found = trials("new", [3.5, 3.62, 3.53]) + trials("old", [2.0, 2.1, 2.05])
    assert judged(found, asked(NEW_NO_BETTER)).verdict == "supported"


# --- pairs ---


def test_trials_are_paired_across_the_axes_that_no_group_names() -> None:
    # The other axis and the seed matter far more than what the claim is about.
    found = [
        trial(seed, way_loss + other + seed + noise, way=way, other=other)
        for way, way_loss in (("new", 0.0), ("old", 0.1))
        for other in (0, 5)
        for seed, noise in ((0, 0.0), (1, way_loss / 10), (2, -way_loss / 10))
    ]
    verdict = judged(found, asked(NEW_BETTER))
    assert (verdict.verdict, verdict.pairs, verdict.seeds) == ("supported", 6, 3)
    assert interval(verdict)[0] == pytest.approx(0.1)


def test_every_setting_of_the_other_axes_counts_the_same() -> None:
    # Two new ways at other=0 and one at other=1: the effect is the mean of 1 and 3.
    found = [
        trial(seed, value + seed / 100 * value, way=way, other=other)
        for seed in (0, 1)
        for way, other, value in (
            ("new", 0, 3.0), ("newer", 0, 3.0), ("old", 0, 4.0), ("new", 1, 1.0), ("old", 1, 4.0)
        )
    ]  # fmt: skip
    verdict = judged(found, asked({"better": {"way": ["new", "newer"]}, "than": {"way": "old"}}))
    assert interval(verdict)[0] == pytest.approx(2.0 * 1.005)
    assert verdict.pairs == 6


def test_others_are_all_trials_of_the_grid_outside_the_first_group() -> None:
    found = [
        trial(seed, value + 0.01 * seed, way=way, size=size)
        for way, size, value in (("new", 1, 1.0), ("new", 2, 2.0), ("old", 1, 3.0))
        for seed in (0, 1, 2)
    ]
    found += [trial(seed, 9.0, baseline="chance") for seed in (0, 1, 2)]
    claim = asked({"better": {"way": "new", "size": 1}, "than": "others"})
    verdict = judged(found, claim)
    assert verdict.pairs == 2 * 3
    assert verdict.effect is not None
    assert verdict.effect.value == pytest.approx((1.0 + 2.0) / 2)


def test_a_baseline_is_compared_with_every_value_of_an_axis_it_lacks() -> None:
    found = [
        trial(seed, 2.0 + other + seed / 10 * other, way="new", other=other)
        for other in (0, 1)
        for seed in (0, 1)
    ] + [trial(seed, 4.0, baseline="chance") for seed in (0, 1)]
    verdict = judged(found, asked({"better": {"way": "new"}, "than": {"baseline": "chance"}}))
    assert (verdict.pairs, verdict.seeds) == (4, 2)
    assert interval(verdict)[0] == pytest.approx((1.5 + 1.45) / 2)


EACH = {"better": {"way": "new"}, "than_each": {"way": ["old", "older"]}}


def test_better_than_each_looks_at_every_setting_where_better_than_looks_at_their_mean() -> None:
    found = [
        *trials("new", [2.0, 2.2, 2.4]),
        *trials("old", [1.9, 2.11, 2.3]),  # ahead
        *trials("older", [9.0, 9.1, 9.2]),  # so far behind that the mean is, too
    ]
    mean = asked({"better": {"way": "new"}, "than": {"way": ["old", "older"]}})
    assert judged(found, mean).verdict == "supported"
    verdict = judged(found, asked(EACH))
    assert verdict.verdict == "contradicted"
    assert interval(verdict)[0] == pytest.approx(-0.0966667, abs=1e-6)
    assert verdict.note == "way=old is better, one of 2"


@pytest.mark.parametrize(
    ("old", "expected"), [([2.1, 2.31, 2.5], "supported"), ([2.1, 2.1, 2.5], "undecided")]
)
def test_better_than_each_is_as_sure_as_the_least_certain_comparison(
    old: list[float], expected: str
) -> None:
    found = [*trials("new", [2.0, 2.2, 2.4]), *trials("old", old)]
    found += trials("older", [3.0, 3.2, 3.41])
    verdict = judged(found, asked(EACH))
    alone = judged(found, asked(NEW_BETTER))
    assert (verdict.verdict, verdict.effect) == (expected, alone.effect)
    assert verdict.note == "against way=old, the least certain of 2"


def test_each_of_the_others_is_a_setting_of_the_axes_that_the_group_names() -> None:
    found = [
        trial(seed, value + 0.01 * seed * value, way=way, size=size, other=other)
        for way, size, value in (("new", 1, 1.0), ("new", 2, 2.0), ("old", 1, 3.0))
        for other in ("a", "b")
        for seed in (0, 1, 2)
    ]
    claim = asked({"better": {"way": "new", "size": 1}, "than_each": "others"})
    verdict = judged(found, claim)
    assert (verdict.verdict, verdict.pairs, verdict.seeds) == ("supported", 2 * 3, 3)
    assert verdict.note == "against size=2, way=new, the least certain of 2"


def test_better_than_each_needs_data_of_each() -> None:
    far = [*trials("new", [2.0, 2.2, 2.4]), *trials("old", [3.0, 3.2, 3.41])]
    verdict = judged([*far, trial(7, 5.0, way="older")], asked(EACH))
    assert verdict.verdict == "undecided"
    assert verdict.note is not None and verdict.note.endswith("no pair with 1 more")
    assert judged(trials("new", [2.0, 2.2]), asked(EACH)).verdict == "no data"


def test_better_than_each_is_not_supported_by_an_opponent_with_one_seed() -> None:
    ways = {"new": 0.8, "old": 0.4, "older": 0.2}
    found, items = [], []
    for way, share in ways.items():
        for seed in (0,) if way == "older" else (0, 1, 2):
            each = trial(seed, share + seed / 100, ACCURACY, way=way)
            found.append(each)
            items += [
                ItemRecord(each.trial_id, "t", f"{i:03d}", "select", float(i < 100 * share), None)
                for i in range(100)
            ]
    claim = asked({**EACH, "metric": ACCURACY})
    verdict = judged(found, claim, items)
    assert verdict.verdict == "undecided"
    assert verdict.note is not None and "one seed of some decides nothing" in verdict.note
    twice = [*found, replace(found[-1], trial_id="twice", seed=1)]
    more = [replace(i, trial_id="twice") for i in items if i.trial_id == found[-1].trial_id]
    assert judged(twice, claim, [*items, *more]).verdict == "supported"


def test_better_than_each_is_undecided_with_one_seed() -> None:
    found = [trial(0, value, way=way) for way, value in (("new", 1), ("old", 2), ("older", 3))]
    assert judged(found, asked(EACH)).verdict == "undecided"


def test_a_teacher_of_every_seed_is_compared_with_its_own_seed() -> None:
    found = [*trials("new", [2.0, 3.0, 4.001])]
    found += [trial(seed, 1.9 + seed, baseline=TEACHER) for seed in range(3)]
    verdict = judged(found, asked({"better": {"baseline": TEACHER}, "than": {"way": "new"}}))
    assert (verdict.pairs, verdict.seeds) == (3, 3)
    assert interval(verdict) == pytest.approx((0.1, 0.1, 0.1), abs=0.003)


def test_the_teacher_is_compared_with_every_seed() -> None:
    found = [*trials("new", [2.0, 2.1, 2.05]), trial(0, 1.9, baseline=TEACHER)]
    verdict = judged(found, asked({"better": {"baseline": TEACHER}, "than": {"way": "new"}}))
    assert (verdict.pairs, verdict.seeds, verdict.verdict) == (3, 3, "supported")


def test_among_narrows_the_grid_and_leaves_a_named_baseline() -> None:
    found = [
        trial(seed, value + seed / 100, way="new", rung=rung)
        for rung, value in (("short", 2.0), ("long", 1.0))
        for seed in (0, 1)
    ] + [trial(seed, 2.5, baseline="chance") for seed in (0, 1)]
    keys = {"better": {"way": "new"}, "than": {"baseline": "chance"}, "among": {"rung": "short"}}
    verdict = judged(found, asked(keys))
    assert verdict.pairs == 2
    assert interval(verdict)[0] == pytest.approx(0.495)


def test_a_failed_trial_and_a_missing_value_are_no_data_points() -> None:
    whole = trials("new", [2.0, 2.1, 2.05]) + trials("old", [2.5, 2.62, 2.53])
    more = trials("new", [0.0] * 5)[3:] + trials("old", [9.0] * 5)[3:]
    failed = replace(more[0], status="failed", reason="no", metrics={})
    found = [*whole, failed, replace(more[1], metrics={}), *more[2:]]
    without = judged(found, asked(NEW_BETTER))
    assert without.note == "1 of 4 pairs left out: a trial of their seed has no value"
    assert replace(without, note=None) == judged(whole, asked(NEW_BETTER))


def both_cells(seeds: int = 5) -> list[TrialRecord]:
    """The new way is 0.1 better where x is a, 0.3 worse where it is b, and so worse."""
    noise = [0.0, 0.0005, -0.0005, 0.0003, -0.0003]
    return [
        trial(seed, 2.0 + seed + loss + noise[seed] * (way == "new"), way=way, x=x)
        for seed in range(seeds)
        for x, gain in (("a", 0.1), ("b", -0.3))
        for way, loss in (("new", -gain), ("old", 0.0))
    ]


def failing(found: Sequence[TrialRecord], seeds: Collection[int]) -> list[TrialRecord]:
    """The new way fails where x is b."""
    return [
        replace(each, status="failed", reason="diverged", metrics={})
        if each.axes == {"way": "new", "x": "b"} and each.seed in seeds
        else each
        for each in found
    ]


def test_what_failed_everywhere_does_not_decide_by_its_absence() -> None:
    assert judged(both_cells(), asked(NEW_BETTER)).verdict == "contradicted"
    verdict = judged(failing(both_cells(), range(5)), asked(NEW_BETTER))
    assert verdict.verdict == "undecided"
    assert "1 of the settings compared have no value" in (verdict.note or "")
    found = [t for t in both_cells() if t.axes["x"] == "a"]
    assert judged(found, asked(NEW_BETTER)).verdict == "supported"


def test_only_seeds_with_every_pair_count() -> None:
    whole = judged(both_cells(), asked(NEW_BETTER))
    verdict = judged(failing(both_cells(), [1, 3]), asked(NEW_BETTER))
    assert (verdict.verdict, verdict.pairs, verdict.seeds) == ("contradicted", 6, 3)
    assert interval(verdict)[0] == pytest.approx(interval(whole)[0], abs=0.001)
    verdict = judged(failing(both_cells(), [1, 2, 3, 4]), asked(NEW_BETTER))
    assert verdict.verdict == "undecided"
    assert "fewer than two seeds have every pair" in (verdict.note or "")


def test_seeds_that_lack_different_pairs_are_not_alike_for_lacking_equally_many() -> None:
    gains = {"a": 0.6, "b": -0.5, "c": -0.5}
    found = [
        trial(seed, 2.0 + seed + loss * (1 + seed / 100), way=way, x=x)
        for seed in range(2)
        for x, gain in gains.items()
        for way, loss in (("new", -gain), ("old", 0.0))
    ]
    assert judged(found, asked(NEW_BETTER)).verdict == "contradicted"
    lost = [
        replace(t, status="failed", reason="diverged", metrics={})
        if t.axes["way"] == "new" and (t.axes["x"], t.seed) in {("b", 0), ("c", 1)}
        else t
        for t in found
    ]
    assert judged(lost, asked(NEW_BETTER)).verdict == "undecided"


def test_a_metric_that_was_not_to_be_measured_is_not_lost() -> None:
    found = trials("new", [2.0, 2.1, 2.05]) + trials("old", [2.5, 2.62, 2.53])
    without = [
        replace(each, trial_id=f"{each.trial_id}-", axes={**each.axes, "rung": "first"}, metrics={})
        for each in found
    ]
    with_rung = [replace(each, axes={**each.axes, "rung": "last"}) for each in found]
    verdict = judged([*with_rung, *without], asked(NEW_BETTER))
    assert (verdict.verdict, verdict.note, verdict.pairs) == ("supported", None, 3)


def test_a_perplexity_that_is_the_only_task_is_better_low() -> None:
    found, items = [], []
    for seed in range(3):
        for way, perplexity in (("new", 20.0 + seed), ("old", 30.0)):
            each = trial(seed, perplexity, "accuracy.text", way=way)
            found.append(each)
            items.append(ItemRecord(each.trial_id, "text", "0", "select", perplexity, None))
    claim = asked(NEW_BETTER, metric="accuracy.text")
    assert judged(found, claim, items).verdict == "supported"


def test_why_nothing_is_compared_is_said() -> None:
    found = trials("new", [2.0, 2.1], x="a") + trials("old", [2.5, 2.6], x="b")
    assert "agrees with one of the other in seed, x" in (
        judged(found, asked(NEW_BETTER)).note or ""
    )
    both = [
        trial(s, 2.0, way=way, x=x) for s in (0, 1) for way in ("new", "old") for x in ("a", "b")
    ]
    apart = [
        replace(t, status="failed", reason="no", metrics={})
        if (t.axes["way"] == "new") == (t.axes["x"] == "a")
        else t
        for t in both
    ]
    assert "no two trials that could be compared" in (judged(apart, asked(NEW_BETTER)).note or "")


def test_the_best_of_several_is_not_established_by_the_failure_of_one() -> None:
    ways = {"new": 2.0, "old": 2.5, "other": 2.7}
    found = [trial(s, loss * (1 + s / 100), way=w) for w, loss in ways.items() for s in range(3)]
    claim = asked({**EACH, "than_each": {"way": ["old", "other"]}})
    assert judged(found, claim).verdict == "supported"
    lost = [
        replace(t, status="failed", reason="diverged", metrics={})
        if t.axes["way"] == "other"
        else t
        for t in found
    ]
    assert judged(lost, claim).verdict == "undecided"


@pytest.mark.parametrize(
    ("found", "why"),
    [
        ([], "the first group"),
        (trials("new", [2.0, 2.1]), "the second group"),
        ([trial(0, 1.0, way="new"), trial(1, 2.0, way="old")], "agrees with one of the other"),
    ],
)
def test_without_a_pair_there_is_no_data_and_the_note_says_why(
    found: list[TrialRecord], why: str
) -> None:
    verdict = judged(found, asked(NEW_BETTER))
    assert (verdict.verdict, verdict.effect, verdict.pairs) == ("no data", None, 0)
    assert verdict.note is not None and why in verdict.note


@pytest.mark.parametrize(
    ("recorded", "wanted"),
    [("new", {"kind": "new"}), ({"kind": "new"}, "new"), (2.0, 2), ([1, 2], [1, 2]), (None, None)],
)
def test_a_value_is_found_however_it_is_written(recorded: Any, wanted: Any) -> None:
    found = [trial(seed, seed / 7, way=recorded) for seed in (0, 1)] + trials("old", [3.0, 3.1])
    claim = asked({"better": {"way": wanted}, "than": {"way": "old"}})
    assert judged(found, claim).pairs == 2


# --- one seed, and seeds that change nothing ---


def answers(trial_id: str, correct: Sequence[float]) -> list[ItemRecord]:
    return [
        ItemRecord(trial_id, "task", f"{position:03d}", "select", each, None)
        for position, each in enumerate(correct)
    ]


def asked_questions(right: Mapping[str, Sequence[float]], questions: int = 200) -> list[Any]:
    """Trials of `new` and `old`, one a seed, that answer this share of the questions right; and
    their answers."""
    draw = random.Random(1)
    found, items = [], []
    for way, shares in right.items():
        for seed, share in enumerate(shares):
            correct = [float(draw.random() < share) for _ in range(questions)]
            found.append(trial(seed, float(np.mean(correct)), ACCURACY, way=way))
            items += answers(found[-1].trial_id, correct)
    return [found, items]


def test_with_one_seed_there_is_no_verdict_but_an_interval_over_questions() -> None:
    found, items = asked_questions({"new": [0.8], "old": [0.5]})
    verdict = judged(found, asked(NEW_BETTER, metric=ACCURACY), items)
    value, low, high = interval(verdict)
    new, old = (np.array([i.correct for i in items if i.trial_id == t.trial_id]) for t in found)
    differences = new - old
    error = differences.std() / np.sqrt(len(differences))
    assert value == pytest.approx(differences.mean())
    assert (low, high) == pytest.approx((value - 1.96 * error, value + 1.96 * error), abs=0.02)
    assert verdict.verdict == "undecided"
    assert verdict.note == "one seed decides nothing; over its questions alone: supported"


def test_with_several_seeds_an_accuracy_is_judged_over_seeds_and_questions() -> None:
    found, items = asked_questions({"new": [0.8, 0.82, 0.79], "old": [0.5, 0.53, 0.52]})
    verdict = judged(found, asked(NEW_BETTER, metric=ACCURACY), items)
    assert (verdict.verdict, verdict.note, verdict.seeds) == ("supported", None, 3)
    few = judged(found, asked(NEW_BETTER, metric=ACCURACY))
    assert few.note == "not every trial has its answers: over seeds alone"
    (_, low, high), (_, few_low, few_high) = interval(verdict), interval(few)
    assert high - low >= few_high - few_low


def test_who_was_asked_more_questions_is_judged_on_those_of_both() -> None:
    found, items = asked_questions({"new": [0.8], "old": [0.5]})
    new = found[0].trial_id
    easy = [replace(item, item_id=f"easy {item.item_id}", correct=1.0) for item in items]
    more = [item for item in easy if item.trial_id == new]
    better = replace(found[0], metrics={ACCURACY: 0.9})
    claim = asked(NEW_BETTER, metric=ACCURACY)
    beside = judged([better, found[1]], claim, [*items, *more])
    assert interval(beside) == pytest.approx(interval(judged(found, claim, items)))


def test_seeds_that_change_no_answer_leave_the_questions_to_judge_by() -> None:
    found, items = asked_questions({"new": [0.8], "old": [0.5]})
    more = [replace(t, trial_id=f"{t.trial_id}+{s}", seed=s) for t in found for s in (1, 2)]
    items += [replace(i, trial_id=f"{i.trial_id}+{s}") for i in items for s in (1, 2)]
    verdict = judged([*found, *more], asked(NEW_BETTER, metric=ACCURACY), items)
    assert (verdict.verdict, verdict.seeds) == ("supported", 3)
    assert verdict.note == "the effect is the same with every seed: over questions alone"
    alone = judged(found, asked(NEW_BETTER, metric=ACCURACY), items)
    assert interval(verdict) == interval(alone)


def test_with_one_seed_a_loss_stays_undecided_and_the_note_says_why() -> None:
    verdict = judged([*trials("new", [2.0]), *trials("old", [9.0])], asked(NEW_BETTER))
    assert verdict.verdict == "undecided"
    assert verdict.note == "one seed, and the metric has no questions to resample"
    assert verdict.effect is not None and verdict.effect.low is None


def test_seeds_that_change_nothing_are_no_repetitions() -> None:
    verdict = judged(trials("new", [2.0] * 3) + trials("old", [2.5] * 3), asked(NEW_BETTER))
    assert verdict.verdict == "undecided"
    assert verdict.note is not None and "the same with every seed" in verdict.note


def test_students_that_are_the_same_are_no_better_than_each_other() -> None:
    found = trials("new", [2.0, 2.1, 2.2]) + trials("old", [2.0, 2.1, 2.2])
    assert judged(found, asked(NEW_NO_BETTER)).verdict == "supported"
    assert judged(found, asked(NEW_BETTER)).verdict == "undecided"


# --- rankings ---


def ranked(
    first: Sequence[float], then: Sequence[float], noise: float = 0.01, seeds: int = 3
) -> list[TrialRecord]:
    """One configuration a pair of losses, with this noise between seeds."""
    draw = random.Random(2)
    return [
        replace(
            trial(seed, 0.0, way=number),
            metrics={
                "lm_loss.before": before + seed + draw.gauss(0, noise),
                "lm_loss.after": after + seed + draw.gauss(0, noise),
            },
        )
        for number, (before, after) in enumerate(zip(first, then, strict=True))
        for seed in range(seeds)
    ]


def ranking(below: float = 0.9, then: str = "lm_loss.after") -> Claim:
    keys = {"first": "lm_loss.before", "then": then, "agreement_below": below}
    return asked({"ranking": keys})


ORDER = [float(n) for n in range(12)]
SHUFFLED = random.Random(0).sample(ORDER, len(ORDER))


def test_the_same_ranking_contradicts_and_an_unrelated_one_supports_a_change() -> None:
    assert judged(ranked(ORDER, ORDER), ranking()).verdict == "contradicted"
    verdict = judged(ranked(ORDER, SHUFFLED), ranking())
    assert verdict.verdict == "supported"
    assert interval(verdict)[0] == pytest.approx(stats.kendalltau(ORDER, SHUFFLED).statistic)
    assert (verdict.pairs, verdict.seeds) == (66, 3)


def test_where_every_order_is_established_the_interval_is_the_agreement_itself() -> None:
    assert len(set(interval(judged(ranked(ORDER, SHUFFLED), ranking())))) == 1


def test_an_order_within_noise_is_counted_neither_way() -> None:
    close = [0.0, 0.001, 5.0, 9.0]
    verdict = judged(ranked(close, [0.001, 0.0, 5.0, 9.0]), ranking(0.5))
    assert interval(verdict)[1:] == pytest.approx((2 * 5 / 6 - 1, 1.0))
    assert verdict.verdict == "contradicted"
    assert judged(ranked(close, [0.001, 0.0, 5.0, 9.0]), ranking(0.9)).verdict == "undecided"


def test_one_seed_establishes_no_order() -> None:
    verdict = judged(ranked(ORDER, SHUFFLED, seeds=1), ranking())
    assert verdict.verdict == "undecided"
    assert verdict.note is not None and "one seed does not establish" in verdict.note


def test_a_lower_loss_and_a_higher_accuracy_rank_alike() -> None:
    found = [
        replace(each, metrics={"lm_loss.before": float(n // 3), ACCURACY: 1 - (n // 3) / 10})
        for n, each in enumerate(ranked([0.0] * 6, [0.0] * 6))
    ]
    assert interval(judged(found, ranking(then=ACCURACY)))[0] == 1.0


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (ranked([1.0, 2.0, 3.0], [3.0, 1.0, 2.0]), "undecided"),
        (ranked([1.0] * 6, [3.0, 1.0, 2.0, 4.0, 5.0, 6.0], noise=0.0), "undecided"),
        (ranked([1.0], [2.0]), "no data"),
        ([*ranked([1.0], [2.0]), trial(7, 1.0, way=9)], "no data"),
    ],
)
def test_too_few_or_equal_configurations_decide_nothing(
    found: list[TrialRecord], expected: str
) -> None:
    assert judged(found, ranking()).verdict == expected


# --- honesty ---


def test_the_order_of_the_trials_does_not_matter() -> None:
    draw = random.Random(0)
    found = [
        replace(
            trial(seed, 0.0, way=way, other=other),
            metrics={name: draw.random() for name in ("lm_loss.before", LOSS)},
        )
        for way in ("new", "old", "older")
        for other in range(3)
        for seed in range(3)
    ]
    shuffled = draw.sample(found, len(found))
    for claim in (asked(NEW_BETTER), asked(NEW_NO_BETTER), ranking()):
        assert judged(found, claim) == judged(shuffled, claim)


NUMBERS = st.lists(st.integers(-999, 999), min_size=6, max_size=6)


@given(NUMBERS)
def test_swapping_the_groups_turns_the_effect_around(values: list[int]) -> None:
    new, old = ([value / 100 for value in half] for half in (values[:3], values[3:]))
    found = trials("new", new) + trials("old", old)
    there = judged(found, asked(NEW_BETTER))
    back = judged(found, asked({"better": {"way": "old"}, "than": {"way": "new"}}))
    assert there.effect is not None and back.effect is not None
    assert back.effect.value == pytest.approx(-there.effect.value, abs=1e-9)
    if there.effect.low is not None:
        value, low, high = interval(there)
        assert interval(back) == pytest.approx((-value, -high, -low), abs=1e-9)
    mirror = {"supported": "contradicted", "contradicted": "supported"}
    assert back.verdict == mirror.get(there.verdict, there.verdict)


@given(NUMBERS)
def test_what_another_axis_and_the_seed_add_to_both_groups_changes_nothing(
    added: list[int],
) -> None:
    draw = random.Random(5)
    plain, shifted = [], []
    for way in ("new", "old"):
        for other in (0, 1):
            for seed in range(3):
                value = draw.gauss(2, 0.1) + 0.3 * (way == "old")
                plain.append(trial(seed, value, way=way, other=other))
                shifted.append(trial(seed, value + added[2 * seed + other], way=way, other=other))
    expected = interval(judged(plain, asked(NEW_BETTER)))
    assert interval(judged(shifted, asked(NEW_BETTER))) == pytest.approx(expected, abs=1e-9)


@given(st.floats(0.5, 3.0), st.integers(2, 5), st.integers(0, 50))
def test_an_effect_well_outside_the_noise_is_found(effect: float, seeds: int, at: int) -> None:
    draw = random.Random(at)
    old = [2.0 + draw.uniform(-0.01, 0.01) for _ in range(seeds)]
    new = [2.0 - effect + draw.uniform(-0.01, 0.01) for _ in range(seeds)]
    found = trials("new", new) + trials("old", old)
    assert judged(found, asked(NEW_BETTER)).verdict == "supported"
    assert judged(found, asked(NEW_NO_BETTER)).verdict == "contradicted"


# --- in the sweep file ---

IN_FILE: dict[str, Any] = {
    "text": "Perplexity chooses better layers than chance",
    "better": {"prune.depth.criterion": "perplexity"},
    "than": {"baseline": "random_layers"},
    "metric": "lm_loss.after",
}


def sweep_with(folder: Path, *found: Any, more: Mapping[str, Any] | None = None) -> Path:
    return small_sweep.write(folder, {**small_sweep.SWEEP, **(more or {}), "claims": list(found)})


def test_a_sweep_hands_its_claims_on_in_its_resolved_form(tmp_path: Path) -> None:
    sweep = load(sweep_with(tmp_path, {**IN_FILE, "practice": 2}))
    assert sweep.claims[0].practice == 2
    again = tmp_path / "again.yaml"
    again.write_text(sweep.dump_yaml())
    assert load(again).claims == sweep.claims
    assert "claims" not in load(small_sweep.write(tmp_path)).resolved()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"better": {"prune.depth.criterio": "perplexity"}},
         "claims.0.better.prune.depth.criterio: is not an axis, did you mean "
         "'prune.depth.criterion'?"),
        ({"better": {"prune.depth.criterion": ["perplexity", "task"]}},
         "claims.0.better.prune.depth.criterion: task is not a value of that axis; its values: "
         "perplexity, block_influence"),
        ({"than": {"baseline": "random_layer"}},
         "claims.0.than.baseline: there is no baseline random_layer, did you mean "
         "'random_layers'?"),
        ({"among": {"seed": 3}}, "claims.0.among.seed: 3 is not a value of that axis"),
        ({"among": {"rung": "short"}}, "claims.0.among.rung: is not an axis"),
        ({"metric": "lm_loss.aftr"},
         "claims.0.metric: 'lm_loss.aftr' is not measured, did you mean 'lm_loss.after'?"),
        ({"beter": {}}, "claims.0.beter: unknown key"),
        ({"better": None}, "claims.0.better: "),
        ({"better": {}}, "claims.0.better: needs at least 1"),
        ({"within": 0.1}, "claims.0.within: unknown key"),
        ({"than_each": {"prune.depth.contiguous": True}}, "claims.0.than: unknown key"),
        ({"than_eech": {"prune.depth.contiguous": True}}, "claims.0.than_eech: unknown key, did "
         "you mean 'than_each'?"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_claim_is_told_with_its_place(
    tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    path = sweep_with(tmp_path, {**IN_FILE, **change})
    with pytest.raises(SpecError) as raised:
        enumerate_trials(load(path))
    message = next(m for m in raised.value.messages if expected in m)
    file, line, _ = message.split(":", 2)
    assert file == str(path)
    key = expected.split(":")[0].split(".", 2)[2].split(".", 1)[-1]
    lines = path.read_text().splitlines()[int(line) - 2 : int(line)]
    assert any(f"{key}:" in each for each in lines), "the value's line, or the one of its key"


def test_a_claim_of_no_kind_or_two_names_the_three(tmp_path: Path) -> None:
    for keys, told in (({}, "none"), (NEW_BETTER | NEW_NO_BETTER, "better and no_better")):
        with pytest.raises(SpecError) as raised:
            load(sweep_with(tmp_path, {"text": "?", **keys}))
        assert f"one of better, no_better, ranking; this one has {told}" in str(raised.value)


def test_a_claim_about_values_that_were_set_aside_has_no_data_and_is_no_mistake(
    tmp_path: Path,
) -> None:
    path = sweep_with(tmp_path, IN_FILE)
    sweep = load(path, overrides=["axes.prune.depth.criterion=[block_influence]"])
    parse_axes(sweep)
    again = tmp_path / "again.yaml"
    again.write_text(sweep.dump_yaml())
    parse_axes(load(again))
