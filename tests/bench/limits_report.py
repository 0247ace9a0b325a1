"""What the limits benchmark found, as Markdown. Knows timings; nothing of what was timed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from tests.bench.machine import describe

_BARE = ("torch, eager", "torch.compile", "torch.compile, frozen weights")
_ENGINE = "**Manifold: Engine.submit**"


@dataclass(frozen=True)
class Timing:
    """Of one subject over one case. `turns_ms`: a median a round, in the order of rounds."""

    subject: str
    dtype: str
    case: str
    batch: int
    turns_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.turns_ms)

    @property
    def spread(self) -> float:
        """Half of the distance between the quartiles, over the median."""
        if len(self.turns_ms) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.turns_ms, n=4, method="inclusive")
        return (high - low) / 2 / self.median_ms


def ratio(one: Timing, other: Timing) -> float:
    """Median over the rounds of neighbours' ratios: a slow moment of the machine hits both."""
    return statistics.median(a / b for a, b in zip(one.turns_ms, other.turns_ms, strict=True))


@dataclass(frozen=True)
class Table:
    timings: Sequence[Timing]

    def find(self, subject: str, dtype: str, case: str) -> Timing | None:
        wanted = (subject, dtype, case)
        return next((t for t in self.timings if (t.subject, t.dtype, t.case) == wanted), None)

    def limit(self, dtype: str, case: str) -> Timing:
        """The fastest of torch's own ways in one dtype (in float32, for int8)."""
        dtype = "float32" if dtype == "int8" else dtype
        found = [t for name in _BARE if (t := self.find(name, dtype, case)) is not None]
        return min(found, key=lambda t: t.median_ms)

    def lines(self, dtype: str) -> list[str]:
        cases = list(dict.fromkeys(t.case for t in self.timings))
        names = list(dict.fromkeys(t.subject for t in self.timings if t.dtype == dtype))
        head = ["| | " + " | ".join(cases) + " |", "|---" * (len(cases) + 1) + "|"]
        return head + [
            f"| {name} | " + " | ".join(self._entry(self.find(name, dtype, case)) for case in cases) + " |"
            for name in names
        ]

    def _entry(self, timing: Timing | None) -> str:
        if timing is None:
            return "–"
        of_limit = ratio(timing, self.limit(timing.dtype, timing.case))
        batch = f" ({timing.batch} at once)" if timing.case == "mixed" else ""
        return f"{timing.median_ms:.2f} ms ± {100 * timing.spread:.0f} %, **{of_limit:.2f}**{batch}"


@dataclass(frozen=True)
class Target:
    case: str
    against: str  # a subject, or "" for the limit
    most: float

    def line(self, table: Table, dtype: str) -> str | None:
        engine = table.find(_ENGINE, dtype, self.case)
        if engine is None:
            return None
        other = table.find(self.against, dtype, self.case) if self.against else table.limit(dtype, self.case)
        if other is None:
            return None
        found = ratio(engine, other)
        verdict = "met" if found <= self.most else "**not met**"
        against = other.subject if self.against else f"the limit ({other.subject})"
        return f"| {self.case} | {dtype} | {against} | {found:.2f} | {self.most:.2f} | {verdict} |"


TARGETS = (
    Target("1 × 32", "OpenVINO", 1.5),
    Target("32 × 64", "OpenVINO", 1.15),
    Target("1 × 32", "", 1.2),
    Target("8 × 32", "", 1.08),
    Target("8 × 128", "", 1.08),
    Target("32 × 64", "", 1.08),
)


def report(timings: Sequence[Timing], threads: int, rounds: int, versions: Sequence[str]) -> str:
    table = Table(timings)
    dtypes = list(dict.fromkeys(t.dtype for t in timings))
    lines = [
        "# The bare limit, and the engine beside it",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {', '.join([describe(threads, ' and '.join(dtypes)), *versions])}. "
        f"Written by `make bench-limits`; {rounds} rounds in which all subjects take turns.",
        "",
        "all-MiniLM-L6-v2, no server. Columns are texts × tokens; *mixed* is 64 texts of 8 to 256 tokens, "
        "half of them up to 40, sorted by length, in the batches fastest for each subject (`Engine.submit` makes "
        "its own). Each entry: median of the rounds, ± half the distance of the quartiles; in bold the ratio to the "
        "limit, which is the fastest of the torch rows in the same dtype (in float32, for int8). The engine's rows "
        "answer one task without a prefix: layout, layers, mean, head, scores; through `submit` they also cross to its "
        "thread and back.",
    ]
    for dtype in dtypes:
        lines += ["", f"## {dtype}", "", *table.lines(dtype)]
    lines += [
        "",
        "## Targets",
        "",
        "`Engine.submit` over what stands beside it:",
        "",
        "| | | against | ratio | at most | |",
        "|---|---|---|---|---|---|",
    ]
    lines += [line for target in TARGETS for dtype in dtypes if (line := target.line(table, dtype)) is not None]
    return "\n".join(lines) + "\n"
