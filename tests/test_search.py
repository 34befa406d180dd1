"""A search: what is proposed, what is learned from, and that it goes on after any stop."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import made_up
import optuna
import pytest
import small_sweep

from orchestrator.axes import key_of, parse_axes
from orchestrator.growth import SearchGrowth, known_to_its_end, objectives_of, outcome, plan_with
from orchestrator.plan import SweepPlan
from orchestrator.proposals import Ended, Proposer
from orchestrator.records import TrialRecord
from orchestrator.scheduling import Objective
from orchestrator.space import pool_of
from orchestrator.spec import SpecError, Sweep, load

RATES = {"from": 0.001, "to": 0.008, "step": 0.001}
AXES: dict[str, Any] = {
    "distill.training.learning_rate": RATES,
    "prune.depth.criterion": ["perplexity", "random"],
    "prune.depth.contiguous": {
        "values": [True, False],
        "when": {"prune.depth.criterion": "perplexity"},
    },
}
CRITERION = "prune.depth.criterion"
METHODS = ("random", "tpe", "gp", "nsga2")


def sweep(folder: Path, method: str = "tpe", **more: Any) -> Sweep:
    search = {"method": method, "trials": 12, "startup": 4, **more.pop("search", {})}
    keys = {"axes": AXES, "select": {"metric": "lm_loss.after"}, "search": search, **more}
    return load(small_sweep.write(folder, {**small_sweep.SWEEP, **keys}))


def proposer(
    asked: Sweep, folder: Path, ended: Mapping[str, Ended] | None = None, goals: int = 1
) -> Proposer:
    pool = pool_of(asked).configurations
    modes = ["min"] * goals
    grid, database = parse_axes(asked), folder / "optuna.db"
    return Proposer(asked.search, modes, grid, pool, database, ended or {})  # type: ignore[arg-type]


def loss_of(configuration: Mapping[str, Any]) -> float:
    """Best at a rate of 0.003, for blocks that perplexity chose together."""
    rate = configuration["distill.training.learning_rate"]
    bonus = 0.5 * (configuration["prune.depth.criterion"] == "perplexity")
    bonus += 0.5 * bool(configuration.get("prune.depth.contiguous"))
    return 3 + abs(rate - 0.003) * 100 - bonus


def states(folder: Path) -> dict[str, int]:
    storage = f"sqlite:///{folder / 'optuna.db'}"
    counts: dict[str, int] = {}
    for summary in optuna.study.get_all_study_summaries(storage):
        for trial in optuna.load_study(study_name=summary.study_name, storage=storage).trials:
            counts[trial.state.name] = counts.get(trial.state.name, 0) + 1
    return counts


def searched(found: Proposer) -> Iterator[Mapping[str, Any]]:
    while (proposed := found.propose()) is not None:
        found.tell(key_of(dict(proposed)), Ended("completed", (loss_of(proposed),)))
        yield proposed


@pytest.mark.parametrize("method", METHODS)
def test_every_proposal_is_a_new_configuration_of_the_grid(tmp_path: Path, method: str) -> None:
    asked = sweep(tmp_path, method)
    pool = pool_of(asked).configurations
    keys = [key_of(dict(each)) for each in searched(proposer(asked, tmp_path))]
    assert len(keys) == len(set(keys)) == 12
    assert set(keys) <= set(pool)
    assert "RUNNING" not in states(tmp_path)


def test_a_search_for_more_than_there_is_tries_everything(tmp_path: Path) -> None:
    asked = sweep(tmp_path, search={"trials": 500})
    keys = {key_of(dict(each)) for each in searched(proposer(asked, tmp_path))}
    assert keys == set(pool_of(asked).configurations)
    assert len(keys) == 8 * (2 + 1)


def test_conditional_axes_are_left_out_where_they_do_not_apply(tmp_path: Path) -> None:
    for each in searched(proposer(sweep(tmp_path, search={"trials": 24}), tmp_path)):
        by_perplexity = each["prune.depth.criterion"] == "perplexity"
        assert ("prune.depth.contiguous" in each) == by_perplexity


def test_learning_finds_better_configurations_than_chance(tmp_path: Path) -> None:
    many = {"from": 0.0005, "to": 0.02, "step": 0.0005}
    axes = {**AXES, "distill.training.learning_rate": many}
    best: dict[str, list[float]] = {"tpe": [], "random": []}
    for method in best:
        for seed in range(3):
            folder = tmp_path / f"{method}{seed}"
            folder.mkdir()
            asked = sweep(folder, method, axes=axes, search={"trials": 20, "seed": seed})
            found = [loss_of(each) for each in searched(proposer(asked, folder))]
            best[method].append(sum(sorted(found)[:5]))
    assert sum(best["tpe"]) < sum(best["random"])


def test_a_search_goes_on_where_it_stopped(tmp_path: Path) -> None:
    asked = sweep(tmp_path)
    first = proposer(asked, tmp_path)
    told: dict[str, Ended] = {}
    for _ in range(4):
        key = key_of(dict(first.propose() or {}))
        told[key] = Ended("completed", (1.0,))
        first.tell(key, told[key])
    under_way = [first.propose(), first.propose()]
    first.close()  # and the process dies
    again = proposer(asked, tmp_path, told)
    keys = {key_of(dict(each or {})) for each in under_way}
    assert {key_of(dict(again.propose() or {})) for _ in under_way} == keys
    for key in keys:
        again.tell(key, Ended("completed", (2.0,)))
    rest = list(searched(again))
    assert len(rest) == 12 - 6
    assert "RUNNING" not in states(tmp_path) and "WAITING" not in states(tmp_path)
    assert states(tmp_path)["COMPLETE"] == 12


def test_stopping_twice_loses_and_repeats_nothing(tmp_path: Path) -> None:
    asked = sweep(tmp_path)
    first = proposer(asked, tmp_path)
    under_way = [first.propose(), first.propose()]
    first.close()
    proposer(asked, tmp_path).close()  # dies before it proposes anything
    again = proposer(asked, tmp_path)
    keys = {key_of(dict(each or {})) for each in under_way}
    assert {key_of(dict(again.propose() or {})) for _ in under_way} == keys
    for key in keys:
        again.tell(key, Ended("completed", (1.0,)))
    assert not keys & {key_of(dict(each)) for each in searched(again)}


def test_a_database_that_is_lost_is_made_again_from_the_ledger(tmp_path: Path) -> None:
    asked = sweep(tmp_path)
    told = {
        key_of(dict(each)): Ended("completed", (loss_of(each),))
        for each in searched(proposer(asked, tmp_path))
    }
    (tmp_path / "optuna.db").unlink()
    assert proposer(asked, tmp_path, told).propose() is None
    assert states(tmp_path) == {"COMPLETE": 12}


def test_failures_and_what_is_no_number_are_told_as_failed(tmp_path: Path) -> None:
    found = proposer(sweep(tmp_path), tmp_path)
    for how in (Ended("failed", None), Ended("completed", (math.nan,))):
        found.tell(key_of(dict(found.propose() or {})), how)
    found.close()
    counts = states(tmp_path)
    assert "RUNNING" not in counts and "COMPLETE" not in counts


def test_what_was_stopped_early_is_told_with_its_loss(tmp_path: Path) -> None:
    found = proposer(sweep(tmp_path), tmp_path)
    found.tell(key_of(dict(found.propose() or {})), Ended("stopped", (4.5,), tokens=640))
    storage = f"sqlite:///{tmp_path / 'optuna.db'}"
    (summary,) = optuna.study.get_all_study_summaries(storage)
    trials = optuna.load_study(study_name=summary.study_name, storage=storage).trials
    (stopped,) = [each for each in trials if each.state is optuna.trial.TrialState.PRUNED]
    assert stopped.intermediate_values == {640: 4.5}


def test_several_objectives_are_sought_together(tmp_path: Path) -> None:
    goals = [{"metric": "lm_loss.after"}, {"metric": "parameters"}]
    asked = sweep(tmp_path, "nsga2", search={"objectives": goals})
    assert [each.mode for each in objectives_of(asked)] == ["min", "min"]
    found = proposer(asked, tmp_path, goals=2)
    while (proposed := found.propose()) is not None:
        found.tell(key_of(dict(proposed)), Ended("completed", (loss_of(proposed), 1.0)))
    assert states(tmp_path)["COMPLETE"] == 12


def test_a_grid_that_gains_a_value_keeps_what_was_learned(tmp_path: Path) -> None:
    told = {
        key_of(dict(each)): Ended("completed", (loss_of(each),))
        for each in searched(proposer(sweep(tmp_path), tmp_path))
    }
    axes = {**AXES, "distill.training.learning_rate": {**RATES, "to": 0.010}}
    wider = sweep(tmp_path, axes=axes, search={"trials": 15})
    assert len(list(searched(proposer(wider, tmp_path, told)))) == 3
    assert states(tmp_path)["COMPLETE"] == 12 + 15


# --- a sweep that searches -------------------------------------------------------------------


def record(planned: SweepPlan, trial_id: str, loss: float | None, at: float) -> TrialRecord:
    (trial,) = [each.trial for each in planned.trials if each.trial.trial_id == trial_id]
    made = made_up.trial("perplexity", trial.seed, 0, {"lm_loss.after": loss or 0.0})
    made = replace(made, metrics={"lm_loss.after": loss or 0.0})
    made = replace(made, trial_id=trial_id, axes=dict(trial.axes), baseline=trial.baseline)
    if loss is None:
        return replace(made, status="failed", reason="NaN", metrics={}, started_at=at)
    return replace(made, started_at=at)


def grid_of(planned: SweepPlan) -> list[str]:
    return [each.trial.trial_id for each in planned.trials if each.trial.baseline is None]


def test_each_configuration_is_run_with_every_seed_and_known_again(tmp_path: Path) -> None:
    asked = sweep(tmp_path, search={"trials": 3}, seeds=[0, 1])
    growth = SearchGrowth(asked, {}, tmp_path / "optuna.db")
    ended: dict[str, TrialRecord] = {}
    for count in (1, 2, 3):
        planned = growth.grown(ended, idle=True)
        assert planned is not None
        new = [each for each in grid_of(planned) if each not in ended]
        assert len(new) == 2 and len(grid_of(planned)) == 2 * count
        ended |= {each: record(planned, each, 3.0 + count, count) for each in new}
    assert growth.grown(ended, idle=True) is None
    growth.close(ended)
    assert grid_of(plan_with(asked, ended)) == grid_of(planned)
    later = SearchGrowth(asked, ended, tmp_path / "optuna.db")
    assert later.grown(ended, idle=True) is None


@pytest.mark.parametrize("lost", [False, True])
def test_a_search_has_ended_when_it_would_try_nothing_more(tmp_path: Path, lost: bool) -> None:
    """Where a configuration failed, and where the study is lost, too."""
    asked = sweep(tmp_path, search={"trials": 3})
    growth, ended = SearchGrowth(asked, {}, tmp_path / "optuna.db"), dict[str, TrialRecord]()
    left = []
    while (planned := growth.grown(ended, idle=True)) is not None:
        (new,) = set(grid_of(planned)) - set(ended)
        ended[new] = record(planned, new, None if len(ended) == 1 else 3.0, len(ended))
        before = states(tmp_path)
        planned = known_to_its_end(asked, ended, tmp_path / "lost" if lost else tmp_path)
        left.append(len(set(grid_of(planned)) - set(ended)))
        assert states(tmp_path) == before, "the study is only looked at"
    assert left == [1, 1, 0]


@pytest.mark.parametrize("lost", [False, True])
def test_what_failed_in_an_earlier_run_is_tried_again_and_learned_from(
    tmp_path: Path, lost: bool
) -> None:
    """Where the study is lost, or another one because the grid has changed, too."""
    asked = sweep(tmp_path, search={"trials": 3})
    growth, ended = SearchGrowth(asked, {}, tmp_path / "optuna.db"), dict[str, TrialRecord]()
    while (planned := growth.grown(ended, idle=True)) is not None:
        (new,) = set(grid_of(planned)) - set(ended)
        ended[new] = record(planned, new, None if len(ended) == 1 else 3.0, len(ended))
    growth.close(ended)
    failed = {id_: trial for id_, trial in ended.items() if trial.status == "failed"}
    kept = {id_: trial for id_, trial in ended.items() if id_ not in failed}
    if lost:
        (tmp_path / "optuna.db").unlink()
    later = SearchGrowth(asked, kept, tmp_path / "optuna.db", failed)
    planned = later.grown(kept, idle=True)
    assert planned is not None and set(grid_of(planned)) - set(kept) == set(failed)
    assert later.grown(kept | {i: record(planned, i, 2.0, 9.0) for i in failed}, idle=True) is None
    assert states(tmp_path)["COMPLETE"] == 3


def test_a_search_that_gains_an_axis_does_not_run_again_what_it_finds_done(
    tmp_path: Path,
) -> None:
    old = sweep(tmp_path, axes={"distill.training.learning_rate": RATES}, search={"trials": 8})
    growth, ended = SearchGrowth(old, {}, tmp_path / "optuna.db"), dict[str, TrialRecord]()
    while (planned := growth.grown(ended, idle=True)) is not None:
        ended |= {i: record(planned, i, 3.0, 1.0) for i in grid_of(planned) if i not in ended}
    growth.close(ended)
    axes = {"distill.training.learning_rate": RATES, "prune.depth.criterion": AXES[CRITERION]}
    new = sweep(tmp_path, axes=axes, search={"trials": 16})
    growth, begun = SearchGrowth(new, ended, tmp_path / "optuna.db"), set[str]()
    while (planned := growth.grown(ended, idle=True)) is not None:
        fresh = set(grid_of(planned)) - set(ended)
        begun |= fresh
        ended |= {each: record(planned, each, 3.0, 2.0) for each in fresh}
    assert len(begun) == 8 and len(ended) == 16


def test_a_configuration_counts_by_the_mean_of_its_seeds() -> None:
    goal = [Objective(metric="lm_loss.after", mode="min")]
    trials = [
        replace(made_up.trial("perplexity", seed, 0, {}), metrics={"lm_loss.after": 3.0 + seed})
        for seed in (0, 1)
    ]
    assert outcome(trials, goal) == Ended("completed", (3.5,))
    failed = replace(trials[0], status="failed", reason="NaN", metrics={})
    assert outcome([failed, trials[1]], goal) == Ended("completed", (4.0,))
    assert outcome([failed], goal) == Ended("failed", None)
    sizes = outcome(trials, [Objective.model_validate({"metric": "parameters"})])
    assert sizes == Ended("completed", (float(trials[0].parameters or 0),))


def test_a_configuration_stopped_early_counts_by_its_last_held_out_loss() -> None:
    goal = [Objective(metric="lm_loss.after", mode="min")]
    metrics = {"lm_loss.stopped": 5.0}
    stopped = replace(
        made_up.trial("perplexity", 0, 0, {}), status="stopped", metrics=metrics, tokens_trained=640
    )
    assert outcome([stopped], goal) == Ended("stopped", (5.0,), 640)
    other = [Objective(metric="accuracy.mean", mode="max")]
    assert outcome([stopped], other) == Ended("failed", None)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"search": {"trials": None}}, "tpe needs trials"),
        ({"search": {"method": "grid"}}, "trials, objectives, seed and startup are for"),
        ({"search": {"method": "grid", "trials": None}}, "seed and startup are for the methods"),
        ({"search": {"method": "nsga2", "startup": 1}}, "nsga2 needs a startup of at least 2"),
        ({"search": {"objectives": [{"metric": "speed"}]}}, "'speed' is not measured"),
        ({"search": {"method": "bayes"}}, "search.method"),
        ({"scheduler": {"method": "asha"}}, "needs floor_tokens"),
        ({"scheduler": {"method": "asha", "floor_tokens": 5}}, "set trial.distill.heldout_every"),
        (
            {"scheduler": {"method": "asha", "floor_tokens": 5, "metric": "accuracy.mean"}},
            r"small\.yaml:\d+: scheduler: metric is for the method race; asha and median go by",
        ),
        (
            {"scheduler": {"method": "race", "rungs": [{"name": "a", "keep": 1}, {"name": "b"}]}},
            "a race runs the whole grid",
        ),
        ({"axes": {"prune.depth.keep": [0.5, 9]}}, "keep"),
    ],
)
def test_a_search_that_cannot_be_is_refused(
    tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        asked = sweep(tmp_path, **keys)
        plan_with(asked, {})
