"""GET /v1/drift: how live versions stand to what they were measured on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fastapi.testclient import TestClient

from app.rollout import Role
from app.service.drift import DriftWatcher
from app.service.runtime import Runtime
from tests.fakes import make_task, make_version, snapshot_of
from tests.service.test_drift import WATCHED, said, served

FIELDS = {"task", "version", "arm", "kind", "psi", "p_value", "texts", "baseline_texts", "label", "drifting"}


@pytest.fixture
def watcher(runtime: Runtime) -> DriftWatcher:
    """Of spam, which came with a baseline, and of intent, which did not."""
    runtime.catalog.snapshot = snapshot_of(make_task(WATCHED), make_task(make_version("intent")))
    assert isinstance(runtime.drift, DriftWatcher)
    runtime.drift.take_in([])
    return runtime.drift


def test_what_drifts_is_told(client: TestClient, watcher: DriftWatcher) -> None:
    watcher.take_in([served(WATCHED, said(300))])
    watcher.compare_all()
    answer = client.get("/v1/drift").json()
    assert (answer["window"], answer["least_texts"], answer["without_baseline"]) == (2000, 200, ["intent@1"])
    assert [row["kind"] for row in answer["drift"]] == ["score", "label", "length", "unknown"]
    row = answer["drift"][1]
    assert set(row) == FIELDS
    assert (row["task"], row["version"], row["arm"], row["texts"]) == ("spam", 1, "champion", 300)
    assert row["psi"] > 0.25 and row["p_value"] < 0.01 and row["drifting"] and row["baseline_texts"] == 1000


def test_before_there_are_enough_texts_nothing_drifts(client: TestClient, watcher: DriftWatcher) -> None:
    rows = client.get("/v1/drift", params={"task": "spam"}).json()["drift"]
    assert [(row["psi"], row["p_value"], row["texts"], row["drifting"]) for row in rows] == [(None, None, 0, False)] * 4


def test_one_task_can_be_asked_for(client: TestClient, watcher: DriftWatcher) -> None:
    answer = client.get("/v1/drift", params={"task": "intent"}).json()
    assert answer["drift"] == [] and answer["without_baseline"] == ["intent@1"]
    refused = client.get("/v1/drift", params={"task": "nothing"})
    assert refused.status_code == 404 and 'there is no task "nothing"' in refused.json()["error"]


def test_it_wants_any_key_where_there_are_keys(client: TestClient, headers_of: Callable[..., dict[str, str]]) -> None:
    headers = headers_of("paul", Role.PREDICT)
    assert client.get("/v1/drift").status_code == 401
    assert client.get("/v1/drift", headers=headers).status_code == 200
