"""What people and programs read of GET /v1/tasks and /info before they ask for predictions."""

from __future__ import annotations

import json
from dataclasses import replace

from fastapi.testclient import TestClient

from app.rollout import State, TaskRecord
from app.service.runtime import Runtime
from tests.fake_rollout import FakeRollout


def test_the_list_names_every_live_task_and_representation(client: TestClient) -> None:
    answer = client.get("/v1/tasks").json()
    assert answer["generation"] == 7
    assert answer["representations"] == ["tiny"]
    by_name = {task["name"]: task for task in answer["tasks"]}
    assert set(by_name) == {"intent", "spam", "emotion", "stars", "slots", "entailment"}
    assert by_name["intent"] == {
        "name": "intent",
        "problem_type": "single_label_classification",
        "input_kind": "text",
        "labels": ["book", "cancel", "pay"],
        "traffic": {"champion": 2, "challengers": [{"version": 3, "percent": 10.0}], "shadow": [], "gates": None},
        "versions": [1, 2, 3],
        "passes": 1.0,
    }
    assert by_name["entailment"]["input_kind"] == "pair"


def test_a_task_shows_its_versions_and_what_they_do(client: TestClient) -> None:
    response = client.get("/v1/tasks/intent")
    answer = response.json()
    assert answer["generation"] == 7 and response.headers["etag"] == '"7"'
    assert answer["previous"] == [] and answer["failures"] == {}
    arms = {view["version"]: (view["state"], view["arm"]) for view in answer["details"]}
    assert arms == {1: ("approved", None), 2: ("approved", "champion"), 3: ("approved", "challenger")}


def test_a_task_of_many_versions_shows_the_live_and_the_newest(client: TestClient, rollout: FakeRollout) -> None:
    intent = rollout.view.tasks["intent"]
    more = {n: replace(intent.versions[1], version=n, digest=f"sha256:intent-{n}") for n in range(4, 500)}
    rollout._put({"intent": replace(intent, versions={**intent.versions, **more})})
    answer = client.get("/v1/tasks/intent?limit=2").json()
    assert [view["version"] for view in answer["details"]] == [2, 3, 498, 499]
    assert len(answer["versions"]) == 499
    assert client.get("/v1/tasks/intent?limit=0").status_code == 422


def test_a_task_without_a_live_version_is_shown_too(client: TestClient, rollout: FakeRollout) -> None:
    spam = rollout.view.tasks["spam"]
    candidate = replace(spam.versions[1], task="toxic", state=State.CANDIDATE, decided_by=None, decided_at=None)
    rollout._put({"toxic": TaskRecord("toxic", {1: candidate})})
    by_name = {task["name"]: task for task in client.get("/v1/tasks").json()["tasks"]}
    assert (by_name["toxic"]["traffic"], by_name["toxic"]["versions"]) == (None, [1])
    (detail,) = client.get("/v1/tasks/toxic").json()["details"]
    assert (detail["state"], detail["arm"], detail["decided_by"]) == ("candidate", None, None)


def test_a_version_that_this_server_cannot_serve_is_told(client: TestClient, runtime: Runtime) -> None:
    runtime.catalog.left_out = {"spam@2": "it is damaged", "spam/odd": "no artifact", "intent@4": "it holds NaN"}
    assert client.get("/v1/tasks/spam").json()["failures"] == {"spam@2": "it is damaged"}


def test_a_version_shows_how_it_reads_who_decided_and_the_figures_that_it_came_with(
    client: TestClient, rollout: FakeRollout
) -> None:
    spam = rollout.view.tasks["spam"]
    card = json.loads(spam.versions[1].card) | {"evaluation": {"test": {"accuracy": 0.97}}}
    measured = replace(spam.versions[1], card=json.dumps(card))
    rollout._put({"spam": replace(spam, versions={1: measured})})
    view = client.get("/v1/tasks/spam/versions/1").json()
    assert view["digest"] == "sha256:spam-1"
    assert view["readout"] == {"kind": "mean", "layers": [6], "num_queries": 0, "num_members": 1}
    assert view["prefixes"] == []
    assert view["evaluation"] == {"test": {"accuracy": 0.97}}
    assert (view["task"], view["version"], view["state"], view["arm"]) == ("spam", 1, "approved", "champion")
    assert (view["published_by"], view["published_at"]) == ("paula", 1_700_000_000.0)
    assert (view["decided_by"], view["decided_at"], view["size_bytes"]) == ("anna", 1_700_000_100.0, 1000)


def test_what_is_not_there_is_404_and_names_what_is(client: TestClient) -> None:
    missing = client.get("/v1/tasks/wether")
    assert missing.status_code == 404
    assert "emotion" in missing.json()["error"]
    assert client.get("/v1/tasks/spam/versions/4").json() == {
        "error": "task spam has no version 4; its newest are 1",
        "error_type": "not_found",
    }
    assert "representation" in client.get("/v1/tasks/tiny").json()["error"]


def test_a_version_that_is_no_number_is_422(client: TestClient) -> None:
    for number in ("latest", "0", "-1", "1.5"):
        response = client.get(f"/v1/tasks/spam/versions/{number}")
        assert response.status_code == 422
        assert response.json()["error"].startswith("version must be")


def test_a_name_with_odd_bytes_is_only_unknown(client: TestClient) -> None:
    for name in ("%ff%fe", "%00", "a%40b", "x" * 200):
        assert client.get(f"/v1/tasks/{name}").status_code == 404
    assert client.get(f"/v1/tasks/{'x' * 201}").status_code == 422


def test_info_tells_the_backbone_what_is_live_and_the_limits(client: TestClient) -> None:
    answer = client.get("/info").json()
    assert answer["backbone"]["name"] == "tiny" and answer["backbone"]["hidden_size"] == 4
    assert answer["tasks"] == ["emotion", "entailment", "intent", "slots", "spam", "stars"]
    assert answer["limits"]["max_client_batch_size"] == 32
    assert answer["left_out"] == {}


def test_probes_and_docs_answer(client: TestClient) -> None:
    assert client.get("/livez").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ok"}
    details = client.get("/healthz").json()
    assert details.pop("index_staleness_s") >= 0
    assert details == {
        "status": "ok", "generation": 7, "tasks": 6, "queue_rows": 0, "in_flight": 0, "index_up": True
    }  # fmt: skip
    assert client.get("/docs").status_code == 200
