"""The audit log shows every edit, gap and cut."""

from __future__ import annotations

import json
from typing import Any

import pytest
from redis import Redis

from app.registry import audit
from app.registry.index import Index
from app.rollout import NewVersion

AUDIT, META = "{manifold}:audit", "{manifold}:meta"


@pytest.fixture
def written(index: Index) -> Index:
    """Entries 1 to 9, of two tasks and of none."""
    index.create("manifold", [NewVersion("mood", 1, "sha256:a", "{}", 1)], "first start")
    for n in range(4):
        index.publish("ann", "mood", f"sha256:m{n}", "{}", 1, "größer \ud800")
        index.publish("bob", "spam", f"sha256:s{n}", "{}", 1, "")
    return index


def edit(client: Redis, position: int, **changes: Any) -> None:
    entry = json.loads(client.lindex(AUDIT, position) or b"{}")
    client.lset(AUDIT, position, json.dumps(entry | changes))


def test_a_log_that_nobody_touched_verifies(written: Index) -> None:
    verdict = written.verify_audit()
    last = written.audit(None, 0, 100)[-1]
    assert (verdict.ok, verdict.entries, verdict.head, verdict.fault) == (True, 9, last.hash, "")


def test_it_verifies_page_by_page(written: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (1, 2, 3, 9, 10):
        monkeypatch.setattr(audit, "_PAGE", size)
        assert written.verify_audit().entries == 9


def test_entries_are_read_by_task_and_from_a_place(written: Index) -> None:
    assert [e.sequence for e in written.audit(None, 0, 3)] == [1, 2, 3]
    assert [e.sequence for e in written.audit(None, 7, 10)] == [8, 9]
    assert [e.sequence for e in written.audit("spam", 0, 10)] == [3, 5, 7, 9]
    assert [e.sequence for e in written.audit("mood", 2, 2)] == [4, 6]
    assert written.audit("none\udfff", 0, 10) == []
    entry = written.audit("mood", 1, 1)[0]
    assert (entry.actor, entry.action, entry.task, entry.reason) == ("ann", "publish", "mood", "größer ?")
    assert entry.after == {"version": 2, "digest": "sha256:m0", "state": "candidate"}


def test_a_note_is_an_entry_under_the_same_generation(written: Index) -> None:
    written.note("eve", "forbidden", "mood", "needs the role approve", {"client": "::1"})
    entry = written.audit("mood", 9, 1)[0]
    assert (entry.sequence, entry.generation, entry.after) == (10, 9, {"client": "::1"})
    assert written.pulse().generation == 9
    assert written.verify_audit().ok


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"actor": "eve"}, "entry 4 was edited: its content is not what its hash says"),
        ({"at": 1.0}, "entry 4 was edited"),
        ({"after": {"version": 3}}, "entry 4 was edited"),
        ({"extra": 1}, "entry 4 was edited"),
        ({"hash": "0" * 64}, "entry 4 was edited"),
        ({"sequence": 5}, "entry 4 is missing: entry 5 stands in its place"),
        ({"previous_hash": "0" * 64}, "entry 4 was edited"),
    ],
)
def test_an_edit_shows(written: Index, client: Redis, change: dict[str, Any], fault: str) -> None:
    edit(client, 3, **change)
    verdict = written.verify_audit()
    assert (verdict.ok, verdict.entries) == (False, 3)
    assert verdict.fault.startswith(fault)


def test_an_edit_with_a_new_hash_shows(written: Index, client: Redis) -> None:
    entry = written.audit(None, 3, 1)[0]
    forged = audit.sealed(type(entry)(**{n: getattr(entry, n) for n in entry.__slots__} | {"actor": "eve"}))
    edit(client, 3, actor="eve", hash=forged.hash)
    assert written.verify_audit().fault == "entry 5 does not follow entry 4: one of them was written again"


def test_what_is_no_entry_shows(written: Index, client: Redis) -> None:
    for raw in ("gone", "[]", "{}"):
        client.lset(AUDIT, 3, raw)
        assert written.verify_audit().fault == "entry 4 cannot be read: it was edited"


def test_a_gap_shows(written: Index, client: Redis) -> None:
    client.lset(AUDIT, 3, "out")
    client.lrem(AUDIT, 1, "out")
    assert written.verify_audit().fault == "entry 4 is missing: entry 5 stands in its place"


def test_a_log_without_its_beginning_shows(written: Index, client: Redis) -> None:
    client.ltrim(AUDIT, 2, -1)
    assert written.verify_audit().fault == "entry 1 is missing: entry 3 stands in its place"


@pytest.mark.parametrize("left", [0, 1, 8])
def test_a_cut_at_the_end_shows(written: Index, client: Redis, left: int) -> None:
    for _ in range(9 - left):
        client.rpop(AUDIT)
    verdict = written.verify_audit()
    assert (verdict.ok, verdict.entries) == (False, left)
    assert verdict.fault == f"the log ends at entry {left}, and 9 were written: its end was cut off"


def test_a_cut_shows_also_after_more_was_written(written: Index, client: Redis) -> None:
    client.rpop(AUDIT)
    written.publish("ann", "mood", "sha256:new", "{}", 1, "")
    assert written.verify_audit().fault == "entry 9 is missing: entry 10 stands in its place"


def test_an_entry_that_was_put_in_shows(written: Index, client: Redis) -> None:
    last = written.audit(None, 8, 1)[0]
    fields = {n: getattr(last, n) for n in last.__slots__}
    forged = audit.sealed(type(last)(**fields | {"sequence": 10, "previous_hash": last.hash, "actor": "eve"}))
    client.rpush(AUDIT, audit.dumps(forged))
    assert written.verify_audit().fault == "the log's head is not that of entry 10: its end was written again"


def test_a_chain_that_was_written_again_has_another_head(written: Index, client: Redis) -> None:
    """Who can write to Redis can write a whole new log: the head that somebody kept tells."""
    kept = written.verify_audit().head
    client.flushall()
    for _ in range(9):
        written.note("eve", "publish", "mood", "", {})
    assert written.verify_audit().ok
    assert written.verify_audit().head != kept
