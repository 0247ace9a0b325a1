"""What a server has loaded: live versions, the latest others, and those that could not be. Knows no index."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from app.domain import TaskVersion

_RETRY_FIRST_S, _RETRY_MOST_S = 2.0, 60.0


@dataclass(frozen=True, slots=True, eq=False)
class Resident:
    """A version that is loaded, as long as somebody holds this."""

    version: TaskVersion
    handle: object


@dataclass(slots=True)
class Residents:
    """Live versions, and the latest others, so that going back to them is immediate. Safe from any thread."""

    most_others: int
    # Hears of each that is not kept any more, and whether it was the last one of its task.
    forget: Callable[[TaskVersion, bool], None]
    live: dict[str, Resident] = field(default_factory=dict)  # by digest
    others: OrderedDict[str, Resident] = field(default_factory=OrderedDict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self, digest: str) -> Resident | None:
        with self.lock:
            if digest in self.others:
                self.others.move_to_end(digest)
            return self.live.get(digest) or self.others.get(digest)

    @property
    def versions(self) -> set[tuple[str, int]]:
        """(task, version) of all that is loaded."""
        with self.lock:
            return {(r.version.task, r.version.version) for r in (*self.live.values(), *self.others.values())}

    def keep(self, resident: Resident) -> None:
        """Among the others, unless it is live."""
        with self.lock:
            if resident.version.digest not in self.live:
                self._keep(resident)

    def set_live(self, live: Mapping[str, Resident]) -> None:
        with self.lock:
            left = [resident for digest, resident in self.live.items() if digest not in live]
            self.live = dict(live)
            for digest in live:
                self.others.pop(digest, None)
            for resident in left:
                self._keep(resident)

    def _keep(self, resident: Resident) -> None:
        self.others[resident.version.digest] = resident
        self.others.move_to_end(resident.version.digest)
        while len(self.others) > self.most_others:
            _, gone = self.others.popitem(last=False)
            self.forget(gone.version, not self._has_any(gone.version.task))

    def _has_any(self, task: str) -> bool:
        return any(r.version.task == task for r in (*self.live.values(), *self.others.values()))


@dataclass(frozen=True, slots=True)
class Failure:
    """A version that could not be served, and when that is tried again."""

    reason: str
    digest: str
    retry_s: float  # on time.monotonic()
    delay_s: float

    @classmethod
    def after(cls, before: Failure | None, reason: str, digest: str) -> Failure:
        delay_s = _RETRY_FIRST_S if before is None else min(2 * before.delay_s, _RETRY_MOST_S)
        return cls(reason, digest, time.monotonic() + delay_s, delay_s)

    @property
    def is_due(self) -> bool:
        return time.monotonic() >= self.retry_s
