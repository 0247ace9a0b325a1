"""Records to JSON and back: what the index and the last good state hold. Knows neither keys nor files.

What was written always reads again: strings that are no UTF-8 get a ? and numbers that JSON lacks become null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from app.errors import UnavailableError
from app.rollout import IndexView, TaskRecord, Traffic, VersionRecord

T = TypeVar("T")

TASK_FIELD = "task"  # of a task's hash: all but its versions
_VERSION_FIELD = "v:"


@dataclass(frozen=True, slots=True)
class _Stand:
    """A task without its versions."""

    traffic: Traffic | None
    previous: tuple[int, ...]
    changed: int


def to_json(value: Any) -> Any:
    """JSON values of a record, or of anything made of records."""
    if is_dataclass(value):
        return {f.name: to_json(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {_clean(str(name)): to_json(item) for name, item in value.items()}
    if isinstance(value, Set):
        return sorted(map(to_json, value))
    if isinstance(value, list | tuple):
        return list(map(to_json, value))
    if isinstance(value, str):
        return _clean(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def dumps(value: Any) -> str:
    """One text for one value: what the audit log's hashes are taken of."""
    return json.dumps(to_json(value), sort_keys=True, separators=(",", ":"))


def loads(kind: Callable[..., T], raw: bytes | str, what: str) -> T:
    """A record of this kind. `what` names it where it cannot be read: UnavailableError, with a sentence."""
    try:
        record: T = _adapter(kind).validate_json(raw)
    except ValidationError as error:
        raise _unreadable(what, error) from error
    return record


def view_to_json(view: IndexView) -> dict[str, Any]:
    result: dict[str, Any] = to_json(view)
    return result


def view_from_json(data: Any) -> IndexView:
    """Raises UnavailableError where this is no view, or one of another schema."""
    try:
        view: IndexView = _adapter(IndexView).validate_python(data)
    except ValidationError as error:
        raise _unreadable("the view of the index", error) from error
    return view


def task_to_fields(record: TaskRecord, changed: int, before: TaskRecord | None) -> dict[str, str]:
    """The fields of its hash that differ from `before`; `changed` is the generation of this change."""
    known = before.versions if before is not None else {}
    stand = _Stand(record.traffic, record.previous, changed)
    versions = {n: version for n, version in record.versions.items() if known.get(n) != version}
    return {TASK_FIELD: dumps(stand)} | {f"{_VERSION_FIELD}{n}": dumps(version) for n, version in versions.items()}


def task_from_fields(name: str, found: Mapping[bytes, bytes]) -> TaskRecord:
    what = f"task {name}"
    stand = loads(_Stand, found.get(TASK_FIELD.encode(), b""), what)
    start = len(_VERSION_FIELD)
    versions = {int(field[start:]): raw for field, raw in found.items() if field.startswith(_VERSION_FIELD.encode())}
    records = {n: loads(VersionRecord, versions[n], f"{what}@{n}") for n in sorted(versions)}
    return TaskRecord(name, MappingProxyType(records), stand.traffic, stand.previous, stand.changed)


@lru_cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _clean(text: str) -> str:
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _unreadable(what: str, error: ValidationError) -> UnavailableError:
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    return UnavailableError(
        f"{what} cannot be read, it was damaged or written by another version of Manifold: "
        f"{place + ': ' if place else ''}{first['msg']}"
    )
