"""Who is let in, how wrong keys are held off, and that nobody can lock everybody out or let everybody in."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import pytest

from app.errors import ConflictError, ForbiddenError, OverloadedError, UnauthorizedError
from app.rollout import KeyRecord, Principal, Role, hash_token
from app.service.access import ADMIN, EVERYBODY, Access, BackgroundNotes

TOKEN = "mf_k1_a-secret_with_parts"
ADMIN_KEY = "sixteen characters"


class World:
    """Keys that change, a clock that is set, and what was noted."""

    def __init__(self, admin_key: str | None = None) -> None:
        self.keys: dict[str, KeyRecord] = {}
        self.now_s = 1000.0
        self.notes: list[tuple[str, str, str | None, str, Mapping[str, Any]]] = []
        self.access = Access(lambda: self.keys, admin_key, self._note, lambda: self.now_s)

    def add(self, *roles: Role, key_id: str = "k1", token: str = TOKEN) -> None:
        self.keys[key_id] = KeyRecord(key_id, "paula", frozenset(roles), hash_token(token), "anonymous", 0.0)

    def fail(self, client: str = "10.0.0.1") -> None:
        with pytest.raises(UnauthorizedError):
            self.access.authenticate("Bearer wrong", client)

    def _note(self, *entry: Any) -> None:
        self.notes.append(entry)


def test_without_keys_everybody_may_do_everything() -> None:
    principal = World().access.authenticate(None, "127.0.0.1")
    assert principal == EVERYBODY
    assert all(principal.has(role) for role in Role)


@pytest.mark.parametrize("header", [f"Bearer {TOKEN}", f"bearer   {TOKEN} "])
def test_a_key_names_its_principal(header: str) -> None:
    world = World()
    world.add(Role.PUBLISH)
    assert world.access.authenticate(header, "10.0.0.1") == Principal("paula", frozenset({Role.PUBLISH}))
    assert world.notes == []


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (None, "asks for a key"),
        ("", "asks for a key"),
        (f"Basic {TOKEN}", "asks for a key"),
        ("Bearer", "asks for a key"),
        ("Bearer " + "x" * 5000, "asks for a key"),
        ("Bearer wrong", "not known"),
        (f"Bearer {TOKEN}x", "not known"),
        ("Bearer mf_k2_a-secret", "not known"),
        ("Bearer mf__", "not known"),
        ("Bearer \udcff", "not known"),
    ],
)
def test_a_wrong_key_is_refused_with_a_sentence_and_noted(header: str | None, words: str) -> None:
    world = World()
    world.add(Role.PUBLISH)
    with pytest.raises(UnauthorizedError, match=words):
        world.access.authenticate(header, "10.0.0.1")
    ((actor, action, task, reason, details),) = world.notes
    assert (actor, action, task) == ("unknown at 10.0.0.1", "authenticate", None)
    assert words in reason
    assert details["client"] == "10.0.0.1"
    assert "secret" not in repr(world.notes)


def test_a_key_that_was_revoked_is_refused_at_once() -> None:
    world = World(ADMIN_KEY)
    world.add(Role.PREDICT)
    world.access.authenticate(f"Bearer {TOKEN}", "10.0.0.1")
    del world.keys["k1"]
    with pytest.raises(UnauthorizedError):
        world.access.authenticate(f"Bearer {TOKEN}", "10.0.0.1")


def test_the_admin_key_of_the_settings_is_one_more_key() -> None:
    world = World(ADMIN_KEY)
    with pytest.raises(UnauthorizedError):
        world.access.authenticate(None, "10.0.0.1")
    principal = world.access.authenticate(f"Bearer {ADMIN_KEY}", "10.0.0.1")
    assert principal == ADMIN and principal.has(Role.PREDICT)


def test_an_index_that_lost_its_keys_opens_the_door_to_nobody() -> None:
    world = World()
    world.add(Role.ADMIN)
    world.access.authenticate(f"Bearer {TOKEN}", "10.0.0.1")
    world.keys.clear()
    with pytest.raises(UnauthorizedError, match="no keys any more"):
        world.access.authenticate(None, "127.0.0.1")


def test_ten_wrong_keys_a_minute_and_then_the_address_waits() -> None:
    world = World(ADMIN_KEY)
    for _ in range(10):
        world.fail()
        world.now_s += 2
    with pytest.raises(OverloadedError, match="10.0.0.1.*40 s") as waits:
        world.access.authenticate("Bearer wrong", "10.0.0.1")
    assert waits.value.retry_after_s == 40
    with pytest.raises(OverloadedError):
        world.access.authenticate(f"Bearer {ADMIN_KEY}", "10.0.0.1")
    assert len(world.notes) == 10, "the audit log is not flooded"
    world.fail("10.0.0.2")
    world.now_s += 40
    assert world.access.authenticate(f"Bearer {ADMIN_KEY}", "10.0.0.1") == ADMIN
    world.fail()


def test_wrong_keys_of_others_behind_the_same_address_do_not_hold_up_a_right_one() -> None:
    world = World()
    world.add(Role.PREDICT)
    for _ in range(10):
        world.fail()
    assert world.access.authenticate(f"Bearer {TOKEN}", "10.0.0.1").name == "paula"


def test_a_flood_from_many_addresses_is_remembered_in_bounded_memory() -> None:
    world = World(ADMIN_KEY)
    for number in range(12_000):
        world.fail(f"10.0.{number // 256}.{number % 256}")
    assert len(world.access._failures._by_name) == 10_000


def test_a_missing_role_is_refused_by_name_and_noted_but_not_without_end() -> None:
    world = World()
    principal = Principal("paula", frozenset({Role.PUBLISH, Role.PREDICT}))
    world.access.require(principal, Role.PUBLISH)
    for _ in range(30):
        with pytest.raises(ForbiddenError, match="role operate, and paula has predict, publish") as refused:
            world.access.require(principal, Role.OPERATE)
        world.access.refused(principal, "PUT /v1/tasks/spam/traffic", str(refused.value))
    assert len(world.notes) == 10
    actor, action, task, reason, details = world.notes[0]
    assert (actor, action, task, details) == ("paula", "forbidden", None, {})
    assert reason.startswith("PUT /v1/tasks/spam/traffic: this needs a key with the role operate")


def test_one_of_several_roles_is_enough() -> None:
    access, roles = World().access, (Role.PUBLISH, Role.APPROVE)
    access.require(Principal("anna", frozenset({Role.APPROVE})), *roles)
    with pytest.raises(ForbiddenError, match="with the role publish or approve, and rita has predict"):
        access.require(Principal("rita", frozenset({Role.PREDICT})), *roles)


def test_admin_has_every_role() -> None:
    World().access.require(Principal("root", frozenset({Role.ADMIN})), Role.AUDIT)


def test_the_first_key_cannot_lock_everybody_out() -> None:
    world = World()
    with pytest.raises(ConflictError, match="must have the role admin"):
        world.access.check_new_key("shop", frozenset({Role.PREDICT}))
    world.access.check_new_key("root", frozenset({Role.ADMIN}))
    world.add(Role.ADMIN)
    world.access.check_new_key("shop", frozenset({Role.PREDICT}))
    World(ADMIN_KEY).access.check_new_key("shop", frozenset({Role.PREDICT}))


@pytest.mark.parametrize("name", ["anonymous", "admin", "gate", "unknown at 10.0.0.1"])
def test_names_of_the_server_itself_are_taken(name: str) -> None:
    with pytest.raises(ConflictError, match="taken by the server"):
        World().access.check_new_key(name, frozenset({Role.ADMIN}))


def test_the_last_admin_key_stays() -> None:
    world = World()
    world.add(Role.ADMIN)
    world.add(Role.PREDICT, key_id="k2", token="mf_k2_other")
    with pytest.raises(ConflictError, match="last key with the role admin"):
        world.access.check_revocation("k1")
    world.access.check_revocation("k2")
    world.add(Role.ADMIN, key_id="k3", token="mf_k3_other")
    world.access.check_revocation("k1")
    guarded = World(ADMIN_KEY)
    guarded.add(Role.ADMIN)
    guarded.access.check_revocation("k1")


def test_notes_never_wait_for_a_writer_that_hangs() -> None:
    began, go_on, written = threading.Event(), threading.Event(), []

    def write(actor: str, *_: Any) -> None:
        began.set()
        go_on.wait(10)
        written.append(actor)

    notes = BackgroundNotes(write)
    notes.note("first", "authenticate", None, "", {})
    assert began.wait(10)
    for number in range(150):
        notes.note(str(number), "authenticate", None, "", {})
    assert notes.dropped == 91, "60 a minute, the first among them"
    go_on.set()
    notes.close()
    assert written == ["first", *map(str, range(59))]


def test_notes_go_on_after_one_that_could_not_be_written(caplog: pytest.LogCaptureFixture) -> None:
    written: list[str] = []

    def write(actor: str, *_: Any) -> None:
        if actor == "a":
            raise OSError("the index is down")
        written.append(actor)

    notes = BackgroundNotes(write)
    for actor in ("a", "b"):
        notes.note(actor, "authenticate", None, "", {})
    notes.close()
    assert written == ["b"]
    assert "authenticate by a could not be written to the audit log: the index is down" in caplog.text
