"""Texts become tokens within their limits, from any thread."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from app.domain import Encoding, TextInput
from app.engine.backbone import _embedded_path
from app.engine.tokenizer import TextTokenizer
from app.errors import BackboneError, TokenizationError


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer(_embedded_path())


def test_offsets_are_characters_of_the_text(tokenizer: TextTokenizer) -> None:
    text = "Köln → naïve 🚀 café"
    (encoding,) = tokenizer.encode([TextInput(text)], [64], False)
    pieces = {text[start:end] for start, end in encoding.offsets}
    assert {"naïve", "café", "→"} <= pieces
    assert encoding.offsets[0] == (0, 0)
    assert encoding.word_ids[0] is None


def test_a_pair_has_two_token_types(tokenizer: TextTokenizer) -> None:
    (encoding,) = tokenizer.encode([TextInput("one", "two")], [64], False)
    assert encoding.token_type_ids == (0, 0, 0, 1, 1)


def test_it_says_where_the_second_text_of_a_pair_begins(tokenizer: TextTokenizer) -> None:
    pairs = [TextInput("one", "two three"), TextInput("one two", "word " * 30), TextInput("one", "\u200b")]
    single, short, cut, empty = tokenizer.encode([TextInput("one two"), *pairs], [10] * 4, truncate=True)
    assert [encoding.pair_start for encoding in (single, short, cut, empty)] == [0, 3, 4, 0]
    assert cut.truncated and cut.token_type_ids == (0,) * 4 + (1,) * 6
    assert len(empty) == 4  # there is nothing of the second text
    (fast,) = tokenizer.encode(pairs[:1], [10], truncate=False, has_offsets=False)
    assert fast.pair_start == 3


def test_too_long_is_an_error_that_names_the_input_and_the_limit(tokenizer: TextTokenizer) -> None:
    with pytest.raises(TokenizationError, match=r"input 1 has 102 tokens and the limit is 50"):
        tokenizer.encode([TextInput("short"), TextInput("word " * 100)], [50, 50], False)


def test_truncation_keeps_the_beginning_and_says_so(tokenizer: TextTokenizer) -> None:
    short, long = tokenizer.encode([TextInput("short"), TextInput("word " * 100)], [50, 20], True)
    assert (len(short), short.truncated) == (3, False)
    assert (len(long), long.truncated) == (20, True)


def test_many_texts_are_encoded_some_at_a_time(tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    encode_each, sizes = tokenizer.encode_each, list[int]()

    def counted(inputs: Sequence[TextInput], *rest: Any) -> list[Encoding | str]:
        sizes.append(len(inputs))
        return encode_each(inputs, *rest)

    monkeypatch.setattr(tokenizer, "encode_each", counted)
    texts = [TextInput("word " * (number % 7 + 1)) for number in range(2500)]
    lengths = [len(encoding) for encoding in tokenizer.encode(texts, [20] * 2500, False)]
    assert lengths == [number % 7 + 3 for number in range(2500)]
    assert sum(sizes) == 2500 and max(sizes) <= 1000
    with pytest.raises(TokenizationError, match="input 1500 has nothing"):
        tokenizer.encode([*texts[:1500], TextInput("\x00")], [20] * 1501, False)


def test_each_input_has_its_own_limit(tokenizer: TextTokenizer) -> None:
    text = TextInput("word " * 100)
    assert [len(e) for e in tokenizer.encode([text] * 3, [10, 20, 30], True)] == [10, 20, 30]


def test_one_text_at_fault_takes_no_other_with_it(tokenizer: TextTokenizer) -> None:
    texts = [TextInput("short"), TextInput("word " * 100), TextInput("\x00"), TextInput("word " * 100)]
    short, long, nothing, cut = tokenizer.encode_each(texts, [50, 50, 50, 20], [False, False, False, True])
    assert isinstance(short, Encoding) and isinstance(cut, Encoding)
    assert (len(short), len(cut), cut.truncated) == (3, 20, True)
    assert isinstance(long, str) and long.startswith("has 102 tokens and the limit is 50: shorten it")
    assert nothing == "has nothing that the model can read"


@pytest.mark.parametrize(
    "text", [TextInput("Köln → naïve 🚀 café"), TextInput("one", "two words"), TextInput("unbelievably " * 40)]
)
def test_without_offsets_the_tokens_are_the_same(tokenizer: TextTokenizer, text: TextInput) -> None:
    (marked,) = tokenizer.encode([text], [30], True)
    (plain,) = tokenizer.encode_each([text], [30], [True], has_offsets=False)
    assert isinstance(plain, Encoding)
    assert (plain.input_ids, plain.token_type_ids, plain.truncated) == (
        marked.input_ids,
        marked.token_type_ids,
        marked.truncated,
    )
    assert plain.offsets == plain.word_ids == ()


@pytest.mark.parametrize("text", ["\x00\x01\x02", "\u200b\u200d", "\x07 \x08"])
def test_a_text_of_nothing_that_can_be_read_is_an_error(tokenizer: TextTokenizer, text: str) -> None:
    with pytest.raises(TokenizationError, match="nothing that the model can read"):
        tokenizer.encode([TextInput(text)], [64], False)


def test_a_hundred_thousand_characters_are_refused_or_truncated(tokenizer: TextTokenizer) -> None:
    text = TextInput("a" * 100_000 + " b" * 50_000)
    with pytest.raises(TokenizationError):
        tokenizer.encode([text], [512], False)
    assert len(tokenizer.encode([text], [512], True)[0]) == 512


def test_threads_with_different_limits_do_not_disturb_each_other(tokenizer: TextTokenizer) -> None:
    text = TextInput("word " * 200)

    def encode(limit: int) -> bool:
        return all(len(tokenizer.encode([text], [limit], True)[0]) == limit for _ in range(50))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(encode, range(10, 26)))


def test_a_folder_without_a_tokenizer_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="no tokenizer can be loaded"):
        TextTokenizer(str(tmp_path))
