"""How the index is read and changed: one look at one moment, one atomic step for each change.

A change is made from what was read and applied only if nothing changed since; otherwise it is made again from what is
there now. Knows keys, transactions and the audit chain; not what changes mean.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar, cast

from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, WatchError
from redis.exceptions import TimeoutError as RedisTimeoutError

from app.errors import ConflictError, UnavailableError
from app.registry import audit
from app.registry.codec import dumps, loads, task_from_fields, task_to_fields
from app.registry.connection import reached
from app.registry.schema import (
    AUDIT,
    CHANGED,
    HINTS,
    KEYS,
    META,
    SCHEMA_VERSION,
    from_bytes,
    task_audit_key,
    task_key,
    to_bytes,
)
from app.rollout import EMPTY_VIEW, AuditEntry, IndexView, KeyRecord, TaskRecord

T = TypeVar("T")

_MOST_TRIES = 20
_PAUSE_S = 0.005  # between tries, times the try's number, times chance
_SETTLE_S = 8.0  # for a change whose answer was lost
_SETTLE_PAUSE_S = 0.1


@dataclass(frozen=True, slots=True)
class Meta:
    index_id: str = ""  # "" where the index is empty
    generation: int = 0
    changed_at_s: float = 0.0  # by the index's clock
    audit_count: int = 0
    audit_head: str = ""
    settled: int = 0


@dataclass(frozen=True, slots=True)
class Present:
    """What a change is made from. It is applied only where nothing changed since `meta`."""

    meta: Meta
    now_s: float  # by the index's clock, so operators' clocks do not matter
    tasks: Mapping[str, TaskRecord]  # those asked for, as far as they are there
    hashes: Mapping[bytes, Mapping[bytes, bytes]]  # whole hashes that were asked for


@dataclass(frozen=True, slots=True)
class Write:
    command: str
    key: bytes
    arguments: Sequence[str | bytes | int]


@dataclass(frozen=True, slots=True)
class Change:
    """What is to be written. `before` and `after` are for the audit log."""

    action: str
    task: str | None = None
    before: Any = None
    after: Any = None
    tasks: Mapping[str, TaskRecord] = field(default_factory=dict)  # those that change
    writes: Sequence[Write] = ()  # beside them
    generation: int | None = None  # the new one, where it is not the next
    is_note: bool = False  # nothing changes but the log
    settles: bool = False  # it decides about what the index had lost


@dataclass(frozen=True, slots=True)
class _Look:
    """What one round of reading saw. Each task is whole; all are of the same moment where that was steady."""

    meta: Meta
    is_steady: bool  # the generation was the same before and after
    keys: dict[str, KeyRecord]
    changed: dict[str, int]  # each task's last change
    tasks: dict[str, TaskRecord]  # those that were asked for


class Ledger:
    """Safe from any thread. Everything raises UnavailableError where Redis does not answer."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    # -- reading -------------------------------------------------------------------------------------------------------

    def read(self, tasks: Sequence[str] = (), hashes: Sequence[bytes] = ()) -> Present:
        """No transaction, which a full Redis would refuse: what is newer than the heading cannot be committed."""
        with reached():
            pipeline = self._redis.pipeline(transaction=False)
            pipeline.hgetall(cast(str, META))
            pipeline.time()
            for key in (*map(task_key, tasks), *hashes):
                pipeline.hgetall(cast(str, key))
            meta, (seconds, micros), *found = pipeline.execute()
        return Present(
            meta=_meta(meta),
            now_s=seconds + micros / 1e6,
            tasks={name: task_from_fields(name, raw) for name, raw in zip(tasks, found, strict=False) if raw},
            hashes=dict(zip(hashes, found[len(tasks) :], strict=True)),
        )

    def view(self, before: IndexView = EMPTY_VIEW) -> IndexView:
        """The whole index at one generation. Only tasks whose last change is another than in `before` are read."""
        index_id, known = before.index_id, dict(before.tasks)
        names: list[str] = []
        while True:  # each round reads what the one before saw to be old, until nothing changed in one of them
            look = self._look(names)
            if look.meta.index_id != index_id:
                index_id, known = look.meta.index_id, {}
            known |= look.tasks
            asked, names = (
                names,
                [name for name, at in look.changed.items() if name not in known or known[name].changed != at],
            )
            if look.is_steady and not names:
                break
            if look.is_steady and set(names) & set(asked):
                raise UnavailableError(f"task {names[0]} in the index was damaged: its last change is not what it says")
        tasks = {name: known[name] for name in sorted(look.changed)}
        keys = MappingProxyType(look.keys)
        return IndexView(index_id, look.meta.generation, MappingProxyType(tasks), keys, look.meta.settled)

    def _look(self, names: Sequence[str]) -> _Look:
        with reached():
            pipeline = self._redis.pipeline(transaction=False)
            pipeline.hgetall(cast(str, META))
            pipeline.hgetall(cast(str, KEYS))
            pipeline.zrange(CHANGED, 0, -1, withscores=True)
            for name in names:
                pipeline.hgetall(cast(str, task_key(name)))
            pipeline.hgetall(cast(str, META))
            raw_meta, keys, changed, *found, after = pipeline.execute()
        meta, end = _meta(raw_meta), _meta(after)
        return _Look(
            meta=meta,
            is_steady=(meta.index_id, meta.generation) == (end.index_id, end.generation),
            keys={from_bytes(id_): loads(KeyRecord, raw, f"key {from_bytes(id_)}") for id_, raw in keys.items()},
            changed={from_bytes(name): int(at) for name, at in changed},
            tasks={name: task_from_fields(name, raw) for name, raw in zip(names, found, strict=True) if raw},
        )

    # -- changing ------------------------------------------------------------------------------------------------------

    def commit(
        self,
        actor: str,
        reason: str,
        make: Callable[[Present], tuple[Change | None, T]],
        *,
        tasks: Sequence[str] = (),
        hashes: Sequence[bytes] = (),
        if_match: int | None = None,
    ) -> tuple[T, int]:
        """What `make` gives beside its change, and the generation after it; the present one where it has no change.

        Raises ConflictError where `if_match` is not the present generation, and whatever `make` raises.
        """
        for attempt in range(_MOST_TRIES):
            try:
                present = self.read(tasks, hashes)
            except UnavailableError as error:
                raise UnavailableError(f"{error}; nothing was changed") from error
            meta = present.meta
            if if_match is not None and if_match != meta.generation:
                raise ConflictError(
                    f"the index is at generation {meta.generation} and no longer at {if_match}: "
                    "look at what is there now, and decide again",
                    meta.generation,
                )
            change, result = make(present)
            if change is None:
                return result, meta.generation
            entry = _entry(actor, reason, change, present)
            if self._apply(change, entry, present):
                return result, entry.generation
            time.sleep(random.uniform(0, _PAUSE_S * (attempt + 1)))
        raise ConflictError(f"others changed the index {_MOST_TRIES} times meanwhile: try again", meta.generation)

    def _apply(self, change: Change, entry: AuditEntry, present: Present) -> bool:
        """False where somebody else was first, and nothing was changed.

        Where the answer is lost it is tried again: once the log has another entry in the place of ours, what is still
        under way can never be applied.
        """
        writes = list(_writes(change, entry, present))
        deadline_s = time.monotonic() + _SETTLE_S
        while True:
            try:
                return self._try(writes, entry, present.meta)
            except WatchError:  # somebody wrote meanwhile, or the connection was lost: the next try tells
                continue
            except (RedisConnectionError, RedisTimeoutError) as error:
                if time.monotonic() > deadline_s:
                    raise UnavailableError(
                        f"the index stopped answering, and it is not known whether the change was made: look into "
                        f"the audit log for entry {entry.sequence} once it is back ({error})"
                    ) from error
                time.sleep(_SETTLE_PAUSE_S)
            except RedisError as error:
                raise UnavailableError(f"the index refused the change, nothing was changed: {error}") from error

    def _try(self, writes: Sequence[Write], entry: AuditEntry, expected: Meta) -> bool:
        """A transaction, not a script: Lua takes time quadratic in the number of long strings that are alike."""
        pipeline: Any  # its types do not know that it answers at once while it watches
        with self._redis.pipeline() as pipeline:
            pipeline.watch(META)
            found = _meta(pipeline.hgetall(META))
            if (found.generation, found.audit_head) != (expected.generation, expected.audit_head):
                is_there: bool = pipeline.lindex(AUDIT, entry.sequence - 1) == dumps(entry).encode()
                return is_there
            pipeline.multi()
            for write in writes:
                pipeline.execute_command(write.command, write.key, *write.arguments)
            pipeline.execute()
            return True


def set_fields(key: bytes, fields: Mapping[str, str]) -> Write:
    return Write("HSET", key, [part for pair in fields.items() for part in pair])


def _entry(actor: str, reason: str, change: Change, present: Present) -> AuditEntry:
    meta = present.meta
    following = change.generation if change.generation is not None else meta.generation + 1
    return audit.sealed(
        AuditEntry(
            sequence=meta.audit_count + 1,
            at=present.now_s,
            generation=meta.generation if change.is_note else following,
            actor=actor,
            action=change.action,
            task=change.task,
            reason=reason,
            before=change.before,
            after=change.after,
            previous_hash=meta.audit_head,
            hash="",
        )
    )


def _writes(change: Change, entry: AuditEntry, present: Present) -> Iterator[Write]:
    for name, record in change.tasks.items():
        yield set_fields(task_key(name), task_to_fields(record, entry.generation, present.tasks.get(name)))
        yield Write("ZADD", CHANGED, [entry.generation, to_bytes(name)])
    yield from change.writes
    yield Write("RPUSH", AUDIT, [dumps(entry)])
    for name in dict.fromkeys([*change.tasks, *([change.task] if change.task is not None else [])]):
        yield Write("RPUSH", task_audit_key(name), [entry.sequence])
    heading = {"schema": str(SCHEMA_VERSION), "audit_count": str(entry.sequence), "audit_head": entry.hash}
    if change.is_note:
        yield set_fields(META, heading)
        return
    index_id = present.meta.index_id or uuid.uuid4().hex
    moved = {"generation": str(entry.generation), "changed_at": repr(entry.at), "index_id": index_id}
    settled = {"settled": str(entry.generation)} if change.settles else {}
    yield set_fields(META, heading | moved | settled)
    yield Write("PUBLISH", HINTS, [entry.generation])


def _meta(found: Mapping[bytes, bytes]) -> Meta:
    fields = {from_bytes(name): from_bytes(value) for name, value in found.items()}
    schema = fields.get("schema", str(SCHEMA_VERSION))
    if schema != str(SCHEMA_VERSION):
        raise UnavailableError(
            f"the index in Redis has layout {schema} and this Manifold reads {SCHEMA_VERSION}: "
            "use the version that wrote it, or another Redis"
        )
    try:
        return Meta(
            index_id=fields.get("index_id", ""),
            generation=int(fields.get("generation", 0)),
            changed_at_s=float(fields.get("changed_at", 0.0)),
            audit_count=int(fields.get("audit_count", 0)),
            audit_head=fields.get("audit_head", ""),
            settled=int(fields.get("settled", 0)),
        )
    except ValueError as error:
        raise UnavailableError(f"the heading of the index cannot be read, it was damaged: {error}") from error
