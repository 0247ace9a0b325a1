"""From BIO tags of tokens to spans of characters. Knows encodings and labels; nothing of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from app.domain import Encoding, TaskOutput


@dataclass(frozen=True, slots=True)
class Span:
    label: str
    start: int  # characters, [start, end) in the text
    end: int
    text: str
    score: float  # mean over its words of the tag's probability


@dataclass(slots=True)
class _Open:
    label: str
    start: int
    end: int
    scores: list[float]


def decode_spans(encoding: Encoding, output: TaskOutput, labels: Sequence[str], text: str) -> list[Span]:
    """Spans by the CoNLL reading of BIO: `I-x` after anything but x begins a span of its own.

    A word is tagged by its first token, as in training; its further tokens only stretch it.
    """
    spans: list[_Open] = []
    current: _Open | None = None
    for tag, score, start, end in _words(encoding, output, labels):
        prefix, _, label = tag.partition("-")
        if not label:
            current = None
        elif current is not None and prefix == "I" and current.label == label:
            current.end = end
            current.scores.append(score)
        else:
            current = _Open(label, start, end, [score])
            spans.append(current)
    return [Span(s.label, s.start, s.end, text[s.start : s.end], sum(s.scores) / len(s.scores)) for s in spans]


def _words(encoding: Encoding, output: TaskOutput, labels: Sequence[str]) -> Iterator[tuple[str, float, int, int]]:
    """(tag, score, start, end) of each word."""
    words, offsets = encoding.word_ids, encoding.offsets
    for first in encoding.first_tokens:
        last = first
        while last + 1 < len(words) and words[last + 1] == words[first]:
            last += 1
        yield labels[output.tags[first]], output.scores[first], offsets[first][0], offsets[last][1]
