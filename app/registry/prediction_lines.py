"""The prediction log as JSON lines, and how the rows of one request are found.

A line of the part that is written is a request: its results as they were answered, which costs those who answer least.
A line of a finished one is a row, for one version's answer to one input. Knows nothing of where files lie or of how
answers come about.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import orjson

Row = dict[str, Any]  # what does not apply is not in it

_BLOCK_BYTES = 1 << 20  # a search in one holds the interpreter, for less than a millisecond
_SAID = ("label", "labels", "value", "spans", "scores", "error")  # of an answer


def to_line(row: Row) -> bytes:
    return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)


def to_json_lines(rows: Iterable[Row], target: Path) -> None:
    """A line a row. Raises OSError."""
    with target.open("wb") as file:
        file.writelines(map(to_line, rows))


def find_lines(file: BinaryIO, request_id: str) -> list[Row]:
    """A last line that is not whole is passed over, and so is what is no row."""
    wanted = orjson.dumps({"request_id": request_id})[1:-1]
    return [row for line in _lines_with(file, wanted) for row in rows_of(line) if row.get("request_id") == request_id]


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


def rows_of(line: bytes) -> list[Row]:
    """Of a request, in the order of its inputs and of what was asked for; or the row that the line is.

    None of what is damaged.
    """
    try:
        said = orjson.loads(line)
        return list(_of_request(said)) if "inputs" in said else [dict(said.items())]
    except (AttributeError, KeyError, TypeError, ValueError):
        return []


def _of_request(said: Row) -> Iterator[Row]:
    inputs, results = said.pop("inputs"), said.pop("results")
    for index, (of_input, answers) in enumerate(zip(inputs, results, strict=True)):
        for target in of_input.pop("targets"):
            answer = answers[target["reference"]]
            told = {name: answer[name] for name in _SAID if name in answer}
            yield said | {"input": index} | of_input | target | told


def time_of(row: Row) -> float | None:
    """Seconds since the epoch; None where the row is damaged."""
    try:
        return datetime.fromisoformat(row["time"]).timestamp()
    except (KeyError, TypeError, ValueError):
        return None


def to_time(moment: datetime) -> str:
    return f"{moment.astimezone(UTC).replace(tzinfo=None).isoformat(timespec='microseconds')}Z"
