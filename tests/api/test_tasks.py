"""What people and programs read of GET /v1/tasks and /info before they ask for predictions."""

from __future__ import annotations

from fastapi.testclient import TestClient


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
        "traffic": {"champion": 2, "challenger": 3},
        "versions": [1, 2, 3],
        "passes": 1.0,
    }
    assert by_name["entailment"]["input_kind"] == "pair"


def test_a_task_shows_its_versions_and_their_states(client: TestClient) -> None:
    answer = client.get("/v1/tasks/intent").json()
    assert answer["generation"] == 7
    states = {view["version"]: view["state"] for view in answer["details"]}
    assert states == {1: "approved", 2: "champion", 3: "challenger"}


def test_a_version_shows_how_it_reads_and_the_figures_that_it_came_with(client: TestClient) -> None:
    view = client.get("/v1/tasks/spam/versions/1").json()
    assert view["digest"] == "sha256:spam-1"
    assert view["readout"] == {"kind": "mean", "layers": [6], "num_queries": 0}
    assert view["prefixes"] == []
    assert view["evaluation"] == {"test": {"accuracy": 0.97}}


def test_what_is_not_there_is_404_and_names_what_is(client: TestClient) -> None:
    missing = client.get("/v1/tasks/wether")
    assert missing.status_code == 404
    assert "emotion" in missing.json()["error"]
    assert client.get("/v1/tasks/spam/versions/4").json() == {
        "error": "task spam has no version 4; those live are 1",
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
    assert client.get("/healthz").json() == {
        "status": "ok", "generation": 7, "tasks": 6, "queue_rows": 0, "in_flight": 0
    }  # fmt: skip
    assert client.get("/docs").status_code == 200
