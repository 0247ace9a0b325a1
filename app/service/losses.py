"""What is kept where the index was emptied, replaced, or went back to an older backup. Pure: no I/O.

Nothing that is live, and no key, goes with it until an operator decides: `restore` writes it back, `accept` lets it go.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from app.rollout import IndexView, KeyRecord, TaskRecord

_LISTED = 10  # names in a sentence


@dataclass(frozen=True, slots=True)
class Loss:
    told: str  # what happened, and what is not there any more
    before: IndexView  # what the index said before it
    seen: int  # its generation when this was noticed
    live: Mapping[str, TaskRecord]  # as it was served here then

    @property
    def keys(self) -> Mapping[str, KeyRecord]:
        return self.before.keys

    def kept(self, view: IndexView) -> dict[str, TaskRecord]:
        """The tasks that are served on: those of which nothing is live in the index."""
        return {name: r for name, r in self.live.items() if name not in view.tasks or view.tasks[name].traffic is None}

    def over(self, view: IndexView) -> IndexView:
        """`view` with what is kept."""
        tasks = {**view.tasks, **self.kept(view)}
        keys = {**self.keys, **view.keys}
        return IndexView(view.index_id, view.generation, MappingProxyType(tasks), MappingProxyType(keys), view.settled)

    def is_settled(self, view: IndexView) -> bool:
        return view.settled > self.seen


def find_loss(before: IndexView, view: IndexView, live: Mapping[str, TaskRecord]) -> Loss | None:
    """None where nothing is missing. `before`: what the index said, or a part of it; `live`: as it is served here."""
    missing = list(_missing(before, view))
    if not missing:
        return None
    told = f"the index went back from generation {before.generation} to {view.generation}"
    if not view.index_id:
        told = f"the index was emptied, after generation {before.generation}"
    elif view.index_id != before.index_id:
        told = f"the index is another one, at generation {view.generation}"
    elif view.generation >= before.generation:
        told = f"the index went back to before generation {before.generation}, and on to {view.generation}"
    return Loss(f"{told}; other or missing: {names(missing)}", before, view.generation, live)


def lacks(before: IndexView, view: IndexView) -> bool:
    """Whether something is gone that never goes by itself: an index keeps its versions, and its keys when revoked."""
    for name, record in before.tasks.items():
        known = view.tasks[name].versions.values() if name in view.tasks else ()
        if not {version.digest for version in record.versions.values()} <= {version.digest for version in known}:
            return True
    return any(key.hash and id_ not in view.keys for id_, key in before.keys.items())


def names(found: Collection[str]) -> str:
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return ", ".join(sorted(found)[:_LISTED]) + more


def _missing(before: IndexView, view: IndexView) -> list[str]:
    missing = [f"the key of {key.name}" for id_, key in before.keys.items() if key.hash and id_ not in view.keys]
    for name, record in before.tasks.items():
        now = view.tasks.get(name)
        there = {number: version.digest for number, version in now.versions.items()} if now is not None else {}
        missing += [f"{name}@{n}" for n, version in record.versions.items() if there.get(n) != version.digest]
        if record.traffic is not None and (now is None or now.traffic != record.traffic):
            missing.append(f"the traffic of {name}")
    return missing
