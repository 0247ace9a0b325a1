"""The part of a manifest that says how texts looked when the artifact was measured: written, checked and read.

    "score_baseline": {"texts": n, "edges": […], "counts": [[…] a label], "top": […], "labels": […],
                       "length": {"edges": […], "counts": […]}, "unknown": {"edges": […], "counts": […]}}

All but edges and counts may be missing, as they are in artifacts of earlier versions. Compares nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from app.domain import Baseline, Histogram, ProblemType, TaskVersion
from app.engine.traits import Floats, Traits, answer_names

BASELINE = "score_baseline"
_NUM_BINS = 10
_MOST_EDGES = 256  # a window keeps a bin in a byte
_UNKNOWN_EDGES = [0.0, 0.001, 0.05, 0.1, 0.2, 0.5, 1.0]  # the first: texts without one
_PER_LABEL = (ProblemType.SINGLE_LABEL, ProblemType.MULTI_LABEL)


# -- written -----------------------------------------------------------------------------------------------------------


def measured_baseline(version: TaskVersion, traits: Traits) -> dict[str, Any]:
    """As it stands in a manifest."""
    edges = _score_edges(version, traits.scores)
    rows = [_counts(column, edges) for column in traits.scores.T]
    top = {"top": rows.pop()} if version.problem_type in _PER_LABEL else {}
    given = {} if version.problem_type is ProblemType.REGRESSION else {"labels": traits.given.sum(axis=0).tolist()}
    return {
        "texts": len(traits.lengths),
        "edges": edges,
        "counts": rows,
        **top,
        **given,
        "length": _histogram(traits.lengths, _length_edges(traits.lengths)),
        "unknown": _histogram(traits.unknown, _UNKNOWN_EDGES),
    }


def _score_edges(version: TaskVersion, scores: Floats) -> list[float]:
    if version.problem_type is not ProblemType.REGRESSION:
        return [round(float(edge), 1) for edge in np.linspace(0.0, 1.0, _NUM_BINS + 1)]
    edges = np.histogram_bin_edges(scores[:, 0], _NUM_BINS)
    return [float(f"{edge:.7g}") for edge in edges]


def _length_edges(lengths: Any) -> list[float]:
    """Tenths of the texts, with an empty bin on both sides for texts that are shorter and longer than all of them."""
    tenths = np.quantile(lengths, np.linspace(0.0, 0.9, _NUM_BINS), method="lower")
    beyond = int(lengths.max()) + 1
    return [float(edge) for edge in sorted({0, *tenths.tolist(), beyond, 2 * beyond})]


def _histogram(values: Any, edges: list[float]) -> dict[str, Any]:
    return {"edges": edges, "counts": _counts(values, edges)}


def _counts(values: Any, edges: list[float]) -> list[int]:
    counts: list[int] = np.bincount(np.searchsorted(edges[1:-1], values, "right"), minlength=len(edges) - 1).tolist()
    return counts


# -- checked -----------------------------------------------------------------------------------------------------------


def baseline_faults(manifest: Mapping[str, Any]) -> list[str]:
    """A sentence for each part that cannot be read. Where there is no baseline, there is nothing to say."""
    raw = manifest.get(BASELINE)
    if not raw:
        return []
    if not isinstance(raw, dict):
        return [f"{BASELINE} must be an object"]
    faults = []
    if not _is_histogram(raw.get("edges"), [*_rows(raw.get("counts")), *([raw["top"]] if "top" in raw else [])]):
        faults.append(f"{BASELINE} must have ascending edges, and rows of counts with one less each")
    if "labels" in raw and not _are_counts(raw["labels"]):
        faults.append(f"{BASELINE}.labels must be a list of counts")
    for name in ("length", "unknown"):
        part = raw.get(name, {"edges": [0, 1], "counts": [0]})
        if not isinstance(part, dict) or not _is_histogram(part.get("edges"), [part.get("counts")]):
            faults.append(f"{BASELINE}.{name} must have ascending edges, and counts with one less")
    return faults


def _rows(counts: Any) -> list[Any]:
    return counts if isinstance(counts, list) and counts else [None]


def _is_histogram(edges: Any, rows: list[Any]) -> bool:
    if not isinstance(edges, list) or not 2 <= len(edges) <= _MOST_EDGES or not all(_is_number(edge) for edge in edges):
        return False
    ascends = all(low <= high for low, high in pairwise(edges))  # a regression on one value has equal ones
    return ascends and all(_are_counts(row) and len(row) == len(edges) - 1 for row in rows)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(count, int) and not isinstance(count, bool) and 0 <= count < 2**53 for count in value
    )


# -- read --------------------------------------------------------------------------------------------------------------


def read_baseline(manifest: Mapping[str, Any], version: TaskVersion) -> Baseline | None:
    """Of a manifest without faults. None where it says nothing; a part that is not of these labels is left out."""
    raw = manifest.get(BASELINE)
    if not raw:
        return None
    labels = tuple(raw.get("labels", ()))
    return Baseline(
        scores=_scores(raw, version),
        labels=labels if len(labels) == len(answer_names(version)) + 1 else (),
        length=_one_row(raw.get("length")),
        unknown=_one_row(raw.get("unknown")),
    )


def _scores(raw: Mapping[str, Any], version: TaskVersion) -> Histogram | None:
    """Earlier versions counted the words of each tag, which is nothing that a text has."""
    rows = len(version.labels) if version.problem_type in _PER_LABEL else 1
    if len(raw["counts"]) != rows:
        return None
    top = [raw["top"]] if "top" in raw and version.problem_type in _PER_LABEL else []
    return Histogram(tuple(raw["edges"]), tuple(tuple(row) for row in (*raw["counts"], *top)))


def _one_row(part: Mapping[str, Any] | None) -> Histogram | None:
    return None if part is None else Histogram(tuple(part["edges"]), (tuple(part["counts"]),))
