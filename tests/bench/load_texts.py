"""Texts for load: random words of the backbone's own vocabulary, so many tokens each and no two alike.

Knows the tokenizer's file; nothing of servers.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

MIXED = "mixed"
LENGTHS = ("16", "64", "256", MIXED)
MIXED_BLOCK = 64
_SPECIAL = 2  # [CLS] and [SEP]
_MOST_TOKENS = 1_000_000  # of one set


@dataclass(frozen=True)
class TextSet:
    """Texts of one length, or mixed: 8 to 256 tokens, half of them up to 40 (log-normal), alike in each block of 64."""

    name: str
    texts: list[str]
    ids: list[list[int]]
    file: Path  # a JSON string a line

    @property
    def mean_tokens(self) -> float:
        return sum(map(len, self.ids)) / len(self.ids)


def make_texts(model: str, name: str, folder: Path) -> TextSet:
    tokenizer = Tokenizer.from_file(str(Path(model, "tokenizer.json")))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    words = sorted(w for w in tokenizer.get_vocab() if w.isascii() and w.isalpha() and len(w) > 2)
    drawn = random.Random(f"texts of {name} tokens")
    count = _MOST_TOKENS // (64 if name == MIXED else int(name))
    lengths = _mixed(count, drawn) if name == MIXED else [int(name)] * count
    texts = [" ".join(drawn.choices(words, k=length - _SPECIAL)) for length in lengths]
    ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    if name != MIXED and any(len(row) != int(name) for row in ids):
        raise RuntimeError(f"{model} does not read a word of its vocabulary as one token")
    file = folder / f"texts-{name}.txt"
    file.write_text("".join(json.dumps(text) + "\n" for text in texts))
    return TextSet(name, texts, ids, file)


def _mixed(count: int, drawn: random.Random) -> Iterator[int]:
    """The same lengths in every block, in an order of its own, so that each short run has its share of long ones."""
    quantiles = [statistics.NormalDist(3.69, 0.8).inv_cdf((i + 0.5) / MIXED_BLOCK) for i in range(MIXED_BLOCK)]
    lengths = [min(256, max(8, round(math.exp(q)))) for q in quantiles]
    for _ in range(count // MIXED_BLOCK):
        yield from drawn.sample(lengths, MIXED_BLOCK)
