"""A soak: many requests of mixed lengths and tasks while versions are swapped, and the server's memory all the while.

    make bench-soak

A real server with its answer cache on, loading every version anew. Writes tests/bench/SOAK.md and its plot.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import psutil

from app.domain import BackboneSpec
from app.engine.backbone import Backbone
from tests.artifacts import add_prefix, write_artifact
from tests.bench import plot
from tests.bench.laws import fit_line
from tests.bench.machine import describe
from tests.bench.memory import resident_mb
from tests.serving import ServerProcess

REPORT = Path(__file__).with_name("SOAK.md")
TASKS = ("topic", "tone", "intent", "names", "spam")
VERSIONS = (1, 2, 3, 4)
SAMPLES = 200
WARM_UP = 0.2  # of the run
MOST_GROWTH = 0.02  # behind it
CACHE_BYTES = 8_000_000  # small, so that it is full long before the warm-up ends
_IN_FLIGHT = 8
_REPEATED = 0.3  # share of requests whose text was asked a moment ago, half of them of the same tasks
_WORDS = re.compile(r"[a-z]{3,}")


@dataclass
class Progress:
    """What has become of the requests so far, and the memory (MB) after so many of them."""

    answers: Counter[int] = field(default_factory=Counter)  # by status
    wrong: list[str] = field(default_factory=list)
    seen: set[tuple[int, str, int]] = field(default_factory=set)  # generation, task, version
    made: dict[int, int] = field(default_factory=dict)  # generation → the version that every task has in it
    at: list[int] = field(default_factory=list)
    server_mb: list[float] = field(default_factory=list)
    children_mb: list[float] = field(default_factory=list)

    @property
    def done(self) -> int:
        return self.answers.total()


def write_artifacts(folder: Path, spec: BackboneSpec) -> None:
    """A task of each kind that has memory of its own: bare trunk, prefixes from two layers, tokens, many labels."""
    for version in VERSIONS:
        made = {task: folder / task / str(version) for task in TASKS}
        write_artifact(made["topic"], spec, "topic", ("a", "b", "c"), seed=version)
        for task, first_layer, offset in (("tone", 4, 0), ("intent", 0, 8)):
            write_artifact(made[task], spec, task, ("a", "b"), seed=version)
            add_prefix(made[task], spec, 8, first_layer=first_layer, position_offset=offset, seed=version)
        tags = ("O", "B-X", "I-X")
        write_artifact(made["names"], spec, "names", tags, "token_classification", seed=version)
        labels = tuple(f"l{number}" for number in range(20))
        write_artifact(made["spam"], spec, "spam", labels, "multi_label_classification", seed=version)


def requests(count: int, words: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Texts of 3 to 120 words, half of them up to 7; some repeat; one or two of the tasks."""
    drawn = random.Random(0)
    recent: list[dict[str, Any]] = []
    for _ in range(count):
        tasks = drawn.sample(TASKS, drawn.randint(1, 2))
        if recent and drawn.random() < _REPEATED:
            before = drawn.choice(recent)
            yield before if drawn.random() < 0.5 else {**before, "tasks": tasks}
            continue
        length = min(120, max(3, round(drawn.lognormvariate(1.9, 0.7))))
        body = {"inputs": " ".join(drawn.choices(words, k=length)), "tasks": tasks}
        recent = [*recent[-49:], body]
        yield body


async def ask(client: httpx2.AsyncClient, bodies: Iterator[dict[str, Any]], progress: Progress) -> None:
    """One of the clients: what nobody has sent yet, until nothing is left."""
    for body in bodies:
        answer = await client.post("/v1/predict", json=body)
        progress.answers[answer.status_code] += 1
        if answer.status_code == 200:
            said = answer.json()
            (result,) = said["results"]
            progress.seen |= {(said["generation"], task, result[task]["version"]) for task in body["tasks"]}
            progress.wrong += [f"{task}: {result[task]}" for task in body["tasks"] if "error" in result[task]]
        else:
            progress.wrong.append(answer.text)


async def swap(client: httpx2.AsyncClient, swaps: int, total: int, progress: Progress) -> None:
    """Every task to another version, each time that another share of the requests is answered."""
    for number in range(swaps):
        while progress.done < number * total / swaps:
            await asyncio.sleep(0.005)
        version = VERSIONS[(number + 1) % len(VERSIONS)]
        tasks = {task: {"champion": version} for task in TASKS}
        answer = await client.post("/v1/releases", json={"tasks": tasks, "reason": f"swap {number}"})
        answer.raise_for_status()
        progress.made[answer.json()["generation"]] = version


async def sample(pid: int, total: int, progress: Progress) -> None:
    """Memory after each share of the requests."""
    for number in range(SAMPLES + 1):
        while progress.done < number * total / SAMPLES:
            await asyncio.sleep(0.02)
        progress.at.append(progress.done)
        progress.server_mb.append(resident_mb(pid))
        children = psutil.Process(pid).children(recursive=True)
        progress.children_mb.append(sum(child.memory_info().rss for child in children) / 2**20)


async def soak(url: str, pid: int, total: int, swaps: int, words: Sequence[str]) -> tuple[Progress, str]:
    """What came of it, and the server's metrics at the end."""
    progress = Progress()
    bodies = requests(total, words)
    limits = httpx2.Limits(max_connections=_IN_FLIGHT + 1, max_keepalive_connections=_IN_FLIGHT + 1)
    async with httpx2.AsyncClient(base_url=url, timeout=60, limits=limits) as client, asyncio.TaskGroup() as group:
        group.create_task(swap(client, swaps, total, progress))
        group.create_task(sample(pid, total, progress))
        for _ in range(_IN_FLIGHT):
            group.create_task(ask(client, bodies, progress))
    for generation, task, version in progress.seen:
        expected = progress.made.get(generation, version)
        if version != expected:
            progress.wrong.append(f"generation {generation} is version {expected} and {task} answered {version}")
    return progress, httpx2.get(f"{url}/metrics").text


@dataclass(frozen=True)
class Flatness:
    """Of the memory behind the warm-up."""

    first_mb: float  # median of a tenth of the samples
    last_mb: float
    kb_a_thousand: float  # the line through all of them: KB for a thousand requests
    error: float

    @property
    def growth(self) -> float:
        return self.last_mb / self.first_mb - 1


def flatness(at: Sequence[int], memory_mb: Sequence[float]) -> Flatness:
    start = int(WARM_UP * len(at))
    behind = memory_mb[start:]
    tenth = max(1, len(behind) // 10)
    line = fit_line(at[start:], behind)
    first, last = statistics.median(behind[:tenth]), statistics.median(behind[-tenth:])
    return Flatness(first, last, 1024 * 1000 * line.slope, 1024 * 1000 * line.slope_error)


def metric(metrics: str, name: str) -> float:
    """Summed over its labels."""
    return sum(float(value) for value in re.findall(rf"^{name}(?:\{{[^}}]*\}})? (\S+)$", metrics, re.MULTILINE))


def report(path: Path, progress: Progress, metrics: str, swaps: int, elapsed_s: float, threads: int) -> str:
    server, children = (flatness(progress.at, mb) for mb in (progress.server_mb, progress.children_mb))
    verdict = "met" if server.growth <= MOST_GROWTH else "**not met**"
    picture = f"{path.stem.lower()}-memory.svg"
    hits, misses = (metric(metrics, f"manifold_answer_cache_{kind}_total") for kind in ("hits", "misses"))
    cache_mb = metric(metrics, "manifold_answer_cache_bytes") / 1e6
    curves = {"server": (progress.at, progress.server_mb), "its redis-server": (progress.at, progress.children_mb)}
    axes = plot.Axis("requests answered"), plot.Axis("resident MB", lowest=0.0)
    plot.write_plot(path.with_name(picture), "Memory over the soak", *axes, curves)
    loads = int(metric(metrics, "manifold_prefix_load_duration_seconds_count"))
    lines = [
        "# Soak: memory over many requests and swaps",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {describe(threads)}. Written by `make bench-soak`.",
        "",
        f"One server, {_IN_FLIGHT} requests in flight, texts of 3 to 120 words, one or two of {len(TASKS)} tasks "
        "each (bare trunk, prefixes from layers 0 and 4, token classification, 20 labels); a swap gives all of them "
        f"another of {len(VERSIONS)} versions. The answer cache holds {CACHE_BYTES / 1e6:.0f} MB at most. The first "
        f"{100 * WARM_UP:.0f} % of the requests are warm-up.",
        "",
        "| | |",
        "|---|---|",
        f"| requests, in {elapsed_s / 60:.1f} minutes | {progress.done:,} |",
        f"| swaps; versions loaded | {swaps:,}; {loads:,} |",
        f"| failed or wrong | {len(progress.wrong)} |",
        f"| answers from the cache; its size at the end | {100 * hits / (hits + misses):.0f} %; {cache_mb:.1f} MB |",
        f"| server: memory behind the warm-up, at the end | {server.first_mb:.0f} MB, {server.last_mb:.0f} MB |",
        f"| server: growth (at most {100 * MOST_GROWTH:.0f} %) | {100 * server.growth:+.2f} %, {verdict} |",
        f"| server: line through all samples behind the warm-up | {server.kb_a_thousand:+.1f} ± {server.error:.1f} KB "
        "a thousand requests |",
        f"| its redis-server (the index, its audit trail) | {children.first_mb:.1f} MB, {children.last_mb:.1f} MB |",
        "",
        f"![Memory over the soak]({picture})",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-soak", description=__doc__)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--swaps", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1, help="of the server; the clients need a core too")
    parser.add_argument("--out", type=Path, default=REPORT)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    backbone = Backbone.load("embedded", "cpu", "float32")
    words = sorted(set(_WORDS.findall(Path(backbone.path, "vocab.txt").read_text())))
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        prefixes = Path(folder) / "prefixes"
        write_artifacts(prefixes, backbone.spec)
        arguments = ["--prefixes", str(prefixes), "--threads", str(options.threads), "--dtype", "float32"]
        arguments += ["--answer-cache-bytes", str(CACHE_BYTES), "--pinned-versions", "1"]
        with ServerProcess("app.cli", "serve", "--port", "0", *arguments) as process:
            url, pid = process.wait_until_ready(), process.process.pid
            began_s = time.perf_counter()
            progress, metrics = asyncio.run(soak(url, pid, options.requests, options.swaps, words))
            elapsed_s = time.perf_counter() - began_s
    for sentence in progress.wrong[:5]:
        print(sentence)
    text = report(options.out, progress, metrics, options.swaps, elapsed_s, options.threads)
    options.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
