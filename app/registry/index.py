"""The version index: what operators change and servers follow, in Redis.

Every change is one atomic step with its audit entry; the rules are `app.registry.changes`. Knows nothing of artifacts
or engines.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from redis import Redis

from app.errors import ConflictError, NotFoundError
from app.registry import audit, changes
from app.registry.codec import dumps, loads
from app.registry.commit import Change, Ledger, Present, Write, set_fields
from app.registry.connection import reached
from app.registry.hints import Hints
from app.registry.restoring import restored
from app.registry.schema import FAILURES, KEYS, RELEASES, failure_field, from_bytes, to_bytes
from app.rollout import (
    EMPTY_VIEW,
    AuditEntry,
    AuditVerdict,
    IndexView,
    KeyRecord,
    NewVersion,
    Release,
    Role,
    State,
    TaskRecord,
    Traffic,
    TrafficWish,
    VersionRecord,
    hash_token,
)

_ACTIONS = {State.APPROVED: "approve", State.REJECTED: "reject", State.RETIRED: "retire"}
_FAILURE_TTL_S = 300  # servers report again at least once a minute


@dataclass(frozen=True, slots=True)
class Pulse:
    index_id: str  # "" where the index is empty
    generation: int
    now_s: float  # by the index's clock
    changed_at_s: float  # when the generation rose last; 0 where it never did
    audit_count: int = 0  # entries in the audit log


class Index:
    """Safe from any thread. Every method raises UnavailableError where Redis does not answer.

    Methods that change something return the generation after it, and change nothing where all is as asked. Where
    `if_match` is given and not the present generation they raise ConflictError.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._ledger = Ledger(redis)

    # -- what servers follow -------------------------------------------------------------------------------------------

    def pulse(self) -> Pulse:
        present = self._ledger.read()
        meta = present.meta
        return Pulse(meta.index_id, meta.generation, present.now_s, meta.changed_at_s, meta.audit_count)

    def view(self) -> IndexView:
        return self._ledger.view()

    def update(self, view: IndexView) -> IndexView:
        """The view now. What did not change is shared with the one before, and not read."""
        return self._ledger.view(view)

    def hints(self) -> Hints:
        return Hints(self._redis)

    # -- versions ------------------------------------------------------------------------------------------------------

    def create(self, actor: str, versions: Sequence[NewVersion], reason: str) -> bool:
        """Fills an empty index: all approved, and the highest version of each task live. False: it was not empty."""

        def make(present: Present) -> tuple[Change | None, bool]:
            if present.meta.index_id:
                return None, False
            tasks = changes.first_tasks(versions, actor, present.now_s, reason)
            return Change("create", after={name: _stand(record) for name, record in tasks.items()}, tasks=tasks), True

        return self._ledger.commit(actor, reason, make)[0]

    def publish(
        self, actor: str, task: str, digest: str, card: str, size_bytes: int, reason: str
    ) -> tuple[VersionRecord, int]:
        """A new candidate, or the version that has this content already."""

        def make(present: Present) -> tuple[Change | None, VersionRecord]:
            known = present.tasks.get(task)
            record = changes.publish(known, task, digest, card, size_bytes, actor, present.now_s, reason)
            version = changes.find_digest(record, digest)
            assert version is not None, "it was published, or was there"
            if record is known:
                return None, version
            return Change("publish", task, None, _shown(version), {task: record}), version

        return self._ledger.commit(actor, reason, make, tasks=[task])

    def decide(
        self, actor: str, task: str, version: int, state: State, reason: str, separate: bool
    ) -> tuple[VersionRecord, int]:
        """Approves, rejects or retires. `separate`: nobody approves what they published."""

        def make(present: Present) -> tuple[Change | None, VersionRecord]:
            known = _known(present, task)
            record = changes.decide(known, version, state, actor, present.now_s, reason, separate)
            before, after = known.versions[version], record.versions[version]
            if record is known:
                return None, after
            return Change(_ACTIONS[state], task, _shown(before), _shown(after), {task: record}), after

        return self._ledger.commit(actor, reason, make, tasks=[task])

    # -- traffic -------------------------------------------------------------------------------------------------------

    def set_traffic(
        self, actor: str, task: str, wish: TrafficWish, reason: str, if_match: int | None
    ) -> tuple[TaskRecord, int]:
        return self._move(actor, "traffic", task, reason, if_match, lambda r: changes.set_traffic(r, wish, _salt()))

    def rollback(self, actor: str, task: str, reason: str, if_match: int | None) -> tuple[TaskRecord, int]:
        """The champion before answers alone again."""
        return self._move(actor, "rollback", task, reason, if_match, changes.rollback)

    def trip_gate(self, actor: str, task: str, expected: Traffic, figures: Mapping[str, Any], reason: str) -> bool:
        """The champion answers alone again, where traffic is still `expected`. False where it is not."""

        def make(present: Present) -> tuple[Change | None, bool]:
            known = _known(present, task)
            if known.traffic != expected:
                return None, False
            record = changes.champion_alone(known)
            change = _moved("gate", known, record)
            return replace(change, after={**change.after, "figures": figures}), True

        return self._ledger.commit(actor, reason, make, tasks=[task])[0]

    # -- releases ------------------------------------------------------------------------------------------------------

    def release(self, actor: str, wishes: Mapping[str, TrafficWish], reason: str, if_match: int | None) -> Release:
        """The traffic of several tasks in one step, or of none."""

        def make(present: Present) -> tuple[Change, Release]:
            known = {name: _known(present, name) for name in wishes}
            records = {name: changes.set_traffic(known[name], wish, _salt()) for name, wish in wishes.items()}
            generation = present.meta.generation + 1
            release = Release(
                id=f"r{generation}",
                created_by=actor,
                created_at=present.now_s,
                reason=reason,
                generation=generation,
                before={name: record.traffic for name, record in known.items()},
                after={name: record.traffic for name, record in records.items() if record.traffic is not None},
            )
            return _released("release", release, known, records), release

        return self._ledger.commit(actor, reason, make, tasks=list(wishes), if_match=if_match)[0]

    def rollback_release(self, actor: str, release_id: str, reason: str) -> Release:
        """Each task gets the traffic that it had before. Raises ConflictError where one was changed since."""
        with reached():
            raw = self._redis.hget(cast(str, RELEASES), cast(str, to_bytes(release_id)))
        if raw is None:
            raise NotFoundError(f"there is no release {release_id[:100]}")
        tasks = list(_release(raw).after)

        def make(present: Present) -> tuple[Change, Release]:
            release = _release(present.hashes[RELEASES][to_bytes(release_id)])
            if release.rolled_back_by is not None:
                raise ConflictError(f"release {release_id} was rolled back before, by {release.rolled_back_by}")
            known = {name: _known(present, name) for name in tasks}
            others = sorted(name for name, record in known.items() if record.traffic != release.after[name])
            if others:
                raise ConflictError(
                    f"the traffic of {', '.join(others)} was changed since release {release_id}: set it task by task",
                    present.meta.generation,
                )
            records = {name: changes.restore_traffic(r, release.before[name]) for name, r in known.items()}
            undone = replace(release, rolled_back_by=actor, generation=present.meta.generation + 1)
            return _released("rollback_release", undone, known, records), undone

        return self._ledger.commit(actor, reason, make, tasks=tasks, hashes=[RELEASES])[0]

    def releases(self, limit: int) -> list[Release]:
        """Newest first."""
        with reached():
            ids = sorted(map(from_bytes, self._redis.hkeys(cast(str, RELEASES))), key=_release_number, reverse=True)
            found = self._redis.hmget(cast(str, RELEASES), ids[:limit]) if ids else []
        return [_release(raw) for raw in found if raw is not None]

    # -- what was lost -------------------------------------------------------------------------------------------------

    def restore(self, actor: str, view: IndexView, reason: str, since: int = 0) -> int:
        """Writes what the index lacks of `view`: versions, tasks, keys; and traffic that did not change above `since`.

        This settles the loss: servers hold on to nothing of it any more.
        """

        def make(present: Present) -> tuple[Change, None]:
            tasks = restored(present.tasks, view.tasks, since)
            keys = {id_: key for id_, key in view.keys.items() if to_bytes(id_) not in present.hashes[KEYS]}
            stands = {name: _stand(record) for name, record in tasks.items()}
            change = Change(
                "restore",
                before={"generation": present.meta.generation},
                after={"tasks": stands, "keys": sorted(key.name for key in keys.values())},
                tasks=tasks,
                writes=list(map(_key_write, keys.values())),
                generation=max(present.meta.generation, view.generation) + 1,
                settles=True,
            )
            return change, None

        return self._ledger.commit(actor, reason, make, tasks=list(view.tasks), hashes=[KEYS])[1]

    # -- the audit log -------------------------------------------------------------------------------------------------

    def audit(self, task: str | None, after: int, limit: int) -> list[AuditEntry]:
        """Entries with a sequence above `after`, oldest first."""
        return audit.read(self._redis, task, after, limit)

    def verify_audit(self) -> AuditVerdict:
        return audit.verify(self._redis)

    def note(self, actor: str, action: str, task: str | None, reason: str, details: Mapping[str, Any]) -> None:
        """An entry of something that changed nothing, such as a refusal."""
        change = Change(action, task, after=details, is_note=True)
        self._ledger.commit(actor, reason, lambda _: (change, None))

    # -- keys ----------------------------------------------------------------------------------------------------------

    def create_key(self, actor: str, name: str, roles: frozenset[Role]) -> tuple[KeyRecord, str]:
        """The record, and the token, of which only a hash is kept."""
        key_id = secrets.token_hex(6)
        token = f"mf_{key_id}_{secrets.token_urlsafe(32)}"

        def make(present: Present) -> tuple[Change, KeyRecord]:
            taken = [key for key in map(_key, present.hashes[KEYS].values()) if key.hash]
            if any(key.name == name for key in taken):
                raise ConflictError(f"there is a key with the name {name} already: revoke it, or choose another name")
            key = KeyRecord(key_id, name, roles, hash_token(token), actor, present.now_s)
            return Change("create_key", after=_shown_key(key), writes=[_key_write(key)]), key

        return self._ledger.commit(actor, "", make, hashes=[KEYS])[0], token

    def revoke_key(self, actor: str, key_id: str, lost: Mapping[str, KeyRecord] = EMPTY_VIEW.keys) -> None:
        """`lost`: keys that servers still accept although the index has lost them. Raises NotFoundError."""

        def make(present: Present) -> tuple[Change, None]:
            raw = present.hashes[KEYS].get(to_bytes(key_id))
            key = _key(raw) if raw is not None else lost.get(key_id)
            if key is None or not key.hash:
                raise NotFoundError(f"there is no key with the id {key_id[:100]}")
            revoked = replace(key, hash="", roles=frozenset())
            return Change("revoke_key", before=_shown_key(key), writes=[_key_write(revoked)]), None

        self._ledger.commit(actor, "", make, hashes=[KEYS])

    # -- what servers could not serve ----------------------------------------------------------------------------------

    def report_failure(self, server: str, task: str, version: int, reason: str) -> None:
        with reached():
            seconds, _ = self._redis.time()
            report = dumps({"reason": reason, "at": seconds})
            self._redis.hset(cast(str, FAILURES), cast(str, failure_field(server, task, version)), report)

    def clear_failure(self, server: str, task: str, version: int) -> None:
        with reached():
            self._redis.hdel(cast(str, FAILURES), cast(str, failure_field(server, task, version)))

    def failures(self) -> dict[str, dict[str, str]]:
        """task@version → server → why it does not serve it."""
        with reached():
            seconds, _ = self._redis.time()
            reports = {f: json.loads(raw) for f, raw in self._redis.hgetall(cast(str, FAILURES)).items()}
            old = [f for f, report in reports.items() if seconds - report["at"] > _FAILURE_TTL_S]
            if old:
                self._redis.hdel(cast(str, FAILURES), *old)
        found: dict[str, dict[str, str]] = {}
        for field, report in reports.items():
            if field not in old:
                version, _, server = from_bytes(field).partition(" ")
                found.setdefault(version, {})[server] = report["reason"]
        return found

    # ------------------------------------------------------------------------------------------------------------------

    def _move(
        self,
        actor: str,
        action: str,
        task: str,
        reason: str,
        if_match: int | None,
        rule: Callable[[TaskRecord], TaskRecord],
    ) -> tuple[TaskRecord, int]:
        def make(present: Present) -> tuple[Change | None, TaskRecord]:
            known = _known(present, task)
            record = rule(known)
            return (None if record is known else _moved(action, known, record)), record

        return self._ledger.commit(actor, reason, make, tasks=[task], if_match=if_match)


def _known(present: Present, task: str) -> TaskRecord:
    if task not in present.tasks:
        raise NotFoundError(f'there is no task "{task[:100]}" in the index: publish a version of it first')
    return present.tasks[task]


def _salt() -> str:
    return secrets.token_hex(8)


def _moved(action: str, known: TaskRecord, record: TaskRecord) -> Change:
    return Change(action, known.name, {"traffic": known.traffic}, {"traffic": record.traffic}, {known.name: record})


def _released(
    action: str, release: Release, known: Mapping[str, TaskRecord], records: Mapping[str, TaskRecord]
) -> Change:
    return Change(
        action,
        before={name: record.traffic for name, record in known.items()},
        after={"release": release.id, "tasks": {name: record.traffic for name, record in records.items()}},
        tasks={name: record for name, record in records.items() if record is not known[name]},
        writes=[set_fields(RELEASES, {release.id: dumps(release)})],
    )


def _release(raw: bytes | str) -> Release:
    return loads(Release, raw, "a release")


def _release_number(release_id: str) -> int:
    return int(release_id.removeprefix("r"))


def _shown(version: VersionRecord) -> dict[str, Any]:
    """For the audit log: without the card."""
    return {"version": version.version, "digest": version.digest, "state": version.state}


def _stand(record: TaskRecord) -> dict[str, Any]:
    return {"versions": list(map(_shown, record.versions.values())), "traffic": record.traffic}


def _key(raw: bytes) -> KeyRecord:
    return loads(KeyRecord, raw, "a key")


def _key_write(key: KeyRecord) -> Write:
    return set_fields(KEYS, {key.id: dumps(key)})


def _shown_key(key: KeyRecord) -> dict[str, Any]:
    return {"id": key.id, "name": key.name, "roles": key.roles}
