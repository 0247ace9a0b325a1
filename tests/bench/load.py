"""Closed-loop load by wrk (Debian's package), one thread: so many requests in flight, each with a text of its own.

Knows requests as a path and what stands before and after the text; nothing of who answers them.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_SCRIPT = Path(__file__).with_name("load.lua")


@dataclass(frozen=True)
class Call:
    """One request: its body is `before`, the text as a JSON string, `after`."""

    path: str
    before: str
    after: str

    def body(self, quoted_text: str) -> bytes:
        return f"{self.before}{quoted_text}{self.after}".encode()


@dataclass(frozen=True)
class Load:
    """What came of a run. Percentiles are wrk's, of single requests."""

    texts_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    answers: int
    failed: int  # statuses from 400 on, and connections that broke or waited too long


def require_wrk() -> None:
    if shutil.which("wrk") is None:
        raise SystemExit("the load generator wrk is not installed: apt-get install -y wrk")


def run_wrk(
    url: str,
    calls: Sequence[Call],
    texts: Path,
    connections: int,
    seconds: int,
    start: int = 0,
    settling_s: float = 0.0,
) -> Load:
    """`calls` are sent one after the other for each text; with several, a text is done when all are.

    Texts a second are those behind the first `settling_s`; all else is of the whole run.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".tsv") as file:
        file.write("".join(f"{call.path}\t{call.before}\t{call.after}\n" for call in calls))
        file.flush()
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "60s"]
        command += ["-s", str(_SCRIPT), url, "--", str(texts), file.name, str(start)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("manifold ")]
    if not lines:
        raise RuntimeError(f"wrk ended with {done.returncode}: {(done.stderr or done.stdout)[-2000:]}")
    said = json.loads(lines[0].removeprefix("manifold "))
    return Load(
        rate_s(said["arrivals_us"], connections, settling_s) / len(calls),
        said["p50_us"] / 1000,
        said["p95_us"] / 1000,
        said["p99_us"] / 1000,
        said["answers"],
        said["refused"] + said["lost"],
    )


def rate_s(arrivals_us: Sequence[float], connections: int, settling_s: float = 0.0) -> float:
    """Answers a second: the slope of their count over time, behind the first `connections` of them and `settling_s`.

    Answers come in bursts as large as a batch; a count over a span would be wrong by up to one burst.
    """
    settled = arrivals_us[connections:] if len(arrivals_us) >= 3 * connections else arrivals_us
    settled = [arrival_us for arrival_us in settled if arrival_us >= settling_s * 1e6]
    if len(settled) < 3 or settled[-1] == settled[0]:
        return 0.0
    slope, _ = statistics.linear_regression(settled, range(len(settled)))
    return slope * 1e6
