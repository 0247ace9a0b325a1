"""The API is as described: generated requests, right and wrong, get answers that /openapi.json knows, never a 500."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from app.config import load_settings
from app.main import create_app
from tests.fakes import make_runtime
from tests.serving import running

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
WITH_INPUT = [
    ("POST", "/v1/predict"),
    ("POST", "/v1/embeddings"),
    ("GET", "/v1/tasks/{task}"),
    ("GET", "/v1/tasks/{task}/versions/{version}"),
]
WITHOUT_INPUT = [("GET", path) for path in ("/v1/tasks", "/livez", "/readyz", "/healthz", "/info")]
RIGHT, WRONG = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
CASES = [
    *((*operation, mode, 60) for operation in WITH_INPUT for mode in (RIGHT, WRONG)),
    *((*operation, RIGHT, 1) for operation in WITHOUT_INPUT),
]


def make_app() -> FastAPI:
    settings = load_settings()
    return create_app(settings, make_runtime(settings))


def description_with_names(app: FastAPI) -> dict[str, Any]:
    """Names are drawn from a few that exist and a few that do not; otherwise hardly any request would be answered."""
    described = app.openapi()
    schemas = described["components"]["schemas"]
    schemas["EmbeddingsRequest"]["properties"]["model"]["enum"] = ["tiny", "tiny ", "spam"]
    schemas["EmbeddingsRequest"]["properties"]["dimensions"]["enum"] = [None, 4, 5]
    references = schemas["PredictRequest"]["properties"]["tasks"]["anyOf"][0]["items"]
    references["enum"] = ["spam", "intent@1", "intent@challenger", "slots", "entailment", "spam@9", "@", "nothing"]
    for methods in described["paths"].values():
        for parameter in methods.get("get", {}).get("parameters", []):
            parameter["schema"] |= {"enum": ["spam", "intent", "?"]} if parameter["name"] == "task" else {"maximum": 3}
    return described


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running(make_app()) as url:
        yield url


@pytest.fixture(scope="module")
def schema() -> Any:
    return schemathesis.openapi.from_dict(description_with_names(make_app()))


@pytest.mark.parametrize(("method", "path", "mode", "examples"), CASES)
def test_generated_requests_get_answers_that_are_described(
    server: str, schema: Any, method: str, path: str, mode: GenerationMode, examples: int
) -> None:
    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=schema[path][method].as_strategy(generation_mode=mode))
    def run(case: Case) -> None:
        statuses.add(case.call_and_validate(base_url=server, checks=CHECKS).status_code)

    statuses: set[int] = set()
    run()
    assert mode is WRONG or 200 in statuses, f"nothing was answered: {statuses}"


def test_every_operation_is_fuzzed_and_explained() -> None:
    description = make_app().openapi()
    operations = {(m.upper(), path): o for path, methods in description["paths"].items() for m, o in methods.items()}
    assert set(operations) == {*WITH_INPUT, *WITHOUT_INPUT}
    assert all(o["description"] and o["tags"] for o in operations.values())
    assert "HTTPValidationError" not in description["components"]["schemas"], "every error has our body"


def test_examples_in_the_docs_are_answered() -> None:
    app = make_app()
    examples = app.openapi()["components"]["schemas"]["PredictRequest"]["examples"]
    with TestClient(app) as client:
        for example in examples:
            example.pop("tasks", None)  # the names are of shipped tasks
            assert client.post("/v1/predict", json=example).status_code == 200
