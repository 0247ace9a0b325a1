"""What the log says of changes of the index."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

import pytest

from app.errors import UnavailableError
from app.rollout import AuditEntry
from app.service.change_log import log_changes
from app.telemetry.logs import JsonFormatter


def entry(sequence: int, generation: int, action: str = "traffic", **more: Any) -> AuditEntry:
    fields: dict[str, Any] = {
        "sequence": sequence,
        "at": 1_700_000_000.0,
        "generation": generation,
        "actor": "otto",
        "action": action,
        "task": "spam",
        "reason": "",
        "before": {"traffic": {"champion": sequence}},
        "after": {"traffic": {"champion": sequence + 1}},
        "previous_hash": "",
        "hash": "",
    }
    return AuditEntry(**(fields | more))


class Log:
    def __init__(self, entries: Sequence[AuditEntry]) -> None:
        self.entries = list(entries)

    def read(self, task: str | None, after: int, limit: int) -> list[AuditEntry]:
        return [entry for entry in self.entries if entry.sequence > after][:limit]

    def tell(self, before: int, generation: int) -> None:
        log_changes(self.read, before, generation, len(self.entries))


@pytest.fixture(autouse=True)
def _all_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "manifold.index")


def test_a_change_is_a_line_with_its_actor_and_the_same_as_fields(caplog: pytest.LogCaptureFixture) -> None:
    after = {"traffic": {"champion": 1, "challengers": [{"version": 2, "percent": 10.0}]}}
    change = entry(2, 5, before={"traffic": {"champion": 1}}, after=after, reason="to be sure")
    Log([entry(1, 4), change]).tell(4, 5)
    assert caplog.messages == [
        "otto: traffic spam: champion 1 → champion 1, challenger 2 at 10 % (to be sure), generation 5"
    ]
    line = json.loads(JsonFormatter().format(caplog.records[0]))
    assert line["logger"] == "manifold.index"
    expected = {
        "event": "index_change",
        "actor": "otto",
        "action": "traffic",
        "task": "spam",
        "from": "champion 1",
        "to": "champion 1, challenger 2 at 10 %",
        "reason": "to be sure",
        "generation": 5,
        "sequence": 2,
    }
    assert {name: line[name] for name in expected} == expected


def test_what_was_refused_and_what_is_newer_has_no_line(caplog: pytest.LogCaptureFixture) -> None:
    refused = {"actor": "eve", "before": None, "after": {}}
    log = Log(
        [
            entry(1, 1, "create", before=None, after={}),
            entry(2, 1, "forbidden", **refused),
            entry(3, 2, "approve"),
            entry(4, 2, "authenticate", **refused),
            entry(5, 3),
            entry(6, 4),
        ]
    )
    log.tell(1, 3)
    assert [(record.fields["action"], record.fields["generation"]) for record in caplog.records] == [  # type: ignore[attr-defined]
        ("approve", 2),
        ("traffic", 3),
    ]


def test_a_change_behind_many_refusals_is_found(caplog: pytest.LogCaptureFixture) -> None:
    refused = [entry(number, 2, "forbidden", before=None, after={}) for number in range(3, 203)]
    log = Log([entry(1, 1), entry(2, 2), *refused])
    log.tell(1, 2)
    assert [message.partition(",")[0] for message in caplog.messages] == ["otto: traffic spam: champion 2 → champion 3"]


def test_a_change_that_came_after_the_entries_were_counted_is_told(caplog: pytest.LogCaptureFixture) -> None:
    log = Log([entry(1, 1), entry(2, 2), entry(3, 3), entry(4, 4)])
    log_changes(log.read, 1, 3, 2)
    assert [record.__dict__["fields"]["generation"] for record in caplog.records] == [2, 3]


def test_what_cannot_be_told_fails_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: object) -> list[AuditEntry]:
        raise RuntimeError("no")

    log_changes(broken, 1, 2, 2)
    assert caplog.messages == ["the changes up to generation 2 of the index cannot be told"]


def test_many_changes_at_once_are_bounded(caplog: pytest.LogCaptureFixture) -> None:
    log = Log([entry(number, number) for number in range(1, 5_001)])
    log.tell(0, 5_000)
    lines = caplog.messages
    assert len(lines) == 51
    assert lines[0] == "4950 more changes of the index before these: manifold audit shows them"
    assert lines[-1].endswith("generation 5000")


def test_a_restore_leaves_generations_out_in_which_nothing_was_changed(caplog: pytest.LogCaptureFixture) -> None:
    log = Log([entry(1, 1), entry(2, 501, "restore", task=None, after={"tasks": {}})])
    log.tell(1, 501)
    assert len(caplog.messages) == 1 and "restore" in caplog.messages[0]


def test_a_line_stays_one_line_of_some_length(caplog: pytest.LogCaptureFixture) -> None:
    tasks = {f"task-{number}": {"champion": 1} for number in range(1_000)}
    log = Log([entry(1, 1), entry(2, 2, "release", task=None, after={"tasks": tasks}, reason="a\nb\x1b" + "c" * 900)])
    log.tell(1, 2)
    (line,) = caplog.messages
    assert line.isprintable() and "otto: release: champion 2 → tasks task-0 champion 1" in line and len(line) < 700


def test_an_audit_log_that_cannot_be_read_is_told(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(*_: object) -> list[AuditEntry]:
        raise UnavailableError("Redis is gone")

    log_changes(refuse, 1, 2, 2)
    assert caplog.messages == ["the index went on to generation 2, and who changed it cannot be read: Redis is gone"]
