"""Decides whether a canary has gone past a bound that was set for it. Pure: reads figures, changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from app.domain import Arm
from app.registry.comparison import PairFigures, PairKey
from app.rollout import Gates, TaskRecord, Traffic
from app.service.comparison import accuracy_gain, describe_pair, latency_ratio


@dataclass(frozen=True, slots=True)
class Trip:
    """One challenger went past a gate: the champion is to answer alone, unless traffic is no longer `expected`."""

    task: str
    expected: Traffic
    version: int  # the challenger
    reason: str
    figures: dict[str, Any]  # JSON values, for the audit log


def find_trips(tasks: Iterable[TaskRecord], read: Callable[[Sequence[PairKey]], Sequence[PairFigures]]) -> list[Trip]:
    """At most one a task. `read` gives the figures of pairs, in their order; it is asked once, or not at all."""
    canaries = [canary for task in tasks for canary in _canaries(task)]
    found = read([pair for _, _, _, pair in canaries]) if canaries else []
    trips: dict[str, Trip] = {}
    for (task, traffic, version, _), figures in zip(canaries, found, strict=True):
        reason = tripped(traffic.gates, figures) if traffic.gates is not None else None
        if reason is not None and task not in trips:
            pair = describe_pair(traffic.champion, version, Arm.CHALLENGER, figures)
            trips[task] = Trip(task, traffic, version, f"version {version} {reason}", asdict(pair))
    return list(trips.values())


def tripped(gates: Gates, figures: PairFigures) -> str | None:
    """Why the challenger must go, as the end of a sentence that begins with its name; None where it may stay."""
    checks = (_error_rate, _disagreement, _latency, _accuracy)
    return next((reason for check in checks if (reason := check(gates, figures)) is not None), None)


def _canaries(task: TaskRecord) -> Iterable[tuple[str, Traffic, int, PairKey]]:
    traffic = task.traffic
    if traffic is None or traffic.gates is None:
        return
    champion = task.versions[traffic.champion].digest
    for challenger in traffic.challengers:
        pair = PairKey(task.name, champion, task.versions[challenger.version].digest, traffic.salt)
        yield task.name, traffic, challenger.version, pair


def _error_rate(gates: Gates, figures: PairFigures) -> str | None:
    count, errors, bound = figures.other.texts, figures.other.errors, gates.max_error_rate
    if bound is None or count < max(gates.min_count, 1) or errors / count <= bound:
        return None
    return f"failed on {errors} of {count} texts ({errors / count:.2%}); max_error_rate allows {bound:.2%}"


def _disagreement(gates: Gates, figures: PairFigures) -> str | None:
    differing, bound = figures.disagreed, gates.max_disagreement
    count = figures.agreed + differing
    if bound is None or count < max(gates.min_count, 1) or differing / count <= bound:
        return None
    share = f"{differing} of {count} texts ({differing / count:.2%})"
    return f"differs from the champion on {share}; max_disagreement allows {bound:.2%}"


def _latency(gates: Gates, figures: PairFigures) -> str | None:
    times, bound = latency_ratio(figures), gates.max_latency_ratio
    count = min(figures.champion.requests, figures.other.requests)
    if bound is None or times is None or count < gates.min_count or times <= bound:
        return None
    return f"takes {times:.2f} times as long as the champion; max_latency_ratio allows {bound:g}"


def _accuracy(gates: Gates, figures: PairFigures) -> str | None:
    gain, bound = accuracy_gain(figures), gates.min_accuracy_gain
    if bound is None or gain is None or gain[0] < gates.min_count or gain[1] >= bound:
        return None
    return f"gains {gain[1]:+.4g} on {gain[0]} texts with an outcome; min_accuracy_gain asks for {bound:+.4g}"
