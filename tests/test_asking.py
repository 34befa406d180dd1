"""A task that cannot be had ends a run before it begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import small_sweep
import yaml

from orchestrator.asking import MissingTasksError, check_tasks, harness_tasks
from orchestrator.plan import SweepPlan, plan_sweep
from orchestrator.space import enumerate_trials
from orchestrator.spec import load


def harness(name: str, **settings: Any) -> dict[str, Any]:
    return {"kind": "harness", "name": name, "shots": 0, **settings}


def planned(folder: Path, evaluated: list[Any], scored: list[Any]) -> SweepPlan:
    trial = {
        "prune": {"depth": {"keep": 0.5, "criterion": "task"}},
        "evaluate": {"tasks": evaluated},
        "importance": {"tasks": scored},
    }
    sweep = load(
        small_sweep.write(
            folder, {"name": "asks", "question": "What?", "profile": "micro", "trial": trial}
        )
    )
    return plan_sweep(sweep, enumerate_trials(sweep))


def test_tasks_are_found_wherever_a_stage_asks_them_and_each_once(tmp_path: Path) -> None:
    generated = {"kind": "generated", "name": "agreement"}
    wino, piqa = harness("winogrande"), harness("piqa", limit=3)
    plan = planned(tmp_path, [wino, generated], [wino, piqa])
    found = harness_tasks(plan.nodes())
    assert sorted(task["name"] for task in found) == ["piqa", "winogrande"]
    assert all(task["kind"] == "harness" for task in found)
    assert harness_tasks(planned(tmp_path, [generated], [generated]).nodes()) == []


def test_a_check_that_breaks_down_is_no_leave_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(MissingTasksError) as raised:
        check_tasks([harness("winogrande")])
    assert raised.value.messages == ("looking for the questions failed with status 1",)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_whose_questions_cannot_be_had_starts_nothing(tmp_path: Path) -> None:
    sweep, results = small_sweep.write(tmp_path), tmp_path / "results"
    tasks = yaml.safe_dump([harness("winogrande"), harness("piqa")], default_flow_style=True)
    done = small_sweep.run(sweep, results, "--set", f"evaluate.tasks={tasks}")
    assert done.returncode == 2
    for name in ("winogrande", "piqa"):
        assert f"cannot get the questions of task {name}: " in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert not list((results / "artifacts").iterdir())
    assert not (results / "small" / "micro" / "ledger.jsonl").exists()
