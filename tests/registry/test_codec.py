"""Records to JSON and back."""

from __future__ import annotations

import json
from types import MappingProxyType

import pytest

from app.errors import UnavailableError
from app.registry.codec import dumps, loads, task_from_fields, task_to_fields, view_from_json, view_to_json
from app.rollout import (
    EMPTY_VIEW,
    AuditEntry,
    Challenger,
    Gates,
    IndexView,
    KeyRecord,
    Release,
    Role,
    Segment,
    State,
    TaskRecord,
    Traffic,
    VersionRecord,
)

CARD = json.dumps({"task": "mood", "labels": ["joy", "größe"]})
FIRST = VersionRecord("mood", 1, "sha256:a", State.RETIRED, CARD, 10, "ann", 1.5, "bob", 2.000001, "old")
SECOND = VersionRecord("mood", 12, "sha256:b", State.APPROVED, "{}", 0, "ann", 1e9)
TRAFFIC = Traffic(12, (Challenger(1, 0.29),), (3, 4), Gates(max_error_rate=0.1), "salt", (Segment(0, 29, 1),))
TASK = TaskRecord("mood", MappingProxyType({1: FIRST, 12: SECOND}), TRAFFIC, (1, 2), 7)
KEY = KeyRecord("k1", "ann", frozenset({Role.ADMIN, Role.AUDIT}), "hash", "admin", 3.25)
VIEW = IndexView("id", 7, MappingProxyType({"mood": TASK}), MappingProxyType({"k1": KEY}))


def stored(fields: dict[str, str]) -> dict[bytes, bytes]:
    return {name.encode(): value.encode() for name, value in fields.items()}


def test_a_view_reads_as_it_was_written() -> None:
    assert view_from_json(json.loads(json.dumps(view_to_json(VIEW)))) == VIEW
    assert view_from_json(view_to_json(EMPTY_VIEW)) == EMPTY_VIEW


def test_a_task_reads_as_it_was_written() -> None:
    assert task_from_fields("mood", stored(task_to_fields(TASK, 7, None))) == TASK


def test_only_what_changed_of_a_task_is_written() -> None:
    fields = task_to_fields(TASK, 8, TaskRecord("mood", {1: FIRST}))
    assert set(fields) == {"task", "v:12"}


@pytest.mark.parametrize(
    "record",
    [
        KEY,
        FIRST,
        Release("r9", "ann", 1.0, "why", 9, {"mood": None, "spam": TRAFFIC}, {"mood": TRAFFIC}, "bob"),
        AuditEntry(1, 1.25, 0, "ann", "publish", None, "", None, {"a": [1, 2.5, "x", None]}, "", "hash"),
    ],
)
def test_other_records_read_as_they_were_written(record: object) -> None:
    assert loads(type(record), dumps(record), "it") == record


def test_the_same_value_is_always_the_same_text() -> None:
    assert dumps({"b": (1, 2), "a": frozenset({"y", "x"})}) == dumps({"a": ["x", "y"], "b": [1, 2]})


def test_what_json_cannot_carry_does_no_harm() -> None:
    """Whatever a reason or a figure brings, everybody can still read the index."""
    entry = AuditEntry(1, 1.0, 0, "a\ud800", "gate", None, "ü\udfff", None, {"ratio": float("nan")}, "", "")
    read = loads(AuditEntry, dumps(entry), "it")
    assert (read.actor, read.reason, read.after) == ("a?", "ü?", {"ratio": None})


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b'{"task": "mood"}', b'{"champion": "x"}'])
def test_a_damaged_record_is_a_sentence(raw: bytes) -> None:
    with pytest.raises(UnavailableError, match=r"^version mood@1 cannot be read, it was damaged or written by"):
        loads(VersionRecord, raw, "version mood@1")


def test_a_view_of_another_schema_is_a_sentence() -> None:
    data = view_to_json(VIEW)
    data["tasks"]["mood"]["versions"]["1"]["state"] = "paused"
    with pytest.raises(UnavailableError, match=r"cannot be read.*tasks\.mood\.versions\.1\.state"):
        view_from_json(data)
    with pytest.raises(UnavailableError, match="cannot be read"):
        view_from_json(["not", "a", "view"])


def test_a_task_without_its_stand_is_a_sentence() -> None:
    fields = stored(task_to_fields(TASK, 7, None))
    del fields[b"task"]
    with pytest.raises(UnavailableError, match="task mood cannot be read"):
        task_from_fields("mood", fields)
