"""Which doors are open, which ask for a key, and which for a role."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from app.config import Settings, load_settings
from app.rollout import Role, State, TaskRecord
from tests.fake_rollout import FakeRollout
from tests.fakes import FakeEngine

PREDICT = {"inputs": "hello", "tasks": ["spam"]}
Headers = Callable[..., dict[str, str]]
ROLES: list[tuple[str, str, Any, Role]] = [
    ("POST", "/v1/predict", PREDICT, Role.PREDICT),
    ("POST", "/v1/embeddings", {"model": "tiny", "input": "a"}, Role.PREDICT),
    ("POST", "/v1/feedback", {"request_id": "r", "task": "spam", "label": "ham"}, Role.PREDICT),
    ("POST", "/v1/tasks/spam/versions", None, Role.PUBLISH),
    ("POST", "/v1/tasks/spam/versions/1/approve", None, Role.APPROVE),
    ("POST", "/v1/tasks/spam/versions/1/reject", None, Role.APPROVE),
    ("POST", "/v1/tasks/spam/versions/1/retire", None, Role.APPROVE),
    ("PUT", "/v1/tasks/spam/traffic", {"champion": 1}, Role.OPERATE),
    ("POST", "/v1/tasks/spam/rollback", None, Role.OPERATE),
    ("POST", "/v1/releases", {"tasks": {"spam": {"champion": 1}}}, Role.OPERATE),
    ("POST", "/v1/releases/r1/rollback", None, Role.OPERATE),
    ("GET", "/v1/audit", None, Role.AUDIT),
    ("GET", "/v1/audit/verify", None, Role.AUDIT),
    ("GET", "/v1/predictions/r", None, Role.AUDIT),
    ("GET", "/v1/keys", None, Role.ADMIN),
    ("POST", "/v1/keys", {"name": "a", "roles": ["audit"]}, Role.ADMIN),
    ("DELETE", "/v1/keys/none", None, Role.ADMIN),
    ("POST", "/v1/index/restore", None, Role.ADMIN),
    ("POST", "/v1/index/accept", None, Role.ADMIN),
]
OF_SEVERAL_ROLES = [("GET", "/v1/tasks/spam/versions/1/artifact")]  # test_artifacts.py has them
ANY_KEY = [
    "/v1/tasks", "/v1/tasks/spam", "/v1/tasks/spam/versions/1", "/v1/tasks/spam/comparison",
    "/v1/drift", "/v1/releases", "/v1/index", "/info",
]  # fmt: skip
FREE = ["/livez", "/readyz", "/healthz", "/docs", "/openapi.json"]


def test_every_operation_is_free_or_asks_for_a_key(app: FastAPI) -> None:
    described = app.openapi()
    assert described["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            if path in (*FREE, "/metrics"):
                assert "security" not in operation
            else:
                assert operation["security"] == [{"key": []}], f"{method} {path}"
                assert {"401", "429"} <= set(operation["responses"])


def test_every_operation_that_wants_a_role_is_tested_here(app: FastAPI) -> None:
    operations = {(m.upper(), p) for p, methods in app.openapi()["paths"].items() for m in methods}
    tested = {*((method, path) for method, path, _, _ in ROLES), *(("GET", path) for path in (*ANY_KEY, *FREE))}
    tested |= {*OF_SEVERAL_ROLES}
    plain = {(method, path.replace("{task}", "spam").replace("{version}", "1")) for method, path in operations}
    names = {"{release_id}": "r1", "{key_id}": "none", "{request_id}": "r"}
    for mark, name in names.items():
        plain = {(method, path.replace(mark, name)) for method, path in plain}
    assert plain - {("GET", "/metrics")} <= tested


@pytest.mark.parametrize(("method", "path", "body", "role"), ROLES)
def test_an_operation_asks_for_its_role(
    client: TestClient, rollout: FakeRollout, headers_of: Headers, method: str, path: str, body: Any, role: Role
) -> None:
    others = headers_of("others", *(set(Role) - {role, Role.ADMIN}))
    refused = client.request(method, path, json=body, headers=others)
    assert refused.status_code == 403, refused.text
    assert refused.json()["error_type"] == "forbidden"
    assert f"role {role}" in refused.json()["error"]
    entry = rollout.entries[-1]
    assert (entry.actor, entry.action) == ("others", "forbidden")
    assert entry.reason.startswith(f"{method} {path}: this needs a key with the role {role}")
    for headers in (headers_of("right", role), headers_of("root", Role.ADMIN)):
        assert client.request(method, path, json=body, headers=headers).status_code not in (401, 403)


@pytest.mark.parametrize("path", ANY_KEY)
def test_a_view_asks_for_any_key(client: TestClient, headers_of: Headers, path: str) -> None:
    headers = headers_of("olga", Role.OPERATE)
    assert client.get(path).status_code == 401
    assert client.get(path, headers=headers).status_code == 200


@pytest.mark.parametrize("path", FREE)
def test_probes_and_docs_are_free(client: TestClient, headers_of: Headers, path: str) -> None:
    headers_of("root", Role.ADMIN)
    assert client.get(path).status_code == 200


def test_a_missing_and_a_wrong_key_are_401_and_audited(
    client: TestClient, rollout: FakeRollout, headers_of: Headers, engine: FakeEngine
) -> None:
    headers_of("root", Role.ADMIN)
    before = len(rollout.entries)
    for headers in ({}, {"authorization": "Bearer mf_0_guess"}, {"authorization": "Basic YTpi"}):
        response = client.post("/v1/predict", json=PREDICT, headers=headers)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error_type"] == "unauthorized"
        assert response.headers["x-request-id"]
    assert engine.requests == []
    assert [entry.actor for entry in rollout.entries[before:]] == ["unknown at testclient"] * 3
    assert "guess" not in repr(rollout.entries)


def test_guessing_ends_in_429(client: TestClient, headers_of: Headers) -> None:
    headers = headers_of("root", Role.ADMIN)
    statuses = [client.get("/v1/tasks", headers={"authorization": f"Bearer {i}"}).status_code for i in range(12)]
    assert statuses == [401] * 10 + [429] * 2
    last = client.get("/v1/tasks", headers={"authorization": "Bearer x"})
    assert 1 <= int(last.headers["retry-after"]) <= 60
    assert client.get("/v1/tasks", headers=headers).status_code == 200
    assert client.get("/livez").status_code == 200


def test_an_unknown_path_tells_strangers_nothing(client: TestClient, headers_of: Headers) -> None:
    headers = headers_of("root", Role.ADMIN)
    assert client.get("/v1/nothing").status_code == 401
    assert client.get("/v1/nothing", headers=headers).status_code == 404


@pytest.mark.parametrize("settings", [load_settings({"admin_key": "sixteen characters"})])
def test_the_admin_key_makes_the_first_keys(client: TestClient, settings: Settings) -> None:
    body = {"name": "shop", "roles": ["predict"]}
    assert client.post("/v1/keys", json=body).status_code == 401
    headers = {"authorization": "Bearer sixteen characters"}
    made = client.post("/v1/keys", json=body, headers=headers)
    assert made.status_code == 201
    assert made.json()["created_by"] == "admin"


@pytest.mark.parametrize("state", ["candidate", "rejected", "retired"])
def test_a_version_that_is_not_approved_is_pinned_with_the_role_approve_alone(
    client: TestClient, rollout: FakeRollout, headers_of: Headers, state: str
) -> None:
    spam = rollout.view.tasks["spam"]
    rollout._put({"spam": _with_second(spam, state)})
    body = {"inputs": "hello", "tasks": ["spam@2"]}
    refused = client.post("/v1/predict", json=body, headers=headers_of("shop", Role.PREDICT))
    assert refused.status_code == 403
    assert "role approve" in refused.json()["error"]
    both = headers_of("anna", Role.PREDICT, Role.APPROVE)
    assert client.post("/v1/predict", json=body, headers=both).json()["results"][0]["spam@2"]["version"] == 2


def _with_second(task: TaskRecord, state: str) -> TaskRecord:
    second = replace(task.versions[1], version=2, digest="sha256:spam-2", state=State(state))
    return replace(task, versions={**task.versions, 2: second})


def test_a_wrong_key_is_refused_before_the_body_is_read(url: str, headers_of: Headers) -> None:
    headers_of("root", Role.ADMIN)
    assert _answer_to_head(url, "/v1/predict", "").startswith(b"HTTP/1.1 401")


def test_a_large_artifact_is_read_of_publishers_alone(url: str, headers_of: Headers) -> None:
    line = f"authorization: {headers_of('shop', Role.PREDICT)['authorization']}\r\n"
    assert _answer_to_head(url, "/v1/tasks/spam/versions", line).startswith(b"HTTP/1.1 403")


def _answer_to_head(url: str, path: str, line: str) -> bytes:
    """What the server says to a head alone that promises a body."""
    address = urlsplit(url)
    with socket.create_connection((address.hostname or "", address.port or 0), timeout=5) as connection:
        head = f"POST {path} HTTP/1.1\r\nhost: {address.netloc}\r\ncontent-length: 200000\r\n{line}\r\n"
        connection.sendall(head.encode())
        return connection.recv(65536)


@pytest.mark.parametrize(
    ("origin", "status"),
    [("http://127.0.0.1", 200), ("https://evil.example", 403), ("null", 403), ("http://127.0.0.1:81", 403)],
)
def test_without_keys_pages_of_other_origins_change_nothing(client: TestClient, origin: str, status: int) -> None:
    response = client.put("/v1/tasks/spam/traffic", json={"champion": 1}, headers={"origin": origin})
    assert response.status_code == status
    assert client.get("/v1/tasks", headers={"origin": origin}).status_code == 200


def test_without_keys_this_machine_answers_to_its_own_names_alone(client: TestClient) -> None:
    for host, status in (("localhost:8080", 200), ("evil.example:8080", 403)):
        response = client.post("/v1/predict", json=PREDICT, headers={"host": host})
        assert response.status_code == status, response.text


@pytest.mark.parametrize("settings", [load_settings({"cors_allow_origins": "https://shop.example"})])
def test_pages_of_named_origins_may_ask(client: TestClient, settings: Settings) -> None:
    response = client.post("/v1/predict", json=PREDICT, headers={"origin": "https://shop.example"})
    assert response.status_code == 200
