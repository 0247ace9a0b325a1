"""A server whose watching is switched while it runs, so that one process is measured with it and without.

    python -m tests.bench.watched_server FILE serve …

SIGUSR1: it does from now on what the file says, a `Mode`, and empties the file. Two processes that do the same differ
by some percent, by where they happen to lie in memory: by as much as watching costs.
"""

from __future__ import annotations

import logging
import signal
import sys
from enum import StrEnum
from pathlib import Path

import app.main
import app.telemetry.traces
from app.cli import main
from app.service.watching import Served, Watch
from app.telemetry.logs import ACCESS
from app.telemetry.traces import Traces
from app.telemetry.tracing import NOT_TRACING, Caller, Trace


class Mode(StrEnum):
    """What is watched."""

    OFF = "off"
    ON = "on"
    FULL = "on, every request traced"


SAMPLES = {Mode.OFF: 0.0, Mode.ON: 0.1, Mode.FULL: 1.0}  # shares of requests that are traced
_mode = Mode.ON


class _Watch(Watch):
    def served(self, served: Served) -> None:
        if _mode is not Mode.OFF:
            super().served(served)


class _Traces(Traces):
    def begin(self, caller: Caller | None) -> Trace:
        if _mode is Mode.OFF:
            return NOT_TRACING.begin(caller)
        self._sample = SAMPLES[_mode]
        return super().begin(caller)


def _obey(file: Path) -> None:
    global _mode
    _mode = Mode(file.read_text())
    logging.getLogger(ACCESS).setLevel(logging.WARNING if _mode is Mode.OFF else logging.INFO)
    file.write_text("")


if __name__ == "__main__":
    app.main.Watch = _Watch  # type: ignore[attr-defined]
    app.telemetry.traces.Traces = _Traces  # type: ignore[misc]
    signal.signal(signal.SIGUSR1, lambda *_: _obey(Path(sys.argv[1])))
    sys.exit(main(sys.argv[2:]))
