"""The short way and FastAPI's: a request is answered alike on both, and only right ones go the short way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send

from app.api import embeddings, predict
from app.api.shortcut import Shortcut
from app.config import load_settings
from app.rollout import Principal, Role
from app.service.access import EVERYBODY
from app.service.runtime import Runtime
from app.telemetry.tracing import UNTRACED

PREDICT = b'{"inputs": ["hello there", {"text": "Paris"}], "tasks": ["spam", "slots", "intent@1"]}'
EMBED = b'{"model": "tiny", "input": ["hello", "there"], "encoding_format": "base64"}'
RIGHT = [("/v1/predict", PREDICT), ("/v1/embeddings", EMBED)]
SHORT, LONG = "application/json", "application/json; charset=utf8"


@pytest.mark.parametrize("settings", [load_settings({"answer_cache_bytes": 0})])
@pytest.mark.parametrize(("path", "content"), RIGHT)
def test_both_ways_answer_alike(client: TestClient, path: str, content: bytes) -> None:
    def ask(content_type: str) -> Any:
        return client.post(path, content=content, headers={"content-type": content_type, "x-request-id": "r"})

    short, long = ask(SHORT), ask(LONG)
    assert (short.status_code, short.json()) == (200, long.json())
    assert short.headers.keys() == long.headers.keys()
    for response in (short, long):
        assert response.headers["content-type"] == "application/json"
        assert response.headers["x-request-id"] == "r"
    assert f'manifold_requests_total{{code="200",route="{path}"}} 2.0' in client.get("/metrics").text


@pytest.mark.parametrize("content_type", [SHORT, LONG])
@pytest.mark.parametrize("path", ["/v1/predict", "/v1/embeddings"])
def test_a_role_is_missed_before_a_body_is_judged(
    client: TestClient, headers_of: Callable[..., dict[str, str]], path: str, content_type: str
) -> None:
    headers = {**headers_of("olga", Role.OPERATE), "content-type": content_type}
    for content in (PREDICT, EMBED, b'{"inputs": 3, "input": 3}'):
        assert client.post(path, content=content, headers=headers).status_code == 403


@pytest.mark.anyio
@pytest.mark.parametrize(("path", "content"), RIGHT)
async def test_a_right_request_goes_the_short_way(runtime: Runtime, path: str, content: bytes) -> None:
    assert await _ways(runtime, content, path=path) == ["short"]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("content", "changes"),
    [
        (PREDICT, {"method": "GET"}),
        (PREDICT, {"path": "/v1/predict/"}),
        (PREDICT, {"headers": []}),
        (PREDICT, {"headers": [(b"content-type", b"text/plain")]}),
        (PREDICT, {"principal": Principal("olga", frozenset({Role.OPERATE}))}),
        (PREDICT[:-1], {}),
        (b"", {}),
        (b"null", {}),
        (b'{"inputs": 3}', {}),
        (b'{"inputs": "a", "task": "spam"}', {}),
    ],
)
async def test_any_other_is_left_to_fastapi(runtime: Runtime, content: bytes, changes: dict[str, Any]) -> None:
    assert await _ways(runtime, content, **changes) == ["long"]


async def _ways(runtime: Runtime, content: bytes, **changes: Any) -> list[str]:
    """ "short" for each answer of an endpoint itself, "long" for each request that was passed on."""
    ways: list[str] = []

    async def pass_on(scope: Scope, receive: Receive, send: Send) -> None:
        ways.append("long")

    async def receive() -> Message:
        raise AssertionError("the body was read already")

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            assert message["status"] == 200
            ways.append("short")

    principal = changes.pop("principal", EVERYBODY)
    state = {"runtime": runtime, "request_id": "r", "trace": UNTRACED, "principal": principal, "body": content}
    headers = [(b"content-type", b"application/json")]
    scope: dict[str, Any] = {
        "type": "http",
        "method": "POST",
        "path": "/v1/predict",
        "headers": headers,
        "state": state,
        **changes,
    }
    await Shortcut(pass_on, [*predict.router.routes, *embeddings.router.routes])(scope, receive, send)
    return ways
