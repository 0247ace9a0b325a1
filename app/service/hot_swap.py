"""Follows the index while traffic flows: a hint or a poll, then fetch, verify, load, and one assignment of a snapshot.

Runs on a thread of its own; no request ever waits for it. A version that cannot be served is reported and the one
before it goes on. Without the index, what is live stays live. Knows nothing of requests or of who changed what.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from types import MappingProxyType

from app.domain import ProblemType, Snapshot, Task, TaskVersion
from app.errors import ArtifactError, ManifoldError, UnavailableError
from app.registry.hints import Hints
from app.registry.index import Index, Pulse
from app.registry.last_good import LastGood
from app.registry.store import ArtifactStore
from app.rollout import EMPTY_VIEW, IndexView, KeyRecord, State, TaskRecord, Traffic, VersionRecord
from app.service.catalog import Catalog
from app.service.change_log import log_changes
from app.service.loading import Loader
from app.service.losses import Loss, find_loss, lacks
from app.service.residents import Failure, Resident, Residents
from app.telemetry.metrics import Metrics
from app.telemetry.tracing import NOT_TRACING, Tracing

logger = logging.getLogger(__name__)

_SAVE_EVERY_S = 1.0
_NICENESS = 5
_SLICE_S = 0.25  # the longest wait in one piece, so that closing does not take a poll's time


@dataclass(frozen=True, slots=True, eq=False)
class _Live:
    """A task as it is served, and what keeps its versions loaded."""

    task: Task
    residents: tuple[Resident, ...]


@dataclass(frozen=True, slots=True)
class IndexHealth:
    """How the server stands with its index."""

    up: bool = False
    reason: str = ""  # why it is not up
    contact_s: float = 0.0  # on time.monotonic(): when it last answered

    @property
    def staleness_s(self) -> float:
        return time.monotonic() - self.contact_s


class Follower:
    """`resume`, then `start`; `sync` may also be called from elsewhere, to follow a change at once."""

    def __init__(
        self,
        index: Index,
        store: ArtifactStore,
        loader: Loader,
        last_good: LastGood,
        metrics: Metrics,
        *,
        server: str,
        poll_s: float = 1.0,
        has_hints: bool = True,
        most_others: int = 32,
        revive: Callable[[], None] | None = None,
        traces: Tracing = NOT_TRACING,
    ) -> None:
        """`revive`: what to try when the index does not answer, such as starting it again."""
        self._index, self._store, self.loader = index, store, loader
        self._last_good, self._metrics, self._traces = last_good, metrics, traces
        self._server, self._poll_s, self._has_hints, self._revive = server, poll_s, has_hints, revive
        representation, handle = loader.representation()
        self._own = Resident(representation, handle)
        self._own_name = {loader.engine.spec.name: representation}
        self.catalog = Catalog(Snapshot(0, {}, self._own_name, residents=(handle,)), loader.engine.spec.num_layers)
        self.left_out_at_start: dict[str, str] = {}  # artifacts of the folder that an empty index began with
        self.health = IndexHealth(contact_s=time.monotonic())
        self.loss: Loss | None = None
        self._live: dict[str, _Live] = {}  # by task, representations too
        self._residents = Residents(most_others, self._forget)
        self._failures: dict[tuple[str, int], Failure] = {}
        self._followed = EMPTY_VIEW  # as the index said last
        self._mark = ("", 0, 0.0)  # what its pulse was then
        self._is_whole = True  # no: it is a last good state, which holds live versions only
        self._saved_s, self._is_dirty, self._told_of_revival = 0.0, False, False
        self._lock = threading.RLock()  # one sync at a time
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="follower", daemon=True)

    # -- from any thread -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()
        self._save()

    def keep(self, version: TaskVersion, handle: object) -> None:
        """Keeps a version resident that was loaded elsewhere, among the latest that are not live."""
        self._residents.keep(Resident(version, handle))

    def load(self, record: VersionRecord) -> tuple[TaskVersion, object]:
        """A version that is not live, for a request that pins it. Raises ArtifactError or UnavailableError."""
        resident = self._resident(record)
        self._residents.keep(resident)
        return resident.version, resident.handle

    def resume(self, view: IndexView, *, is_whole: bool) -> None:
        """Begins with what the index says, or (not whole) with the last good state of an earlier process."""
        with self._lock:
            before, self._followed, self._is_whole = self._followed, view, is_whole
            with self._swap(before, view):
                self._show(view)

    def sync(self) -> bool:
        """Asks the index and follows it. False where it does not answer."""
        with self._lock:
            before, was_up = self._followed, self.health.up
            try:
                pulse = self._index.pulse()
                read_s = time.monotonic()
                view = self._read(pulse)
            except UnavailableError as error:
                self._lost(error)
                return False
            self._answered()
            if view is not before:
                with self._swap(before, view):
                    self._follow(view)
                if before.index_id == view.index_id and view.generation > before.generation:
                    if was_up:
                        took_s = time.monotonic() - read_s  # to fetch, load and show it
                        self._metrics.propagated(max(0.0, pulse.now_s - pulse.changed_at_s) + took_s)
                    log_changes(self._index.audit, before.generation, view.generation, pulse.audit_count)
            else:
                self._retry()
            self._forget_late()
            self._followed, self._is_whole = view, True
            self._mark = (pulse.index_id, pulse.generation, pulse.changed_at_s)
            return True

    @property
    def failures(self) -> dict[str, str]:
        return {f"{task}@{number}": failure.reason for (task, number), failure in list(self._failures.items())}

    # -- reading the index ---------------------------------------------------------------------------------------------

    def _read(self, pulse: Pulse) -> IndexView:
        """The view now; the very one before where nothing changed."""
        before, seen = self._followed, (pulse.index_id, pulse.generation)
        if self._is_whole and (*seen, pulse.changed_at_s) == self._mark:
            return before
        moved_on = self._is_whole and seen == self._mark[:2]  # an older backup that came as far as we were
        can_update = self._is_whole and before.index_id and not moved_on
        view = self._index.update(before) if can_update else self._index.view()
        went_back = view.index_id != before.index_id or view.generation < before.generation
        went_back |= not self._is_whole and lacks(before, view)  # and may have gone on since
        if before.index_id and (moved_on or went_back):
            self._went_back(before, view)
        if self.loss is not None and self.loss.is_settled(view):
            logger.info("what the index had lost was settled in generation %d", view.settled)
            self.loss = None
        return view

    def _went_back(self, before: IndexView, view: IndexView) -> None:
        live = {name: live.task.record for name, live in self._live.items()}
        loss = find_loss(self.loss.before if self.loss is not None else before, view, live)
        if loss is not None:
            logger.error("%s; live tasks and keys are kept until `manifold index restore` or `accept`", loss.told)
            self.loss = loss

    def _answered(self) -> None:
        if not self.health.up:
            logger.info("the index answers")
            self._told_of_revival = False
        self.health = IndexHealth(up=True, contact_s=time.monotonic())
        self._metrics.index_answered()

    def _lost(self, error: UnavailableError) -> None:
        if self.health.up or not self.health.reason:
            logger.error("the index is out of reach, what is live stays live: %s", error)
        self.health = replace(self.health, up=False, reason=str(error))
        self._metrics.index_lost(self.health.staleness_s)
        if self._revive is None:
            return
        try:
            self._revive()
        except ManifoldError as failure:
            if not self._told_of_revival:
                logger.error("starting the index again failed: %s", failure)
            self._told_of_revival = True

    # -- following -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _swap(self, before: IndexView, view: IndexView) -> Iterator[None]:
        with self._traces.change("swap") as told:
            told |= {"manifold.generation": view.generation, "manifold.generation_before": before.generation}
            yield

    def _follow(self, view: IndexView) -> None:
        known = self.catalog.snapshot.view
        shown = self.loss.over(view) if self.loss is not None else view
        self._show_keys(shown.keys)  # a revoked key must not work for as long as artifacts are loaded
        self._show(shown)
        self._warm(known, view)

    def _show_keys(self, keys: Mapping[str, KeyRecord]) -> None:
        snapshot = self.catalog.snapshot
        self.catalog.snapshot = replace(snapshot, view=replace(snapshot.view, keys=keys))

    def _show(self, view: IndexView) -> None:
        """Everything is loaded before anything of it is seen; then one assignment."""
        built = {name: self._build(record) for name, record in view.tasks.items() if record.traffic is not None}
        with self._traces.part("assign"):
            self._assign(view, built)

    def _assign(self, view: IndexView, built: Mapping[str, _Live | None]) -> None:
        self._prune(view)
        self._live = {name: live for name, live in sorted(built.items()) if live is not None}
        residents = {r.version.digest: r for live in self._live.values() for r in live.residents}
        tasks = {name: live.task for name, live in self._live.items()}
        vectors = {n for n, task in tasks.items() if task.champion.problem_type is ProblemType.EMBEDDING}
        self.catalog.snapshot = Snapshot(
            generation=view.generation,
            tasks={name: task for name, task in tasks.items() if name not in vectors},
            representations=self._own_name | {name: tasks[name].champion for name in vectors},
            view=view,
            residents=(self._own.handle, *(r.handle for r in residents.values())),
        )
        self.catalog.left_out = self.left_out_at_start | self.failures
        self._residents.set_live(residents)
        self._metrics.following(view.generation, len(residents))
        self._metrics.unserved(self._unserved(view))
        self._is_dirty = True

    def _build(self, record: TaskRecord) -> _Live | None:
        """With the versions that can be served. Where the champion cannot, the task goes on as it was."""
        before = self._live.get(record.name)
        is_failing = any(name == record.name for name, _ in self._failures)
        if before is not None and before.task.record is record and not is_failing:
            return before
        traffic = record.traffic
        assert traffic is not None
        residents = {n: r for n in traffic.live if (r := self._try(record.versions[n])) is not None}
        if traffic.champion in residents:
            return _live(record, _without(traffic, set(traffic.live) - set(residents)), residents)
        return before if before is not None else self._earlier(record)

    def _earlier(self, record: TaskRecord) -> _Live | None:
        """At a start: the newest champion before this one that can be served."""
        for number in reversed(record.previous):
            version = record.versions.get(number)
            if version is not None and version.state is State.APPROVED:
                resident = self._try(version)
                if resident is not None:
                    logger.error("%s is served by version %d, its champion before", record.name, number)
                    return _live(record, Traffic(number), {number: resident})
        return None

    def _try(self, record: VersionRecord) -> Resident | None:
        key = (record.task, record.version)
        failure = self._failures.get(key)
        if failure is not None and failure.digest == record.digest and not failure.is_due:
            return None
        try:
            resident = self._resident(record)
        except Exception as error:  # whatever is wrong with one version must not keep the others from being followed
            self._failed(record, error)
            return None
        if failure is not None:
            self._recovered(*key)
        return resident

    def _resident(self, record: VersionRecord) -> Resident:
        known = self._residents.get(record.digest)
        if known is not None:
            return known if known.version.version == record.version else _renumbered(known, record.version)
        began_s = time.monotonic()
        with self._traces.part("version") as told:
            told |= {"manifold.task": record.task, "manifold.version": record.version}
            version, handle = self._fetched(record)
        self._metrics.loaded(time.monotonic() - began_s)
        return Resident(version, handle)

    def _fetched(self, record: VersionRecord) -> tuple[TaskVersion, object]:
        with self._traces.part("fetch"):
            folder = self._store.fetch(record.digest)
        loaded = self.loader.load(folder)
        if loaded.digest != record.digest:
            raise ArtifactError(record.task, [f"its content is {loaded.digest} and not {record.digest}"])
        version = loaded.artifact.version(record.version)
        if version.task != record.task:
            raise ArtifactError(record.task, [f"its manifest says that it is of task {version.task}"])
        return version, loaded.handle

    def _warm(self, before: IndexView, view: IndexView) -> None:
        """What was just approved is loaded before anybody makes it live: a swap is quick then, and faults are known."""
        for name, record in view.tasks.items():
            known = before.tasks.get(name)
            if known is None or known is record:
                continue
            for number, version in record.versions.items():
                was = known.versions.get(number)
                if version.state is State.APPROVED and was is not None and was.state is State.CANDIDATE:
                    resident = self._try(version)
                    if resident is not None:
                        self._residents.keep(resident)
        self.catalog.left_out = self.left_out_at_start | self.failures

    def _forget(self, version: TaskVersion, is_last: bool) -> None:
        self._metrics.forget(version.task, version.version)
        if is_last:
            self._metrics.forget_task(version.task)

    def _forget_late(self) -> None:
        """What a request counted that had pinned its version, and ended after that was let go."""
        late = self._metrics.counted  # read first: what is loaded meanwhile is resident before it is counted
        own = self._own.version
        resident = self._residents.versions | {(own.task, own.version)}
        tasks = {task for task, _ in resident}
        for task, version in late - resident:
            self._metrics.forget(task, version)
            if task not in tasks:
                self._metrics.forget_task(task)

    # -- failures ------------------------------------------------------------------------------------------------------

    def _failed(self, record: VersionRecord, error: Exception) -> None:
        key = (record.task, record.version)
        before = self._failures.get(key)
        reason = str(error) if isinstance(error, ManifoldError) else f"loading it failed: {error}"
        self._failures[key] = Failure.after(before, reason, record.digest)
        with contextlib.suppress(UnavailableError):
            self._index.report_failure(self._server, *key, reason)  # also when it was: reports grow old
        if before is None or before.reason != reason:
            logger.error("%s@%d is not served: %s", *key, reason, exc_info=not isinstance(error, ManifoldError))
            self._metrics.load_failed(type(error).__name__ if isinstance(error, ManifoldError) else "unexpected")

    def _recovered(self, task: str, number: int) -> None:
        del self._failures[task, number]
        with contextlib.suppress(UnavailableError):
            self._index.clear_failure(self._server, task, number)

    def _retry(self) -> None:
        """Tries once more what could not be served, and shows it where it can be now."""
        view = self.catalog.snapshot.view
        due = [key for key, failure in self._failures.items() if failure.is_due]
        loaded = [resident for key in due if (resident := self._try(view.tasks[key[0]].versions[key[1]])) is not None]
        for resident in loaded:
            self._residents.keep(resident)
        if loaded:
            self._show(view)

    def _prune(self, view: IndexView) -> None:
        """Forgets failures of versions that nobody wants any more."""
        for task, number in list(self._failures):
            record = view.tasks.get(task)
            version = record.versions.get(number) if record is not None else None
            live = record.traffic.live if record is not None and record.traffic is not None else ()
            if version is None or (version.state is not State.APPROVED and number not in live):
                self._recovered(task, number)

    def _unserved(self, view: IndexView) -> dict[str, int]:
        """By task: how many of the versions that the index calls live are not served here."""
        live = {name: record.traffic.live for name, record in view.tasks.items() if record.traffic is not None}
        return {name: sum((name, number) in self._failures for number in live[name]) for name in live}

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        _step_back()
        hints = self._index.hints() if self._has_hints else None
        due_s = time.monotonic() + self._poll_s
        try:
            while not self._closing.is_set():
                is_hinted = self._wait(hints, due_s - time.monotonic())
                if is_hinted or time.monotonic() >= due_s:
                    self._sync_safely()
                    due_s = time.monotonic() + self._poll_s
                if self._is_dirty and time.monotonic() - self._saved_s > _SAVE_EVERY_S:
                    self._save()
        finally:
            if hints is not None:
                hints.close()

    def _wait(self, hints: Hints | None, timeout_s: float) -> bool:
        """True where a hint came."""
        slice_s = max(0.0, min(timeout_s, _SLICE_S))
        if hints is not None and self.health.up:
            return hints.wait(slice_s)
        self._closing.wait(slice_s)
        return False

    def _sync_safely(self) -> None:
        try:
            self.sync()
        except Exception:  # the thread must outlive whatever one look at the index brings
            logger.exception("following the index failed; it is tried again")

    def _save(self) -> None:
        """What is served now, for a start without the index; and room in the cache."""
        with self._lock:
            if not self._is_dirty:
                return
            self._saved_s = time.monotonic()
            view = self.catalog.snapshot.view
            if self.loss is not None:  # a restart must notice it again
                view = replace(view, index_id=self.loss.before.index_id, generation=self.loss.before.generation)
            served = {name: _only_live(live.task) for name, live in self._live.items()}
            try:
                self._last_good.save(replace(view, tasks=MappingProxyType(served)))
                self._store.trim(set(self._residents.live))
            except (ManifoldError, OSError) as error:
                logger.error("the last good state could not be saved, a restart would need the index: %s", error)
                return
            self._is_dirty = False


def _step_back() -> None:
    """Loading must not slow answers down: where cores are scarce this thread waits. On Linux each has its own place."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


def _live(record: TaskRecord, traffic: Traffic, residents: Mapping[int, Resident]) -> _Live:
    versions = {number: resident.version for number, resident in residents.items()}
    return _Live(Task(record.name, record, traffic, versions), tuple(residents.values()))


def _without(traffic: Traffic, missing: Set[int]) -> Traffic:
    """The champion takes over what challengers would get that cannot be served."""
    if not missing:
        return traffic
    return replace(
        traffic,
        challengers=tuple(c for c in traffic.challengers if c.version not in missing),
        shadow=tuple(number for number in traffic.shadow if number not in missing),
        segments=tuple(s for s in traffic.segments if s.version not in missing),
    )


def _only_live(task: Task) -> TaskRecord:
    versions = {number: task.record.versions[number] for number in task.versions}
    return replace(task.record, traffic=task.traffic, versions=MappingProxyType(versions), previous=())


def _renumbered(resident: Resident, number: int) -> Resident:
    return Resident(replace(resident.version, version=number), resident.handle)
