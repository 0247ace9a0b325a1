"""What is looked at in answered texts to see them drift: scores, labels given, length, unknown tokens.

Knows outputs and encodings. Does not know what the texts of a version usually look like.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.domain import DEFAULT_THRESHOLD, Encoding, ProblemType, TaskOutput, TaskVersion

Floats = NDArray[np.floating[Any]]
VALUE = "value"  # what a regression answers with


@dataclass(frozen=True, slots=True, eq=False)
class Traits:
    """Of texts that one version answered."""

    scores: Floats  # [texts, columns]: a label each, then the highest; a regression's value; tokens: the words' mean
    given: NDArray[
        np.bool_
    ]  # [texts, answers + 1]: which labels each got, and last whether none; regression: [texts, 0]
    by_answer: Floats  # [texts, answers]: the score of each label, nan where a text has no span of it
    lengths: NDArray[np.int64]  # [texts]: tokens, special ones counted
    unknown: Floats  # [texts]: the share of them that the tokenizer does not know


def answer_names(version: TaskVersion) -> tuple[str, ...]:
    """What a text can get from this version: labels, spans' labels, or a value."""
    match version.problem_type:
        case ProblemType.TOKEN:
            return tuple(dict.fromkeys(tag.partition("-")[2] for tag in version.labels if "-" in tag))
        case ProblemType.REGRESSION:
            return (VALUE,)
        case _:
            return version.labels


def traits_of(
    version: TaskVersion, outputs: Sequence[TaskOutput], encodings: Sequence[Encoding], unknown_id: int | None
) -> Traits:
    """Of texts that did not fail. Those with scores that are not finite are left out."""
    lengths = np.array([len(encoding) for encoding in encodings], np.int64)
    unknown = np.array([encoding.input_ids.count(unknown_id) for encoding in encodings]) / lengths
    match version.problem_type:
        case ProblemType.TOKEN:
            scores, given, by_answer = _of_tokens(version, outputs, encodings)
        case ProblemType.REGRESSION:
            scores = by_answer = np.array([output.scores for output in outputs])
            given = np.zeros((len(outputs), 0), bool)
        case _:
            by_answer = np.array([output.scores for output in outputs])
            scores = np.concatenate((by_answer, by_answer.max(axis=1, keepdims=True)), axis=1)
            given = _given(version, by_answer)
    good = np.asarray(np.isfinite(scores).all(axis=1))
    traits = Traits(scores, given, by_answer, lengths, unknown)
    return traits if good.all() else _only(traits, good)


def _given(version: TaskVersion, scores: Floats) -> NDArray[np.bool_]:
    texts, labels = scores.shape
    given = np.zeros((texts, labels + 1), bool)
    if version.problem_type is ProblemType.SINGLE_LABEL:
        given[np.arange(texts), scores.argmax(axis=1)] = True
    else:
        given[:, :-1] = scores >= np.array(version.thresholds or [DEFAULT_THRESHOLD] * labels)
        given[:, -1] = ~given[:, :-1].any(axis=1)
    return given


def _of_tokens(
    version: TaskVersion, outputs: Sequence[TaskOutput], encodings: Sequence[Encoding]
) -> tuple[Floats, NDArray[np.bool_], Floats]:
    """Each word counts by its first token, as spans are read."""
    names = {name: i for i, name in enumerate(answer_names(version))}
    columns = [names.get(tag.partition("-")[2], -1) for tag in version.labels]
    sums, counts = (np.zeros((len(outputs), len(names) + 1)) for _ in range(2))  # the last: words outside of spans
    for text, (output, encoding) in enumerate(zip(outputs, encodings, strict=True)):
        for token in encoding.first_tokens:
            tag, score = output.tags[token], output.scores[token]
            sums[text, columns[tag]] += score
            counts[text, columns[tag]] += 1
    with np.errstate(invalid="ignore"):
        by_answer = sums[:, :-1] / counts[:, :-1]
        scores = sums.sum(axis=1, keepdims=True) / counts.sum(axis=1, keepdims=True)
    given = counts > 0
    given[:, -1] = ~given[:, :-1].any(axis=1)
    return scores, given, by_answer


def _only(traits: Traits, rows: NDArray[np.bool_]) -> Traits:
    return Traits(
        traits.scores[rows], traits.given[rows], traits.by_answer[rows], traits.lengths[rows], traits.unknown[rows]
    )
