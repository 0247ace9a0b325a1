"""What auditors read."""

from __future__ import annotations

from dataclasses import replace

from fastapi.testclient import TestClient

from tests.fake_rollout import FakeRollout


def test_every_change_stands_in_the_log_with_its_actor_and_reason(client: TestClient) -> None:
    client.put("/v1/tasks/spam/traffic", json={"champion": 1, "reason": "to be sure"})
    client.put("/v1/tasks/intent/traffic", json={"champion": 3})
    client.post("/v1/tasks/intent/rollback", json={"reason": "no"})
    entries = client.get("/v1/audit").json()["entries"]
    assert [(e["action"], e["task"], e["reason"]) for e in entries] == [
        ("traffic", "spam", "to be sure"),
        ("traffic", "intent", ""),
        ("rollback", "intent", "no"),
    ]
    assert [e["sequence"] for e in entries] == [1, 2, 3]
    assert entries[1]["previous_hash"] == entries[0]["hash"]
    assert entries[0]["actor"] == "anonymous"


def test_the_log_is_read_by_task_and_page(client: TestClient, rollout: FakeRollout) -> None:
    for number in range(5):
        rollout.note("paula", "traffic", "spam" if number % 2 else "intent", "", None)

    def sequences(query: str) -> list[int]:
        return [entry["sequence"] for entry in client.get(f"/v1/audit?{query}").json()["entries"]]

    assert sequences("limit=2") == [1, 2]
    assert sequences("limit=2&after=2") == [3, 4]
    assert sequences("task=spam") == [2, 4]
    assert sequences("after=5") == []
    for query in ("limit=0", "limit=1001", "after=-1", "after=x"):
        assert client.get(f"/v1/audit?{query}").status_code == 422


def test_an_edit_shows(client: TestClient, rollout: FakeRollout) -> None:
    rollout.note("paula", "traffic", "spam", "", None)
    verdict = client.get("/v1/audit/verify").json()
    assert verdict == {"ok": True, "entries": 1, "head": rollout.entries[0].hash, "fault": ""}
    rollout.entries[0] = replace(rollout.entries[0], actor="mallory")
    verdict = client.get("/v1/audit/verify").json()
    assert verdict["ok"] is False
    assert "entry 1" in verdict["fault"]
