"""Intervals and tests over questions and seeds: the textbook's, and as often wrong as said."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from orchestrator.inference import (
    QuestionNoise,
    Resamples,
    SeedNoise,
    adjusted_means,
    established,
    holm,
    interval,
    mcnemar,
    over_seeds,
    p_value,
    pooled_noise,
    seed_noise,
)

Array = np.ndarray
VALUES = st.lists(st.floats(-1, 1).map(lambda x: round(x, 3)), min_size=2, max_size=6)


def answers(draw: np.random.Generator, *shape: int) -> Array:
    return draw.integers(0, 2, shape).astype(float)


# --- seeds ---


@given(VALUES)
def test_over_seeds_alone_interval_and_test_are_students(values: list[float]) -> None:
    noise, mean = seed_noise(values), float(np.mean(values))
    assert noise is not None
    if noise.variance < 1e-9 or abs(mean) < 1e-3:
        return
    naive = stats.ttest_1samp(values, 0.0)
    found = over_seeds(values)
    assert (found.low, found.high) == pytest.approx(naive.confidence_interval(0.95), abs=1e-9)
    assert p_value(mean, noise, None) == pytest.approx(naive.pvalue, abs=1e-6)


def test_of_two_configurations_the_pooled_noise_is_that_of_their_paired_difference() -> None:
    first, second = [1.0, 2.0, 4.0], [1.5, 1.0, 2.0]
    pooled, own = pooled_noise([first, second]), seed_noise(np.subtract(first, second).tolist())
    assert pooled is not None and own is not None
    assert (pooled.variance / 3, pooled.freedom) == pytest.approx((own.variance, own.freedom))


def test_the_pooled_noise_is_the_mean_over_all_pairs_of_configurations() -> None:
    values = np.random.default_rng(0).normal(size=(5, 3))
    pairs = [np.var(a - b, ddof=1) for i, a in enumerate(values) for b in values[:i]]
    pooled = pooled_noise(values.tolist())
    assert pooled is not None
    assert (pooled.variance, pooled.freedom) == (pytest.approx(np.mean(pairs)), 4 * 2)


def test_a_single_seed_or_configuration_tells_nothing_of_noise() -> None:
    assert seed_noise([1.0]) is None
    assert pooled_noise([[1.0], [2.0]]) is None
    assert pooled_noise([[1.0, 2.0]]) is None


# --- questions ---


def test_questions_are_resampled_within_their_tasks() -> None:
    draw = np.random.default_rng(0)
    values = draw.normal(size=90)
    noise = Resamples([30, 60]).noise(values[None])
    naive = [
        (draw.choice(values[:30], 30).mean() + draw.choice(values[30:], 60).mean()) / 2
        for _ in range(4000)
    ]
    mean = (values[:30].mean() + values[30:].mean()) / 2
    low, high = np.quantile(naive, [0.025, 0.975])
    assert (noise.below, noise.above) == pytest.approx((mean - low, high - mean), abs=0.02)
    assert math.sqrt(noise.variance) == pytest.approx(np.std(naive), rel=0.05)


def test_what_all_seeds_answer_alike_is_the_questions_own_and_what_each_guesses_is_not() -> None:
    draw = np.random.default_rng(0)
    alike = np.repeat(answers(draw, 1, 500), 4, axis=0)
    assert Resamples([500]).noise(alike).own == 1.0
    assert Resamples([500]).noise(answers(draw, 4, 500)).own < 0.25


@given(st.integers(0, 100), st.permutations(range(20)))
def test_the_mean_does_not_depend_on_the_order_of_a_tasks_questions(
    seed: int, order: list[int]
) -> None:
    values = np.random.default_rng(seed).random(20) / 3
    resamples = Resamples([20])
    assert resamples.mean(values) == resamples.mean(values[order])


# --- tests on one seed ---


def test_mcnemars_test_is_that_of_the_textbook() -> None:
    # Agresti, Categorical Data Analysis: only discordant answers count, and 5 to 0 is not enough.
    assert mcnemar(5, 0) == pytest.approx(2 / 32)
    assert mcnemar(9, 1) == pytest.approx(22 / 1024)
    assert mcnemar(0, 0) == mcnemar(7, 7) == 1.0


@given(st.integers(0, 15), st.integers(0, 15), st.integers(0, 40))
def test_on_one_task_the_sign_test_is_mcnemars(first: int, second: int, both: int) -> None:
    values = np.array([1.0] * first + [-1.0] * second + [0.0] * (both + 1))
    assert Resamples([len(values)]).sign_test(values) == mcnemar(first, second)


def test_on_tasks_of_equal_size_the_sign_test_is_mcnemars_on_all_questions() -> None:
    values = np.zeros(100)
    values[[0, 1, 2, 3, 60, 61, 62, 63, 64]], values[[10, 70]] = 1, -1
    assert Resamples([50, 50]).sign_test(values) == pytest.approx(mcnemar(9, 2), abs=0.002)


def test_the_sign_test_weighs_every_task_the_same() -> None:
    # One question of a task of five counts as much as ten of a task of fifty.
    values = np.zeros(55)
    values[:5], values[5:15] = 1, -1
    assert Resamples([5, 50]).sign_test(values) < 0.2
    assert Resamples([55]).sign_test(values) > 0.25


# --- both ---

REACH = st.floats(0, 1)


@given(REACH, REACH, REACH, st.integers(1, 30))
def test_noise_of_two_sources_reaches_no_less_than_either_and_no_more_than_both(
    variance: float, side: float, own: float, freedom: int
) -> None:
    seeds, questions = SeedNoise(variance, freedom), QuestionNoise(side, side, side**2 / 4, own)
    width = interval(0.0, seeds, questions).half_width
    assert width is not None
    assert max(seeds.reach(), side) <= width + 1e-9
    assert width <= seeds.reach() + side + 1e-9


@given(st.integers(0, 1000))
def test_a_difference_the_other_way_round_has_the_mirrored_interval(seed: int) -> None:
    draw = np.random.default_rng(seed)
    rows, resamples = answers(draw, 3, 24) - answers(draw, 3, 24), Resamples([8, 16])
    effects = [resamples.mean(row) for row in rows]
    there = interval(float(np.mean(effects)), seed_noise(effects), resamples.noise(rows))
    effects = [-each for each in effects]
    back = interval(float(np.mean(effects)), seed_noise(effects), resamples.noise(-rows))
    assert (back.value, back.low, back.high) == pytest.approx(
        (-there.value, -(there.high or 0), -(there.low or 0)), abs=1e-9
    )


def test_the_test_rejects_where_the_interval_leaves_zero_out() -> None:
    seeds, questions = SeedNoise(0.01, 3), QuestionNoise(0.196, 0.196, 0.01, 0.5)
    edge = interval(0.0, seeds, questions).half_width
    assert edge is not None
    assert p_value(edge, seeds, questions) == pytest.approx(0.05, abs=1e-3)
    assert p_value(1.1 * edge, seeds, questions) < 0.05 < p_value(0.9 * edge, seeds, questions)
    assert p_value(0.0, seeds, questions) == 1.0


# --- many ---


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holms_p_values_are_those_of_his_procedure(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    for level in (0.01, 0.05, 0.3):
        rejected = set()
        for place, index in enumerate(order):
            if p_values[index] > level / (len(p_values) - place):
                break
            rejected.add(index)
        assert {i for i, p in enumerate(adjusted) if p <= level * (1 - 1e-9)} <= rejected
        assert rejected <= {i for i, p in enumerate(adjusted) if p <= level * (1 + 1e-9)}


def test_an_order_is_established_only_where_it_is_beyond_noise() -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, (4, 3))
    values = np.array([0.0, 0.05, 5.0, 9.0])[:, None] + noise + np.array([0.0, 3.0, -2.0])
    expected = [[0, 0, -1, -1], [0, 0, -1, -1], [1, 1, 0, -1], [1, 1, 1, 0]]
    assert established(values, 0.05).tolist() == expected
    assert not established(values[:, :1], 0.05).any()


@pytest.mark.parametrize("noisiest", [1.0, 3.0])
def test_at_most_a_twentieth_of_all_equal_families_has_an_order_established(
    noisiest: float,
) -> None:
    draw, families = np.random.default_rng(5), 600
    noise = np.array([noisiest, 1, 1, 1, 1, 1])[:, None]
    false = sum(
        bool(established(noise * draw.normal(size=(6, 3)), 0.05).any()) for _ in range(families)
    )
    # Below the binomial's 99th percentile 99 times of 100, if the chance is a twentieth.
    assert false <= stats.binom.ppf(0.99, families, 0.05)


# --- unequal seeds ---------------------------------------------------------------------------


def test_with_the_same_seeds_adjusted_means_are_the_means() -> None:
    rows = [{0: 1.0, 1: 2.0}, {0: 5.0, 1: 3.0}]
    assert adjusted_means(rows) == [1.5, 4.0]


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_adjusted_means_tell_additive_effects_apart(data: st.DataObject) -> None:
    effects = data.draw(st.lists(st.integers(-9, 9), min_size=2, max_size=4))
    hard = data.draw(st.lists(st.integers(-9, 9), min_size=3, max_size=3))
    # All have seed 0, which joins them; who has which of the others is left to chance.
    rows = [
        {s: float(effect + hard[s]) for s in {0, *data.draw(st.sets(st.integers(1, 2)))}}
        for effect in effects
    ]
    found = adjusted_means(rows)
    ahead = [value - found[0] for value in found]
    assert ahead == pytest.approx([effect - effects[0] for effect in effects], abs=1e-6)


def test_configurations_without_a_shared_seed_keep_their_means() -> None:
    assert adjusted_means([{0: 1.0, 1: 3.0}, {2: 4.0}]) == pytest.approx([2.0, 4.0], abs=1e-6)
