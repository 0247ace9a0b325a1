"""A row of the prediction log in Parquet, and how those of one request are found.

Knows nothing of where files lie or of how rows come about.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from app.registry.prediction_lines import Row, to_time

_SPAN = pa.struct(
    [
        ("label", pa.string()),
        ("start", pa.int64()),
        ("end", pa.int64()),
        ("score", pa.float64()),
        ("text", pa.string()),
    ]
)
SCHEMA = pa.schema(
    [
        ("time", pa.timestamp("us", "UTC")),
        ("request_id", pa.string()),
        ("actor", pa.string()),  # not in the oldest files
        ("input", pa.int64()),
        ("generation", pa.int64()),
        ("reference", pa.string()),
        ("task", pa.string()),
        ("version", pa.int64()),
        ("digest", pa.string()),
        ("arm", pa.string()),
        ("text_sha256", pa.string()),
        ("text", pa.string()),
        ("text_pair", pa.string()),
        ("label", pa.string()),
        ("labels", pa.list_(pa.string())),
        ("value", pa.float64()),
        ("spans", pa.list_(_SPAN)),
        ("scores", pa.map_(pa.string(), pa.float64())),
        ("error", pa.string()),
        ("tokens", pa.int64()),
        ("truncated", pa.bool_()),
        ("cached", pa.bool_()),
        ("request_passes", pa.float64()),
        ("inference_ms", pa.float64()),
    ]
)
_BATCH_ROWS = 200  # converted in one go
_GROUP_ROWS = 10_000
_DAMAGED = (ArithmeticError, AttributeError, KeyError, TypeError, ValueError)  # Arrow's own are some of these


def to_parquet(rows: Iterable[Row], target: Path) -> int:
    """How many rows it leaves out, which are damaged. Raises OSError."""
    num_damaged, left = 0, iter(rows)
    with pq.ParquetWriter(target, SCHEMA, compression="zstd") as writer:
        group: list[pa.RecordBatch] = []
        while taken := list(islice(left, _BATCH_ROWS)):
            group.append(_batch(taken))
            num_damaged += len(taken) - group[-1].num_rows
            if len(group) * _BATCH_ROWS >= _GROUP_ROWS:
                writer.write_table(pa.Table.from_batches(group))
                group = []
        if group:
            writer.write_table(pa.Table.from_batches(group))
    pa.default_memory_pool().release_unused()
    return num_damaged


def _batch(taken: Sequence[Row]) -> pa.RecordBatch:
    """Without what was damaged."""
    try:
        return _for_arrow(taken)
    except _DAMAGED:
        return _for_arrow([row for row in taken if _is_whole(row)])


def _is_whole(row: Row) -> bool:
    try:
        _for_arrow([row])
    except _DAMAGED:
        return False
    return True


def _for_arrow(rows: Sequence[Row]) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([_column(rows, field) for field in SCHEMA], schema=SCHEMA)


def _column(rows: Sequence[Row], field: pa.Field) -> pa.Array:
    if field.name == "time":  # the only one that a row cannot lack
        return pa.array([datetime.fromisoformat(row["time"]) for row in rows], field.type)
    values = [row.get(field.name) for row in rows]
    return _maps(values, field.type) if pa.types.is_map(field.type) else pa.array(values, field.type)


def _maps(values: Sequence[dict[str, float] | None], kind: pa.MapType) -> pa.Array:
    """All keys and all values end to end, which Arrow takes in less time than pair by pair."""
    ends, keys, items = [0], list[str](), list[float]()
    for value in values:
        if value is not None:
            keys.extend(value.keys())
            items.extend(value.values())
        ends.append(len(keys))
    is_missing = pa.array([value is None for value in values], pa.bool_())
    parts = pa.array(ends, pa.int32()), pa.array(keys, kind.key_type), pa.array(items, kind.item_type)
    return pa.MapArray.from_arrays(*parts, type=kind, mask=is_missing)


def find_in_parquet(file: BinaryIO, request_id: str) -> list[Row]:
    """Reads one column, the others only of groups that have the request. Raises what Arrow does where it is damaged."""
    found: list[Row] = []
    with pq.ParquetFile(file) as parquet:
        for number in range(parquet.num_row_groups):
            ids = parquet.read_row_group(number, columns=["request_id"])["request_id"]
            mask = pc.equal(ids, request_id)
            if pc.any(mask).as_py():
                rows = parquet.read_row_group(number).filter(mask).to_pylist(maps_as_pydicts="lossy")
                found += map(_from_arrow, rows)
    return found


def _from_arrow(row: Row) -> Row:
    """As the JSON line was."""
    row["time"] = to_time(row["time"])
    if row.get("spans") is not None:
        row["spans"] = [{name: value for name, value in span.items() if value is not None} for span in row["spans"]]
    return {name: value for name, value in row.items() if value is not None}
