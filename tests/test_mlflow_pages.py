"""A published sweep on MLflow's own pages, served as `orchestrate ui` serves them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest

from orchestrator import mirroring, runs, tracking
from orchestrator.records import Records, read_parquet

if TYPE_CHECKING:
    from browser import Browser

pytest_plugins = ["browser"]

PUBLISHED = Path(__file__).parent.parent / "results" / "published" / "depth_ablation" / "tiny"
PATIENCE_S = 180
DRAWN = ".pcp-plot .parcoords .y-axis .axis-title"
NOT_OURS = (
    "mlflow/users/current",  # MLflow asks who is there, and a server without accounts knows nobody
    "WebGL",  # a browser without a graphics card draws all the same
)


@dataclass(frozen=True)
class Shown:
    """A server of MLflow's pages, and what is on them."""

    address: str
    experiment: str
    records: Records
    runs: dict[str, Any]
    """Trial id -> its run."""

    def compare(self) -> str:
        """The page that compares the runs of all trials."""
        ids = [run.info.run_id for run in self.runs.values()]
        query = f"runs={quote(json.dumps(ids))}&experiments={quote(json.dumps([self.experiment]))}"
        return f"{self.address}/#/compare-runs?{query}"


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    results = tmp_path_factory.mktemp("results")
    folder = results / "published" / "depth_ablation" / "tiny"
    shutil.copytree(PUBLISHED, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        (recorded,) = mirroring.find(results)
        assert mirroring.mirror(recorded, results).problem is None
        client = runs.new_client(tracking.tracking_uri(results))
        with serving(results) as address:
            experiment = client.get_experiment_by_name("depth_ablation").experiment_id
            found = client.search_runs([experiment], f"tags.`{runs.TRIAL_TAG}` LIKE '%'")
            by_trial = {run.data.tags[runs.TRIAL_TAG]: run for run in found}
            yield Shown(address, experiment, read_parquet(folder), by_trial)


@contextmanager
def serving(results: Path) -> Iterator[str]:
    """The address of `orchestrate ui`, while it lasts."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "orchestrator.cli", "ui", "--results", str(results)]
    with (results / "ui.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdout=log, stderr=log, start_new_session=True
        )

    def answers() -> bool:
        assert process.poll() is None, (results / "ui.log").read_text()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    try:
        until(answers)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def until(reached: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def titles(browser: Browser) -> list[str]:
    """What stands over the axes of the parallel coordinates, from left to right."""
    found: list[str] = browser.run(
        f"return [...document.querySelectorAll({DRAWN!r})].map(each => each.textContent)"
    )
    return found


def ticks(browser: Browser, axis: str) -> set[str]:
    """What stands beside an axis."""
    found = browser.run(
        "const axes = [...document.querySelectorAll('.pcp-plot .parcoords .y-axis')];"
        "const mine = axes.find("
        "  each => each.querySelector('.axis-title').textContent === arguments[0]);"
        "return [...mine.querySelectorAll('.tick text')].map(each => each.textContent)",
        axis,
    )
    return set(found)


def choose(browser: Browser, list_: str, wanted: str) -> None:
    """Add an entry in the list below that heading, as somebody does who types its name."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    field = browser.driver.find_element(
        By.XPATH, f"//*[text()='{list_}']/following::input[@type='search'][1]"
    )
    field.send_keys(wanted, Keys.ENTER, Keys.ESCAPE)


@pytest.mark.slow
def test_ui_serves_a_page_and_the_runs_of_the_results(shown: Shown) -> None:
    with urllib.request.urlopen(shown.address, timeout=60) as answer:
        assert b"<title>MLflow</title>" in answer.read()
    wanted = {"experiment_ids": [shown.experiment], "max_results": 1000}
    search = urllib.request.Request(
        f"{shown.address}/api/2.0/mlflow/runs/search",
        json.dumps(wanted).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(search, timeout=60) as answer:
        ids = {run["info"]["run_id"] for run in json.load(answer)["runs"]}
    assert {run.info.run_id for run in shown.runs.values()} <= ids


@pytest.mark.slow
def test_the_compare_page_draws_axes_and_metrics_of_all_trials(
    browser: Browser, shown: Shown
) -> None:
    trials = len(shown.records.trials)
    assert len(shown.runs) == trials > 20
    browser.open(shown.compare(), width=1400, height=1000)
    # At first: what differs, and the metric that the sweep chooses by.
    until(lambda: titles(browser) == ["contiguous", "criterion", "group", "accuracy.mean"])
    assert f"Comparing {trials} Runs" in browser.run("return document.body.innerText")
    assert {"perplexity", "task", "true", "false"} < ticks(browser, "criterion") | ticks(
        browser, "contiguous"
    )
    assert {"grid", "teacher"} < ticks(browser, "group")

    choose(browser, "Parameters:", "seed")
    choose(browser, "Metrics:", "lm_loss.after")
    wanted = {"contiguous", "criterion", "group", "seed", "accuracy.mean", "lm_loss.after"}
    until(lambda: set(titles(browser)) == wanted)
    losses = [trial.metrics["lm_loss.after"] for trial in shown.records.trials]
    drawn = [float(tick) for tick in ticks(browser, "lm_loss.after")]
    assert min(losses) <= min(drawn) <= max(drawn) <= max(losses)

    assert [line for line in browser.console() if not any(each in line for each in NOT_OURS)] == []
    asked = {url for url in browser.requests() if not url.startswith(("data:", "blob:"))}
    assert {url for url in asked if not url.startswith(shown.address)} == set()


@pytest.mark.slow
def test_the_parameters_of_a_run_fit_on_a_page_and_its_settings_are_whole(
    browser: Browser, shown: Shown
) -> None:
    trial = next(each for each in shown.records.trials if each.baseline is None)
    run = shown.runs[trial.trial_id]
    browser.open(f"{shown.address}/#/experiments/{shown.experiment}/runs/{run.info.run_id}")
    until(lambda: "Parameters (4)" in browser.run("return document.body.innerText"))
    text = browser.run("return document.body.innerText")
    assert run.info.run_name in text
    assert "generated-0/train" in text
    settings = Path(run.info.artifact_uri.removeprefix("file://")) / runs.CONFIG
    assert json.loads(settings.read_text()) == trial.config
