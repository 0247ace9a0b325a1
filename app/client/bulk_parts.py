"""What a run has done so far, in the folder OUT.partial: durable parts, and what they were made of.

A part is there wholly or not at all, and so is OUT. Knows nothing of who answers.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from app.client.bulk_columns import ERROR, conform, joint_schema
from app.client.bulk_sink import SINKS
from app.errors import ConflictError, DataError

_NOTE, _DRAFT = "run.json", "draft"
_ZSTD = pa.ipc.IpcWriteOptions(compression="zstd")


@dataclass(frozen=True, slots=True)
class Summary:
    """Of all rows, those of earlier runs included."""

    rows: int
    failed: int  # they have an error
    first_failure: tuple[int, str] | None  # row, from 1, and its error


class Parts:
    def __init__(self, folder: Path, out: Path) -> None:
        self._folder = folder
        self._out = out
        self.count = 0
        while _part(self._folder, self.count).exists():
            self.count += 1

    def keep(self, table: pa.Table) -> None:
        """As the next part, on the disk when it returns."""
        draft = self._folder / _DRAFT
        with pa.OSFile(str(draft), "wb") as file, pa.ipc.new_file(file, table.schema, options=_ZSTD) as writer:
            writer.write_table(table.combine_chunks())
        _replace(draft, _part(self._folder, self.count))
        self.count += 1

    def join(self) -> Summary:
        """Makes OUT of all parts, whole in one moment, and removes them."""
        schema = joint_schema(_read(_part(self._folder, number)).schema for number in range(self.count))
        rows, failed, first = 0, 0, None
        draft = self._folder / _DRAFT
        with SINKS[self._out.suffix.lower()](draft, schema) as write:
            for number in range(self.count):
                table = _read(_part(self._folder, number))
                write(conform(table, schema))
                errors = table.column(ERROR)
                first = first or _first(errors, rows)
                rows, failed = rows + table.num_rows, failed + len(errors) - errors.null_count
        _replace(draft, self._out)
        _clear(self._folder)
        return Summary(rows, failed, first)


@contextmanager
def open_parts(out: Path, made_of: Mapping[str, Any], is_afresh: bool) -> Iterator[Parts]:
    """Those of an earlier run with the same `made_of`, or none yet where there are none or `is_afresh`.

    Raises ConflictError where another run has them, they were made of something else, or OUT is there already.
    """
    folder = out.with_name(out.name + ".partial")
    try:
        if not is_afresh and out.exists() and not _is_begun(folder):
            raise ConflictError(f"{out} is there already: --overwrite makes it anew")
        folder.mkdir(exist_ok=True)
        with (folder / "lock").open("a") as lock:
            _lock(lock.fileno(), out)
            if _is_begun(folder) and not is_afresh:
                _check(out, json.loads((folder / _NOTE).read_bytes()), made_of)
            else:
                _clear(folder)
                (folder / _DRAFT).write_text(json.dumps(made_of))
                _replace(folder / _DRAFT, folder / _NOTE)
            try:
                yield Parts(folder, out)
            finally:
                if not _is_begun(folder):
                    _remove(folder)
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror or error}") from error


def _is_begun(folder: Path) -> bool:
    return (folder / _NOTE).exists() and _part(folder, 0).exists()


def _part(folder: Path, number: int) -> Path:
    return folder / f"part-{number:07}.arrow"


def _lock(descriptor: int, out: Path) -> None:
    """Until the process ends, however it does."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConflictError(f"another run writes {out} at this moment: wait for it, or take another --out") from error


def _check(out: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        raise ConflictError(
            f"a run for {out} was begun with other values ({', '.join(changed)}): "
            "go on with those, or begin again with --overwrite"
        )


def _read(path: Path) -> pa.Table:
    with pa.OSFile(str(path)) as file, pa.ipc.open_file(file) as reader:
        return reader.read_all()


def _first(errors: pa.ChunkedArray, rows_before: int) -> tuple[int, str] | None:
    found = ((rows_before + index, error) for index, error in enumerate(errors.to_pylist(), start=1) if error)
    return next(found, None)


def _replace(draft: Path, path: Path) -> None:
    """Under its name only when all of it is on the disk."""
    _sync(draft)
    os.replace(draft, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _clear(folder: Path) -> None:
    """Takes what is ours, the note first: without it nothing else counts."""
    for path in (folder / _NOTE, folder / _DRAFT, *folder.glob("part-*.arrow")):
        path.unlink(missing_ok=True)


def _remove(folder: Path) -> None:
    (folder / _NOTE).unlink(missing_ok=True)
    (folder / "lock").unlink(missing_ok=True)
    with suppress(OSError):  # somebody else put something there
        folder.rmdir()
