"""A real Prometheus with the repository's own configuration and rules, on loopback, which looks every second.

Only what nobody can wait for is changed: targets, intervals, and how far back a rule looks for what was before.
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isnan
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from tests.docker.files import PROMETHEUS, read_yaml
from tests.serving import wait_for

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus is not installed (Debian has it: apt-get install prometheus)"
)
_POLL_S = 0.25


def hurried(expression: str) -> str:
    """With what was a quarter of an hour, six hours or a day ago taken from three seconds ago."""
    return re.sub(r"\boffset \d+[mhd]\b", "offset 3s", expression)


@dataclass
class Prometheus:
    """In the folder are its configuration, rules, data and log. Scrapes servers at `host:port`."""

    folder: Path
    servers: Sequence[str]
    address: str = ""
    client: httpx2.Client = field(default_factory=lambda: httpx2.Client(trust_env=False, timeout=10))

    def __enter__(self) -> Prometheus:
        self.address = _free_address()
        self._configure()
        options = [f"--config.file={self.folder / 'prometheus.yml'}", f"--web.listen-address={self.address}"]
        options += [f"--storage.tsdb.path={self.folder / 'data'}", "--log.level=warn"]
        with (self.folder / "log").open("w") as log:
            self._process = subprocess.Popen(["prometheus", *options], stdout=log, stderr=log)
        try:
            wait_for(self._is_ready, 30)
            wait_for(self._sees_all, 30)  # its first look, after 5 s
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self._process.kill()
        self._process.wait()

    def ask(self, path: str, **parameters: str) -> Any:
        """The data of an answer of the HTTP API."""
        answer = self.client.get(f"http://{self.address}/api/v1/{path}", params=parameters).json()
        assert answer["status"] == "success", (parameters, answer)
        return answer["data"]

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Labels and values now; what is not a number tells nobody anything and is left out."""
        found = self.ask("query", query=expression)
        assert found["resultType"] == "vector", (expression, found["resultType"])
        samples = [(sample["metric"], float(sample["value"][1])) for sample in found["result"]]
        return [(labels, value) for labels, value in samples if not isnan(value)]

    def has_data(self, expression: str, until_s: float) -> bool:
        """Asks again until there is some, or until that moment of the monotonic clock; at least once."""
        while not self.query(expression):
            if time.monotonic() > until_s:
                return False
            time.sleep(_POLL_S)
        return True

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, (self.folder / "log").read_text("utf-8")
        try:
            return self.client.get(f"http://{self.address}/-/ready").status_code == 200
        except httpx2.HTTPError:
            return False

    def _sees_all(self) -> bool:
        return len(self.query('up{job="manifold"} == 1')) == len(self.servers)

    def _configure(self) -> None:
        config = read_yaml(PROMETHEUS / "prometheus.yml")
        config["global"] |= {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        targets = {"manifold": list(self.servers), "prometheus": [self.address]}
        for job in config["scrape_configs"]:
            job["static_configs"] = [{"targets": targets[job["job_name"]]}]
        (self.folder / "prometheus.yml").write_text(yaml.safe_dump(config), "utf-8")
        (self.folder / "rules").mkdir()
        for path in (PROMETHEUS / "rules").glob("*.yml"):
            (self.folder / "rules" / path.name).write_text(hurried(path.read_text("utf-8")), "utf-8")


def _free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return f"127.0.0.1:{taken.getsockname()[1]}"
