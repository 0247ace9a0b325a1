"""What operators do: publish, decide, move traffic, release, undo; keys, the audit log, and what was compared.

An artifact is served here before the index hears of it. Every method blocks: call it off the event loop. Knows nothing
of HTTP; the index's rules are `app.registry.changes`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from app.errors import ArtifactError, ConflictError, UnavailableError
from app.registry.comparison import Comparisons, Said
from app.registry.index import Index
from app.registry.store import ArtifactStore
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
)
from app.service.comparison import Comparison, compare
from app.service.first_start import new_version
from app.service.hot_swap import Follower
from app.service.loading import Loader
from app.service.losses import Loss
from app.service.ports import IndexState, Published
from app.service.resolve import find_record, find_version
from app.telemetry.metrics import Metrics

T = TypeVar("T")

_AT_FIRST = 1  # the number in a folder that has none yet


class Rollout:
    def __init__(
        self,
        index: Index,
        store: ArtifactStore,
        loader: Loader,
        follower: Follower,
        comparisons: Comparisons,
        metrics: Metrics,
        *,
        url: str,
        separate: Callable[[], bool],
    ) -> None:
        """`url`: of the index, for people, without credentials. `separate`: whether nobody approves their own."""
        self._index, self._store, self._loader = index, store, loader
        self._follower, self._comparisons = follower, comparisons
        self._metrics, self._url, self._separate = metrics, url, separate

    # -- versions ------------------------------------------------------------------------------------------------------

    def publish(
        self, principal: Principal, task: str, files: Mapping[str, bytes], options: Mapping[str, Any], reason: str
    ) -> Published:
        if task in self._follower.catalog.snapshot.representations and task not in self._view.tasks:
            raise ConflictError(f"{task} is the name of the backbone's own representation: choose another")
        with tempfile.TemporaryDirectory(prefix="manifold-publish-") as folder:
            path = Path(folder) / task
            path.mkdir()
            for name, content in files.items():
                (path / name).write_bytes(content)
            loaded = self._loader.load(path, {**options, "task": task})
            if loaded.artifact.manifest["task"] != task:
                named = loaded.artifact.manifest["task"]
                raise ArtifactError(task, [f"its manifest says that it is of task {named}: publish it as that"])
            new = new_version(self._store, loaded, path, _AT_FIRST)
        self._follower.sync()
        known = self._view.tasks.get(task)
        is_known = known is not None and any(v.digest == new.digest for v in known.versions.values())
        record, generation = self._followed(
            self._index.publish(principal.name, task, new.digest, new.card, new.size_bytes, reason)
        )
        return Published(record, generation, not is_known)

    def artifact(self, task: str, version: int) -> tuple[VersionRecord, Mapping[str, bytes]]:
        record = find_version(find_record(self._follower.catalog.snapshot, task), version)
        return record, self._store.read(record.digest)

    def decide(
        self, principal: Principal, task: str, version: int, state: State, reason: str
    ) -> tuple[VersionRecord, int]:
        return self._followed(self._index.decide(principal.name, task, version, state, reason, self._separate()))

    # -- traffic -------------------------------------------------------------------------------------------------------

    def set_traffic(
        self, principal: Principal, task: str, wish: TrafficWish, reason: str, if_match: int | None
    ) -> tuple[TaskRecord, int]:
        return self._followed(self._index.set_traffic(principal.name, task, wish, reason, if_match))

    def rollback(self, principal: Principal, task: str, reason: str, if_match: int | None) -> tuple[TaskRecord, int]:
        changed = self._followed(self._index.rollback(principal.name, task, reason, if_match))
        self._metrics.rolled_back(task, "operator")
        return changed

    def release(
        self, principal: Principal, wishes: Mapping[str, TrafficWish], reason: str, if_match: int | None
    ) -> Release:
        return self._followed(self._index.release(principal.name, wishes, reason, if_match))

    def rollback_release(self, principal: Principal, release_id: str, reason: str) -> Release:
        undone = self._followed(self._index.rollback_release(principal.name, release_id, reason))
        for task in undone.after:
            self._metrics.rolled_back(task, "operator")
        return undone

    def releases(self, limit: int) -> Sequence[Release]:
        return self._index.releases(limit)

    # -- the audit log and keys ----------------------------------------------------------------------------------------

    def audit(self, task: str | None, after: int, limit: int) -> Sequence[AuditEntry]:
        return self._index.audit(task, after, limit)

    def verify_audit(self) -> AuditVerdict:
        return self._index.verify_audit()

    def create_key(self, principal: Principal, name: str, roles: frozenset[Role]) -> tuple[KeyRecord, str]:
        return self._followed(self._index.create_key(principal.name, name, roles))

    def revoke_key(self, principal: Principal, key_id: str) -> None:
        loss = self._follower.loss
        self._index.revoke_key(principal.name, key_id, loss.keys if loss is not None else {})
        self._follower.sync()

    def keys(self) -> Sequence[KeyRecord]:
        loss = self._follower.loss
        keys = {**(loss.keys if loss is not None else {}), **self._index.view().keys}
        return sorted((key for key in keys.values() if key.hash), key=lambda key: key.created_at)

    # -- the index itself ----------------------------------------------------------------------------------------------

    def index_state(self) -> IndexState:
        health, view, loss = self._follower.health, self._view, self._follower.loss
        try:
            failures = self._index.failures()
        except UnavailableError:
            failures = {name: {"here": reason} for name, reason in self._follower.failures.items()}
        told = loss.told if loss is not None else None
        return IndexState(self._url, health.up, view.index_id, view.generation, health.staleness_s, told, failures)

    def restore(self, principal: Principal, reason: str) -> int:
        """Everything that is gone from the index comes back, live where it was."""
        loss = self._loss()
        return self._followed(self._index.restore(principal.name, loss.before, reason, loss.seen))

    def accept(self, principal: Principal, reason: str) -> int:
        """What is gone comes back as history: nothing of a task that is gone is live any more."""
        loss = self._loss()
        tasks = {name: replace(record, traffic=None) for name, record in loss.before.tasks.items()}
        accepted = replace(loss.before, tasks=MappingProxyType(tasks))
        return self._followed(self._index.restore(principal.name, accepted, reason, loss.seen))

    def _loss(self) -> Loss:
        if self._follower.loss is None:
            raise ConflictError("the index lost nothing that this server knew: there is nothing to settle")
        return self._follower.loss

    # -- what was compared ---------------------------------------------------------------------------------------------

    def comparison(self, task: str) -> Comparison:
        record = find_record(self._follower.catalog.snapshot, task)
        if record.traffic is None:
            return compare(record, {})
        return compare(record, self._comparisons.read(task, record.versions[record.traffic.champion].digest))

    def feedback(self, request_id: str, task: str, index: int, truth: Said) -> bool:
        """False where the same was reported before."""
        return self._comparisons.outcome(request_id, task, index, truth)

    def _followed(self, outcome: T) -> T:
        """Whoever changed something through this server finds it changed here with the answer."""
        self._follower.sync()
        return outcome

    @property
    def _view(self) -> IndexView:
        return self._follower.catalog.snapshot.view
