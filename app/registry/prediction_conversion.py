"""A part of the prediction log gets its last form in a process of its own, with the processor time that is left.

To make rows and Parquet holds an interpreter for milliseconds at a time: in the server's own, every answer would wait.
Knows neither the log nor what a row says.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Literal

from app.registry.durable import sync
from app.registry.prediction_lines import Row, rows_of, to_json_lines

logger = logging.getLogger(__name__)

_ROOT = Path(__file__).parents[2]  # that `app` lies in
_CODE = f"import sys; sys.path.append(sys.argv[1]); from {__name__} import main; sys.exit(main(*sys.argv[2:]))"
_LEAST = 19  # niceness, where there is no class for what only takes idle time
_POLL_S = 0.25
_MOST_IDLE_S = 60.0  # where there is no idle time, others must not wait for ever
_TOLD_CHARACTERS = 500


def convert(
    part: int,
    target: Path,
    kind: Literal["jsonl", "parquet"],
    is_pressing: Callable[[], bool],
    left_s: Callable[[], float],
) -> bool:
    """Writes the rows of `part` into `target`, on its disk when this returns.

    `part`: the descriptor of a file that is locked. The process has it too, so that the lock outlives this one if it
    is killed, and nobody else writes `target` meanwhile. Once it `is_pressing`, or takes long, it gets as much time as
    anybody has. False where `left_s` came to nothing before it was done. Raises OSError.
    """
    until_s = time.monotonic() + _MOST_IDLE_S

    def has_time() -> bool:
        return left_s() > 0

    def may_be_idle() -> bool:
        return time.monotonic() < until_s and not is_pressing() and has_time()

    if may_be_idle() and _run(part, [str(target), kind, "idle"], may_be_idle):
        return True
    return has_time() and _run(part, [str(target), kind, "pressing"], has_time)


def _run(part: int, arguments: Sequence[str], may_go_on: Callable[[], bool]) -> bool:
    """False where it was ended."""
    os.lseek(part, 0, os.SEEK_SET)
    command = [sys.executable, "-P", "-c", _CODE, str(_ROOT), *arguments]
    with subprocess.Popen(
        command, stdin=part, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as process:
        told = _wait(process, may_go_on)
    if told is None:
        return False
    num_damaged, fault = told
    if process.returncode:
        last = fault.strip().rpartition("\n")[2][-_TOLD_CHARACTERS:]
        raise OSError(last or f"the process that makes its rows ended with status {process.returncode}")
    if num_damaged != "0":
        logger.warning("%s damaged lines or rows are not in what is made of them: %s", num_damaged, arguments[0])
    return True


def _wait(process: subprocess.Popen[str], may_go_on: Callable[[], bool]) -> tuple[str, str] | None:
    """What it says on standard output and error; None where it was ended."""
    while True:
        try:
            return process.communicate(timeout=_POLL_S)
        except subprocess.TimeoutExpired:
            if not may_go_on():
                process.kill()
                return None


def main(target: str, kind: str, haste: str) -> int:
    """In the other process: standard input is the part, and how much of it is damaged is told on standard output.

    Whoever stops the server leaves this to the server.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.umask(0o077)  # until the server gives the file its mode
    if haste == "idle":
        _step_back()
    try:
        rows, num_left_out = _Rows(sys.stdin.buffer), 0
        if kind == "jsonl":
            to_json_lines(rows, Path(target))
        else:
            num_left_out = import_module("app.registry.prediction_parquet").to_parquet(rows, Path(target))
        sync(Path(target))
    except OSError as error:
        sys.stderr.write(error.strerror or str(error))
        return 1
    sys.stdout.write(str(rows.num_damaged + num_left_out))
    return 0


class _Rows:
    """Those of a part, once."""

    def __init__(self, lines: Iterable[bytes]) -> None:
        self._lines = lines
        self.num_damaged = 0  # lines

    def __iter__(self) -> Iterator[Row]:
        for line in self._lines:
            rows = rows_of(line)
            self.num_damaged += not rows
            yield from rows


def _step_back() -> None:
    """Whoever has work goes before."""
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except (AttributeError, OSError):  # another system, or one that does not let us
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, _LEAST)
