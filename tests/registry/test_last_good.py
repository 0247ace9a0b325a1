"""A server starts again from what it served last, and from nothing else."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from app.errors import UnavailableError
from app.registry.last_good import LastGood
from app.rollout import (
    EMPTY_VIEW,
    Challenger,
    Gates,
    IndexView,
    KeyRecord,
    Role,
    Segment,
    State,
    TaskRecord,
    Traffic,
    VersionRecord,
)


def make_view(generation: int = 17) -> IndexView:
    def version(number: int, state: State) -> VersionRecord:
        card = '{"labels": ["größer", "\\u2028"]}'
        return VersionRecord("spam", number, f"sha256:{number}", state, card, 1234, "ann", 1.1, "bob", 2.25, "naïve")

    traffic = Traffic(2, (Challenger(3, 0.01),), (4,), Gates(max_disagreement=0.1), "salt", (Segment(0, 1, 3),))
    versions = {1: version(1, State.RETIRED), 2: version(2, State.APPROVED), 3: version(3, State.APPROVED)}
    task = TaskRecord("spam", versions | {4: version(4, State.CANDIDATE)}, traffic, (1,), generation)
    key = KeyRecord("id", "ann", frozenset({Role.PUBLISH, Role.AUDIT}), "hash", "admin", 3.5)
    return IndexView("index", generation, {"spam": task, "new": TaskRecord("new")}, {"id": key})


@pytest.fixture
def last_good(tmp_path: Path) -> LastGood:
    return LastGood(tmp_path / "state" / "last-good.json")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state" / "last-good.json"


@pytest.mark.parametrize("view", [make_view(), EMPTY_VIEW], ids=["full", "empty"])
def test_what_was_saved_is_loaded(last_good: LastGood, view: IndexView) -> None:
    last_good.save(view)
    assert last_good.load() == view


def test_the_newest_counts_and_nothing_else_is_left(last_good: LastGood, file: Path) -> None:
    last_good.save(make_view(1))
    last_good.save(make_view(2))
    loaded = last_good.load()
    assert loaded is not None and loaded.generation == 2
    assert list(file.parent.iterdir()) == [file]


def test_before_the_first_there_is_none(last_good: LastGood, caplog: pytest.LogCaptureFixture) -> None:
    assert last_good.load() is None
    assert not caplog.records


def _edited(content: bytes) -> bytes:
    return content.replace(b'"generation":17', b'"generation":18')


def _of_another_schema(content: bytes) -> bytes:
    return content.replace(b'"schema_version":1', b'"schema_version":2')


def _with_other_records(_: bytes) -> bytes:
    """As a Manifold with other records would have written it."""
    body = b'{"tasks":[]}'
    digest = hashlib.sha256(body).hexdigest()
    return json.dumps({"schema_version": 1, "sha256": digest}).encode() + b"\n" + body + b"\n"


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda content: content[:-10], "content is damaged"),
        (lambda content: content[:20], "not used"),
        (lambda content: b"", "not used"),
        (_edited, "content is damaged"),
        (_of_another_schema, "it has schema version 2, and this software reads 1"),
        (_with_other_records, "the view of the index cannot be read"),
        (lambda content: b"[1, 2]\n", "not a file that Manifold wrote"),
        (lambda content: b"\x80\x02pickle", "not used"),
    ],
    ids=["truncated", "stump", "empty", "edited", "another schema", "other records", "foreign JSON", "no JSON"],
)
def test_what_is_damaged_or_foreign_is_told_and_kept_aside(
    last_good: LastGood,
    file: Path,
    damage: Callable[[bytes], bytes],
    sentence: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    last_good.save(make_view())
    damaged = damage(file.read_bytes())
    file.write_bytes(damaged)
    assert last_good.load() is None
    assert sentence in caplog.text
    assert not file.exists()
    assert file.with_name("last-good.json.damaged").read_bytes() == damaged
    last_good.save(make_view())
    assert last_good.load() == make_view()


def test_a_disk_that_takes_nothing_is_told_and_the_old_state_stays(
    last_good: LastGood, monkeypatch: pytest.MonkeyPatch
) -> None:
    last_good.save(make_view(1))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(UnavailableError, match="cannot be written to .*: No space left on device"):
            last_good.save(make_view(2))
    loaded = last_good.load()
    assert loaded is not None and loaded.generation == 1


def test_a_file_that_cannot_be_read_is_told(last_good: LastGood, file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.mkdir(parents=True)
    assert last_good.load() is None
    assert "is not used" in caplog.text
