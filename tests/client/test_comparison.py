"""What is read of versions side by side, and how the truth is told."""

from __future__ import annotations

from collections import Counter

import pytest

from app.registry.comparison import ArmFigures, PairFigures
from tests.client.conftest import Run
from tests.fake_rollout import FakeRollout


def test_a_challenger_is_shown_beside_the_champion(run: Run, rollout: FakeRollout) -> None:
    rollout.figures["sha256:intent-3"] = PairFigures(
        champion=ArmFigures(texts=100, requests=50, seconds=0.2, labels=Counter(book=60, pay=40), judged=20, right=15),
        other=ArmFigures(texts=101, errors=1, requests=50, seconds=0.3, labels=Counter(book=50, pay=50), judged=20),
        texts=100,
        agreed=90,
        disagreed=10,
        differences=100,
        difference=2.0,
        largest_difference=0.5,
        judged=20,
        both_right=10,
        only_champion_right=5,
        only_other_right=1,
    )
    out = run("compare", "intent").out
    assert "intent: champion 2 and challenger 3, 100 texts of both" in out
    assert "4.0 ms over 50" in out and "6.0 ms over 50" in out and "1.0 %" in out
    assert "gave book" in out and "60.0 %" in out
    assert "agreement 90.0 %: they differ on 10 texts" in out
    assert "scores differ by 0.0200 on average, at most 0.5000" in out
    assert "3 takes 1.50 times the champion's time" in out
    assert "only the champion 5, only 3 1, neither 4; -20.0 points, McNemar p = 0.219" in out
    assert run("compare", "intent", "--json").answer["pairs"][0]["agreed"] == 90


def test_a_comparison_that_has_just_begun_has_nothing_to_say_yet(run: Run) -> None:
    out = run("compare", "intent").out
    assert "0 texts of both" in out and "agreement" not in out


def test_a_regression_is_compared_by_its_errors(run: Run, rollout: FakeRollout) -> None:
    rollout.figures["sha256:intent-3"] = PairFigures(
        champion=ArmFigures(texts=10, measured=10, absolute_error=5.0),
        other=ArmFigures(texts=10, measured=10, absolute_error=4.0),
        texts=10,
        measured=10,
        champion_error=5.0,
        other_error=4.0,
    )
    out = run("compare", "intent").out
    assert "mean absolute error   0.5" in out
    assert "mean absolute error 0.5 and 0.4, a gain of +0.1" in out


def test_a_task_without_others_says_how_to_get_one(run: Run) -> None:
    assert "manifold canary spam@VERSION 10" in run("compare", "spam").out
    assert 'no task "nothing"' in run("compare", "nothing").err


@pytest.mark.parametrize(
    ("task", "truth", "told"),
    [
        ("intent", ("--label", "pay"), "pay"),
        ("emotion", ("--labels", "joy, anger"), ["anger", "joy"]),
        ("emotion", ("--labels", ""), []),
        ("stars", ("--value", "4.5"), 4.5),
        ("slots", ("--spans", "city:0:5"), [["city", 0, 5]]),
        ("slots", ("--spans", ""), []),
    ],
)
def test_the_truth_is_told_in_the_tasks_form(
    run: Run, rollout: FakeRollout, task: str, truth: tuple[str, str], told: object
) -> None:
    rollout.kept_answers.add(("r-1", task, 1))
    arguments = ("feedback", "r-1", task, "--input", "1", *truth)
    assert run(*arguments).out == "recorded\n"
    assert run(*arguments).out == "the same was reported before\n"
    assert rollout.outcomes == {("r-1", task, 1): told}


def test_what_does_not_fit_the_task_is_the_servers_sentence(run: Run) -> None:
    assert "report label" in run("feedback", "r-1", "intent", "--value", "1").err
    assert "no answer" in run("feedback", "r-1", "intent", "--label", "pay").err


def test_what_are_no_spans_is_told_with_the_usage(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("feedback", "r-1", "slots", "--spans", "city:0")
    assert "is not spans like" in capsys.readouterr().err
