"""What the use cases and the API need of engine, tokenizer and rollout, so that fakes can stand for them in tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from app.domain import BackboneSpec, Encoding, EngineRequest, EngineResult, TaskVersion, TextInput
from app.registry.comparison import Said
from app.rollout import (
    AuditEntry,
    AuditVerdict,
    KeyRecord,
    Principal,
    Release,
    Role,
    State,
    TaskRecord,
    TrafficWish,
    VersionRecord,
)
from app.service.comparison import Comparison
from app.service.experiment import Observation


class EnginePort(Protocol):
    @property
    def spec(self) -> BackboneSpec: ...

    @property
    def alive(self) -> bool: ...

    @property
    def queue_rows(self) -> int: ...

    @property
    def max_batch_tokens(self) -> int: ...

    def submit(self, request: EngineRequest) -> Future[EngineResult]:
        """Raises UnavailableError where the engine is dead or closed."""
        ...


class TokenizerPort(Protocol):
    def encode_each(
        self, inputs: Sequence[TextInput], limits: Sequence[int], truncate: Sequence[bool], has_offsets: bool
    ) -> list[Encoding | str]:
        """An encoding for each input, or what is wrong with it, to follow "input n". Blocking and thread-safe."""
        ...


class PinsPort(Protocol):
    def load(self, record: VersionRecord) -> tuple[TaskVersion, object]:
        """A version that is not live, resident as long as the handle is held. Blocking.

        Raises ArtifactError where it cannot be served, UnavailableError where its artifact cannot be fetched.
        """
        ...


class ObserverPort(Protocol):
    def record(self, observation: Observation) -> None:
        """Never blocks and never fails."""
        ...


@dataclass(frozen=True, slots=True)
class Published:
    record: VersionRecord
    generation: int  # of the index after it
    is_new: bool  # False: the task had a version with this content already, and nothing was changed


@dataclass(frozen=True, slots=True)
class IndexState:
    """How this server stands to the index."""

    url: str  # without credentials
    up: bool
    index_id: str
    generation: int  # that this server has
    staleness_s: float  # since the index was last read
    regressed: str | None  # where it was emptied, replaced or went back: what it is, and that it waits for a decision
    failures: Mapping[str, Mapping[str, str]]  # task@version → server → why it does not serve it


class RolloutPort(Protocol):
    """Every change of the index and every look into it. All blocking, all safe from any thread.

    All raise UnavailableError where the index, or an artifact, cannot be reached; NotFoundError for tasks, versions,
    releases and keys that are not there; ConflictError for what the state does not allow or a stale `if_match`.
    """

    def publish(
        self,
        principal: Principal,
        task: str,
        files: Mapping[str, bytes],
        options: Mapping[str, Any],
        reason: str,
    ) -> Published:
        """`options`: problem_type, labels, input, as far as they were given. Raises ArtifactError with every fault."""
        ...

    def artifact(self, task: str, version: int) -> tuple[VersionRecord, Mapping[str, bytes]]:
        """The version's files by name, as they were handed in. Raises ArtifactError where they are damaged."""
        ...

    def decide(
        self, principal: Principal, task: str, version: int, state: State, reason: str
    ) -> tuple[VersionRecord, int]: ...

    def set_traffic(
        self, principal: Principal, task: str, wish: TrafficWish, reason: str, if_match: int | None
    ) -> tuple[TaskRecord, int]: ...

    def rollback(
        self, principal: Principal, task: str, reason: str, if_match: int | None
    ) -> tuple[TaskRecord, int]: ...

    def release(
        self, principal: Principal, wishes: Mapping[str, TrafficWish], reason: str, if_match: int | None
    ) -> Release: ...

    def rollback_release(self, principal: Principal, release_id: str, reason: str) -> Release: ...

    def releases(self, limit: int) -> Sequence[Release]:
        """Newest first."""
        ...

    def audit(self, task: str | None, after: int, limit: int) -> Sequence[AuditEntry]:
        """Entries of a sequence above `after`, oldest first."""
        ...

    def verify_audit(self) -> AuditVerdict: ...

    def create_key(self, principal: Principal, name: str, roles: frozenset[Role]) -> tuple[KeyRecord, str]:
        """The record, and the token, which is shown this once."""
        ...

    def revoke_key(self, principal: Principal, key_id: str) -> None: ...

    def keys(self) -> Sequence[KeyRecord]: ...

    def index_state(self) -> IndexState:
        """Answers also where the index is down."""
        ...

    def restore(self, principal: Principal, reason: str) -> int:
        """Writes back what the index lost of this server's last good view. The generation after it."""
        ...

    def accept(self, principal: Principal, reason: str) -> int:
        """Takes the index as it is now, whatever is gone from it. The generation after it."""
        ...

    def comparison(self, task: str) -> Comparison: ...

    def feedback(self, request_id: str, task: str, index: int, truth: Said) -> bool:
        """The truth of input `index` of a request. False: the same was told before."""
        ...
