"""The audit log: a chain in which each entry's hash covers the entry before it, so that an edit or a gap shows.

Knows nothing of what changes mean. Who can write to Redis can also write a whole new chain: the head, kept elsewhere,
tells that.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any, cast

from redis import Redis

from app.registry.codec import dumps, loads, to_json
from app.registry.connection import reached
from app.registry.schema import AUDIT, META, task_audit_key
from app.rollout import AuditEntry, AuditVerdict

_PAGE = 1000  # entries in memory at once


def sealed(entry: AuditEntry) -> AuditEntry:
    """With the hash of all the rest."""
    return replace(entry, hash=_hash(to_json(entry)))


def read(redis: Redis, task: str | None, after: int, limit: int) -> list[AuditEntry]:
    """Entries with a sequence above `after`, oldest first."""
    found: list[Any]
    with reached():
        if task is None:
            found = redis.lrange(cast(str, AUDIT), after, after + limit - 1)
        else:
            numbers = map(int, redis.lrange(cast(str, task_audit_key(task)), 0, -1))
            pipeline = redis.pipeline(transaction=False)
            for number in [number for number in numbers if number > after][:limit]:
                pipeline.lindex(cast(str, AUDIT), number - 1)
            found = pipeline.execute()
    return [loads(AuditEntry, raw, "an entry of the audit log") for raw in found if raw is not None]


def verify(redis: Redis) -> AuditVerdict:
    """Computes every hash again, a page at a time."""
    sequence, head = 0, ""
    while True:
        with reached():
            pipeline = redis.pipeline()
            pipeline.hmget(cast(str, META), ["audit_count", "audit_head"])
            pipeline.lrange(cast(str, AUDIT), sequence, sequence + _PAGE - 1)
            (count, last), page = pipeline.execute()
        for raw in page:
            fault, found = _check(raw, sequence + 1, head)
            if fault:
                return AuditVerdict(False, sequence, head, fault)
            sequence, head = sequence + 1, found
        if len(page) < _PAGE:
            return _compare_end(sequence, head, int(count or 0), (last or b"").decode("utf-8", "replace"))


def _compare_end(sequence: int, head: str, count: int, last: str) -> AuditVerdict:
    fault = ""
    if sequence < count:
        fault = f"the log ends at entry {sequence}, and {count} were written: its end was cut off"
    elif (sequence, head) != (count, last):
        fault = f"the log's head is not that of entry {sequence}: its end was written again"
    return AuditVerdict(not fault, sequence, head, fault)


def _check(raw: bytes, sequence: int, head: str) -> tuple[str, str]:
    """What is wrong with it, and its hash."""
    try:
        entry: dict[str, Any] = json.loads(raw)
        found, previous, stated = entry["sequence"], entry["previous_hash"], entry["hash"]
    except (ValueError, TypeError, KeyError):
        return f"entry {sequence} cannot be read: it was edited", ""
    if found != sequence:
        return f"entry {sequence} is missing: entry {found} stands in its place", ""
    if stated != _hash(entry):
        return f"entry {sequence} was edited: its content is not what its hash says", ""
    if previous != head:
        return f"entry {sequence} does not follow entry {sequence - 1}: one of them was written again", ""
    return "", stated


def _hash(entry: dict[str, Any]) -> str:
    content = {name: value for name, value in entry.items() if name != "hash"}
    return hashlib.sha256(dumps(content).encode()).hexdigest()
