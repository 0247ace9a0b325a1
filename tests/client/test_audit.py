"""What auditors see."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.client.conftest import Run
from tests.fake_rollout import FakeRollout


def test_the_newest_entries_are_shown(run: Run, second: str, rollout: FakeRollout) -> None:
    run("promote", second, "--reason", "it is better")
    out = run("audit").out
    assert "publish" in out and "2023-11-14 22:13:20Z" in out and "anonymous" in out
    assert "champion 2" in out and "it is better" in out
    assert [entry["sequence"] for entry in run("audit", "--limit", "1", "--json").answer["entries"]] == [3]
    assert [entry["sequence"] for entry in run("audit", "--after", "1", "--json").answer["entries"]] == [2, 3]
    assert run("audit", "--task", "intent", "--json").answer == {"entries": []}


def test_a_log_of_many_pages_is_read_to_its_end(
    run: Run, rollout: FakeRollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.client.audit._PAGE", 2)
    for number in range(5):
        rollout.note("anna", "note", None, f"{number}", None)
    entries = run("audit", "--limit", "3", "--json").answer["entries"]
    assert [entry["reason"] for entry in entries] == ["2", "3", "4"]


def test_a_whole_log_is_verified_and_its_head_can_be_kept(run: Run, second: str, rollout: FakeRollout) -> None:
    out = run("audit", "--verify").out
    assert "the log is whole: 2 entries" in out
    head = out.split("head ")[1].split()[0]
    run("promote", second)
    assert run("audit", "--expect", head).status == 0
    rollout.entries.pop(1)
    done = run("audit", "--expect", head)
    assert done.status == 1 and "the log is NOT what was written" in done.out


def test_a_log_that_was_cut_shows_beside_the_head_kept_elsewhere(run: Run, second: str, rollout: FakeRollout) -> None:
    head = run("audit", "--verify").out.split("head ")[1].split()[0]
    del rollout.entries[1:]
    assert run("audit", "--verify").status == 0  # whoever cut it made it whole again
    done = run("audit", "--expect", head, "--json")
    assert done.status == 1
    assert done.answer["ok"] is False and "ends before entry 2" in done.answer["fault"]


def test_an_edit_is_told(run: Run, second: str, rollout: FakeRollout) -> None:
    rollout.entries[0] = replace(rollout.entries[0], actor="nobody")
    done = run("audit", "--verify")
    assert done.status == 1 and "entry 1 was edited" in done.out


def test_an_empty_log_is_whole(run: Run) -> None:
    out = run("audit", "--verify").out
    assert "0 entries" in out
    assert run("audit", "--expect", out.split("head ")[1].split()[0]).status == 0


def test_what_is_no_head_is_told_with_the_usage(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("audit", "--expect", "abc")
    assert "not a head" in capsys.readouterr().err
