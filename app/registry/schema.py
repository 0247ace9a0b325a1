"""Every key of the version index in Redis. The layout's version is SCHEMA_VERSION.

All keys share one hash tag. What versions answered side by side lies with `comparison`.
"""

from __future__ import annotations

SCHEMA_VERSION = 1

META = b"{manifold}:meta"  # hash: schema, index_id, generation, changed_at, audit_count, audit_head
CHANGED = b"{manifold}:changed"  # sorted set: task by the generation of its last change
AUDIT = b"{manifold}:audit"  # list of entries as JSON, entry n at position n-1
RELEASES = b"{manifold}:releases"  # hash: id → JSON
KEYS = b"{manifold}:keys"  # hash: key id → JSON
FAILURES = b"{manifold}:failures"  # hash: see `failure_field` → JSON {reason, at}
HINTS = b"{manifold}:hints"  # channel: the generation after each change


def task_key(task: str) -> bytes:
    """A hash: `task` → JSON of traffic, previous champions and last change; `v:<n>` → JSON of a version."""
    return b"{manifold}:task:" + to_bytes(task)


def task_audit_key(task: str) -> bytes:
    """A list: the sequence numbers of the audit entries that name this task."""
    return b"{manifold}:audit:task:" + to_bytes(task)


def failure_field(server: str, task: str, version: int) -> bytes:
    return to_bytes(f"{task}@{version} {server}")  # neither tasks nor versions have spaces


def to_bytes(text: str) -> bytes:
    """Names come from outside, and not every string that JSON can carry is UTF-8."""
    return text.encode("utf-8", "surrogatepass")


def from_bytes(raw: bytes | str) -> str:
    return raw if isinstance(raw, str) else raw.decode("utf-8", "replace")
