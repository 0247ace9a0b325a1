"""The span of a request over HTTP: its name and attributes, whose fault an error is, and the ids in the log."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr

from app.api.span import describe
from app.config import Settings
from app.errors import EngineError, NotFoundError
from app.main import create_app
from app.telemetry import outlet as outlets
from app.telemetry.logs import ACCESS, JsonFormatter
from app.telemetry.outlet import Outlet
from app.telemetry.traces import Traces
from tests.fakes import FakeEngine, make_runtime
from tests.otlp import Receiver, receiving, said

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACED = {"traceparent": f"00-{TRACE}-{SPAN}-01"}
UNSAMPLED = {"traceparent": f"00-{TRACE}-{SPAN}-00"}
BODY = {"inputs": "a secret", "tasks": ["spam", "intent@1"]}
SCOPE = {
    "type": "http",
    "method": "POST",
    "path": "/v1/predict",
    "scheme": "http",
    "http_version": "1.1",
    "state": {"request_id": "r-1"},
}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as opened:
        yield opened


@pytest.fixture
def traced(
    settings: Settings, engine: FakeEngine, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> Iterator[TestClient]:
    monkeypatch.setattr(outlets, "_EVERY_S", 0.02)
    traces = Traces(Outlet(receiver.endpoint, {}, lambda count: None), 1.0)
    app = create_app(settings, make_runtime(settings, engine, traces=traces))
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as opened:
        yield opened
    traces.close()


def lines(caplog: pytest.LogCaptureFixture, logger: str) -> list[dict[str, object]]:
    return [json.loads(JsonFormatter().format(record)) for record in caplog.records if record.name == logger]


def test_who_has_no_key_leaves_no_span(settings: Settings, engine: FakeEngine, receiver: Receiver) -> None:
    guarded = settings.model_copy(update={"admin_key": SecretStr("a-secret-of-the-admin")})
    traces = Traces(Outlet(receiver.endpoint, {}, lambda count: None), 1.0)
    app = create_app(guarded, make_runtime(guarded, engine, traces=traces))
    with TestClient(app, base_url="http://127.0.0.1") as client:
        for key in ("wrong", "a-secret-of-the-admin"):
            client.post("/v1/predict", json=BODY, headers={**TRACED, "authorization": f"Bearer {key}"})
    traces.close()
    assert [said(span)["http.response.status_code"] for span in receiver.wait_for("POST /v1/predict")] == [200]


def test_a_prediction_says_what_answered_and_what_it_cost(traced: TestClient, receiver: Receiver) -> None:
    answer = traced.post("/v1/predict?q=secret", json=BODY, headers={"x-request-id": "mine-1"}).json()
    (span,) = receiver.wait_for("POST /v1/predict")
    assert said(span) == {
        "http.request.method": "POST",
        "http.route": "/v1/predict",
        "http.response.status_code": 200,
        "url.scheme": "http",
        "url.path": "/v1/predict",
        "network.protocol.version": "1.1",
        "manifold.request_id": "mine-1",
        "manifold.generation": answer["generation"],
        "manifold.versions": ["spam: 1 champion", "intent@1: 1 pinned"],
        "manifold.tokens": answer["usage"]["tokens"],
        "manifold.rows": answer["usage"]["rows"],
        "manifold.passes": answer["usage"]["passes"],
        "manifold.cached": 0,
    }
    assert set(receiver.below(span)) == {"tokenize", "queue"}
    assert not any(b"secret" in request.SerializeToString() for request in receiver.requests)


def test_what_the_cache_knows_has_no_stages(traced: TestClient, receiver: Receiver) -> None:
    for _ in range(2):
        traced.post("/v1/predict", json=BODY)
    first, second = receiver.wait_for("POST /v1/predict", 2)
    assert said(second)["manifold.cached"] == 2
    assert receiver.below(first) and not receiver.below(second)


def test_names_come_from_routes_by_either_way_in(traced: TestClient, receiver: Receiver) -> None:
    other = {"content-type": "application/json;charset=UTF-8"}  # it goes the long way
    traced.post("/v1/embeddings", json={"model": "tiny", "input": "a secret"})
    traced.post("/v1/embeddings", content=b'{"model": "tiny", "input": "a"}', headers=other)
    traced.get("/v1/tasks/spam/versions/1")
    traced.get("/v1/nowhere/secret")
    traced.request("MAKEUP", "/v1/predict")
    traced.get("/livez")
    traced.get("/metrics")
    traced.get("/v1/tasks/spam")
    receiver.wait_for("GET /v1/tasks/{task}")
    requests = [span for span in receiver.spans if span.kind == span.SPAN_KIND_SERVER]
    assert [span.name for span in requests] == [
        *["POST /v1/embeddings"] * 2,
        "GET /v1/tasks/{task}/versions/{version}",
        "GET",
        "HTTP /v1/predict",
        "GET /v1/tasks/{task}",
    ]
    assert all(said(span)["manifold.passes"] for span in requests[:2])
    assert said(requests[4])["http.request.method"] == "_OTHER"


def test_a_callers_mistake_is_no_error_and_a_fault_of_ours_is(
    traced: TestClient, receiver: Receiver, engine: FakeEngine
) -> None:
    assert traced.post("/v1/predict", json={"inputs": "x", "tasks": ["nobody"]}).status_code == 404
    engine.failure = EngineError("the batch failed")
    assert traced.post("/v1/predict", json={"inputs": "x"}).status_code == 500
    engine.failure = KeyError("a secret")
    assert traced.post("/v1/predict", json={"inputs": "x"}).status_code == 500
    mistake, fault, bug = receiver.wait_for("POST /v1/predict", 3)
    assert said(mistake)["http.response.status_code"] == 404
    assert (mistake.status.code, "error.type" in said(mistake)) == (mistake.status.STATUS_CODE_UNSET, False)
    assert (fault.status.code, fault.status.message) == (fault.status.STATUS_CODE_ERROR, "the batch failed")
    assert said(fault)["error.type"] == "EngineError"
    assert (bug.status.code, bug.status.message) == (bug.status.STATUS_CODE_ERROR, "the log has the cause")
    assert said(bug)["error.type"] == "KeyError"


def test_a_client_that_goes_before_its_answer_is_told() -> None:
    found = describe(SCOPE, None, None)
    assert (found.name, found.fault, found.attributes["error.type"]) == ("POST", None, "client_gone")


def test_what_breaks_behind_the_answers_first_byte_is_a_fault_of_ours() -> None:
    assert describe(SCOPE, 200, None).fault is None
    assert describe(SCOPE, 404, NotFoundError("no such task")).fault is None
    assert describe(SCOPE, 200, RuntimeError("a secret")).fault == "the log has the cause"


def test_log_lines_name_the_span(
    traced: TestClient, receiver: Receiver, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, ACCESS)
    engine.failure = EngineError("the batch failed")
    traced.post("/v1/predict", json=BODY, headers=TRACED)
    (span,) = receiver.wait_for("POST /v1/predict")
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, SPAN)
    for logger in (ACCESS, "app.api.middleware"):
        (line,) = lines(caplog, logger)
        assert (line["trace_id"], line["span_id"]) == (TRACE, span.span_id.hex())


def test_an_unsampled_caller_is_named_in_the_log_alone(
    traced: TestClient, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, ACCESS)
    traced.post("/v1/predict", json=BODY, headers=UNSAMPLED)
    traced.get("/v1/tasks")
    receiver.wait_for("GET /v1/tasks")
    assert [span.name for span in receiver.spans] == ["GET /v1/tasks"]
    line, _ = lines(caplog, ACCESS)
    assert line["trace_id"] == TRACE and "span_id" not in line


def test_without_a_receiver_the_callers_trace_is_in_the_log(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, ACCESS)
    client.post("/v1/predict", json=BODY, headers=TRACED)
    client.post("/v1/predict", json=BODY, headers={"traceparent": "nonsense"})
    client.post("/v1/predict", json=BODY)
    first, *others = lines(caplog, ACCESS)
    assert first["trace_id"] == TRACE and "span_id" not in first
    assert not any("trace_id" in line for line in others)
