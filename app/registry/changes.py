"""What may become of a task: publish, decide, move traffic, roll back. Pure rules, no I/O.

Each takes a task as it is and gives the task as it will be, the very same object where nothing changes. Errors:
NotFoundError for versions that are not there, ConflictError for what their state does not allow, ForbiddenError where
two people are needed, UnservableError for traffic that makes no sense.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from types import MappingProxyType
from typing import Any

from app.errors import ConflictError, ForbiddenError, NotFoundError, UnservableError
from app.rollout import (
    SLOTS,
    Challenger,
    NewVersion,
    Segment,
    State,
    TaskRecord,
    Traffic,
    TrafficWish,
    VersionRecord,
)

MAX_PREVIOUS = 20  # champions that a rollback can go back through
_ALLOWED = {State.APPROVED: State.CANDIDATE, State.REJECTED: State.CANDIDATE, State.RETIRED: State.APPROVED}
_MUST_AGREE = {"problem_type": "problem type", "labels": "labels", "input": "input"}


# -- versions ----------------------------------------------------------------------------------------------------------


def first_tasks(versions: Sequence[NewVersion], actor: str, at: float, reason: str) -> dict[str, TaskRecord]:
    """Versions as an index begins with them: approved, the highest of each task live."""
    tasks: dict[str, TaskRecord] = {}
    for new in versions:
        version = VersionRecord(
            task=new.task,
            version=new.version,
            digest=new.digest,
            state=State.APPROVED,
            card=new.card,
            size_bytes=new.size_bytes,
            published_by=actor,
            published_at=at,
            decided_by=actor,
            decided_at=at,
            reason=reason,
        )
        tasks[new.task] = with_versions(tasks.get(new.task, TaskRecord(new.task)), [version])
    return {name: replace(record, traffic=Traffic(max(record.versions))) for name, record in tasks.items()}


def publish(
    task: TaskRecord | None, name: str, digest: str, card: str, size_bytes: int, actor: str, at: float, reason: str
) -> TaskRecord:
    """A candidate with the next number. Content that the task has already changes nothing: see `find_digest`."""
    known = task if task is not None else TaskRecord(name)
    if find_digest(known, digest) is not None:
        return known
    number = max(known.versions, default=0) + 1
    version = VersionRecord(name, number, digest, State.CANDIDATE, card, size_bytes, actor, at, reason=reason)
    return with_versions(known, [version])


def find_digest(record: TaskRecord, digest: str) -> VersionRecord | None:
    return next((version for version in record.versions.values() if version.digest == digest), None)


def decide(
    record: TaskRecord, version: int, state: State, actor: str, at: float, reason: str, separate: bool
) -> TaskRecord:
    """candidate → approved or rejected, approved → retired. `separate`: nobody approves what they published."""
    known = find(record, version)
    name = f"{record.name}@{version}"
    if known.state is state:
        return record
    if _ALLOWED.get(state) is not known.state:
        raise ConflictError(f"{name} is {known.state}: only {_allowed_from(state)} can become {state}")
    if separate and state is State.APPROVED and known.published_by == actor:
        raise ForbiddenError(f"{name} was published by {actor}: somebody else must approve it")
    if state is not State.APPROVED and record.traffic is not None and version in record.traffic.live:
        raise ConflictError(f"{name} takes part in the task's traffic: take it out of that before it is {state}")
    return with_versions(record, [replace(known, state=state, decided_by=actor, decided_at=at, reason=reason)])


def find(record: TaskRecord, version: int) -> VersionRecord:
    known = record.versions.get(version)
    if known is None:
        raise NotFoundError(f"task {record.name} has no version {version}")
    return known


def with_versions(record: TaskRecord, versions: Iterable[VersionRecord]) -> TaskRecord:
    added = {version.version: version for version in versions}
    return replace(record, versions=MappingProxyType({**record.versions, **added}))


def _allowed_from(state: State) -> str:
    return "a candidate" if state is not State.RETIRED else "an approved version"


# -- traffic -----------------------------------------------------------------------------------------------------------


def set_traffic(record: TaskRecord, wanted: TrafficWish, salt: str) -> TaskRecord:
    """`salt` is taken where an experiment begins; while there are challengers it stays, and units with it."""
    _check_versions(record, wanted)
    _check_percents(wanted.challengers)
    _check_cards(record, wanted)
    traffic = Traffic(wanted.champion, shadow=wanted.shadow)
    if wanted.challengers:
        before = record.traffic
        traffic = replace(
            traffic,
            challengers=wanted.challengers,
            gates=wanted.gates,
            salt=before.salt if before is not None and before.challengers else salt,
            segments=allocate(before.segments if before is not None else (), wanted.challengers),
        )
    return _with_traffic(record, traffic)


def rollback(record: TaskRecord) -> TaskRecord:
    """Back to the champion before, alone. Once more goes further back."""
    if record.traffic is None:
        raise ConflictError(f"task {record.name} has no live version that could be rolled back")
    left = list(record.previous)
    while left:
        champion = left.pop()
        known = record.versions.get(champion)
        if known is not None and known.state is State.APPROVED and champion != record.traffic.champion:
            shadow = tuple(v for v in record.traffic.shadow if v != champion and _fits(record, v, champion))
            return replace(record, traffic=Traffic(champion, shadow=shadow), previous=tuple(left))
    raise ConflictError(f"task {record.name} has no champion before version {record.traffic.champion} to go back to")


def champion_alone(record: TaskRecord) -> TaskRecord:
    """Ends a canary; shadows are scored on."""
    assert record.traffic is not None, "a canary has traffic"
    return replace(record, traffic=Traffic(record.traffic.champion, shadow=record.traffic.shadow))


def restore_traffic(record: TaskRecord, traffic: Traffic | None) -> TaskRecord:
    """Exactly the traffic that it had once, as far as its versions may still be live."""
    if traffic is not None:
        wish = TrafficWish(traffic.champion, traffic.challengers, traffic.shadow)
        _check_versions(record, wish)
    back = traffic is not None and record.previous[-1:] == (traffic.champion,)
    previous = record.previous[:-1] if back else record.previous
    return replace(record, traffic=traffic, previous=previous)


def _with_traffic(record: TaskRecord, traffic: Traffic) -> TaskRecord:
    if traffic == record.traffic:
        return record
    previous = record.previous
    if record.traffic is not None and record.traffic.champion != traffic.champion:
        previous = (*previous, record.traffic.champion)[-MAX_PREVIOUS:]
    return replace(record, traffic=traffic, previous=previous)


def _check_versions(record: TaskRecord, wanted: TrafficWish) -> None:
    answering = (wanted.champion, *(challenger.version for challenger in wanted.challengers))
    taking_part = (*answering, *wanted.shadow)
    for version in taking_part:
        if taking_part.count(version) > 1:
            raise UnservableError(f"version {version} is named twice: it is champion, challenger or shadow")
        state = find(record, version).state
        if state is State.APPROVED or (state is State.CANDIDATE and version in wanted.shadow):
            continue
        told = "approve it first" if state is State.CANDIDATE else "it cannot go live"
        raise ConflictError(f"{record.name}@{version} is {state}: {told}")


def _check_percents(challengers: Sequence[Challenger]) -> None:
    for challenger in challengers:
        percent = challenger.percent
        if not 0 < percent <= 100 or abs(percent * 100 - round(percent * 100)) > 1e-6:
            raise UnservableError(f"{percent:g} percent cannot be given: it goes from 0.01 to 100 in steps of 0.01")
    if sum(map(_slots, challengers)) > SLOTS:
        total = sum(challenger.percent for challenger in challengers)
        raise UnservableError(f"the challengers have {total:g} percent together: 100 is all there is")


def _check_cards(record: TaskRecord, wanted: TrafficWish) -> None:
    """Whoever asks a task must not notice by the answer's shape which version it came from."""
    for version in (*(challenger.version for challenger in wanted.challengers), *wanted.shadow):
        champion, other = _shape(record.versions[wanted.champion]), _shape(record.versions[version])
        for key, word in _MUST_AGREE.items():
            if other[key] != champion[key]:
                raise UnservableError(
                    f"{record.name}@{version} and @{wanted.champion} differ in their {word}: {_told(other[key])} and "
                    f"{_told(champion[key])}; only versions that agree can share a task's traffic"
                )


def _fits(record: TaskRecord, version: int, champion: int) -> bool:
    return _shape(record.versions[version]) == _shape(record.versions[champion])


def _shape(version: VersionRecord) -> Mapping[str, Any]:
    card = json.loads(version.card)
    labels = sorted(card.get("labels", ()))
    return {"problem_type": card.get("problem_type"), "labels": labels, "input": card.get("input", "text")}


def _told(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 200 else text[:200] + "…"


# -- slots -------------------------------------------------------------------------------------------------------------


def allocate(before: Sequence[Segment], wanted: Sequence[Challenger]) -> tuple[Segment, ...]:
    """The slots of each challenger, exactly its share of all.

    Units stay in their arm: a challenger that grows keeps its slots and takes the champion's, one that shrinks gives
    its last ones back to the champion, and so does one that leaves, with all of them.
    """
    owners: list[int | None] = [None] * SLOTS
    sizes = {challenger.version: _slots(challenger) for challenger in wanted}
    missing = dict(sizes)
    for segment in sorted(before, key=lambda segment: segment.start):
        kept = min(segment.stop - segment.start, missing.get(segment.version, 0))
        if kept:
            owners[segment.start : segment.start + kept] = [segment.version] * kept
            missing[segment.version] -= kept
    free = (slot for slot, owner in enumerate(owners) if owner is None)
    for version, size in missing.items():
        for _ in range(size):
            owners[next(free)] = version
    return tuple(_segments(owners))


def _segments(owners: Sequence[int | None]) -> Iterable[Segment]:
    for version, run in groupby(range(len(owners)), key=owners.__getitem__):
        slots = list(run)
        if version is not None:
            yield Segment(slots[0], slots[-1] + 1, version)


def _slots(challenger: Challenger) -> int:
    return round(challenger.percent * SLOTS / 100)
