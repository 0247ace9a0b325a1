"""What OpenAI's clients see of POST /v1/embeddings."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from fastapi.testclient import TestClient

from app.domain import Snapshot
from app.service.runtime import Runtime
from tests.fakes import FakeEngine


@pytest.fixture
def openai_client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as opened:
        yield opened


def test_the_openai_client_reads_its_default_form(openai_client: openai.OpenAI) -> None:
    answer = openai_client.embeddings.create(model="tiny", input=["one text", "another"])
    assert [item.embedding for item in answer.data] == [[0.5] * 4] * 2
    assert [item.index for item in answer.data] == [0, 1]
    assert answer.model == "tiny"
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (7, 7)


def test_a_second_request_gets_the_same_vectors(openai_client: openai.OpenAI, engine: FakeEngine) -> None:
    answers = [openai_client.embeddings.create(model="tiny", input=["one text", "another"]) for _ in range(2)]
    assert answers[0].data == answers[1].data and answers[0].usage == answers[1].usage
    assert len(engine.requests) == 1


def test_the_openai_client_reads_plain_numbers(openai_client: openai.OpenAI) -> None:
    answer = openai_client.embeddings.create(model="tiny", input="one", encoding_format="float", user="u", dimensions=4)
    assert answer.data[0].embedding == [0.5] * 4


def test_the_openai_client_raises_its_own_errors(openai_client: openai.OpenAI, runtime: Runtime) -> None:
    with pytest.raises(openai.NotFoundError) as not_found:
        openai_client.embeddings.create(model="gpt", input="one")
    assert not_found.value.body == 'there is no representation "gpt"; those live are tiny'
    assert not_found.value.request_id
    with pytest.raises(openai.BadRequestError):
        openai_client.embeddings.create(model="tiny", input="")
    with pytest.raises(openai.UnprocessableEntityError):
        openai_client.embeddings.create(model="tiny", input=[1, 2, 3])
    runtime.admission.drain()
    with pytest.raises(openai.InternalServerError):
        openai_client.embeddings.create(model="tiny", input="one")


def test_vectors_are_counted_as_answers_of_their_version(client: TestClient) -> None:
    assert client.post("/v1/embeddings", json={"model": "tiny", "input": ["one", "two"]}).status_code == 200
    counted = client.get("/metrics").text
    labels = 'arm="champion",outcome="success",task="embedding",version="1"'
    assert f"manifold_predictions_total{{{labels}}} 2.0" in counted


def test_base64_holds_little_endian_float32(client: TestClient) -> None:
    body = {"model": "tiny", "input": "one", "encoding_format": "base64"}
    answer = client.post("/v1/embeddings", json=body).json()
    assert struct.unpack("<4f", base64.b64decode(answer["data"][0]["embedding"])) == (0.5,) * 4


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        pytest.param({"input": []}, 400, "no inputs", id="no input"),
        pytest.param({"input": ["a", " "]}, 400, "input 1 is empty", id="blank"),
        pytest.param({"input": ["a"] * 33}, 413, "at most 32", id="too many"),
        pytest.param({"input": [[1, 2], [3]]}, 422, "send the text itself", id="lists of token ids"),
        pytest.param({"input": ["a", 2]}, 422, "send the text itself", id="a token id among texts"),
        pytest.param({"input": {"text": "a"}}, 422, "input must be a text", id="object"),
        pytest.param({"input": [None]}, 422, "input[0] must be a text", id="null in list"),
        pytest.param({"input": "word " * 40}, 422, "input 0 has 42 tokens", id="too long"),
        pytest.param({"model": "spam"}, 404, 'no representation "spam"', id="a task is no representation"),
        pytest.param({"model": 1}, 422, "model must be a text", id="model is number"),
        pytest.param({"dimensions": 3}, 422, "gives 4 dimensions", id="other size"),
        pytest.param({"dimensions": 10**30}, 422, "dimensions", id="absurd size"),
        pytest.param({"encoding_format": "hex"}, 422, "encoding_format must be 'float' or 'base64'", id="format"),
    ],
)
def test_what_cannot_be_embedded_is_refused(client: TestClient, fields: Any, status: int, words: str) -> None:
    response = client.post("/v1/embeddings", json={"model": "tiny", "input": "one"} | fields)
    assert response.status_code == status, response.text
    assert words in response.json()["error"]


def test_a_missing_field_is_named(client: TestClient, engine: FakeEngine) -> None:
    assert client.post("/v1/embeddings", json={"input": "a"}).json()["error"] == "model is missing"
    assert client.post("/v1/embeddings", json={"model": "tiny"}).json()["error"] == "input is missing"
    assert engine.requests == []


def test_a_long_text_is_read_from_its_beginning_when_asked(client: TestClient) -> None:
    response = client.post("/v1/embeddings", json={"model": "tiny", "input": "word " * 40, "truncate": True})
    assert response.json()["usage"]["prompt_tokens"] == 32


def test_a_new_snapshot_serves_the_next_request(client: TestClient, runtime: Runtime) -> None:
    runtime.catalog.snapshot = Snapshot(8, {}, {})
    assert client.post("/v1/embeddings", json={"model": "tiny", "input": "a"}).status_code == 404
    response = client.post("/v1/predict", json={"inputs": "a"})
    assert response.status_code == 422
    assert response.json()["error"] == "no live task reads a single text, which input 0 is"
