"""What was measured, row by row, as it is kept in a file and as the report reads it. Knows nothing of how."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Row:
    """One run of closed-loop load, beside the bare encoder right before and after it."""

    section: str  # manifold, one, several, half
    server: str
    job: str
    texts: str
    concurrency: int
    round: int
    texts_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    answers: int
    failed: int
    bare_texts_s: float = 0.0  # at its best batch size
    bare_one_ms: float = 0.0  # a forward of one text; 0 where it was not measured


@dataclass(frozen=True)
class Alone:
    """One caller at a time on Manifold; medians over one round's requests."""

    job: str
    texts: str
    round: int
    latency_ms: float
    engine_ms: float
    beside_ms: float  # of each request's latency − engine time


@dataclass(frozen=True)
class Stream:
    """Requests that come when they are due, at a rate, whatever the server does."""

    permits: int
    share: float  # of saturation
    rate_s: float
    round: int
    sent: int
    accepted: int
    refused: int
    failed: int
    p50_ms: float  # of the accepted
    p99_ms: float
    refusal_p50_ms: float
    refusal_p99_ms: float
    late_p99_ms: float  # how late the generator itself was


@dataclass
class Results:
    conditions: dict[str, str] = field(default_factory=dict)
    best_batch: dict[str, int] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    alone: list[Alone] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, path: Path) -> Results:
        kept = json.loads(path.read_text())
        kinds = {"rows": Row, "alone": Alone, "streams": Stream}
        fields: dict[str, Any] = {k: [kinds[k](**one) for one in v] if k in kinds else v for k, v in kept.items()}
        return cls(**fields)

    def cell(self, section: str, server: str, job: str, texts: str, concurrency: int) -> list[Row]:
        asked = (section, server, job, texts, concurrency)
        return [r for r in self.rows if (r.section, r.server, r.job, r.texts, r.concurrency) == asked]


def median(rows: Iterable[Kind], of: Callable[[Kind], float]) -> float:
    return statistics.median(map(of, rows))
