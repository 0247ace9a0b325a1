"""What auditors ask for: why a request got its answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.config import Settings
from app.main import create_app
from app.registry.prediction_lines import to_line
from app.registry.prediction_parts import PartWriter
from app.registry.prediction_store import PredictionStore
from app.rollout import Role
from tests.fakes import make_runtime

ODD_ID = 'a/b ?c&d#e"f'


@pytest.fixture
def audited(settings: Settings, tmp_path: Path) -> TestClient:
    """A server with two answers of spam@1 in its log."""
    store = PredictionStore(str(tmp_path / "log"), tmp_path / "home", "jsonl", 10**9)
    writer = PartWriter(store.folder, store.server, 10**9, 3600.0)
    for request_id in ("r-1", ODD_ID):
        row = {"time": "2026-01-09T12:00:00.000000Z", "request_id": request_id, "input": 0, "generation": 7}
        of_version = {"task": "spam", "version": 1, "digest": "sha256:spam-1", "label": "ham"}
        writer.append(to_line(row | of_version))
    return TestClient(create_app(settings, make_runtime(settings, predictions=store)), base_url="http://127.0.0.1")


def test_an_answer_is_told_with_its_version(audited: TestClient) -> None:
    with audited as client:
        told = client.get("/v1/predictions/r-1").json()
        assert told["request_id"] == "r-1" and told["rows"][0]["label"] == "ham"
        (version,) = told["versions"]
        assert (version["state"], version["labels"], version["thresholds"]) == ("approved", ["ham", "spam"], {})
        assert told["searched"]["files"] == 1
        odd = client.get("/v1/predictions/a%2Fb%20%3Fc%26d%23e%22f")
        assert odd.status_code == 200 and odd.json()["request_id"] == ODD_ID


def test_what_is_not_found_is_a_404_with_a_sentence(audited: TestClient, client: TestClient) -> None:
    with audited as with_log:
        nothing = with_log.get("/v1/predictions/nobody")
        assert nothing.status_code == 404 and "1 files" in nothing.json()["error"]
        assert with_log.get("/v1/predictions/r-1", params={"until": 1_000}).status_code == 404
        for wrong in ({"since": "yesterday"}, {"since": -1}, {"until": "inf"}):
            assert with_log.get("/v1/predictions/r-1", params=wrong).status_code == 422
        reversed_range = with_log.get("/v1/predictions/r-1", params={"since": 2, "until": 1})
        assert reversed_range.status_code == 400 and "since (2) is after until (1)" in reversed_range.json()["error"]
        assert with_log.get("/v1/predictions/").status_code == 422
    without_log = client.get("/v1/predictions/r-1")
    assert without_log.status_code == 404 and "prediction_log" in without_log.json()["error"]


def test_it_takes_the_role_of_an_auditor(client: TestClient, headers_of: Callable[..., dict[str, str]]) -> None:
    auditor, caller = headers_of("ada", Role.AUDIT), headers_of("shop", Role.PREDICT)
    assert client.get("/v1/predictions/r-1").status_code == 401
    assert client.get("/v1/predictions/r-1", headers=caller).status_code == 403
    assert client.get("/v1/predictions/r-1", headers=auditor).status_code == 404
