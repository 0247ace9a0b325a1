"""What whoever gets an artifact over HTTP sees: the files as they were handed in, one tar of them."""

from __future__ import annotations

import asyncio
import io
import tarfile
from collections.abc import Callable, Mapping

import pytest
from fastapi.testclient import TestClient

from app.domain import content_digest
from app.errors import ArtifactError
from app.rollout import Role, VersionRecord
from tests.api.test_control import manifest
from tests.fake_rollout import FakeRollout

FILES = {
    "manifest.json": manifest()[1][1],
    "adapter_model.safetensors": bytes(range(256)) * 1000,
    "adapter_config.json": b"{}",
}
PATH = "/v1/tasks/spam/versions/2/artifact"


@pytest.fixture
def published(client: TestClient) -> None:
    """The files are version 2 of spam."""
    response = client.post("/v1/tasks/spam/versions", files=[("files", named) for named in FILES.items()])
    assert response.json()["version"] == 2


def test_the_files_come_back_byte_for_byte_in_one_tar(client: TestClient, published: None) -> None:
    response = client.get(PATH)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/x-tar"
    assert response.headers["etag"] == f'"{content_digest(FILES)}"'
    assert response.headers["content-disposition"] == 'attachment; filename="spam-2.tar"'
    with tarfile.open(fileobj=io.BytesIO(response.content), mode="r:") as tar:
        members = tar.getmembers()
        arrived = {member.name: file.read() for member in members if (file := tar.extractfile(member)) is not None}
    assert arrived == FILES
    assert [member.name for member in members] == sorted(FILES)
    assert {(member.mtime, member.mode, member.uid, member.uname) for member in members} == {(0, 0o644, 0, "")}


def test_the_same_version_is_the_same_bytes(client: TestClient, published: None) -> None:
    assert client.get(PATH).content == client.get(PATH).content


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/v1/tasks/spam/versions/9/artifact", 404, "task spam has no version 9"),
        ("/v1/tasks/nothing/versions/1/artifact", 404, 'there is no task "nothing"'),
        ("/v1/tasks/tiny/versions/1/artifact", 404, '"tiny" is a representation'),
        ("/v1/tasks/spam/versions/1/artifact", 404, "the artifact store has no artifact"),
        ("/v1/tasks/spam/versions/two/artifact", 422, "version"),
    ],
)
def test_what_is_not_there_is_said(client: TestClient, path: str, status: int, words: str) -> None:
    response = client.get(path)
    assert response.status_code == status and words in response.json()["error"]


def test_a_store_out_of_reach_is_503(client: TestClient, published: None, rollout: FakeRollout) -> None:
    rollout.is_down = True
    response = client.get(PATH)
    assert (response.status_code, response.json()["error_type"]) == (503, "unavailable")


def test_a_damaged_artifact_is_not_handed_out(
    client: TestClient, published: None, rollout: FakeRollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(task: str, version: int) -> tuple[VersionRecord, Mapping[str, bytes]]:
        raise ArtifactError("sha256:…", ["manifest.json is damaged in the artifact store"])

    monkeypatch.setattr(rollout, "artifact", damaged)
    response = client.get(PATH)
    assert response.status_code == 422 and "manifest.json is damaged" in response.json()["error"]


def test_predictions_are_not_held_up(
    client: TestClient, published: None, rollout: FakeRollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = rollout.artifact

    def off_the_loop(task: str, version: int) -> tuple[VersionRecord, Mapping[str, bytes]]:
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()
        return read(task, version)

    monkeypatch.setattr(rollout, "artifact", off_the_loop)
    assert client.get(PATH).status_code == 200


@pytest.mark.parametrize("role", list(Role))
def test_who_changes_versions_or_traffic_may_get_artifacts(
    client: TestClient, published: None, headers_of: Callable[..., dict[str, str]], role: Role
) -> None:
    response = client.get(PATH, headers=headers_of("someone", role))
    if role in (Role.PREDICT, Role.AUDIT):
        assert response.status_code == 403
        assert f"the role publish or approve or operate, and someone has {role}" in response.json()["error"]
    else:
        assert response.status_code == 200
    assert client.get(PATH).status_code == 401


def test_the_route_has_one_name_in_the_metrics(client: TestClient, published: None) -> None:
    client.get(PATH)
    client.get("/v1/tasks/nothing/versions/1/artifact")
    shown = client.get("/metrics").text
    for code in (200, 404):
        route = "/v1/tasks/{task}/versions/{version}/artifact"
        assert f'manifold_requests_total{{code="{code}",route="{route}"}} 1.0' in shown
