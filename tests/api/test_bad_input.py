"""Every broken request gets its status and one clear sentence, and the engine never sees it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.fakes import FakeEngine

PAIR = {"text": "a", "text_pair": "b"}
case = pytest.param


def assert_refused(response: Any, engine: FakeEngine, status: int, error_type: str, words: str) -> None:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error", "error_type"}
    assert body["error_type"] == error_type
    assert words in body["error"]
    assert "\n" not in body["error"] and len(body["error"]) < 600
    assert response.headers["x-request-id"] and response.headers["x-total-time"]
    assert engine.requests == []


@pytest.mark.parametrize(
    ("body", "status", "error_type", "words"),
    [
        case({"inputs": ""}, 400, "validation", "input 0 is empty", id="empty text"),
        case({"inputs": " \n\t "}, 400, "validation", "input 0 is empty", id="blank text"),
        case({"inputs": ["a", ""]}, 400, "validation", "input 1 is empty", id="one of several empty"),
        case({"inputs": []}, 400, "validation", "no inputs", id="no inputs"),
        case({"inputs": [{"text": "a", "text_pair": ""}]}, 400, "validation", "text_pair of input 0", id="pair"),
        case({"inputs": "a", "tasks": []}, 400, "validation", "tasks is empty", id="no tasks"),
        case({"inputs": "a", "tasks": ["wether"]}, 404, "not_found", 'no task "wether"', id="unknown task"),
        case({"inputs": "a", "tasks": [""]}, 404, "not_found", 'no task ""', id="nameless task"),
        case({"inputs": "a", "tasks": ["spam@9"]}, 404, "not_found", "no version 9", id="unknown version"),
        case({"inputs": "a", "tasks": ["spam@latest"]}, 404, "not_found", "names no version", id="unknown alias"),
        case({"inputs": "a", "tasks": ["spam@²"]}, 404, "not_found", "names no version", id="odd digit"),
        case({"inputs": "a", "tasks": ["spam@"]}, 404, "not_found", "names no version", id="bare at"),
        case({"inputs": "a", "tasks": ["spam@challenger"]}, 404, "not_found", "no challenger", id="challenger"),
        case({"inputs": "a", "tasks": ["tiny"]}, 404, "not_found", "/v1/embeddings", id="representation"),
        case({"inputs": ["a"], "tasks": ["entailment"]}, 422, "validation", "entailment reads a pair", id="pair task"),
        case({"inputs": [PAIR], "tasks": ["spam"]}, 422, "validation", "input 0 is a pair", id="pair for single"),
        case({"inputs": "word " * 20_000}, 422, "tokenization", "input 0 has 20002 tokens", id="100,000 characters"),
        case({"inputs": "\x01 \x02"}, 422, "tokenization", "nothing that the model can read", id="control alone"),
        case({"inputs": ["a"] * 33}, 413, "validation", "at most 32", id="batch too large"),
        case({"inputs": "a" * 300_000}, 413, "validation", "larger than 300000 bytes", id="huge body"),
        case({}, 422, "validation", "inputs is missing", id="no field"),
        case({"inputs": None}, 422, "validation", "inputs must be a text", id="null"),
        case({"inputs": 3}, 422, "validation", "inputs must be a text", id="number"),
        case({"inputs": ["a", 3]}, 422, "validation", "inputs[1] must be a text", id="number in list"),
        case({"inputs": [["a"]]}, 422, "validation", "inputs[0] must be a text", id="list in list"),
        case({"inputs": [{"text_pair": "b"}]}, 422, "validation", "inputs[0].text is missing", id="half a pair"),
        case({"inputs": [{"text": 1}]}, 422, "validation", "inputs[0].text must be a text", id="text is number"),
        case({"inputs": "a", "tasks": "spam"}, 422, "validation", "tasks must be a list", id="tasks is text"),
        case({"inputs": "a", "tasks": [1]}, 422, "validation", "tasks[0] must be a text", id="task is number"),
        case({"inputs": "a", "tasks": ["x" * 201]}, 422, "validation", "at most 200", id="huge task name"),
        case({"inputs": "a", "tasks": ["x"] * 1001}, 422, "validation", "at most 1000", id="too many tasks"),
        case({"inputs": "a", "truncate": "yes"}, 422, "validation", "truncate must be true", id="truncate"),
        case({"inputs": "a", "unit": "u" * 257}, 422, "validation", "unit must have at most 256", id="huge unit"),
        case({"inputs": "a", "unit": 5}, 422, "validation", "unit must be a text", id="unit is number"),
        case({"inputs": "a", "task": "spam"}, 422, "validation", "task is not a field", id="unknown field"),
        case(["a"], 422, "validation", "the body must be an object", id="list for body"),
        case("a", 422, "validation", "the body must be an object", id="text for body"),
        case(None, 422, "validation", "the body must be an object", id="null for body"),
    ],
)
def test_a_bad_body_is_refused(
    client: TestClient, engine: FakeEngine, body: Any, status: int, error_type: str, words: str
) -> None:
    response = client.post(
        "/v1/predict", content=json.dumps(body).encode(), headers={"content-type": "application/json"}
    )
    assert_refused(response, engine, status, error_type, words)


@pytest.mark.parametrize("path", ["/v1/predict", "/v1/embeddings"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        case(b"", "the body is empty", id="nothing"),
        case(b"{", "not valid JSON", id="cut short"),
        case(b"hello", "not valid JSON", id="plain text"),
        case(b'{"inputs": "a",}', "not valid JSON", id="trailing comma"),
        case(b'{"inputs": NaN}', "not valid JSON", id="not a number"),
        case(b'{"inputs": "\xff\xfe", "model": "tiny", "input": "a"}', "not valid JSON", id="invalid UTF-8"),
        case(rb'{"inputs": "\ud800", "model": "tiny", "input": "a"}', "not valid JSON", id="lone surrogate"),
        case(b"\xed\xa0\x80", "not valid JSON", id="encoded surrogate"),
        case(b'{"inputs": "a\x00b"}', "not valid JSON", id="raw control character"),
        case(b"[" * 100_000, "not valid JSON", id="deep nesting"),
        case('{"inputs": "a"}'.encode("utf-16"), "not valid JSON", id="UTF-16"),
    ],
)
def test_what_is_no_json_is_malformed(
    client: TestClient, engine: FakeEngine, path: str, content: bytes, words: str
) -> None:
    response = client.post(path, content=content, headers={"content-type": "application/json"})
    assert_refused(response, engine, 400, "validation", words)


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_a_body_of_another_type_is_told_which_one_to_send(
    client: TestClient, engine: FakeEngine, content_type: str | None
) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    response = client.post("/v1/predict", content=b'{"inputs": "a"}', headers=headers)
    assert_refused(response, engine, 400, "validation", "content-type: application/json")


def test_a_body_without_a_length_is_stopped_at_the_limit(client: TestClient, engine: FakeEngine) -> None:
    sent = 0

    def endless() -> Any:
        nonlocal sent
        for _ in range(10_000):
            sent += 1
            yield b" " * 10_000

    response = client.post("/v1/predict", content=endless(), headers={"content-type": "application/json"})
    assert_refused(response, engine, 413, "validation", "larger than 300000 bytes")


def test_a_declared_length_over_the_limit_is_refused_unread(client: TestClient, engine: FakeEngine) -> None:
    headers = {"content-type": "application/json", "content-length": "999999999"}
    assert_refused(client.post("/v1/predict", content=b"{}", headers=headers), engine, 413, "validation", "larger")


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "HEAD"])
def test_another_method_is_405_and_says_what_is_allowed(client: TestClient, method: str) -> None:
    response = client.request(method, "/v1/predict")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    if method != "HEAD":
        assert response.json()["error_type"] == "validation"


@pytest.mark.parametrize("path", ["/", "/v1/predict/", "/v2/predict", "/%ff", "/nope?x=1"])
def test_an_unknown_path_is_404_in_the_same_shape(client: TestClient, engine: FakeEngine, path: str) -> None:
    assert_refused(client.get(path), engine, 404, "not_found", "/docs")


def test_a_bad_input_changes_nobody_elses_answer(client: TestClient) -> None:
    asked = {"inputs": "hello there", "unit": "customer-1"}  # one unit stays in one arm
    before = client.post("/v1/predict", json=asked).json()["results"]
    client.post("/v1/predict", json={"inputs": ["hello there", ""]})
    client.post("/v1/predict", content=b'{"inputs": "\xff"}', headers={"content-type": "application/json"})
    assert client.post("/v1/predict", json=asked).json()["results"] == before
