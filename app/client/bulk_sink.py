"""The finished file: tables in, Parquet, JSON lines or CSV out, a table at a time.

Knows which columns are JSON text; nothing of what they mean.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from app.client.bulk_columns import is_json, output_names

Write = Callable[[pa.Table], None]  # of tables that all have the sink's schema

_GROUP_ROWS, _GROUP_BYTES = 2**16, 2**25  # of a row group of Parquet, whichever is reached first


@contextmanager
def _parquet(path: Path, schema: pa.Schema) -> Iterator[Write]:
    named = pa.schema([pa.field(name, f.type) for name, f in zip(output_names(schema), schema, strict=True)])
    waiting: list[pa.Table] = []
    with pq.ParquetWriter(path, named) as writer:

        def flush() -> None:
            if waiting:
                writer.write_table(pa.concat_tables(waiting), _GROUP_ROWS)
                waiting.clear()

        def write(table: pa.Table) -> None:
            waiting.append(pa.Table.from_arrays(table.columns, schema=named))
            rows, size_bytes = sum(t.num_rows for t in waiting), sum(t.nbytes for t in waiting)
            if rows >= _GROUP_ROWS or size_bytes >= _GROUP_BYTES:
                flush()

        yield write
        flush()


@contextmanager
def _json_lines(path: Path, schema: pa.Schema) -> Iterator[Write]:
    names = output_names(schema)
    with path.open("wb") as file:

        def write(table: pa.Table) -> None:
            columns = [_json_values(field, table.column(index)) for index, field in enumerate(schema)]
            for values in zip(*columns, strict=True):
                file.write(_line(dict(zip(names, values, strict=True))))

        yield write


@contextmanager
def _csv(path: Path, schema: pa.Schema) -> Iterator[Write]:
    kinds = [field.type if _is_simple(field.type) else pa.string() for field in schema]
    named = pa.schema(list(zip(output_names(schema), kinds, strict=True)))
    with pa_csv.CSVWriter(path, named) as writer:

        def write(table: pa.Table) -> None:
            cells = [_csv_cells(column) for column in table.columns]
            writer.write_table(pa.Table.from_arrays(cells, schema=named))

        yield write


SINKS: dict[str, Callable[[Path, pa.Schema], AbstractContextManager[Write]]] = {
    ".parquet": _parquet,
    ".pq": _parquet,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": _csv,
}


def _is_simple(kind: pa.DataType) -> bool:
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    return bool(is_number or pa.types.is_boolean(kind) or pa.types.is_string(kind))


def _json_values(field: pa.Field, column: pa.ChunkedArray) -> list[Any]:
    """What orjson can write."""
    if is_json(field):
        return [None if text is None else orjson.Fragment(text) for text in column.to_pylist()]
    return _values(column)


def _csv_cells(column: pa.ChunkedArray) -> pa.ChunkedArray | pa.Array:
    if _is_simple(column.type):
        return column
    values = _values(column)
    texts = [v if isinstance(v, str | None) else orjson.dumps(v, default=_told).decode() for v in values]
    return pa.array(texts, pa.string())


def _values(column: pa.ChunkedArray) -> list[Any]:
    """As Python has them; times and decimals as Arrow writes them, bytes in base64."""
    kind = column.type
    if _is_simple(kind):
        return list(column.to_pylist())
    if pa.types.is_nested(kind):
        return list(column.to_pylist(maps_as_pydicts="lossy"))
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return [None if value is None else base64.b64encode(value).decode() for value in column.to_pylist()]
    return list(column.cast(pa.string()).to_pylist())


def _line(row: dict[str, Any]) -> bytes:
    return orjson.dumps(row, default=_told, option=orjson.OPT_APPEND_NEWLINE)


def _told(value: object) -> str:
    """What lies inside of lists and objects and is none of JSON's."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)
