"""Parts of the prediction log get their last form in a process of its own, with the processor time that is left.

To make rows and Parquet holds an interpreter for milliseconds at a time: in the server's own, every answer would wait.
Knows neither the log nor what a row says.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import IO, Literal, NamedTuple

from app.registry.durable import sync
from app.registry.prediction_lines import Row, rows_of, to_json_lines

logger = logging.getLogger(__name__)

_ROOT = Path(__file__).parents[2]  # that `app` lies in
_CODE = f"import sys; sys.path.append(sys.argv[1]); from {__name__} import main; sys.exit(main(*sys.argv[2:]))"
_LEAST = 19  # niceness, where there is no class for what only takes idle time
_POLL_S = 0.25
_MOST_IDLE_S = 60.0  # where there is no idle time, others must not wait for ever
_KEPT_S = 60.0  # a process that has nothing to do: to begin one takes as long as to convert some megabytes
_LAST_S = 5.0  # for a process that broke, to say why
_TOLD_CHARACTERS, _LAST_BYTES = 500, 65_536
_MESSAGE_BYTES = 65_536  # at most, either way


class _Haste(StrEnum):
    IDLE = "idle"
    PRESSING = "pressing"


class Converter:
    """Keeps its process for the next part. Not for two threads at once."""

    def __init__(self, kind: Literal["jsonl", "parquet"]) -> None:
        self._kind = kind
        self._worker: _Worker | None = None

    def convert(self, part: int, target: Path, is_pressing: Callable[[], bool], left_s: Callable[[], float]) -> bool:
        """Writes the rows of `part` into `target`, on its disk when this returns.

        `part`: the descriptor of a file that is locked. The process gets it too, so that the lock outlives this one if
        it is killed, and nobody else writes `target` meanwhile. Once it `is_pressing`, or takes long, it gets as much
        time as anybody has. False where `left_s` came to nothing before it was done. Raises OSError.
        """
        until_s = time.monotonic() + _MOST_IDLE_S

        def has_time() -> bool:
            return left_s() > 0

        def may_be_idle() -> bool:
            return time.monotonic() < until_s and not is_pressing() and has_time()

        if may_be_idle() and self._run(part, target, _Haste.IDLE, may_be_idle):
            return True
        return has_time() and self._run(part, target, _Haste.PRESSING, has_time)

    def rest(self) -> None:
        """Ends a process that has had nothing to do for a while."""
        worker = self._worker
        if worker is not None and time.monotonic() - worker.used_s > _KEPT_S:
            self.close()

    def close(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.end()

    def _run(self, part: int, target: Path, haste: _Haste, may_go_on: Callable[[], bool]) -> bool:
        """False where it was ended."""
        try:
            answer = self._worker_for(haste).run(part, target, self._kind, may_go_on)
        except BaseException:  # whatever it is: no answer of this part may be taken for one of the next
            self.close()
            raise
        if answer is None:
            self.close()
            return False
        if answer.fault is not None:
            raise OSError(answer.fault)
        if answer.num_damaged:
            told = "%d damaged lines or rows are not in what is made of them: %s"
            logger.warning(told, answer.num_damaged, target)
        return True

    def _worker_for(self, haste: _Haste) -> _Worker:
        worker = self._worker
        if worker is None or worker.haste is not haste or not worker.is_alive():
            self.close()
            worker = self._worker = _Worker(haste)
        return worker


class _Answer(NamedTuple):
    num_damaged: int = 0
    fault: str | None = None


class _Worker:
    """The process, as the server sees it. It ends with the server, or with the part that it is at."""

    def __init__(self, haste: _Haste) -> None:
        self.haste, self.used_s = haste, time.monotonic()
        command = [sys.executable, "-P", "-c", _CODE, str(_ROOT), haste]
        with ExitStack() as undo:
            said = undo.enter_context(tempfile.TemporaryFile())  # a pipe that nobody reads would fill up
            ours, theirs = map(undo.enter_context, socket.socketpair())
            process = subprocess.Popen(command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=said)
            theirs.close()
            undo.pop_all()
        ours.settimeout(_POLL_S)
        self._socket, self._process, self._said, self._said_bytes = ours, process, said, 0
        self.end = weakref.finalize(self, _end, process, ours, said)

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def run(self, part: int, target: Path, kind: str, may_go_on: Callable[[], bool]) -> _Answer | None:
        """None where it may not go on. Raises OSError where the process ends by itself."""
        os.lseek(part, 0, os.SEEK_SET)
        self._said_bytes = os.fstat(self._said.fileno()).st_size
        with suppress(ConnectionError):  # it has ended, and says why below
            socket.send_fds(self._socket, [json.dumps([str(target), kind]).encode()], [part])
        told = self._hear(may_go_on)
        self.used_s = time.monotonic()
        if told is None:
            return None
        if not told:
            raise OSError(self._last_words())
        return _Answer(*json.loads(told))

    def _hear(self, may_go_on: Callable[[], bool]) -> bytes | None:
        while True:
            try:
                return self._socket.recv(_MESSAGE_BYTES)
            except TimeoutError:
                if not may_go_on():
                    return None
            except ConnectionError:
                return b""

    def _last_words(self) -> str:
        try:
            ending = f"ended with status {self._process.wait(_LAST_S)}"
        except subprocess.TimeoutExpired:
            ending = "broke and did not end"
        number = self._said.fileno()
        start = max(self._said_bytes, os.fstat(number).st_size - _LAST_BYTES)
        last = os.pread(number, _LAST_BYTES, start).decode("utf-8", "replace").strip().rpartition("\n")[2]
        return last[-_TOLD_CHARACTERS:] or f"the process that makes its rows {ending}"


def _end(process: subprocess.Popen[bytes], ours: socket.socket, said: IO[bytes]) -> None:
    with ours, said, process:  # which waits until it has ended
        process.kill()


# -- in the other process ----------------------------------------------------------------------------------------------


def main(haste: str) -> int:
    """Standard input is the server: each of its messages is a target and its kind, and comes with the part.

    The answer is how much of the part is damaged, and a fault if there is one. Whoever stops the server leaves this to
    the server.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.umask(0o077)  # until the server gives the file its mode
    if haste == _Haste.IDLE:
        _step_back()
    with socket.socket(fileno=sys.stdin.fileno()) as server:
        while True:
            asked, parts, _, _ = socket.recv_fds(server, _MESSAGE_BYTES, 1)
            if not parts:  # the server has gone
                return 0
            with os.fdopen(parts[0], "rb") as part:
                answer = _answer(part, *json.loads(asked))
            server.sendall(json.dumps(answer).encode())


def _answer(part: Iterable[bytes], target: str, kind: str) -> _Answer:
    rows, num_left_out = _Rows(part), 0
    try:
        if kind == "jsonl":
            to_json_lines(rows, Path(target))
        else:
            num_left_out = import_module("app.registry.prediction_parquet").to_parquet(rows, Path(target))
        sync(Path(target))
    except OSError as error:
        return _Answer(fault=error.strerror or str(error))
    return _Answer(rows.num_damaged + num_left_out)


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
