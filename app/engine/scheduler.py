"""Which waiting texts form the next batch. Policy only: no torch, no threads, and the time is an argument.

The oldest text always goes; texts of like length join it, nearest length first, while the batch stays within its budget
of padded rows × (tokens + virtual tokens) and pads little. So nobody starves, and short texts do not pay for long ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

MAX_PADDING = 0.15  # share of a batch's text tokens that may be padding …
FREE_PADDING_TOKENS = 256  # … beyond this many, below which another batch costs more than the padding


class Queued(Protocol):
    """What the scheduler needs to know of a waiting text."""

    @property
    def num_tokens(self) -> int: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def num_virtual_tokens(self) -> int: ...
    @property
    def arrived_s(self) -> float: ...


@dataclass(slots=True)
class _Sum:
    """Running totals of a batch."""

    rows: int = 0
    tokens: int = 0
    virtual_tokens: int = 0
    longest: int = 0

    def add(self, item: Queued) -> None:
        self.rows += item.num_rows
        self.tokens += item.num_rows * item.num_tokens
        self.virtual_tokens += item.num_virtual_tokens
        self.longest = max(self.longest, item.num_tokens)


Item = TypeVar("Item", bound=Queued)


class Scheduler(Generic[Item]):
    """A queue in order of arrival. `max_queue_delay_s` is how long the oldest may wait for company."""

    def __init__(self, max_batch_tokens: int, max_batch_rows: int, max_queue_delay_s: float = 0.0) -> None:
        self.max_batch_tokens = max_batch_tokens
        self.max_batch_rows = max_batch_rows
        self.max_queue_delay_s = max_queue_delay_s
        self._waiting: list[Item] = []

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def num_rows(self) -> int:
        return sum(item.num_rows for item in self._waiting)

    def add(self, item: Item) -> None:
        self._waiting.append(item)

    def drain(self) -> list[Item]:
        """Take out everything that waits."""
        waiting, self._waiting = self._waiting, []
        return waiting

    def wait_s(self, now_s: float) -> float | None:
        """Seconds until a batch is due: 0 means now, None means that nothing waits."""
        if not self._waiting:
            return None
        if self.max_queue_delay_s <= 0 or self._is_full():
            return 0.0
        return max(0.0, self._waiting[0].arrived_s + self.max_queue_delay_s - now_s)

    def next_batch(self) -> list[Item]:
        """Take out the oldest item and its company. Empty where nothing waits."""
        if not self._waiting:
            return []
        oldest = self._waiting[0]
        by_length = sorted(self._waiting, key=lambda item: item.num_tokens)
        chosen = self._grow(by_length, next(i for i, item in enumerate(by_length) if item is oldest))
        taken = {id(item) for item in chosen}
        self._waiting = [item for item in self._waiting if id(item) not in taken]
        return chosen

    def _grow(self, by_length: Sequence[Item], anchor: int) -> list[Item]:
        """Widen [anchor, anchor] to the nearer neighbour in length, as long as the batch holds it."""
        low, high = anchor, anchor + 1
        batch = _Sum()
        batch.add(by_length[anchor])
        length = by_length[anchor].num_tokens
        while low > 0 or high < len(by_length):
            below = length - by_length[low - 1].num_tokens if low > 0 else None
            above = by_length[high].num_tokens - length if high < len(by_length) else None
            take_below = above is None or (below is not None and below <= above)
            candidate = by_length[low - 1] if take_below else by_length[high]
            if not self._holds(batch, candidate):
                break
            batch.add(candidate)
            low, high = (low - 1, high) if take_below else (low, high + 1)
        return list(by_length[low:high])

    def _holds(self, batch: _Sum, item: Item) -> bool:
        grown = replace(batch)
        grown.add(item)
        padding = grown.rows * grown.longest - grown.tokens
        return (
            grown.rows <= self.max_batch_rows
            and grown.rows * grown.longest + grown.virtual_tokens <= self.max_batch_tokens
            and (padding <= FREE_PADDING_TOKENS or padding <= MAX_PADDING * grown.tokens)
        )

    def _is_full(self) -> bool:
        tokens = sum(item.num_rows * item.num_tokens + item.num_virtual_tokens for item in self._waiting)
        return tokens >= self.max_batch_tokens or self.num_rows >= self.max_batch_rows
