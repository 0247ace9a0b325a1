"""Throughput and processor time of one server with all that watches on and off, switched to and fro under load.

Knows the server's options for it and the processors' clocks; nothing of how a report looks.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, pairwise
from pathlib import Path

import httpx2

from tests.bench.load import Call, Load, run_wrk
from tests.bench.load_texts import TextSet
from tests.bench.serving_servers import ROOT, Running, Server, Work, running
from tests.bench.watched_server import Mode

CONNECTIONS = 64
SETTLING_S = 1.5  # of each phase: what is put aside is done up to a second later, and nothing waits at its beginning
SCRAPE_S = 5.0  # between scrapes, the first behind the settling; docker/prometheus asks each 15 s
PART_BYTES = 1_000_000  # of the prediction log, of 64 by default: files are finished within each phase
PART_S = 2  # of the last of a phase
FULL_EVERY = 3  # rounds
_LEFT_S = 4.5  # behind a phase that is watched, until its last texts are counted and its last file is due
_QUIET_S, _IDLE_S, _LONGEST_S = 0.5, 3.0, 60.0
_SHIPPED = ROOT / "prefixes"


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


@dataclass(frozen=True)
class Phase:
    """Some seconds of load in one mode, and what was left to do behind it. Times are of processors, µs a request."""

    load: Load
    whole_us: float  # while there was load: the server, with the process that makes rows of the prediction log
    left_us: float  # behind it, more than with nothing to do, beside the threads that the layers run on
    beside_us: float  # of both, beside these threads
    aside_us: float  # of both, the process that makes rows
    sent_bytes: float  # to the receiver of traces, a request

    @property
    def texts_s(self) -> float:
        """As if what was left had been done in the time of others."""
        return self.load.texts_s * self.whole_us / (self.whole_us + self.left_us)


Round = dict[Mode, Phase]


@dataclass
class Costs:
    rounds: dict[str, list[list[Round]]] = field(default_factory=dict)  # by traffic, of each sitting

    def phases(self, traffic: Traffic, mode: Mode) -> list[tuple[Phase, Phase]]:
        """Of each round with this mode: watching nothing, and so."""
        rounds = [one for sitting in self.rounds[traffic.name] for one in sitting]
        return [(one[Mode.OFF], one[mode]) for one in rounds if mode in one]

    def ratio(self, traffic: Traffic, mode: Mode) -> tuple[float, float, float]:
        """Texts a second over those of watching nothing: the median of all rounds, and its 95 % interval.

        By bootstrap, sittings drawn first: rounds of one process are more alike than those of several.
        """
        sittings = [
            [one[mode].texts_s / one[Mode.OFF].texts_s for one in sitting if mode in one]
            for sitting in self.rounds[traffic.name]
        ]
        drawn = random.Random(0)
        medians = []
        for _ in range(2000):
            chosen = [drawn.choices(one, k=len(one)) for one in drawn.choices(sittings, k=len(sittings))]
            medians.append(statistics.median(chain.from_iterable(chosen)))
        medians.sort()
        return statistics.median(chain.from_iterable(sittings)), medians[50], medians[1949]


def measure_costs(
    texts: dict[str, TextSet], folder: Path, receiver: Receiver, threads: int, sittings: int, rounds: int, seconds: int
) -> Costs:
    """`rounds` of each traffic in each of `sittings`, a process each.

    Raises SystemExit where none starts, and RuntimeError where one does not watch what its mode says.
    """
    costs, start = Costs(), 0
    for sitting in range(sittings):
        switch = folder / f"switch-{sitting}"
        server = _server(folder / f"home-{sitting}", switch, folder, receiver.url, threads)
        with started(server, threads, folder) as one:
            _switch(one, switch, Mode.OFF)
            idle_us_s = _idle_us_s(one.process.pid)
            for traffic in (ONE, SEVERAL):  # one after the other, so that rows of one are made in its own time
                costs.rounds.setdefault(traffic.name, []).append([])
                for number in range(rounds + 1):  # the first is for warming up
                    modes = [Mode.OFF, Mode.ON] + [Mode.FULL] * (number % FULL_EVERY == 0)
                    found: Round = {}
                    for mode in modes[:: -1 if number % 2 else 1]:
                        _switch(one, switch, mode)
                        text = texts[traffic.length]
                        phase = _measure(one, receiver, traffic, mode, text, threads, seconds, start, idle_us_s)
                        found[mode] = phase
                        start += phase.load.answers
                    if number:
                        costs.rounds[traffic.name][-1].append(found)
                        print(_told(traffic, found), flush=True)
            _check_all_was_watched(one)
    return costs


def _server(home: Path, switch: Path, folder: Path, receiver: str, threads: int) -> Server:
    """With every option that adds something to watch."""
    options = ["--prefixes", str(_SHIPPED), "--home", str(home), "--dtype", "float32", "--threads", str(threads)]
    options += ["--answer-cache-bytes", "0", "--log-format", "json", "--otlp-endpoint", receiver]
    options += ["--prediction-log", str(folder / "predictions"), "--prediction-log-format", "parquet"]
    options += ["--prediction-log-part-bytes", str(PART_BYTES), "--prediction-log-part-s", str(PART_S)]
    return Server(
        "watched",
        str(Path(sys.prefix)),
        lambda port: [
            *("python", "-m", "tests.bench.watched_server", str(switch), "serve", "--port", str(port)),
            *options,
        ],
        {traffic.name: Work((traffic.call,), 1.0) for traffic in (ONE, SEVERAL)},
        "",
    )


@contextmanager
def started(server: Server, threads: int, folder: Path) -> Iterator[Running]:
    failures: dict[str, str] = {}
    with running([server], threads, folder, failures) as begun:
        if failures:
            raise SystemExit(f"not started: {failures}")
        begun[server.name].resume()
        yield begun[server.name]


def _switch(one: Running, file: Path, mode: Mode) -> None:
    """Returns when it is done. Raises RuntimeError where nobody does it."""
    until_s = time.monotonic() + _LONGEST_S
    file.write_text(mode)
    one.process.send_signal(signal.SIGUSR1)
    while file.read_text():
        if one.process.poll() is not None or time.monotonic() > until_s:
            raise RuntimeError(f"it does not switch: {one.log.read_text(errors='replace')[-1000:]}")
        time.sleep(0.01)


def _measure(
    one: Running,
    receiver: Receiver,
    traffic: Traffic,
    mode: Mode,
    text: TextSet,
    threads: int,
    seconds: int,
    start: int,
    idle_us_s: float,
) -> Phase:
    pid, log_bytes, sent_bytes = one.process.pid, one.log.stat().st_size, receiver.received_bytes
    moments = [_Used.of(pid)]
    with scraping(one, SCRAPE_S, SETTLING_S) if mode is not Mode.OFF else nullcontext():
        whole_s = round(seconds + SETTLING_S + 0.5)
        load = run_wrk(one.url, [traffic.call], text.file, CONNECTIONS, whole_s, start, SETTLING_S)
    moments.append(_Used.of(pid))
    _wait_until_done(pid, _LEFT_S if mode is not Mode.OFF else _QUIET_S)
    moments.append(_Used.of(pid))
    used, left = (after.since(before) for before, after in pairwise(moments))
    layers = sorted(used.threads_us, key=lambda thread: used.threads_us[thread])[-threads:]
    beside_us = sum(us for thread, us in used.threads_us.items() if thread not in layers)
    left_us = sum(us for thread, us in left.threads_us.items() if thread not in layers) - idle_us_s * left.at_s
    phase = Phase(
        load,
        (sum(used.threads_us.values()) + used.aside_us) / load.answers,
        (left_us + left.aside_us) / load.answers,
        (beside_us + left_us) / load.answers,
        (used.aside_us + left.aside_us) / load.answers,
        (receiver.received_bytes - sent_bytes) / load.answers,
    )
    _check(phase, mode, (one.log.stat().st_size - log_bytes) / load.answers)
    return phase


@dataclass(frozen=True)
class _Used:
    """What a server has had of the processors at a moment, or between two."""

    at_s: float
    threads_us: dict[str, float]
    aside_us: float

    @staticmethod
    def of(pid: int) -> _Used:
        return _Used(time.monotonic(), cpu_us(pid), conversions_us(pid))

    def since(self, before: _Used) -> _Used:
        threads_us = {thread: us - before.threads_us.get(thread, 0.0) for thread, us in self.threads_us.items()}
        return _Used(self.at_s - before.at_s, threads_us, self.aside_us - before.aside_us)


def _idle_us_s(pid: int) -> float:
    """What its processor time is with nothing to do, µs a second."""
    time.sleep(_LEFT_S)
    before_us = sum(cpu_us(pid).values())
    time.sleep(_IDLE_S)
    return (sum(cpu_us(pid).values()) - before_us) / _IDLE_S


def _wait_until_done(pid: int, least_s: float) -> None:
    """Until nothing is left to do of what was put aside."""
    time.sleep(least_s)
    before_us = -1.0
    until_s = time.monotonic() + _LONGEST_S
    while (now_us := conversions_us(pid)) != before_us and time.monotonic() < until_s:
        before_us = now_us
        time.sleep(_QUIET_S)


def _check(phase: Phase, mode: Mode, log_bytes: float) -> None:
    """Whether the server did what the mode says. `log_bytes`: of an answer."""
    least, most = {Mode.OFF: (0, 1), Mode.ON: (20, 400), Mode.FULL: (400, 10_000)}[mode]  # bytes of spans
    if (log_bytes < 100) != (mode is Mode.OFF) or not least <= phase.sent_bytes < most:
        told = f"{log_bytes:.0f} bytes of log and {phase.sent_bytes:.0f} of spans"
        raise RuntimeError(f"{told} a request: these are not those of {mode}")


def _check_all_was_watched(one: Running) -> None:
    lines = httpx2.get(f"{one.url}/metrics").text.splitlines()
    dropped = [line for line in lines if "_dropped_total" in line and not line.startswith("#") and line[-4:] != " 0.0"]
    if dropped or not conversions_us(one.process.pid):
        raise RuntimeError(f"not all was watched: {dropped or 'no rows of the prediction log were made'}")


def _told(traffic: Traffic, found: Round) -> str:
    return f"{traffic.name}: " + ", ".join(
        f"{mode} {phase.load.texts_s:.1f} ({phase.left_us:.0f} µs left)" for mode, phase in found.items()
    )


@dataclass
class Receiver:
    """Of traces, over OTLP: takes everything and keeps nothing."""

    url: str = ""
    received_bytes: int = 0


@contextmanager
def receiving() -> Iterator[Receiver]:
    receiver = Receiver()

    class Swallow(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            receiver.received_bytes += len(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    http = ThreadingHTTPServer(("127.0.0.1", 0), Swallow)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    receiver.url = f"http://127.0.0.1:{http.server_port}"
    yield receiver
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
