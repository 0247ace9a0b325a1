"""Several tasks' traffic in one change."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient

from tests.fake_rollout import FakeRollout

BODY = {
    "tasks": {"intent": {"champion": 3}, "spam": {"champion": 1, "shadow": []}},
    "reason": "the spring release",
}


def test_a_release_changes_all_its_tasks_in_one_generation(client: TestClient) -> None:
    response = client.post("/v1/releases", json=BODY)
    assert response.status_code == 201, response.text
    made = response.json()
    assert (made["created_by"], made["reason"], made["generation"]) == ("anonymous", "the spring release", 8)
    assert made["before"]["intent"]["champion"] == 2
    assert made["before"]["intent"]["challengers"] == [{"version": 3, "percent": 10.0}]
    assert made["after"]["intent"] == {"champion": 3, "challengers": [], "shadow": [], "gates": None}
    assert made["rolled_back_by"] is None
    assert response.headers["etag"] == '"8"'
    assert client.get("/v1/tasks/intent").json()["traffic"]["champion"] == 3


def test_one_impossible_wish_and_nothing_changes(client: TestClient) -> None:
    response = client.post("/v1/releases", json={"tasks": BODY["tasks"] | {"stars": {"champion": 9}}})  # type: ignore[operator]
    assert response.status_code == 404
    assert client.get("/v1/tasks/intent").json()["traffic"]["champion"] == 2


def test_a_release_is_rolled_back_whole(client: TestClient) -> None:
    made = client.post("/v1/releases", json=BODY).json()
    undone = client.post(f"/v1/releases/{made['id']}/rollback", json={"reason": "no"})
    assert undone.status_code == 200
    assert undone.json()["rolled_back_by"] == "anonymous"
    assert client.get("/v1/tasks/intent").json()["traffic"]["champion"] == 2


def test_a_release_whose_task_was_changed_since_stays(client: TestClient) -> None:
    made = client.post("/v1/releases", json=BODY).json()
    client.put("/v1/tasks/intent/traffic", json={"champion": 1})
    refused = client.post(f"/v1/releases/{made['id']}/rollback")
    assert refused.status_code == 409
    assert "intent" in refused.json()["error"]


def test_releases_are_listed_newest_first(client: TestClient, rollout: FakeRollout) -> None:
    ids = [client.post("/v1/releases", json=BODY).json()["id"] for _ in range(3)]
    assert [made["id"] for made in client.get("/v1/releases").json()["releases"]] == ids[::-1]
    assert [made["id"] for made in client.get("/v1/releases?limit=1").json()["releases"]] == ids[-1:]
    assert client.get("/v1/releases?limit=0").status_code == 422


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"tasks": {}}, "tasks"),
        ({}, "tasks is missing"),
        ({"tasks": {"spam": {"champion": 1, "reason": "r"}}}, "tasks.spam.reason is not a field"),
        ({"tasks": {"spam": {"champion": 1, "challenger": 2}}}, "must be given together"),
    ],
)
def test_a_release_that_makes_no_sense_is_422(client: TestClient, body: object, words: str) -> None:
    response = client.post("/v1/releases", json=body)
    assert response.status_code == 422
    assert words in response.json()["error"]


def test_an_unknown_release_is_404(client: TestClient) -> None:
    assert client.post("/v1/releases/none/rollback").status_code == 404
