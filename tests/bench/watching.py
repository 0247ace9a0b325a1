"""What watching costs: throughput with all of it on over all of it off, and what a scrape of many tasks takes.

    make bench-watching

Two servers, alike but for what watches, take turns under the same closed loop (wrk); then one with 200 live tasks is
scraped while it answers, and while it does not. Writes WATCHING.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from app.engine.backbone import Backbone
from tests.bench.load import Call, Load, require_wrk, run_wrk
from tests.bench.load_texts import TextSet, make_texts
from tests.bench.machine import describe
from tests.bench.serving_artifacts import write_readouts
from tests.bench.serving_servers import ROOT, Running, Server, Work, running

REPORT = Path(__file__).with_name("WATCHING.md")
SHIPPED = ROOT / "prefixes"
TASKS = 200
CONNECTIONS = 64
FEW_CONNECTIONS = 8
MOST_COST = 0.03  # share of throughput that watching may take
MOST_SCRAPE_MS = 50.0
MOST_MOVED = 1.05  # p99 beside scrapes, over that of none: rounds move by as much
OFF, ON, FULL, MANY = "off", "on", "on, every request traced", "many"
ORDERS = ((OFF, ON, FULL), (FULL, ON, OFF), (ON, OFF, FULL), (FULL, OFF, ON))  # so that none is always behind another
SAMPLE = 0.1  # share of requests that is traced
SCRAPE_S = 5.0  # between scrapes of what is compared, the first after 1 s; docker/prometheus asks each 15 s
FIRST_SCRAPE_S = 1.0
PART_BYTES = 4_000_000  # of the prediction log, a sixteenth of the default: files are finished within a sitting
OFTEN_S, SELDOM_S = 2.5, 15.0  # between scrapes of many tasks: the latter as docker/prometheus asks
SCRAPE_ROUNDS, SCRAPED_S = 6, 30


@dataclass(frozen=True)
class Traffic:
    """One kind of requests: which tasks, and how long the texts are."""

    name: str
    tasks: tuple[str, ...]
    length: str

    @property
    def call(self) -> Call:
        return Call("/v1/predict", '{"inputs":', f',"tasks":{json.dumps(self.tasks)}}}')


ONE = Traffic("one task, 16 tokens", ("spam",), "16")
SEVERAL = Traffic("five tasks of 261 labels, 64 tokens", ("banking", "emotion", "intent", "sentiment", "spam"), "64")


@dataclass
class Found:
    loads: dict[tuple[str, str], list[Load]] = field(default_factory=dict)  # by traffic and server
    cpu_us: dict[tuple[str, str], list[tuple[float, float]]] = field(default_factory=dict)  # a request: see cpu_us()
    aside_us: dict[tuple[str, str], list[float]] = field(default_factory=dict)  # of what makes rows; the same way
    scrapes_ms: dict[str, list[float]] = field(default_factory=dict)  # by whether the server had other work
    p99_ms: dict[float, list[float]] = field(default_factory=dict)  # by how often it was scraped meanwhile; 0: never
    scrape_bytes: int = 0
    scrape_lines: int = 0


def server(
    name: str, prefixes: Path, folder: Path, threads: int, options: Sequence[str], works: list[Traffic]
) -> Server:
    own = ["--prefixes", str(prefixes), "--home", str(folder / f"home-{len(name)}"), "--dtype", "float32"]
    own += ["--threads", str(threads), "--answer-cache-bytes", "0", *options]
    return Server(
        name,
        str(Path(sys.prefix)),
        lambda port: ["python", "-m", "app.cli", "serve", "--port", str(port), *own],
        {work.name: Work((work.call,), 1.0) for work in works},
        "",
    )


def watching(folder: Path, receiver: str, sample: float) -> list[str]:
    """Every option that adds something to watch."""
    log = ["--prediction-log", str(folder / f"predictions-{sample}"), "--prediction-log-format", "parquet"]
    log += ["--prediction-log-part-bytes", str(PART_BYTES)]
    return ["--log-format", "json", "--otlp-endpoint", receiver, "--trace-sample", str(sample), *log]


class _Swallow(BaseHTTPRequestHandler):
    """An OTLP receiver that takes everything and keeps nothing."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@contextmanager
def receiver() -> Iterator[str]:
    http = ThreadingHTTPServer(("127.0.0.1", 0), _Swallow)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()


@contextmanager
def scraping(one: Running, every_s: float, first_s: float) -> Iterator[None]:
    """By curl, a process for each scrape, as Prometheus would: nothing of it runs in the server."""
    closing = threading.Event()

    def run() -> None:
        wait_s = first_s
        while not closing.wait(wait_s):
            subprocess.run(["curl", "-s", "-o", "/dev/null", f"{one.url}/metrics"], check=False)
            wait_s = every_s

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        closing.set()
        thread.join()


def measure_cost(
    servers: dict[str, Running],
    texts: dict[str, TextSet],
    threads: int,
    rounds: int,
    seconds: int,
    start: int,
    found: Found,
) -> int:
    """Returns where the next texts begin. The `threads` that take most time are those that the layers run on."""
    for traffic in (ONE, SEVERAL):  # one after the other, so that rows of one are not made in the time of the other
        for number in range(rounds + 1):  # the first is for warming up
            for name in ORDERS[number % len(ORDERS)]:
                one = servers[name]
                one.resume()
                before_us, aside_us = cpu_us(one.process.pid), conversions_us(one.process.pid)
                if name != OFF:
                    with scraping(one, SCRAPE_S, FIRST_SCRAPE_S):
                        load = run_wrk(one.url, [traffic.call], texts[traffic.length].file, CONNECTIONS, seconds, start)
                else:
                    load = run_wrk(one.url, [traffic.call], texts[traffic.length].file, CONNECTIONS, seconds, start)
                used_us = sorted(us - before_us.get(thread, 0.0) for thread, us in cpu_us(one.process.pid).items())
                aside_us = conversions_us(one.process.pid) - aside_us
                one.pause()
                start += load.answers
                if number:
                    found.loads.setdefault((traffic.name, name), []).append(load)
                    share = sum(used_us[:-threads]) / load.answers, sum(used_us) / load.answers
                    found.cpu_us.setdefault((traffic.name, name), []).append(share)
                    found.aside_us.setdefault((traffic.name, name), []).append(aside_us / load.answers)
                    print(f"{traffic.name}, {name}: {load.texts_s:.1f} texts/s, p99 {load.p99_ms:.0f} ms", flush=True)
    return start


def cpu_us(pid: int) -> dict[str, float]:
    """What each thread of a process has had of the processors."""
    found = {}
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):  # it has ended
            found[thread.name] = int((thread / "schedstat").read_text().split()[0]) / 1000
    return found


def conversions_us(pid: int) -> float:
    """What the processes that make a server's rows had of the processors."""
    used_us = sum(map(float, _stat(pid)[13:15]))  # of those that have ended
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):  # a thread or a child has ended
            for child in (task / "children").read_text().split():
                if b"_conversion" in Path(f"/proc/{child}/cmdline").read_bytes():
                    used_us += sum(map(float, _stat(int(child))[11:13]))
    return used_us / os.sysconf("SC_CLK_TCK") * 1e6


def _stat(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def measure_scrape(one: Running, text: TextSet, traffic: Traffic, rounds: int, seconds: int, found: Found) -> None:
    one.resume()
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
    found.scrapes_ms["idle"] = [_scrape(one, found) for _ in range(30)]
    load_process.start()
    time.sleep(1.0)
    found.scrapes_ms["under load"] = [_scrape(one, found) for _ in range(30)]
    load_process.join()
    one.pause()


def _scrape(one: Running, found: Found) -> float:
    """By curl's own clock: its process and its connection are new each time."""
    command = ["curl", "-sf", "-w", "\n%{time_total}", f"{one.url}/metrics"]
    content, _, taken_s = subprocess.run(command, check=True, capture_output=True).stdout.rpartition(b"\n")
    found.scrape_bytes, found.scrape_lines = len(content), content.count(b"\n")
    time.sleep(0.1)
    return 1000 * float(taken_s)


def ratios(found: Found, traffic: Traffic, name: str) -> list[float]:
    pairs = zip(found.loads[traffic.name, name], found.loads[traffic.name, OFF], strict=True)
    return [on.texts_s / off.texts_s for on, off in pairs]


def report(found: Found, threads: int, sittings: int, rounds: int, seconds: int) -> str:
    lines = [
        "# Watching: what it costs",
        "",
        f"{datetime.now(UTC).date()}, {describe(threads)}. Written by `make bench-watching`; {sittings} sittings with "
        f"new processes, since one may be some percent slower than its twin, of {rounds} rounds of {seconds} s in "
        "which the servers take turns; wrk, the receiver of traces and the scrapes on the same cores.",
        "",
        f"*On*: a JSON line a request, traces of {SAMPLE:.0%} of them sent to an OTLP receiver, every answer in a "
        f"prediction log (Parquet, in files of {PART_BYTES / 1e6:g} MB of JSON lines), drift windows and score "
        f"histograms, and a scrape {FIRST_SCRAPE_S:g} s into each round. *Off*: none "
        f"of these. {CONNECTIONS} requests at once, no answer cache.",
        "",
        "| traffic | off, texts/s | on, texts/s | on / off (middle half of rounds) | p99 off, on | at most 3 % |",
        "|---|---|---|---|---|---|",
    ]
    for name in (ON, FULL):
        lines += [_cost(found, traffic, name) for traffic in (ONE, SEVERAL)]
    lines += [
        "",
        "Throughput moves with the host and with where a process happens to lie in memory; what the processors did for "
        "a request beside the layers of the encoder moves less:",
        "",
        "| traffic | off, µs a request | on, µs a request | rows and Parquet, in a process that takes idle time | "
        "more, share of all that a request takes |",
        "|---|---|---|---|---|",
        *(_cpu(found, traffic, name) for name in (ON, FULL) for traffic in (ONE, SEVERAL)),
    ]
    idle, busy = (found.scrapes_ms[name] for name in ("idle", "under load"))
    middle_ms, most_ms = statistics.median(idle), max(idle)
    lines += [
        "",
        f"A server with {TASKS} live tasks of four labels, all of them asked: `/metrics` has {found.scrape_lines} "
        f"lines, {found.scrape_bytes / 1e6:.2f} MB.",
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
    return "\n".join(lines)


def _cost(found: Found, traffic: Traffic, name: str) -> str:
    off, on = (found.loads[traffic.name, one] for one in (OFF, name))
    each = ratios(found, traffic, name)
    low, middle, high = statistics.quantiles(each, n=4)
    failed = sum(load.failed for load in (*off, *on))
    verdict = "met" if middle >= 1 - MOST_COST and not failed else "**not met**"
    return (
        f"| {traffic.name}: {name} | {_median(off, 'texts_s'):.1f} | {_median(on, 'texts_s'):.1f} | **{middle:.3f}** "
        f"({low:.3f} to {high:.3f}) | {_median(off, 'p99_ms'):.0f}, "
        f"{_median(on, 'p99_ms'):.0f} ms | {verdict}{f', {failed} failed' if failed else ''} |"
    )


def _moved(found: Found, every_s: float) -> str:
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


def _cpu(found: Found, traffic: Traffic, name: str) -> str:
    off_us, on_us = (statistics.median(beside for beside, _ in found.cpu_us[traffic.name, one]) for one in (OFF, name))
    whole_us = statistics.median(whole for _, whole in found.cpu_us[traffic.name, OFF])
    aside_us = statistics.mean(found.aside_us[traffic.name, name])
    more = f"{(on_us - off_us + aside_us) / whole_us:.1%} of {whole_us:.0f} µs"
    return f"| {traffic.name}: {name} | {off_us:.0f} | {on_us:.0f} | {aside_us:.0f} | {more} |"


def _median(loads: Sequence[Load], name: str) -> float:
    return statistics.median(getattr(load, name) for load in loads)


def _check(failures: dict[str, str]) -> None:
    if failures:
        raise SystemExit(f"not started: {failures}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sittings", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=int, default=4)
    options = parser.parse_args()
    if options.sittings * options.rounds < 2:
        parser.error("two rounds at least, so that there is a middle half of them")
    require_wrk()
    found, failures = Found(), dict[str, str]()
    with tempfile.TemporaryDirectory() as name, receiver() as url:
        folder = Path(name)
        backbone = Backbone.load("embedded", "cpu", "float32")
        many = Traffic("all of them", tuple(write_readouts(folder / "many", backbone.spec, TASKS)), "16")
        texts = {length: make_texts(str(backbone.path), length, folder) for length in ("16", "64")}
        del backbone
        servers = [
            server(OFF, SHIPPED, folder, options.threads, ["--no-log-requests", "--drift-window", "0"], [ONE, SEVERAL]),
            server(ON, SHIPPED, folder, options.threads, watching(folder, url, SAMPLE), [ONE, SEVERAL]),
            server(FULL, SHIPPED, folder, options.threads, watching(folder, url, 1.0), [ONE, SEVERAL]),
        ]
        start = 0
        for _ in range(options.sittings):
            with running(servers, options.threads, folder, failures) as started:
                _check(failures)
                start = measure_cost(started, texts, options.threads, options.rounds, options.seconds, start, found)
        alone = server(MANY, folder / "many", folder, options.threads, ["--no-log-requests"], [many])
        with running([alone], options.threads, folder, failures) as started:
            _check(failures)
            measure_scrape(started[MANY], texts["16"], many, SCRAPE_ROUNDS, SCRAPED_S, found)
    REPORT.write_text(report(found, options.threads, options.sittings, options.rounds, options.seconds))
    print(f"written: {REPORT}")


if __name__ == "__main__":
    main()
