"""The last texts of one version, as bins in a ring, and how they stand to its baseline.

Knows traits and baselines; nothing of requests, threads or files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from app.config import LEAST_WINDOW
from app.domain import Baseline, Histogram, ProblemType, TaskVersion
from app.engine.traits import Traits, answer_names
from app.service.homogeneity import any_share_moved, by_frequency, compare

DRIFT_PSI, DRIFT_P_VALUE = 0.25, 0.01  # as the alert rules have them
_MOST_COLUMNS = 32  # scores of a version that are looked at: the highest, and those of its commonest labels
Rows = NDArray[np.uint8]


class Kind(StrEnum):
    """What of a text may drift."""

    SCORE = "score"
    LABEL = "label"
    LENGTH = "length"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Drift:
    """How one thing about a version's texts stands to its baseline."""

    kind: Kind
    texts: int  # in the window
    baseline_texts: int
    psi: float | None = None  # None: too few texts yet
    p_value: float | None = None
    label: str | None = None  # of scores: the label whose scores moved most

    @property
    def is_drifting(self) -> bool:
        """Large, and no chance: of many texts any difference is sure, and of few any may be large."""
        return self.psi is not None and self.p_value is not None and _is_drift(self.psi, self.p_value)


def _is_drift(psi: float, p_value: float) -> bool:
    return psi > DRIFT_PSI and p_value < DRIFT_P_VALUE


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """Columns of a ring that belong to one kind."""

    kind: Kind
    histogram: Histogram
    source: tuple[int, ...]  # of a histogram's rows, and of the traits' columns
    names: tuple[str | None, ...]  # of each


class Window:
    """A row of bytes a text: a bin for each column, then a bit for each label that it got."""

    def __init__(self, version: TaskVersion, baseline: Baseline, size: int) -> None:
        self._parts = list(_parts(version, baseline))
        columns = [(part.histogram, row) for part in self._parts for row in part.source]
        bins = max((len(histogram.edges) - 1 for histogram, _ in columns), default=1)
        self._expected = np.zeros((len(columns), bins), np.int64)
        for i, (histogram, row) in enumerate(columns):
            self._expected[i, : len(histogram.edges) - 1] = histogram.counts[row]
        self._offsets = np.arange(len(columns)) * bins
        self._has_several = version.problem_type in (ProblemType.MULTI_LABEL, ProblemType.TOKEN)  # labels a text
        self._labels = np.array(baseline.labels, np.int64)  # [labels + 1], or [0]
        self._counts, self._label_counts = np.zeros_like(self._expected), np.zeros_like(self._labels)
        self._ring = np.zeros((size, len(columns) + (len(self._labels) + 7) // 8), np.uint8)
        self._next, self.texts = 0, 0

    @property
    def rows(self) -> Rows:
        """Oldest first."""
        return np.roll(self._ring, -self._next, axis=0)[len(self._ring) - self.texts :]

    def add(self, traits: Traits) -> None:
        self._push(self._binned(traits))

    def restore(self, rows: Rows) -> None:
        """What `rows` of an earlier window of the same version held. Raises ValueError where it cannot be that."""
        if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != self._ring.shape[1]:
            raise ValueError(f"a window has rows of {rows.shape[1:]} bytes and not of {self._ring.shape[1:]}")
        if (rows[:, : len(self._offsets)] >= self._expected.shape[1]).any():
            raise ValueError("a window has a bin that there is not")
        self._push(rows)

    def compare(self) -> list[Drift]:
        """What is known of each kind that the baseline has."""
        found = []
        psi, p_value = compare(self._counts, self._expected)
        start = 0
        for part in self._parts:
            end = start + len(part.source)
            found.append(self._drift(part, psi[start:end], p_value[start:end]))
            start = end
        if len(self._labels):
            found.insert(1 if found and found[0].kind is Kind.SCORE else 0, self._label_drift())
        return found

    def _label_drift(self) -> Drift:
        """How the labels that were given are shared out; where a text may have several, each has a test of its own."""
        live, baseline = by_frequency(self._label_counts, self._labels)
        psi, p_values = compare(live[None], baseline[None])
        p_value = float(p_values[0])
        if self._has_several:
            p_value = any_share_moved(live, self.texts, baseline, self._baseline_texts)
        return self._told(Kind.LABEL, psi[0], p_value)

    def _drift(self, part: _Part, psi: NDArray[np.float64], p_value: NDArray[np.float64]) -> Drift:
        """Of several columns the one that moved most among those that surely moved (Bonferroni)."""
        corrected = np.minimum(p_value * len(psi), 1.0)
        is_sure = corrected < DRIFT_P_VALUE
        most = int(np.argmax(np.where(is_sure, 1e6, 0.0) + psi))
        return self._told(part.kind, psi[most], corrected[most], part.names[most])

    def _told(self, kind: Kind, psi: float, p_value: float, label: str | None = None) -> Drift:
        if self.texts < LEAST_WINDOW:
            return Drift(kind, self.texts, self._baseline_texts)
        return Drift(kind, self.texts, self._baseline_texts, float(psi), float(p_value), label)

    @property
    def _baseline_texts(self) -> int:
        return int(self._expected[0].sum() if len(self._expected) else self._labels.sum())

    # -- the ring ------------------------------------------------------------------------------------------------------

    def _push(self, rows: Rows) -> None:
        size = len(self._ring)
        rows = rows[-size:]
        places = (self._next + np.arange(len(rows))) % size
        leaving = places[max(0, size - self.texts) :]
        self._count(self._ring[leaving], -1)
        self._ring[places] = rows
        self._count(rows, 1)
        self._next = int(self._next + len(rows)) % size
        self.texts = min(size, self.texts + len(rows))

    def _count(self, rows: Rows, sign: int) -> None:
        columns = len(self._offsets)
        if columns:
            cells = (rows[:, :columns] + self._offsets).ravel()
            counted = np.bincount(cells, minlength=self._counts.size)
            self._counts += sign * counted.reshape(self._counts.shape)
        if len(self._labels):
            given = np.unpackbits(rows[:, columns:], axis=1, count=len(self._labels))
            self._label_counts += sign * given.sum(axis=0, dtype=np.int64)

    def _binned(self, traits: Traits) -> Rows:
        parts = [_bins(part, traits) for part in self._parts]
        if len(self._labels):
            parts.append(np.packbits(traits.given, axis=1))
        return np.concatenate(parts, axis=1) if parts else np.zeros((len(traits.lengths), 0), np.uint8)


def _bins(part: _Part, traits: Traits) -> Rows:
    inner = part.histogram.edges[1:-1]
    match part.kind:
        case Kind.SCORE:
            bins = np.searchsorted(inner, traits.scores[:, part.source], "right")
        case Kind.LENGTH:
            bins = np.searchsorted(inner, traits.lengths, "right")[:, None]
        case _:
            bins = np.searchsorted(inner, traits.unknown, "right")[:, None]
    return bins.astype(np.uint8)


def _parts(version: TaskVersion, baseline: Baseline) -> Iterator[_Part]:
    if baseline.scores is not None:
        yield _score_part(version, baseline.scores, baseline.labels)
    for kind, histogram in ((Kind.LENGTH, baseline.length), (Kind.UNKNOWN, baseline.unknown)):
        if histogram is not None:
            yield _Part(kind, histogram, (0,), (None,))


def _score_part(version: TaskVersion, scores: Histogram, labels: Sequence[int]) -> _Part:
    """The highest first, where the baseline has it."""
    if version.problem_type in (ProblemType.TOKEN, ProblemType.REGRESSION):
        return _Part(Kind.SCORE, scores, (0,), (None,))
    names = answer_names(version)
    has_highest = len(scores.counts) > len(names)
    chosen = commonest(len(names), labels, _MOST_COLUMNS - has_highest)
    highest = (len(names),) if has_highest else ()
    return _Part(Kind.SCORE, scores, (*highest, *chosen), (*([None] * has_highest), *(names[i] for i in chosen)))


def commonest(count: int, labels: Sequence[int], most: int) -> list[int]:
    """Indices of at most `most` of `count` labels, in their order: those that a baseline has most often."""
    often = sorted(range(count), key=lambda i: (-labels[i] if labels else 0, i))
    return sorted(often[:most])
