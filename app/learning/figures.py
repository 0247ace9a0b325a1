"""How good predictions are: accuracy, F1, correlation, calibration, entity F1, and what a report draws of them.

Knows numbers, labels and tags; nothing of models or texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from seqeval.metrics import classification_report as entity_report
from seqeval.metrics import f1_score as entity_f1
from seqeval.metrics import precision_score as entity_precision
from seqeval.metrics import recall_score as entity_recall
from sklearn.metrics import confusion_matrix, f1_score, matthews_corrcoef, roc_auc_score, root_mean_squared_error

from app.domain import ProblemType

_GRID = np.round(np.linspace(0.02, 0.9, 89), 2)
_NUM_BINS = 15
_MAX_MATRIX_LABELS = 30
_MAX_PAIRS = 20
_MAX_POINTS = 500

Floats = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]


def figures_of(problem_type: ProblemType, gold: Any, scores: Any, thresholds: Sequence[float] = ()) -> dict[str, float]:
    """The figures that fit the problem type; one that is undefined is left out.

    `scores`: [texts, labels]; for tokens a list of tags for each text instead. `gold`: single-label int [texts],
    multi-label bool [texts, labels], regression float [texts], tokens lists of tags.
    """
    match problem_type:
        case ProblemType.SINGLE_LABEL:
            return figures_of_classes(gold, scores.argmax(axis=1), scores.shape[1], scores)
        case ProblemType.MULTI_LABEL:
            return figures_of_sets(gold, _chosen(scores, thresholds), scores)
        case ProblemType.REGRESSION:
            return figures_of_values(gold, scores[:, 0])
        case _:
            return figures_of_tags(gold, scores)


def figures_of_classes(
    gold: Sequence[int], found: Sequence[int], num_labels: int, scores: Floats | None = None
) -> dict[str, float]:
    """Macro-F1 is over the labels that were given or found. `scores` [texts, labels] add AUROC and ECE."""
    answers, guesses = np.asarray(gold), np.asarray(found)
    figures = {
        "accuracy": float(np.mean(answers == guesses)),
        "macro_f1": float(f1_score(answers, guesses, average="macro", zero_division=0)),
    }
    if len(np.unique(answers)) > 1:
        figures["mcc"] = float(matthews_corrcoef(answers, guesses))
    if scores is None:
        return figures
    first = 1 if num_labels == 2 else 0  # of two labels the second says it all
    figures |= _auroc(np.eye(num_labels, dtype=bool)[answers][:, first:], scores[:, first:])
    return figures | {"ece": expected_calibration_error(scores.max(axis=1), answers == guesses)}


def figures_of_sets(gold: Bools, found: Bools, scores: Floats | None = None) -> dict[str, float]:
    """All [texts, labels]. `accuracy`: all labels of a text right. `scores` add AUROC, and ECE over all decisions."""
    figures = {
        "micro_f1": _f1(found.ravel(), gold.ravel()),
        "macro_f1": macro_f1(found, gold),
        "accuracy": float(np.mean((gold == found).all(axis=1))),
    }
    if scores is None:
        return figures
    return figures | _auroc(gold, scores) | {"ece": expected_calibration_error(scores.ravel(), gold.ravel())}


def figures_of_values(gold: Sequence[float], found: Sequence[float]) -> dict[str, float]:
    return {
        "pearson": pearson(found, gold),
        "spearman": pearson(_ranks(found), _ranks(gold)),
        "rmse": float(root_mean_squared_error(gold, found)),
    }


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
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks with ties at their mean."""
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    means: list[float] = ((last - counts + last - 1) / 2)[inverse].tolist()
    return means


def expected_calibration_error(confidence: Floats, correct: Bools) -> float:
    """Guo et al. 2017 (arXiv 1706.04599), section 2: bins of equal width, weighted by how many fall in each."""
    bins = reliability(confidence, correct)
    return float(sum(b["count"] * abs(b["accuracy"] - b["confidence"]) for b in bins)) / len(confidence)


def reliability(confidence: Floats, correct: Bools) -> list[dict[str, Any]]:
    """Mean confidence, accuracy and count of each of the bins of equal width in which something falls."""
    index = np.minimum((confidence * _NUM_BINS).astype(int), _NUM_BINS - 1)
    counts, sums, right = (np.bincount(index, w, _NUM_BINS) for w in (None, confidence, correct))
    return [
        {"confidence": float(sums[i] / counts[i]), "accuracy": float(right[i] / counts[i]), "count": int(counts[i])}
        for i in np.flatnonzero(counts)
    ]


# -- what a report draws -----------------------------------------------------------------------------------------------


def details(
    problem_type: ProblemType, gold: Any, scores: Any, labels: Sequence[str], thresholds: Sequence[float] = ()
) -> dict[str, Any]:
    """Everything but the figures, as JSON holds it. Arguments as in `figures_of`."""
    match problem_type:
        case ProblemType.SINGLE_LABEL:
            return details_of_classes(gold, scores, labels)
        case ProblemType.MULTI_LABEL:
            return details_of_sets(gold, scores, labels, thresholds)
        case ProblemType.REGRESSION:
            return details_of_values(gold, scores[:, 0])
        case _:
            return details_of_tags(gold, scores)


def details_of_classes(gold: Sequence[int], scores: Floats, labels: Sequence[str]) -> dict[str, Any]:
    """`labels`, `reliability` of the top probability, and `confusion` (rows: what was given) or, where labels are
    many, `confused`: the pairs most often confused."""
    answers, guesses = np.asarray(gold), scores.argmax(axis=1)
    one_hot = np.eye(len(labels), dtype=bool)
    matrix = confusion_matrix(answers, guesses, labels=range(len(labels)))
    return {
        "labels": _labels(one_hot[answers], one_hot[guesses], labels),
        "reliability": reliability(scores.max(axis=1), answers == guesses),
    } | ({"confusion": matrix.tolist()} if len(labels) <= _MAX_MATRIX_LABELS else {"confused": _pairs(matrix, labels)})


def details_of_sets(
    gold: Bools, scores: Floats, labels: Sequence[str], thresholds: Sequence[float] = ()
) -> dict[str, Any]:
    """`labels`, and `reliability` over all decisions: how often a label with such a probability was given."""
    return {
        "labels": _labels(gold, _chosen(scores, thresholds), labels),
        "reliability": reliability(scores.ravel(), gold.ravel()),
    }


def details_of_values(gold: Sequence[float], found: Sequence[float]) -> dict[str, Any]:
    """`points`: (given, found) of some texts, evenly taken."""
    step = -(-len(gold) // _MAX_POINTS)
    return {"points": [[float(x), float(y)] for x, y in zip(gold[::step], found[::step], strict=True)]}


def details_of_tags(gold: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> dict[str, Any]:
    """`labels`: a row for each type of entity."""
    lists = [list(tags) for tags in gold], [list(tags) for tags in found]
    if all(tag == "O" for side in lists for tags in side for tag in tags):
        return {"labels": []}
    report = entity_report(*lists, output_dict=True, zero_division=0)
    return {
        "labels": [
            _label(name, row["precision"], row["recall"], row["f1-score"], row["support"])
            for name, row in report.items()
            if not name.endswith(" avg")
        ]
    }


def _labels(gold: Bools, found: Bools, labels: Sequence[str]) -> list[dict[str, Any]]:
    given, claimed, right = (side.sum(axis=0) for side in (gold, found, gold & found))
    precision, recall = right / np.maximum(claimed, 1), right / np.maximum(given, 1)
    f1 = _f1_of_columns(found, gold)
    return [_label(name, precision[i], recall[i], f1[i], given[i]) for i, name in enumerate(labels)]


def _label(name: str, precision: float, recall: float, f1: float, support: int) -> dict[str, Any]:
    figures = {"precision": precision, "recall": recall, "f1": f1}
    return {"label": name} | {key: round(float(value), 5) for key, value in figures.items()} | {"support": int(support)}


def _pairs(matrix: NDArray[Any], labels: Sequence[str]) -> list[dict[str, Any]]:
    """The largest entries off the diagonal."""
    errors = matrix - np.diag(np.diag(matrix))
    order = np.argsort(-errors, axis=None, kind="stable")[:_MAX_PAIRS]
    places = zip(*np.unravel_index(order, errors.shape), strict=True)
    return [{"gold": labels[i], "found": labels[j], "count": int(errors[i, j])} for i, j in places if errors[i, j]]


# -- parts -------------------------------------------------------------------------------------------------------------


def _chosen(scores: Floats, thresholds: Sequence[float]) -> Bools:
    chosen: Bools = scores >= np.asarray(thresholds if len(thresholds) else 0.5)
    return chosen


def _auroc(gold: Bools, scores: Floats) -> dict[str, float]:
    """The mean over labels that are given somewhere and not everywhere; nothing where there is no such label."""
    told = np.flatnonzero(gold.any(axis=0) & ~gold.all(axis=0))
    if not len(told):
        return {}
    return {"auroc": float(np.mean([roc_auc_score(gold[:, i], scores[:, i]) for i in told]))}


def _f1(found: Bools, gold: Bools) -> float:
    total = int(found.sum()) + int(gold.sum())
    return 2 * int((found & gold).sum()) / total if total else 0.0


def _f1_of_columns(found: Bools, gold: Bools) -> Floats:
    total = found.sum(axis=0) + gold.sum(axis=0)
    f1: Floats = 2 * (found & gold).sum(axis=0) / np.maximum(total, 1)
    return f1
