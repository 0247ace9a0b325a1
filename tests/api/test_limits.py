"""What clients see when the server is full, slow, draining or dead, and what becomes of the work of those who leave."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import socket
import threading
import weakref
from urllib.parse import urlsplit

import httpx2
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send

from app.api.middleware import Border
from app.config import Settings, load_settings
from app.errors import DeadlineError, EngineError, MalformedError
from app.main import create_app
from app.service.runtime import Runtime
from app.telemetry.logs import ACCESS
from tests.fake_rollout import FakeRollout
from tests.fakes import FakeEngine, make_runtime
from tests.serving import until, wait_for

BODY = {"inputs": "hello", "tasks": ["spam"]}
ADMIN_KEY = "sixteen characters"


@pytest.mark.parametrize("settings", [load_settings({"max_concurrent_requests": 1})])
@pytest.mark.anyio
async def test_a_full_server_answers_429_at_once_and_probes_still_answer(
    settings: Settings, engine: FakeEngine, async_client: httpx2.AsyncClient
) -> None:
    engine.holds = True
    first = asyncio.create_task(async_client.post("/v1/predict", json=BODY))
    await until(lambda: engine.futures)
    refused = await async_client.post("/v1/predict", json=BODY)
    assert refused.status_code == 429
    assert refused.json()["error_type"] == "overloaded"
    assert int(refused.headers["retry-after"]) >= 1
    counted = (await async_client.get("/metrics")).text
    assert 'manifold_requests_total{code="429",route="/v1/predict"} 1.0' in counted
    assert (await async_client.get("/readyz")).status_code == 200
    assert (await async_client.get("/healthz")).json()["in_flight"] == 1
    engine.release()
    assert (await first).status_code == 200
    engine.holds = False
    assert (await async_client.post("/v1/predict", json=BODY)).status_code == 200, "the permit came back"


@pytest.mark.anyio
async def test_metrics_are_answered_while_every_control_call_waits_for_a_slow_store(
    async_client: httpx2.AsyncClient, rollout: FakeRollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_back, waiting = threading.Event(), list[object]()

    def audit(*_: object) -> list[object]:
        waiting.append(None)
        is_back.wait(10)
        return []

    monkeypatch.setattr(rollout, "audit", audit)
    calls = [asyncio.create_task(async_client.get("/v1/audit")) for _ in range(40)]
    await until(lambda: len(waiting) >= min(32, (os.cpu_count() or 1) + 4))  # all threads that asyncio has
    async with asyncio.timeout(5):
        assert (await async_client.get("/metrics")).status_code == 200
    is_back.set()
    assert {call.status_code for call in await asyncio.gather(*calls)} == {200}


@pytest.mark.parametrize("settings", [load_settings({"max_concurrent_requests": 1})])
@pytest.mark.parametrize("path", ["/v1/predict", "/v1/embeddings"])
def test_a_full_server_refuses_before_it_reads_the_body(url: str, engine: FakeEngine, path: str) -> None:
    engine.holds = True
    with _posted(url, json.dumps(BODY).encode()) as first:
        wait_for(lambda: engine.futures)
        with _posted(url, b"", missing=200_000, path=path) as refused:
            assert refused.recv(65536).startswith(b"HTTP/1.1 429")
        assert httpx2.get(f"{url}/v1/tasks").status_code == 200, "only what takes a permit is refused"
        engine.release()
        assert first.recv(65536).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("settings", [load_settings({"max_concurrent_requests": 1})])
def test_those_who_send_slowly_hold_no_permit(url: str) -> None:
    content = json.dumps(BODY).encode()
    with _posted(url, content[:-1], missing=1) as slow:
        assert httpx2.post(f"{url}/v1/predict", json=BODY).status_code == 200
        slow.sendall(content[-1:])
        assert slow.recv(65536).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("settings", [load_settings({"max_concurrent_requests": 1, "admin_key": ADMIN_KEY})])
def test_a_full_server_tells_strangers_nothing(url: str, engine: FakeEngine) -> None:
    engine.holds = True
    key = f"authorization: Bearer {ADMIN_KEY}\r\n"
    with _posted(url, json.dumps(BODY).encode(), line=key) as first:
        wait_for(lambda: engine.futures)
        for line, status in (("", b"401"), (key, b"429")):
            with _posted(url, b"", missing=200, line=line) as refused:
                assert refused.recv(65536).startswith(b"HTTP/1.1 " + status)
        engine.release()
        assert first.recv(65536).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("settings", [load_settings({"deadline_ms": 50})])
def test_a_late_answer_is_504_and_its_work_is_dropped(
    settings: Settings, engine: FakeEngine, client: TestClient, runtime: Runtime
) -> None:
    engine.holds = True
    response = client.post("/v1/predict", json=BODY)
    assert response.status_code == 504
    assert response.json() == {"error": "the deadline of 50 ms passed first", "error_type": "deadline"}
    assert engine.futures[0].cancelled()
    assert runtime.admission.in_flight == 0


def test_a_deadline_that_the_engine_notices_is_504_too(engine: FakeEngine, client: TestClient) -> None:
    engine.failure = DeadlineError("the deadline passed while the request was queued")
    assert client.post("/v1/predict", json=BODY).status_code == 504


def test_the_engine_is_told_the_deadline(engine: FakeEngine, client: TestClient) -> None:
    client.post("/v1/predict", json=BODY)
    assert engine.requests[0].deadline_s is not None


@pytest.mark.parametrize("failure", [EngineError("the batch failed: out of memory"), RuntimeError("secret inside")])
def test_our_own_failure_is_500_in_the_same_shape(
    engine: FakeEngine, client: TestClient, failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    engine.failure = failure
    response = client.post("/v1/predict", json=BODY, headers={"x-request-id": "r-1"})
    assert response.status_code == 500
    assert response.json()["error_type"] == "engine"
    assert "secret" not in response.text
    assert response.headers["x-request-id"] == "r-1"
    (record,) = [r for r in caplog.records if r.name == "app.api.middleware"]
    assert record.exc_info and record.__dict__["request_id"] == "r-1"


def test_a_failed_representation_is_500(engine: FakeEngine, client: TestClient) -> None:
    engine.broken_tasks = {"embedding"}
    assert client.post("/v1/embeddings", json={"model": "tiny", "input": "a"}).status_code == 500


def test_a_draining_server_refuses_new_work_and_says_so_first_in_readiness(
    client: TestClient, runtime: Runtime
) -> None:
    runtime.admission.drain()
    for path in ("/readyz", "/healthz"):
        assert client.get(path).status_code == 503
    assert client.get("/livez").status_code == 200
    response = client.post("/v1/predict", json=BODY)
    assert response.status_code == 503
    assert response.json()["error_type"] == "unavailable"
    assert response.headers["retry-after"] == "1"
    assert response.headers["connection"] == "close"


def test_a_dead_engine_is_503_everywhere_so_that_the_server_is_restarted(
    client: TestClient, engine: FakeEngine, runtime: Runtime
) -> None:
    engine.alive = False
    for path in ("/livez", "/readyz", "/healthz"):
        response = client.get(path)
        assert response.status_code == 503
        assert response.json()["error_type"] == "unavailable"
    assert client.post("/v1/predict", json=BODY).status_code == 503
    assert runtime.admission.in_flight == 0


def test_the_queued_work_of_a_client_that_left_is_dropped(url: str, engine: FakeEngine, runtime: Runtime) -> None:
    engine.holds = True
    with _posted(url, json.dumps(BODY).encode()):
        wait_for(lambda: engine.futures)
    wait_for(lambda: engine.futures[0].cancelled())
    wait_for(lambda: runtime.admission.in_flight == 0)


def test_a_client_that_left_is_counted_and_logged(
    url: str, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """Else a hung device would be in no figure: those who ask it give up first."""
    caplog.set_level(logging.INFO, ACCESS)
    engine.holds = True
    with _posted(url, json.dumps(BODY).encode()):
        wait_for(lambda: engine.futures)
    wait_for(lambda: [record for record in caplog.records if record.name == ACCESS])
    (record,) = [record for record in caplog.records if record.name == ACCESS]
    assert record.__dict__["fields"]["status"] == 499
    counted = httpx2.get(f"{url}/metrics").text
    assert 'manifold_requests_total{code="499",route="/v1/predict"} 1.0' in counted
    assert 'manifold_request_duration_seconds_count{route="/v1/predict"} 1.0' in counted


@pytest.mark.anyio
async def test_work_that_is_cancelled_from_outside_stays_cancelled(
    engine: FakeEngine, async_client: httpx2.AsyncClient, runtime: Runtime
) -> None:
    engine.holds = True
    work = asyncio.create_task(async_client.post("/v1/predict", json=BODY))
    await until(lambda: engine.futures)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    await until(engine.futures[0].cancelled)  # by the worker, where it had not come back from the engine yet
    assert runtime.admission.in_flight == 0


def test_a_client_that_leaves_in_the_middle_of_its_body_starts_nothing(url: str, engine: FakeEngine) -> None:
    with _posted(url, json.dumps(BODY).encode()[:-3], missing=3):
        pass
    assert httpx2.get(f"{url}/readyz").status_code == 200
    assert engine.requests == []
    assert 'code="499"' not in httpx2.get(f"{url}/metrics").text, "how long somebody sends says nothing of the server"


def test_two_requests_in_one_packet_are_both_answered(url: str) -> None:
    content = json.dumps(BODY).encode()
    request = _head(url, len(content)) + content
    address = urlsplit(url)
    with socket.create_connection((address.hostname or "", address.port or 0), timeout=5) as connection:
        connection.sendall(request + request)
        received = b""
        while received.count(b"200 OK") < 2:
            received += connection.recv(65536)
    assert received.count(b'"spam"') >= 2


def test_browsers_of_named_origins_may_read_answers_and_errors(settings: Settings) -> None:
    settings = settings.model_copy(update={"cors_allow_origins": ("https://shop.example",)})
    runtime = make_runtime(settings)
    with TestClient(create_app(settings, runtime), base_url="http://127.0.0.1") as client:
        for body in (BODY, {"inputs": ""}):
            response = client.post("/v1/predict", json=body, headers={"origin": "https://shop.example"})
            assert response.headers["access-control-allow-origin"] == "https://shop.example"
        stranger = client.post("/v1/predict", json=BODY, headers={"origin": "https://else.example"})
        assert "access-control-allow-origin" not in stranger.headers


def test_the_application_closes_what_it_was_given(app: FastAPI, engine: FakeEngine) -> None:
    with TestClient(app, base_url="http://127.0.0.1"):
        assert engine.alive
    assert not engine.alive


def _posted(url: str, content: bytes, missing: int = 0, path: str = "/v1/predict", line: str = "") -> socket.socket:
    address = urlsplit(url)
    connection = socket.create_connection((address.hostname or "", address.port or 0), timeout=5)
    connection.sendall(_head(url, len(content) + missing, path, line) + content)
    return connection


def _head(url: str, length: int, path: str = "/v1/predict", line: str = "") -> bytes:
    host = urlsplit(url).netloc
    return (
        f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n{line}"
        f"content-length: {length}\r\n\r\n"
    ).encode()


@pytest.mark.anyio
async def test_a_request_that_failed_leaves_nothing_for_the_collector(runtime: Runtime) -> None:
    class Held:
        pass

    held: list[weakref.ref[Held]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        body = Held()  # as the body is, which may have megabytes
        held.append(weakref.ref(body))
        raise MalformedError("no")

    async def receive() -> Message:
        return {"type": "http.request", "body": b""}

    async def send(_: Message) -> None: ...

    scope: Scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/predict",
        "headers": [],
        "state": {"runtime": runtime},
    }
    gc.disable()
    try:
        await Border(app)(scope, receive, send)
        assert held[0]() is None
    finally:
        gc.enable()
