"""The page as a reader's browser shows it: quiet, sortable, filterable, narrow, dark, printed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import made_up
import pytest

from orchestrator import report
from orchestrator.asked import Better, NoBetter, RankingChanges, Rankings
from orchestrator.records import Records

if TYPE_CHECKING:
    from browser import Browser

pytest_plugins = ["browser"]

HOSTILE = "<script>injected = 1</script><img src=gone onerror='injected = 1'>\"'&amp;"
QUESTION = f"Which layers can go? {HOSTILE}"
TEMPERATURES = (10, 2, 0.5, 1, 30, 4)
"""An axis whose values sort otherwise as texts."""


def records() -> Records:
    """The made-up sweep with an axis of numbers, and hostile text wherever a sweep can bring it."""
    made = made_up.records(questions=20)
    grid = [trial for trial in made.trials if trial.baseline is None and trial.metrics]
    heat = dict(zip((trial.trial_id for trial in grid), TEMPERATURES, strict=True))
    trials = [
        replace(trial, axes={**trial.axes, "loss.temperature": heat[trial.trial_id]})
        if trial.trial_id in heat
        else replace(trial, reason=f"{trial.reason} {HOSTILE}")
        if trial.status == "failed"
        else trial
        for trial in made.trials
    ]
    return replace(made, trials=tuple(trials))


GRID = {"prune.depth.contiguous": True}
CLAIMS = (
    Better(
        text=f"Perplexity beats chance {HOSTILE}",
        better={"prune.depth.criterion": "perplexity"},
        than={"baseline": "random_layers"},
        metric="accuracy.mean",
        practice=2,
        published=f"0.595 against 0.500 {HOSTILE}",
    ),
    NoBetter(
        text="Chance is no better than perplexity",
        no_better={"baseline": "random_layers"},
        than={"prune.depth.criterion": "perplexity"},
        within=0.1,
        metric="accuracy.mean",
    ),
    NoBetter(
        text="Perplexity is no better than chance",
        no_better={"prune.depth.criterion": "perplexity"},
        than={"baseline": "random_layers"},
        within=0.1,
        metric="accuracy.mean",
    ),
    NoBetter(
        text="Perplexity is better than chance by less than half",
        no_better={"prune.depth.criterion": "perplexity"},
        than={"baseline": "random_layers"},
        within=0.4,
        metric="accuracy.mean",
    ),
    RankingChanges(
        text="A kept ranking does not change",
        ranking=Rankings(first="lm_loss.before", then="lm_loss.after", agreement_below=0.9),
    ),
    Better(text="Nobody asked", better={"none": 1}, than=GRID, metric="accuracy.mean"),
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    (folder / "sweep.yaml").write_text(f"question: {HOSTILE}\n", encoding="utf-8")
    command = f"orchestrate sweeps/depth_ablation.yaml --set 'a={HOSTILE}'"
    report.write(records(), folder, QUESTION, "accuracy.mean", "max", command, CLAIMS)
    return folder / "report.html"


@pytest.fixture
def opened(browser: Browser, page: Path) -> Iterator[Browser]:
    browser.open(page)
    yield browser
    assert browser.console() == []


COLUMN = """
const table = document.getElementById("table-trials");
const heads = [...table.tHead.rows[0].cells];
const column = heads.findIndex((each) => each.textContent.trim() === arguments[0]);
"""


def cells(browser: Browser, column: str) -> list[str]:
    """The shown cells of a column of the trials, from the top."""
    return browser.run(  # type: ignore[no-any-return]
        COLUMN + "return [...table.tBodies[0].rows].filter((row) => row.getClientRects().length)"
        ".map((row) => row.cells[column].textContent)",
        column,
    )


def header(browser: Browser, column: str) -> Any:
    return browser.run(COLUMN + "return heads[column].querySelector('button')", column)


def order(browser: Browser, column: str) -> str | None:
    return browser.run(COLUMN + "return heads[column].ariaSort", column)  # type: ignore[no-any-return]


def numbers(shown: list[str]) -> list[float]:
    return [math.nan if each == "\N{EN DASH}" else float(each) for each in shown]


# --- quiet and safe --------------------------------------------------------------------------


def test_the_page_asks_nobody_for_anything_and_the_console_stays_empty(
    browser: Browser, page: Path
) -> None:
    browser.open(page)
    own, *others = browser.requests()
    assert own == page.as_uri()
    assert others and all(address.startswith("data:") for address in others)
    assert browser.console() == []
    assert browser.run("return [...document.images].every((each) => each.naturalWidth > 100)")


def test_text_of_a_sweep_is_shown_and_never_run(opened: Browser) -> None:
    assert opened.run("return document.querySelector('h1').textContent") == QUESTION
    for where in ("#trials", "#failures", "#claims", "#reproduce"):
        told = opened.run(
            "return document.querySelector(arguments[0]).closest('section').textContent", where
        )
        assert HOSTILE in told, where
    assert opened.run("return typeof injected") == "undefined"


def test_a_script_that_came_in_all_the_same_would_not_run(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.run(
        "const script = document.createElement('script');"
        "script.textContent = 'injected = 1'; document.body.append(script);"
    )
    assert browser.run("return typeof injected") == "undefined"
    assert any("Content Security Policy" in message for message in browser.console())


def test_every_jump_of_the_page_arrives_and_no_name_is_used_twice(opened: Browser) -> None:
    ids = opened.run("return [...document.querySelectorAll('[id]')].map((each) => each.id)")
    assert len(ids) == len(set(ids))
    jumps = opened.run(
        "return [...document.querySelectorAll('a')].map((each) => each.getAttribute('href'))"
    )
    named = opened.run(
        "return [...document.querySelectorAll('*')].flatMap((each) =>"
        "['aria-labelledby', 'aria-describedby'].map((name) => each.getAttribute(name)))"
        ".filter((name) => name)"
    )
    assert {*(jump.removeprefix("#") for jump in jumps), *named} <= set(ids)


# --- sorting ---------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["temperature", "lm_loss.after", "minutes"])
def test_a_column_of_numbers_sorts_by_value_both_ways_with_missing_ones_last(
    opened: Browser, column: str
) -> None:
    written = cells(opened, column)
    for direction, name in ((1, "ascending"), (-1, "descending")):
        header(opened, column).click()
        found = numbers(cells(opened, column))
        known = [value for value in found if not math.isnan(value)]
        assert known == sorted(known, key=lambda value: direction * value)
        assert found[: len(known)] == known
        assert order(opened, column) == name
    header(opened, column).click()
    assert cells(opened, column) == written
    assert order(opened, column) is None


def test_numbers_sort_by_what_was_measured_and_not_by_what_is_shown(opened: Browser) -> None:
    header(opened, "lm_loss.after").click()
    measured = opened.run(
        COLUMN + "return [...table.tBodies[0].rows].map((row) => row.cells[column].dataset.value)",
        "lm_loss.after",
    )
    known = {trial.metrics["lm_loss.after"] for trial in records().trials if trial.metrics}
    assert sorted({float(each) for each in measured if each}) == pytest.approx(sorted(known))


def test_a_column_of_texts_sorts_by_name_and_one_column_at_a_time(opened: Browser) -> None:
    header(opened, "temperature").click()
    header(opened, "criterion").click()
    shown = [each for each in cells(opened, "criterion") if each != "\N{EN DASH}"]
    assert shown == sorted(shown)
    assert cells(opened, "criterion")[-1] == "\N{EN DASH}"
    assert order(opened, "temperature") is None


@pytest.mark.parametrize("key", ["\ue007", " "], ids=["enter", "space"])
def test_the_keyboard_sorts_as_well(opened: Browser, key: str) -> None:
    header(opened, "temperature").send_keys(key)
    assert order(opened, "temperature") == "ascending"
    assert opened.run("return document.activeElement.textContent") == "temperature"


def test_every_column_of_every_table_can_be_sorted(opened: Browser) -> None:
    opened.run("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    assert opened.run(
        "return [...document.querySelectorAll('thead th')].every((each) => {"
        "each.querySelector('button').click(); return each.ariaSort === 'ascending'; })"
    )


# --- filtering -------------------------------------------------------------------------------


def choose(browser: Browser, name: str, value: str) -> None:
    browser.run(
        "const label = [...document.querySelectorAll('.filter label')]"
        ".find((each) => each.childNodes[0].textContent.trim() === arguments[0]);"
        "const field = label.querySelector('select');"
        "field.value = arguments[1];"
        "field.dispatchEvent(new Event('input', { bubbles: true }));",
        name,
        value,
    )


def found(browser: Browser) -> str:
    return browser.run("return document.querySelector('.filter output').value")  # type: ignore[no-any-return]


def test_words_and_choices_narrow_the_trials_and_are_cleared_again(opened: Browser) -> None:
    from selenium.webdriver.common.by import By

    everything = cells(opened, "trial")
    search = opened.driver.find_element(By.CSS_SELECTOR, ".filter input")
    search.send_keys("PERPLEX completed")
    assert cells(opened, "trial") == ["perplexity-0", "perplexity-1"]
    assert found(opened) == f"2 of {len(everything)} trials"
    choose(opened, "temperature", "2")
    assert cells(opened, "trial") == ["perplexity-1"]
    choose(opened, "status", "failed")
    assert cells(opened, "trial") == []
    opened.driver.find_element(By.CSS_SELECTOR, ".filter button").click()
    assert cells(opened, "trial") == everything
    assert found(opened) == f"{len(everything)} trials"
    assert opened.run("return document.querySelector('.filter input').value") == ""


def test_a_choice_means_the_whole_cell_and_missing_can_be_chosen(opened: Browser) -> None:
    choose(opened, "temperature", "1")
    assert cells(opened, "temperature") == ["1"]
    choose(opened, "temperature", "\N{EN DASH}")
    assert set(cells(opened, "temperature")) == {"\N{EN DASH}"}
    assert {"teacher-0", "task-2"} <= set(cells(opened, "trial"))


def test_values_to_choose_stand_in_their_own_order(opened: Browser) -> None:
    offered = opened.run(
        "return [...document.querySelectorAll('.filter label')].map((each) =>"
        "[each.childNodes[0].textContent.trim(),"
        " [...each.querySelectorAll('option')].map((option) => option.value)])"
    )
    values = dict(offered)
    assert values["temperature"] == ["", "0.5", "1", "2", "4", "10", "30", "\N{EN DASH}"]
    assert values["status"] == ["", "completed", "failed"]
    assert "contiguous" in values and "lm_loss.after" not in values


def test_sorting_keeps_the_filter(opened: Browser) -> None:
    choose(opened, "status", "failed")
    header(opened, "temperature").click()
    assert cells(opened, "trial") == ["task-2"]


# --- claims ----------------------------------------------------------------------------------


def test_an_interval_lies_in_the_shaded_part_exactly_where_the_claim_is_supported(
    opened: Browser,
) -> None:
    drawn = opened.run(
        "return [...document.querySelectorAll('.claims li')].map((each) => {"
        "const at = (what, name) => Number(each.querySelector(what)?.getAttribute(name));"
        "const verdict = each.querySelector('.verdict').childNodes[1].data.trim();"
        "if (!each.querySelector('svg')) return [verdict, null];"
        "const start = at('.meant', 'x');"
        "return [verdict, [start, start + at('.meant', 'width'),"
        "at('.reach', 'x1'), at('.reach', 'x2'), at('circle', 'cx')]]; })"
    )
    verdicts = {verdict for verdict, places in drawn if places}
    assert verdicts == {"supported", "contradicted", "undecided"}
    assert drawn[-1] == ["no data", None]
    for verdict, places in drawn:
        if places:
            start, end, low, high, value = places
            assert 0 <= low <= value <= high <= 200
            assert (start <= low and high <= end) == (verdict == "supported")
            assert (end <= low or high <= start) == (verdict == "contradicted")


def test_the_verdicts_stand_with_effect_interval_and_published_figure(opened: Browser) -> None:
    first = opened.run("return document.querySelector('.claims li').innerText")
    assert "best practice 2" in first
    assert "0.595 against 0.500" in first
    assert re.search(r"0\.\d{3} \[0\.\d{3}, 0\.\d{3}\] accuracy\.mean", first)
    assert "2 pairs, 2 seeds" in first


# --- all kinds of screens and paper ----------------------------------------------------------


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_page_never_scrolls_sideways_and_wide_tables_do_in_their_box(
    browser: Browser, page: Path, width: int
) -> None:
    browser.open(page, width=width)
    browser.run("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    assert browser.run("return document.documentElement.scrollWidth") == width
    outside = browser.run(
        "return [...document.querySelectorAll('body *')].filter((each) =>"
        "!each.closest('.box, pre') && each.getBoundingClientRect().right > innerWidth + 0.5)"
        ".map((each) => each.outerHTML.slice(0, 80))"
    )
    assert outside == []
    inside = "const box = document.querySelector('#table-trials').parentElement;"
    assert browser.run(inside + "box.scrollLeft = 1e4; return box.scrollLeft") > 0


CONTRAST = """
const parse = (text) => text.match(/[\\d.]+/g).map(Number);
const luminance = (rgb) => {
  const [r, g, b] = rgb.slice(0, 3).map((each) => {
    const share = each / 255;
    return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = (node) => {
  for (; node; node = node.parentElement) {
    const colour = parse(getComputedStyle(node).backgroundColor);
    if (colour.length === 3 || colour[3] === 1) return colour;
  }
  return null;
};
const seen = {};
for (const node of document.querySelectorAll("body *")) {
  const text = [...node.childNodes].some((each) => each.nodeType === 3 && each.data.trim());
  if (!text || node.matches("script, option") || !node.getClientRects().length) continue;
  const [ink, paper] = [parse(getComputedStyle(node).color), ground(node)];
  const [low, high] = [luminance(ink), luminance(paper)].sort((a, b) => a - b);
  const name = `${node.tagName.toLowerCase()}.${node.className}`;
  seen[name] = Math.min(seen[name] ?? 99, (high + 0.05) / (low + 0.05));
}
return [seen, parse(getComputedStyle(document.body).color), ground(document.body)];
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_all_text_stands_out_from_its_ground(browser: Browser, page: Path, dark: bool) -> None:
    browser.open(page, dark=dark)
    browser.run("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    seen, ink, paper = browser.run(CONTRAST)
    assert (sum(paper) < sum(ink)) == dark
    assert len(seen) > 20
    assert {name: ratio for name, ratio in seen.items() if ratio < 4.5} == {}
    assert min(ratio for name, ratio in seen.items() if name.startswith(("h1", "td."))) >= 4.5
    assert seen["h1."] >= 12


def test_paper_is_white_and_has_no_controls(browser: Browser, page: Path) -> None:
    browser.open(page, dark=True)
    browser.prefer(dark=True, media="print")
    _, ink, paper = browser.run(CONTRAST)
    assert sum(paper) > sum(ink)
    assert browser.run(
        "return [...document.querySelectorAll('nav, form')].every((each) =>"
        "getComputedStyle(each).display === 'none')"
    )


# Letter paper less its margins, in CSS pixels; the trials stand across it.
@pytest.mark.parametrize(("width", "sheets"), [(702, ":not(.sheet)"), (942, ".sheet")])
def test_no_table_is_cut_off_on_paper(
    browser: Browser, page: Path, width: int, sheets: str
) -> None:
    browser.open(page, width=width)
    browser.run("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    browser.prefer(media="print")
    widths = browser.run(
        f"return [...document.querySelectorAll('section{sheets} table')].map((each) =>"
        "[each.id, each.getBoundingClientRect().right])"
    )
    assert widths and {name for name, right in widths if right > width} == set()
