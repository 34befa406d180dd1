"""The browser that page tests look through sees what a page does."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from browser import Browser

pytest_plugins = ["browser"]

ROOT = Path(__file__).parent.parent


def page(folder: Path, body: str) -> Path:
    path = folder / "page.html"
    path.write_text(f"<!doctype html><title>A page</title>{body}", encoding="utf-8")
    return path


def test_a_script_that_fails_and_a_file_that_is_missing_reach_the_console(
    browser: Browser, tmp_path: Path
) -> None:
    browser.open(page(tmp_path, "<img src='gone.png'><script>undefinedName()</script>"))
    failed = "\n".join(browser.console())
    assert "undefinedName is not defined" in failed
    assert "gone.png" in failed
    browser.open(page(tmp_path, "<p>Quiet.</p>"))
    assert browser.console() == []


def test_every_request_of_a_page_is_seen(browser: Browser, tmp_path: Path) -> None:
    written = page(tmp_path, "<script>fetch('http://127.0.0.1:9/x').catch(() => 0)</script>")
    browser.open(written)
    assert browser.requests() == [written.as_uri(), "http://127.0.0.1:9/x"]


def test_the_viewport_is_as_wide_as_asked_and_the_scheme_is_the_one_asked_for(
    browser: Browser, tmp_path: Path
) -> None:
    script = "return [innerWidth, matchMedia('(prefers-color-scheme: dark)').matches]"
    for width, dark in ((360, True), (1280, False)):
        browser.open(page(tmp_path, ""), width=width, dark=dark)
        assert browser.run(script) == [width, dark]


def test_a_machine_without_chromium_is_told_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import browser

    monkeypatch.setenv("PATH", "")
    assert browser.missing() == "there is no chromium here: make browser"


def make(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    program = shutil.which("make")
    assert program is not None
    environment = None if path is None else {"PATH": str(path)}
    command = [program, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_make_test_brings_the_browser_before_any_test_looks_for_it() -> None:
    said = make("-n", "test").stdout
    assert 0 < said.find("install -y --no-install-recommends chromium") < said.find("-m pytest")


@pytest.mark.parametrize("apt", ["exit 100", None], ids=["apt fails", "no apt"])
def test_a_machine_that_can_bring_no_browser_goes_on_and_is_told(
    apt: str | None, tmp_path: Path
) -> None:
    programs = {"id": "echo 0"} | ({} if apt is None else {"apt-get": apt})
    for name, does in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    done = make("browser", path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "page tests are skipped" in done.stdout
