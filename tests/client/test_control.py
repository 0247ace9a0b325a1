"""What operators see of deciding on versions and of moving a task's traffic."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from app.cli import main
from app.client.control import GATES, Reference, promoted, with_canary, with_shadow
from app.errors import NotFoundError
from app.rollout import Gates
from tests.client.conftest import Run, write_folder
from tests.client.recorded import answering
from tests.fake_rollout import FakeRollout

TRAFFIC: dict[str, Any] = {
    "champion": 2,
    "challengers": [{"version": 3, "percent": 10.0}, {"version": 4, "percent": 5.0}],
    "shadow": [5, 6],
    "gates": {"max_error_rate": 0.1, "min_count": 100},
}


def test_a_version_goes_its_way_from_candidate_to_champion_and_back(
    run: Run, folder: Path, rollout: FakeRollout
) -> None:
    run("publish", str(folder))
    assert "spam@2 is approved (generation 9)" in run("approve", "spam@2", "--reason", "looks good").out
    assert rollout.view.tasks["spam"].versions[2].reason == "looks good"
    assert "spam: champion 1, shadow 2 (generation 10)" in run("shadow", "spam@2").out
    assert "spam: champion 1 (generation 11)" in run("shadow", "spam@2", "--off").out
    done = run("canary", "spam@2", "10", "--max-disagreement", "0.2", "--min-count", "50")
    assert "spam: champion 1, challenger 2 at 10 % (generation 12)" in done.out
    assert "gates: max_disagreement 0.2, min_count 50" in done.out
    done = run("canary", "spam@2", "2.5", "--max-error-rate", "0.01")
    assert "challenger 2 at 2.5 %" in done.out
    assert "gates: max_disagreement 0.2, max_error_rate 0.01, min_count 50" in done.out
    assert "gates" not in run("canary", "spam@2", "3", "--no-gates").out
    assert "spam: champion 2 (generation 15)" in run("promote", "spam@2").out
    assert "spam: champion 1 (generation 16)" in run("rollback", "spam", "--reason", "complaints").out


def test_a_canary_ends_with_0_percent(run: Run) -> None:
    assert "intent: champion 2 (generation 8)" in run("canary", "intent@3", "0").out
    done = run("canary", "intent@3", "0")
    assert done.status == 1 and "intent@3 is no challenger" in done.err


def test_a_version_is_rejected_or_retired(run: Run, folder: Path, tmp_path: Path, second: str) -> None:
    assert "spam@2 is retired" in run("retire", second).out
    run("publish", str(write_folder(tmp_path / "third", tensors=b"other")))
    done = run("reject", "spam@3", "--json")
    assert done.answer["state"] == "rejected"


def test_the_first_champion_of_a_task_is_promoted(run: Run, tmp_path: Path) -> None:
    run("publish", str(write_folder(tmp_path / "new", "new")), "--approve")
    done = run("canary", "new@1", "10")
    assert done.status == 1 and "no version of task new is live yet: promote one first" in done.err
    assert "new: champion 1" in run("promote", "new@1").out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["approve", "spam@9"], "task spam has no version 9"),
        (["promote", "nothing@1"], 'there is no task "nothing"'),
        (["canary", "intent@1", "100.5"], "percent must be"),
        (["canary", "intent@1", "nan"], ""),
        (["shadow", "intent@1", "--off"], "intent@1 is no shadow"),
        (["shadow", "intent@3"], "3"),
        (["rollback", "spam"], "no champion before"),
        (["rollback", "spam", "--if-match", "3"], "generation 7"),
    ],
)
def test_what_cannot_be_is_one_sentence(run: Run, arguments: list[str], sentence: str) -> None:
    done = run(*arguments)
    assert (done.status, done.out, done.err.count("\n")) == (1, "", 1)
    assert sentence in done.err


@pytest.mark.parametrize("text", ["spam", "spam@", "@3", "spam@0", "spam@-1", "spam@x", "spam@²"])
def test_what_is_no_version_is_told_with_the_usage(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["approve", text])
    assert stopped.value.code == 2
    assert f'"{text}" is not a version like spam@3' in capsys.readouterr().err


def test_a_change_that_somebody_else_was_faster_with_is_refused(run: Run) -> None:
    view = {"name": "spam", "traffic": TRAFFIC, "generation": 16}
    answers = {"GET /v1/tasks/spam": [(200, view)], "PUT /v1/tasks/spam/traffic": [(409, {"error": "at 17 now"})]}
    with answering(answers) as server:
        done = run("promote", "spam@3", "--url", server.url)
    assert (done.status, done.err) == (1, "manifold: at 17 now\n")
    assert [headers.get("if-match") for _, _, headers in server.asked] == [None, '"16"']  # and is not tried again


def test_promoting_leaves_other_challengers_and_shadows() -> None:
    assert promoted(TRAFFIC, 3) == {**TRAFFIC, "champion": 3, "challengers": [{"version": 4, "percent": 5.0}]}
    assert promoted(TRAFFIC, 6) == {**TRAFFIC, "champion": 6, "shadow": [5]}
    alone = {**TRAFFIC, "challengers": [{"version": 4, "percent": 5.0}]}
    assert promoted(alone, 4) == {"champion": 4, "challengers": [], "shadow": [5, 6], "gates": None}
    assert promoted(None, 4) == {"champion": 4}


def test_a_canary_leaves_other_challengers() -> None:
    gates = TRAFFIC["gates"]
    grown = with_canary(TRAFFIC, Reference("spam", 3), 20.0, gates)
    assert grown == {**TRAFFIC, "challengers": [{"version": 3, "percent": 20.0}, {"version": 4, "percent": 5.0}]}
    from_shadow = with_canary(TRAFFIC, Reference("spam", 5), 1.0, gates)
    assert from_shadow["challengers"][-1] == {"version": 5, "percent": 1.0} and from_shadow["shadow"] == [6]
    ended = with_canary(TRAFFIC, Reference("spam", 3), 0, gates)
    assert ended["challengers"] == [{"version": 4, "percent": 5.0}] and ended["gates"] == gates


def test_a_shadow_is_named_once() -> None:
    assert with_shadow(TRAFFIC, Reference("spam", 5), is_off=False) == {**TRAFFIC, "shadow": [6, 5]}
    assert with_shadow(TRAFFIC, Reference("spam", 5), is_off=True) == {**TRAFFIC, "shadow": [6]}
    with pytest.raises(NotFoundError):
        with_shadow(TRAFFIC, Reference("spam", 9), is_off=True)


def test_every_gate_has_an_option() -> None:
    assert set(GATES) == {gate.name for gate in fields(Gates)}
