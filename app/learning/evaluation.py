"""What an artifact says, by the real engine in float32: scores, figures, thresholds, drift baseline, golden examples.

Knows artifacts and the engine; nothing of training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from app.domain import Encoding, ProblemType, TaskOutput, TaskVersion, TextInput
from app.engine.artifact import Artifact
from app.engine.backbone import Backbone
from app.engine.baseline import measured_baseline
from app.engine.engine import Engine
from app.engine.golden import predict
from app.engine.plan import token_limit
from app.engine.tokenizer import TextTokenizer
from app.engine.traits import traits_of
from app.errors import EngineError
from app.learning.alignment import tags_of_words, word_starts
from app.learning.data import Example, Table
from app.learning.figures import Floats, f1_by_threshold, figures_of
from app.learning.figures import details as details_of

_CHUNK = 256
_MAX_GOLDEN = 8
_MAX_GOLDEN_CHARS = 200
_GOLDEN_DIGITS = 7


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """A table with the engine's outputs for it, and the encodings that they are of."""

    table: Table
    outputs: tuple[TaskOutput, ...]
    encodings: tuple[Encoding, ...]

    @property
    def scores(self) -> Floats:
        """[texts, labels]; not for tokens."""
        return np.array([output.scores for output in self.outputs])


@contextmanager
def running(backbone: Backbone) -> Iterator[Engine]:
    engine = Engine(backbone)
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


def score(engine: Engine, tokenizer: TextTokenizer, artifact: Artifact, table: Table) -> Scored:
    """Every row of `table` through the engine. Raises EngineError where one fails."""
    return Scored(table, *answers_to(engine, tokenizer, artifact, table.texts))


def answers_to(
    engine: Engine, tokenizer: TextTokenizer, artifact: Artifact, texts: list[TextInput]
) -> tuple[tuple[TaskOutput, ...], tuple[Encoding, ...]]:
    """An output and an encoding (with offsets where tokens are tagged) for each text.

    Raises EngineError where one fails.
    """
    engine.load(artifact)
    version = artifact.version(0)
    limits = [token_limit(engine.spec, [version])] * len(texts)
    is_token = version.problem_type is ProblemType.TOKEN
    encodings = tokenizer.encode(texts, limits, truncate=True, has_offsets=is_token)
    order = sorted(range(len(texts)), key=lambda row: len(encodings[row]))  # little padding
    found: dict[int, TaskOutput] = {}
    for start in range(0, len(texts), _CHUNK):
        rows = order[start : start + _CHUNK]
        found |= zip(rows, predict(engine, tokenizer, artifact, [texts[row] for row in rows]), strict=True)
    outputs = [found[row] for row in range(len(texts))]
    failed = next((output.error for output in outputs if output.error is not None), None)
    if failed is not None:
        raise EngineError(f"the trained task fails: {failed}")
    return tuple(outputs), tuple(encodings)


def figures(scored: Scored, labels: Sequence[str], thresholds: Sequence[float] = ()) -> dict[str, float]:
    """The figures that fit the problem type; `rows` with them. One that is undefined is left out."""
    return figures_of_scores(scored.table, _answers(scored, labels), labels, thresholds)


def figures_of_scores(
    table: Table, scores: Any, labels: Sequence[str], thresholds: Sequence[float] = ()
) -> dict[str, float]:
    """The same of scores [texts, labels] that came from elsewhere; for tokens of a tag for each word instead."""
    found = figures_of(table.problem_type, gold_of(table, labels), scores, thresholds)
    return {name: round(value, 5) for name, value in found.items()} | {"rows": len(table.examples)}


def details(scored: Scored, labels: Sequence[str], thresholds: Sequence[float] = ()) -> dict[str, Any]:
    """What a report draws, as JSON holds it: labels, confusion, reliability, or points of a regression."""
    kind, gold = scored.table.problem_type, gold_of(scored.table, labels)
    return details_of(kind, gold, _answers(scored, labels), labels, thresholds)


def tuned_thresholds(scored: Scored, labels: Sequence[str]) -> list[float]:
    """For each label of a multi-label task the threshold with the best F1 on this table; none for other types."""
    if scored.table.problem_type is not ProblemType.MULTI_LABEL:
        return []
    return thresholds_of_scores(scored.table, scored.scores, labels)


def thresholds_of_scores(table: Table, scores: Floats, labels: Sequence[str]) -> list[float]:
    """The same of a multi-label table's scores [texts, labels] that came from elsewhere."""
    _, thresholds = f1_by_threshold(scores, gold_of(table, labels))
    return [round(float(t), 4) for t in thresholds]


def gold_of(table: Table, labels: Sequence[str]) -> Any:
    """The answers of a table, as `figures.figures_of` takes them."""
    match table.problem_type:
        case ProblemType.SINGLE_LABEL:
            index = {label: i for i, label in enumerate(labels)}
            return np.array([index[example.labels[0]] for example in table.examples])
        case ProblemType.MULTI_LABEL:
            return np.array([[label in example.labels for label in labels] for example in table.examples])
        case ProblemType.REGRESSION:
            return np.array([example.score for example in table.examples])
        case _:
            return [list(example.labels) for example in table.examples]


def score_baseline(
    version: TaskVersion, scored: Scored, unknown_id: int | None, thresholds: Sequence[float] = ()
) -> dict[str, Any]:
    """How the table's texts and answers look: what live ones are compared with, to see them drift."""
    version = replace(version, thresholds=tuple(thresholds) or version.thresholds)
    return measured_baseline(version, traits_of(version, scored.outputs, scored.encodings, unknown_id))


def golden_examples(engine: Engine, tokenizer: TextTokenizer, artifact: Artifact, table: Table) -> list[dict[str, Any]]:
    """Short inputs of varied labels and lengths, with the scores that this artifact gives them."""
    return golden_of(engine, tokenizer, artifact, [example.text for example in _varied(table.examples)])


def golden_of(
    engine: Engine, tokenizer: TextTokenizer, artifact: Artifact, texts: list[TextInput]
) -> list[dict[str, Any]]:
    """These inputs with the scores that this artifact gives them."""
    outputs = predict(engine, tokenizer, artifact, texts)
    return [
        ({"text": text.text} if text.text_pair is None else {"text": text.text, "text_pair": text.text_pair})
        | {"scores": [float(f"{score:.{_GOLDEN_DIGITS}g}") for score in output.scores]}
        for text, output in zip(texts, outputs, strict=True)
    ]


def _varied(examples: Sequence[Example]) -> list[Example]:
    """A new label each time where there is one left, from the shortest text to the longest that is short enough."""
    short = [e for e in examples if len(e.text.text) + len(e.text.text_pair or "") <= _MAX_GOLDEN_CHARS]
    pool = sorted(short or examples, key=lambda e: len(e.text.text))
    chosen: list[Example] = []
    seen: set[str] = set()
    for index in range(_MAX_GOLDEN):
        start = len(pool) * index // _MAX_GOLDEN
        rest = [e for e in pool[start:] if e not in chosen]
        if not rest:
            break
        chosen.append(next((e for e in rest if set(e.labels) - seen), rest[0]))
        seen |= set(chosen[-1].labels)
    return chosen


def _answers(scored: Scored, labels: Sequence[str]) -> Any:
    return found_tags(scored, labels) if scored.table.problem_type is ProblemType.TOKEN else scored.scores


def found_tags(scored: Scored, labels: Sequence[str]) -> list[list[str]]:
    """A tag for each of the file's words."""
    return [
        tags_of_words(word_starts(encoding, example.words), [labels[i] for i in output.tags])
        for example, encoding, output in zip(scored.table.examples, scored.encodings, scored.outputs, strict=True)
    ]
