"""What a product service sees of POST /v1/predict."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import TypeAdapter

from app.api.schemas import PredictResponse
from tests.fakes import FakeEngine, FakeTokenizer


def predict(client: TestClient, inputs: Any, *tasks: str, **fields: Any) -> dict[str, Any]:
    body = {"inputs": inputs, **({"tasks": list(tasks)} if tasks else {}), **fields}
    response = client.post("/v1/predict", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    TypeAdapter(PredictResponse).validate_python(answer)
    return answer


def test_one_text_is_answered_by_the_task_that_was_named(client: TestClient) -> None:
    answer = predict(client, "hello there", "spam")
    assert answer["model"] == "tiny"
    assert answer["generation"] == 7
    assert answer["results"] == [
        {"spam": {"version": 1, "arm": "champion", "label": "ham", "score": 0.9, "scores": {"ham": 0.9, "spam": 0.1}}}
    ]


def test_every_kind_of_task_answers_in_its_own_shape(client: TestClient) -> None:
    (result,) = predict(client, "Paris is nice")["results"]
    assert set(result) == {"intent", "spam", "emotion", "stars", "slots"}
    assert result["emotion"] == {
        "version": 1,
        "arm": "champion",
        "labels": ["fear", "joy"],
        "scores": {"joy": 0.25, "anger": 0.5, "fear": 0.75},
    }
    assert result["stars"] == {"version": 1, "arm": "champion", "value": 5.0}
    assert result["slots"]["spans"] == [{"label": "city", "start": 0, "end": 5, "text": "Paris", "score": 0.9}]


def test_without_tasks_each_input_gets_those_that_fit_its_kind(client: TestClient) -> None:
    single, pair = predict(client, ["one text", {"text": "a b", "text_pair": "c"}])["results"]
    assert "entailment" not in single and len(single) == 5
    assert set(pair) == {"entailment"}


def test_a_list_may_mix_texts_and_objects(client: TestClient) -> None:
    assert len(predict(client, ["one", {"text": "two"}, {"text": "three", "text_pair": None}], "spam")["results"]) == 3


@pytest.mark.parametrize(
    ("reference", "version", "arm"),
    [
        ("intent", 2, "champion"),
        ("intent@champion", 2, "champion"),
        ("intent@challenger", 3, "challenger"),
        ("intent@1", 1, "pinned"),
        ("intent@2", 2, "pinned"),
    ],
)
def test_a_reference_reaches_its_version(client: TestClient, reference: str, version: int, arm: str) -> None:
    (result,) = predict(client, "pay my bill", reference, unit="customer-1")["results"]
    assert (result[reference]["version"], result[reference]["arm"]) == (version, arm)


def test_answers_are_keyed_by_what_the_caller_wrote(client: TestClient, engine: FakeEngine) -> None:
    (result,) = predict(client, "pay", "intent", "intent@1", "intent@2", "intent", unit="customer-1")["results"]
    assert list(result) == ["intent", "intent@1", "intent@2"]
    ran = [version.version for version in engine.requests[0].plans[0].versions]
    assert ran == [2, 1], "the champion was asked under two names, and ran once"


def test_a_broken_task_fails_alone(client: TestClient, engine: FakeEngine) -> None:
    engine.broken_tasks = {"spam"}
    (result,) = predict(client, "hello", "spam", "intent")["results"]
    assert result["spam"] == {"version": 1, "arm": "champion", "error": "spam broke", "error_type": "engine"}
    assert result["intent"]["label"] in ("book", "cancel", "pay")


def test_usage_counts_tokens_rows_and_passes(client: TestClient) -> None:
    usage = predict(client, ["one two", "three"], "spam", "intent")["usage"]
    assert usage == {"tokens": 7, "rows": 2, "passes": 2.0, "cached": 0}


def test_a_second_request_is_answered_from_the_cache_and_says_so(client: TestClient, engine: FakeEngine) -> None:
    first = predict(client, ["to New York", "stay"], "spam", "slots")
    response = client.post("/v1/predict", json={"inputs": ["to New York", "stay"], "tasks": ["spam", "slots"]})
    again = response.json()
    assert again["results"] == first["results"] and len(engine.requests) == 1
    assert again["usage"] == {"tokens": 8, "rows": 0, "passes": 0.0, "cached": 4}
    assert [response.headers[f"x-{name}-time"] for name in ("tokenization", "queue", "inference")] == ["0.00"] * 3


def test_a_long_text_is_read_from_its_beginning_when_asked(client: TestClient) -> None:
    assert predict(client, "word " * 100, "spam", truncate=True)["usage"]["tokens"] == 32


def test_a_unit_is_accepted(client: TestClient) -> None:
    assert predict(client, "hello", "spam", unit="customer-42")["results"]


def test_control_characters_inside_a_text_are_no_matter(client: TestClient) -> None:
    assert predict(client, "hello \x00 \x07 there", "spam")["results"]


def test_texts_are_tokenized_off_the_event_loop(client: TestClient, tokenizer: FakeTokenizer) -> None:
    predict(client, "hello", "spam")
    assert all(name.startswith("tokenizer") for name in tokenizer.threads)


def test_headers_tell_where_the_time_went(client: TestClient) -> None:
    response = client.post("/v1/predict", json={"inputs": "hello"})
    times = {
        name: float(response.headers[f"x-{name}-time"]) for name in ("total", "tokenization", "queue", "inference")
    }
    assert times["queue"] == 1.0 and times["inference"] == 2.0
    assert 0 <= times["tokenization"] <= times["total"] < 5000


def test_the_callers_request_id_is_kept(client: TestClient) -> None:
    response = client.post("/v1/predict", json={"inputs": "hello"}, headers={"x-request-id": "order 66/a"})
    assert response.headers["x-request-id"] == response.json()["request_id"] == "order 66/a"


@pytest.mark.parametrize("sent", ["", "x" * 129, "tab\there", "na\xefve"])
def test_a_request_id_that_could_spoil_a_log_is_replaced(client: TestClient, sent: str) -> None:
    response = client.post("/v1/predict", json={"inputs": "hello"}, headers={b"x-request-id": sent.encode("latin-1")})
    assert response.headers["x-request-id"] == response.json()["request_id"] != sent
    assert len(response.headers["x-request-id"]) == 32


def test_scores_that_are_no_numbers_fail_alone(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fakes._softmaxed", lambda best, count: (float("nan"),) * count)
    (result,) = predict(client, "hello", "spam", "stars")["results"]
    assert result["spam"]["error_type"] == "engine" and result["stars"]["value"] == 3.0
