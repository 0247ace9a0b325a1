"""Token batches that every subject of the limits benchmark runs, and how one turn is timed. Knows no model.

Standard library only: the processes of both environments read it.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Ids = list[list[int]]  # token ids, a list a text

_FIRST_ID, _LAST_ID = 1000, 20000  # words of the embedded model's vocabulary, no special tokens


@dataclass(frozen=True)
class Case:
    """Texts, and how many of them a subject may put into one call: it takes what is fastest for it."""

    name: str
    texts: Ids
    batch_sizes: tuple[int, ...]

    @property
    def is_mixed(self) -> bool:
        return len({len(text) for text in self.texts}) > 1

    def batches(self, size: int) -> list[Ids]:
        """Neighbours in length together."""
        ordered = sorted(self.texts, key=len)
        return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def even_case(texts: int, tokens: int) -> Case:
    drawn = random.Random(1000 * texts + tokens)
    ids = [[drawn.randint(_FIRST_ID, _LAST_ID) for _ in range(tokens)] for _ in range(texts)]
    return Case(f"{texts} × {tokens}", ids, (texts,))


def mixed_case(lengths: Sequence[int]) -> Case:
    drawn = random.Random(0)
    ids = [[drawn.randint(_FIRST_ID, _LAST_ID) for _ in range(length)] for length in lengths]
    return Case("mixed", ids, (1, 4, 8, 16))


def padded(texts: Ids) -> tuple[Ids, Ids | None]:
    """Rectangles of ids and mask; no mask where nothing is padded."""
    width = max(map(len, texts))
    ids = [[*text, *[0] * (width - len(text))] for text in texts]
    mask = [[1] * len(text) + [0] * (width - len(text)) for text in texts]
    return ids, None if all(len(text) == width for text in texts) else mask


def timed_turn(run: Callable[[], object], seconds: float) -> float:
    """Median seconds of runs that fill `seconds`, at least one."""
    times: list[float] = []
    while not times or sum(times) < seconds:
        began_s = time.perf_counter()
        run()
        times.append(time.perf_counter() - began_s)
    return statistics.median(times)
