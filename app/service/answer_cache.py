"""What versions said of texts, kept for the next who asks: versions never change, so what is kept stays exact.

Runs on the event loop alone, so it needs no lock. Knows texts and digests; nothing of requests or of what is live.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from sys import getsizeof

from app.domain import Encoding, TaskOutput, TextInput

_NO_WORD = -1
_SLOT_BYTES = 200  # what the order of the entries takes for each


@dataclass(frozen=True, slots=True)
class Known:
    encoding: Encoding | None  # None where it was kept without offsets, and these are asked for
    outputs: dict[str, TaskOutput]  # by digest, of those asked for


@dataclass(slots=True, eq=False)
class _Words:
    """An encoding that was not truncated, in arrays: a fifth of the memory of its tuples."""

    input_ids: array[int]
    token_type_ids: array[int]
    bounds: array[int]  # start and end of each token in turn; empty: kept without offsets
    word_ids: array[int]
    pair_start: int

    @property
    def size_bytes(self) -> int:
        arrays = (self.input_ids, self.token_type_ids, self.bounds, self.word_ids)
        return getsizeof(self) + sum(map(getsizeof, arrays))


@dataclass(slots=True, eq=False)
class _Output:
    scores: array[float]
    tags: array[int] | None

    @property
    def size_bytes(self) -> int:
        return getsizeof(self) + getsizeof(self.scores) + (0 if self.tags is None else getsizeof(self.tags))


@dataclass(slots=True, eq=False)
class _Entry:
    words: _Words
    outputs: dict[str, _Output] = field(default_factory=dict)
    size_bytes: int = 0


class AnswerCache:
    """Least recently used goes first; so do, in time, the answers of versions that nobody asks any more."""

    def __init__(self, max_bytes: int) -> None:
        """`max_bytes`: 0 keeps nothing."""
        self.max_bytes = max_bytes
        self.size_bytes = 0
        self._entries: OrderedDict[TextInput, _Entry] = OrderedDict()

    def get(self, text: TextInput, digests: Iterable[str], limit: int, has_offsets: bool) -> Known | None:
        """What is known of a text, unless it has more tokens than `limit`."""
        entry = self._entries.get(text)
        if entry is None or len(entry.words.input_ids) > limit:
            return None
        self._entries.move_to_end(text)
        outputs = {digest: _unpacked(entry.outputs[digest]) for digest in digests if digest in entry.outputs}
        is_enough = bool(entry.words.bounds) or not has_offsets
        return Known(_encoding(entry.words) if is_enough else None, outputs)

    def put(self, text: TextInput, encoding: Encoding, outputs: Mapping[str, TaskOutput]) -> None:
        """Adds outputs, by digest, to what is known of a text. Errors and what was read of a truncated text are not."""
        kept = {digest: _packed(output) for digest, output in outputs.items() if output.error is None}
        if not self.max_bytes or encoding.truncated or not kept:
            return
        entry = self._entries.pop(text, None) or _Entry(_words(encoding))
        self.size_bytes -= entry.size_bytes
        if encoding.offsets and not entry.words.bounds:
            entry.words = _words(encoding)
        entry.outputs |= kept
        entry.size_bytes = _size_bytes(text, entry)
        if entry.size_bytes > self.max_bytes:
            return
        self._entries[text] = entry
        self.size_bytes += entry.size_bytes
        while self.size_bytes > self.max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self.size_bytes -= oldest.size_bytes


def _words(encoding: Encoding) -> _Words:
    bounds = array("i", [bound for offset in encoding.offsets for bound in offset])
    word_ids = array("i", [_NO_WORD if word is None else word for word in encoding.word_ids])
    return _Words(
        array("i", encoding.input_ids), array("b", encoding.token_type_ids), bounds, word_ids, encoding.pair_start
    )


def _encoding(words: _Words) -> Encoding:
    return Encoding(
        tuple(words.input_ids),
        tuple(words.token_type_ids),
        tuple(zip(words.bounds[::2], words.bounds[1::2], strict=True)),
        tuple([None if word == _NO_WORD else word for word in words.word_ids]),
        pair_start=words.pair_start,
    )


def _packed(output: TaskOutput) -> _Output:
    return _Output(_floats(output.scores), array("i", output.tags) if output.tags else None)


def _floats(values: Sequence[float]) -> array[float]:
    """Half the memory where single precision holds each number exactly, as it does what a model computes."""
    single = array("f", values)
    return single if tuple(single) == values else array("d", values)


def _unpacked(output: _Output) -> TaskOutput:
    return TaskOutput(tuple(output.scores), tuple(output.tags or ()))


def _size_bytes(text: TextInput, entry: _Entry) -> int:
    strings = getsizeof(text.text) + (0 if text.text_pair is None else getsizeof(text.text_pair))
    outputs = getsizeof(entry.outputs) + sum(output.size_bytes for output in entry.outputs.values())
    return _SLOT_BYTES + getsizeof(text) + strings + getsizeof(entry) + entry.words.size_bytes + outputs
