"""Words of the file against words and tokens of the tokenizer."""

from __future__ import annotations

from pathlib import Path

from app.domain import Encoding, TextInput
from app.engine.tokenizer import TextTokenizer
from app.learning.alignment import tags_of_words, token_tags, word_starts


def encode(model_path: Path, words: list[str], limit: int = 64) -> Encoding:
    return TextTokenizer(str(model_path)).encode([TextInput(" ".join(words))], [limit], truncate=True)[0]


def test_the_first_token_of_each_word_carries_its_tag(model_path: Path) -> None:
    words = ["we", "goods", "new-york", "it"]  # [CLS] we good ##s new - york it [SEP]
    starts = word_starts(encode(model_path, words), words)
    assert starts == [[1], [2], [4, 5, 6], [7]]
    tags = token_tags(starts, ["O", "B-x", "B-city", "O"])
    assert tags == [(1, "O"), (2, "B-x"), (4, "B-city"), (5, "I-city"), (6, "I-city"), (7, "O")]


def test_words_that_were_cut_off_are_outside(model_path: Path) -> None:
    words = ["we", "paris", "rome"]
    starts = word_starts(encode(model_path, words, limit=4), words)
    assert starts == [[1], [2], []]
    assert tags_of_words(starts, ["O", "O", "B-city", "O"]) == ["O", "B-city", "O"]
