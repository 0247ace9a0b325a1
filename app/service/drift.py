"""Watches what versions answer: counts their scores, and compares their last texts with their baselines.

Runs on the watch's thread. Knows snapshots and what was served; nothing of HTTP or of statistics.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from app.domain import Arm, Encoding, Snapshot, Task, TaskOutput, TaskVersion
from app.engine.traits import Floats, answer_names, traits_of
from app.errors import UnavailableError
from app.service.watching import Served
from app.service.windows import Drift, Rows, Window, commonest
from app.telemetry.metrics import Metrics

logger = logging.getLogger("manifold")

MOST_LABELS = 10  # of a version that have scores of their own in the metrics
OTHER = "other"  # the highest score of the rest
_MOST_RESTING = 32  # windows of versions that are not live any more, and may be again
_TEXTS_TOGETHER, _COUNT_EVERY_S = 512, 2.0  # texts of a version are counted together: alone they cost far more
_COMPARE_EVERY_S = 5.0  # at the soonest: Prometheus asks each 15 s
_MOST_WAITING = 20_000  # outputs: beyond, memory goes before those who answer
_COUNTED_AT_ONCE, _COMPARED_AT_ONCE = 16, 4  # versions a look, so that hundreds do not hold up those who answer
_SAVE_EVERY_S = 5.0
_SAVING_SHARE = 0.01  # of the time may go into saving


class WindowsPort(Protocol):
    """Where windows outlive the process."""

    def save(self, windows: Mapping[str, Rows]) -> None:
        """By digest. Raises UnavailableError where they cannot be kept."""
        ...

    def load(self) -> Mapping[str, Rows]: ...


@dataclass(frozen=True, slots=True)
class VersionDrift:
    """What is known of one live version."""

    task: str
    version: int
    arm: Arm
    has_baseline: bool
    kinds: Sequence[Drift]


class DriftPort(Protocol):
    def drift_of(self, task: Task) -> list[VersionDrift]:
        """Of each live version, as it was compared last."""
        ...


@dataclass(slots=True, eq=False)
class _Watched:
    """A live version."""

    version: TaskVersion
    shown: _ShownLabels
    window: Window | None
    found: Sequence[Drift] = ()
    compared_s: float = 0.0  # on time.monotonic()
    counted_s: float = 0.0
    outputs: list[TaskOutput] = field(default_factory=list)  # not counted yet
    encodings: list[Encoding] = field(default_factory=list)

    def is_due(self, now_s: float) -> bool:
        count = len(self.outputs)
        return count >= _TEXTS_TOGETHER or (count > 0 and self.counted_s + _COUNT_EVERY_S <= now_s)


class DriftWatcher:
    """`take_in` and `close` on one thread; `drift_of` from any."""

    def __init__(
        self,
        current_snapshot: Callable[[], Snapshot],
        unknown_id: int | None,
        size: int,
        saved: WindowsPort,
        metrics: Metrics,
    ) -> None:
        """`size`: texts of a window. `unknown_id`: the token that stands for what the tokenizer does not know."""
        self._current_snapshot, self._unknown_id, self._size = current_snapshot, unknown_id, size
        self._saved, self._metrics = saved, metrics
        self._snapshot: Snapshot | None = None
        self._live: dict[str, _Watched] = {}  # by digest
        self._num_waiting = 0  # outputs of all of them that are not counted yet
        self._resting: OrderedDict[str, Rows] = OrderedDict(saved.load())  # by digest, the latest last
        self._uncompared: dict[str, None] = {}  # digests, the longest waiting first
        self._is_dirty, self._is_failing, self._save_at_s = False, False, 0.0

    def take_in(self, served: Sequence[Served]) -> None:
        self._follow(self._current_snapshot())
        self._gather(served)
        if self._num_waiting > _MOST_WAITING:
            self._count_all()
        else:
            self._count_some()
        self._compare_some()
        if self._is_dirty and time.monotonic() >= self._save_at_s:
            self._save()

    def close(self) -> None:
        self._count_all()
        if self._is_dirty:
            self._save()

    def compare_all(self) -> None:
        """At once, however many wait."""
        self._count_all()
        for digest in list(self._uncompared):
            self._compare(digest)

    def drift_of(self, task: Task) -> list[VersionDrift]:
        traffic, live = task.traffic, self._live
        arms = {
            traffic.champion: Arm.CHAMPION,
            **{challenger.version: Arm.CHALLENGER for challenger in traffic.challengers},
            **dict.fromkeys(traffic.shadow, Arm.SHADOW),
        }
        versions = [(task.versions[number], arm) for number, arm in arms.items() if number in task.versions]
        found = [(version, arm, live.get(version.digest)) for version, arm in versions]
        return [
            VersionDrift(
                task.name, version.version, arm, version.baseline is not None, () if watched is None else watched.found
            )
            for version, arm, watched in found
        ]

    # -- what is live --------------------------------------------------------------------------------------------------

    def _follow(self, snapshot: Snapshot) -> None:
        if snapshot is self._snapshot:
            return
        versions = [version for task in snapshot.tasks.values() for version in task.versions.values()]
        before, live = self._live, {version.digest: version for version in versions}
        kept = {digest: watched for digest, watched in before.items() if live.get(digest) == watched.version}
        for digest in before.keys() - kept.keys():
            self._rest(before[digest])
        self._live = {digest: kept.get(digest) or self._watch(version) for digest, version in live.items()}
        self._snapshot = snapshot

    def _watch(self, version: TaskVersion) -> _Watched:
        baseline = version.baseline
        window = None if baseline is None else Window(version, baseline, self._size)
        watched = _Watched(version, _shown_labels(version), window)
        rows = self._resting.pop(version.digest, None)
        if window is None:
            return watched
        if rows is not None:
            try:
                window.restore(rows)
            except ValueError as error:
                logger.error("the saved window of %s@%d is not used: %s", version.task, version.version, error)
        watched.found = window.compare()
        self._uncompared[version.digest] = None
        return watched

    def _rest(self, watched: _Watched) -> None:
        """A version that is not live is not compared, and nobody is to be woken for it.

        Its scores go with it: it may be unloaded already, and nobody else would take away what was counted since.
        """
        self._count(watched)
        version = watched.version
        self._metrics.no_drift(version.task, version.version)
        self._metrics.no_scores(version.task, version.version)
        self._uncompared.pop(version.digest, None)
        if watched.window is not None:
            self._resting[version.digest] = watched.window.rows
            while len(self._resting) > _MOST_RESTING:
                self._resting.popitem(last=False)

    # -- what was served -----------------------------------------------------------------------------------------------

    def _gather(self, served: Sequence[Served]) -> None:
        """What live versions said; shadows and those scored beside too."""
        live = self._live
        for request in served:
            for reading in request.readings:
                for digest, output in reading.outputs.items():
                    watched = live.get(digest)
                    if watched is not None and output.error is None:
                        self._num_waiting += 1
                        watched.outputs.append(output)
                        watched.encodings.append(reading.encoded)

    def _count_some(self) -> None:
        """Those that wait longest; what has to wait meanwhile is counted together later, for less."""
        now_s = time.monotonic()
        due = [watched for watched in self._live.values() if watched.is_due(now_s)]
        for watched in sorted(due, key=lambda watched: watched.counted_s)[:_COUNTED_AT_ONCE]:
            watched.counted_s = now_s
            self._count(watched)

    def _count_all(self) -> None:
        for watched in self._live.values():
            self._count(watched)

    def _count(self, watched: _Watched) -> None:
        version, outputs, encodings = watched.version, watched.outputs, watched.encodings
        if not outputs:
            return
        watched.outputs, watched.encodings = [], []
        self._num_waiting -= len(outputs)
        traits = traits_of(version, outputs, encodings, self._unknown_id)
        shown = watched.shown
        self._metrics.scored(version.task, version.version, shown.names, shown.of(traits.by_answer))
        if watched.window is not None:
            watched.window.add(traits)
            self._uncompared[version.digest] = None
            self._is_dirty = True

    # -- what is said of it --------------------------------------------------------------------------------------------

    def _compare_some(self) -> None:
        now_s = time.monotonic()
        due = [digest for digest in self._uncompared if self._live[digest].compared_s + _COMPARE_EVERY_S <= now_s]
        for digest in due[:_COMPARED_AT_ONCE]:
            self._compare(digest)

    def _compare(self, digest: str) -> None:
        del self._uncompared[digest]
        watched = self._live[digest]
        watched.compared_s = time.monotonic()
        if watched.window is None:
            return
        watched.found = watched.window.compare()
        said = {
            drift.kind.value: (drift.psi, drift.p_value)
            for drift in watched.found
            if drift.psi is not None and drift.p_value is not None
        }
        if said:
            self._metrics.drifted(watched.version.task, watched.version.version, said)

    # -- across restarts -----------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """A full disk is told once, and tried again later."""
        began_s = time.monotonic()
        live = {digest: w.window.rows for digest, w in self._live.items() if w.window is not None and w.window.texts}
        try:
            self._saved.save({**self._resting, **live})
            self._is_dirty = self._is_failing = False
        except UnavailableError as error:
            if not self._is_failing:
                logger.error("drift windows are not saved, a restart would begin them anew: %s", error)
            self._is_failing = True
        ended_s = time.monotonic()
        self._save_at_s = ended_s + max(_SAVE_EVERY_S, (ended_s - began_s) / _SAVING_SHARE)


# -- labels in metrics -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _ShownLabels:
    """Which labels have series of their own, so that a task with hundreds has not hundreds of series."""

    names: tuple[str, ...]
    own: list[int]
    rest: list[int]

    def of(self, by_answer: Floats) -> Floats:
        """[texts, answers] → [texts, names]"""
        if not self.rest:
            return by_answer[:, self.own]
        rest = np.fmax.reduce(by_answer[:, self.rest], axis=1)  # of tokens, nan where none is there
        return np.concatenate((by_answer[:, self.own], rest[:, None]), axis=1)


def _shown_labels(version: TaskVersion) -> _ShownLabels:
    names = answer_names(version)
    if len(names) <= MOST_LABELS:
        return _ShownLabels(names, list(range(len(names))), [])
    labels = () if version.baseline is None else version.baseline.labels
    own = [i for i in commonest(len(names), labels, MOST_LABELS) if names[i] != OTHER]  # no name twice
    rest = [i for i in range(len(names)) if i not in own]
    return _ShownLabels((*(names[i] for i in own), OTHER), own, rest)
