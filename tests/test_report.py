"""The page stands alone, names the winner beside the teacher, and hides no failure."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import made_up
import pytest
from rich.console import Console

from orchestrator import report, selection
from orchestrator.asked import Better
from orchestrator.claims import judge
from orchestrator.progress import claims_table
from orchestrator.records import Records

RECORDS = made_up.records()
QUESTION = "Which layers <can> be dropped?"
COMMAND = "orchestrate sweeps/depth_ablation.yaml --profile made_up"


def write(folder: Path, records: Records = RECORDS) -> Path:
    report.write(records, folder, QUESTION, "accuracy.mean", "max", COMMAND)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("report"))


class Page(HTMLParser):
    """Collects the text, and every address that a browser would fetch."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.addresses = "", []  # type: ignore[var-annotated]
        self.feed(html)

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset")]


def test_the_same_records_give_the_same_files(folder: Path, tmp_path: Path) -> None:
    write(tmp_path)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert {path.suffix for path in files} == {
        ".md", ".csv", ".tex", ".png", ".svg", ".html", ".json"
    }  # fmt: skip
    for path in files:
        assert (tmp_path / path).read_bytes() == (folder / path).read_bytes(), path


def test_the_page_asks_the_question_and_names_winner_teacher_failures_and_command(
    folder: Path,
) -> None:
    page = Page((folder / "report.html").read_text())
    best = json.loads((folder / "best.json").read_text())
    assert QUESTION in page.text
    assert "criterion=perplexity wins" in page.text
    assert "Tied with it, and not cheaper: criterion=block_influence." in page.text
    for value in (best["report"]["value"], best["teacher"]["report"]["value"]):
        assert f"{value:.3f}" in page.text
    assert "distill: the loss is not finite at step 7 | <nan>" in page.text
    assert COMMAND in page.text


def test_few_ties_are_named_and_many_are_counted_but_all_stand_on_the_page(tmp_path: Path) -> None:
    perplexity = [t for t in RECORDS.trials if t.trial_id.startswith("perplexity")]
    copies = [
        replace(trial, trial_id=f"{copy}-{trial.seed}", axes={"copy": copy})
        for copy in range(6)
        for trial in perplexity
    ]
    items = [
        replace(item, trial_id=f"{copy}-{trial.seed}")
        for copy in range(6)
        for trial in perplexity
        for item in RECORDS.items
        if item.trial_id == trial.trial_id
    ]
    records = replace(RECORDS, trials=tuple(copies), items=tuple(items), curves=(), scores=())
    chosen = selection.winner(selection.rank(records))
    told = report.summary(chosen, "accuracy.mean")
    assert told.endswith("Tied with it, and not cheaper: copy=1; copy=2; copy=3; and 2 more.")
    text = Page((write(tmp_path, records) / "report.html").read_text()).text
    assert all(f"copy={copy}: 0." in text for copy in range(1, 6))


def test_the_page_needs_no_network(folder: Path) -> None:
    html = (folder / "report.html").read_text()
    page = Page(html)
    embedded = [each for each in page.addresses if each.startswith("data:image/svg+xml;base64,")]
    assert len(embedded) == len(list((folder / "figures").glob("*.svg")))
    others = set(page.addresses) - set(embedded)
    assert all(address.startswith("#") or address == "data:," for address in others)
    assert "@import" not in html and "url(" not in html


def test_best_json_holds_the_winner_and_what_stands_beside_it(folder: Path) -> None:
    best = json.loads((folder / "best.json").read_text())
    trial = next(t for t in RECORDS.trials if t.trial_id == best["trial_id"])
    assert (best["trial_id"], best["seed"]) == ("perplexity-1", 1)
    assert best["configuration"]["label"] == "criterion=perplexity"
    assert best["metrics"] == trial.metrics
    assert best["select"]["value"] == trial.metrics["accuracy.mean"]
    assert best["report"]["value"] == trial.metrics["accuracy_report.mean"]
    assert best["report"]["low"] < best["report"]["value"] < best["report"]["high"]
    assert best["teacher"]["report"]["value"] == RECORDS.trials[0].metrics["accuracy_report.mean"]
    assert best["tied_trial_ids"] == ["block_influence-0", "block_influence-1"]


def test_without_a_completed_trial_there_is_a_page_and_no_winner(tmp_path: Path) -> None:
    write(tmp_path)
    only_failed = replace(RECORDS, trials=RECORDS.trials[-1:], items=(), curves=(), scores=())
    write(tmp_path, only_failed)
    assert not (tmp_path / "best.json").exists()
    text = Page((tmp_path / "report.html").read_text()).text
    assert "so there is no winner" in text
    assert "distill: the loss is not finite" in text


CLAIM = Better(
    text="Perplexity is better than <chance>",
    better={"prune.depth.criterion": "perplexity"},
    than={"baseline": "random_layers"},
    metric="accuracy.mean",
)


def test_the_verdicts_of_claims_stand_near_the_top_and_do_not_outlive_their_claim(
    tmp_path: Path,
) -> None:
    for claims in ((CLAIM,), ()):
        report.write(RECORDS, tmp_path, QUESTION, "accuracy.mean", "max", COMMAND, claims)
        text = Page((tmp_path / "report.html").read_text()).text
        assert (CLAIM.text in text) == bool(claims)
        assert len(list((tmp_path / "tables").glob("claims.*"))) == 3 * len(claims)
        if claims:
            assert text.index(CLAIM.text) < text.index("Configurations by")


def test_the_terminal_shows_each_verdict_and_why_there_is_none() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(
        claims_table(judge(RECORDS, [CLAIM, CLAIM.model_copy(update={"than": {"a": 1}})]))
    )
    text = console.export_text()
    assert "Perplexity is better than <chance>" in text
    assert "no data: no trial of the second group completed with a value" in text


def test_the_page_quotes_the_resolved_sweep_file(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("name: <depth>\n")
    write(tmp_path, Records("s", "p"))
    assert "name: <depth>" in Page((tmp_path / "report.html").read_text()).text
