"""A line in the log for each change of the index that this server follows: who, what, from what to what, and why.

Knows audit entries; nothing of how they are followed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from app.errors import UnavailableError
from app.rollout import AuditEntry, printable, value_in_words

logger = logging.getLogger("manifold.index")

_MOST_LINES = 50
_NOTES = 10  # among them at first: what was refused
_MOST_READ = 500
_SINCE = 100  # that came after they were counted
_MOST_CHARACTERS = 200

ReadAudit = Callable[[str | None, int, int], Sequence[AuditEntry]]  # task, after which entry, how many


def log_changes(read: ReadAudit, before: int, generation: int, num_entries: int) -> None:
    """What was changed above generation `before` and up to `generation`; `num_entries` are in the audit log.

    Of many changes the newest have lines, and one more says how many others there were.
    """
    try:
        changes = _newest(read, before, generation, num_entries)
        others = generation - before - len(changes)
        if others > 0 and not any(entry.action == "restore" for entry in changes):  # which leaves generations out
            logger.info("%d more changes of the index before these: manifold audit shows them", others)
        for entry in changes:
            fields = _fields(entry)
            logger.info("%s", _sentence(entry), extra={"fields": fields, "told": fields})  # in words
    except UnavailableError as error:
        logger.warning("the index went on to generation %d, and who changed it cannot be read: %s", generation, error)
    except Exception:  # a change that was made must not fail because it cannot be told
        logger.exception("the changes up to generation %d of the index cannot be told", generation)


def _newest(read: ReadAudit, before: int, generation: int, num_entries: int) -> list[AuditEntry]:
    wanted = min(generation - before, _MOST_LINES)
    changes: list[AuditEntry] = []
    for num_read in (wanted + _NOTES, _MOST_READ):  # entries can be long: no more than needed
        after = max(0, num_entries - num_read)
        entries = read(None, after, num_read + _SINCE)
        changes = [entry for entry in _changes(entries) if before < entry.generation <= generation][-_MOST_LINES:]
        if len(changes) == wanted or after == 0:
            break
    return changes


def _changes(entries: Sequence[AuditEntry]) -> Iterator[AuditEntry]:
    """Without notes of what was refused: they leave the generation as it was."""
    if entries and entries[0].sequence == 1:
        yield entries[0]
    for previous, entry in pairwise(entries):
        if entry.generation != previous.generation:
            yield entry


def _sentence(entry: AuditEntry) -> str:
    of_task = f" {entry.task}" if entry.task is not None else ""
    change = " → ".join(_words(value) for value in (entry.before, entry.after) if value is not None)
    why = f" ({_cut(entry.reason)})" if entry.reason else ""
    sentence = f"{entry.actor}: {entry.action}{of_task}: {change}{why}, generation {entry.generation}"
    return printable(sentence)


def _fields(entry: AuditEntry) -> dict[str, Any]:
    return {
        "event": "index_change",
        "actor": entry.actor,
        "action": entry.action,
        "task": entry.task,
        "from": None if entry.before is None else _words(entry.before),
        "to": None if entry.after is None else _words(entry.after),
        "reason": entry.reason,
        "generation": entry.generation,
        "sequence": entry.sequence,
        "at": entry.at,
    }


def _words(value: Any) -> str:
    return _cut(value_in_words(value))


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 1] + "…"
