"""What operators see of the index, and what they decide after it lost something."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fastapi.testclient import TestClient

from tests.fake_rollout import FakeRollout


def test_the_state_of_the_index_is_shown(client: TestClient) -> None:
    assert client.get("/v1/index").json() == {
        "url": "redis://index:6379/0",
        "up": True,
        "index_id": "index",
        "generation": 7,
        "staleness_s": 0.5,
        "regressed": None,
        "failures": {"spam@9": {"server-1": "its content is damaged"}},
    }


def test_what_the_index_lost_is_written_back(client: TestClient, rollout: FakeRollout) -> None:
    rollout.lost = rollout.view
    rollout._show(replace(rollout.view, tasks={}))
    assert client.get("/v1/index").json()["regressed"] == "the index was emptied"
    assert client.post("/v1/index/restore", json={"reason": "it was a mistake"}).json() == {"generation": 9}
    assert client.get("/v1/tasks/spam").status_code == 200
    assert client.get("/v1/index").json()["regressed"] is None


def test_a_loss_may_be_accepted(client: TestClient, rollout: FakeRollout) -> None:
    rollout.lost = rollout.view
    assert client.post("/v1/index/accept").status_code == 200
    assert rollout.lost is None


@pytest.mark.parametrize("decision", ["restore", "accept"])
def test_where_nothing_was_lost_there_is_nothing_to_decide(client: TestClient, decision: str) -> None:
    assert client.post(f"/v1/index/{decision}").status_code == 409
    assert client.post(f"/v1/index/{decision}", json={"why": "x"}).status_code == 422
