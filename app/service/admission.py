"""Who may come in: a counter of permits that never waits, and the door that closes when the server drains.

Runs on the event loop alone, so it needs no lock. Knows nothing of what requests do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from app.errors import OverloadedError, UnavailableError


class Admission:
    def __init__(self, max_concurrent_requests: int, rejected: Callable[[str], None] = lambda _: None) -> None:
        """`rejected` is told why, each time that somebody is turned away."""
        self._permits = max_concurrent_requests
        self._rejected = rejected
        self.in_flight = 0
        self.is_draining = False

    def check(self) -> None:
        """Takes nothing. Raises OverloadedError where no permit is free, UnavailableError while draining."""
        if self.is_draining:
            self._rejected("draining")
            raise UnavailableError("the server is shutting down: send the request to another one")
        if self.in_flight >= self._permits:
            self._rejected("full")
            raise OverloadedError(f"all {self._permits} permits for concurrent requests are taken: try again shortly")

    @contextmanager
    def permit(self) -> Iterator[None]:
        """Holds one permit. Raises as `check` does."""
        self.check()
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    def drain(self) -> None:
        """Lets nobody in any more; those inside finish."""
        self.is_draining = True
