"""What operators see of publishing, deciding and moving traffic."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.config import load_settings
from app.errors import ArtifactError
from app.main import create_app
from app.rollout import Role
from tests.fake_rollout import FakeRollout
from tests.fakes import make_runtime

TENSORS = ("files", ("adapter_model.safetensors", b"tensors"))


def manifest(task: str = "spam", **changes: Any) -> tuple[str, tuple[str, bytes]]:
    content = {
        "format_version": 1,
        "task": task,
        "problem_type": "single_label_classification",
        "labels": ["ham", "spam"],
        "readout": {"kind": "mean", "layers": [6]},
        "prefixes": [],
    }
    return ("files", ("manifest.json", json.dumps(content | changes).encode()))


def publish(client: TestClient, task: str = "spam", **changes: Any) -> int:
    response = client.post(f"/v1/tasks/{task}/versions", files=[manifest(task, **changes), TENSORS])
    assert response.status_code == 201, response.text
    version: int = response.json()["version"]
    return version


@pytest.fixture
def approved(client: TestClient, rollout: FakeRollout) -> int:
    """The number of a second version of spam that may go live."""
    rollout.separate = False
    version = publish(client)
    assert client.post(f"/v1/tasks/spam/versions/{version}/approve").status_code == 200
    return version


def test_an_artifact_becomes_a_candidate(client: TestClient, rollout: FakeRollout) -> None:
    response = client.post("/v1/tasks/spam/versions", files=[manifest(), TENSORS], data={"reason": "more data"})
    assert response.status_code == 201
    answer = response.json()
    assert answer == {
        "task": "spam",
        "version": 2,
        "digest": answer["digest"],
        "state": "candidate",
        "size_bytes": answer["size_bytes"],
        "published_by": "anonymous",
        "published_at": 1_700_000_000.0,
        "decided_by": None,
        "decided_at": None,
        "reason": "more data",
        "generation": 8,
    }
    assert answer["digest"].startswith("sha256:")
    assert rollout.files[answer["digest"]] == {
        "manifest.json": manifest()[1][1],
        "adapter_model.safetensors": b"tensors",
    }


def test_the_same_artifact_again_is_no_new_version(client: TestClient) -> None:
    publish(client)
    response = client.post("/v1/tasks/spam/versions", files=[manifest(), TENSORS])
    assert response.status_code == 200
    assert response.json()["version"] == 2


@pytest.mark.parametrize("labels", [["no,yes"], ["no", "yes"], ["no, yes ,"]])
def test_a_folder_straight_from_peft_is_completed_by_options(
    client: TestClient, rollout: FakeRollout, labels: list[str]
) -> None:
    fields = {"problem_type": "single_label_classification", "labels": labels, "input": "pair"}
    response = client.post(
        "/v1/tasks/nli/versions", files=[("files", ("adapter_config.json", b"{}")), TENSORS], data=fields
    )
    assert response.status_code == 201, response.text
    assert rollout.options == {
        "problem_type": "single_label_classification",
        "labels": ["no", "yes"],
        "input": "pair",
    }
    view = client.get("/v1/tasks/nli").json()
    assert (view["traffic"], view["labels"], view["input_kind"]) == (None, ["no", "yes"], "pair")


@pytest.mark.parametrize(
    ("files", "data", "status", "words"),
    [
        pytest.param([], {"reason": "none"}, 422, "files is missing", id="no file"),
        pytest.param([("files", ("../manifest.json", b"{}"))], {}, 422, "is not plain", id="path up"),
        pytest.param([("files", ("a/b.json", b"{}"))], {}, 422, "is not plain", id="folder"),
        pytest.param([("files", (".env", b"{}"))], {}, 422, "is not plain", id="hidden"),
        pytest.param([("files", ("a\\b", b"{}"))], {}, 422, "is not plain", id="backslash"),
        pytest.param([("files", ("ä.json", b"{}"))], {}, 422, "is not plain", id="no ASCII"),
        pytest.param([("files", ("x" * 129, b"{}"))], {}, 422, "is not plain", id="long name"),
        pytest.param([TENSORS, TENSORS], {}, 422, "sent twice", id="twice"),
        pytest.param(
            [("files", (f"f{i}", b"")) for i in range(17)], {}, 422, "files must have at most 16", id="17 files"
        ),
        pytest.param([TENSORS], {"problem_type": "guess"}, 422, "problem_type must be", id="problem type"),
        pytest.param([TENSORS], {"input": "image"}, 422, "input must be", id="input kind"),
        pytest.param([TENSORS], {"label": "a"}, 422, "label is not a field", id="unknown field"),
        pytest.param([TENSORS], {"reason": "x" * 1001}, 422, "reason must have at most 1000", id="long reason"),
        pytest.param([TENSORS], {}, 422, "give it (problem_type)", id="not said"),
        pytest.param([manifest("other")], {}, 422, "of task other", id="another task's"),
    ],
)
def test_what_is_no_artifact_is_refused(
    client: TestClient, rollout: FakeRollout, files: Any, data: dict[str, str], status: int, words: str
) -> None:
    response = client.post("/v1/tasks/spam/versions", files=files, data=data)
    assert response.status_code == status, response.text
    assert words in response.json()["error"]
    assert rollout.files == {}


@pytest.mark.parametrize("task", ["Spam", "a%40b", "%00", ".hidden", "%2E%2E", "sp%20am", "x" * 65, "%C3%A4", "a%0A"])
def test_a_name_that_cannot_be_a_task_is_refused(client: TestClient, rollout: FakeRollout, task: str) -> None:
    response = client.post(f"/v1/tasks/{task}/versions", files=[TENSORS], data={"problem_type": "regression"})
    assert response.status_code in (404, 422)
    assert rollout.files == {}


def test_a_body_that_is_no_form_is_refused(client: TestClient) -> None:
    assert client.post("/v1/tasks/spam/versions", json={"files": []}).status_code == 422
    broken = client.post("/v1/tasks/spam/versions", content=b"x", headers={"content-type": "multipart/form-data"})
    assert broken.status_code == 400


def test_every_fault_of_an_artifact_is_told(
    client: TestClient, rollout: FakeRollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise ArtifactError("spam", ["it holds NaN", "the fingerprint is another backbone's"])

    monkeypatch.setattr(rollout, "publish", refuse)
    response = client.post("/v1/tasks/spam/versions", files=[TENSORS])
    assert response.status_code == 422
    assert "it holds NaN; the fingerprint is another backbone's" in response.json()["error"]


def test_artifacts_have_a_limit_of_their_own() -> None:
    settings = load_settings({"payload_limit_bytes": 2_000, "artifact_limit_bytes": 5_000})
    with TestClient(create_app(settings, make_runtime(settings)), base_url="http://127.0.0.1") as client:
        publish(client, padding="x" * 3_000)
        too_large = client.post("/v1/tasks/spam/versions", files=[manifest(padding="x" * 5_000)])
        assert too_large.status_code == 413
        assert "larger than 5000 bytes" in too_large.json()["error"]
        for path in ("/v1/predict", "/v1/tasks/spam/versions/1/approve"):
            assert client.post(path, json={"reason": "x" * 3_000}).status_code == 413


@pytest.mark.parametrize(("decision", "state"), [("approve", "approved"), ("reject", "rejected")])
def test_a_candidate_is_decided_on_with_a_reason(
    client: TestClient, decision: str, state: str, rollout: FakeRollout
) -> None:
    rollout.separate = False
    version = publish(client)
    response = client.post(f"/v1/tasks/spam/versions/{version}/{decision}", json={"reason": "looked at it"})
    assert response.status_code == 200
    answer = response.json()
    assert (answer["state"], answer["decided_by"], answer["reason"]) == (state, "anonymous", "looked at it")
    assert answer["generation"] == 9
    shown = client.get(f"/v1/tasks/spam/versions/{version}").json()
    assert (shown["state"], shown["decided_by"], shown["arm"]) == (state, "anonymous", None)


def test_an_approved_version_may_be_retired_and_a_live_one_may_not(client: TestClient, approved: int) -> None:
    assert client.post(f"/v1/tasks/spam/versions/{approved}/retire").json()["state"] == "retired"
    live = client.post("/v1/tasks/spam/versions/1/retire")
    assert live.status_code == 409
    assert live.json()["error_type"] == "conflict"


def test_publisher_and_approver_are_two_people(client: TestClient, headers_of: Callable[..., dict[str, str]]) -> None:
    paula = headers_of("paula", Role.PUBLISH, Role.APPROVE)
    anna = headers_of("anna", Role.APPROVE)
    made = client.post("/v1/tasks/spam/versions", files=[manifest(), TENSORS], headers=paula).json()
    assert made["published_by"] == "paula"
    own = client.post("/v1/tasks/spam/versions/2/approve", headers=paula)
    assert own.status_code == 403
    assert own.json()["error_type"] == "forbidden"
    assert client.post("/v1/tasks/spam/versions/2/approve", headers=anna).json()["decided_by"] == "anna"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/tasks/spam/versions/9/approve", 404),
        ("/v1/tasks/nothing/versions/1/approve", 404),
        ("/v1/tasks/spam/versions/0/approve", 422),
        ("/v1/tasks/spam/versions/latest/approve", 422),
        ("/v1/tasks/spam/versions/1/bless", 404),
        ("/v1/tasks/nothing/rollback", 404),
        ("/v1/tasks/spam/rollback", 409),
    ],
)
def test_what_is_not_there_cannot_be_decided_on(client: TestClient, path: str, status: int) -> None:
    response = client.post(path)
    assert response.status_code == status, response.text
    assert response.json()["error"]


def test_traffic_moves_and_is_seen_by_the_next_request(client: TestClient, approved: int) -> None:
    response = client.put("/v1/tasks/spam/traffic", json={"champion": approved, "reason": "better"})
    assert response.status_code == 200
    assert response.json() == {
        "task": "spam",
        "traffic": {"champion": 2, "challengers": [], "shadow": [], "gates": None},
        "previous": [1],
        "generation": 10,
    }
    assert response.headers["etag"] == '"10"'
    predicted = client.post("/v1/predict", json={"inputs": "hello", "tasks": ["spam"]}).json()
    assert predicted["results"][0]["spam"]["version"] == 2
    assert predicted["generation"] == 10


def test_a_canary_in_short_and_at_length(client: TestClient, approved: int) -> None:
    short = client.put("/v1/tasks/spam/traffic", json={"champion": 1, "challenger": 2, "canary_percent": 10})
    assert short.json()["traffic"]["challengers"] == [{"version": 2, "percent": 10.0}]
    gates = {"max_disagreement": 0.1, "max_latency_ratio": 1.5, "min_accuracy_gain": -0.01, "min_count": 50}
    wish = {"champion": 1, "challengers": [{"version": 2, "percent": 12.5}], "gates": gates}
    full = client.put("/v1/tasks/spam/traffic", json=wish).json()["traffic"]
    assert full == wish | {"shadow": [], "gates": gates | {"max_error_rate": None}}
    again = client.put("/v1/tasks/spam/traffic", json=client.get("/v1/tasks/spam").json()["traffic"])
    assert again.json()["traffic"] == full, "what is read can be sent back"


def test_a_candidate_may_be_a_shadow(client: TestClient) -> None:
    version = publish(client)
    response = client.put("/v1/tasks/spam/traffic", json={"champion": 1, "shadow": [version]})
    assert response.json()["traffic"]["shadow"] == [2]
    assert client.get("/v1/tasks/spam/versions/2").json()["arm"] == "shadow"


def test_rollback_takes_one_call(client: TestClient, approved: int) -> None:
    client.put("/v1/tasks/spam/traffic", json={"champion": approved})
    response = client.post("/v1/tasks/spam/rollback", json={"reason": "it was not better"})
    assert response.json()["traffic"]["champion"] == 1
    assert response.headers["etag"] == f'"{response.json()["generation"]}"'


@pytest.mark.parametrize("header", ['"8"', "8", ' "8" '])
def test_a_lost_update_is_impossible(client: TestClient, rollout: FakeRollout, header: str) -> None:
    publish(client)
    assert client.get("/v1/tasks/spam").headers["etag"] == '"8"'
    publish(client, "intent", labels=["book", "cancel", "pay"])
    for method, path, body in (
        ("PUT", "/v1/tasks/spam/traffic", {"champion": 1}),
        ("POST", "/v1/tasks/spam/rollback", None),
        ("POST", "/v1/releases", {"tasks": {"spam": {"champion": 1}}}),
    ):
        stale = client.request(method, path, json=body, headers={"if-match": header})
        assert stale.status_code == 409
        assert stale.json()["error_type"] == "conflict"
        assert "generation 9" in stale.json()["error"]
        assert stale.headers["etag"] == '"9"'


@pytest.mark.parametrize("header", ['"7"', "7", "*"])
def test_the_right_generation_or_any_is_let_through(client: TestClient, header: str) -> None:
    assert client.put("/v1/tasks/spam/traffic", json={"champion": 1}, headers={"if-match": header}).status_code == 200


@pytest.mark.parametrize("header", ["", "latest", 'W/"7"', '"7", "8"', "-1", '"7', '7"', "9" * 30])
def test_an_if_match_that_names_no_generation_is_malformed(client: TestClient, header: str) -> None:
    response = client.put("/v1/tasks/spam/traffic", json={"champion": 1}, headers={"if-match": header})
    assert response.status_code == 400
    assert "if-match must hold one generation" in response.json()["error"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "champion is missing"),
        ({"champion": "1"}, "champion must be"),
        ({"champion": 0}, "champion must be"),
        ({"champion": True}, "champion must be"),
        ({"champion": 10**30}, "champion must be"),
        ({"champion": 1, "challenger": 2}, "must be given together"),
        ({"champion": 1, "canary_percent": 2}, "must be given together"),
        (
            {"champion": 1, "challenger": 2, "canary_percent": 2, "challengers": [{"version": 2, "percent": 2}]},
            "give one of them",
        ),
        ({"champion": 1, "challenger": 2, "canary_percent": 0}, "canary_percent must be"),
        ({"champion": 1, "challenger": 2, "canary_percent": 100.5}, "canary_percent must be"),
        ({"champion": 1, "challengers": [{"version": 2}]}, "challengers[0].percent is missing"),
        ({"champion": 1, "shadow": 5}, "shadow must be a list"),
        ({"champion": 1, "gates": {"max_disagreement": 2}}, "gates.max_disagreement must be"),
        ({"champion": 1, "gates": {"max_disagrement": 0.2}}, "gates.max_disagrement is not a field"),
        ({"champion": 1, "gates": {"min_count": 0}}, "gates.min_count must be"),
        ({"champion": 1, "canary": 5}, "canary is not a field"),
        ({"champion": 1, "reason": "x" * 1001}, "reason must have at most 1000"),
    ],
)
def test_traffic_that_makes_no_sense_is_422(client: TestClient, rollout: FakeRollout, body: Any, words: str) -> None:
    response = client.put("/v1/tasks/spam/traffic", json=body)
    assert response.status_code == 422, response.text
    assert words in response.json()["error"]
    assert rollout.entries == []


def test_a_number_too_large_for_a_float_is_no_gate(client: TestClient) -> None:
    body = b'{"champion": 1, "gates": {"max_latency_ratio": 1e999}}'
    response = client.put("/v1/tasks/spam/traffic", content=body, headers={"content-type": "application/json"})
    assert response.status_code in (400, 422)


def test_where_the_index_is_gone_control_is_503_and_predictions_go_on(client: TestClient, rollout: FakeRollout) -> None:
    rollout.is_down = True
    for response in (
        client.post("/v1/tasks/spam/versions", files=[manifest(), TENSORS]),
        client.post("/v1/tasks/spam/versions/1/approve"),
        client.put("/v1/tasks/spam/traffic", json={"champion": 1}),
        client.post("/v1/tasks/spam/rollback"),
        client.get("/v1/releases"),
        client.get("/v1/audit"),
        client.get("/v1/audit/verify"),
        client.get("/v1/keys"),
        client.get("/v1/tasks/spam/comparison"),
    ):
        assert response.status_code == 503, response.text
        assert response.json()["error_type"] == "unavailable"
    assert client.post("/v1/predict", json={"inputs": "hello"}).status_code == 200
    assert client.get("/v1/tasks/spam").status_code == 200
    assert client.get("/v1/index").json()["up"] is False
