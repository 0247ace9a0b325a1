"""The rows of a file, part by part: JSON lines, CSV, TSV, Parquet, the text ones also with gzip. Never the whole file.

A row that cannot be read keeps its place. Knows nothing of who answers, or of the output.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from app.client.bulk_columns import Column, carried_column, carried_field
from app.domain import TextInput
from app.errors import DataError

ROWS = 1024  # of a part: it is asked, sorted by length, kept and resumed as one
_BYTES = 2**24  # of a part: less rows where they are long
_FORMAT_OF = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "tsv"}
_FORMAT_OF |= {".parquet": "parquet", ".pq": "parquet"}
_TEXT_NAMES, _PAIR_NAMES = ("text", "text_a"), ("text_pair", "text_b")
_MAX_FIELD_CHARS = 2**24
_READ_BYTES = 2**20
_BOM = b"\xef\xbb\xbf"

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a row has no answer, in one sentence."""

    sentence: str


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """The rows of one part."""

    inputs: tuple[TextInput | Fault, ...]
    carried: Sequence[Column]  # what else the input says of them, texts included


@dataclass(frozen=True, slots=True)
class RawChunk:
    """The rows of one part before they are parsed, so that a run that goes on can pass over them quickly."""

    num_rows: int
    share: float  # of the input that has been read with this
    parse: Callable[[], Chunk]


def format_of(path: Path) -> str | None:
    """By the extension, before .gz where there is one; None where it says nothing."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return _FORMAT_OF.get(suffixes[-1]) if suffixes else None


def read_chunks(path: Path, input_format: str) -> Iterator[RawChunk]:
    """The same chunks each time. Raises DataError where the file is not what its format says."""
    with _told(path):
        if input_format == "parquet":
            yield from _parquet(path)
            return
        with path.open("rb") as raw:
            is_packed = path.suffix.lower() == ".gz"
            stream: Any = io.BufferedReader(gzip.GzipFile(fileobj=raw), _READ_BYTES) if is_packed else raw
            size_bytes = max(1, path.stat().st_size)
            for num_rows, parse in _CHUNKS[input_format](stream):
                yield RawChunk(num_rows, min(1.0, raw.tell() / size_bytes), parse)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        told = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(f"{path} cannot be read: {told}") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _grouped(items: Iterable[Item], size_bytes: Callable[[Item], int]) -> Iterator[list[Item]]:
    group: list[Item] = []
    total_bytes = 0
    for item in items:
        group.append(item)
        total_bytes += size_bytes(item)
        if len(group) == ROWS or total_bytes >= _BYTES:
            yield group
            group, total_bytes = [], 0
    if group:
        yield group


def _column_names(names: Sequence[str]) -> tuple[str, str | None]:
    """Which columns hold the text and its pair."""
    text = next((name for name in _TEXT_NAMES if name in names), None)
    if text is None:
        raise DataError(f"there is no column text or text_a; there are {', '.join(names) or 'none'}")
    return text, next((name for name in _PAIR_NAMES if name in names), None)


def _input(text: object, pair: object) -> TextInput | Fault:
    for name, value in (("text", text), ("second text", pair)):
        if value is None and name == "text":
            return Fault("there is no text")
        if not isinstance(value, str | None):
            return Fault(f"the {name} is not a text but {type(value).__name__}")
        if value is not None and not value.strip():
            return Fault(f"the {name} is empty")
    return TextInput(str(text), None if pair is None else str(pair))


# -- JSON lines --------------------------------------------------------------------------------------------------------

_Line = tuple[int, bytes]  # its number, from 1


def _json_chunks(stream: io.BufferedReader) -> Iterator[tuple[int, Callable[[], Chunk]]]:
    numbered = ((number, line) for number, line in enumerate(stream, start=1) if line.strip())
    for lines in _grouped(numbered, lambda item: len(item[1])):
        yield len(lines), partial(_parse_json, lines)


def _parse_json(lines: Sequence[_Line]) -> Chunk:
    records = [_json_record(number, line) for number, line in lines]
    names = dict.fromkeys(name for record in records if isinstance(record, dict) for name in record)
    carried = [
        carried_column(name, [record.get(name) if isinstance(record, dict) else None for record in records])
        for name in names
    ]
    return Chunk(tuple(map(_json_input, records)), carried)


def _json_record(number: int, line: bytes) -> dict[str, Any] | Fault:
    try:
        record = orjson.loads(line.removeprefix(_BOM) if number == 1 else line)
    except orjson.JSONDecodeError as error:
        return Fault(f"line {number} is not JSON: {error.msg}")
    return record if isinstance(record, dict) else Fault(f"line {number} is not a JSON object")


def _json_input(record: dict[str, Any] | Fault) -> TextInput | Fault:
    if isinstance(record, Fault):
        return record
    text = next((record[name] for name in _TEXT_NAMES if name in record), None)
    return _input(text, next((record[name] for name in _PAIR_NAMES if name in record), None))


# -- CSV and TSV -------------------------------------------------------------------------------------------------------

_Record = tuple[int, list[str] | Fault]  # the line it ends on


def _table_chunks(stream: io.BufferedReader, delimiter: str, quoting: int) -> Iterator[tuple[int, Callable[[], Chunk]]]:
    csv.field_size_limit(_MAX_FIELD_CHARS)
    with io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="") as text:
        records = _records(csv.reader(text, delimiter=delimiter, quoting=quoting))  # type: ignore[arg-type]
        _, header = next(records, (0, []))
        if isinstance(header, Fault):
            raise DataError(header.sentence)
        if len(set(header)) < len(header):
            raise DataError("two columns have the same name")
        _column_names(header)
        for group in _grouped(records, lambda item: _num_chars(item[1])):
            yield len(group), partial(_parse_table, header, group)


def _records(reader: Any) -> Iterator[_Record]:
    """`reader` goes on behind a row that it cannot read."""
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield reader.line_num, Fault(f"line {reader.line_num} cannot be read: {error}")
            continue
        if fields:
            yield reader.line_num, fields


def _num_chars(fields: list[str] | Fault) -> int:
    return 0 if isinstance(fields, Fault) else sum(map(len, fields))


def _parse_table(header: Sequence[str], records: Sequence[_Record]) -> Chunk:
    rows = [_fitted(header, record) for record in records]
    carried = []
    for index, name in enumerate(header):
        values = [_valid(fields[index]) if index < len(fields) else None for _, fields in rows]
        carried.append((carried_field(name, pa.string()), pa.array(values, pa.string())))
    text, pair = _column_names(header)
    inputs = tuple(fault or _cell_input(dict(zip(header, fields, strict=True)), text, pair) for fault, fields in rows)
    return Chunk(inputs, carried)


def _fitted(header: Sequence[str], record: _Record) -> tuple[Fault | None, list[str]]:
    line, fields = record
    if isinstance(fields, Fault):
        return fields, []
    if len(fields) != len(header):
        return Fault(f"line {line} has {len(fields)} fields, and the header {len(header)}"), fields
    return None, fields


def _cell_input(cells: dict[str, str], text: str, pair: str | None) -> TextInput | Fault:
    second = cells[pair] or None if pair is not None else None  # an empty cell: a single text
    read = _input(cells[text], second)
    if isinstance(read, TextInput) and (_valid(read.text) != read.text or _valid(second) != second):
        return Fault("the text is not valid UTF-8")
    return read


def _valid(cell: str | None) -> str | None:
    """What is not UTF-8 came as lone surrogates, which no output can hold."""
    if cell is None or cell.isascii():
        return cell
    return cell.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


_CHUNKS: dict[str, Callable[[io.BufferedReader], Iterator[tuple[int, Callable[[], Chunk]]]]] = {
    "jsonl": _json_chunks,
    "csv": partial(_table_chunks, delimiter=",", quoting=csv.QUOTE_MINIMAL),
    "tsv": partial(_table_chunks, delimiter="\t", quoting=csv.QUOTE_NONE),
}


# -- Parquet -----------------------------------------------------------------------------------------------------------


def _parquet(path: Path) -> Iterator[RawChunk]:
    with pq.ParquetFile(path, buffer_size=_READ_BYTES) as file:
        names, total = file.schema_arrow.names, file.metadata.num_rows
        text, pair = _column_names(names)
        num_read = 0
        for batch in file.iter_batches(batch_size=ROWS):
            num_read += batch.num_rows
            yield RawChunk(batch.num_rows, num_read / total, partial(_parse_batch, batch, text, pair))


def _parse_batch(batch: pa.RecordBatch, text: str, pair: str | None) -> Chunk:
    texts = batch.column(text).to_pylist()
    pairs = [None] * len(texts) if pair is None else batch.column(pair).to_pylist()
    carried = [(carried_field(f.name, f.type), column) for f, column in zip(batch.schema, batch.columns, strict=True)]
    return Chunk(tuple(map(_input, texts, pairs)), carried)
