"""What administrators see: keys, and how a server stands to the index."""

from __future__ import annotations

import pytest

from app.rollout import EMPTY_VIEW
from tests.client.conftest import Run
from tests.fake_rollout import FakeRollout


def test_a_key_is_shown_once_listed_and_revoked(run: Run, rollout: FakeRollout) -> None:
    assert "no keys" in run("keys", "list").out
    done = run("keys", "create", "olga", "--role", "admin", "--role", "operate")
    (key,) = rollout.view.keys.values()
    token = next(line for line in done.out.splitlines() if line.startswith("mf_"))
    assert f"key {key.id} of olga" in done.out and "MANIFOLD_KEY" in done.out
    made = run("keys", "create", "shop", "--role", "predict", "--json", "--key", token).answer
    assert made["token"].startswith("mf_") and made["roles"] == ["predict"]
    listed = run("keys", "list", "--key", token).out
    assert "olga" in listed and "shop" in listed and "mf_" not in listed
    assert f"key {made['id']} is revoked" in run("keys", "revoke", made["id"], "--key", token).out
    assert made["id"] not in rollout.view.keys
    assert run("keys", "revoke", "nothing", "--key", token).status == 1


def test_the_first_key_must_be_an_administrators(run: Run) -> None:
    done = run("keys", "create", "shop", "--role", "predict")
    assert done.status == 1 and "admin" in done.err


def test_an_unknown_role_is_told_with_the_usage(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("keys", "create", "x", "--role", "king")
    assert "king" in capsys.readouterr().err


def test_the_index_is_described(run: Run, rollout: FakeRollout) -> None:
    out = run("index").out
    assert "redis://index:6379/0 answers: generation 7, read 0.5 s ago" in out
    assert "spam@9" in out and "server-1" in out and "its content is damaged" in out
    rollout.is_down = True
    assert "DOES NOT ANSWER" in run("index").out
    done = run("rollback", "spam")
    assert done.status == 1 and "the index does not answer" in done.err


@pytest.mark.parametrize("action", ["restore", "accept"])
def test_what_the_index_lost_is_settled(run: Run, rollout: FakeRollout, action: str) -> None:
    rollout.lost = EMPTY_VIEW
    out = run("index").out
    assert "the index was emptied" in out and "manifold index restore, or manifold index accept" in out
    done = run("index", action, "--reason", "after the backup")
    assert done.status == 0 and "the index " in done.out
    assert rollout.entries[-1].reason == "after the backup"
    again = run("index", action)
    assert again.status == 1 and "lost nothing" in again.err
