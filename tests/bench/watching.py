"""What watching costs: throughput with all of it on over all of it off, and what a scrape of many tasks takes.

    make bench-watching

One server is switched to and fro under a closed loop (wrk): see `watched_server`. Then one with 200 live tasks is
scraped while it answers, and while it does not. Writes WATCHING.md.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from app.engine.backbone import Backbone
from tests.bench.load import require_wrk, run_wrk
from tests.bench.load_texts import TextSet, make_texts
from tests.bench.machine import describe
from tests.bench.serving_artifacts import write_readouts
from tests.bench.serving_servers import Running, Server, Work
from tests.bench.watched_server import SAMPLES, Mode
from tests.bench.watching_cost import (
    CONNECTIONS,
    FULL_EVERY,
    ONE,
    PART_BYTES,
    SCRAPE_S,
    SETTLING_S,
    SEVERAL,
    Costs,
    Phase,
    Traffic,
    measure_costs,
    receiving,
    scraping,
    started,
)

REPORT = Path(__file__).with_name("WATCHING.md")
TASKS = 200
FEW_CONNECTIONS = 8
MOST_COST = 0.03  # share of throughput that watching may take
MOST_SCRAPE_MS = 50.0
MOST_MOVED = 1.05  # p99 beside scrapes, over that of none: rounds move by as much
OFTEN_S, SELDOM_S = 2.5, 15.0  # between scrapes of many tasks: the latter as docker/prometheus asks
SCRAPE_ROUNDS, SCRAPED_S = 4, 30


@dataclass
class Scrapes:
    taken_ms: dict[str, list[float]] = field(default_factory=dict)  # by whether the server had other work
    p99_ms: dict[float, list[float]] = field(default_factory=dict)  # by how often it was scraped meanwhile; 0: never
    size_bytes: int = 0
    lines: int = 0


def measure_scrape(one: Running, text: TextSet, traffic: Traffic, rounds: int, seconds: int, found: Scrapes) -> None:
    run_wrk(one.url, [traffic.call], text.file, FEW_CONNECTIONS, seconds)  # every task has its series now
    for number in range(rounds):
        for every_s in (0.0, SELDOM_S, OFTEN_S)[:: -1 if number % 2 else 1]:
            with scraping(one, every_s, every_s) if every_s else nullcontext():
                load = run_wrk(one.url, [traffic.call], text.file, FEW_CONNECTIONS, seconds, 1000 * number)
            found.p99_ms.setdefault(every_s, []).append(load.p99_ms)
            print(f"{TASKS} tasks, scraped each {every_s:g} s: p99 {load.p99_ms:.1f} ms", flush=True)
    load_process = threading.Thread(
        target=run_wrk, args=(one.url, [traffic.call], text.file, FEW_CONNECTIONS, 8, 50_000), daemon=True
    )
    found.taken_ms["idle"] = [_scrape(one, found) for _ in range(30)]
    load_process.start()
    time.sleep(1.0)
    found.taken_ms["under load"] = [_scrape(one, found) for _ in range(30)]
    load_process.join()


def _scrape(one: Running, found: Scrapes) -> float:
    """By curl's own clock: its process and its connection are new each time."""
    command = ["curl", "-sf", "-w", "\n%{time_total}", f"{one.url}/metrics"]
    content, _, taken_s = subprocess.run(command, check=True, capture_output=True).stdout.rpartition(b"\n")
    found.size_bytes, found.lines = len(content), content.count(b"\n")
    time.sleep(0.1)
    return 1000 * float(taken_s)


def report(costs: Costs, scrapes: Scrapes, threads: int, sittings: int, rounds: int, seconds: int) -> str:
    return "\n".join([*_of_costs(costs, threads, sittings, rounds, seconds), *_of_scrapes(scrapes)])


def _of_costs(costs: Costs, threads: int, sittings: int, rounds: int, seconds: int) -> list[str]:
    rows = [(traffic, mode) for mode in (Mode.ON, Mode.FULL) for traffic in (ONE, SEVERAL)]
    return [
        "# Watching: what it costs",
        "",
        f"{datetime.now(UTC).date()}, {describe(threads)}. Written by `make bench-watching`: one server, in which what "
        f"watches is switched off and on in turn, {seconds} s each behind {SETTLING_S:g} s to settle in, {rounds} "
        f"rounds in each of {sittings} processes for each traffic; wrk, the receiver of traces and the scrapes on the "
        "same cores.",
        "",
        f"*On*: a JSON line a request, traces of {SAMPLES[Mode.ON]:.0%} of them sent to an OTLP receiver, every answer "
        f"in a prediction log (Parquet, in files of {PART_BYTES / 1e6:g} MB of JSON lines), drift windows and score "
        f"histograms, and a scrape each {SCRAPE_S:g} s. *Off*: none of these; their threads are there, and have "
        f"nothing to do. {CONNECTIONS} requests at once, no answer cache. In each {FULL_EVERY}rd round every request "
        "is traced.",
        "",
        "On over off is of texts a second, where what a phase leaves to be done behind it is charged as if it had been "
        "done in its time. The interval is of the median (bootstrap: processes, then rounds of each); where 0.97 lies "
        "within it, it leaves open what the median says.",
        "",
        "| traffic | off, texts/s | on, texts/s | on / off, median (95 % interval) | p99 off, on | at most 3 % |",
        "|---|---|---|---|---|---|",
        *(_cost(costs, traffic, mode) for traffic, mode in rows),
        "",
        "What the processors did for a request, means, with what was left behind the phases. Where the threads that "
        "run the encoder's layers wait for each other, that is work too.",
        "",
        "| traffic | off, µs a request | on, µs a request | of it left behind the load, off and on | rows and Parquet, "
        "in a process that takes idle time | beside the layers and rows, off and on | more, beside the layers |",
        "|---|---|---|---|---|---|---|",
        *(_processors(costs, traffic, mode) for traffic, mode in rows),
        "",
    ]


def _cost(costs: Costs, traffic: Traffic, mode: Mode) -> str:
    pairs = costs.phases(traffic, mode)
    ratio, low, high = costs.ratio(traffic, mode)
    failed = sum(phase.load.failed for pair in pairs for phase in pair)
    verdict = "met" if ratio >= 1 - MOST_COST and not failed else "**not met**"
    if low < 1 - MOST_COST <= high:
        verdict += ", by the median"
    texts_s = [statistics.median(phase.load.texts_s for phase in phases) for phases in zip(*pairs, strict=True)]
    p99_ms = [statistics.median(phase.load.p99_ms for phase in phases) for phases in zip(*pairs, strict=True)]
    return (
        f"| {traffic.name}: {mode} | {texts_s[0]:.1f} | {texts_s[1]:.1f} | **{ratio:.3f}** ({low:.3f} to {high:.3f}) | "
        f"{p99_ms[0]:.0f}, {p99_ms[1]:.0f} ms | {verdict}{f', {failed} failed' if failed else ''} |"
    )


def _processors(costs: Costs, traffic: Traffic, mode: Mode) -> str:
    off, on = zip(*costs.phases(traffic, mode), strict=True)

    def mean(of: Callable[[Phase], float]) -> tuple[float, float]:
        return statistics.mean(map(of, off)), statistics.mean(map(of, on))

    whole_us = mean(lambda phase: phase.whole_us + phase.left_us)
    left_us, beside_us = mean(lambda phase: phase.left_us), mean(lambda phase: phase.beside_us)
    aside_us = mean(lambda phase: phase.aside_us)[1]
    more_us = beside_us[1] - beside_us[0] + aside_us
    return (
        f"| {traffic.name}: {mode} | {whole_us[0]:.0f} | {whole_us[1]:.0f} | {left_us[0]:.0f}, {left_us[1]:.0f} | "
        f"{aside_us:.0f} | {beside_us[0]:.0f}, {beside_us[1]:.0f} | {more_us:.0f} µs, {more_us / whole_us[0]:.1%} |"
    )


def _of_scrapes(found: Scrapes) -> list[str]:
    idle, busy = (found.taken_ms[name] for name in ("idle", "under load"))
    middle_ms, most_ms = statistics.median(idle), max(idle)
    return [
        f"A server with {TASKS} live tasks of four labels, all of them asked: `/metrics` has {found.lines} "
        f"lines, {found.size_bytes / 1e6:.2f} MB.",
        "",
        "| | median | slowest of 30 | |",
        "|---|---|---|---|",
        f"| a scrape, nothing else to do | {middle_ms:.1f} ms | {most_ms:.1f} ms | below {MOST_SCRAPE_MS:.0f} ms: "
        f"{'met' if middle_ms < MOST_SCRAPE_MS else '**not met**'} |",
        f"| a scrape beside {FEW_CONNECTIONS} requests for all of them at once | {statistics.median(busy):.1f} ms | "
        f"{max(busy):.1f} ms | it waits for its turn |",
        "",
        f"p99 of those requests, {SCRAPED_S} s a round, by how often it is scraped meanwhile:",
        "",
        f"| scraped | p99 | over that of none (rounds) | moved by at most {MOST_MOVED - 1:.0%} |",
        "|---|---|---|---|",
        *(_moved(found, every_s) for every_s in (SELDOM_S, OFTEN_S)),
        "",
    ]


def _moved(found: Scrapes, every_s: float) -> str:
    scraped, alone = found.p99_ms[every_s], found.p99_ms[0.0]
    ratios = [s / a for s, a in zip(scraped, alone, strict=True)]
    middle = statistics.median(ratios)
    verdict = "more often than Prometheus asks"
    if every_s == SELDOM_S:
        verdict = "met" if middle <= MOST_MOVED else "**not met**"
    return (
        f"| each {every_s:g} s | {statistics.median(scraped):.0f} ms, none {statistics.median(alone):.0f} ms | "
        f"{middle:.3f} ({', '.join(f'{ratio:.2f}' for ratio in ratios)}) | {verdict} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sittings", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=int, default=5)
    options = parser.parse_args()
    if options.sittings < 1 or options.rounds < FULL_EVERY:
        parser.error(f"a sitting of {FULL_EVERY} rounds at least: every request is traced in each {FULL_EVERY}rd")
    require_wrk()
    scrapes = Scrapes()
    with tempfile.TemporaryDirectory() as name, receiving() as receiver:
        folder = Path(name)
        backbone = Backbone.load("embedded", "cpu", "float32")
        many = Traffic("all of them", tuple(write_readouts(folder / "many", backbone.spec, TASKS)), "16")
        texts = {length: make_texts(str(backbone.path), length, folder) for length in ("16", "64")}
        del backbone
        extent = options.threads, options.sittings, options.rounds, options.seconds
        costs = measure_costs(texts, folder, receiver, *extent)
        with started(_with_many(many, folder, options.threads), options.threads, folder) as one:
            measure_scrape(one, texts["16"], many, SCRAPE_ROUNDS, SCRAPED_S, scrapes)
    REPORT.write_text(report(costs, scrapes, *extent))
    print(f"written: {REPORT}")


def _with_many(traffic: Traffic, folder: Path, threads: int) -> Server:
    options = ["--prefixes", str(folder / "many"), "--home", str(folder / "home-many"), "--dtype", "float32"]
    options += ["--threads", str(threads), "--answer-cache-bytes", "0", "--no-log-requests"]
    return Server(
        "many",
        str(Path(sys.prefix)),
        lambda port: ["python", "-m", "app.cli", "serve", "--port", str(port), *options],
        {traffic.name: Work((traffic.call,), 1.0)},
        "",
    )


if __name__ == "__main__":
    main()
