"""Who wins, who is tied, and who is not even considered, on made-up records."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import made_up
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from orchestrator.answers import not_counted
from orchestrator.inference import holm, mcnemar, pooled_noise
from orchestrator.records import TEACHER, ItemRecord, Records, TrialRecord
from orchestrator.selection import (
    Measure,
    Ranking,
    axis_names,
    configuration_key,
    labels,
    over_seeds,
    rank,
    winner,
)

RECORDS = made_up.records()


def ranking_of(records: Records, metric: str = "accuracy.mean", mode: str = "max") -> Ranking:
    ranking = rank(records, metric, mode)  # type: ignore[arg-type]
    assert ranking is not None
    return ranking


def with_values(values: Mapping[str, float], metric: str = "accuracy.mean") -> Records:
    """Records whose trials (by id) have these values of one metric, and no questions."""
    trials = tuple(
        replace(trial, metrics={metric: values[trial.trial_id]} if trial.trial_id in values else {})
        for trial in RECORDS.trials
    )
    return replace(RECORDS, trials=trials, items=())


def answers(trial_id: str, right: int, questions: int = 200) -> list[ItemRecord]:
    return [
        ItemRecord(trial_id, "t", f"{i:04d}", split, float(i < right), None)
        for i in range(questions)
        for split in ("select", "report")
    ]


def two_configurations(first: int, second: int, **changes: int | None) -> Records:
    """`perplexity` and `block_influence` with one seed, `first` and `second` of 200 right."""
    trials, items = [], []
    for criterion, right in (("perplexity", first), ("block_influence", second)):
        metrics = {"accuracy.mean": right / 200, "accuracy_report.mean": right / 200}
        trials.append(made_up.trial(criterion, 0, 0, metrics))
        items += answers(f"{criterion}-0", right)
    trials[1] = replace(trials[1], **changes)
    return Records("s", "p", trials=tuple(trials), items=tuple(items))


def test_configurations_are_trials_equal_in_all_but_the_seed() -> None:
    ranking = ranking_of(RECORDS)
    assert {c.label: [t.seed for t in c.trials] for c in ranking.configurations} == {
        f"criterion={name}": [0, 1] for name in made_up.CRITERIA
    } | {"random_layers": [0, 1]}
    unfinished = {c.label: c.unfinished for c in ranking.configurations}
    assert unfinished["criterion=task"] == 1
    assert sum(unfinished.values()) == 1


def test_the_best_mean_over_seeds_comes_first() -> None:
    ranking = ranking_of(RECORDS)
    assert ranking.configurations[0].label == "criterion=perplexity"
    assert ranking.configurations[-1].label == "random_layers"
    means = [c.estimate.value for c in ranking.configurations]
    assert means == sorted(means, reverse=True)


def test_close_configurations_are_tied_and_distant_ones_are_not() -> None:
    tied = {c.label: c.tied for c in ranking_of(RECORDS).configurations}
    assert tied == {
        "criterion=perplexity": True,
        "criterion=block_influence": True,
        "criterion=task": False,
        "random_layers": False,
    }


def with_seeds(*seeds: int) -> Records:
    kept = tuple(t for t in RECORDS.trials if t.baseline == TEACHER or t.seed in seeds)
    ids = {trial.trial_id for trial in kept}
    return replace(RECORDS, trials=kept, items=tuple(i for i in RECORDS.items if i.trial_id in ids))


def test_every_interval_holds_its_value_and_with_one_seed_has_the_binomial_width() -> None:
    for configuration in ranking_of(with_seeds(0)).configurations:
        estimate = configuration.estimate
        assert estimate.low is not None and estimate.high is not None
        assert estimate.low < estimate.value < estimate.high
        # 60 questions in each of three tasks: the binomial half width is near this.
        share = estimate.value
        expected = 1.96 * math.sqrt(share * (1 - share) / 180)
        assert estimate.half_width == pytest.approx(expected, rel=0.35)


def test_seeds_that_differ_widen_the_interval_over_questions() -> None:
    trials = [t for t in RECORDS.trials if t.trial_id.startswith("perplexity")]
    measure = Measure(RECORDS, "accuracy.mean")
    answers = measure.answers(trials)
    assert answers is not None
    questions, seeds = measure.noise(list(answers.values())), over_seeds(measure.values(trials))
    found = measure.estimate(trials)
    assert found.low is not None and seeds.half_width is not None
    assert found.value - found.low == pytest.approx(
        math.hypot(seeds.half_width, math.sqrt(questions.own) * questions.below)
    )
    assert found.value - found.low > questions.below


def test_an_accuracy_without_answers_has_an_interval_over_seeds() -> None:
    values = {"perplexity-0": 0.55, "perplexity-1": 0.56}
    (configuration,) = ranking_of(with_values(values)).configurations
    assert configuration.estimate == over_seeds([0.55, 0.56])


def test_an_accuracys_interval_ends_at_0_and_1() -> None:
    values = {"perplexity-0": 0.5, "perplexity-1": 0.6}
    (configuration,) = ranking_of(with_values(values)).configurations
    assert (configuration.estimate.low, configuration.estimate.high) == (0.0, 1.0)


def with_a_task_apart(records: Records, values: Mapping[str, Sequence[float]]) -> Records:
    """With a task better when lower, which the means do not count; its values by trial."""
    trials, items = [], list(records.items)
    for trial in records.trials:
        mine = values[trial.trial_id]
        for split, name in (("select", "accuracy"), ("report", "accuracy_report")):
            trial = replace(trial, metrics={**trial.metrics, f"{name}.u": float(np.mean(mine))})
            for place, value in enumerate(mine):
                id_ = f"{place:04d}"
                items.append(ItemRecord(trial.trial_id, "u", id_, split, value, None))  # type: ignore[arg-type]
        trials.append(trial)
    return replace(records, trials=tuple(trials), items=tuple(items))


def values_apart(highest: float) -> dict[str, Sequence[float]]:
    random = np.random.default_rng(3)
    ids = ("perplexity-0", "block_influence-0")
    return {trial_id: (highest * random.random(30)).tolist() for trial_id in ids}


@pytest.mark.parametrize("highest", [1.0, 60.0], ids=["brier_score", "perplexity"])
def test_a_task_that_is_better_when_lower_changes_no_interval_and_no_test_of_the_mean(
    highest: float,
) -> None:
    records = two_configurations(160, 60)
    alone = ranking_of(records)
    beside = ranking_of(with_a_task_apart(records, values_apart(highest)))
    for one, other in zip(alone.configurations, beside.configurations, strict=True):
        assert (one.label, one.estimate) == (other.label, other.estimate)
        assert (one.behind, one.p_value) == (other.behind, other.p_value)


def test_a_task_that_counts_in_the_mean_is_resampled_whatever_its_unit() -> None:
    values = values_apart(60.0)
    records = with_a_task_apart(two_configurations(160, 60), values)
    trials = [
        replace(
            t, metrics={**t.metrics, "accuracy.mean": (share + np.mean(values[t.trial_id])) / 2}
        )
        for t, share in zip(records.trials, (0.8, 0.3), strict=True)
    ]
    measure = Measure(replace(records, trials=tuple(trials)), "accuracy.mean")
    found = measure.estimate(trials[:1])
    assert found.low is not None and found.high is not None
    assert 1 < found.low < found.value < found.high
    error = np.std(values["perplexity-0"]) / math.sqrt(30) / 2
    assert found.half_width == pytest.approx(1.96 * error, rel=0.1)


def test_a_perplexitys_interval_holds_it_and_may_exceed_1() -> None:
    records = with_a_task_apart(two_configurations(160, 60), values_apart(60.0))
    found = Measure(records, "accuracy.u").estimate(records.trials[:1])
    assert found.low is not None and found.high is not None
    assert 1 < found.low < found.value < found.high


def test_the_fewest_tasks_that_explain_every_mean_do_not_count() -> None:
    answers = {
        "one": {("a", "0"): 1.0, ("b", "0"): 0.0, ("c", "0"): 0.5, ("d", "0"): 9.0},
        "other": {("a", "0"): 0.0, ("b", "0"): 1.0, ("c", "0"): 0.0, ("d", "0"): 8.0},
    }
    assert not_counted(answers, {"one": 2.625}) == frozenset()
    assert not_counted(answers, {"one": 0.5}) == {"d"}
    assert not_counted(answers, {"one": 0.5, "other": 0.5}) == {"c", "d"}
    assert not_counted(answers, {"one": 0.77, "other": None}) == frozenset()
    assert not_counted(answers, {}) == frozenset()


def test_the_paired_interval_is_the_plain_bootstrap_of_the_differences() -> None:
    records = two_configurations(150, 140)
    measure = Measure(records, "accuracy.mean")
    first, second = ([trial] for trial in records.trials)
    behind = measure.compare(first, second).difference
    differences = np.array([1.0] * 10 + [0.0] * 190)
    random = np.random.default_rng(7)
    means = [random.choice(differences, 200).mean() for _ in range(4000)]
    low, high = np.quantile(means, [0.025, 0.975])
    assert behind.value == pytest.approx(0.05)
    assert (behind.low, behind.high) == pytest.approx((low, high), abs=0.006)


def test_the_same_records_give_the_same_intervals_to_the_last_bit() -> None:
    assert ranking_of(RECORDS) == ranking_of(made_up.records())


def test_with_one_seed_two_configurations_are_compared_by_mcnemars_test() -> None:
    records = two_configurations(150, 140)
    best, other = ranking_of(records).configurations
    assert best.p_value is None and best.tied
    assert other.p_value == mcnemar(10, 0)
    assert not other.tied


def test_with_seeds_and_no_questions_two_configurations_are_compared_by_the_paired_t_test() -> None:
    first, second = [0.50, 0.58], [0.41, 0.52]
    values = {f"perplexity-{seed}": value for seed, value in enumerate(first)}
    values |= {f"task-{seed}": value for seed, value in enumerate(second)}
    _, other = ranking_of(with_values(values, "throughput.a"), "throughput.a").configurations
    naive = stats.ttest_rel(first, second)
    assert other.p_value == pytest.approx(naive.pvalue, abs=1e-6)
    assert (other.behind.low, other.behind.high) == pytest.approx(naive.confidence_interval())


def with_noise(draw: np.random.Generator, means: Sequence[float], seeds: int = 3) -> Records:
    """One configuration a mean, of a metric without questions."""
    shared = draw.normal(0, 1, seeds)
    trials = [
        replace(
            made_up.trial("perplexity", seed, 0, {"throughput.a": mean + shared[seed] + noise}),
            trial_id=f"{name}-{seed}",
            axes={"way": name},
            parameters=1000 - name,
        )
        for name, mean in enumerate(means)
        for seed, noise in enumerate(draw.normal(0, 0.1, seeds))
    ]
    return Records("s", "p", trials=tuple(trials))


def test_with_many_configurations_p_values_are_holms_or_those_of_the_pair_alone() -> None:
    records = with_noise(np.random.default_rng(1), [2.0, 1.9, 1.8, 1.6, 1.0])
    measure = Measure(records, "throughput.a")
    ranking = ranking_of(records, "throughput.a")
    found = [each.trials for each in ranking.configurations]
    values = [measure.values(trials) for trials in found]
    pooled = pooled_noise(values)
    raw, alone = (
        [measure.compare(found[0], other, 1.0, noise).p_value or 0.0 for other in found[1:]]
        for noise in (pooled, None)
    )
    paired = [stats.ttest_rel(values[0], other).pvalue for other in values[1:]]
    assert alone == pytest.approx(paired, rel=1e-5)
    adjusted = [each.p_value for each in ranking.configurations[1:]]
    assert adjusted == pytest.approx(list(map(max, holm(raw), alone)))
    assert [each.tied for each in ranking.configurations[1:]] == [p >= 0.05 for p in adjusted]


def test_the_truly_best_is_among_the_tied_in_nineteen_sweeps_of_twenty() -> None:
    draw, sweeps, missed = np.random.default_rng(3), 300, 0
    for _ in range(sweeps):
        # All are as good, so that the test has the most chances to be wrong about the first.
        ranking = ranking_of(with_noise(draw, [1.0] * 6), "throughput.a")
        missed += all(each.axes["way"] != 0 for each in ranking.tied)
    assert missed <= stats.binom.ppf(0.99, sweeps, 0.05)


def test_the_truly_best_is_among_the_tied_though_it_is_noisier_than_most() -> None:
    draw, sweeps, missed = np.random.default_rng(5), 200, 0
    for _ in range(sweeps):
        records = with_noise(draw, [1.0] * 2 + [0.0] * 6)
        noisy = {t.trial_id: draw.normal(0, 2) for t in records.trials if t.axes["way"] in (0, 1)}
        trials = tuple(
            replace(t, metrics={"throughput.a": t.metrics["throughput.a"] + noisy[t.trial_id]})
            if t.trial_id in noisy
            else replace(t, metrics={"throughput.a": t.metrics["throughput.a"] - 50})
            for t in records.trials
        )
        ranking = ranking_of(replace(records, trials=trials), "throughput.a")
        missed += all(each.axes["way"] != 0 for each in ranking.tied)
    assert missed <= stats.binom.ppf(0.99, sweeps, 0.05)


def test_a_baseline_wins_only_where_no_configuration_of_the_grid_is_tied() -> None:
    records = with_noise(np.random.default_rng(2), [2.0, 2.0])
    control = [
        replace(t, baseline="control", axes={}) if t.axes["way"] == 1 else t for t in records.trials
    ]
    ranking = ranking_of(replace(records, trials=tuple(control)), "throughput.a")
    assert all(each.tied for each in ranking.configurations)
    chosen = winner(ranking)
    assert chosen is not None and chosen.configuration.baseline is None
    assert (chosen.configuration.parameters or 0) > 999, "the control is smaller"
    alone = [t for t in control if t.baseline]
    chosen = winner(ranking_of(replace(records, trials=tuple(alone)), "throughput.a"))
    assert chosen is not None and chosen.configuration.baseline == "control"


def test_seeds_that_change_nothing_are_no_repetitions() -> None:
    values = {
        f"{name}-{seed}": v for name, v in (("task", 3.0), ("perplexity", 3.1)) for seed in (0, 1)
    }
    best, other = ranking_of(with_values(values, "throughput.a"), "throughput.a").configurations
    assert best.label == "criterion=perplexity"
    assert other.p_value is None and other.untested
    assert other.behind.low is None


def test_without_a_shared_seed_there_is_no_test_in_a_ranking() -> None:
    records = with_noise(np.random.default_rng(6), [2.0, 2.001, 1.0, 0.5])
    easy = {0: 0.0, 1: 5.0, 2: 10.0}
    trials = tuple(
        replace(t, metrics={"throughput.a": t.metrics["throughput.a"] + easy[t.seed]})
        for t in records.trials
        if t.axes["way"] > 1 or (t.axes["way"], t.seed) in {(0, 0), (1, 1)}
    )
    ranking = ranking_of(replace(records, trials=trials), "throughput.a")
    ahead = {each.axes["way"]: each for each in ranking.configurations[:2]}
    assert ahead.keys() == {0, 1}
    other = ranking.configurations[1]
    assert other.p_value is None and 0 < other.behind.value < 0.5


def test_groups_without_a_shared_seed_are_compared_after_welch() -> None:
    first, second = [0.395, 0.545, 0.603], [0.515, 0.62, 0.71]
    trials = [
        made_up.trial(name, seed, 0, {"throughput.a": value})
        for name, seeds, values in (("task", (0, 1, 2), first), ("perplexity", (3, 4, 5), second))
        for seed, value in zip(seeds, values, strict=True)
    ]
    measure = Measure(Records("s", "p", trials=tuple(trials)), "throughput.a")
    found = measure.compare(trials[:3], trials[3:])
    naive = stats.ttest_ind(first, second, equal_var=False)
    assert found.p_value == pytest.approx(naive.pvalue, abs=1e-6)
    assert (found.difference.low, found.difference.high) == pytest.approx(
        naive.confidence_interval()
    )


def test_what_is_far_behind_is_not_tied_with_three_seeds() -> None:
    ranking = ranking_of(with_noise(np.random.default_rng(2), [2.0, 2.0, 1.0]), "throughput.a")
    assert [each.tied for each in ranking.configurations] == [True, True, False]


@given(st.permutations(range(9)))
@settings(max_examples=20, deadline=None)
def test_the_order_of_the_trials_does_not_change_the_ranking(order: list[int]) -> None:
    records = with_noise(np.random.default_rng(4), [2.0, 1.9, 1.5])
    shuffled = replace(records, trials=tuple(records.trials[i] for i in order))
    one, other = (ranking_of(each, "throughput.a") for each in (records, shuffled))
    for first, second in zip(one.configurations, other.configurations, strict=True):
        assert (first.label, first.tied) == (second.label, second.tied)
        assert (first.p_value or 0) == pytest.approx(second.p_value or 0, abs=1e-6)


def test_who_alone_has_the_easy_seed_is_not_ahead_for_that() -> None:
    values = {"perplexity-0": 0.9, "perplexity-1": 0.5, "task-1": 0.6}
    ranking = ranking_of(with_values(values, "throughput.a"), "throughput.a")
    best, other = ranking.configurations
    assert (best.label, best.unfinished) == ("criterion=task", 2)
    assert best.estimate.value == 0.6 < other.estimate.value
    assert other.behind.value == pytest.approx(0.1)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_who_does_better_on_all_shared_seeds_is_never_found_to_be_worse(
    data: st.DataObject,
) -> None:
    trials = []
    for name in made_up.CRITERIA:
        seeds = data.draw(st.sets(st.integers(0, 4), min_size=1), label=f"seeds of {name}")
        for seed in seeds:
            value = data.draw(st.integers(0, 20), label=f"{name} with {seed}") / 20
            trials.append(made_up.trial(name, seed, 0, {"throughput.a": value}))
    ranking = ranking_of(Records("s", "p", trials=tuple(trials)), "throughput.a")
    best, *others = ranking.configurations
    of_best = {t.seed: t.metrics["throughput.a"] or 0.0 for t in best.trials}
    for other in others:
        shared = [t for t in other.trials if t.seed in of_best]
        if shared and all((t.metrics["throughput.a"] or 0.0) >= of_best[t.seed] for t in shared):
            assert other.tied and not other.untested


def test_a_clear_winner_wins_though_another_is_cheaper() -> None:
    chosen = winner(rank(two_configurations(190, 120, parameters=1000)))
    assert chosen is not None
    assert chosen.configuration.label == "criterion=perplexity"
    assert chosen.tied == ()


@pytest.mark.parametrize("cheaper", [{"parameters": 500_000}, {"tokens_trained": 1000}])
def test_among_tied_configurations_the_cheapest_wins(cheaper: dict[str, int]) -> None:
    # 3 of 200 questions apart, each way: the interval of the difference contains 0.
    records = two_configurations(151, 148, **cheaper)
    flipped = [replace(item, correct=1.0 - item.correct) for item in records.items[:20]]
    records = replace(records, items=(*flipped, *records.items[20:]))
    chosen = winner(rank(records))
    assert chosen is not None
    assert chosen.configuration.label == "criterion=block_influence"
    assert [each.label for each in chosen.tied] == ["criterion=perplexity"]


def test_a_cost_that_is_not_known_is_never_the_cheapest() -> None:
    chosen = winner(rank(two_configurations(150, 150, parameters=None)))
    assert chosen is not None
    assert chosen.configuration.label == "criterion=perplexity"


def test_between_tied_equals_the_higher_mean_wins() -> None:
    chosen = winner(rank(RECORDS))
    assert chosen is not None
    assert chosen.configuration.label == "criterion=perplexity"
    assert [each.label for each in chosen.tied] == ["criterion=block_influence"]


def test_the_winning_seed_is_the_best_on_the_select_half_and_reported_on_the_other() -> None:
    chosen = winner(rank(RECORDS))
    assert chosen is not None and chosen.reported is not None
    seeds = {t.seed: t.metrics["accuracy.mean"] for t in chosen.configuration.trials}
    assert seeds[chosen.trial.seed] == max(v for v in seeds.values() if v is not None)
    assert chosen.selected.value == chosen.trial.metrics["accuracy.mean"]
    assert chosen.reported.value == chosen.trial.metrics["accuracy_report.mean"]
    assert chosen.reported.low is not None and chosen.reported.high is not None
    assert chosen.reported.low < chosen.reported.value < chosen.reported.high


def test_the_winners_mean_over_seeds_stands_beside_its_best_seed() -> None:
    chosen = winner(rank(RECORDS))
    assert chosen is not None and chosen.over_seeds is not None and chosen.reported is not None
    trials = chosen.configuration.trials
    assert len(trials) > 1
    values = [trial.metrics["accuracy_report.mean"] or 0.0 for trial in trials]
    assert chosen.over_seeds.value == pytest.approx(sum(values) / len(values))
    assert chosen.over_seeds.value != chosen.reported.value


def test_a_trial_stands_beside_the_teacher_of_its_own_seed() -> None:
    values = {0: 0.9, 1: 0.7}
    teachers = tuple(
        replace(RECORDS.trials[0], trial_id=f"teacher-{seed}", seed=seed, metrics=metrics)
        for seed, value in values.items()
        for metrics in ({"accuracy.mean": value, "accuracy_report.mean": value},)
    )
    rest = tuple(trial for trial in RECORDS.trials if trial.baseline != TEACHER)
    chosen = winner(rank(replace(RECORDS, trials=(*teachers, *rest))))
    assert chosen is not None
    assert chosen.teacher_reported is not None and chosen.teacher_over_seeds is not None
    assert chosen.teacher_reported.value == values[chosen.trial.seed]
    assert chosen.teacher_over_seeds.value == pytest.approx(0.8)


def test_the_report_half_changes_nothing_in_the_choice() -> None:
    def spoil(trial: TrialRecord) -> TrialRecord:
        best = trial.trial_id == "random_layers-0"
        hidden = {name: float(best) for name in trial.metrics if "report" in name}
        return replace(trial, metrics={**trial.metrics, **hidden})

    items = tuple(
        replace(i, correct=1.0 - i.correct) if i.split == "report" else i for i in RECORDS.items
    )
    spoiled = replace(RECORDS, trials=tuple(map(spoil, RECORDS.trials)), items=items)
    before, after = winner(rank(RECORDS)), winner(rank(spoiled))
    assert before is not None and after is not None
    assert before.trial.trial_id == after.trial.trial_id


def test_the_teacher_is_never_a_candidate_and_stands_beside_the_winner() -> None:
    ranking = ranking_of(RECORDS)
    assert TEACHER not in {c.baseline for c in ranking.configurations}
    chosen = winner(ranking)
    assert chosen is not None and chosen.teacher_reported is not None
    assert chosen.teacher_reported.value == RECORDS.trials[0].metrics["accuracy_report.mean"]
    only_teacher = replace(RECORDS, trials=RECORDS.trials[:1])
    assert rank(only_teacher) is None


def test_without_a_teacher_or_a_report_half_those_are_unknown() -> None:
    chosen = winner(rank(with_values({"perplexity-0": 0.5})))
    assert chosen is not None
    assert (chosen.reported, chosen.teacher_selected, chosen.teacher_reported) == (None,) * 3


def test_a_value_that_is_no_number_never_wins() -> None:
    values = {"perplexity-0": math.nan, "task-0": 0.4, "block_influence-0": math.inf}
    ranking = ranking_of(with_values(values))
    assert [c.label for c in ranking.configurations] == ["criterion=task"]


def test_a_stopped_trial_is_not_ranked() -> None:
    stopped = tuple(
        replace(t, status="stopped") if "perplexity" in t.trial_id else t for t in RECORDS.trials
    )
    items = tuple(i for i in RECORDS.items if "perplexity" not in i.trial_id or i.item_id < "0010")
    ranking = ranking_of(replace(RECORDS, trials=stopped, items=items))
    assert "criterion=perplexity" not in {c.label for c in ranking.configurations}
    # Nor do its few answers narrow the comparison of the others.
    full = ranking_of(replace(RECORDS, trials=tuple(t for t in stopped if t.status != "stopped")))
    assert [c.estimate for c in ranking.configurations] == [c.estimate for c in full.configurations]


def test_nothing_completed_has_no_winner() -> None:
    assert rank(with_values({})) is None
    assert winner(rank(Records("s", "p"))) is None


def test_a_loss_is_better_when_lower_and_compared_over_seeds() -> None:
    ranking = ranking_of(RECORDS, "lm_loss.after", "min")
    assert ranking.configurations[0].label == "criterion=perplexity"
    chosen = winner(ranking)
    assert chosen is not None
    assert chosen.trial.trial_id == "perplexity-0"
    # Seeds differ by the same amount in every configuration, so the pairs are exact.
    assert [c.tied for c in ranking.configurations] == [True, False, False, False]


def test_the_interval_over_seeds_is_students() -> None:
    estimate = over_seeds([1.0, 2.0, 3.0])
    assert (estimate.low, estimate.high) == pytest.approx((2 - 2.4841, 2 + 2.4841), abs=1e-3)
    assert over_seeds([1.0]).low is None
    assert over_seeds([1.0, 1.0]).half_width == 0.0


def test_where_nothing_was_repeated_who_came_out_worse_is_untested() -> None:
    values = {"perplexity-0": 0.5, "task-0": 0.5, "block_influence-0": 0.4999}
    ranking = ranking_of(with_values(values, "throughput.a"), "throughput.a")
    assert {c.label for c in ranking.tied} == {"criterion=perplexity", "criterion=task"}
    assert [c.label for c in ranking.configurations if c.untested] == ["criterion=block_influence"]
    chosen = winner(ranking)
    assert chosen is not None
    assert [each.label for each in chosen.untested] == ["criterion=block_influence"]


def test_what_was_tested_is_tied_or_worse_and_never_untested() -> None:
    assert not any(each.untested for each in ranking_of(RECORDS).configurations)


def test_names_are_as_short_as_they_can_be() -> None:
    axes = {"prune.depth.keep": 0.5, "prune.width.keep": 1, "distill.loss.logits": "mse"}
    records = replace(RECORDS, trials=(replace(RECORDS.trials[1], axes=axes),))
    assert axis_names(records) == {
        "distill.loss.logits": "logits",
        "prune.depth.keep": "depth.keep",
        "prune.width.keep": "width.keep",
    }


def test_labels_name_only_what_varies() -> None:
    assert labels(RECORDS)["task-1"] == "criterion=task"
    assert labels(RECORDS)["random_layers-0"] == "random_layers"


def test_one_and_one_point_zero_are_one_value_but_true_is_another() -> None:
    whole, real, true = (replace(RECORDS.trials[1], axes={"x": x}) for x in (1, 1.0, True))
    assert configuration_key(whole) == configuration_key(real) != configuration_key(true)
