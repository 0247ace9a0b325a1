"""How good predictions are: accuracy, F1, correlation, entity F1. Knows numbers and tags; nothing of models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from seqeval.metrics import f1_score as entity_f1
from seqeval.metrics import precision_score as entity_precision
from seqeval.metrics import recall_score as entity_recall

_GRID = np.round(np.linspace(0.02, 0.9, 89), 2)

Floats = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]


def figures_of_classes(gold: Sequence[int], found: Sequence[int], num_labels: int) -> dict[str, float]:
    one_hot = np.eye(num_labels, dtype=bool)
    gold_rows, found_rows = one_hot[np.asarray(gold)], one_hot[np.asarray(found)]
    return {
        "accuracy": float(np.mean(np.asarray(gold) == np.asarray(found))),
        "macro_f1": _macro_of_present(found_rows, gold_rows),
    }


def figures_of_sets(gold: Bools, found: Bools) -> dict[str, float]:
    """Both [texts, labels]. `accuracy`: all labels of a text right."""
    return {
        "micro_f1": _f1(found.ravel(), gold.ravel()),
        "macro_f1": macro_f1(found, gold),
        "accuracy": float(np.mean((gold == found).all(axis=1))),
    }


def figures_of_values(gold: Sequence[float], found: Sequence[float]) -> dict[str, float]:
    return {"pearson": pearson(found, gold), "spearman": pearson(_ranks(found), _ranks(gold))}


def figures_of_tags(gold: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> dict[str, float]:
    """Entity precision, recall and F1 over BIO tags, as seqeval (after conlleval) counts them."""
    measures = {"precision": entity_precision, "recall": entity_recall, "f1": entity_f1}
    lists = [list(tags) for tags in gold], [list(tags) for tags in found]
    return {name: float(measure(*lists, zero_division=0)) for name, measure in measures.items()}


def macro_f1(found: Bools, gold: Bools) -> float:
    """The mean over labels of F1; both [texts, labels]."""
    return float(np.mean([_f1(found[:, i], gold[:, i]) for i in range(gold.shape[1])]))


def f1_by_threshold(scores: Floats, gold: Bools) -> tuple[Floats, Floats]:
    """For each label the best F1 over a grid of thresholds, and the threshold. Both arguments [texts, labels]."""
    f1 = np.stack([_f1_of_columns(scores >= threshold, gold) for threshold in _GRID])  # [grid, labels]
    best = f1.max(axis=0)
    thresholds = np.array([_middle_of_longest_run(f1[:, i] >= best[i] - 1e-9) for i in range(f1.shape[1])])
    return best, thresholds


def _middle_of_longest_run(good: Bools) -> float:
    """Of equally good thresholds [grid] the middle of the longest stretch: the least an accident of this set."""
    starts = [i for i in range(len(good)) if good[i] and (i == 0 or not good[i - 1])]
    stops = [i + 1 for i in range(len(good)) if good[i] and (i + 1 == len(good) or not good[i + 1])]
    start, stop = max(zip(starts, stops, strict=True), key=lambda run: run[1] - run[0])
    return float(_GRID[(start + stop - 1) // 2])


def pearson(found: Sequence[float], gold: Sequence[float]) -> float:
    """0 where either side is constant."""
    x, y = np.asarray(found, dtype=np.float64), np.asarray(gold, dtype=np.float64)
    if x.std() == 0 or y.std() == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks with ties at their mean."""
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    means: list[float] = ((last - counts + last - 1) / 2)[inverse].tolist()
    return means


def _macro_of_present(found: Bools, gold: Bools) -> float:
    """Labels that stand neither in the answers nor in the predictions do not count."""
    present = gold.any(axis=0) | found.any(axis=0)
    return macro_f1(found[:, present], gold[:, present])


def _f1(found: Bools, gold: Bools) -> float:
    total = int(found.sum()) + int(gold.sum())
    return 2 * int((found & gold).sum()) / total if total else 0.0


def _f1_of_columns(found: Bools, gold: Bools) -> Floats:
    total = found.sum(axis=0) + gold.sum(axis=0)
    f1: Floats = 2 * (found & gold).sum(axis=0) / np.maximum(total, 1)
    return f1
