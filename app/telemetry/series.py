"""Families with many series: a version's scores and its drift. Kept as arrays, written from templates.

prometheus_client takes about ten times as long for as many lines. Knows nothing of what is scored.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_RENDERED_TOGETHER = 16  # versions, for about half a millisecond
_BOUNDS = np.linspace(0.1, 1.0, 10)
_LE = (*(f"{bound:.1f}" for bound in _BOUNDS), "+Inf")
_Version = tuple[str, int]


@dataclass(slots=True, eq=False)
class _Scores:
    template: str  # a place for each number, label by label: buckets, count, sum
    counts: NDArray[np.int64]  # [labels, buckets]
    sums: NDArray[np.float64]  # [labels]
    text: str | None = None  # as it was written last, where nothing was added since

    def add(self, values: NDArray[np.floating[Any]]) -> None:
        is_there = ~np.isnan(values)
        labels, buckets = self.counts.shape
        cells = np.searchsorted(_BOUNDS, values, "left") + np.arange(labels) * buckets
        self.counts += np.bincount(cells[is_there], minlength=labels * buckets).reshape(labels, buckets)
        self.sums += np.where(is_there, values, 0.0).sum(axis=0)
        self.text = None

    def render(self) -> str:
        if self.text is None:
            self.text = self._render()
        return self.text

    def _render(self) -> str:
        rows = zip(self.counts.cumsum(axis=1).tolist(), self.sums.tolist(), strict=True)
        return self.template % tuple(number for row, total in rows for number in (*row, row[-1], total))


class ScoreSeries:
    """`manifold_score`, a histogram for each label of each version. Safe from every thread."""

    def __init__(self) -> None:
        self._scores: dict[_Version, _Scores] = {}
        self._lock = threading.Lock()

    def add(self, task: str, version: int, labels: Sequence[str], values: NDArray[np.floating[Any]]) -> None:
        """`values` [texts, labels]: nan where a text has none. A version's labels are always the same."""
        with self._lock:
            if (task, version) not in self._scores:
                self._scores[task, version] = _new_scores(task, version, labels)
            self._scores[task, version].add(values)

    def forget(self, task: str, version: int) -> None:
        with self._lock:
            self._scores.pop((task, version), None)

    def render(self) -> str:
        """Now and then lets those go on who answer: a thread that only computes is asked for that each 5 ms."""
        parts = [_head("manifold_score", "Scores that versions gave, by label (of a regression: value).", "histogram")]
        with self._lock:
            versions = list(self._scores.values())
        for start in range(0, len(versions), _RENDERED_TOGETHER):
            with self._lock:
                parts += [scores.render() for scores in versions[start : start + _RENDERED_TOGETHER]]
            time.sleep(0)
        return "".join(parts)


class DriftSeries:
    """`manifold_drift_psi` and `manifold_drift_p_value`, by kind. Safe from every thread."""

    def __init__(self) -> None:
        self._lines: dict[_Version, tuple[str, str]] = {}

    def set(self, task: str, version: int, found: Mapping[str, tuple[float, float]]) -> None:
        """By kind: the index and the p-value."""
        labels = {kind: f'{_labels(task, version)},kind="{_escaped(kind)}"' for kind in found}
        psi = "".join(f"manifold_drift_psi{{{labels[kind]}}} {psi:.6g}\n" for kind, (psi, _) in found.items())
        p_value = "".join(f"manifold_drift_p_value{{{labels[kind]}}} {p:.6g}\n" for kind, (_, p) in found.items())
        self._lines[task, version] = (psi, p_value)

    def forget(self, task: str, version: int) -> None:
        self._lines.pop((task, version), None)

    def render(self) -> str:
        lines = list(self._lines.values())
        psi = _head("manifold_drift_psi", "How far a version's last texts are from its baseline, by kind.", "gauge")
        told = "How likely chance alone brings a version's last texts as far from its baseline, by kind."
        p_value = _head("manifold_drift_p_value", told, "gauge")
        return psi + "".join(line for line, _ in lines) + p_value + "".join(line for _, line in lines)


def _new_scores(task: str, version: int, labels: Sequence[str]) -> _Scores:
    template = "".join(_template(f'{_labels(task, version)},label="{_escaped(label)}"') for label in labels)
    return _Scores(template, np.zeros((len(labels), len(_LE)), np.int64), np.zeros(len(labels)))


def _template(labels: str) -> str:
    labels = labels.replace("%", "%%")
    buckets = "".join(f'manifold_score_bucket{{{labels},le="{bound}"}} %d\n' for bound in _LE)
    return buckets + f"manifold_score_count{{{labels}}} %d\nmanifold_score_sum{{{labels}}} %.9g\n"


def _labels(task: str, version: int) -> str:
    return f'task="{_escaped(task)}",version="{version}"'


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _head(name: str, told: str, kind: str) -> str:
    return f"# HELP {name} {told}\n# TYPE {name} {kind}\n"
