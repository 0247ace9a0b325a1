"""Who asks, and what they may: bearer tokens against the index's keys, roles, and a bound on wrong tokens.

Runs on the event loop alone, so it needs no lock. Knows nothing of HTTP but the value of one header.
"""

from __future__ import annotations

import hmac
import logging
import math
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from app.errors import ConflictError, ForbiddenError, OverloadedError, UnauthorizedError
from app.rollout import KeyRecord, Principal, Role, hash_token

logger = logging.getLogger(__name__)

EVERYBODY = Principal("anonymous", frozenset(Role))  # who asks where there are no keys
ADMIN = Principal("admin", frozenset({Role.ADMIN}))  # who holds the setting admin_key

_UNKNOWN = "unknown at "
_ALL = ""
_OURS = {EVERYBODY.name, ADMIN.name, "manifold", "gate"}  # that stand in the audit log for us

_WINDOW_S = 60.0
_PER_WINDOW = 10
_CLIENTS = 10_000  # that are remembered; beyond them the longest known is forgotten
_WAITING_NOTES = 100
_NOTES_PER_WINDOW = 60  # of all clients together: the index is not theirs to fill
_LONGEST_TOKEN = 1000

# actor, action, task, reason, details: never blocks, never raises
Note = Callable[[str, str, str | None, str, Mapping[str, Any]], None]


class Access:
    def __init__(
        self,
        keys: Callable[[], Mapping[str, KeyRecord]],
        admin_key: str | None,
        note: Note,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`keys`: those of the present view of the index, by id. `note`: hears of every failed attempt."""
        self._keys = keys
        self._admin_hash = None if admin_key is None else hash_token(admin_key)
        self._note = note
        self._failures = _Failures(clock)
        self._refusals = _Failures(clock)
        self._was_guarded = admin_key is not None

    def authenticate(self, authorization: str | None, client: str) -> Principal:
        """The principal behind an Authorization header; `client` is the address that it came from.

        Raises UnauthorizedError, or OverloadedError after too many wrong tokens from the same address.
        """
        if not self.is_guarded:
            return EVERYBODY
        keys = self._keys()
        token = _token(authorization)
        record = keys.get(_key_id(token))
        if record is not None and hmac.compare_digest(record.hash, hash_token(token)):
            return record.principal  # never made to wait: its secret is too long to be guessed
        retry_after_s = self._failures.retry_after_s(client)
        if retry_after_s > 0:
            sentence = f"too many wrong keys from {client}: try again in {math.ceil(retry_after_s)} s"
            raise OverloadedError(sentence, retry_after_s)
        if token and self._admin_hash is not None and hmac.compare_digest(self._admin_hash, hash_token(token)):
            return ADMIN
        self._failures.count(client)
        sentence = _complaint(token, is_revoked=not keys and self._admin_hash is None)
        details = {"client": client, "key": None if record is None else record.id}  # never what was sent
        self._note(f"{_UNKNOWN}{client}", "authenticate", None, sentence, details)
        raise UnauthorizedError(sentence)

    def require(self, principal: Principal, *roles: Role) -> None:
        """Raises ForbiddenError where the principal has none of the roles."""
        if not any(principal.has(role) for role in roles):
            needed = " or ".join(roles)
            raise ForbiddenError(
                f"this needs a key with the role {needed}, and {principal.name} has {_listed(principal)}"
            )

    def refused(self, principal: Principal, what: str, sentence: str) -> None:
        """`what` was asked and forbidden: for the audit log, which is not theirs to fill."""
        if self._refusals.retry_after_s(principal.name) == 0:
            self._refusals.count(principal.name)
            self._note(principal.name, "forbidden", None, f"{what}: {sentence}", {})

    def check_new_key(self, name: str, roles: frozenset[Role]) -> None:
        """Raises ConflictError for a first key that would lock everybody out, and for names that are ours."""
        if name in _OURS or name.startswith(_UNKNOWN):
            raise ConflictError(f'the name "{name}" is taken by the server itself: choose another')
        if self._admin_hash is None and not self._keys() and Role.ADMIN not in roles:
            raise ConflictError("the first key must have the role admin: without one nobody could make another")

    def check_revocation(self, key_id: str) -> None:
        """Raises ConflictError for the last key with the role admin, where the setting admin_key is not there."""
        admins = {record.id for record in self._keys().values() if Role.ADMIN in record.roles}
        if self._admin_hash is None and admins == {key_id}:
            raise ConflictError("this is the last key with the role admin: create another one first")

    @property
    def is_guarded(self) -> bool:
        """Whether a key is asked for. Once so, always so: an index that lost its keys must not open the door to all."""
        self._was_guarded = self._was_guarded or bool(self._keys())
        return self._was_guarded


class BackgroundNotes:
    """Hands notes to a slow writer in a thread of its own. Where too many wait, more are dropped and counted."""

    def __init__(self, write: Note) -> None:
        self._write = write
        self._waiting: queue.Queue[tuple[str, str, str | None, str, Mapping[str, Any]] | None] = queue.Queue(
            _WAITING_NOTES
        )
        self.dropped = 0
        self._budget = _Failures(time.monotonic, _NOTES_PER_WINDOW)
        self._thread = threading.Thread(target=self._run, name="notes", daemon=True)
        self._thread.start()

    def note(self, actor: str, action: str, task: str | None, reason: str, details: Mapping[str, Any]) -> None:
        if self._budget.retry_after_s(_ALL) > 0:
            self.dropped += 1
            return
        self._budget.count(_ALL)
        if self.dropped:
            details = {**details, "not_written_before": self.dropped}
        try:
            self._waiting.put_nowait((actor, action, task, reason, details))
            self.dropped = 0
        except queue.Full:
            self.dropped += 1

    def close(self, timeout_s: float = 5.0) -> None:
        """Writes what waits, as far as there is time."""
        try:
            self._waiting.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (entry := self._waiting.get()) is not None:
            try:
                self._write(*entry)
            except Exception as error:
                logger.warning("%s by %s could not be written to the audit log: %s", entry[1], entry[0], error)


class _Failures:
    """How often each name failed in its present window."""

    def __init__(self, clock: Callable[[], float], per_window: int = _PER_WINDOW) -> None:
        self._clock = clock
        self._per_window = per_window
        self._by_name: OrderedDict[str, tuple[float, int]] = OrderedDict()  # when the window ends, failures in it

    def retry_after_s(self, name: str) -> float:
        """0 where another attempt is allowed now."""
        ends_s, failures = self._by_name.get(name, (0.0, 0))
        return max(ends_s - self._clock(), 0.0) if failures >= self._per_window else 0.0

    def count(self, name: str) -> None:
        now_s = self._clock()
        ends_s, failures = self._by_name.get(name, (0.0, 0))
        if ends_s <= now_s:
            ends_s, failures = now_s + _WINDOW_S, 0
        self._by_name[name] = (ends_s, failures + 1)
        self._by_name.move_to_end(name)
        if len(self._by_name) > _CLIENTS:
            self._by_name.popitem(last=False)


def _token(authorization: str | None) -> str:
    """ "" where the header holds none."""
    scheme, _, token = (authorization or "").partition(" ")
    token = token.strip()
    return token if scheme.lower() == "bearer" and len(token) <= _LONGEST_TOKEN else ""


def _key_id(token: str) -> str:
    """mf_<id>_<secret> → <id>; "" for anything else."""
    mark, _, rest = token.partition("_")
    return rest.partition("_")[0] if mark == "mf" else ""


def _complaint(token: str, is_revoked: bool) -> str:
    if is_revoked:
        return "the index has no keys any more: restore them, or restart the server with an admin_key"
    if not token:
        return "this server asks for a key: send the header Authorization: Bearer <key>"
    return "this key is not known: it is mistyped, or was revoked"


def _listed(principal: Principal) -> str:
    return ", ".join(sorted(principal.roles)) or "none"
