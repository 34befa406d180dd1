"""The winner of one sweep as the source of another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import small_sweep

from orchestrator.plan import plan_sweep
from orchestrator.space import enumerate_trials
from orchestrator.spec import SpecError, Sweep, load
from trainers.config import FolderModel

CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def best(results: Path, sweep: str, profile: str = "micro") -> Path:
    folder = results / sweep / profile / "best"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def sweep(folder: Path, source: dict[str, Any], results: Path) -> Sweep:
    trial = {"source": source, "prune": {"depth": {"keep": 0.5, "criterion": "random"}}}
    described = {"name": "next", "question": "?", "profile": "micro", "trial": trial}
    return load(small_sweep.write(folder, described, "next"), results=results)


def test_a_winner_is_the_checkpoint_in_the_best_folder_of_its_sweep(tmp_path: Path) -> None:
    folder = best(tmp_path / "results", "small")
    loaded = sweep(tmp_path, {"kind": "winner", "sweep": "small"}, tmp_path / "results")
    planned = plan_sweep(loaded, enumerate_trials(loaded))
    assert planned.trials[0].trial.config.source == FolderModel(path=folder)
    assert planned.trials[1].shape.num_hidden_layers == 1


def test_another_winner_makes_other_trials(tmp_path: Path) -> None:
    results = tmp_path / "results"
    folder = best(results, "small")
    source = {"kind": "winner", "sweep": "small"}
    first = enumerate_trials(sweep(tmp_path, source, results)).trials[1].trial_id
    (folder / "model.safetensors").write_bytes(b"other weights")
    assert enumerate_trials(sweep(tmp_path, source, results)).trials[1].trial_id != first


def test_a_winner_may_be_of_another_profile(tmp_path: Path) -> None:
    folder = best(tmp_path / "results", "small", "large")
    source = {"kind": "winner", "sweep": "small", "profile": "large"}
    loaded = sweep(tmp_path, source, tmp_path / "results")
    assert enumerate_trials(loaded).trials[0].config.source == FolderModel(path=folder)


def test_a_winner_that_is_not_there_is_told_with_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"next\.yaml:\d+: .*orchestrate sweeps/small\.yaml"):
        sweep(tmp_path, {"kind": "winner", "sweep": "small"}, tmp_path / "results")


@pytest.mark.parametrize(
    "source", [{"kind": "winner"}, {"kind": "winner", "sweep": "small", "seed": 1}]
)
def test_a_winner_is_named_by_its_sweep(tmp_path: Path, source: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="named by sweep"):
        sweep(tmp_path, source, tmp_path / "results")


def test_the_resolved_sweep_names_the_folder_and_loads_again(tmp_path: Path) -> None:
    results = tmp_path / "results"
    best(results, "small")
    loaded = sweep(tmp_path, {"kind": "winner", "sweep": "small"}, results)
    again = tmp_path / "again.yaml"
    again.write_text(loaded.dump_yaml(relative_to=tmp_path))
    first = [trial.trial_id for trial in enumerate_trials(loaded).trials]
    assert [t.trial_id for t in enumerate_trials(load(again)).trials] == first
