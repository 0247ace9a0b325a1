"""A real Prometheus beside a real server under traffic: what dashboards and rules ask for has data.

Each query must answer as it is, and its stricter form must have data too (`promql.demanding`): there, every part must
exist and fit the others by its labels. So an alert that is rightly silent is checked as far as data goes, and a panel
that falls back to an empty line does not pass by that line. What alerts do with the data, promtool's unit tests show.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from app.cli import main
from tests.docker.busy_server import BusyServer
from tests.docker.files import ALERTS, DASHBOARDS, RECORDED, RULES, filled_in, panels
from tests.docker.known import PLANNED, PROMETHEUS_OWN, series
from tests.docker.live import Prometheus, hurried, needs_prometheus
from tests.docker.promql import demanding, names

pytestmark = needs_prometheus

# A CPU has no memory of its own, so no server that these tests can start has it.
CUDA_ONLY = {"manifold_device_memory_bytes"}
PATIENCE_S = 30.0  # from the first request on, for all queries together

PANELS = [
    pytest.param(target["expr"], id=f"{dashboard} {panel['title']} {target['refId']}")
    for dashboard in DASHBOARDS
    for panel in panels(dashboard)
    for target in panel["targets"]
]
NOTES = [
    pytest.param(note["expr"], id=f"{dashboard} {note['name']}")
    for dashboard in DASHBOARDS
    for note in DASHBOARDS[dashboard]["annotations"]["list"]
    if "expr" in note
]


@dataclass(frozen=True)
class Live:
    prometheus: Prometheus
    server: BusyServer
    until_s: float

    def check(self, expression: str) -> None:
        """The metrics of the expression are there, and every part of it has data."""
        asked = names(expression).metrics
        if asked & absent_series():
            self.prometheus.query(expression)  # it can be asked all the same
            return
        strict = demanding(expression)
        assert self.prometheus.has_data(strict, self.until_s), f"no data: {strict}"
        assert asked <= set(self.prometheus.ask("label/__name__/values")), expression


def absent_series() -> set[str]:
    return {name for name in series() if re.sub("_(bucket|sum|count)$", "", name) in CUDA_ONLY}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    server = BusyServer(tmp_path_factory.mktemp("server"))
    with (
        server.running() as url,
        Prometheus(tmp_path_factory.mktemp("prometheus"), [url.removeprefix("http://")]) as prometheus,
        server.busy(),
    ):
        yield Live(prometheus, server, time.monotonic() + PATIENCE_S)
    assert not server.faults, server.faults


@pytest.mark.parametrize("expression", PANELS)
def test_every_panel_has_data(live: Live, expression: str) -> None:
    expression = filled_in(expression)
    live.check(expression)
    if not names(expression).metrics & absent_series():
        assert live.prometheus.has_data(expression, live.until_s)


@pytest.mark.parametrize("expression", NOTES)
def test_every_note_on_a_dashboard_has_data(live: Live, expression: str) -> None:
    live.check(filled_in(expression))


@pytest.mark.parametrize("name", RECORDED)
def test_every_recording_rule_has_data(live: Live, name: str) -> None:
    live.check(hurried(RECORDED[name]))
    assert live.prometheus.has_data(name, live.until_s), f"Prometheus has recorded no {name}"


@pytest.mark.parametrize("name", ALERTS)
def test_every_part_of_an_alert_has_data(live: Live, name: str) -> None:
    live.check(hurried(ALERTS[name]["expr"]))


def test_prometheus_computes_every_rule_without_a_fault(live: Live) -> None:
    rules = [rule for group in live.prometheus.ask("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in rules} == {rule.get("record") or rule["alert"] for rule in RULES}
    assert {(rule["name"], rule["lastError"]) for rule in rules if rule.get("lastError")} == set()


def test_every_variable_has_values(live: Live) -> None:
    for dashboard in DASHBOARDS.values():
        for variable in dashboard["templating"]["list"]:
            asked = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["definition"])
            assert asked is not None
            assert live.prometheus.ask(f"label/{asked[2]}/values", **{"match[]": asked[1]}), variable["definition"]


def test_what_is_said_to_be_missing_is_missing(live: Live) -> None:
    """Otherwise it would never be looked at."""
    assert set(PLANNED) >= CUDA_ONLY
    assert absent_series() & set(live.prometheus.ask("label/__name__/values")) == set()


def test_every_metric_that_may_be_asked_for_exists(live: Live) -> None:
    wanted = series() - absent_series() - PROMETHEUS_OWN
    assert {name for name in wanted if not live.prometheus.has_data(f"count({name})", live.until_s)} == set()


def test_a_metric_that_does_not_exist_has_no_data(live: Live) -> None:
    assert not live.prometheus.has_data(demanding("manifold_nothing > 0 or up"), 0.0)


def test_every_way_to_fail_was_there(live: Live) -> None:
    for code in ("200", "404", "422", "429", "503"):
        assert live.prometheus.has_data(f'manifold_requests_total{{code="{code}"}}', live.until_s), code
    assert live.prometheus.has_data("min_over_time(manifold_index_up[10m]) == 0", live.until_s)


def test_a_terminal_shows_the_same_server(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--once", "--interval", "2", "--url", live.server.url]) == 0
    out = capsys.readouterr().out
    assert re.search(r"predict +[1-9]\d*\.\d/s  p50 [\d.]+ m?s  p99 [\d.]+", out), out
    assert re.search(r"^spam +2 +challenger 50 % +[1-9]", out, re.MULTILINE), out
    assert re.search(r"^broken +1 +champion +[\d.]+ +– +100.0 %", out, re.MULTILINE), out
    assert "rollback" in out and "shadow" in out
