"""A rollout without Redis, files or an engine: the index's own rules over a view in memory."""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from app.domain import Snapshot, Task, content_digest
from app.errors import ArtifactError, ConflictError, NotFoundError, UnavailableError
from app.registry import changes
from app.registry.comparison import PairFigures, Said
from app.rollout import (
    AuditEntry,
    AuditVerdict,
    IndexView,
    KeyRecord,
    Principal,
    Release,
    Role,
    State,
    TaskRecord,
    TrafficWish,
    VersionRecord,
    hash_token,
)
from app.service.catalog import Catalog
from app.service.comparison import Comparison, compare
from app.service.ports import IndexState, Published
from app.service.resolve import find_record, find_version

_NOW_S = 1_700_000_000.0


@dataclass
class FakeRollout:
    """One change after the other, each audited. `is_down`: Redis is gone."""

    catalog: Catalog
    separate: bool = True
    is_down: bool = False
    lost: IndexView | None = None  # what `restore` brings back
    figures: dict[str, PairFigures] = field(default_factory=dict)  # by the other version's digest
    kept_answers: set[tuple[str, str, int]] = field(default_factory=set)  # request id, task, input
    outcomes: dict[tuple[str, str, int], Said] = field(default_factory=dict)
    entries: list[AuditEntry] = field(default_factory=list)
    made: list[Release] = field(default_factory=list)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)  # what was published, by digest
    options: dict[str, Any] = field(default_factory=dict)  # of the last publication
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def view(self) -> IndexView:
        return self.catalog.snapshot.view

    # -- versions and traffic ------------------------------------------------------------------------------------------

    def publish(
        self, principal: Principal, task: str, files: Mapping[str, bytes], options: Mapping[str, Any], reason: str
    ) -> Published:
        manifest = _manifest(task, files, options)
        digest, size_bytes = content_digest(files), sum(map(len, files.values()))
        known = self.view.tasks.get(task)
        numbers = set(known.versions) if known is not None else set()
        self.files[digest], self.options = dict(files), dict(options)
        record = self._change(
            principal,
            "publish",
            task,
            reason,
            lambda before: changes.publish(
                before,
                task,
                digest=digest,
                card=json.dumps(manifest),
                size_bytes=size_bytes,
                actor=principal.name,
                at=_NOW_S,
                reason=reason,
            ),
        )
        (version,) = (v for v in record.versions.values() if v.digest == digest)
        return Published(version, self.view.generation, version.version not in numbers)

    def artifact(self, task: str, version: int) -> tuple[VersionRecord, Mapping[str, bytes]]:
        with self._index():
            record = find_version(find_record(self.catalog.snapshot, task), version)
            if record.digest not in self.files:
                raise NotFoundError(f"the artifact store has no artifact {record.digest}")
            return record, self.files[record.digest]

    def decide(
        self, principal: Principal, task: str, version: int, state: State, reason: str
    ) -> tuple[VersionRecord, int]:
        def decided(record: TaskRecord | None) -> TaskRecord:
            decision = partial(changes.decide, actor=principal.name, at=_NOW_S, reason=reason, separate=self.separate)
            return decision(_known(task, record), version, state)

        return self._change(principal, state, task, reason, decided).versions[version], self.view.generation

    def set_traffic(
        self, principal: Principal, task: str, wish: TrafficWish, reason: str, if_match: int | None
    ) -> tuple[TaskRecord, int]:
        self._check(if_match)
        record = self._change(principal, "traffic", task, reason, lambda r: _moved(task, r, wish))
        return record, self.view.generation

    def rollback(self, principal: Principal, task: str, reason: str, if_match: int | None) -> tuple[TaskRecord, int]:
        self._check(if_match)
        record = self._change(principal, "rollback", task, reason, lambda r: changes.rollback(_known(task, r)))
        return record, self.view.generation

    def release(
        self, principal: Principal, wishes: Mapping[str, TrafficWish], reason: str, if_match: int | None
    ) -> Release:
        self._check(if_match)
        with self._index():
            before = {name: self.view.tasks.get(name) for name in wishes}
            after = {name: _moved(name, before[name], wish) for name, wish in wishes.items()}
            self._put(after)
            made = Release(
                id=f"r{len(self.made) + 1}",
                created_by=principal.name,
                created_at=_NOW_S,
                reason=reason,
                generation=self.view.generation,
                before={name: record.traffic if record else None for name, record in before.items()},
                after={name: record.traffic for name, record in after.items() if record.traffic is not None},
            )
            self.made.insert(0, made)
            self.note(principal.name, "release", None, reason, {"id": made.id})
            return made

    def rollback_release(self, principal: Principal, release_id: str, reason: str) -> Release:
        with self._index():
            found = next((made for made in self.made if made.id == release_id), None)
            if found is None:
                raise NotFoundError(f"there is no release {release_id[:100]}")
            tasks = {name: self.view.tasks[name] for name in found.after}
            changed = [name for name, record in tasks.items() if record.traffic != found.after[name]]
            if changed:
                raise ConflictError(f"the traffic of {', '.join(changed)} was changed since", self.view.generation)
            self._put({name: replace(record, traffic=found.before[name]) for name, record in tasks.items()})
            undone = replace(found, rolled_back_by=principal.name, generation=self.view.generation)
            self.made[self.made.index(found)] = undone
            self.note(principal.name, "rollback_release", None, reason, {"id": release_id})
            return undone

    def releases(self, limit: int) -> Sequence[Release]:
        with self._index():
            return self.made[:limit]

    # -- the audit log and keys ----------------------------------------------------------------------------------------

    def note(self, actor: str, action: str, task: str | None, reason: str, details: Any) -> None:
        with self.lock:
            previous = self.entries[-1].hash if self.entries else ""
            entry = AuditEntry(
                sequence=len(self.entries) + 1,
                at=_NOW_S,
                generation=self.view.generation,
                actor=actor,
                action=action,
                task=task,
                reason=reason,
                before=None,
                after=details,
                previous_hash=previous,
                hash="",
            )
            self.entries.append(replace(entry, hash=hashlib.sha256(repr(entry).encode()).hexdigest()))

    def audit(self, task: str | None, after: int, limit: int) -> Sequence[AuditEntry]:
        with self._index():
            return [e for e in self.entries if e.sequence > after and task in (None, e.task)][:limit]

    def verify_audit(self) -> AuditVerdict:
        with self._index():
            for entry in self.entries:
                if hashlib.sha256(repr(replace(entry, hash="")).encode()).hexdigest() != entry.hash:
                    return AuditVerdict(False, len(self.entries), entry.hash, f"entry {entry.sequence} was edited")
            return AuditVerdict(True, len(self.entries), self.entries[-1].hash if self.entries else "", "")

    def create_key(self, principal: Principal, name: str, roles: frozenset[Role]) -> tuple[KeyRecord, str]:
        with self._index():
            if any(known.name == name for known in self.view.keys.values()):
                raise ConflictError(f"there is a key with the name {name} already")
            key_id, secret = secrets.token_hex(4), secrets.token_urlsafe(32)
            token = f"mf_{key_id}_{secret}"
            record = KeyRecord(key_id, name, roles, hash_token(token), principal.name, _NOW_S)
            self._show(replace(self.view, keys={**self.view.keys, key_id: record}))
            self.note(principal.name, "create_key", None, "", {"id": key_id, "name": name})
            return record, token

    def revoke_key(self, principal: Principal, key_id: str) -> None:
        with self._index():
            if key_id not in self.view.keys:
                raise NotFoundError(f"there is no key {key_id[:100]}")
            self._show(replace(self.view, keys={i: k for i, k in self.view.keys.items() if i != key_id}))
            self.note(principal.name, "revoke_key", None, "", {"id": key_id})

    def keys(self) -> Sequence[KeyRecord]:
        with self._index():
            return list(self.view.keys.values())

    # -- the index itself ----------------------------------------------------------------------------------------------

    def index_state(self) -> IndexState:
        told = None if self.lost is None else "the index was emptied"
        failures = {"spam@9": {"server-1": "its content is damaged"}}
        return IndexState("redis://index:6379/0", not self.is_down, "index", self.view.generation, 0.5, told, failures)

    def restore(self, principal: Principal, reason: str) -> int:
        with self._index():
            if self.lost is None:
                raise ConflictError("the index lost nothing that this server knew")
            self._show(replace(self.view, tasks={**self.lost.tasks, **self.view.tasks}))
            self.lost = None
            self.note(principal.name, "restore", None, reason, None)
            return self.view.generation

    def accept(self, principal: Principal, reason: str) -> int:
        with self._index():
            if self.lost is None:
                raise ConflictError("the index lost nothing that this server knew")
            self.lost = None
            self.note(principal.name, "accept", None, reason, None)
            return self.view.generation

    # -- what was compared ---------------------------------------------------------------------------------------------

    def comparison(self, task: str) -> Comparison:
        with self._index():
            return compare(_known(task, self.view.tasks.get(task)), self.figures)

    def feedback(self, request_id: str, task: str, index: int, truth: Said) -> bool:
        with self._index():
            name = (request_id, task, index)
            if name not in self.kept_answers:
                raise NotFoundError(f"no answer of task {task} to input {index} of this request is kept")
            is_first = name not in self.outcomes
            if self.outcomes.setdefault(name, truth) != truth:
                raise ConflictError("another outcome was reported for this answer before")
            return is_first

    # ------------------------------------------------------------------------------------------------------------------

    def _change(
        self,
        principal: Principal,
        action: str,
        task: str,
        reason: str,
        rule: Callable[[TaskRecord | None], TaskRecord],
    ) -> TaskRecord:
        with self._index():
            before = self.view.tasks.get(task)
            after = rule(before)
            if after is before:
                return after
            self._put({task: after})
            self.note(principal.name, action, task, reason, asdict(after.traffic) if after.traffic else None)
            return self.view.tasks[task]

    def _check(self, if_match: int | None) -> None:
        generation = self.view.generation
        if if_match not in (None, generation):
            raise ConflictError(f"the index is at generation {generation}, not {if_match}: read it again", generation)

    def _put(self, records: Mapping[str, TaskRecord]) -> None:
        changed = {name: replace(record, changed=self.view.generation + 1) for name, record in records.items()}
        self._show(replace(self.view, tasks={**self.view.tasks, **changed}))

    def _show(self, view: IndexView) -> None:
        """The next generation, live at once."""
        view = replace(view, generation=view.generation + 1)
        tasks = {}
        for name, record in view.tasks.items():
            if record.traffic is not None:
                versions = {n: self.catalog.describe(record.versions[n]) for n in record.traffic.live}
                tasks[name] = Task(name, record, record.traffic, versions)
        before = self.catalog.snapshot
        self.catalog.snapshot = Snapshot(view.generation, tasks, before.representations, view)

    @contextmanager
    def _index(self) -> Iterator[None]:
        if self.is_down:
            raise UnavailableError("the index does not answer, try again later")
        with self.lock:
            yield


def _known(task: str, record: TaskRecord | None) -> TaskRecord:
    if record is None:
        raise NotFoundError(f'there is no task "{task[:100]}"')
    return record


def _moved(task: str, record: TaskRecord | None, wish: TrafficWish) -> TaskRecord:
    return changes.set_traffic(_known(task, record), wish, "salt")


def _manifest(task: str, files: Mapping[str, bytes], options: Mapping[str, Any]) -> dict[str, Any]:
    """What a folder says of itself, or for one without a manifest what the options say."""
    if "manifest.json" in files:
        manifest: dict[str, Any] = json.loads(files["manifest.json"])
        if manifest["task"] != task:
            raise ArtifactError(task, [f"its manifest says that it is of task {manifest['task']}"])
        return manifest
    if "problem_type" not in options:
        raise ArtifactError(task, ["the problem type is not in the folder: give it (problem_type)"])
    return {
        "format_version": 1,
        "task": task,
        "problem_type": options["problem_type"],
        "labels": options.get("labels", ["LABEL_0", "LABEL_1"]),
        "input": options.get("input", "text"),
        "readout": {"kind": "mean", "layers": [6]},
        "prefixes": [],
        "position_offset": 0,
    }
