"""From counts to the figures that people read."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict

import pytest
from scipy.stats import binomtest

from app.domain import Arm, ProblemType
from app.errors import MalformedError, NotFoundError, UnservableError
from app.registry.comparison import ArmFigures, PairFigures
from app.rollout import Challenger, State, TaskRecord, Traffic, VersionRecord
from app.service.comparison import compare, describe_pair, mcnemar, truth_of
from tests.fakes import make_version


def record(traffic: Traffic | None, *numbers: int) -> TaskRecord:
    versions = {n: VersionRecord("mood", n, f"sha256:{n}", State.APPROVED, "{}", 1, "ann", 1.0) for n in numbers}
    return TaskRecord("mood", versions, traffic)


def test_live_versions_come_first_and_those_compared_before_follow() -> None:
    traffic = Traffic(3, (Challenger(5, 10.0),), (4,))
    figures = {f"sha256:{n}": PairFigures(texts=n) for n in (1, 2, 5, 99)}
    comparison = compare(record(traffic, 1, 2, 3, 4, 5, 6), figures)
    assert (comparison.task, comparison.champion) == ("mood", 3)
    assert [(pair.version, pair.arm, pair.count) for pair in comparison.pairs] == [
        (5, Arm.CHALLENGER, 5),
        (4, Arm.SHADOW, 0),
        (2, None, 2),
        (1, None, 1),
    ]


def test_a_task_that_is_not_live_has_no_comparison() -> None:
    with pytest.raises(NotFoundError, match="no version of task mood is live"):
        compare(record(None, 1), {})


def test_every_figure_of_a_pair() -> None:
    figures = PairFigures(
        champion=ArmFigures(12, 2, 4, 0.02, 8, 6, labels=Counter({"joy": 6, "fear": 4})),
        other=ArmFigures(10, 0, 2, 0.015, 4, 2, labels=Counter({"joy": 10})),
        requests=7,
        texts=10,
        agreed=6,
        disagreed=4,
        differences=10,
        difference=1.25,
        largest_difference=0.75,
        judged=4,
        both_right=1,
        only_champion_right=2,
        only_other_right=0,
    )
    pair = asdict(describe_pair(1, 2, Arm.CHALLENGER, figures))
    assert json.loads(json.dumps(pair)) == {
        "version": 2,
        "arm": "challenger",
        "count": 10,
        "agreed": 6,
        "disagreed": 4,
        "agreement": 0.6,
        "mean_score_difference": 0.125,
        "max_score_difference": 0.75,
        "paired_requests": 7,
        "unpaired_requests": 6,
        "latency_ratio": 1.5,
        "champion": {
            "version": 1,
            "texts": 12,
            "errors": 2,
            "error_rate": 0.166667,
            "requests": 4,
            "mean_latency_ms": 5.0,
            "label_rates": {"fear": 0.4, "joy": 0.6},
            "outcomes": 8,
            "accuracy": 0.75,
            "mean_absolute_error": None,
        },
        "other": {
            "version": 2,
            "texts": 10,
            "errors": 0,
            "error_rate": 0.0,
            "requests": 2,
            "mean_latency_ms": 7.5,
            "label_rates": {"joy": 1.0},
            "outcomes": 4,
            "accuracy": 0.5,
            "mean_absolute_error": None,
        },
        "outcomes": {
            "count": 4,
            "both_right": 1,
            "only_champion_right": 2,
            "only_other_right": 0,
            "both_wrong": 1,
            "champion_accuracy": 0.75,
            "other_accuracy": 0.25,
            "accuracy_gain": -0.5,
            "p_value": 0.5,
        },
        "absolute_errors": None,
    }


def test_a_pair_without_counts_states_no_rates() -> None:
    pair = describe_pair(1, 2, Arm.SHADOW, PairFigures())
    unknown = (pair.agreement, pair.mean_score_difference, pair.max_score_difference, pair.latency_ratio, pair.outcomes)
    assert unknown == (None,) * 5
    assert (pair.champion.error_rate, pair.champion.mean_latency_ms, pair.champion.accuracy) == (None,) * 3


def test_values_have_absolute_errors_and_no_accuracy() -> None:
    arms = ArmFigures(measured=3, absolute_error=6.0), ArmFigures(measured=2, absolute_error=1.0)
    pair = describe_pair(1, 2, Arm.SHADOW, PairFigures(*arms, measured=2, champion_error=3.0, other_error=1.0))
    assert pair.outcomes is None and pair.absolute_errors is not None
    assert asdict(pair.absolute_errors) == {"count": 2, "champion_mean": 1.5, "other_mean": 0.5, "gain": 1.0}
    assert (pair.champion.mean_absolute_error, pair.champion.accuracy, pair.champion.outcomes) == (2.0, None, 3)


@pytest.mark.parametrize(("first", "second"), [(0, 1), (3, 3), (2, 9), (9, 2), (0, 20), (480, 560), (40_000, 40_700)])
def test_mcnemars_test_is_the_exact_binomial_test(first: int, second: int) -> None:
    expected = binomtest(min(first, second), first + second, 0.5).pvalue
    assert mcnemar(first, second) == pytest.approx(expected, rel=1e-9)


def test_where_nobody_was_right_alone_there_is_no_evidence() -> None:
    assert mcnemar(0, 0) == 1.0


SINGLE = make_version("mood", labels=("joy", "fear"))
MULTI = make_version("topics", 1, ProblemType.MULTI_LABEL, ("a", "b", "c"))
VALUE = make_version("stars", 1, ProblemType.REGRESSION, ())
TOKENS = make_version("slots", 1, ProblemType.TOKEN, ("O", "B-city", "I-city"))


def test_the_truth_is_put_as_answers_are() -> None:
    assert truth_of(SINGLE, label="joy") == "joy"
    assert truth_of(MULTI, labels=["c", "a", "c"]) == ["a", "c"]
    assert truth_of(MULTI, labels=[]) == []
    assert truth_of(VALUE, value=4) == 4.0
    assert truth_of(TOKENS, spans=[("city", 7, 9), ("city", 0, 3), ("city", 7, 9)]) == [["city", 0, 3], ["city", 7, 9]]
    assert truth_of(TOKENS, spans=[]) == []


@pytest.mark.parametrize("given", [{}, {"label": "joy", "value": 1.0}])
def test_a_truth_is_exactly_one_thing(given: dict[str, object]) -> None:
    with pytest.raises(MalformedError, match="exactly one of label, labels, value, spans"):
        truth_of(SINGLE, **given)  # type: ignore[arg-type]


def test_a_truth_that_does_not_fit_the_task_says_what_does() -> None:
    with pytest.raises(UnservableError, match="task stars is a regression: report value, not label"):
        truth_of(VALUE, label="joy")
    with pytest.raises(UnservableError, match='"rage" is no label of task mood; they are joy, fear'):
        truth_of(SINGLE, label="rage")
    with pytest.raises(UnservableError, match='"d" is no label of task topics'):
        truth_of(MULTI, labels=["a", "d"])
    with pytest.raises(UnservableError, match='"B-city" is no label of task slots; they are city'):
        truth_of(TOKENS, spans=[("B-city", 0, 3)])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e39])
def test_a_value_that_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(UnservableError, match="no number"):
        truth_of(VALUE, value=value)


def test_many_labels_are_not_all_listed() -> None:
    many = make_version("intent", labels=tuple(f"l{i}" for i in range(77)))
    with pytest.raises(UnservableError, match="and 57 more"):
        truth_of(many, label="x")
