"""A row of the prediction log as a JSON line, and how those of one request are found.

Knows nothing of where files lie or of how rows come about.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, BinaryIO

import orjson

Row = dict[str, Any]  # what does not apply is not in it

_BLOCK_BYTES = 1 << 20  # a search in one holds the interpreter, for less than a millisecond


def to_line(row: Row) -> bytes:
    return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)


def find_lines(file: BinaryIO, request_id: str) -> list[Row]:
    """A last line that is not whole is passed over, and so is what is no row."""
    wanted = orjson.dumps({"request_id": request_id})[1:-1]
    return [row for line in _lines_with(file, wanted) for row in parsed(line) if row.get("request_id") == request_id]


def _lines_with(file: BinaryIO, wanted: bytes) -> Iterator[bytes]:
    rest = b""
    while block := file.read(_BLOCK_BYTES):
        whole, newline, rest = (rest + block).rpartition(b"\n")
        start = 0
        while newline and (found := whole.find(wanted, start)) >= 0:
            end = whole.find(b"\n", found)
            end = end if end >= 0 else len(whole)
            yield whole[whole.rfind(b"\n", 0, found) + 1 : end]
            start = end


def parsed(line: bytes) -> Iterator[Row]:
    try:
        row = orjson.loads(line)
    except ValueError:
        return
    if isinstance(row, dict):
        yield row


def time_of(row: Row) -> float | None:
    """Seconds since the epoch; None where the row is damaged."""
    try:
        return datetime.fromisoformat(row["time"]).timestamp()
    except (KeyError, TypeError, ValueError):
        return None


def to_time(moment: datetime) -> str:
    return f"{moment.astimezone(UTC).replace(tzinfo=None).isoformat(timespec='microseconds')}Z"
