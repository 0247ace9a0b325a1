"""What is kept comes back as it was, and never takes more memory than it was given."""

from __future__ import annotations

import dataclasses
import gc
import random
import tracemalloc
from array import array

import pytest

from app.domain import Encoding, TaskOutput, TextInput
from app.service.answer_cache import AnswerCache

ROOM = 1_000_000
TEXT = TextInput("New York is far")
PLAIN = Encoding((101, 30_000, 7, 102), (0, 0, 1, 1), pair_start=2)
MARKED = Encoding((101, 30_000, 7, 102), (0, 0, 1, 1), ((0, 0), (0, 3), (4, 8), (0, 0)), (None, 0, 1, None))
SCORES = TaskOutput(tuple(array("f", [0.1, 0.7, 0.2])))


def fields(encoding: Encoding | None) -> object:
    assert encoding is not None
    return tuple(getattr(encoding, field.name) for field in dataclasses.fields(encoding))


@pytest.mark.parametrize("encoding", [PLAIN, MARKED])
@pytest.mark.parametrize(
    "output",
    [
        SCORES,
        TaskOutput((0.1, 0.7, 1e-300, -0.0, 1e300)),  # more than single precision holds
        TaskOutput(tuple(array("f", [0.9, 0.8, 1.0, 0.6])), (0, 3, 40_000, 0)),
    ],
)
def test_what_was_put_comes_back_to_the_last_bit(encoding: Encoding, output: TaskOutput) -> None:
    cache = AnswerCache(100_000)
    cache.put(TEXT, encoding, {"sha256:a": output})
    known = cache.get(TextInput(TEXT.text), ["sha256:a", "sha256:b"], 4, bool(encoding.offsets))
    assert known is not None
    assert fields(known.encoding) == fields(encoding)
    assert known.outputs == {"sha256:a": output}
    assert list(map(float.hex, known.outputs["sha256:a"].scores)) == list(map(float.hex, output.scores))


def test_a_text_and_a_pair_are_two() -> None:
    cache = AnswerCache(100_000)
    cache.put(TextInput("a"), PLAIN, {"x": SCORES})
    assert cache.get(TextInput("a", "b"), ["x"], 10, False) is None
    assert cache.get(TextInput("b"), ["x"], 10, False) is None


def test_nothing_is_known_of_a_text_that_is_too_long_for_the_request() -> None:
    cache = AnswerCache(100_000)
    cache.put(TEXT, PLAIN, {"x": SCORES})
    assert cache.get(TEXT, ["x"], 4, False) is not None
    assert cache.get(TEXT, ["x"], 3, False) is None


def test_errors_and_truncated_texts_are_not_kept() -> None:
    cache = AnswerCache(100_000)
    cache.put(TEXT, PLAIN, {"broken": TaskOutput(error="it broke")})
    cut = Encoding(PLAIN.input_ids, PLAIN.token_type_ids, truncated=True)
    cache.put(TEXT, cut, {"x": SCORES})
    assert cache.get(TEXT, ["x", "broken"], 10, False) is None
    cache.put(TEXT, PLAIN, {"x": SCORES, "broken": TaskOutput(error="it broke")})
    known = cache.get(TEXT, ["x", "broken"], 10, False)
    assert known is not None and known.outputs == {"x": SCORES}


def test_an_encoding_without_offsets_does_not_serve_who_needs_them() -> None:
    cache = AnswerCache(100_000)
    cache.put(TEXT, PLAIN, {"x": SCORES})
    known = cache.get(TEXT, ["x"], 10, True)
    assert known is not None and known.encoding is None and known.outputs == {"x": SCORES}
    cache.put(TEXT, MARKED, {"y": SCORES})
    cache.put(TEXT, PLAIN, {"z": SCORES})
    known = cache.get(TEXT, ["x", "y", "z"], 10, True)
    assert known is not None and fields(known.encoding) == fields(MARKED)
    assert known.outputs.keys() == {"x", "y", "z"}


def test_the_least_recently_used_goes_first() -> None:
    one = AnswerCache(10**9)
    one.put(TextInput("0"), PLAIN, {"x": SCORES})
    cache = AnswerCache(3 * one.size_bytes)
    for number in range(3):
        cache.put(TextInput(str(number)), PLAIN, {"x": SCORES})
    cache.get(TextInput("0"), ["x"], 10, False)
    cache.put(TextInput("3"), PLAIN, {"x": SCORES})
    kept = [n for n in range(4) if cache.get(TextInput(str(n)), ["x"], 10, False) is not None]
    assert kept == [0, 2, 3]
    assert cache.size_bytes == 3 * one.size_bytes


def test_what_is_larger_than_all_room_drives_nothing_out() -> None:
    cache = AnswerCache(5_000)
    cache.put(TEXT, PLAIN, {"x": SCORES})
    before = cache.size_bytes
    cache.put(TextInput("a" * 6_000), PLAIN, {"x": SCORES})
    assert cache.get(TextInput("a" * 6_000), ["x"], 10, False) is None
    assert cache.get(TEXT, ["x"], 10, False) is not None and cache.size_bytes == before
    cache.put(TEXT, PLAIN, {"y": TaskOutput((0.1,) * 1_000)})  # what grows over it goes as well
    assert cache.get(TEXT, ["x"], 10, False) is None and cache.size_bytes == 0


def test_off_keeps_nothing() -> None:
    cache = AnswerCache(0)
    cache.put(TEXT, PLAIN, {"x": SCORES})
    assert cache.get(TEXT, ["x"], 10, False) is None and cache.size_bytes == 0


@pytest.mark.parametrize(("tokens", "labels", "versions"), [(20, 2, 1), (66, 150, 8), (300, 384, 1)])
def test_the_bytes_that_it_counts_are_those_that_it_takes(tokens: int, labels: int, versions: int) -> None:
    chance = random.Random(1)
    digests = [f"sha256:{number}" for number in range(versions)]

    def put(cache: AnswerCache, number: int) -> None:
        ids = tuple(chance.randrange(30_000) for _ in range(tokens))
        offsets = tuple((1_000 + i, 1_001 + i) for i in range(tokens))
        encoding = Encoding(ids, (0,) * tokens, offsets, tuple(range(tokens)))
        output = TaskOutput(tuple(array("f", [chance.random() for _ in range(labels)])))
        cache.put(TextInput(f"{number} " * tokens), encoding, dict.fromkeys(digests, output))

    one = AnswerCache(ROOM)
    put(one, 0)
    cache = AnswerCache(ROOM)
    gc.collect()
    tracemalloc.start()
    try:
        for number in range(2 * ROOM // one.size_bytes):
            put(cache, number)
            assert cache.size_bytes <= ROOM
        gc.collect()
        taken_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert cache.size_bytes > 0.9 * ROOM
    assert 0.8 < taken_bytes / cache.size_bytes < 1.1
