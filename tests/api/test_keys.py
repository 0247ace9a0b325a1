"""Keys as administrators see them: made once, listed without their secrets, revoked at once."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.fake_rollout import FakeRollout


@pytest.fixture
def root(client: TestClient) -> dict[str, str]:
    """The header of the first key, which its maker needed none for."""
    made = client.post("/v1/keys", json={"name": "root", "roles": ["admin"]})
    assert made.status_code == 201, made.text
    return {"authorization": f"Bearer {made.json()['token']}"}


def test_the_first_key_closes_the_door_behind_it(client: TestClient, root: dict[str, str]) -> None:
    assert client.get("/v1/keys").status_code == 401
    assert client.get("/v1/keys", headers=root).status_code == 200


def test_a_token_is_shown_once_and_works(client: TestClient, root: dict[str, str], rollout: FakeRollout) -> None:
    response = client.post("/v1/keys", json={"name": "shop", "roles": ["predict", "audit"]}, headers=root)
    assert response.status_code == 201
    made = response.json()
    assert response.headers["cache-control"] == "no-store"
    assert (made["name"], sorted(made["roles"]), made["created_by"]) == ("shop", ["audit", "predict"], "root")
    shop = {"authorization": f"Bearer {made['token']}"}
    assert client.post("/v1/predict", json={"inputs": "hello"}, headers=shop).status_code == 200
    listed = client.get("/v1/keys", headers=root)
    assert {key["name"] for key in listed.json()["keys"]} == {"root", "shop"}
    assert all(set(key) == {"id", "name", "roles", "created_by", "created_at"} for key in listed.json()["keys"])
    secret = made["token"].rpartition("_")[2]
    assert secret not in listed.text and rollout.view.keys[made["id"]].hash not in listed.text


def test_a_revoked_key_opens_nothing(client: TestClient, root: dict[str, str]) -> None:
    made = client.post("/v1/keys", json={"name": "shop", "roles": ["predict"]}, headers=root).json()
    response = client.delete(f"/v1/keys/{made['id']}", headers=root)
    assert response.status_code == 204 and response.content == b""
    shop = {"authorization": f"Bearer {made['token']}"}
    assert client.post("/v1/predict", json={"inputs": "hello"}, headers=shop).status_code == 401
    assert client.delete(f"/v1/keys/{made['id']}", headers=root).status_code == 404


def test_nobody_can_be_locked_out(client: TestClient, rollout: FakeRollout) -> None:
    first = client.post("/v1/keys", json={"name": "shop", "roles": ["predict"]})
    assert first.status_code == 409
    assert "role admin" in first.json()["error"]
    made = client.post("/v1/keys", json={"name": "root", "roles": ["admin"]}).json()
    last = client.delete(f"/v1/keys/{made['id']}", headers={"authorization": f"Bearer {made['token']}"})
    assert last.status_code == 409
    assert list(rollout.view.keys) == [made["id"]]


def test_no_two_keys_share_a_name(client: TestClient, root: dict[str, str]) -> None:
    assert client.post("/v1/keys", json={"name": "root", "roles": ["audit"]}, headers=root).status_code == 409


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"name": "shop"}, "roles is missing"),
        ({"name": "shop", "roles": []}, "roles must have at least 1"),
        ({"name": "shop", "roles": ["root"]}, "roles[0] must be"),
        ({"name": "shop", "roles": "predict"}, "roles must be a list"),
        ({"name": "", "roles": ["predict"]}, "name must match"),
        ({"name": "a\nb", "roles": ["predict"]}, "name must match"),
        ({"name": "x" * 101, "roles": ["predict"]}, "name must match"),
    ],
)
def test_a_key_that_makes_no_sense_is_422(client: TestClient, body: Any, words: str) -> None:
    response = client.post("/v1/keys", json=body)
    assert response.status_code == 422
    assert words in response.json()["error"]
