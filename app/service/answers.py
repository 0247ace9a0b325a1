"""From a version's scores to what the caller reads: labels, thresholds, values, spans.

The dataclasses here are the answers' wire shape, field by field; they know nothing of HTTP.
Scores are rounded to six decimals (fp32 holds no more), values to seven significant digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from app.domain import DEFAULT_THRESHOLD, Arm, Encoding, ProblemType, TaskOutput, TaskVersion, TextInput
from app.engine.spans import Span, decode_spans
from app.service.resolve import Target


@dataclass(frozen=True, slots=True)
class LabelAnswer:
    version: int
    arm: Arm
    label: str
    score: float
    scores: dict[str, float]


@dataclass(frozen=True, slots=True)
class LabelsAnswer:
    version: int
    arm: Arm
    labels: list[str]  # best first
    scores: dict[str, float]


@dataclass(frozen=True, slots=True)
class ValueAnswer:
    version: int
    arm: Arm
    value: float


@dataclass(frozen=True, slots=True)
class SpansAnswer:
    version: int
    arm: Arm
    spans: list[Span]


@dataclass(frozen=True, slots=True)
class FailedAnswer:
    """This version failed alone; the others of the same text answered."""

    version: int
    arm: Arm
    error: str
    error_type: str = "engine"


Answer = LabelAnswer | LabelsAnswer | ValueAnswer | SpansAnswer | FailedAnswer


def make_answer(target: Target, output: TaskOutput, encoding: Encoding, text: TextInput) -> Answer:
    version, arm = target.version, target.arm
    if output.error is not None:
        return FailedAnswer(version.version, arm, output.error)
    if not all(map(isfinite, output.scores)):
        return FailedAnswer(version.version, arm, f"{target.reference} gave scores that are not finite numbers")
    match version.problem_type:
        case ProblemType.SINGLE_LABEL:
            return _label(version, arm, output.scores)
        case ProblemType.MULTI_LABEL:
            return _labels(version, arm, output.scores)
        case ProblemType.REGRESSION:
            return ValueAnswer(version.version, arm, float(f"{output.scores[0]:.7g}"))
        case ProblemType.TOKEN:
            return SpansAnswer(version.version, arm, _spans(version, output, encoding, text))
        case ProblemType.EMBEDDING:
            return FailedAnswer(version.version, arm, "a representation has no labels: ask POST /v1/embeddings for it")


def _label(version: TaskVersion, arm: Arm, raw: Sequence[float]) -> LabelAnswer:
    scores = _named(version, raw)
    label = version.labels[raw.index(max(raw))]
    return LabelAnswer(version.version, arm, label, scores[label], scores)


def _labels(version: TaskVersion, arm: Arm, raw: Sequence[float]) -> LabelsAnswer:
    thresholds = version.thresholds or (DEFAULT_THRESHOLD,) * len(raw)
    given = [i for i, threshold in enumerate(thresholds) if raw[i] >= threshold]
    given.sort(key=raw.__getitem__, reverse=True)
    return LabelsAnswer(version.version, arm, [version.labels[i] for i in given], _named(version, raw))


def _named(version: TaskVersion, raw: Sequence[float]) -> dict[str, float]:
    return {label: _rounded(score) for label, score in zip(version.labels, raw, strict=True)}


def _rounded(score: float) -> float:
    """To six decimals. `round(score, 6)` writes the number out and reads it again: three times as long."""
    return round(score * 1e6) / 1e6


def _spans(version: TaskVersion, output: TaskOutput, encoding: Encoding, text: TextInput) -> list[Span]:
    spans = decode_spans(encoding, output, version.labels, text.text)
    return [Span(s.label, s.start, s.end, s.text, _rounded(s.score)) for s in spans]
