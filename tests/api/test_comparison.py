"""What operators read of versions side by side, and how the truth is reported."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.registry.comparison import PairFigures
from tests.fake_rollout import FakeRollout


def test_a_challenger_is_shown_beside_the_champion(client: TestClient, rollout: FakeRollout) -> None:
    rollout.figures["sha256:intent-3"] = PairFigures(texts=10, agreed=9, disagreed=1)
    answer = client.get("/v1/tasks/intent/comparison").json()
    assert (answer["task"], answer["champion"]) == ("intent", 2)
    (pair,) = answer["pairs"]
    assert (pair["version"], pair["arm"], pair["count"], pair["agreement"]) == (3, "challenger", 10, 0.9)
    assert pair["outcomes"] is None


def test_a_task_without_others_has_no_pairs_and_an_unknown_one_is_404(client: TestClient) -> None:
    assert client.get("/v1/tasks/spam/comparison").json()["pairs"] == []
    assert client.get("/v1/tasks/nothing/comparison").status_code == 404


@pytest.mark.parametrize(
    ("task", "truth", "told"),
    [
        ("intent", {"label": "pay"}, "pay"),
        ("emotion", {"labels": ["joy", "anger", "joy"]}, ["anger", "joy"]),
        ("stars", {"value": 4}, 4.0),
        ("slots", {"spans": [{"label": "city", "start": 0, "end": 5}]}, [["city", 0, 5]]),
    ],
)
def test_the_truth_is_recorded_once(
    client: TestClient, rollout: FakeRollout, task: str, truth: dict[str, Any], told: object
) -> None:
    rollout.kept_answers.add(("r-1", task, 1))
    body = {"request_id": "r-1", "task": task, "input": 1, **truth}
    assert client.post("/v1/feedback", json=body).json() == {"recorded": True}
    assert client.post("/v1/feedback", json=body).json() == {"recorded": False}
    assert rollout.outcomes == {("r-1", task, 1): told}


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"label": "pay"}, 404, "no answer"),
        ({"label": "pay", "task": "nothing"}, 404, 'no task "nothing"'),
        ({}, 400, "exactly one of"),
        ({"label": "pay", "value": 1}, 400, "exactly one of"),
        ({"value": 1}, 422, "report label"),
        ({"label": "dance"}, 422, "no label of task intent"),
        ({"label": 3}, 422, "label must be a text"),
        ({"label": "pay", "input": -1}, 422, "input must be"),
        ({"label": "pay", "request_id": ""}, 422, "request_id must"),
        ({"spans": [{"label": "city", "start": -1, "end": 5}]}, 422, "spans[0].start must be"),
    ],
)
def test_a_truth_that_fits_nothing_is_refused(
    client: TestClient, fields: dict[str, Any], status: int, words: str
) -> None:
    response = client.post("/v1/feedback", json={"request_id": "r-1", "task": "intent"} | fields)
    assert response.status_code == status, response.text
    assert words in response.json()["error"]


def test_another_truth_than_the_first_is_a_conflict(client: TestClient, rollout: FakeRollout) -> None:
    rollout.kept_answers.add(("r-1", "intent", 0))
    body = {"request_id": "r-1", "task": "intent", "label": "pay"}
    client.post("/v1/feedback", json=body)
    assert client.post("/v1/feedback", json=body | {"label": "book"}).status_code == 409
