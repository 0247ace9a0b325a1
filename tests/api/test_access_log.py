"""A line a request: who, what, which versions, how long, at what cost; never a text."""

from __future__ import annotations

import json
import logging
import re

import pytest
from fastapi.testclient import TestClient

from app.telemetry.logs import ACCESS, JsonFormatter, TextFormatter


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, ACCESS)
    return caplog


def access(lines: pytest.LogCaptureFixture) -> list[dict[str, object]]:
    records = [record for record in lines.records if record.name == ACCESS]
    return [json.loads(JsonFormatter().format(record)) for record in records]


def test_a_prediction_says_what_answered_and_what_it_cost(client: TestClient, lines: pytest.LogCaptureFixture) -> None:
    body = {"inputs": ["a secret", "another secret"], "tasks": ["spam", "intent@1"], "unit": "customer-1"}
    answer = client.post("/v1/predict", json=body, headers={"x-request-id": "mine-1"})
    (line,) = access(lines)
    assert line["request_id"] == "mine-1" and line["logger"] == ACCESS
    assert (line["method"], line["route"], line["status"]) == ("POST", "/v1/predict", 200)
    assert line["versions"] == {"spam": "1 champion", "intent@1": "1 pinned"}
    usage = answer.json()["usage"]
    assert {name: line[name] for name in usage} == usage
    assert line["generation"] == answer.json()["generation"]
    assert all(float(str(line[f"{part}_ms"])) >= 0 for part in ("duration", "tokenization", "queue", "inference"))
    assert "secret" not in json.dumps(line)


def test_errors_have_a_line_and_probes_have_none(client: TestClient, lines: pytest.LogCaptureFixture) -> None:
    client.get("/livez")
    client.get("/metrics")
    client.post("/v1/predict", content=b"{")
    client.get("/nowhere?text=secret")
    first, second = access(lines)
    assert (first["route"], first["status"]) == ("/v1/predict", 400)
    assert "versions" not in first
    assert (second["route"], second["status"]) == ("none", 404)
    assert "secret" not in json.dumps(second)


def test_as_text_a_line_says_all_that_it_says_as_json(client: TestClient, lines: pytest.LogCaptureFixture) -> None:
    client.post("/v1/predict", json={"inputs": "hello", "tasks": ["spam"]}, headers={"x-request-id": "mine 1"})
    client.get("/nowhere request_id=mine-2")
    first, second = (TextFormatter().format(record) for record in lines.records if record.name == ACCESS)
    assert "POST /v1/predict 200 in " in first
    pairs = first.partition(" ms ")[2]
    assert pairs.startswith('request_id="mine 1" ') and pairs.endswith(' versions="spam:1 champion"')
    assert {"generation=", "rows=", "queue_ms=", "inference_ms="} <= set(re.findall(r"\w+=", pairs))
    assert not {"method=", "route=", "status=", "duration_ms="} & set(re.findall(r"\w+=", pairs))
    assert "/nowhere%20request_id=mine-2 404" in second
