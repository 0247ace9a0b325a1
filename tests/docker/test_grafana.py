"""Dashboards: Grafana can load them, they ask for what there is, and each panel says what it means."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, TypeGuard, get_args, get_type_hints

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.cog.runtime import panelcfg_config
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.dashboard import Dashboard

from tests.docker.files import (
    DASHBOARDS,
    DOCKER,
    PROMETHEUS,
    README,
    RECORDED,
    RULES,
    SERVICES,
    expressions,
    filled_in,
    needs_promtool,
    panels,
    promtool,
    read_yaml,
    titles,
)
from tests.docker.known import LABELS, kinds, series
from tests.docker.promql import names

PROVISIONING = DOCKER / "grafana" / "provisioning"
SOURCE = {"type": "prometheus", "uid": "prometheus"}
RULED = [rule["expr"] for rule in RULES]
GRAFANAS_OWN = {"__rate_interval", "__range"}
GRAFANAS_UNITS = {value for name, value in vars(units).items() if name[0] != "_" and isinstance(value, str)}
# Where its types have plain text: names that its documentation has.
REDUCERS = {
    "lastNotNull",
    "last",
    "firstNotNull",
    "first",
    "min",
    "max",
    "mean",
    "sum",
    "count",
    "range",
    "delta",
    "diff",
}
TRANSFORMATIONS = {"merge", "organize", "joinByField", "reduce", "sortBy", "filterFieldsByName", "labelsToFields"}
MATCHERS = {"byName", "byRegexp", "byType", "byFrameRefID"}
every_dashboard = pytest.mark.parametrize("name", DASHBOARDS)


def mounted(service: str) -> dict[str, str]:
    """Path on the host by path in the container."""
    volumes = [volume.split(":") for volume in SERVICES[service]["volumes"]]
    return {volume[1]: volume[0] for volume in volumes}


def unit(panel: dict[str, Any]) -> str | None:
    if panel["type"] == "heatmap":
        return panel["options"]["yAxis"].get("unit")
    return panel["fieldConfig"]["defaults"].get("unit")


def test_there_are_three_and_grafana_can_tell_them_apart() -> None:
    assert set(DASHBOARDS) == {"overview", "tasks", "engine"}
    assert len({dashboard["uid"] for dashboard in DASHBOARDS.values()}) == 3
    assert len({dashboard["title"] for dashboard in DASHBOARDS.values()}) == 3
    assert all(dashboard["schemaVersion"] >= 39 for dashboard in DASHBOARDS.values())
    assert all("id" not in dashboard for dashboard in DASHBOARDS.values())  # Grafana gives it


@every_dashboard
def test_ids_are_unique_and_panels_do_not_overlap(name: str) -> None:
    laid = DASHBOARDS[name]["panels"]
    assert len({panel["id"] for panel in laid}) == len(laid)
    taken: set[tuple[int, int]] = set()
    for panel in laid:
        place = panel["gridPos"]
        assert place["x"] >= 0 and place["x"] + place["w"] <= 24
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


@every_dashboard
def test_every_panel_asks_something_and_says_what_it_means(name: str) -> None:
    for panel in panels(name):
        title = panel["title"]
        assert panel["targets"] and all(target["expr"] for target in panel["targets"]), title
        assert [target["datasource"] for target in panel["targets"]] == [SOURCE] * len(panel["targets"]), title
        assert panel["datasource"] == SOURCE, title
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]), title
        assert len(panel["description"]) > 20 and panel["description"].endswith("."), title
        assert panel["type"] == "table" or unit(panel) in GRAFANAS_UNITS, title


@every_dashboard
def test_every_expression_asks_for_metrics_that_exist(name: str) -> None:
    notes = [note["expr"] for note in DASHBOARDS[name]["annotations"]["list"] if "expr" in note]
    for expression in [*expressions(name), *notes]:
        found = names(expression)
        assert found.metrics and found.metrics <= series() | set(RECORDED), expression
        assert found.labels <= LABELS, expression


# -- Grafana's own types -----------------------------------------------------------------------------------------------

# Prometheus' editor of annotations keeps settings beside those of every source; a variable's text is for people.
OUTSIDE_TYPES = {
    *(f"annotations.list.{name}" for name in ("step", "tagKeys", "titleFormat", "useValueForTime")),
    "templating.list.definition",
}


@every_dashboard
def test_grafana_knows_every_field_and_every_value(name: str) -> None:
    register_default_plugins()
    written = {**DASHBOARDS[name], "panels": [with_overrides(panel) for panel in DASHBOARDS[name]["panels"]]}
    known = Dashboard.from_json(written)
    read = json.loads(JSONEncoder().encode(known))
    assert set(unknown_fields(written, read)) <= OUTSIDE_TYPES
    assert list(unknown_values(known)) == []
    assert list(unknown_names(written["panels"])) == []


def test_grafanas_types_find_what_is_misspelled() -> None:
    register_default_plugins()
    reduced = {"reduceOptions": {"calcs": ["lst"]}, "legend": {"calcs": ["max", "mx"]}}
    overridden = {"overrides": [{"matcher": {"id": "byNam"}, "properties": [{"id": "custom.colr", "value": 1}]}]}
    wrong = {"type": "timseries", "options": reduced, "transformations": [{"id": "orgnize"}], "fieldConfig": overridden}
    assert set(unknown_names([wrong])) == {"timseries", "lst", "mx", "orgnize", "byNam"}
    assert with_overrides(wrong)["fieldConfig"]["defaults"] == {"custom": {"colr": 1}}
    legend = {"displayMode": "lst", "placement": "bottom", "showLegend": True, "calks": ["max"]}
    panel = {
        "type": "timeseries",
        "title": "x",
        "options": {"legend": legend},
        "fieldConfig": {"defaults": {"unt": "s"}},
    }
    known = Dashboard.from_json({"panels": [panel]})
    read = json.loads(JSONEncoder().encode(known))
    assert set(unknown_fields({"panels": [panel]}, read)) == {
        "panels.options.legend.calks",
        "panels.fieldConfig.defaults.unt",
    }
    assert list(unknown_values(known)) == ["VizLegendOptions.display_mode: lst"]


def with_overrides(panel: dict[str, Any]) -> dict[str, Any]:
    """What it overrides for some fields, as if for all: Grafana's types know what may be set there."""
    if panel["type"] == "row":
        return panel
    defaults = json.loads(json.dumps(panel["fieldConfig"].get("defaults", {})))
    for override in panel["fieldConfig"].get("overrides", []):
        for put in override["properties"]:
            *parents, last = put["id"].split(".")
            within = defaults
            for parent in parents:
                within = within.setdefault(parent, {})
            within[last] = put["value"]
    return {**panel, "fieldConfig": {**panel["fieldConfig"], "defaults": defaults}}


def unknown_names(panels: list[dict[str, Any]]) -> Iterator[str]:
    for panel in panels:
        if panel["type"] == "row":
            continue
        if panelcfg_config(panel["type"]) is None:
            yield panel["type"]
        options = panel.get("options", {})
        for part in ("legend", "reduceOptions"):
            yield from set(options.get(part, {}).get("calcs", [])) - REDUCERS
        yield from {one["id"] for one in panel.get("transformations", [])} - TRANSFORMATIONS
        yield from {one["matcher"]["id"] for one in panel.get("fieldConfig", {}).get("overrides", [])} - MATCHERS


def unknown_fields(written: Any, read: Any, path: str = "") -> Iterator[str]:
    """What Grafana's types lose of what is written, or change."""
    if isinstance(written, dict):
        for name, value in written.items():
            below = f"{path}.{name}".removeprefix(".")
            if not isinstance(read, dict) or name not in read:
                yield below
            else:
                yield from unknown_fields(value, read[name], below)
    elif isinstance(written, list):
        if not isinstance(read, list) or len(read) != len(written):
            yield path
        else:
            for one, other in zip(written, read, strict=True):
                yield from unknown_fields(one, other, path)
    elif written != read:
        yield path


def unknown_values(known: Any) -> Iterator[str]:
    """Values of a choice that is not among what there is to choose."""
    if isinstance(known, list | dict):
        for value in known.values() if isinstance(known, dict) else known:
            yield from unknown_values(value)
    elif type(known).__module__.startswith("grafana_foundation_sdk.") and not isinstance(known, Enum):
        hints = get_type_hints(type(known))
        for name, value in vars(known).items():
            choices = [kind for kind in get_args(hints[name]) or (hints[name],) if is_choice(kind)]
            if choices and value is not None and not any(value in [one.value for one in kind] for kind in choices):
                yield f"{type(known).__name__}.{name}: {value}"
            yield from unknown_values(value)


def is_choice(kind: Any) -> TypeGuard[type[Enum]]:
    return isinstance(kind, type) and issubclass(kind, Enum)


# -- expressions -------------------------------------------------------------------------------------------------------


RANGED = re.compile(r"\b(\w+)\((\w+)(?:\{[^}]*\})?\[")
QUANTILE = re.compile(r"histogram_quantile\(0\.\d+, sum by \(([^)]*)\) \(rate\((\w+)")
OF_COUNTERS, OF_GAUGES = ("rate", "increase"), ("deriv", "avg_over_time", "min_over_time", "max_over_time", "changes")


@pytest.mark.parametrize("expression", sorted({*(e for name in DASHBOARDS for e in expressions(name)), *RULED}))
def test_rates_are_of_counters_and_quantiles_of_buckets(expression: str) -> None:
    """A rate of a gauge, or a quantile without its bounds, is a number that means nothing."""
    for function, metric in RANGED.findall(expression):
        assert function in (OF_COUNTERS if is_counted(metric) else OF_GAUGES), f"{function} of {metric}"
    quantiles = QUANTILE.findall(expression)
    assert len(quantiles) == expression.count("histogram_quantile(")
    assert all("le" in by.split(", ") and metric.endswith("_bucket") for by, metric in quantiles)


def is_counted(metric: str) -> bool:
    known = kinds()
    return known.get(metric) == "counter" or known.get(re.sub("_(bucket|sum|count)$", "", metric)) == "histogram"


@every_dashboard
def test_variables_are_defined_used_and_read_from_metrics(name: str) -> None:
    defined = {variable["name"]: variable for variable in DASHBOARDS[name]["templating"]["list"]}
    used = {variable for expression in expressions(name) for variable in re.findall(r"\$(\w+)", expression)}
    assert used - GRAFANAS_OWN == set(defined)
    for variable in defined.values():
        asked = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["definition"])
        assert asked is not None and variable["query"]["query"] == variable["definition"]
        assert names(asked[1]).metrics <= series() and asked[2] in LABELS
        assert variable["datasource"] == SOURCE


def test_tasks_can_be_chosen() -> None:
    assert "task" in {variable["name"] for variable in DASHBOARDS["tasks"]["templating"]["list"]}


@pytest.mark.parametrize("name", ["overview", "engine"])
def test_the_slow_stage_is_seen(name: str) -> None:
    found = {panel["title"]: panel["targets"][0]["expr"] for panel in panels(name)}
    for title in ("Time by stage", "Share of each stage"):
        asked = names(found[title])
        assert asked.metrics == {"manifold_stage_duration_seconds_sum", "manifold_stage_duration_seconds_count"}
        assert "stage" in asked.labels


def test_the_readme_names_panels_as_they_are() -> None:
    told = set(re.findall(r"(?<!\*)\*([A-Z][^*]+)\*(?!\*)", README))
    assert told and told <= titles()


@needs_promtool
def test_promtool_can_read_every_expression(tmp_path: Path) -> None:
    asked = [filled_in(expression) for name in DASHBOARDS for expression in expressions(name)]
    rules = [{"record": f"panel:{number}", "expr": expression} for number, expression in enumerate(asked)]
    path = tmp_path / "panels.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}), "utf-8")
    promtool("check", "rules", str(path))


# -- provisioning ------------------------------------------------------------------------------------------------------


def test_the_source_is_the_prometheus_beside_it() -> None:
    (source,) = read_yaml(PROVISIONING / "datasources" / "prometheus.yml")["datasources"]
    assert {"type": source["type"], "uid": source["uid"]} == SOURCE
    assert source["url"] == "http://prometheus:9090" and source["isDefault"] is True
    interval = read_yaml(PROMETHEUS / "prometheus.yml")["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == interval


def test_grafana_finds_the_dashboards_and_begins_with_the_overview() -> None:
    (provider,) = read_yaml(PROVISIONING / "dashboards" / "manifold.yml")["providers"]
    folder = provider["options"]["path"]
    assert mounted("grafana")[folder] == "./docker/grafana/dashboards"
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{folder}/overview.json"
    assert {path for path in mounted("grafana") if "provisioning" in path} == {
        "/etc/grafana/provisioning/datasources",
        "/etc/grafana/provisioning/dashboards",
    }
