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

from app.api.control_schemas import TrafficRequest
from app.config import load_settings
from app.main import create_app
from tests.fakes import make_runtime
from tests.serving import running

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
OFTEN, SOMETIMES = 60, 20  # examples
TASK, VERSION = "/v1/tasks/{task}", "/v1/tasks/{task}/versions/{version}"
WITH_INPUT = {
    ("POST", "/v1/predict"): OFTEN,
    ("POST", "/v1/embeddings"): OFTEN,
    ("GET", TASK): SOMETIMES,
    ("GET", VERSION): SOMETIMES,
    ("GET", f"{VERSION}/artifact"): SOMETIMES,
    ("GET", f"{TASK}/comparison"): SOMETIMES,
    ("POST", f"{TASK}/versions"): OFTEN,
    ("POST", f"{VERSION}/approve"): SOMETIMES,
    ("POST", f"{VERSION}/reject"): SOMETIMES,
    ("POST", f"{VERSION}/retire"): SOMETIMES,
    ("PUT", f"{TASK}/traffic"): OFTEN,
    ("POST", f"{TASK}/rollback"): SOMETIMES,
    ("POST", "/v1/releases"): OFTEN,
    ("GET", "/v1/releases"): SOMETIMES,
    ("POST", "/v1/releases/{release_id}/rollback"): SOMETIMES,
    ("GET", "/v1/drift"): SOMETIMES,
    ("GET", "/v1/audit"): SOMETIMES,
    ("GET", "/v1/predictions/{request_id}"): SOMETIMES,
    ("POST", "/v1/keys"): SOMETIMES,
    ("DELETE", "/v1/keys/{key_id}"): SOMETIMES,
    ("POST", "/v1/feedback"): OFTEN,
    ("POST", "/v1/index/restore"): SOMETIMES,
    ("POST", "/v1/index/accept"): SOMETIMES,
}
SELDOM_RIGHT = {  # these want what no generator knows: a kept answer or artifact, an id, a loss, versions that fit
    ("GET", f"{VERSION}/artifact"),
    ("POST", f"{TASK}/versions"),
    ("POST", f"{VERSION}/reject"),
    ("POST", f"{VERSION}/retire"),
    ("POST", f"{TASK}/rollback"),
    ("POST", "/v1/releases"),
    ("POST", "/v1/releases/{release_id}/rollback"),
    ("DELETE", "/v1/keys/{key_id}"),
    ("GET", "/v1/predictions/{request_id}"),
    ("POST", "/v1/feedback"),
    ("POST", "/v1/index/restore"),
    ("POST", "/v1/index/accept"),
}
PLAIN = ("/v1/tasks", "/v1/audit/verify", "/v1/keys", "/v1/index", "/livez", "/readyz", "/healthz", "/info")
WITHOUT_INPUT = [("GET", path) for path in PLAIN]
RIGHT, WRONG = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
CASES = [
    *((*operation, mode, count) for operation, count in WITH_INPUT.items() for mode in (RIGHT, WRONG)),
    *((*operation, RIGHT, 1) for operation in WITHOUT_INPUT),
]
ADMIN_KEY = "sixteen characters"


def make_app(**overrides: object) -> FastAPI:
    settings = load_settings(overrides)
    return create_app(settings, make_runtime(settings))


def description_with_names(app: FastAPI) -> dict[str, Any]:
    """Names are drawn from a few that exist and a few that do not; otherwise hardly any request would be answered."""
    described = app.openapi()
    schemas = described["components"]["schemas"]
    schemas["EmbeddingsRequest"]["properties"]["model"]["enum"] = ["tiny", "spam"]
    schemas["EmbeddingsRequest"]["properties"]["dimensions"]["enum"] = [None, 4, 5]
    references = schemas["PredictRequest"]["properties"]["tasks"]["anyOf"][0]["items"]
    references["enum"] = ["spam", "intent@1", "intent@challenger", "slots", "entailment", "spam@9", "@", "nothing"]
    for field in ("champion", "challenger"):
        _bound(schemas["TrafficBody"]["properties"][field])
        _bound(schemas["TrafficRequest"]["properties"][field])
    schemas["FeedbackRequest"]["properties"]["task"]["enum"] = ["spam", "intent", "?"]
    schemas["ReleaseRequest"]["properties"]["tasks"]["propertyNames"] = {"enum": ["spam", "intent", "?"]}
    for methods in described["paths"].values():
        for operation in methods.values():
            operation.pop("security", None)  # every request brings the right key
            for parameter in operation.get("parameters", []):
                parameter["schema"] |= NAMES.get(parameter["name"], {})
    return described


NAMES: dict[str, dict[str, Any]] = {
    "task": {"enum": ["spam", "intent", "?"]},
    "version": {"maximum": 3},
    "if-match": {"enum": ["*", "7", '"7"', "seven"]},
}


def _bound(schema: dict[str, Any]) -> None:
    for option in schema.get("anyOf", [schema]):
        if option.get("type") == "integer":
            option["maximum"] = 3


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running(make_app(admin_key=ADMIN_KEY)) as url:  # keys that are made on the way shut nobody out
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
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        statuses.add(case.call_and_validate(base_url=server, checks=CHECKS, headers=headers).status_code)

    statuses: set[int] = set()
    run()
    if mode is RIGHT and (method, path) not in SELDOM_RIGHT:
        assert statuses & {200, 201}, f"nothing was answered: {statuses}"
    assert 401 not in statuses


def test_every_operation_is_fuzzed_and_explained() -> None:
    description = make_app().openapi()
    operations = {(m.upper(), path): o for path, methods in description["paths"].items() for m, o in methods.items()}
    assert set(operations) - {("GET", "/metrics")} == {*WITH_INPUT, *WITHOUT_INPUT}
    assert all(o["description"] and o["tags"] for o in operations.values())
    assert "HTTPValidationError" not in description["components"]["schemas"], "every error has our body"


def test_examples_in_the_docs_are_answered() -> None:
    app = make_app()
    examples = app.openapi()["components"]["schemas"]["PredictRequest"]["examples"]
    with TestClient(app, base_url="http://127.0.0.1") as client:
        for example in examples:
            example.pop("tasks", None)  # the names are of shipped tasks
            assert client.post("/v1/predict", json=example).status_code == 200


def test_examples_of_traffic_are_right() -> None:
    for example in make_app().openapi()["components"]["schemas"]["TrafficRequest"]["examples"]:
        assert TrafficRequest.model_validate(example).wish().champion == 3
