"""What is committed under results/published: whole, small, and saying what the pages say."""

from __future__ import annotations

import importlib.util
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter

from orchestrator import selection, tables
from orchestrator.asked import Claim
from orchestrator.growth import plan_with
from orchestrator.records import Records, TrialRecord, read_parquet
from orchestrator.spec import Sweep, load

ROOT = Path(__file__).parent.parent
PUBLISHED = ROOT / "results" / "published"
FINDINGS = ROOT / "docs" / "findings.md"
FOLDERS = sorted(path.parent for path in PUBLISHED.glob("*/*/trials.parquet"))


CLAIM: TypeAdapter[Claim] = TypeAdapter(Claim)


def named(folder: Path) -> str:
    return f"{folder.parent.name}/{folder.name}"


@pytest.fixture(scope="module")
def tiny() -> Records:
    return read_parquet(PUBLISHED / "depth_ablation" / "tiny")


@pytest.mark.parametrize("folder", FOLDERS, ids=named)
def test_published_results_are_whole_and_small(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert names >= {"sweep.yaml", "trials.parquet", "items.parquet", "report.html", "best.json"}
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix in {".safetensors", ".bin", ".pt", ".db"}]
    assert sum(path.stat().st_size for path in files) < 5e6


@pytest.mark.parametrize("folder", FOLDERS, ids=named)
def test_published_results_name_no_path_of_the_machine_they_were_made_on(folder: Path) -> None:
    for trial in read_parquet(folder).trials:
        assert '"/' not in str(trial.config).replace("'", '"')
    for file in ("sweep.yaml", "report.html", "best.json"):
        text = (folder / file).read_text()
        assert not re.search(r": /\w", text), "an absolute path"
        assert str(PUBLISHED.parents[1]) not in text


@pytest.mark.parametrize("folder", FOLDERS, ids=named)
def test_published_tables_come_out_of_the_parquet_files_byte_for_byte(
    folder: Path, tmp_path: Path
) -> None:
    records = read_parquet(folder)
    # Read as plain YAML: to load the sweep, its model and text would have to be here.
    ran = yaml.safe_load((folder / "sweep.yaml").read_text())
    rungs = ran.get("scheduler", {}).get("rungs")
    among = ran["select"].get("among") or ({"rung": rungs[-1]["name"]} if rungs else None)
    ranking = selection.rank(records, ran["select"]["metric"], ran["select"]["mode"], among)
    claims = [CLAIM.validate_python(claim) for claim in ran.get("claims", ())]
    tables.write(tables.all_tables(records, ranking, claims), tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (folder / "tables" / file.name).read_bytes()


def test_a_published_sweep_file_asks_for_the_trials_beside_it() -> None:
    folder = PUBLISHED / "temperature" / "tiny"
    assert _asked_for(load(folder / "sweep.yaml")) == _trial_ids(folder)


@pytest.mark.parametrize("folder", FOLDERS, ids=named)
def test_what_is_published_is_what_the_committed_sweep_and_profile_ask_for(folder: Path) -> None:
    if not _at_hand(folder.name):
        pytest.skip("needs `make smollm2`, and the folder of texts that the profile names")
    sweep = load(ROOT / "sweeps" / f"{folder.parent.name}.yaml", profile=folder.name)
    if sweep.scheduler.method == "race":
        assert _asked_for(sweep) < _trial_ids(folder), "who gets further hangs on the first results"
    else:
        assert _asked_for(sweep) == _trial_ids(folder)


def _at_hand(profile: str) -> bool:
    """Whether the profile's model and texts are here, without which nothing can be planned."""
    path = ROOT / "sweeps" / "profiles" / f"{profile}.yaml"
    trial = yaml.safe_load(path.read_text())["trial"]
    package = trial.get("source", {}).get("package")
    return (path.parent / trial.get("data_folder", ".")).is_dir() and (
        package is None or importlib.util.find_spec(package) is not None
    )


def _asked_for(sweep: Sweep) -> set[str]:
    return {each.trial.trial_id for each in plan_with(sweep, {}).trials}


def _trial_ids(folder: Path) -> set[str]:
    return {trial.trial_id for trial in read_parquet(folder).asked.trials}


def test_the_tiny_teacher_knows_its_language(tiny: Records) -> None:
    teacher = next(trial for trial in tiny.trials if trial.baseline == "teacher")
    assert (teacher.metrics["accuracy.mean"] or 0) >= 0.9


def test_the_best_and_the_worst_way_to_prune_differ_by_more_than_their_intervals(
    tiny: Records,
) -> None:
    ranking = selection.rank(tiny)
    assert ranking is not None
    best, worst = ranking.configurations[0].estimate, ranking.configurations[-1].estimate
    assert best.low is not None and worst.high is not None
    assert best.low > worst.high


COLUMNS = {
    "LM loss before": ("lm_loss.before", 2),
    "LM loss after": ("lm_loss.after", 2),
    "KL to the teacher": ("kd_loss.after", 2),
    "accuracy, select half": ("accuracy.mean", 3),
    "requests a second": ("throughput.mean", 2),
    "time to first token": ("first_token_ratio.mean", 2),
}
"""A heading of a table in the README or among the findings -> metric and decimals."""


@pytest.mark.parametrize(
    ("sweep", "first"),
    [
        ("depth_ablation", "| layers chosen by |"),
        ("width_vs_depth", "| what is cut | parameters | LM loss before |"),
        ("losses", "| loss | LM loss after |"),
        ("throughput", "| what is cut | parameters | requests a second |"),
    ],
)
def test_every_row_of_a_pages_table_is_a_configuration_that_was_published(
    sweep: str, first: str
) -> None:
    records = read_parquet(PUBLISHED / sweep / "smollm2_local")
    published = [_rounded(trials) for trials in selection.groups(records.asked.trials)]
    pages = "\n".join(page.read_text() for page in (ROOT / "README.md", FINDINGS))
    table = pages[pages.index(first) :].split("\n\n")[0]
    heading, _, *rows = [_cells(line) for line in table.splitlines()]
    for row in rows:
        told = {
            COLUMNS[name][0]: float(number[0])
            for name, cell in zip(heading, row, strict=True)
            if name in COLUMNS and (number := re.findall(r"[\d.]+", cell))
        }
        assert told, row
        assert any(told.items() <= each.items() for each in published), row


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def _rounded(trials: Sequence[TrialRecord]) -> dict[str, float]:
    """By metric the mean over seeds, as the README gives it."""
    found = {}
    for metric, digits in COLUMNS.values():
        values = [v for t in trials if (v := selection.value_of(t, metric)) is not None]
        if values:
            found[metric] = round(statistics.fmean(values), digits)
    return found
