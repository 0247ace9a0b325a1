"""The files of the stack, read once."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
PROMETHEUS = DOCKER / "prometheus"


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8"))


COMPOSE: dict[str, Any] = read_yaml(ROOT / "docker-compose.yml")
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
README = (DOCKER / "README.md").read_text("utf-8")
DASHBOARDS: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text("utf-8"))
    for path in sorted((DOCKER / "grafana" / "dashboards").glob("*.json"))
}
RULES: list[dict[str, Any]] = [
    rule
    for path in sorted((PROMETHEUS / "rules").glob("*.yml"))
    for group in read_yaml(path)["groups"]
    for rule in group["rules"]
]
RECORDED = {rule["record"]: rule["expr"] for rule in RULES if "record" in rule}
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


def promtool(*arguments: str) -> None:
    """Fails with what promtool says, unless it is content."""
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def panels(dashboard: str) -> list[dict[str, Any]]:
    """Without the rows, which only are headings."""
    return [panel for panel in DASHBOARDS[dashboard]["panels"] if panel["type"] != "row"]


def titles() -> set[str]:
    """Of every panel and every row."""
    return {panel["title"] for dashboard in DASHBOARDS.values() for panel in dashboard["panels"]}


def expressions(dashboard: str) -> list[str]:
    return [target["expr"] for panel in panels(dashboard) for target in panel["targets"]]


def filled_in(expression: str) -> str:
    """As Grafana would send it, over all servers and tasks."""
    for variable, value in (("$__rate_interval", "1m"), ("$__range", "1h")):
        expression = expression.replace(variable, value)
    return re.sub(r"\$(instance|task)\b", ".*", expression)
