"""What operators see of releases, those from `manifold pack` too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from app.client import releases
from app.domain import content_digest
from tests.client.conftest import Run, write_folder
from tests.client.recorded import answering
from tests.fake_rollout import FakeRollout


@pytest.fixture
def proposal(tmp_path: Path) -> Path:
    """A new version of spam, a task that is new, and one that stays as it is; as `manifold pack` writes them."""
    folder = tmp_path / "proposal"
    tasks: dict[str, Any] = {"stars": {"is_new": False, "digest": "sha256:stars-1"}}
    for task in ("spam", "tone"):
        written = write_folder(folder / task, task)
        files = {path.name: path.read_bytes() for path in written.iterdir() if path.suffix != ".html"}
        tasks[task] = {"is_new": True, "digest": content_digest(files)}
    (folder / "release.json").write_text(json.dumps({"tasks": tasks, "passes": {"before": 2.0, "after": 1.0}}))
    return folder


def test_a_proposal_is_published_and_released_by_one_command(run: Run, proposal: Path, rollout: FakeRollout) -> None:
    done = run("releases", "create", str(proposal), "--reason", "one pass")
    assert done.status == 0, done.err
    assert "spam@2 is published" in done.out and "tone@1 is published" in done.out
    assert "champion 1" in done.out and "nothing live" in done.out  # before
    assert "release r1 (generation 12)" in done.out and "manifold releases rollback r1" in done.out
    live = {name: task.traffic.champion for name, task in rollout.view.tasks.items() if task.traffic}
    assert (live["spam"], live["tone"], live["stars"]) == (2, 1, 1)
    assert rollout.made[0].reason == "one pass"


def test_where_somebody_else_must_approve_the_same_command_goes_on(
    run: Run, proposal: Path, rollout: FakeRollout
) -> None:
    rollout.separate = True
    done = run("releases", "create", str(proposal))
    assert done.status == 1 and "spam@2 is published and not approved" in done.err
    assert rollout.made == []
    rollout.separate = False
    assert run("approve", "spam@2").status == run("approve", "tone@1").status == 0
    done = run("releases", "create", str(proposal), "--json")
    assert done.status == 0 and done.answer["after"]["spam"]["champion"] == 2


def test_a_proposal_that_was_changed_is_not_sent(run: Run, proposal: Path, rollout: FakeRollout) -> None:
    (proposal / "spam" / "adapter_model.safetensors").write_bytes(b"changed")
    done = run("releases", "create", str(proposal))
    assert done.status == 1 and "other files of spam: pack again" in done.err
    assert rollout.files == {}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is not JSON"),
        ("[]", "does not hold a JSON object"),
        ("{}", "is not what `manifold pack` writes"),
        ('{"tasks": {"spam": 1}}', "is not what"),
        ('{"tasks": {}}', "proposes no new version"),
    ],
)
def test_a_folder_that_is_no_proposal_is_one_sentence(run: Run, tmp_path: Path, content: str, sentence: str) -> None:
    (tmp_path / "release.json").write_text(content)
    done = run("releases", "create", str(tmp_path))
    assert done.status == 1 and sentence in done.err and done.err.count("\n") == 1


def test_a_folder_without_a_proposal_is_told(run: Run, tmp_path: Path) -> None:
    assert "release.json cannot be read: No such file" in run("releases", "create", str(tmp_path)).err


def test_a_file_names_the_traffic_of_each_task(run: Run, tmp_path: Path, second: str, rollout: FakeRollout) -> None:
    file = tmp_path / "release.json"
    intent = {"champion": 3, "shadow": [2]}
    file.write_text(json.dumps({"tasks": {"spam": {"champion": 2}, "intent": intent}, "reason": "together"}))
    stale = run("releases", "create", str(file), "--if-match", "7")
    assert stale.status == 1 and "generation" in stale.err
    done = run("releases", "create", str(file), "--if-match", "9")
    assert done.status == 0, done.err
    assert "champion 3, shadow 2" in done.out
    assert rollout.made[0].reason == "together"
    listed = run("releases", "list").out
    assert "r1" in listed and "spam, intent" in listed and "together" in listed and "2023-11-14 22:13:20Z" in listed


def test_a_release_is_rolled_back(run: Run, tmp_path: Path, second: str) -> None:
    file = tmp_path / "release.json"
    file.write_text(json.dumps({"tasks": {"spam": {"champion": 2}}}))
    run("releases", "create", str(file))
    done = run("releases", "rollback", "r1", "--reason", "complaints")
    assert done.status == 0
    assert "release r1 is rolled back" in done.out and "spam: champion 1" in done.out
    assert run("releases", "rollback", "r9").err == "manifold: there is no release r9\n"


def test_it_waits_until_the_server_has_followed(run: Run, proposal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def record(task: str, version: int, generation: int) -> dict[str, Any]:
        return {"task": task, "version": version, "state": "approved", "generation": generation}

    spam = {"champion": 1, "challengers": [], "shadow": [], "gates": None}
    tasks = [{"name": "spam", "traffic": spam}]
    release = {"id": "r1", "generation": 22, "before": {}, "after": {}}
    answers: dict[str, list[tuple[int, Any]]] = {
        "POST /v1/tasks/spam/versions": [(201, record("spam", 2, 20))],
        "POST /v1/tasks/tone/versions": [(201, record("tone", 1, 21))],
        "GET /v1/tasks": [(200, {"generation": 19, "tasks": []}), (200, {"generation": 21, "tasks": tasks})],
        "POST /v1/releases": [(201, release)],
    }
    with answering(answers) as server:
        assert run("releases", "create", str(proposal), "--url", server.url).status == 0
    assert server.asked[-1][2]["if-match"] == '"21"'

    monkeypatch.setattr(releases, "_WAIT_S", 0.0)
    with answering({**answers, "GET /v1/tasks": [(200, {"generation": 19, "tasks": []})]}) as server:
        done = run("releases", "create", str(proposal), "--url", server.url)
    assert done.status == 1 and "still at generation 19 of 21" in done.err
