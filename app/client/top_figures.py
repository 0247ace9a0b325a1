"""From what a server counted to the figures that `manifold top` shows. Knows the metrics' names, and no layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.client.rates import Between, ratio

STAGES = ("tokenize", "queue", "collate", "forward", "heads")
_ANSWERS, _DEVICE, _PASSES = "manifold_predictions_total", "manifold_device_seconds_total", "manifold_passes_total"
_REQUESTS, _DURATION = "manifold_requests_total", "manifold_request_duration_seconds"
_DRIFT = "manifold_drift_psi"
_ROUTES = ("/v1/predict", "/v1/embeddings")


@dataclass(frozen=True, slots=True)
class Row:
    """One version of a task in one arm. A version in two arms shares its device time and its drift between them."""

    task: str
    version: str
    arm: str
    answers: float | None  # a second
    failed: float | None  # of its answers
    passes: float | None  # for an answer of the task; where the task has several rows, on the first one
    device: float | None  # of the device's time
    drift: tuple[float, str] | None  # the largest PSI, and of what


@dataclass(frozen=True, slots=True)
class Requests:
    route: str
    rate: float | None
    failed: float | None
    p50_s: float | None
    p99_s: float | None


def requests(between: Between) -> list[Requests]:
    """Of predict, and of other routes that use the encoder where somebody asks them."""
    found = [_requests(between, route) for route in _ROUTES]
    return [found[0], *(other for other in found[1:] if other.rate)]


def passes_per_request(between: Between) -> float | None:
    answered = [between.increase(_REQUESTS, route=route, code="200") or 0.0 for route in _ROUTES]
    return ratio(between.increase(_PASSES), sum(answered))


def stage_means_s(between: Between) -> dict[str, float | None]:
    return {stage: between.mean("manifold_stage_duration_seconds", stage=stage) for stage in STAGES}


def device_busy(between: Between) -> float | None:
    return between.rate(_DEVICE)


def unserved(between: Between) -> int:
    """Live versions of the index that the server cannot serve."""
    return round(sum(between.gauges("manifold_versions_unserved", "task").values()))


def cached(between: Between) -> float | None:
    """The share of answers that were found."""
    hits, misses = (between.increase(f"manifold_answer_cache_{kind}_total") for kind in ("hits", "misses"))
    return None if hits is None or misses is None else ratio(hits, hits + misses)


def groups(tasks: Sequence[Mapping[str, Any]], between: Between, order: str) -> list[list[Row]]:
    """The rows of each task, the tasks in this order."""
    counted = _Counted.of(between)
    found = [list(_rows(task, counted)) for task in tasks]
    return sorted((rows for rows in found if rows), key=lambda rows: (ORDERS[order](rows), rows[0].task))


def _requests(between: Between, route: str) -> Requests:
    codes = between.increases(_REQUESTS, "code", route=route)
    failed = sum(grown for (code,), grown in codes.items() if code >= "500")
    p50_s, p99_s = (between.quantile(q, _DURATION, route=route) for q in (0.5, 0.99))
    return Requests(route, between.rate(_REQUESTS, route=route), ratio(failed, sum(codes.values())), p50_s, p99_s)


@dataclass(frozen=True, slots=True)
class _Counted:
    """What was counted by task, version and arm, as far as each has them."""

    elapsed_s: float
    answers: Mapping[tuple[str, ...], float]
    failures: Mapping[tuple[str, ...], float]
    task_answers: Mapping[tuple[str, ...], float]
    passes: Mapping[tuple[str, ...], float]
    device_s: Mapping[tuple[str, ...], float]
    drift: Mapping[tuple[str, ...], float]

    @classmethod
    def of(cls, between: Between) -> _Counted:
        return cls(
            between.elapsed_s,
            between.increases(_ANSWERS, "task", "version", "arm"),
            between.increases(_ANSWERS, "task", "version", "arm", outcome="failure"),
            between.increases(_ANSWERS, "task"),
            between.increases(_PASSES, "task"),
            between.increases(_DEVICE, "task", "version"),
            between.gauges(_DRIFT, "task", "version", "kind"),
        )

    def rate(self, counted: float | None) -> float | None:
        return None if counted is None else counted / self.elapsed_s

    def worst_drift(self, task: str, version: str) -> tuple[float, str] | None:
        return max(
            ((psi, kind) for (*place, kind), psi in self.drift.items() if place == [task, version]), default=None
        )


def _rows(task: Mapping[str, Any], counted: _Counted) -> Iterator[Row]:
    name = task["name"]
    passes = ratio(counted.passes.get((name,)), counted.task_answers.get((name,)))
    for version, arm, words in _arms(task, counted):
        answers = counted.answers.get((name, version, arm))
        failed = ratio(counted.failures.get((name, version, arm), 0.0), answers)
        device = counted.rate(counted.device_s.get((name, version)))
        drift = counted.worst_drift(name, version)
        yield Row(name, version, words, counted.rate(answers), failed, passes, device, drift)
        passes = None


def _arms(task: Mapping[str, Any], counted: _Counted) -> Iterator[tuple[str, str, str]]:
    """Version, arm, and the arm in words: what is live, and what answered beside it.

    That is what callers have pinned, and what answers in the place of a version that cannot be loaded.
    """
    traffic = task["traffic"]
    live: list[tuple[str, str, str]] = []
    if traffic is not None:
        live.append((str(traffic["champion"]), "champion", "champion"))
        for challenger in traffic["challengers"]:
            live.append((str(challenger["version"]), "challenger", f"challenger {challenger['percent']:g} %"))
        live += [(str(version), "shadow", "shadow") for version in traffic["shadow"]]
    yield from live
    known = {(version, arm) for version, arm, _ in live}
    for (name, version, arm), grown in sorted(counted.answers.items()):
        if name == task["name"] and grown and (version, arm) not in known:
            yield version, arm, arm if arm == "pinned" else f"{arm} in its place"


def _most(value: Callable[[Row], float | None]) -> Callable[[list[Row]], float]:
    """The largest first."""
    return lambda rows: -max((known for row in rows if (known := value(row)) is not None), default=0.0)


ORDERS: dict[str, Callable[[list[Row]], float]] = {
    "answers": _most(lambda row: row.answers),
    "task": lambda _: 0.0,  # by name alone
    "failed": _most(lambda row: row.failed),
    "passes": _most(lambda row: row.passes),
    "device": _most(lambda row: row.device),
    "drift": _most(lambda row: row.drift[0] if row.drift is not None else None),
}
