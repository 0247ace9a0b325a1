"""Whoever is new on call finds the slow stage of a server by the dashboard Engine alone, as docker/README.md says.

A real server, slow in one stage after the other, under a real Prometheus. Nothing but the panels' own queries is read.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest

from app.engine.backbone import Backbone
from tests.artifacts import write_artifact
from tests.docker.files import README, filled_in, panels
from tests.docker.live import Prometheus, needs_prometheus
from tests.serving import ServerProcess
from tests.slow_server import STAGES

DELAY_S = 0.3
CALLERS = 3  # what is slow makes others wait, and the queue must not be blamed for it
WINDOW = "5s"  # of the panels' rates: a stage that was slow before is soon forgotten
BATCH = ("collate", "forward", "heads")
TITLES = ("Time by stage", "Share of each stage", "p99 by stage")
_PATIENCE_S = 40.0


@dataclass(frozen=True)
class Watched:
    prometheus: Prometheus
    stage: Path  # the file that names the slow one

    def panel(self, title: str) -> dict[str, float]:
        """What a panel of the dashboard Engine shows, by stage."""
        (found,) = [panel for panel in panels("engine") if panel["title"] == title]
        query = filled_in(found["targets"][0]["expr"].replace("$__rate_interval", WINDOW))
        return {labels["stage"]: value for labels, value in self.prometheus.query(query)}


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    prefixes, folder = tmp_path_factory.mktemp("prefixes"), tmp_path_factory.mktemp("prometheus")
    write_artifact(prefixes / "spam", Backbone.load("embedded", "cpu", "float32").spec, "spam", ("ham", "spam"))
    stage = folder / "stage"
    stage.write_text("none")
    options = ("--port", "0", "--prefixes", str(prefixes), "--dtype", "float32", "--drain-grace-s", "0")
    uncached = ("--answer-cache-bytes", "0", "--no-log-requests")
    with ServerProcess("tests.slow_server", str(stage), str(DELAY_S), "serve", *options, *uncached) as server:
        url = server.wait_until_ready()
        with Prometheus(folder, [url.removeprefix("http://")]) as prometheus, callers(url):
            yield Watched(prometheus, stage)


@contextlib.contextmanager
def callers(url: str) -> Iterator[None]:
    ended = threading.Event()

    def call(number: int) -> None:
        with httpx2.Client(trust_env=False, timeout=30) as client:
            while not ended.is_set():
                client.post(f"{url}/v1/predict", json={"inputs": f"How slow is it, {number}?"}).raise_for_status()

    threads = [threading.Thread(target=call, args=(number,), daemon=True) for number in range(CALLERS)]
    for thread in threads:
        thread.start()
    yield
    ended.set()
    for thread in threads:
        thread.join(10)


def slowest(by_stage: dict[str, float]) -> str:
    """By the rule of docker/README.md: who only waits for the batch before waits no longer than a batch takes."""
    if by_stage["queue"] > sum(by_stage[stage] for stage in BATCH):
        return "queue"
    return max({*by_stage} - {"queue"}, key=lambda stage: by_stage[stage])


@needs_prometheus
@pytest.mark.parametrize("stage", STAGES)
def test_the_panels_name_the_stage_that_is_slow(watched: Watched, stage: str) -> None:
    watched.stage.write_text(stage)
    until_s = time.monotonic() + _PATIENCE_S
    for title in TITLES:
        while len(seen := watched.panel(title)) < len(STAGES) or slowest(seen) != stage:
            assert time.monotonic() < until_s, (title, seen)
            time.sleep(0.25)


def test_the_readme_explains_every_stage() -> None:
    section = README.partition("**To find the slow stage**")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(STAGES)
    assert all(f"*{title}*" in section for title in TITLES)
