"""Rules and alerts: they ask for what there is, say what to do, and fire when they should."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.docker.files import (
    ALERTS,
    DASHBOARDS,
    PROMETHEUS,
    README,
    RECORDED,
    RULES,
    SERVICES,
    expressions,
    needs_promtool,
    promtool,
    read_yaml,
    titles,
)
from tests.docker.known import LABELS, PLANNED, kinds, series
from tests.docker.promql import demanding, names

CONFIG: dict[str, Any] = read_yaml(PROMETHEUS / "prometheus.yml")
UNIT_TESTS = sorted((PROMETHEUS / "tests").glob("*.yml"))


def asked(path: Path) -> Iterator[dict[str, Any]]:
    for test in read_yaml(path)["tests"]:
        yield from test["promql_expr_test"]


def is_about(alert: str, expression: str) -> bool:
    found = re.search(r'alertname=(~?)"([^"]+)"', expression)
    return found is not None and bool(re.fullmatch(found[2], alert) if found[1] else found[2] == alert)


@pytest.mark.parametrize(
    ("expression", "metrics", "labels"),
    [
        ('sum by (job) (rate(a{code=~"5..", le!~"/x|{y}"}[5m])) / (b > 0)', {"a", "b"}, {"job", "code", "le"}),
        ("a offset 15m unless on (task) c:d:rate5m and 2 * e > 1e9", {"a", "c:d:rate5m", "e"}, {"task"}),
        ('quantile(0.9, sum by (le) (rate(h{job=~"$job"}[$__rate_interval])))', {"h"}, {"le", "job"}),
        ('x or on () label_replace(vector(0), "task", "none", "", "")', {"x"}, set()),
    ],
)
def test_names_are_taken_out_of_expressions(expression: str, metrics: set[str], labels: set[str]) -> None:
    assert (names(expression).metrics, names(expression).labels) == (metrics, labels)


@pytest.mark.parametrize(
    ("expression", "stricter"),
    [
        ("up == 0 or absent(up)", "up == bool 0 and (up)"),
        ('a{l!="or > }"}[5m] >= 2 unless (b <bool 1)', 'a{l!="or > }"}[5m] >= bool 2 and (b <bool 1)'),
        ('x or on () label_replace(y, "unless", "", "", "")', 'x and on () label_replace(y, "unless", "", "", "")'),
        ("sum by (floor) (rate(a[1m])) / (b > 0)", "sum by (floor) (rate(a[1m])) / (b > bool 0)"),
    ],
)
def test_a_stricter_expression_needs_data_of_every_part(expression: str, stricter: str) -> None:
    assert demanding(expression) == stricter


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("record") or rule["alert"])
def test_every_rule_asks_for_metrics_that_exist(rule: dict[str, Any]) -> None:
    found = names(rule["expr"])
    assert found.metrics and found.metrics <= series() | set(RECORDED)
    assert found.labels <= LABELS


def test_what_is_planned_has_the_kind_that_telemetry_gives_it() -> None:
    written = kinds()
    assert {name: written[name] for name in PLANNED} == PLANNED


@pytest.mark.parametrize("name", RECORDED)
def test_what_is_recorded_is_used(name: str) -> None:
    everything = [*(rule["expr"] for rule in RULES), *(e for dashboard in DASHBOARDS for e in expressions(dashboard))]
    described = [alert["annotations"]["description"] for alert in ALERTS.values()]
    assert any(name in names(expression).metrics for expression in everything) or any(name in d for d in described)
    assert re.fullmatch(r"job(_\w+)?:manifold_\w+:\w+", name)


@pytest.mark.parametrize("name", ALERTS)
def test_every_alert_says_how_bad_it_is_and_what_to_look_at(name: str) -> None:
    alert = ALERTS[name]
    assert alert["labels"]["severity"] in {"critical", "warning"}
    assert name.startswith("Manifold") and alert["annotations"]["summary"]
    description = alert["annotations"]["description"]
    assert len(description) > 80 and description.endswith(".")
    assert re.search(r"\b(?:look|looks|ask|see|restart|roll|bring|find|label)\b", description, re.IGNORECASE)
    assert set(re.findall(r'"([A-Z][^"]+)"', description)) <= titles()  # every panel that it sends to


def test_the_readme_has_every_alert() -> None:
    assert re.findall(r"^\| `(Manifold\w+)` \|", README, re.MULTILINE) == list(ALERTS)


@pytest.mark.parametrize("name", ALERTS)
def test_the_readme_sends_to_what_the_alert_sends_to(name: str) -> None:
    (told,) = re.findall(rf"^\| `{name}` \|.*\|(.*)\|$", README, re.MULTILINE)
    description = ALERTS[name]["annotations"]["description"]
    panels = set(re.findall(r'"([A-Z][^"]+)"', description))
    commands = set(re.findall(r"\bmanifold (?:audit|compare|index|pack|rollback|why)\b", description))
    assert panels <= set(re.findall(r"\*([A-Z][^*]+)\*", told))
    assert commands <= set(re.findall(r"`(manifold \w+)", told))


@pytest.mark.parametrize("name", ALERTS)
def test_every_alert_is_tested_to_fire_and_not_to_fire(name: str) -> None:
    cases = [case for path in UNIT_TESTS for case in asked(path) if is_about(name, case["expr"])]
    assert any(case["exp_samples"] and 'alertstate="firing"' in case["expr"] for case in cases)
    assert any(not case["exp_samples"] for case in cases)


def test_prometheus_scrapes_the_server_of_the_compose_file_and_itself() -> None:
    jobs = {job["job_name"]: job["static_configs"][0]["targets"] for job in CONFIG["scrape_configs"]}
    assert jobs == {"manifold": ["manifold:8080"], "prometheus": ["localhost:9090"]}
    assert {"manifold", "prometheus"} <= set(SERVICES)
    assert all("metrics_path" not in job for job in CONFIG["scrape_configs"])  # /metrics, which asks for no key
    assert "default" in SERVICES["manifold"]["networks"] and "default" in SERVICES["prometheus"]["networks"]


@needs_promtool
def test_promtool_accepts_the_configuration_and_the_rules() -> None:
    promtool("check", "config", str(PROMETHEUS / "prometheus.yml"))


@needs_promtool
@pytest.mark.parametrize("path", UNIT_TESTS, ids=lambda path: path.stem)
def test_alerts_fire_when_they_should(path: Path) -> None:
    promtool("test", "rules", str(path))
