"""Figures against hand-made cases."""

from __future__ import annotations

import json

import numpy as np
import pytest

from app.domain import ProblemType
from app.learning.figures import (
    details,
    expected_calibration_error,
    f1_by_threshold,
    figures_of,
    figures_of_classes,
    figures_of_sets,
    figures_of_tags,
    figures_of_values,
    reliability,
)


def test_classes() -> None:
    found = figures_of_classes([0, 0, 1, 1], [0, 1, 1, 1], 3)
    assert found == pytest.approx({"accuracy": 0.75, "macro_f1": (2 / 3 + 4 / 5) / 2, "mcc": 1 / 3**0.5})


def test_classes_by_their_scores() -> None:
    scores = np.array([[0.9, 0.1, 0.0], [0.4, 0.6, 0.0], [0.2, 0.7, 0.1], [0.3, 0.4, 0.3]])
    found = figures_of(ProblemType.SINGLE_LABEL, np.array([0, 0, 1, 1]), scores)
    assert list(found) == ["accuracy", "macro_f1", "mcc", "auroc", "ece"]
    assert found["auroc"] == pytest.approx((1.0 + 3 / 4) / 2)  # of the label that nobody gave there is none
    assert found["ece"] == pytest.approx((0.1 + 0.6 + 0.3 + 0.6) / 4)


def test_of_two_labels_the_second_is_ranked() -> None:
    scores = np.array([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.5, 0.5]])
    assert figures_of(ProblemType.SINGLE_LABEL, np.array([0, 0, 1, 1]), scores)["auroc"] == 3 / 4


def test_what_is_undefined_is_left_out() -> None:
    scores = np.array([[0.9, 0.1], [0.8, 0.2]])
    found = figures_of(ProblemType.SINGLE_LABEL, np.array([0, 0]), scores)
    assert found == pytest.approx({"accuracy": 1.0, "macro_f1": 1.0, "ece": 0.15})
    assert "auroc" not in figures_of(ProblemType.MULTI_LABEL, np.array([[True, False]] * 2), scores)


def test_sets() -> None:
    gold = np.array([[1, 0], [1, 1], [0, 0]], dtype=bool)
    found = figures_of_sets(gold, np.array([[1, 0], [1, 0], [0, 1]], dtype=bool))
    assert found == pytest.approx({"micro_f1": 4 / 6, "macro_f1": 0.5, "accuracy": 1 / 3})


def test_sets_by_their_scores() -> None:
    gold = np.array([[1, 0], [1, 0], [0, 0]], dtype=bool)
    scores = np.array([[0.9, 0.3], [0.2, 0.3], [0.4, 0.3]])
    found = figures_of(ProblemType.MULTI_LABEL, gold, scores, [0.1, 0.5])
    assert found["auroc"] == 0.5  # of the first alone: the second is never given
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["ece"] == pytest.approx((0.1 + 0.8 + 0.4 + 3 * 0.3) / 6)


def test_one_label_that_may_be_given() -> None:
    gold = np.array([[1], [0], [1]], dtype=bool)
    found = figures_of(ProblemType.MULTI_LABEL, gold, np.array([[0.8], [0.2], [0.4]]), [0.5])
    assert found["auroc"] == 1.0 and found["macro_f1"] == found["micro_f1"] == pytest.approx(2 / 3)


def test_values_with_ties() -> None:
    found = figures_of_values([1, 2, 3, 4], [1, 2, 2, 10])
    assert found["spearman"] == pytest.approx(0.9486833)
    assert found["rmse"] == pytest.approx((37 / 4) ** 0.5)
    assert figures_of_values([1, 2, 4], [0.1] * 3) | {"rmse": 0.0} == {"pearson": 0.0, "spearman": 0.0, "rmse": 0.0}


def test_tags_are_counted_by_entity() -> None:
    gold = [["B-x", "I-x", "O", "B-y"], ["O", "O"]]
    found = [["B-x", "I-x", "O", "B-x"], ["O", "O"]]
    assert figures_of_tags(gold, found) == pytest.approx({"precision": 0.5, "recall": 0.5, "f1": 0.5})
    assert figures_of_tags([["O"]], [["O"]])["f1"] == 0.0


def test_thresholds_stand_in_the_middle_of_what_is_best() -> None:
    scores = np.array([[0.2], [0.3], [0.6], [0.8]])
    best, thresholds = f1_by_threshold(scores, np.array([[0], [0], [1], [1]], dtype=bool))
    assert best.tolist() == [1.0]
    assert 0.4 < thresholds[0] < 0.5


# -- calibration and details -------------------------------------------------------------------------------------------


def test_reliability_bins() -> None:
    confidence, correct = np.array([0.0, 0.95, 0.97, 1.0]), np.array([False, True, False, True])
    low, high = reliability(confidence, correct)
    assert low == {"confidence": 0.0, "accuracy": 0.0, "count": 1}
    assert high == pytest.approx({"confidence": 2.92 / 3, "accuracy": 2 / 3, "count": 3})
    assert expected_calibration_error(confidence, correct) == pytest.approx(0.75 * (2.92 - 2) / 3)


def test_details_of_classes() -> None:
    scores = np.array([[0.9, 0.1, 0.0], [0.4, 0.6, 0.0], [0.2, 0.7, 0.1], [0.3, 0.4, 0.3]])
    found = details(ProblemType.SINGLE_LABEL, np.array([0, 0, 1, 1]), scores, ["a", "b", "c"])
    assert found["confusion"] == [[1, 1, 0], [0, 2, 0], [0, 0, 0]]
    assert found["labels"] == [
        {"label": "a", "precision": 1.0, "recall": 0.5, "f1": 0.66667, "support": 2},
        {"label": "b", "precision": 0.66667, "recall": 1.0, "f1": 0.8, "support": 2},
        {"label": "c", "precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0},
    ]
    assert sum(b["count"] for b in found["reliability"]) == 4
    assert json.loads(json.dumps(found)) == found


def test_of_many_labels_the_pairs_most_confused() -> None:
    gold, guesses = np.array([0, 0, 0, 1, 2]), [5, 5, 0, 4, 2]
    found = details(ProblemType.SINGLE_LABEL, gold, np.eye(40)[guesses], [f"l{i}" for i in range(40)])
    assert found["confused"] == [
        {"gold": "l0", "found": "l5", "count": 2},
        {"gold": "l1", "found": "l4", "count": 1},
    ]
    assert json.loads(json.dumps(found)) == found and "confusion" not in found


def test_details_of_sets_values_and_tags() -> None:
    gold = np.array([[1, 0], [1, 0], [0, 0]], dtype=bool)
    sets = details(
        ProblemType.MULTI_LABEL, gold, np.array([[0.9, 0.3], [0.2, 0.3], [0.4, 0.3]]), ["a", "b"], [0.3, 0.5]
    )
    assert sets["labels"][0] == {"label": "a", "precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2}
    assert sum(b["count"] for b in sets["reliability"]) == 6
    values = details(ProblemType.REGRESSION, np.arange(1200.0), np.ones((1200, 1)), [])
    assert len(values["points"]) == 400 and values["points"][1] == [3.0, 1.0]
    tags = details(ProblemType.TOKEN, [["B-x", "I-x", "O", "B-y"]], [["B-x", "I-x", "O", "B-x"]], [])
    assert tags["labels"] == [
        {"label": "x", "precision": 0.5, "recall": 1.0, "f1": 0.66667, "support": 1},
        {"label": "y", "precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1},
    ]
    assert details(ProblemType.TOKEN, [["O"]], [["O"]], []) == {"labels": []}
    assert json.loads(json.dumps([sets, values, tags])) == [sets, values, tags]
