"""What was answered, handed aside to whoever counts, keeps or compares it, on a thread that no request waits for.

Knows nothing of what watchers do with it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from app.service.answers import Answer
from app.service.dispatch import Reading
from app.service.resolve import Target
from app.service.usage import Timings, Usage

logger = logging.getLogger(__name__)

MAX_WAITING = 5_000  # requests that nobody has looked at yet
_EVERY_S = 0.25


@dataclass(frozen=True, slots=True, eq=False)
class Served:
    """One request that was answered. The sequences have an entry for each of its inputs."""

    request_id: str
    actor: str  # the principal's name
    generation: int
    targets: Sequence[Sequence[Target]]  # what was asked for: reference, version, arm
    results: Sequence[Mapping[str, Answer]]  # by reference
    readings: Sequence[Reading]  # text, encoding, and outputs by digest; equal texts share one
    usage: Usage
    timings: Timings
    at_s: float = field(default_factory=time.time)


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
        self, watchers: Sequence[Watcher], dropped: Callable[[], None], max_waiting: int = MAX_WAITING
    ) -> None:
        """`dropped` is called for each request that found no room."""
        self._watchers = watchers
        self._dropped = dropped
        self._waiting: deque[Served] = deque()
        self._max_waiting = max_waiting
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def served(self, served: Served) -> None:
        if not self._watchers:
            return
        if len(self._waiting) < self._max_waiting:
            self._waiting.append(served)
        else:
            self._dropped()

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """What was served last is handed over first."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()
        self.once()
        for watcher in self._watchers:
            try:
                watcher.close()
            except Exception:
                logger.exception("%s could not be closed", type(watcher).__name__)

    def once(self) -> None:
        """One failing watcher keeps nothing from the others."""
        served = [self._waiting.popleft() for _ in range(len(self._waiting))]
        for watcher in self._watchers:
            try:
                watcher.take_in(served)
            except Exception:
                logger.exception("%s failed on %d requests", type(watcher).__name__, len(served))

    def _run(self) -> None:
        while not self._closing.wait(_EVERY_S):
            self.once()
