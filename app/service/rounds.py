"""Work that comes around every so often, on a thread of its own. Knows nothing of the work."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Rounds:
    """`work` must not raise: the thread would end with it."""

    def __init__(self, name: str, every_s: float, work: Callable[[], None]) -> None:
        self._every_s, self._work = every_s, work
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Ends the thread, then does the work once more: nothing that came last is left over."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()
        self._work()

    def _run(self) -> None:
        while not self._closing.wait(self._every_s):
            self._work()
