"""What a server counted between two scrapes of its `/metrics`: rates, shares and quantiles.

Counters and buckets are treated as Prometheus' rate and histogram_quantile treat them. Knows no metric but the one that
tells a restart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

from app.telemetry.exposition import Labels, Samples

_STARTED = "process_start_time_seconds"


@dataclass(frozen=True, slots=True)
class Scrape:
    at_s: float  # by a clock that only grows
    samples: Samples


class Between:
    """Everything is None where there is nothing to say: no earlier scrape, no such series, or nothing was counted."""

    def __init__(self, before: Scrape | None, after: Scrape) -> None:
        self._after = after.samples
        self._before: Samples | None = None
        self.elapsed_s = 0.0
        if before is not None and after.at_s > before.at_s:
            self.elapsed_s = after.at_s - before.at_s
            self._before = {} if _restarted(before.samples, after.samples) else before.samples

    def gauge(self, name: str, **labels: str) -> float | None:
        """The sum of what the series with these labels say now."""
        found = [value for own, value in self._after.get(name, {}).items() if labels.items() <= own]
        return sum(found) if found else None

    def gauges(self, name: str, *by: str) -> dict[tuple[str, ...], float]:
        """By the values of these labels; the largest where several series share them."""
        found: dict[tuple[str, ...], float] = {}
        for own, value in self._after.get(name, {}).items():
            place = _place(own, by)
            found[place] = max(found.get(place, value), value)
        return found

    def increases(self, name: str, *by: str, **labels: str) -> dict[tuple[str, ...], float]:
        """By the values of the labels in `by`, of the series with `labels`.

        A counter that fell began anew, and one that is new began at nothing.
        """
        found: dict[tuple[str, ...], float] = {}
        if self._before is None:
            return found
        earlier = self._before.get(name, {})
        for own, value in self._after.get(name, {}).items():
            if labels.items() <= own:
                place = _place(own, by)
                found[place] = found.get(place, 0.0) + _grown(earlier.get(own, 0.0), value)
        return found

    def increase(self, name: str, **labels: str) -> float | None:
        return self.increases(name, **labels).get(())

    def rate(self, name: str, **labels: str) -> float | None:
        """A second."""
        grown = self.increase(name, **labels)
        return None if grown is None else grown / self.elapsed_s

    def mean(self, histogram: str, **labels: str) -> float | None:
        return ratio(self.increase(f"{histogram}_sum", **labels), self.increase(f"{histogram}_count", **labels))

    def quantile(self, q: float, histogram: str, **labels: str) -> float | None:
        """Interpolated in its bucket; the last bound where it lies past that."""
        if self._before is None:
            return None
        name = f"{histogram}_bucket"
        after, before = _buckets(self._after, name, labels), _buckets(self._before, name, labels)
        if any(after.get(bound, 0.0) < count for bound, count in before.items()):
            before = {}  # one bucket that fell: all of them began anew
        return interpolated(q, {bound: count - before.get(bound, 0.0) for bound, count in after.items()})


def ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def interpolated(q: float, buckets: Mapping[float, float]) -> float | None:
    """`buckets`: cumulative counts by upper bound, the last one infinite."""
    total = buckets.get(inf, 0.0)
    if total <= 0:
        return None
    rank, lower, below = q * total, 0.0, 0.0
    for bound, count in sorted(buckets.items()):
        if count >= rank and bound < inf:
            return lower + (bound - lower) * ((rank - below) / (count - below) if count > below else 1.0)
        if bound < inf:
            lower, below = bound, count
    return lower


def _place(own: Labels, by: Sequence[str]) -> tuple[str, ...]:
    values = dict(own)
    return tuple(values.get(label, "") for label in by)


def _grown(before: float, after: float) -> float:
    return after if after < before else after - before


def _restarted(before: Samples, after: Samples) -> bool:
    return _STARTED in before and _STARTED in after and before[_STARTED] != after[_STARTED]


def _buckets(samples: Samples, name: str, labels: Mapping[str, str]) -> dict[float, float]:
    """Summed over every series with these labels."""
    summed: dict[float, float] = {}
    for own, count in samples.get(name, {}).items():
        if labels.items() <= own:
            bound = float(dict(own)["le"])
            summed[bound] = summed.get(bound, 0.0) + count
    return summed
