"""The page says of every practice what the records say, and that there are none where none are."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import made_up
import pytest
import yaml
from click.testing import CliRunner, Result

from orchestrator.asked import Better
from orchestrator.claims import Outcome, Verdict
from orchestrator.cli import app
from orchestrator.practices import Gathered, Line, gather, overall, page
from orchestrator.published import PRACTICES
from orchestrator.records import Records, write_parquet

RESULTS = Path(__file__).parent.parent / "results"
SWEEPS = RESULTS.parent / "sweeps"

BEATS: dict[str, Any] = {
    "practice": 2,
    "text": "Perplexity beats chance",
    "better": {"prune.depth.criterion": "perplexity"},
    "than": {"baseline": "random_layers"},
    "metric": "lm_loss.after",
}


def line(outcome: Outcome | None, practice: int | None = 3) -> Line:
    claim = Better(
        text="c", practice=practice, better={"a": 1}, than={"a": 2}, metric="lm_loss.after"
    )
    if outcome is None:
        return Line("s", claim)
    verdict = Verdict("c", practice, "lm_loss.after", None, outcome, 1, 1, None, None)
    return Line("s", claim, "tiny", Path("results/s/tiny"), verdict)


def record(folder: Path, records: Records, claims: Sequence[dict[str, Any]] | None) -> None:
    write_parquet(records, folder)
    said = {"name": records.sweep, "unknown_to_this_version": 1, "claims": claims}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(said))


def sweep_file(folder: Path, name: str, *claims: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"name": name, "question": "?", "claims": list(claims)}))
    return path


@pytest.fixture
def sweeps(tmp_path: Path) -> Path:
    folder = tmp_path / "sweeps"
    sweep_file(folder, "depth_ablation", BEATS)
    return folder


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        (["supported", "undecided", "no data", None], "supported"),
        (["contradicted", "undecided"], "contradicted"),
        (["supported", "contradicted", "supported"], "mixed"),
        (["undecided", "no data", None], "undecided"),
        (["no data", None], "no data"),
        ([None], "no run"),
        ([], "no run"),
    ],
)
def test_a_practice_is_as_its_decided_claims_say(
    outcomes: list[Outcome | None], expected: str
) -> None:
    assert overall([line(each) for each in outcomes]) == expected
    assert overall([line(each) for each in reversed(outcomes)]) == expected


def test_a_practice_without_a_run_says_so_and_has_no_verdict() -> None:
    text = page(Gathered((), ()), Path("results"))
    for practice in PRACTICES:
        assert f"## {practice.number}. {practice.text}" in text
        for each in practice.evidence:
            assert f"{each.figures} ({each.source})" in text
    assert text.count("**Verdict: no run.** No sweep asks.") == len(PRACTICES) == 12
    assert "**supported**" not in text and "Ours:" not in text
    asked = page(Gathered((line(None),), ()), Path("results"))
    assert "No sweep that asks has been run." in asked
    assert "| c | s | no run |" in asked


def test_a_claim_of_no_practice_stands_at_the_end() -> None:
    text = page(Gathered((line("supported", None), line("undecided", 99)), ()), Path("results"))
    assert text.index("## Other claims") > text.index("## 12.")
    assert text.count("[s at tiny](s/tiny)") == 2
    assert "## Other claims" not in page(Gathered((line("supported"),), ()), Path("results"))


def test_own_results_stand_before_published_ones_of_the_same_name_and_profile(
    tmp_path: Path, sweeps: Path
) -> None:
    results = tmp_path / "results"
    records = made_up.records(questions=5)
    record(results / "published" / "depth_ablation" / "made_up", records, [BEATS])
    record(results / "published" / "depth_ablation" / "other", records, [BEATS])
    published = gather(results, sweeps)
    assert [each.folder for each in published.lines] == [
        results / "published" / "depth_ablation" / profile for profile in ("made_up", "other")
    ]
    record(results / "depth_ablation" / "made_up", records, [BEATS])
    assert [each.folder for each in gather(results, sweeps).lines] == [
        results / "depth_ablation" / "made_up",
        results / "published" / "depth_ablation" / "other",
    ]


def test_a_folder_claims_what_its_own_sweep_file_says_in_the_words_of_the_newer_one(
    tmp_path: Path,
) -> None:
    results, sweeps = tmp_path / "results", tmp_path / "sweeps"
    older = {**BEATS, "text": "Perplexity is good", "practice": None}
    gone = {**BEATS, "text": "Gone", "metric": "accuracy.mean"}
    record(results / "depth_ablation" / "made_up", made_up.records(5), [gone, older])
    sweep_file(sweeps, "depth_ablation", {**BEATS, "metric": "kd_loss.after"}, BEATS)
    found = gather(results, sweeps).lines
    assert [(each.claim.text, each.claim.practice) for each in found] == [
        ("Gone", 2),
        ("Perplexity beats chance", 2),
    ]
    assert [each.verdict and each.verdict.metric for each in found] == [
        "accuracy.mean",
        "lm_loss.after",
    ]


def test_a_folder_that_makes_no_claim_is_asked_what_the_sweep_claims_now(
    tmp_path: Path, sweeps: Path
) -> None:
    results = tmp_path / "results"
    record(results / "depth_ablation" / "made_up", made_up.records(5), None)
    (found,) = gather(results, sweeps).lines
    assert found.verdict is not None and found.verdict.pairs == 2


def test_links_start_at_the_folder_of_the_page(tmp_path: Path, sweeps: Path) -> None:
    results = tmp_path / "results"
    folder = results / "depth_ablation" / "made_up"
    record(folder, made_up.records(5), [BEATS])
    (folder / "tables").mkdir()
    for name in ("p2_t1", "trials"):
        (folder / "tables" / f"{name}.md").touch()
    gathered = gather(results, sweeps)
    assert "(depth_ablation/made_up)" in page(gathered, results)
    assert "(../results/depth_ablation/made_up)" in page(gathered, tmp_path / "docs")
    assert (
        "[P2 table 1: depth_ablation at made_up](depth_ablation/made_up/tables/p2_t1.md)"
        in page(gathered, results)
    )
    assert "trials.md" not in page(gathered, results)


# --- the command, and what is committed ------------------------------------------------------


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["practices", *map(str, arguments)])


@pytest.fixture
def committed(tmp_path: Path) -> Path:
    """A results folder with what is published, and nothing of one's own."""
    results = tmp_path / "results"
    results.mkdir()
    (results / "published").symlink_to(RESULTS / "published")
    return results


def test_the_committed_page_is_what_the_command_writes_again(committed: Path) -> None:
    done = call("--results", committed, "--sweeps", SWEEPS)
    assert done.exit_code == 0, done.output
    assert (committed / "README.md").read_bytes() == (RESULTS / "README.md").read_bytes()
    for number in range(1, 13):
        assert f"{number}. " in done.output


def test_every_link_of_the_committed_page_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", (RESULTS / "README.md").read_text())
    assert links
    assert [link for link in links if not (RESULTS / link).exists()] == []


def test_the_page_as_json_holds_every_practice_with_its_evidence_and_claims(
    tmp_path: Path, sweeps: Path
) -> None:
    results = tmp_path / "results"
    claim = {**BEATS, "metric": "accuracy.mean"}
    record(results / "depth_ablation" / "made_up", made_up.records(20), [claim])
    done = call("--results", results, "--sweeps", sweeps, "--out", tmp_path / "x.md", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.output)
    assert [each["number"] for each in said["practices"]] == list(range(1, 13))
    (judged,) = said["practices"][1]["claims"]
    assert judged["verdict"] == said["practices"][1]["verdict"]
    assert judged["folder"] == "results/depth_ablation/made_up"
    assert judged["effect"]["low"] < judged["effect"]["value"] < judged["effect"]["high"]
    assert (tmp_path / "x.md").exists() and not (results / "README.md").exists()


def test_what_cannot_be_read_is_one_message_and_exit_2(tmp_path: Path, sweeps: Path) -> None:
    results = tmp_path / "results"
    assert call("--results", tmp_path / "none", "--sweeps", sweeps).exit_code == 2
    folder = results / "depth_ablation" / "made_up"
    record(folder, made_up.records(5), [BEATS])
    wrong = sweep_file(sweeps, "wrong", {**BEATS, "then": {}})
    done = call("--results", results, "--sweeps", sweeps)
    assert done.exit_code == 2 and f"{wrong}:" in done.output and "than" in done.output
    wrong.unlink()
    (folder / "trials.parquet").write_bytes(b"PAR1 no more")
    done = call("--results", results, "--sweeps", sweeps)
    assert done.exit_code == 2 and str(folder / "trials.parquet") in done.output
    assert not (results / "README.md").exists()
