"""Rows as columns: what the input brought, what the answers said, and one schema over all parts.

In a part the input's columns are named `input:NAME`, so that no task's column can meet them; those that hold objects,
lists or values of several kinds are JSON text, and marked so. Knows nothing of files or of who answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import pyarrow as pa

ERROR, GENERATION = "error", "generation"
_CARRIED = "input:"
_JSON = {b"manifold": b"json"}
_SPAN = pa.struct(
    [
        ("label", pa.string()),
        ("start", pa.int64()),
        ("end", pa.int64()),
        ("text", pa.string()),
        ("score", pa.float64()),
    ]
)
_TYPES = {  # of a task's columns, each named TASK_NAME, in their order
    "label": pa.string(),
    "score": pa.float64(),
    "labels": pa.list_(pa.string()),
    "scores": pa.list_(pa.float64()),  # of `labels`
    "value": pa.float64(),
    "spans": pa.list_(_SPAN),
    "all_scores": pa.map_(pa.string(), pa.float64()),
    "version": pa.int64(),
}
_LAST = {GENERATION: pa.int64(), ERROR: pa.string()}

Column = tuple[pa.Field, pa.Array]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one row: answers by reference as the wire has them, or the error that it has instead."""

    answers: Mapping[str, Mapping[str, Any]]
    generation: int | None = None
    error: str | None = None


# -- one part ----------------------------------------------------------------------------------------------------------


def carried_field(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(_CARRIED + name, kind)


def carried_column(name: str, values: Sequence[object]) -> Column:
    """Values from JSON as a column of their own type, or as JSON text."""
    if not any(isinstance(value, dict | list) for value in values):
        try:
            array = pa.array(values)
            return carried_field(name, array.type), array
        except (pa.ArrowException, OverflowError):
            pass  # of several kinds, or numbers too large for any
    return carried_field(name, pa.string()).with_metadata(_JSON), _as_json(values)


def with_answers(carried: Sequence[Column], outcomes: Sequence[Outcome], all_scores: bool) -> pa.Table:
    """The input's columns, the answers', generation and error."""
    columns: dict[str, list[Any]] = {}
    types: dict[str, pa.DataType] = {}
    for index, outcome in enumerate(outcomes):
        for reference, answer in outcome.answers.items():
            for kind, value in _cells(answer, all_scores).items():
                name = f"{reference}_{kind}"
                types[name] = _TYPES[kind]
                columns.setdefault(name, [None] * len(outcomes))[index] = value
    columns[GENERATION] = [outcome.generation for outcome in outcomes]
    columns[ERROR] = [_error(outcome) for outcome in outcomes]
    fields = [field for field, _ in carried]
    arrays = [array for _, array in carried]
    for name in sorted(columns, key=lambda name: name in _LAST):
        kind = types.get(name) or _LAST[name]
        fields.append(pa.field(name, kind))
        arrays.append(pa.array(columns[name], kind))
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))


def _cells(answer: Mapping[str, Any], all_scores: bool) -> dict[str, Any]:
    """By the names of `_TYPES`, in their order."""
    cells: dict[str, Any] = {name: answer[name] for name in ("label", "score", "labels") if name in answer}
    if "labels" in answer:
        cells["scores"] = [answer["scores"][label] for label in answer["labels"]]
    cells |= {name: answer[name] for name in ("value", "spans") if name in answer}
    if all_scores and "scores" in answer:
        cells["all_scores"] = list(answer["scores"].items())
    return {**cells, "version": answer["version"]}


def _error(outcome: Outcome) -> str | None:
    failed = [f"{name}: {answer['error']}" for name, answer in outcome.answers.items() if "error" in answer]
    return outcome.error or "; ".join(failed) or None


# -- all parts ---------------------------------------------------------------------------------------------------------


def joint_schema(schemas: Iterable[pa.Schema]) -> pa.Schema:
    """The input's columns, then the answers', each where it first comes, then generation and error."""
    found = {name: pa.field(name, kind) for name, kind in _LAST.items()}
    for schema in schemas:
        for field in schema:
            found[field.name] = _joint(found[field.name], field) if field.name in found else field
    ordered = sorted(found.values(), key=lambda field: (not _is_carried(field), field.name in _LAST))
    return pa.schema([_filled(field) for field in ordered])


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Its columns in the order and the types of the schema; those it lacks are empty."""
    return pa.Table.from_arrays([_fitting(table, field) for field in schema], schema=schema)


def is_json(field: pa.Field) -> bool:
    return bool(field.metadata == _JSON)


def output_names(schema: pa.Schema) -> list[str]:
    """As the output has them: a column of the input that is named like one of the answers becomes `input_NAME`."""
    taken = {field.name for field in schema if not _is_carried(field)}
    names = []
    for field in schema:
        name = field.name.removeprefix(_CARRIED)
        while _is_carried(field) and name in taken:
            name = f"input_{name}"
        taken.add(name)
        names.append(name)
    return names


def _is_carried(field: pa.Field) -> bool:
    return bool(field.name.startswith(_CARRIED))


def _joint(old: pa.Field, new: pa.Field) -> pa.Field:
    if old.equals(new, check_metadata=True) or pa.types.is_null(new.type):
        return old
    if pa.types.is_null(old.type):
        return new
    if {old.type, new.type} == {pa.int64(), pa.float64()}:
        return pa.field(old.name, pa.float64())
    return pa.field(old.name, pa.string(), metadata=_JSON)


def _filled(field: pa.Field) -> pa.Field:
    return field.with_type(pa.string()) if pa.types.is_null(field.type) else field


def _fitting(table: pa.Table, field: pa.Field) -> pa.Array | pa.ChunkedArray:
    index = table.schema.get_field_index(field.name)
    if index < 0:
        return pa.nulls(table.num_rows, field.type)
    if is_json(field) and not is_json(table.schema.field(index)):
        return _as_json(table.column(index).to_pylist())
    return table.column(index).cast(field.type)


def _as_json(values: Iterable[object]) -> pa.Array:
    texts = (None if value is None else orjson.dumps(value).decode() for value in values)
    return pa.array(texts, pa.string())
