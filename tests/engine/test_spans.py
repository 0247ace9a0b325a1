"""From tags to spans of characters."""

from __future__ import annotations

import pytest

from app.domain import Encoding, TaskOutput
from app.engine.spans import decode_spans

LABELS = ["O", "B-city", "I-city", "B-date", "I-date"]
TEXT = "fly to New York tomorrow"
WORDS = [(0, 3), (4, 6), (7, 10), (11, 15), (16, 24)]


def _spans(*tags: str, scores: tuple[float, ...] | None = None) -> list[tuple[str, str]]:
    return [(s.label, s.text) for s in _decode(tags, scores)]


def _decode(tags: tuple[str, ...], scores: tuple[float, ...] | None = None):  # type: ignore[no-untyped-def]
    """A text of five words between [CLS] and [SEP]; "tomorrow" is two tokens."""
    offsets = ((0, 0), *WORDS[:4], (16, 18), (18, 24), (0, 0))
    word_ids = (None, 0, 1, 2, 3, 4, 4, None)
    of_tokens = ("I-date", *tags, "B-city", "B-city")  # special tokens and later pieces of a word say nothing
    encoding = Encoding((0,) * 8, (0,) * 8, offsets, word_ids)
    output = TaskOutput(scores or (1.0,) * 8, tuple(LABELS.index(tag) for tag in of_tokens))
    return decode_spans(encoding, output, LABELS, TEXT)


def test_words_of_one_entity_become_one_span_with_its_characters() -> None:
    (span,) = _decode(("O", "O", "B-city", "I-city", "O"))
    assert (span.label, span.start, span.end, span.text) == ("city", 7, 15, "New York")


def test_a_word_is_spanned_whole_when_its_first_token_is_tagged() -> None:
    assert _spans("O", "O", "O", "O", "B-date") == [("date", "tomorrow")]


def test_b_begins_a_new_span_beside_another_of_the_same_label() -> None:
    assert _spans("O", "O", "B-city", "B-city", "O") == [("city", "New"), ("city", "York")]


@pytest.mark.parametrize("before", ["O", "B-date"])
def test_i_after_anything_else_begins_a_span_of_its_own(before: str) -> None:
    assert ("city", "York") in _spans("O", "O", before, "I-city", "O")


def test_the_score_is_the_mean_over_the_words() -> None:
    (span,) = _decode(("O", "O", "B-city", "I-city", "O"), (1.0, 1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 1.0))
    assert span.score == 0.75


def test_nothing_tagged_gives_no_spans() -> None:
    assert _spans("O", "O", "O", "O", "O") == []
