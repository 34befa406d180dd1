"""What the pages name is there: files, modules, functions, and every command parses."""

from __future__ import annotations

import ast
import csv
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import click
import pytest
from docs_at_hand import PAGES, ROOT, blocks
from pydantic import BaseModel

from orchestrator.cli import app
from orchestrator.settings import TrialConfig
from orchestrator.spec import ProfileFile, SweepFile
from orchestrator.stages import STAGES

IDS = [str(page.relative_to(ROOT)) for page in PAGES]
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=IDS)

FOLDERS = "orchestrator|trainers|tests|benchmarks|sweeps|docs|deploy"
_INLINE = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
_IN_FILE = re.compile(r"`([A-Za-z_][\w.]*)`\s+(?:in|of)\s+`([\w/]+\.py)`")


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)


def inline(page: Path) -> list[str]:
    """What stands between backticks in a page's prose, a line break as a space."""
    return [" ".join(found.split()) for found in _INLINE.findall(prose(page))]


@EVERY_PAGE
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    paths = [word for text in inline(page) for word in text.split()]
    named = [word for word in paths if re.fullmatch(rf"({FOLDERS})/[\w./*-]*", word)]
    assert [path for path in named if not any(ROOT.glob(path.rstrip("/")))] == []


@EVERY_PAGE
def test_every_link_leads_somewhere(page: Path) -> None:
    links = _LINK.findall(page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@cache
def names_in(file: Path) -> set[str]:
    """Functions, classes and variables of a module, and what is defined in its classes."""
    return set(_names(ast.parse(file.read_text()).body, ""))


def _names(body: list[ast.stmt], prefix: str) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from _names(node.body, f"{prefix}{node.name}.")
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
        yield from (prefix + each.id for each in targets if isinstance(each, ast.Name))


@EVERY_PAGE
def test_every_name_that_a_page_puts_into_a_file_is_in_it(page: Path) -> None:
    named = _IN_FILE.findall(" ".join(prose(page).split()))
    missing = [(n, f) for n, f in named if n.removesuffix("()") not in names_in(ROOT / f)]
    assert missing == []


@EVERY_PAGE
def test_every_module_that_a_page_names_has_what_it_says(page: Path) -> None:
    missing = []
    for dotted in re.findall(r"\b((?:orchestrator|trainers)\.\w+(?:\.\w+)*)", page.read_text()):
        package, module, *rest = dotted.split(".")
        if module == "py" or rest[:1] == ["py"]:
            continue
        file = ROOT / package / f"{module}.py"
        if not file.exists() or (rest and ".".join(rest) not in names_in(file)):
            missing.append(dotted)
    assert missing == []


# --- commands --------------------------------------------------------------------------------


def commands(page: Path) -> Iterator[str]:
    """Every command line with `orchestrate` that a page shows."""
    shells = [b.text for b in blocks(page) if b.language in ("", "sh", "bash", "console")]
    lines = [line for text in shells for line in text.replace("\\\n", " ").splitlines()]
    for line in [*lines, *inline(page)]:
        for part in re.split(r"&&|\||;|\$\(|\)", line):
            words = re.sub(r"^\s*(\w+=\S*\s+)*(\$ )?", "", part).split("#")[0].strip(" '")
            if re.match(r"(\S*/)?orchestrate(\s|$)", words):
                yield words


def parse(line: str) -> None:
    """Parse a command line as `orchestrate` does; raises `click.ClickException`. A command's name
    alone speaks of the command."""
    if re.fullmatch(r"orchestrate( [a-z]+)?", line) and line.split()[-1] in (
        "orchestrate",
        *app.commands,
    ):
        return
    words = [re.sub(r"^(\$?[A-Z]+|[A-Z]+\.yaml)$", "x.yaml", word) for word in shlex.split(line)]
    with app.make_context("orchestrate", words[1:]) as context:
        if context.protected_args or context.args:
            arguments = [*context.protected_args, *context.args]
            name, command, rest = app.resolve_command(context, arguments)
            assert command is not None
            command.make_context(name, rest, parent=context)


@EVERY_PAGE
def test_every_command_that_a_page_shows_parses(page: Path) -> None:
    for line in commands(page):
        if "…" in line:
            continue
        try:
            parse(line)
        except click.exceptions.Exit:  # --help
            continue
        except click.ClickException as error:
            pytest.fail(f"{line}: {error.format_message()}")


def test_the_pages_show_commands_and_a_wrong_one_would_be_found() -> None:
    assert sum(len(list(commands(page))) for page in PAGES) > 20
    for wrong in (
        "orchestrate plann x.yaml",
        "orchestrate plan --json",
        "orchestrate x.yaml --dryrun",
    ):
        with pytest.raises(click.ClickException):
            parse(wrong)


def test_the_verdicts_that_the_readme_shows_are_those_of_the_practices_page() -> None:
    page = (ROOT / "results" / "README.md").read_text()
    start = page.index("| # | practice |")
    table = page[start : page.index("\n\n", start)]
    assert table in (ROOT / "README.md").read_text()


def test_the_page_on_clusters_says_which_stages_run_on_all_workers() -> None:
    page = prose(ROOT / "docs" / "cluster.md")
    (told,) = (part for part in page.split("\n\n") if "run on all workers" in part)
    on_all, on_one = told.split("run on one.")[0].split("run on all workers")
    assert re.findall(r"`(\w+)`", on_all) == [kind for kind in STAGES if STAGES[kind].trains]
    assert set(re.findall(r"`(\w+)`", on_one)) == {k for k in STAGES if not STAGES[k].trains}


def test_what_the_decisions_say_of_removed_heads_is_what_is_published() -> None:
    page = " ".join((ROOT / "docs" / "decisions.md").read_text().split())
    published = ROOT / "results" / "published" / "importance_iterations" / "tiny"
    with (published / "tables" / "claims.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if "removed heads" in row["claim"]]
    assert len(rows) == 2
    for row in rows:  # a claim that it lowers the loss: what it adds has the other sign
        effect, high, low = (-float(row[name]) for name in ("effect", "low", "high"))
        assert f"{effect:.3f} [{low:.3f}, {high:.3f}] higher" in page


def _settings(kind: Any, seen: set[type[BaseModel]]) -> Iterator[str]:
    """The names of all settings that a type holds, at any depth."""
    if isinstance(kind, type) and issubclass(kind, BaseModel) and kind not in seen:
        seen.add(kind)
        for name, field in kind.model_fields.items():
            yield name
            yield from _settings(field.annotation, seen)
    for inner in get_args(kind):
        yield from _settings(inner, seen)


def test_the_page_on_sweep_files_names_every_setting() -> None:
    seen = set[type[BaseModel]]()
    names = {n for kind in (TrialConfig, SweepFile, ProfileFile) for n in _settings(kind, seen)}
    assert names >= {"prune", "scale_residual_init", "floor_tokens", "than_each", "utilisation"}
    words = set(re.findall(r"\w+", (ROOT / "docs" / "sweep_file.md").read_text()))
    assert sorted(names - words) == []
