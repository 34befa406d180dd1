"""The Pareto front holds what nothing else beats in both objectives, and nothing more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import made_up
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.pareto import front, points
from orchestrator.records import TEACHER, Records, TrialRecord

RECORDS = made_up.records()
SMALL = st.integers(0, 6)


def trial(name: str, parameters: int | None, accuracy: float, seed: int = 0) -> TrialRecord:
    whole = made_up.trial("perplexity", seed, 0, {"accuracy.mean": accuracy})
    return replace(whole, trial_id=f"{name}-{seed}", axes={"way": name}, parameters=parameters)


def sweep(trials: Sequence[TrialRecord]) -> Records:
    return Records("s", "p", trials=tuple(trials))


def names(records: Records, x: str = "parameters", y: str = "accuracy.mean") -> list[str]:
    return [str(point.trials[0].axes["way"]) for point in front(records, x, y)]


def test_a_smaller_model_that_is_better_leaves_the_larger_one_behind() -> None:
    found = sweep([trial("large", 9, 0.6), trial("small", 5, 0.7), trial("tiny", 1, 0.5)])
    assert names(found) == ["tiny", "small"]


def test_configurations_with_the_same_values_are_both_on_the_front() -> None:
    assert names(sweep([trial("one", 5, 0.7), trial("other", 5, 0.7)])) == ["one", "other"]


@given(st.lists(st.tuples(SMALL, SMALL), min_size=1, max_size=12))
def test_the_front_is_what_a_look_at_all_pairs_leaves(values: list[tuple[int, int]]) -> None:
    found = sweep([trial(str(i), x, y / 10) for i, (x, y) in enumerate(values)])
    beaten = {
        str(i)
        for (i, (x, y)), (_, (other_x, other_y)) in product(enumerate(values), repeat=2)
        if other_x <= x and other_y >= y and (other_x, other_y) != (x, y)
    }
    assert set(names(found)) == {str(i) for i in range(len(values))} - beaten
    along = front(found, "parameters", "accuracy.mean")
    assert [p.x.value for p in along] == sorted(p.x.value for p in along)
    assert [p.y.value for p in along] == sorted(p.y.value for p in along)


@given(st.permutations(range(6)))
def test_the_order_of_the_trials_does_not_matter(order: list[int]) -> None:
    found = [trial(str(i), i, ((7 * i) % 5) / 10) for i in range(6)]
    assert names(sweep([found[i] for i in order])) == names(sweep(found))


def test_each_objective_says_by_its_name_which_way_is_better() -> None:
    ways = [("slow", 10.0, 3.0), ("fast", 20.0, 2.0)]
    found = [
        replace(trial(name, 5, 0.5), metrics={"throughput.b1": rate, "lm_loss.after": loss})
        for name, rate, loss in ways
    ]
    assert names(sweep(found), "throughput.b1", "lm_loss.after") == ["fast"]


def test_a_configuration_stands_at_its_mean_over_seeds() -> None:
    found = [
        replace(trial("way", 5, 0.0, seed), metrics={"throughput.b1": value})
        for seed, value in enumerate([0.5, 0.6, 0.7])
    ]
    (point,) = front(sweep(found), "parameters", "throughput.b1")
    assert point.y.value == pytest.approx(0.6)
    assert point.y.low is not None and point.y.low < 0.6
    assert (point.x.value, point.x.low, len(point.trials)) == (5.0, None, 3)


def test_who_alone_had_the_easy_seed_is_not_on_the_front_for_that() -> None:
    found = [
        replace(trial(name, size, 0.0, seed), metrics={"lm_loss.after": loss + seed})
        for name, size, loss, seeds in (
            ("good", 81_402_688, 1.0, range(3)),
            ("poor", 81_402_688, 1.2, [0]),
            ("others", 81_402_689, 1.3, [1, 2]),
        )
        for seed in seeds
    ]
    assert names(sweep(found), y="lm_loss.after") == ["good"]
    by_name = {
        p.trials[0].axes["way"]: p for p in points(sweep(found), "parameters", "lm_loss.after")
    }
    assert by_name["good"].y.value == pytest.approx(2.0)
    assert by_name["poor"].y.value == pytest.approx(2.2)


def test_a_trial_without_one_of_the_values_takes_no_part() -> None:
    stopped = replace(trial("stopped", 1, 0.9), status="stopped")
    found = sweep([trial("unknown", None, 0.9), stopped, trial("known", 5, 0.4)])
    assert names(found) == ["known"]
    assert front(sweep([stopped]), "parameters", "accuracy.mean") == ()


def test_the_teacher_stands_beside_the_front_and_beats_nobody() -> None:
    along = front(RECORDS, "tokens_trained", "accuracy.mean")
    assert [point.label for point in along] == ["criterion=perplexity"]
    (teacher,) = (
        p for p in points(RECORDS, "tokens_trained", "accuracy.mean") if p.baseline == TEACHER
    )
    assert not teacher.efficient
    assert teacher.y.value > along[0].y.value
