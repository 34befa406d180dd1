"""The command line: exit statuses, messages, the plan as JSON."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import made_up
import pytest
import small_sweep
import yaml
from click.testing import CliRunner, Result

from orchestrator.cli import _command, app
from orchestrator.growth import plan_with
from orchestrator.ledger import Ledger
from orchestrator.records import read_parquet, read_trials, write_parquet
from orchestrator.spec import load

ROOT = Path(__file__).parent.parent


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def plan_of(sweep: Path, results: Path) -> dict[str, Any]:
    result = call("plan", sweep, "--json", "--results", results)
    assert result.exit_code == 0, result.output
    plan: dict[str, Any] = json.loads(result.output)
    return plan


def test_every_command_shows_an_example_and_says_what_its_options_are_for() -> None:
    assert "orchestrate plan sweeps/depth_ablation.yaml" in call("--help").output
    for name, command in app.commands.items():
        result = call(name, "--help")
        assert result.exit_code == 0
        word = "orchestrate sweeps/" if name == "run" else f"orchestrate {name}"
        assert f"\n  {word}" in result.output, name
        options = [each for each in command.params if isinstance(each, click.Option)]
        assert [each.name for each in options if not each.help] == [], name


def test_the_plan_as_json_says_what_would_run(tmp_path: Path) -> None:
    plan = plan_of(small_sweep.write(tmp_path), tmp_path / "results")
    assert plan["total"]["trials"] == 6
    assert plan["total"]["trials_done"] == 0
    student = plan["trials"][1]
    assert student["parameters"] < plan["trials"][0]["parameters"]
    assert student["stages"][0]["step"] == "source"
    assert student["stages"][0]["trials"] == 6
    assert student["tokens"] > 0 and student["flops"] > 0
    assert not (tmp_path / "results").exists(), "a plan writes nothing"


def test_the_plan_of_a_shipped_sweep_takes_less_than_two_seconds() -> None:
    code = [sys.executable, "-m", "orchestrator.cli", "plan", "sweeps/depth_ablation.yaml"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(code, cwd=ROOT, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    # Of CPU, so that a busy machine does not fail the test.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def test_a_dry_run_starts_nothing(tmp_path: Path) -> None:
    sweep = small_sweep.write(tmp_path)
    result = call("run", sweep, "--dry-run", "--results", tmp_path / "results")
    assert result.exit_code == 0
    assert "6 trials" in result.output
    assert not (tmp_path / "results" / "small").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["sweeps/no_such.yaml"], "no_such.yaml"),
        (["plann", "x.yaml"], "did you mean 'plan'"),
        (["plan", "sweeps/depth_ablation.yaml", "--profile", "tyni"], "tiny"),
        (["validate", "sweeps/depth_ablation.yaml", "--set", "distil.training.steps=3"], "distill"),
        (["sweeps/depth_ablation.yaml", "--no-such-option"], "no-such-option"),
        (["sweeps/depth_ablation.yaml", "--max-concurrent", "0"], "max-concurrent"),
    ],
)
def test_bad_input_is_one_message_and_exit_2(arguments: list[str], expected: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_results_that_cannot_be_written_are_refused_before_anything_starts(tmp_path: Path) -> None:
    sweep = small_sweep.write(tmp_path)
    taken = tmp_path / "results"
    taken.write_text("a file stands here")
    result = call("run", sweep, "--results", taken)
    assert result.exit_code == 2
    assert "cannot be written" in result.output
    if os.geteuid():  # root writes everywhere
        locked = tmp_path / "locked"
        locked.mkdir()
        locked.chmod(stat.S_IREAD | stat.S_IEXEC)
        assert call("run", sweep, "--results", locked / "results").exit_code == 2


@pytest.mark.parametrize("command", ["report", "best", "publish"])
def test_what_needs_results_says_so_where_there_are_none(tmp_path: Path, command: str) -> None:
    sweep = small_sweep.write(tmp_path)
    result = call(command, sweep, "--results", tmp_path / "results")
    assert result.exit_code == 2
    assert "run" in result.output


def as_if_run(sweep: Path, results: Path, *overrides: str) -> Path:
    """What a run of the small sweep leaves: the folder of its results."""
    folder = results / "small" / "micro"
    ledger = Ledger(folder / "ledger.jsonl")
    ids = [each.trial.trial_id for each in plan_with(load(sweep, None, overrides), {}).trials]
    for position, id_ in enumerate(ids):
        trial = made_up.trial("perplexity", 0, position, {"accuracy.mean": 0.5})
        ledger.trial(replace(trial, trial_id=id_, sweep="small", profile="micro"))
    write_parquet(ledger.records("small", "micro", ids), folder)
    (folder / "sweep.yaml").write_text(load(sweep, None, overrides).dump_yaml(relative_to=folder))
    for name in ("best/model.safetensors", "logs/worker.log", "figures/old.png", "my.parquet"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_what_people_read_is_published_and_no_checkpoint_ledger_or_log(tmp_path: Path) -> None:
    sweep, results = small_sweep.write(tmp_path), tmp_path / "results"
    as_if_run(sweep, results)
    assert call("publish", sweep, "--results", results).exit_code == 0
    published = results / "published" / "small" / "micro"
    records = {f"{name}.parquet" for name in ("trials", "stages", "curves", "items", "importance")}
    made = {"sweep.yaml", "report.html", "best.json", "tables", "figures"}
    assert {path.name for path in published.iterdir()} == records | made
    files = [path for path in published.rglob("*") if path.is_file()]
    kinds = {"tables": {".md", ".csv", ".tex"}, "figures": {".png", ".svg"}}
    for folder, allowed in kinds.items():
        assert {file.suffix for file in files if file.parent.name == folder} <= allowed
    assert "old.png" not in {file.name for file in files}


@pytest.mark.parametrize("command", ["report", "publish"])
def test_the_command_on_a_page_that_was_written_again_asks_for_the_trials_that_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Also where the sweep file lies elsewhere and ran with other settings than its own."""
    sweep, results = small_sweep.write(tmp_path / "of mine"), tmp_path / "results"
    folder = as_if_run(sweep, results, "distill.training.steps=7")
    assert call(command, sweep, "--results", results).exit_code == 0
    folder = results / "published" / "small" / "micro" if command == "publish" else folder
    found = re.search(
        r"<code>orchestrate (.+sweep\.yaml)</code>", (folder / "report.html").read_text()
    )
    assert found is not None
    monkeypatch.chdir(tmp_path)
    plan = plan_of(Path(*shlex.split(found[1])), Path("results"))
    asked = {trial["trial_id"] for trial in plan["trials"]}
    assert asked == {trial.trial_id for trial in read_trials(folder)}


def test_the_command_on_a_page_can_be_pasted_whatever_its_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = ["my sweep.yaml", "--set", "distill.loss={kind: forward_kl, temperature: 2}"]
    monkeypatch.setattr(sys, "argv", ["/bin/orchestrate", *given])
    assert shlex.split(_command()) == ["orchestrate", *given]


def test_what_is_published_is_never_taken_for_a_run(tmp_path: Path) -> None:
    sweep, results = small_sweep.write(tmp_path), tmp_path / "results"
    ran = as_if_run(sweep, results)
    assert call("publish", sweep, "--results", results).exit_code == 0
    assert plan_of(sweep, results)["total"]["trials_done"] == 6
    shutil.rmtree(ran.parent)  # as in a fresh clone
    assert plan_of(sweep, results)["total"]["trials_done"] == 0


def test_what_was_published_stays_where_it_cannot_be_published_again(tmp_path: Path) -> None:
    results, sweep = tmp_path / "results", ROOT / "sweeps" / "temperature.yaml"
    own, published = (
        results / "temperature" / "tiny",
        results / "published" / "temperature" / "tiny",
    )
    shutil.copytree(ROOT / "results" / "published" / "temperature" / "tiny", own)
    shutil.copytree(own, published)
    (own / "sweep.yaml").write_text("name: temperature\nquestion: why\n")
    result = call("publish", sweep, "--profile", "tiny", "--results", results)
    assert result.exit_code == 2
    assert "sweep.yaml:1: profile: is required" in result.output.replace("\n", "")
    assert (published / "report.html").is_file()


def test_what_has_not_ended_is_not_published_and_what_was_published_stays(tmp_path: Path) -> None:
    sweep, results = small_sweep.write(tmp_path), tmp_path / "results"
    ran = as_if_run(sweep, results)
    assert call("publish", sweep, "--results", results).exit_code == 0
    records = read_parquet(ran)
    write_parquet(replace(records, trials=records.trials[:2]), ran)
    result = call("publish", sweep, "--results", results)
    assert result.exit_code == 2
    assert "4 of 6 trials have not ended" in result.output
    assert len(read_trials(results / "published" / "small" / "micro")) == 6


def test_trials_that_failed_or_were_stopped_have_ended_and_are_published(tmp_path: Path) -> None:
    sweep, results = small_sweep.write(tmp_path), tmp_path / "results"
    ran = as_if_run(sweep, results)
    records = read_parquet(ran)
    *others, stopped, failed = records.trials
    stopped = replace(stopped, status="stopped", reason="behind")
    failed = replace(failed, status="failed", reason="NaN", metrics={})
    write_parquet(replace(records, trials=(*others, stopped, failed)), ran)
    assert call("publish", sweep, "--results", results).exit_code == 0


def test_what_was_published_is_whole_after_a_disk_was_too_full_for_the_next(tmp_path: Path) -> None:
    sweep, results = small_sweep.write(tmp_path), tmp_path / "results"
    as_if_run(sweep, results)
    assert call("publish", sweep, "--results", results).exit_code == 0
    published = results / "published" / "small"
    before = {path: path.read_bytes() for path in published.rglob("*") if path.is_file()}
    command = [sys.executable, "-m", "orchestrator.cli", "publish", str(sweep)]
    full = subprocess.run(
        ["bash", "-c", 'ulimit -f 2; exec "$@"', "-", *command, "--results", str(results)],
        capture_output=True,
        text=True,
    )
    assert full.returncode and "File too large" in full.stderr
    assert before == {path: path.read_bytes() for path in published.rglob("*") if path.is_file()}


CLUSTERS = ("llama31_8b", "nemotron_15b")  # held by test_deploy
PROFILES = sorted((ROOT / "sweeps" / "profiles").glob("*.yaml"))


@pytest.mark.parametrize(
    "profile", [path for path in PROFILES if path.stem not in CLUSTERS], ids=lambda path: path.stem
)
def test_every_shipped_sweep_is_valid_at_every_profile_of_one_machine(
    profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_ins = stand_in_files(profile, tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for sweep in sorted((ROOT / "sweeps").glob("*.yaml")):
        result = call("validate", sweep, "--profile", profile.stem, *stand_ins)
        assert result.exit_code == 0, result.output


def stand_in_files(profile: Path, folder: Path) -> tuple[str, ...]:
    """Empty files for a profile that takes text, questions and a model from this machine, and the
    setting that leads to them. Nothing that a package holds is read before a sweep starts."""
    if "data_folder" not in (text := profile.read_text()):
        return ()
    source = yaml.safe_load(text)["trial"]["source"]
    (folder / source["package"]).mkdir()
    names = [*re.findall(r"\w+\.(?:txt|jsonl)", text), f"{source['package']}/{source['file']}"]
    for name in (f"{source['package']}/__init__.py", *names):
        (folder / name).touch()
    return ("--set", f"data_folder={folder}")
