"""What a task must beat to be worth anything: the most frequent answer, and TF-IDF with a linear model.

Knows texts and labels; nothing of tokens, tensors or the backbone.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.multiclass import OneVsRestClassifier

from app.domain import InputKind, ProblemType
from app.learning.data import OUTSIDE, Table
from app.learning.evaluation import figures_of_scores, gold_of, thresholds_of_scores
from app.learning.figures import Floats
from app.learning.problems import MEASURES, num_outputs

_WORDS = r"\w+|[^\w\s]"  # marks as well: no text is without any
_MAX_FEATURES = 50_000
_MAX_ROWS = 100_000  # that the linear model sees
_STRENGTHS = (1.0, 4.0, 16.0)  # inverse regularisation, chosen on dev
_USUAL_STRENGTH = 4.0  # where trying costs too much
_TRIED_ROWS, _TRIED_LABELS = 20_000, 50

# By these names they stand in manifests and reports.
MAJORITY, TFIDF, LINEAR, CEILING = "majority", "tfidf", "linear head on the bare trunk", "full fine-tuning"

_Figures = dict[str, dict[str, float]]  # split → figures
_Predict = Callable[[Any], Floats]  # features → scores [texts, labels]


@dataclass(frozen=True, slots=True)
class Baseline:
    """How well it does: split ("dev", and "test" where there is one) → figures as `evaluation.figures` names them."""

    figures: dict[str, dict[str, float]]
    seconds: float


def stated_baselines(manifest: Mapping[str, Any], data: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Those that the manifest of an earlier version has, if it was measured on the same rows; else none.

    `data`: what a manifest says of tables, by their names.
    """
    before = manifest.get("data") or {}
    is_same = all(name in before and _rows(before[name]) == _rows(told) for name, told in data.items())
    return dict(manifest.get("baselines") or {}) if is_same else {}


def _rows(told: Mapping[str, Any]) -> tuple[object, object]:
    return told.get("sha256"), told.get("rows")


def text_baselines(
    train: Table, dev: Table, test: Table | None, labels: tuple[str, ...], measure: str = ""
) -> dict[str, Callable[[], Baseline]]:
    """How each is measured: MAJORITY, and TFIDF where texts have answers of their own, as tagged tokens have not.

    `measure`: of dev, by which TFIDF's strength is chosen; "": the problem's usual one.
    """
    splits = {"dev": dev} | ({} if test is None else {"test": test})
    works = {MAJORITY: partial(_timed, _majority, train, splits, labels)}
    is_told = train.problem_type is ProblemType.REGRESSION or len({e.labels for e in train.examples}) > 1
    if train.problem_type is not ProblemType.TOKEN and is_told:
        works[TFIDF] = partial(_timed, partial(_tfidf, measure=measure), train, splits, labels)
    return dict(works)


def _timed(
    baseline: Callable[[Table, Mapping[str, Table], tuple[str, ...]], _Figures],
    train: Table,
    splits: Mapping[str, Table],
    labels: tuple[str, ...],
) -> Baseline:
    began = time.perf_counter()
    figures = baseline(train, splits, labels)
    return Baseline(figures, time.perf_counter() - began)


# -- the most frequent answer ------------------------------------------------------------------------------------------


def _majority(train: Table, splits: Mapping[str, Table], labels: tuple[str, ...]) -> _Figures:
    """How often each label is given as its score; the mean of a regression; for tokens the tag of most."""
    answer = None if train.problem_type is ProblemType.TOKEN else _mean_answer(train, labels)
    found: _Figures = {}
    for name, table in splits.items():
        scores: Any = [[OUTSIDE] * len(example.words) for example in table.examples]
        if answer is not None:
            scores = np.tile(answer, (len(table.examples), 1))
        found[name] = figures_of_scores(table, scores, labels)
    return found


def _mean_answer(train: Table, labels: tuple[str, ...]) -> Floats:
    gold = gold_of(train, labels)
    if train.problem_type is ProblemType.SINGLE_LABEL:
        return np.bincount(gold, minlength=len(labels)) / len(gold)
    return np.atleast_1d(gold.mean(axis=0))


# -- TF-IDF ------------------------------------------------------------------------------------------------------------


def _tfidf(train: Table, splits: Mapping[str, Table], labels: tuple[str, ...], measure: str) -> _Figures:
    """Words and pairs of words, with logistic regression (ridge for a regression); its strength chosen on dev."""
    train = replace(train, examples=train.examples[:: -(-len(train.examples) // _MAX_ROWS)])
    vectorizer = TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, token_pattern=_WORDS, max_features=_MAX_FEATURES
    )
    vectorizer.fit([part for text in train.texts for part in (text.text, text.text_pair) if part is not None])
    features, gold = _features(vectorizer, train), gold_of(train, labels)
    seen = {name: _features(vectorizer, table) for name, table in splits.items()}
    is_small = len(train.examples) <= _TRIED_ROWS and len(labels) <= _TRIED_LABELS
    tried = []
    for strength in _STRENGTHS if is_small else (_USUAL_STRENGTH,):
        predict = _fit(features, gold, train.problem_type, num_outputs(train.problem_type, labels), strength)
        tried.append(_measured(splits, {name: predict(matrix) for name, matrix in seen.items()}, labels))
    return max(tried, key=lambda figures: figures["dev"].get(measure or MEASURES[train.problem_type], 0.0))


def _features(vectorizer: TfidfVectorizer, table: Table) -> Any:
    """Sparse [texts, features]. Of pairs: both texts, where they differ, what they share, and how much."""
    first = vectorizer.transform([text.text for text in table.texts])
    if table.input_kind is InputKind.TEXT:
        return first
    second = vectorizer.transform([text.text_pair for text in table.texts])
    shared = first.multiply(second)
    return hstack([first, second, abs(first - second), shared, csr_matrix(shared.sum(axis=1))], format="csr")


def _fit(features: Any, gold: Any, problem_type: ProblemType, num_labels: int, strength: float) -> _Predict:
    if problem_type is ProblemType.REGRESSION:
        ridge = Ridge(alpha=_USUAL_STRENGTH / strength).fit(features, gold)
        return lambda matrix: ridge.predict(matrix)[:, np.newaxis]
    # one label against the rest in the dual: by far the fastest on texts, and no worse
    one = LogisticRegression(C=strength, solver="liblinear", dual=True, tol=1e-2, random_state=0)
    is_column = problem_type is ProblemType.MULTI_LABEL and num_labels == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of labels that every text has or none
        model = OneVsRestClassifier(one).fit(features, gold[:, 0] if is_column else gold)

    def predict(matrix: Any) -> Floats:
        found: Floats = model.predict_proba(matrix)
        if problem_type is ProblemType.MULTI_LABEL:
            return found[:, -num_labels:]  # of one label also its absence
        scores = np.zeros((found.shape[0], num_labels))
        scores[:, model.classes_] = found
        return scores

    return predict


def _measured(splits: Mapping[str, Table], scores: Mapping[str, Floats], labels: tuple[str, ...]) -> _Figures:
    thresholds: list[float] = []
    if splits["dev"].problem_type is ProblemType.MULTI_LABEL:
        thresholds = thresholds_of_scores(splits["dev"], scores["dev"], labels)
    return {name: figures_of_scores(table, scores[name], labels, thresholds) for name, table in splits.items()}
