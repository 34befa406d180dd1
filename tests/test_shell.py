"""A stage by itself from a shell, and what it says to a mistake."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from trainers import prune, shell
from trainers.config import PruneConfig
from trainers.contract import StageContext, StageError, StageResult

ROOT = Path(__file__).parent.parent


def described(artifact: Path, **changes: Any) -> dict[str, Any]:
    usual = {
        "config": {"depth": {"num_hidden_layers": 3, "choice": {"kind": "layers", "drop": [1]}}},
        "inputs": {"model": str(artifact)},
        "seed": 2,
    }
    return {**usual, **changes}


def call(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    config: Any,
    run: Any = prune.run,
    out: str = "out",
    options: Sequence[str] = (),
) -> Path:
    """`main` on a command line of its own; gives the folder written into."""
    file, folder = tmp_path / "config.yaml", tmp_path / out
    file.write_text(config if isinstance(config, str) else json.dumps(config))
    line = ["prune", "--config", str(file), "--out", str(folder), "--threads", "1"]
    monkeypatch.setattr(sys, "argv", [*line, *options])
    shell.main(PruneConfig, run)
    return folder


@pytest.mark.slow
def test_a_stage_runs_from_a_shell_and_prints_its_result(artifact: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "config.json", tmp_path / "out"
    file.write_text(json.dumps(described(artifact)))
    line = [sys.executable, "-m", "trainers.prune", "--config", str(file), "--out", str(out)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    assert printed == {"metrics": {}, "tokens": 0, "flops": 0.0}
    assert printed == json.loads((out / "result.json").read_text())
    assert json.loads((out / "model" / "config.json").read_text())["num_hidden_layers"] == 3


def test_what_the_file_says_reaches_the_stage(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, artifact: Path
) -> None:
    seen: list[StageContext[PruneConfig]] = []

    def run(context: StageContext[PruneConfig]) -> StageResult:
        seen.append(context)
        context.reporter.report(1, 1, {"loss": 1.5})
        return StageResult({"loss": 1.5}, 7, 8.0)

    out = call(monkeypatch, tmp_path, described(artifact), run)
    (context,) = seen
    assert context.config == PruneConfig.model_validate(described(artifact)["config"])
    assert context.model("model") == artifact / "model"
    assert (context.seed, context.out) == (2, out)
    written = json.loads((out / "result.json").read_text())
    assert written == {"metrics": {"loss": 1.5}, "tokens": 7, "flops": 8.0}


@pytest.mark.parametrize(
    ("options", "seconds"), [([], 30.0), (["--checkpoint-every", "600"], 600.0)]
)
def test_how_often_a_checkpoint_is_saved_can_be_said(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    artifact: Path,
    options: list[str],
    seconds: float,
) -> None:
    seen: list[StageContext[PruneConfig]] = []

    def run(context: StageContext[PruneConfig]) -> StageResult:
        seen.append(context)
        return StageResult()

    call(monkeypatch, tmp_path, described(artifact), run, options=options)
    assert [context.runtime.checkpoint_every_s for context in seen] == [seconds]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {"depth": {"num_hidden_layer": 3}}}, "did you mean 'num_hidden_layers'"),
        (
            {"config": {"depth": {"num_hidden_layers": 0, "choice": {"kind": "score"}}}},
            "greater than 0",
        ),
        ({"config": {"depth": {"num_hidden_layers": 3, "choice": {"kind": "best"}}}}, "best"),
        ({"config": None}, "config"),
        ({"inputs": {"model": "nowhere"}}, "inputs.model: nowhere is no artifact"),
        ({"inputs": ["nowhere"]}, "inputs must name a folder for each role"),
        ({"inputs": {"model": 3}}, "inputs must name a folder for each role"),
        ({"seed": "many"}, "seed must be an integer: 'many'"),
        ({"sede": 1}, "needs the keys config"),
    ],
)
def test_a_bad_file_is_one_clear_message_and_status_2(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    artifact: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, tmp_path, described(artifact, **changes))
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert str(tmp_path / "config.yaml") in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def cut_of(*drop: int, layers: int = 4) -> dict[str, Any]:
    choice = {"kind": "layers", "drop": drop}
    return {"config": {"depth": {"num_hidden_layers": layers - len(drop), "choice": choice}}}


@pytest.mark.parametrize("what", ["config.depth", "seed", "inputs.model"])
def test_work_in_a_folder_is_not_gone_on_with_under_other_settings(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    artifact: Path,
    capsys: pytest.CaptureFixture[str],
    what: str,
) -> None:
    shutil.copytree(artifact, tmp_path / "other")
    changes: dict[str, dict[str, Any]] = {
        "config.depth": cut_of(2),
        "seed": {"seed": 3},
        "inputs.model": {"inputs": {"model": str(tmp_path / "other")}},
    }
    out = call(monkeypatch, tmp_path, described(artifact))
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, tmp_path, described(artifact, **changes[what]))
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert f"{out} holds work with another {what}: name another --out, or remove it" in said
    assert json.loads((out / "dropped_layers.json").read_text()) == [1]
    call(monkeypatch, tmp_path, described(artifact))  # the same again is welcome


def test_an_input_that_was_made_anew_in_another_way_is_another_input(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    artifact: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = call(monkeypatch, tmp_path, described(artifact), out="first")
    call(monkeypatch, tmp_path, described(first, **cut_of(0, layers=3)))
    shutil.rmtree(first)
    call(monkeypatch, tmp_path, described(artifact, **cut_of(2)), out="first")
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, tmp_path, described(first, **cut_of(0, layers=3)))
    assert stopped.value.code == 2
    assert "another inputs.model" in capsys.readouterr().err


def test_a_folder_where_nothing_was_done_yet_takes_corrected_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, artifact: Path
) -> None:
    with pytest.raises(SystemExit) as failed:
        call(monkeypatch, tmp_path, described(artifact, **cut_of(9)))
    assert failed.value.code == 1
    out = call(monkeypatch, tmp_path, described(artifact))
    assert json.loads((out / "dropped_layers.json").read_text()) == [1]


@pytest.mark.parametrize("seed", [{}, {"seed": None}])
def test_a_stage_that_draws_nothing_needs_no_seed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, artifact: Path, seed: dict[str, None]
) -> None:
    file = {key: value for key, value in described(artifact).items() if key != "seed"}
    out = call(monkeypatch, tmp_path, {**file, **seed})
    assert json.loads((out / "dropped_layers.json").read_text()) == [1]


@pytest.mark.parametrize("text", ["", "- a list", "config: {unclosed", "\x00"])
def test_a_file_that_is_no_mapping_is_one_clear_message_and_status_2(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    text: str,
) -> None:
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, tmp_path, text)
    assert stopped.value.code == 2
    assert str(tmp_path / "config.yaml") in capsys.readouterr().err


def test_a_missing_file_is_one_clear_message_and_status_2(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["prune", "--config", str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit) as stopped:
        shell.main(PruneConfig, prune.run)
    assert stopped.value.code == 2
    assert "No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": None}, "failed: the stage needs an input in the role model"),
        (
            {"config": {"depth": {"num_hidden_layers": 9, "choice": {"kind": "random"}}}},
            "cannot keep 9 of 4",
        ),
    ],
)
def test_a_stage_that_fails_says_why_and_has_status_1(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    artifact: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, tmp_path, described(artifact, **changes))
    assert stopped.value.code == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "result.json").exists()


def test_only_stage_errors_are_turned_into_messages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, artifact: Path
) -> None:
    def run(context: StageContext[PruneConfig]) -> StageResult:
        raise ZeroDivisionError

    assert not issubclass(ZeroDivisionError, StageError)
    with pytest.raises(ZeroDivisionError):
        call(monkeypatch, tmp_path, described(artifact), run)


def test_a_stage_that_cannot_share_its_work_says_so_to_a_launcher(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    artifact: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, tmp_path, described(artifact))
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "runs on one worker, not on 2; on several run Correct, Distill, Evaluate" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({}, 8),
        ({"LOCAL_SIZE": "4"}, 2),
        ({"LOCAL_WORLD_SIZE": "3"}, 2),
        ({"LOCAL_SIZE": "16"}, 1),
        ({"LOCAL_WORLD_SIZE": "4", "OMP_NUM_THREADS": "8"}, 8),
    ],
)
def test_launched_processes_share_the_cores_unless_told(
    environment: dict[str, str], threads: int
) -> None:
    assert shell._threads(8, environment) == threads
