"""A part of the prediction log gets its last form in a process of its own, with the processor time that is left.

To make rows and Parquet holds an interpreter for milliseconds at a time: in the server's own, every answer would wait.
Knows neither the log nor what a row says.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Literal

_ROOT = Path(__file__).parents[2]  # that `app` lies in
_CODE = f"import sys; sys.path.insert(0, sys.argv[1]); from {__name__} import main; sys.exit(main(*sys.argv[2:]))"
_LEAST = 19  # niceness, where there is no class for what only takes idle time
_POLL_S = 0.25
_HURRY_S = 4.0  # for what is left when the server stops
_TOLD_CHARACTERS = 500


def convert(
    part: int,
    target: Path,
    kind: Literal["jsonl", "parquet"],
    *,
    is_pressing: bool,
    is_stopping: Callable[[], bool],
) -> None:
    """Writes the rows of `part` into `target`.

    `part`: the descriptor of a file that is locked. The process has it too, so that the lock outlives this one if it
    is killed, and nobody else writes `target` meanwhile. `is_pressing`: with as much time as anybody has. Raises
    OSError, also where it is not done some seconds after `is_stopping`.
    """
    os.lseek(part, 0, os.SEEK_SET)
    haste = "pressing" if is_pressing else "idle"
    command = [sys.executable, "-P", "-c", _CODE, str(_ROOT), str(target), kind, haste]
    with subprocess.Popen(
        command,
        stdin=part,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as process:
        told = _wait(process, is_stopping)
    if process.returncode:
        last = told.strip().rpartition("\n")[2][-_TOLD_CHARACTERS:]
        raise OSError(last or f"what makes {kind} of it ended with status {process.returncode}")


def _wait(process: subprocess.Popen[str], is_stopping: Callable[[], bool]) -> str:
    """What it says. A process that takes too long at the end is ended."""
    until_s: float | None = None
    while True:
        try:
            return process.communicate(timeout=_POLL_S)[1]
        except subprocess.TimeoutExpired:
            if until_s is None and is_stopping():
                until_s = time.monotonic() + _HURRY_S
            if until_s is not None and time.monotonic() > until_s:
                process.kill()


def main(target: str, kind: str, haste: str) -> int:
    """In the other process: standard input is the part. Whoever stops the server leaves this to the server."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if haste == "idle":
        _step_back()
    try:
        if kind == "jsonl":
            import_module("app.registry.prediction_lines").to_json_lines(sys.stdin.buffer, Path(target))
        else:
            import_module("app.registry.prediction_parquet").to_parquet(sys.stdin.buffer, Path(target))
    except OSError as error:
        sys.stderr.write(error.strerror or str(error))
        return 1
    return 0


def _step_back() -> None:
    """Whoever has work goes before, where a system lets us say so."""
    with suppress(OSError):
        if hasattr(os, "SCHED_IDLE"):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        else:
            os.setpriority(os.PRIO_PROCESS, 0, _LEAST)
