"""The part of the prediction log that is being written: a local file of JSON lines, whole ones only.

A lock on it says that somebody still writes it, and goes with the process. Knows neither stores nor what a row says.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

logger = logging.getLogger(__name__)

_NAME = re.compile(r"(\d{8}T\d{9}Z)_(open|\d{8}T\d{9}Z)_([A-Za-z0-9-]+)_([0-9a-f]{8})\.(jsonl|parquet)")
_OPEN = "open"
_TAIL_BYTES = 65_536


@dataclass(frozen=True, slots=True)
class PartName:
    """`<began>_<ended or open>_<server>_<chance>.<kind>`: sorts by time, and no two servers write the same."""

    began_s: float
    ended_s: float | None  # None: not finished yet
    server: str
    chance: str
    kind: str  # jsonl or parquet

    def __str__(self) -> str:
        ended = _OPEN if self.ended_s is None else _stamp(self.ended_s)
        return f"{_stamp(self.began_s)}_{ended}_{self.server}_{self.chance}.{self.kind}"

    @classmethod
    def parse(cls, name: str) -> PartName | None:
        """None for what is no part of a log."""
        found = _NAME.fullmatch(name)
        if found is None:
            return None
        began, ended, server, chance, kind = found.groups()
        try:
            return cls(_seconds(began), None if ended == _OPEN else _seconds(ended), server, chance, kind)
        except ValueError:
            return None

    @property
    def key(self) -> tuple[str, str]:
        """The same for a part before and after it was finished."""
        return self.server, self.chance


def _stamp(seconds: float) -> str:
    """To the millisecond, in UTC."""
    moment = datetime.fromtimestamp(seconds, UTC)
    return f"{moment:%Y%m%dT%H%M%S}{moment.microsecond // 1000:03d}Z"


def _seconds(stamp: str) -> float:
    return datetime.strptime(stamp[:-4], "%Y%m%dT%H%M%S").replace(tzinfo=UTC).timestamp() + int(stamp[-4:-1]) / 1000


def create_locked(path: Path, mode: int) -> int:
    """The descriptor of a new file, to append to. Raises OSError, also where a place has no locks, and leaves no file.

    Some network file systems have none, and a part that nobody can lock could be finished while it is written.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, mode)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        os.close(descriptor)
        path.unlink(missing_ok=True)
        raise
    return descriptor


class OpenPart:
    """One file that is appended to. Not for two threads at once."""

    def __init__(self, folder: Path, server: str, now_s: float) -> None:
        """Raises OSError."""
        self.began_s, self.size_bytes = now_s, 0
        self._path = folder / str(PartName(now_s, None, server, uuid.uuid4().hex[:8], "jsonl"))
        folder.mkdir(parents=True, exist_ok=True)  # somebody may have cleared it away
        self._descriptor = create_locked(self._path, 0o640)

    def append(self, lines: bytes) -> None:
        """All of them, or none and OSError."""
        rest = memoryview(lines)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self.size_bytes)
            raise
        self.size_bytes += len(lines)

    @property
    def is_gone(self) -> bool:
        """Whether somebody removed the file, so that what is written goes nowhere."""
        return os.fstat(self._descriptor).st_nlink == 0

    def close(self) -> None:
        os.close(self._descriptor)


class PartWriter:
    """Appends to one part after the other. Not for two threads at once."""

    def __init__(
        self, folder: Path, server: str, most_bytes: int, most_s: float, clock: Callable[[], float] = time.time
    ) -> None:
        """A part ends with `most_bytes`, or `most_s` after it began."""
        self._folder, self._server = folder, server
        self._most_bytes, self._most_s, self._clock = most_bytes, most_s, clock
        self._part: OpenPart | None = None

    def append(self, lines: bytes) -> None:
        """All of the lines go into one part, or none and OSError."""
        self.end_if_due()
        if self._part is None:
            self._part = OpenPart(self._folder, self._server, self._clock())
        self._part.append(lines)

    def end_if_due(self) -> None:
        part = self._part
        if part is None:
            return
        is_old = self._clock() - part.began_s >= self._most_s and part.size_bytes > 0
        if is_old or part.size_bytes >= self._most_bytes or part.is_gone:
            self.end()

    def end(self) -> None:
        part, self._part = self._part, None
        if part is not None:
            try:
                part.close()
            except OSError as error:  # some file systems tell only now what they did not write
                logger.error("a part of the prediction log may lack its end: %s", error)


@contextlib.contextmanager
def left_alone(path: Path) -> Iterator[int | None]:
    """The descriptor of a part that nobody writes any more, nor finishes; nobody else does then until it is closed.

    That is at the end of this block, but for who inherits it. None where somebody does. What a process left when it
    was killed ends with its last whole line from here on.
    """
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        yield None
        return
    try:
        yield descriptor if _is_ours(path, descriptor) else None
    finally:
        os.close(descriptor)


def _is_ours(path: Path, descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_same = path.stat().st_ino == os.fstat(descriptor).st_ino
    except (BlockingIOError, FileNotFoundError):  # it is written; or was finished meanwhile
        return False
    stat = os.fstat(descriptor)
    if is_same and stat.st_size:
        os.ftruncate(descriptor, _whole_bytes(descriptor, stat.st_size))
        os.utime(descriptor, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return is_same and stat.st_size > 0  # an empty one may just have been made


def _whole_bytes(descriptor: int, size_bytes: int) -> int:
    """How many bytes the whole lines have."""
    end = size_bytes
    while end:
        start = max(0, end - _TAIL_BYTES)
        position = os.pread(descriptor, end - start, start).rfind(b"\n")
        if position >= 0:
            return start + position + 1
        end = start
    return 0
