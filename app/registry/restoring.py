"""What an index lacks of a view that a server still has: after it was emptied, or went back to an older backup."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from app.registry import changes
from app.rollout import TaskRecord


def restored(present: Mapping[str, TaskRecord], lost: Mapping[str, TaskRecord], since: int) -> dict[str, TaskRecord]:
    """The tasks that must be written. Versions that the index has stay as they are.

    Traffic comes back too, but not over a change that was made above the generation `since`.
    """
    merged = {name: _merged(present.get(name), record, since) for name, record in lost.items()}
    return {name: record for name, record in merged.items() if record is not present.get(name)}


def _merged(present: TaskRecord | None, lost: TaskRecord, since: int) -> TaskRecord:
    if present is None:
        return lost
    merged = present
    for number, version in lost.versions.items():
        if changes.find_digest(merged, version.digest) is None:
            # a number that was given again meanwhile stays where it is, and what had it before gets another
            free = number if number not in merged.versions else max(merged.versions) + 1
            merged = changes.with_versions(merged, [replace(version, version=free)])
    live = lost.traffic.live if lost.traffic is not None else ()
    is_older = merged.traffic is None or (merged.traffic != lost.traffic and present.changed <= since)
    if is_older and live and all(merged.versions.get(n) == lost.versions.get(n) for n in live):
        return replace(merged, traffic=lost.traffic, previous=lost.previous)
    return merged
