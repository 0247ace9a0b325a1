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
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Set
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from app.domain import ProblemType, Snapshot, Task, TaskVersion
from app.errors import ArtifactError, ManifoldError, UnavailableError
from app.registry.hints import Hints
from app.registry.index import Index, Pulse
from app.registry.last_good import LastGood
from app.registry.store import ArtifactStore
from app.rollout import EMPTY_VIEW, IndexView, State, TaskRecord, Traffic, VersionRecord
from app.service.catalog import Catalog
from app.service.loading import Loader
from app.telemetry import Metrics

logger = logging.getLogger(__name__)

_SAVE_EVERY_S = 1.0
_RETRY_FIRST_S, _RETRY_MOST_S = 2.0, 60.0  # for versions that could not be served
_NICENESS = 5
_LISTED = 10  # names that a line of the log has
_SLICE_S = 0.25  # how long closing may take


@dataclass(frozen=True, slots=True, eq=False)
class Resident:
    """A version that is loaded, as long as somebody holds this."""

    version: TaskVersion
    handle: object


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
    went_back: str = ""  # what was seen when its generation fell or it was emptied, until that is settled
    kept: tuple[str, ...] = ()  # tasks that are live here although the index no longer has them

    @property
    def staleness_s(self) -> float:
        return time.monotonic() - self.contact_s


@dataclass(slots=True)
class _Failure:
    reason: str
    digest: str
    retry_s: float  # on time.monotonic()
    delay_s: float = _RETRY_FIRST_S


@dataclass(slots=True)
class _Residents:
    """What is loaded: live versions, and the latest others, so that going back to them is immediate."""

    most_others: int
    forget: Callable[[TaskVersion], None]  # hears of each that is not resident any more
    live: dict[str, Resident] = field(default_factory=dict)  # by digest
    others: OrderedDict[str, Resident] = field(default_factory=OrderedDict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self, digest: str) -> Resident | None:
        with self.lock:
            if digest in self.others:
                self.others.move_to_end(digest)
            return self.live.get(digest) or self.others.get(digest)

    def keep(self, resident: Resident) -> None:
        with self.lock:
            self._keep(resident)

    def set_live(self, live: Mapping[str, Resident]) -> None:
        with self.lock:
            left = [resident for digest, resident in self.live.items() if digest not in live]
            self.live = dict(live)
            for digest in live:
                self.others.pop(digest, None)
            for resident in left:
                self._keep(resident)

    def _keep(self, resident: Resident) -> None:
        self.others[resident.version.digest] = resident
        self.others.move_to_end(resident.version.digest)
        while len(self.others) > self.most_others:
            _, gone = self.others.popitem(last=False)
            self.forget(gone.version)


class Follower:
    """`start` after `begin`; `sync` may also be called from elsewhere, to follow a change at once."""

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
    ) -> None:
        """`revive`: what to try when the index does not answer, such as starting it again."""
        self._index, self._store, self.loader = index, store, loader
        self._last_good, self._metrics = last_good, metrics
        self._server, self._poll_s, self._has_hints, self._revive = server, poll_s, has_hints, revive
        representation, handle = loader.representation()
        self._own = Resident(representation, handle)
        self._own_name = {loader.engine.spec.name: representation}
        self._live: dict[str, _Live] = {}  # by task, representations too
        snapshot = Snapshot(0, {}, self._own_name, residents=(handle,))
        self.catalog = Catalog(snapshot, loader.engine.spec.num_layers)
        self.left_out_at_start: dict[str, str] = {}  # artifacts of the folder that an empty index began with
        self.health = IndexHealth(contact_s=time.monotonic())
        self._followed = EMPTY_VIEW  # as the index said last
        self._mark = ("", 0, 0.0)  # what its pulse was then
        self._is_whole = True  # no: it is a last good state, which holds live versions only
        self._kept: Mapping[str, TaskRecord] = {}  # live here, and gone from the index
        self.lost: IndexView | None = None  # what the index said before it lost some of it
        self._residents = _Residents(most_others, lambda version: metrics.forget(version.task, version.version))
        self._failures: dict[tuple[str, int], _Failure] = {}
        self._lock = threading.RLock()  # one sync at a time
        self._saved_s, self._is_dirty = 0.0, False
        self._told_of_revival = False
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
            self._followed, self._is_whole = view, is_whole
            self._show(view)

    def sync(self) -> bool:
        """Asks the index and follows it. False where it does not answer."""
        with self._lock:
            try:
                pulse = self._index.pulse()
                view = self._read(pulse)
            except UnavailableError as error:
                self._lost(error)
                return False
            self._answered()
            if view is not self._followed or self._retry_is_due():
                self._follow(view)
                if pulse.changed_at_s:
                    self._metrics.propagated(max(0.0, pulse.now_s - pulse.changed_at_s))
            self._followed = view
            return True

    @property
    def failures(self) -> dict[str, str]:
        return {f"{task}@{number}": failure.reason for (task, number), failure in self._failures.items()}

    # -- reading the index ---------------------------------------------------------------------------------------------

    def _read(self, pulse: Pulse) -> IndexView:
        before, is_whole = self._followed, self._is_whole
        mark = (pulse.index_id, pulse.generation, pulse.changed_at_s)
        if is_whole and mark == self._mark:
            return before
        is_same = is_whole and (pulse.index_id, pulse.generation) == self._mark[:2]  # an older one that moved on as far
        view = self._index.update(before) if is_whole and before.index_id and not is_same else self._index.view()
        self._mark = mark
        self._is_whole = True
        if before.index_id and (is_same or view.index_id != before.index_id or view.generation < before.generation):
            self._went_back(before, view)
        self._kept = {name: record for name, record in self._kept.items() if name not in view.tasks}
        if self.lost is not None and not _missing(self.lost, view):
            logger.info("the index has everything again that it had lost")
            self.lost = None
        went_back = self.health.went_back if self.lost is not None else ""
        self.health = replace(self.health, went_back=went_back, kept=tuple(sorted(self._kept)))
        return view

    def _went_back(self, before: IndexView, view: IndexView) -> None:
        """An emptied or older index takes no live task with it: what is live stays, until an operator decides."""
        told = f"the index went back from generation {before.generation} to {view.generation}"
        if not view.index_id:
            told = f"the index was emptied, at generation {before.generation}"
        elif view.index_id != before.index_id:
            told = f"the index is another one, at generation {view.generation}"
        missing = _missing(before, view)
        idle = [name for name in self._live if name in view.tasks and view.tasks[name].traffic is None]
        if idle:
            told += f", where nothing is live of {_names(idle)}"
        self._kept = {name: live.task.record for name, live in self._live.items() if name not in view.tasks}
        self.lost = self.lost or (before if missing else None)
        self.health = replace(self.health, went_back=told)
        logger.error("%s; not in it any more: %s; served on: %s", told, _names(missing), _names(self._kept))

    def _answered(self) -> None:
        if not self.health.up:
            logger.info("the index answers")
            self._told_of_revival = False
        self.health = replace(self.health, up=True, reason="", contact_s=time.monotonic())
        self._metrics.index_answered()

    def _lost(self, error: UnavailableError) -> None:
        if self.health.up or not self.health.reason:
            logger.error("the index is out of reach, what is live stays live: %s", error)
        self.health = replace(self.health, up=False, reason=str(error))
        self._metrics.index_lost(self.health.staleness_s)
        if self._revive is not None:
            try:
                self._revive()
            except ManifoldError as failure:
                if not self._told_of_revival:
                    logger.error("starting the index again failed: %s", failure)
                self._told_of_revival = True

    # -- following -----------------------------------------------------------------------------------------------------

    def _follow(self, view: IndexView) -> None:
        before = self.catalog.snapshot.view
        self._show(self._with_what_was_lost(view))
        self._warm(before, view)

    def _with_what_was_lost(self, view: IndexView) -> IndexView:
        """Live tasks, and keys: without them the door would be open to everybody."""
        if self.lost is None:
            return view
        keys = MappingProxyType({**self.lost.keys, **view.keys})
        return replace(view, tasks=MappingProxyType({**view.tasks, **self._kept}), keys=keys)

    def _show(self, view: IndexView) -> None:
        """Everything is loaded before anything of it is seen; then one assignment."""
        built = {name: self._build(record) for name, record in view.tasks.items() if record.traffic is not None}
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
        self._is_dirty = True

    def _build(self, record: TaskRecord) -> _Live | None:
        """With the versions that can be served. Where the champion cannot, the task goes on as it was."""
        before = self._live.get(record.name)
        failed = [number for name, number in self._failures if name == record.name]
        if before is not None and before.task.record is record and not failed:
            return before
        traffic = record.traffic
        assert traffic is not None
        residents = {n: r for n in traffic.live if (r := self._try(record.versions[n])) is not None}
        for number in set(failed) - set(traffic.live):
            self._recovered(record.name, number)
        if traffic.champion not in residents:
            return before
        versions = {number: resident.version for number, resident in residents.items()}
        served = _without(traffic, set(traffic.live) - set(versions))
        return _Live(Task(record.name, record, served, versions), tuple(residents.values()))

    def _try(self, record: VersionRecord) -> Resident | None:
        key = (record.task, record.version)
        failure = self._failures.get(key)
        if failure is not None and failure.digest == record.digest and time.monotonic() < failure.retry_s:
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
        loaded = self.loader.load(self._store.fetch(record.digest))
        if loaded.digest != record.digest:
            raise ArtifactError(record.task, [f"its content is {loaded.digest} and not {record.digest}"])
        version = loaded.artifact.version(record.version)
        if version.task != record.task:
            raise ArtifactError(record.task, [f"its manifest says that it is of task {version.task}"])
        self._metrics.loaded(time.monotonic() - began_s)
        return Resident(version, loaded.handle)

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
                    if resident is not None and version.digest not in self._residents.live:
                        self._residents.keep(resident)

    # -- failures ------------------------------------------------------------------------------------------------------

    def _failed(self, record: VersionRecord, error: Exception) -> None:
        key = (record.task, record.version)
        before = self._failures.get(key)
        delay_s = _RETRY_FIRST_S if before is None else min(2 * before.delay_s, _RETRY_MOST_S)
        reason = str(error) if isinstance(error, ManifoldError) else f"loading it failed: {error}"
        self._failures[key] = _Failure(reason, record.digest, time.monotonic() + delay_s, delay_s)
        with contextlib.suppress(UnavailableError):
            self._index.report_failure(self._server, *key, reason)  # also when it was: reports grow old
        if before is None or before.reason != reason:
            logger.error("%s@%d is not served: %s", *key, reason, exc_info=not isinstance(error, ManifoldError))
            self._metrics.load_failed(type(error).__name__ if isinstance(error, ManifoldError) else "unexpected")

    def _recovered(self, task: str, number: int) -> None:
        del self._failures[task, number]
        with contextlib.suppress(UnavailableError):
            self._index.clear_failure(self._server, task, number)

    def _retry_is_due(self) -> bool:
        return any(time.monotonic() >= failure.retry_s for failure in self._failures.values())

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
        """True where a hint came. In slices, so that closing does not take a poll's time."""
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
        view = self.catalog.snapshot.view
        if not self._is_dirty:
            return
        self._saved_s, self._is_dirty = time.monotonic(), False
        served = {name: _only_live(live.task) for name, live in self._live.items()}
        try:
            self._last_good.save(replace(view, tasks=MappingProxyType(served)))
            self._store.trim(set(self._residents.live))
        except (ManifoldError, OSError) as error:
            logger.error("the last good state could not be saved, a restart would need the index: %s", error)


def _step_back() -> None:
    """Loading must not slow answers down: where cores are scarce this thread waits. On Linux each has its own place."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


def _missing(before: IndexView, view: IndexView) -> list[str]:
    """The versions and keys that `view` lacks."""
    versions = [
        f"{name}@{number}"
        for name, record in before.tasks.items()
        for number in record.versions
        if name not in view.tasks or number not in view.tasks[name].versions
    ]
    return [*versions, *(f"the key of {key.name}" for id_, key in before.keys.items() if id_ not in view.keys)]


def _names(names: Collection[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(sorted(names)[:_LISTED]) + more if names else "nothing"


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
