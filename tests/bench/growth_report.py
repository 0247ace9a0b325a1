"""What the growth benchmark found, as Markdown and plots. Knows numbers and laws; nothing of what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path

from tests.bench import plot
from tests.bench.laws import fit_line, linear_law, power_law
from tests.bench.machine import describe


class Axis(Enum):
    TASKS = "tasks"
    LENGTH = "tokens"
    CONCURRENCY = "requests in flight"
    VERSIONS = "resident versions"
    LOADING = "versions already loaded"


@dataclass(frozen=True)
class Growth:
    """Of one thing along one axis. `time`: milliseconds; for VERSIONS the ratio to the bare encoder's forward."""

    name: str
    axis: Axis
    x: list[int]
    time: list[float]
    memory_mb: list[float] | None
    rates_s: list[float] | None = None  # texts a second

    def laws(self) -> list[str]:
        match self.axis:
            case Axis.TASKS:
                time, memory = linear_law(self.x, self.time, "ms", "task"), self._memory("task")
            case Axis.LENGTH:
                time, memory = f"time {power_law(self.x, self.time, 'tokens')}", self._memory("token")
            case Axis.CONCURRENCY:
                time, memory = linear_law(self.x, self.time, "ms", "request in flight"), self._memory("request")
            case Axis.VERSIONS:
                time, memory = f"ratio {power_law(self.x, self.time, 'versions')}", self._memory("version")
            case Axis.LOADING:
                time, memory = f"time {power_law(self.x, self.time, 'versions')}", ""
        return [f"- {self.name}: {time}" + (f"; memory {memory}" if memory else "")]

    def _memory(self, per: str) -> str:
        if self.memory_mb is None:
            return ""
        line = fit_line(self.x, self.memory_mb)
        slope, error = 1024 * line.slope, 1024 * line.slope_error
        return f"{line.intercept:.3g} MB + ({slope:.3g} ± {error:.1g}) KB a {per}, R² = {line.r2:.3f}"


_SECTIONS = {
    Axis.TASKS: (
        "Tasks",
        "8 texts of 32 tokens, asked of so many tasks at once. Memory is what the batch takes at its peak beside what "
        "is resident.",
        "ms",
    ),
    Axis.LENGTH: (
        "Length of the text",
        "One task that reads the bare trunk. Memory as above.",
        "ms",
    ),
    Axis.CONCURRENCY: (
        "Concurrency",
        "Texts of 32 tokens, one a request, so many requests in flight: whoever is answered sends the next. Time is "
        "the median from sending to the answer. Memory of the engine is the most beside what was resident before, of "
        "the server all that is resident after.",
        "p50 ms",
    ),
    Axis.VERSIONS: (
        "Resident versions",
        "Each with a prefix of 4 virtual tokens from layer 5 and a head of four labels: 18 KB of numbers. Time is a "
        "request of one task and one text of 32 tokens, over the bare encoder's forward of that text in turns with "
        "it. Memory is what loading them took.",
        "× bare",
    ),
    Axis.LOADING: ("Loading a version", "The median of the last 100 that were loaded.", "ms"),
}


def write_report(path: Path, growths: Sequence[Growth], threads: int) -> None:
    lines = [
        "# Growth: what more of something costs",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {describe(threads)}. Written by `make bench-growth`.",
        "",
        "Laws are least-squares fits: a line, or a power by the logarithms; ± is the fit's standard error.",
    ]
    for axis, (title, about, unit) in _SECTIONS.items():
        chosen = [growth for growth in growths if growth.axis is axis]
        if chosen:
            lines += ["", f"## {title}", "", about, "", *_table(chosen, unit), ""]
            lines += [law for growth in chosen for law in growth.laws()]
            lines += ["", _plot(path, axis, chosen, unit)]
    path.write_text("\n".join(lines) + "\n")


def _table(growths: Sequence[Growth], unit: str) -> list[str]:
    x = growths[0].x
    lines = [
        f"| {growths[0].axis.value} | " + " | ".join(f"{value:,}" for value in x) + " |",
        "|---" * (len(x) + 1) + "|",
    ]
    for growth in growths:
        lines.append(f"| {growth.name}, {unit} | " + " | ".join(f"{value:.2f}" for value in growth.time) + " |")
        if growth.rates_s is not None:
            lines.append(f"| {growth.name}, texts a second | " + " | ".join(f"{v:.0f}" for v in growth.rates_s) + " |")
        if growth.memory_mb is not None:
            lines.append(f"| {growth.name}, MB | " + " | ".join(f"{value:.1f}" for value in growth.memory_mb) + " |")
    return lines


def _plot(report: Path, axis: Axis, growths: Sequence[Growth], unit: str) -> str:
    title = _SECTIONS[axis][0]
    name = f"{report.stem.lower()}-{axis.name.lower()}.svg"
    series = {growth.name: (growth.x, growth.time) for growth in growths}
    across, up = plot.Axis(axis.value, is_log=True), plot.Axis(unit, is_log=axis is not Axis.VERSIONS, lowest=0.0)
    plot.write_plot(report.with_name(name), title, across, up, series)
    return f"![{title}: {unit} over {axis.value}]({name})"
