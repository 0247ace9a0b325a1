"""Why a text got its answer: the rows of the prediction log, and what the index knows of the versions in them.

An answer of weeks ago is explained as well: the index keeps versions that were retired, and the audit log who put
which traffic. Every method blocks. Knows nothing of HTTP.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.domain import DEFAULT_THRESHOLD, ProblemType
from app.errors import MalformedError, NotFoundError, OverloadedError, UnavailableError
from app.registry.prediction_lines import Row, time_of
from app.registry.prediction_store import Found, PredictionStore
from app.rollout import AuditEntry, State
from app.service.catalog import Catalog
from app.service.change_log import ReadAudit
from app.service.prediction_rows import is_sampled

_AT_ONCE = 2  # searches
_PAGE = 1000
_MOST_PAGES = 20
_CLOCKS_S = 300.0  # that the clocks of servers and index may differ
_DECISIONS = {"approve", "reject", "retire"}


@dataclass(frozen=True, slots=True)
class Deed:
    """Who did what to a version or to a task's traffic."""

    action: str
    actor: str
    at: float  # seconds since the epoch, by the index's clock
    generation: int  # of the index after it
    sequence: int  # in the audit log
    reason: str


@dataclass(frozen=True, slots=True)
class Answering:
    """A version that answered, as the index has it now."""

    task: str
    version: int
    digest: str  # that answered
    state: State | None  # now; None where the index lacks it
    problem_type: ProblemType | None
    labels: tuple[str, ...]
    thresholds: Mapping[str, float]  # by label: multi-label tasks give a label from this score on
    published: Deed | None
    decisions: tuple[Deed, ...]  # approved, rejected, retired; oldest first


@dataclass(frozen=True, slots=True)
class TrafficThen:
    """A task's traffic in the generation that an answer names."""

    task: str
    generation: int
    traffic: Mapping[str, Any] | None  # None where the audit log does not tell
    put: Deed | None


@dataclass(frozen=True, slots=True)
class Searched:
    url: str  # without credentials
    files: int
    size_bytes: int
    oldest_s: float | None  # when the oldest file that was searched began
    damaged: tuple[str, ...]  # files that cannot be read
    stopped_s: float | None  # not everything older was searched: it would have taken too long


@dataclass(frozen=True, slots=True)
class Explanation:
    request_id: str
    rows: tuple[Row, ...]
    versions: tuple[Answering, ...]
    traffic: tuple[TrafficThen, ...]
    searched: Searched
    gaps: tuple[str, ...]  # what could not be told, and why


class Why:
    """Safe from any thread; few search at once."""

    def __init__(self, store: PredictionStore | None, sample: float, catalog: Catalog, read_audit: ReadAudit) -> None:
        self._store, self._sample = store, sample
        self._catalog, self._read_audit = catalog, read_audit
        self._searches = threading.BoundedSemaphore(_AT_ONCE)

    def explain(self, request_id: str, since_s: float | None, until_s: float | None) -> Explanation:
        """Raises MalformedError, NotFoundError with what was searched, UnavailableError where none can be."""
        if since_s is not None and until_s is not None and since_s > until_s:
            raise MalformedError(
                f"since ({since_s:.15g}) is after until ({until_s:.15g}): no answer is between the two"
            )
        if self._store is None:
            raise NotFoundError("this server keeps no prediction log: start it with the setting prediction_log")
        found = self._search(self._store, request_id, since_s or 0.0, float("inf") if until_s is None else until_s)
        rows = tuple(row for row in found.rows if _is_readable(row))
        if not rows:
            raise NotFoundError(self._nothing(self._store, request_id, found))
        audits = _Audits(self._read_audit)
        return Explanation(
            request_id,
            rows,
            tuple(self._answering(audits, *key) for key in dict.fromkeys(map(_version_key, rows))),
            tuple(_traffic_then(audits, *key, at_s) for key, at_s in _first_times(rows).items()),
            _searched(self._store, found),
            tuple(dict.fromkeys([*audits.gaps, *_not_searched(found)])),
        )

    def _search(self, store: PredictionStore, request_id: str, since_s: float, until_s: float) -> Found:
        if not self._searches.acquire(blocking=False):
            raise OverloadedError("others search the prediction log at this moment: try again", retry_after_s=2.0)
        try:
            return store.find(request_id, since_s, until_s)
        finally:
            self._searches.release()

    def _nothing(self, store: PredictionStore, request_id: str, found: Found) -> str:
        told = f"no answer to request {request_id} is in the prediction log {store.url}: "
        told += f"{found.files} files of {found.size_bytes / 1e6:.1f} MB were searched"
        if self._sample < 1:
            kept = "is" if is_sampled(request_id, self._sample) else "is not"
            told += f"; it keeps {100 * self._sample:g} % of the requests, and this id {kept} among them"
        return "; ".join([told, *_not_searched(found)])

    def _answering(self, audits: _Audits, task: str, number: int, digest: str) -> Answering:
        entries = audits.of(task)
        concerned = [entry for entry in entries if _concerns(entry, task, number, digest)]
        published = next((_deed(e) for e in concerned if e.action in ("publish", "create", "restore")), None)
        decisions = tuple(_deed(e) for e in concerned if e.action in _DECISIONS or e.action == "create")
        known = self._catalog.snapshot.view.tasks.get(task)
        record = known.versions.get(number) if known is not None else None
        if record is None or record.digest != digest:
            which = "another content than" if record is not None else "no version"
            audits.gaps.append(f"the index has {which} {task}@{number} ({digest}): its labels are not known")
            return Answering(task, number, digest, None, None, (), {}, published, decisions)
        version = self._catalog.describe(record)
        thresholds: Mapping[str, float] = {}
        if version.problem_type is ProblemType.MULTI_LABEL:
            given = version.thresholds or (DEFAULT_THRESHOLD,) * len(version.labels)
            thresholds = dict(zip(version.labels, given, strict=True))
        return Answering(
            task, number, digest, record.state, version.problem_type, version.labels, thresholds, published, decisions
        )


class _Audits:
    """Each task's entries, read once; `gaps` says where they end early."""

    def __init__(self, read: Callable[[str | None, int, int], Sequence[AuditEntry]]) -> None:
        self._read = read
        self._known: dict[str, list[AuditEntry]] = {}
        self.gaps: list[str] = []

    def of(self, task: str) -> list[AuditEntry]:
        if task not in self._known:
            entries = self._known.setdefault(task, [])
            try:
                entries.extend(self._pages(task))
            except UnavailableError as error:
                self.gaps.append(f"who approved what cannot be told now: {error}")
        return self._known[task]

    def _pages(self, task: str) -> Iterator[AuditEntry]:
        after = 0
        for _ in range(_MOST_PAGES):
            page = self._read(task, after, _PAGE)
            yield from page
            if len(page) < _PAGE:
                return
            after = page[-1].sequence
        self.gaps.append(f"only the first {_PAGE * _MOST_PAGES} entries of the audit log on {task} were read")


def _is_readable(row: Row) -> bool:
    kinds = {"task": str, "digest": str, "version": int, "generation": int}
    return all(isinstance(row.get(name), kind) for name, kind in kinds.items())


def _version_key(row: Row) -> tuple[str, int, str]:
    return row["task"], row["version"], row["digest"]


def _traffic_key(row: Row) -> tuple[str, int]:
    return row["task"], row["generation"]


def _first_times(rows: Sequence[Row]) -> dict[tuple[str, int], float]:
    """By task and generation, when the first of these was answered."""
    times: dict[tuple[str, int], float] = {}
    for row in rows:
        key = _traffic_key(row)
        at_s = time_of(row)
        times[key] = min(times.get(key, math.inf), math.inf if at_s is None else at_s)
    return times


def _traffic_then(audits: _Audits, task: str, generation: int, at_s: float) -> TrafficThen:
    """What was put after the answer is of another index, which took this one's place: its generations began anew."""
    entries = [entry for entry in audits.of(task) if entry.generation <= generation]
    earlier = [entry for entry in entries if entry.at <= at_s + _CLOCKS_S]
    for entry in reversed(earlier):
        if (traffic := _traffic_after(entry, task)) is not None:
            return TrafficThen(task, generation, traffic, _deed(entry))
    if len(earlier) < len(entries):
        audits.gaps.append(f"the index is younger than the answer: what traffic {task} had then is not known")
    return TrafficThen(task, generation, None, None)


def _traffic_after(entry: AuditEntry, task: str) -> Mapping[str, Any] | None:
    """What the task's traffic was after this entry, where it says so."""
    stand = _stand(entry, task)
    if "traffic" in stand:
        stand = stand["traffic"] or {}
    return stand if "champion" in stand else None


def _concerns(entry: AuditEntry, task: str, number: int, digest: str) -> bool:
    """In another index the same number is of another content."""
    stand = _stand(entry, task)
    versions = filter(_mapping, stand.get("versions", [stand]))
    return any(v.get("version") == number and v.get("digest", digest) == digest for v in versions)


def _stand(entry: AuditEntry, task: str) -> Mapping[str, Any]:
    """What an entry says of one task: a version, its traffic, or both. Releases and first starts speak of several."""
    after = _mapping(entry.after)
    return after if entry.task is not None else _mapping(_mapping(after.get("tasks", after)).get(task))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _deed(entry: AuditEntry) -> Deed:
    return Deed(entry.action, entry.actor, entry.at, entry.generation, entry.sequence, entry.reason)


def _searched(store: PredictionStore, found: Found) -> Searched:
    return Searched(store.url, found.files, found.size_bytes, found.oldest_s, tuple(found.damaged), found.stopped_s)


def _not_searched(found: Found) -> list[str]:
    unread = "of the prediction log is damaged, or not readable here, and was not searched"
    told = [f"{name} {unread}" for name in found.damaged]
    if found.stopped_s is None:
        return told
    bound = math.ceil(found.stopped_s)
    return [f"not everything before {bound} was searched, it takes too long: go on with until={bound}", *told]
