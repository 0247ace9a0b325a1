"""From scores to words."""

from __future__ import annotations

import pytest

from app.domain import Arm, Encoding, ProblemType, TaskOutput, TextInput
from app.service.answers import Answer, FailedAnswer, LabelAnswer, LabelsAnswer, SpansAnswer, ValueAnswer, make_answer
from app.service.resolve import Target
from tests.fakes import make_version

ENCODING = Encoding((1, 5, 2), (0, 0, 0), ((0, 0), (0, 5), (0, 0)), (None, 0, None))


def answer(problem_type: ProblemType, labels: tuple[str, ...], *scores: float, **fields: tuple[float, ...]) -> Answer:
    version = make_version("task", 4, problem_type, labels, **fields)
    tags = (0, 1, 0) if problem_type is ProblemType.TOKEN else ()
    return make_answer(Target("task@4", version, Arm.PINNED), TaskOutput(scores, tags), ENCODING, TextInput("Paris"))


def test_the_best_label_wins_and_scores_have_six_decimals() -> None:
    got = answer(ProblemType.SINGLE_LABEL, ("a", "b"), 0.12345678901, 0.87654321099)
    assert got == LabelAnswer(4, Arm.PINNED, "b", 0.876543, {"a": 0.123457, "b": 0.876543})


def test_labels_from_their_own_threshold_on_are_given_best_first() -> None:
    got = answer(ProblemType.MULTI_LABEL, ("a", "b", "c"), 0.3, 0.9, 0.4, thresholds=(0.3, 0.5, 0.6))
    assert isinstance(got, LabelsAnswer) and got.labels == ["b", "a"]


def test_without_thresholds_one_half_is_enough() -> None:
    got = answer(ProblemType.MULTI_LABEL, ("a", "b"), 0.5, 0.49)
    assert isinstance(got, LabelsAnswer) and got.labels == ["a"]


def test_no_label_may_be_given() -> None:
    got = answer(ProblemType.MULTI_LABEL, ("a",), 0.1)
    assert isinstance(got, LabelsAnswer) and got.labels == []


def test_a_value_keeps_its_seven_digits() -> None:
    assert answer(ProblemType.REGRESSION, (), 1234567.891) == ValueAnswer(4, Arm.PINNED, 1234568.0)
    assert answer(ProblemType.REGRESSION, (), -0.000123456789) == ValueAnswer(4, Arm.PINNED, -0.0001234568)


def test_tags_become_spans_of_characters() -> None:
    got = answer(ProblemType.TOKEN, ("O", "B-city"), 0.5, 0.75, 0.5)
    assert isinstance(got, SpansAnswer)
    (span,) = got.spans
    assert (span.label, span.start, span.end, span.text, span.score) == ("city", 0, 5, "Paris", 0.75)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_never_reaches_a_caller(bad: float) -> None:
    got = answer(ProblemType.SINGLE_LABEL, ("a", "b"), bad, 0.5)
    assert isinstance(got, FailedAnswer) and "task@4" in got.error
