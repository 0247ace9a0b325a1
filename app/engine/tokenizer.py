"""From texts to token ids, off the event loop and safe to call from several threads.

Knows the backbone's own tokenizer; nothing of tasks or tensors.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

from tokenizers import Encoding as RustEncoding
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from app.domain import Encoding, TextInput
from app.errors import BackboneError, TokenizationError

_CHUNK = 1000  # texts at once: what the tokenizer itself returns is many times as large as what is kept
_MAX_TRUNCATORS = 64  # one tokenizer a length; lengths differ only by the position offsets of live tasks


class TextTokenizer:
    """The fast tokenizer of a model folder. It never pads; it truncates only when asked."""

    def __init__(self, model_path: str) -> None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(model_path)
        except (OSError, ValueError) as error:
            raise BackboneError(f"no tokenizer can be loaded from {model_path}: {error}") from error
        if not getattr(tokenizer, "is_fast", False):
            raise BackboneError(f"{model_path} has no fast tokenizer (tokenizer.json), which serving needs")
        self.unknown_id: int | None = tokenizer.unk_token_id  # None: it knows a token for every text
        self._plain: Tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._plain.no_padding()
        self._plain.no_truncation()
        self._special_tokens = {False: self._count_special(False), True: self._count_special(True)}
        self._truncators: dict[int, Tokenizer] = {}
        self._lock = threading.Lock()

    def encode(
        self, inputs: Sequence[TextInput], limits: Sequence[int], truncate: bool, has_offsets: bool = True
    ) -> list[Encoding]:
        """Encodings of `inputs`, each of at most its limit of tokens (special tokens counted).

        Raises TokenizationError naming the input that is too long (unless `truncate`) or has no token to read.
        """
        encodings: list[Encoding] = []
        for found in self.encode_many(inputs, limits, truncate, has_offsets):
            if isinstance(found, str):
                raise TokenizationError(f"input {len(encodings)} {found}")
            encodings.append(found)
        return encodings

    def encode_many(
        self, inputs: Sequence[TextInput], limits: Sequence[int], truncate: bool, has_offsets: bool = True
    ) -> Iterator[Encoding | str]:
        """As `encode_each`, of any number of texts in bounded memory: one after the other, made a chunk at a time."""
        for start in range(0, len(inputs), _CHUNK):
            texts = inputs[start : start + _CHUNK]
            yield from self.encode_each(texts, limits[start : start + _CHUNK], [truncate] * len(texts), has_offsets)

    def encode_each(
        self, inputs: Sequence[TextInput], limits: Sequence[int], truncate: Sequence[bool], has_offsets: bool = True
    ) -> list[Encoding | str]:
        """An encoding for each input, or what is wrong with it, to follow "input n": no input fails for another.

        Without offsets there are no word ids either, and it takes a fifth less time.
        """
        encode_batch = self._plain.encode_batch if has_offsets else self._plain.encode_batch_fast
        rust = encode_batch([_pieces(text) for text in inputs])
        asked = zip(inputs, limits, truncate, rust, strict=True)
        return [self._within(text, limit, cut, encoded, has_offsets) for text, limit, cut, encoded in asked]

    def _within(
        self, text: TextInput, limit: int, truncate: bool, encoded: RustEncoding, has_offsets: bool
    ) -> Encoding | str:
        too_long = len(encoded) > limit
        if too_long and not truncate:
            return (
                f"has {len(encoded)} tokens and the limit is {limit}: "
                'shorten it, or send "truncate": true to read its beginning'
            )
        if too_long:
            encoded = self._truncator(limit).encode(text.text, text.text_pair)
        if len(encoded) <= self._special_tokens[text.text_pair is not None]:
            return "has nothing that the model can read"
        return _to_domain(encoded, too_long, has_offsets, text.text_pair is not None)

    def _count_special(self, is_pair: bool) -> int:
        return int(self._plain.num_special_tokens_to_add(is_pair))

    def _truncator(self, limit: int) -> Tokenizer:
        """A tokenizer of its own for each length: truncation is state of a tokenizer, shared by all its callers."""
        with self._lock:
            if limit not in self._truncators:
                if len(self._truncators) >= _MAX_TRUNCATORS:
                    self._truncators.clear()
                tokenizer = Tokenizer.from_str(self._plain.to_str())
                tokenizer.enable_truncation(limit, strategy="longest_first")
                self._truncators[limit] = tokenizer
            return self._truncators[limit]


def _pieces(text: TextInput) -> str | tuple[str, str]:
    return text.text if text.text_pair is None else (text.text, text.text_pair)


def _to_domain(encoded: RustEncoding, truncated: bool, has_offsets: bool, is_pair: bool) -> Encoding:
    return Encoding(
        input_ids=tuple(encoded.ids),
        token_type_ids=tuple(encoded.type_ids),
        offsets=tuple(encoded.offsets) if has_offsets else (),
        word_ids=tuple(encoded.word_ids) if has_offsets else (),
        truncated=truncated,
        pair_start=_pair_start(encoded) if is_pair else 0,
    )


def _pair_start(encoded: RustEncoding) -> int:
    """A pair of which one text has no token is as one text."""
    sides = encoded.sequence_ids
    return sides.index(1) if {0, 1} <= {*sides} else 0
