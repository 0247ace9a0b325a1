"""What is live and who may change it: versions, traffic, releases, audit entries and keys, as the index holds them.

Standard library only. Knows nothing of Redis, files, tensors or HTTP; `app.registry.changes` has the rules.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any

SLOTS = 10_000  # a unit's place in a task's traffic; one slot is 0.01 percent


class State(StrEnum):
    """candidate → approved → retired, or candidate → rejected."""

    CANDIDATE = "candidate"
    APPROVED = "approved"
    RETIRED = "retired"
    REJECTED = "rejected"


class Role(StrEnum):
    PREDICT = "predict"  # ask for predictions and embeddings, see tasks
    PUBLISH = "publish"  # hand in versions
    APPROVE = "approve"  # approve, reject, retire; pin versions that are not approved
    OPERATE = "operate"  # traffic, rollbacks, releases
    AUDIT = "audit"  # read the audit log
    ADMIN = "admin"  # everything, keys included


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks. Without keys everybody on this machine is the same principal with every role."""

    name: str
    roles: frozenset[Role]

    def has(self, role: Role) -> bool:
        return role in self.roles or Role.ADMIN in self.roles


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A bearer token as it is stored: `hash` is all that is left of the secret."""

    id: str
    name: str  # of the principal; no two keys share one
    roles: frozenset[Role]
    hash: str  # sha256 of the whole token, hex; "" once it is revoked: the record stays, so that no backup revives it
    created_by: str
    created_at: float  # seconds since the epoch, by the index's clock

    @property
    def principal(self) -> Principal:
        return Principal(self.name, self.roles)


def hash_token(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """One version in the index. All but its state and who decided on it is fixed when it is published."""

    task: str
    version: int
    digest: str  # "sha256:…" over the artifact's files
    state: State
    card: str  # JSON: the manifest but for golden examples and score baseline, for lists and details
    size_bytes: int
    published_by: str
    published_at: float  # seconds since the epoch, by the index's clock
    decided_by: str | None = None  # who approved, rejected or retired it last
    decided_at: float | None = None
    reason: str = ""  # of the last decision, or of publishing


@dataclass(frozen=True, slots=True)
class Gates:
    """Bounds on a canary. Past one, once there are `min_count` of what it is measured on, the champion takes over."""

    max_disagreement: float | None = None  # share of texts scored by both on which they differ
    max_error_rate: float | None = None  # share of the challenger's answers that failed
    max_latency_ratio: float | None = None  # challenger's mean time over the champion's
    min_accuracy_gain: float | None = None  # challenger's accuracy minus the champion's, on texts with an outcome
    min_count: int = 100


@dataclass(frozen=True, slots=True)
class Challenger:
    version: int
    percent: float  # of units, in steps of 0.01


@dataclass(frozen=True, slots=True)
class Segment:
    """Slots [start, stop) of a task's traffic belong to a challenger; all others to the champion."""

    start: int
    stop: int
    version: int


@dataclass(frozen=True, slots=True)
class Traffic:
    """Which versions of a task answer, and which are only scored beside them."""

    champion: int
    challengers: tuple[Challenger, ...] = ()
    shadow: tuple[int, ...] = ()
    gates: Gates | None = None
    salt: str = ""  # new for each experiment, so that it is not always the same units that go first
    segments: tuple[Segment, ...] = ()  # follow from challengers and the segments before: units stay in their arm

    def choose(self, unit: str) -> int:
        """The version that answers this unit: the same for the same unit while its arm does not shrink."""
        if not self.segments:
            return self.champion
        slot = slot_of(self.salt, unit)
        return next((s.version for s in self.segments if s.start <= slot < s.stop), self.champion)

    @property
    def live(self) -> tuple[int, ...]:
        """Every version that must be resident, the champion first, none twice."""
        return tuple(dict.fromkeys((self.champion, *(c.version for c in self.challengers), *self.shadow)))


def slot_of(salt: str, unit: str) -> int:
    """0…SLOTS-1, evenly over units."""
    digest = hashlib.sha256(f"{salt}\n{unit}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") * SLOTS >> 64


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """One task in the index: its versions, and its traffic once one of them is live."""

    name: str
    versions: Mapping[int, VersionRecord] = field(default_factory=lambda: MappingProxyType({}))
    traffic: Traffic | None = None
    previous: tuple[int, ...] = ()  # champions before this one, newest last: what rollback takes
    changed: int = 0  # the generation of its last change


@dataclass(frozen=True, slots=True)
class TrafficWish:
    """What an operator wants of one task's traffic; salt and segments follow from it and from what was before."""

    champion: int
    challengers: tuple[Challenger, ...] = ()
    shadow: tuple[int, ...] = ()
    gates: Gates | None = None


@dataclass(frozen=True, slots=True)
class NewVersion:
    """A version on its way into the index."""

    task: str
    version: int
    digest: str
    card: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Release:
    """Several tasks' traffic changed at once."""

    id: str
    created_by: str
    created_at: float
    reason: str
    generation: int
    before: Mapping[str, Traffic | None]  # by task
    after: Mapping[str, Traffic]
    rolled_back_by: str | None = None


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One line of the append-only log. `hash` covers all the rest, and by `previous_hash` everything before."""

    sequence: int  # 1, 2, 3, … without gaps
    at: float  # seconds since the epoch, by the index's clock
    generation: int  # of the index after it
    actor: str
    action: str
    task: str | None
    reason: str
    before: Any  # JSON values
    after: Any
    previous_hash: str
    hash: str


@dataclass(frozen=True, slots=True)
class AuditVerdict:
    """What came of computing every hash of the log again. `head` is the last entry's: keep it elsewhere to compare."""

    ok: bool
    entries: int
    head: str
    fault: str  # a sentence that names the first entry that does not fit; empty where all do


@dataclass(frozen=True, slots=True)
class IndexView:
    """All that a server follows, at one generation. Shares what did not change with the view before."""

    index_id: str  # made with the index: another one means that it was emptied or replaced
    generation: int
    tasks: Mapping[str, TaskRecord]
    keys: Mapping[str, KeyRecord]  # by id
    settled: int = 0  # the generation in which an operator decided last about what the index had lost


EMPTY_VIEW = IndexView("", 0, MappingProxyType({}), MappingProxyType({}))


# -- in words, for people and for logs ---------------------------------------------------------------------------------


def traffic_in_words(traffic: Mapping[str, Any] | None) -> str:
    """champion 3, challenger 4 at 10 %, shadow 5"""
    if traffic is None:
        return "nothing live"
    arms = [f"champion {traffic['champion']}"]
    arms += [f"challenger {c['version']} at {c['percent']:g} %" for c in traffic.get("challengers", ())]
    arms += [f"shadow {version}" for version in traffic.get("shadow", ())]
    return ", ".join(arms)


def value_in_words(value: Any) -> str:
    """Any JSON value of the audit log in one line."""
    if isinstance(value, Mapping):
        if "champion" in value:
            return traffic_in_words(value)
        if set(value) == {"traffic"}:
            return value_in_words(value["traffic"])
        if {"version", "state"} <= set(value):
            return f"version {value['version']} {value['state']}"
        return ", ".join(f"{name} {value_in_words(content)}" for name, content in value.items() if content is not None)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(map(value_in_words, value))
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def printable(text: str) -> str:
    """Neither breaks a line nor moves the cursor."""
    return "".join(character if character.isprintable() else "·" for character in text)
