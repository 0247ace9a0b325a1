"""GET /metrics: what was asked and answered is counted, each request once and by its route."""

from __future__ import annotations

import re

from fastapi.testclient import TestClient

from app.service.runtime import Runtime


def test_requests_are_counted_by_route_and_code(client: TestClient) -> None:
    client.post("/v1/predict", json={"inputs": "hello", "tasks": ["spam"]})
    client.post("/v1/predict", json={"inputs": "hello", "tasks": ["nothing"]})
    client.get("/v1/tasks/spam")
    client.get("/nowhere")
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    assert 'manifold_requests_total{code="200",route="/v1/predict"} 1.0' in answer.text
    assert 'manifold_requests_total{code="404",route="/v1/predict"} 1.0' in answer.text
    assert 'manifold_requests_total{code="200",route="/v1/tasks/{task}"} 1.0' in answer.text
    assert 'manifold_requests_total{code="404",route="none"} 1.0' in answer.text


def test_what_the_cache_answers_is_counted(client: TestClient) -> None:
    for tasks in (["spam"], ["spam", "stars"]):
        client.post("/v1/predict", json={"inputs": ["hello", "you", "hello"], "tasks": tasks})
    text = client.get("/metrics").text
    assert "manifold_answer_cache_hits_total 2.0" in text
    assert "manifold_answer_cache_misses_total 4.0" in text
    (taken,) = re.findall(r"^manifold_answer_cache_bytes (.+)$", text, re.MULTILINE)
    assert 500 < float(taken) < 10_000


def test_time_is_measured_by_route_and_by_stage(client: TestClient) -> None:
    client.post("/v1/predict", json={"inputs": "hello", "tasks": ["spam"]})
    text = client.get("/metrics").text
    assert 'manifold_request_duration_seconds_count{route="/v1/predict"} 1.0' in text
    for stage in ("tokenize", "queue"):
        assert f'manifold_stage_duration_seconds_count{{stage="{stage}"}} 1.0' in text


def test_who_is_turned_away_is_counted_by_reason(client: TestClient, runtime: Runtime) -> None:
    with runtime.admission.permit():
        runtime.admission._permits = 1
        client.post("/v1/predict", json={"inputs": "hello"})
    runtime.admission.drain()
    client.post("/v1/predict", json={"inputs": "hello"})
    text = client.get("/metrics").text
    assert 'manifold_rejected_total{reason="full"} 1.0' in text
    assert 'manifold_rejected_total{reason="draining"} 1.0' in text
