"""GET /metrics: what was asked and answered is counted, each request once and by its route."""

from __future__ import annotations

from fastapi.testclient import TestClient


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
