"""A headless Chromium for tests that look at pages as a reader would.

A test module says `pytest_plugins = ["browser"]` and takes the fixture `browser`; it imports this
module for types only, as pytest wants to be first. Tests that take the fixture are skipped where
Chromium, its driver or selenium is missing; `make test` brings them, `make browser` the first two.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

# One browser for all tests, at rest but for the page: nothing of its own goes to the network.
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # Chromium refuses to start as root with it
    "--disable-dev-shm-usage",  # a container's /dev/shm may hold no page
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",  # they would take width from the page, as they do not on a phone
)


class Browser:
    """A Chromium whose console and requests can be read. `driver` is selenium's."""

    def __init__(self, driver: Chrome) -> None:
        self.driver = driver

    def open(
        self, page: Path | str, width: int = 1280, height: int = 900, dark: bool = False
    ) -> None:
        """Load a file or an address in a viewport of that size; what was logged before is gone."""
        self.view(width, height)
        self.prefer(dark)
        self.driver.get("about:blank")
        self._log("browser")
        self._log("performance")
        self.driver.get(page.resolve().as_uri() if isinstance(page, Path) else page)

    def view(self, width: int, height: int) -> None:
        """Give the page a viewport of that many CSS pixels; a window cannot be that narrow."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.command("Emulation.setDeviceMetricsOverride", **size)

    def prefer(self, dark: bool = False, media: str = "screen") -> None:
        """Emulate a reader who asked for dark (or light) pages, or the medium `print`."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", media=media, features=[scheme])

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script `return`s; elements and JSON values go in and out."""
        return self.driver.execute_script(script, *arguments)

    def command(self, name: str, **parameters: Any) -> Any:
        """Send a command of the Chrome DevTools protocol."""
        return self.driver.execute_cdp_cmd(name, parameters)

    def console(self) -> list[str]:
        """Warnings and errors on the console since the last call or `open`."""
        grave = {"WARNING", "SEVERE"}
        return [each["message"] for each in self._log("browser") if each["level"] in grave]

    def requests(self) -> list[str]:
        """Addresses that were asked for since the last call or `open`, the page's own first."""
        events = (json.loads(each["message"])["message"] for each in self._log("performance"))
        return [
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]

    def screenshot(self, path: Path, whole: bool = True) -> None:
        """Save the page as a PNG, all of its length or what the viewport shows."""
        if whole:
            width = self.run("return innerWidth")
            self.view(width, self.run("return document.documentElement.scrollHeight"))
        path.write_bytes(self.driver.get_screenshot_as_png())

    def _log(self, kind: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.driver.get_log(kind)  # type: ignore[no-untyped-call]
        return found


def missing() -> str | None:
    """What keeps pages from being looked at here, or None."""
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            return f"there is no {program} here: make browser"
    return None


def start(profile: Path) -> Browser:
    """A new Chromium with an empty profile in `profile`. `driver.quit()` ends it."""
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    options = ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    options.ignore_local_proxy_environment_variables()  # the driver is on this machine
    # With the driver named, selenium looks for none and downloads none.
    return Browser(Chrome(options, ChromeService(shutil.which("chromedriver"))))


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One Chromium for all tests of a session; `open` forgets what earlier ones left."""
    pytest.importorskip("selenium", reason="selenium is not installed: pip install -e '.[dev]'")
    if reason := missing():
        pytest.skip(reason)
    started = start(tmp_path_factory.mktemp("chromium"))
    yield started
    started.driver.quit()
