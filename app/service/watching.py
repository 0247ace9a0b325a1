"""What was answered, handed aside to whoever counts, keeps or compares it, on a thread that no request waits for.

Knows nothing of what watchers do with it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from app.service.answers import Answer
from app.service.dispatch import Reading
from app.service.resolve import Target
from app.service.rounds import Rounds
from app.service.usage import Timings, Usage

logger = logging.getLogger(__name__)

MAX_WAITING = 5_000  # requests that nobody has looked at yet
MAX_WAITING_BYTES = 128_000_000  # about what they take
_TOKEN_BYTES = 100  # with its offsets
_SCORE_BYTES = 32  # a number, and its place in a tuple
_EVERY_S = 0.5


class Served(NamedTuple):
    """One request that was answered. The sequences have an entry for each of its inputs."""

    request_id: str
    actor: str  # the principal's name
    generation: int
    targets: Sequence[Sequence[Target]]  # what was asked for: reference, version, arm
    results: Sequence[Mapping[str, Answer]]  # by reference
    results_json: bytes
    readings: Sequence[Reading]  # text, encoding, and outputs by digest; equal texts share one
    usage: Usage
    timings: Timings
    at_s: float  # seconds since the epoch

    @property
    def memory_bytes(self) -> int:
        """About what its texts, tokens and scores take."""
        size_bytes = len(self.results_json)
        for reading in self.readings:
            text, encoding = reading.text, reading.encoding
            size_bytes += len(text.text) + len(text.text_pair or "")
            size_bytes += _TOKEN_BYTES * (0 if encoding is None else len(encoding))
            for output in reading.outputs.values():
                size_bytes += _SCORE_BYTES * len(output.scores)
        return size_bytes


class Watcher(Protocol):
    def take_in(self, served: Sequence[Served]) -> None:
        """On the watch's thread, in order. Also called with nothing, so that what is due can be done."""
        ...

    def close(self) -> None:
        """Behind the last call of `take_in`."""
        ...


class WatchPort(Protocol):
    def served(self, served: Served) -> None:
        """Never blocks and never fails."""
        ...


class Watch:
    """`served` on the event loop; watchers on one other thread, each told of everything that found room."""

    def __init__(
        self,
        watchers: Sequence[Watcher],
        dropped: Callable[[int], None],
        max_waiting: int = MAX_WAITING,
        max_waiting_bytes: int = MAX_WAITING_BYTES,
    ) -> None:
        """`dropped` hears how many requests found no room, or met a watcher that failed."""
        self._watchers = watchers
        self._failing: set[int] = set()  # places of watchers
        self._dropped = dropped
        self._waiting: deque[tuple[Served, int]] = deque()  # with its bytes
        self._max_waiting, self._max_waiting_bytes = max_waiting, max_waiting_bytes
        self._added_bytes, self._taken_bytes = 0, 0  # so far: each is written by one thread alone, and needs no lock
        self._rounds = Rounds("watch", _EVERY_S, self.once)

    def served(self, served: Served) -> None:
        if not self._watchers:
            return
        own_bytes = served.memory_bytes
        total_bytes = self._added_bytes - self._taken_bytes + own_bytes
        if len(self._waiting) < self._max_waiting and total_bytes <= self._max_waiting_bytes:
            self._added_bytes += own_bytes
            self._waiting.append((served, own_bytes))
        else:
            self._dropped(1)

    def start(self) -> None:
        self._rounds.start()

    def close(self) -> None:
        """What was served last is handed over first."""
        self._rounds.close()
        for watcher in self._watchers:
            try:
                watcher.close()
            except Exception:
                logger.exception("%s could not be closed", type(watcher).__name__)

    def once(self) -> None:
        """One failing watcher keeps nothing from the others."""
        taken = [self._waiting.popleft() for _ in range(len(self._waiting))]
        served = [request for request, _ in taken]
        have_taken = [self._tell(place, served) for place in range(len(self._watchers))]
        self._taken_bytes += sum(own_bytes for _, own_bytes in taken)
        if served and not all(have_taken):
            self._dropped(len(served))

    def _tell(self, place: int, served: Sequence[Served]) -> bool:
        """False where it fails. That is told once, until it works again: this comes by several times a second."""
        watcher = self._watchers[place]
        try:
            watcher.take_in(served)
        except Exception:
            if place not in self._failing:
                logger.exception("%s fails, what it misses is counted", type(watcher).__name__)
            self._failing.add(place)
            return False
        if place in self._failing:
            logger.info("%s works again", type(watcher).__name__)
        self._failing.discard(place)
        return True
