"""Running the stages of a trial: what is stored is skipped, what is damaged is built again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cluster import FOR_WORKERS
from orchestrator.execute import Costs, Launched, run_stage, run_stages, stage_record
from orchestrator.records import StageRecord
from orchestrator.steps import StageNode
from orchestrator.store import Manifest, Store
from trainers.contract import DamagedInputError, Runtime, StageContext, StageError, StageResult

CACHE = StageNode("cache-1", "cache", {}, {}, None)
STUDENT = StageNode("distill-1", "distill", {}, {"signals": "cache-1"}, None)


def publish(store: Store, node: StageNode) -> Manifest:
    folder = store.working_folder(node.stage_id)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows").write_text("whole")
    manifest = Manifest(
        node.stage_id, node.kind, "me", {}, {}, None, {}, 0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, {}
    )
    store.publish(manifest)
    return manifest


def runner(
    store: Store, ran: list[str], damaged: Callable[[], bool]
) -> Callable[[StageNode], StageRecord]:
    """Runs a stage that is not stored; the student finds its cache damaged while that says so."""

    def run(node: StageNode) -> StageRecord:
        manifest = store.manifest(node.stage_id)
        if manifest is None:
            ran.append(node.stage_id)
            if node is STUDENT and damaged():
                raise DamagedInputError("signals", "the cache is damaged")
            manifest = publish(store, node)
        return stage_record(manifest, "t", cached=False)

    return run


def test_a_damaged_input_is_thrown_away_and_built_again(tmp_path: Path) -> None:
    store, ran = Store(tmp_path), list[str]()
    states = iter([True, False])
    records = list(run_stages([CACHE, STUDENT], runner(store, ran, lambda: next(states)), store))
    assert ran == ["cache-1", "distill-1", "cache-1", "distill-1"]
    assert [record.stage_id for record in records] == ["cache-1", "cache-1", "distill-1"]
    assert store.manifest("cache-1") is not None


def test_an_input_that_is_damaged_again_fails_the_trial(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(StageError, match="the cache is damaged"):
        list(run_stages([CACHE, STUDENT], runner(store, [], lambda: True), store))


def test_a_damaged_input_that_the_trial_does_not_make_fails_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(DamagedInputError):
        list(run_stages([STUDENT], runner(store, [], lambda: True), store))


def test_who_finds_its_files_gone_as_it_publishes_takes_what_another_published(
    tmp_path: Path,
) -> None:
    """It was stopped for so long that another took the stage over, and wakes as that one ends."""
    store = Store(tmp_path)

    def launch(node: StageNode, context: StageContext[Any]) -> Launched:
        publish(store, node)  # by the other, which then removes all that was worked on
        return Launched(StageResult({"loss": 1.0}), Costs(0.0, 0.0, 0.0))

    node = StageNode("prune-1", "prune", {"depth": None, "width": None}, {}, None)
    record = run_stage(node, store, "mine", "mine", lambda *_: None, Runtime(), launch)
    assert record.cached
    assert store.found("prune-1") is not None


LEAVES_MEMORY = """
import torch
from orchestrator.execute import Costs

tensors = [torch.ones(1 << 18) for _ in range(1000)]  # 1 GB
del tensors
meter = Costs.meter()
print(meter(0.0).peak_rss_mb)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep no high-water mark")
def test_a_stage_does_not_pay_for_the_memory_of_those_before() -> None:
    environment = {**os.environ, **FOR_WORKERS}
    done = subprocess.run(
        [sys.executable, "-c", LEAVES_MEMORY],
        cwd=Path(__file__).parent.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) < 800
