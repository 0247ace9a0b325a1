"""Figures against hand-made cases."""

from __future__ import annotations

import numpy as np
import pytest

from app.learning.figures import (
    f1_by_threshold,
    figures_of_classes,
    figures_of_sets,
    figures_of_tags,
    figures_of_values,
)


def test_classes() -> None:
    found = figures_of_classes([0, 0, 1, 1], [0, 1, 1, 1], 3)
    assert found == {"accuracy": 0.75, "macro_f1": pytest.approx((2 / 3 + 4 / 5) / 2)}


def test_sets() -> None:
    gold = np.array([[1, 0], [1, 1], [0, 0]], dtype=bool)
    found = figures_of_sets(gold, np.array([[1, 0], [1, 0], [0, 1]], dtype=bool))
    assert found == pytest.approx({"micro_f1": 4 / 6, "macro_f1": 0.5, "accuracy": 1 / 3})


def test_values_with_ties() -> None:
    found = figures_of_values([1, 2, 3, 4], [1, 2, 2, 10])
    assert found["spearman"] == pytest.approx(0.9486833)
    assert figures_of_values([1, 2], [5, 5]) == {"pearson": 0.0, "spearman": 0.0}


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
