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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.bench.load import Call, Load, run_wrk
from tests.bench.load_texts import TextSet
from tests.bench.serving_servers import ROOT, Running, Server, Work, running
from tests.bench.watched_server import Mode

CONNECTIONS = 64
SETTLING_S = 1.5  # of each phase: what is put aside is done up to a second later, and nothing waits at its beginning
SCRAPE_S = 5.0  # between scrapes; docker/prometheus asks each 15 s
PART_BYTES = 1_000_000  # of the prediction log, of 64 by default: files are finished within each phase
FULL_EVERY = 3  # rounds
_DONE_S = 1.2  # until all that was put aside is done
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
    """Some seconds of load in one mode. Times are of processors, µs a request."""

    load: Load
    whole_us: float
    beside_us: float  # of it, beside the threads that the layers run on
    aside_us: float  # the process that makes rows of the prediction log


Round = dict[Mode, Phase]


@dataclass
class Costs:
    rounds: dict[str, list[Round]] = field(default_factory=dict)  # by traffic

    def phases(self, traffic: Traffic, mode: Mode) -> list[Phase]:
        return [one[mode] for one in self.rounds[traffic.name] if mode in one]

    def ratios(self, traffic: Traffic, mode: Mode) -> list[float]:
        """Of each round with this mode: texts a second over those of watching nothing."""
        found = [one for one in self.rounds[traffic.name] if mode in one]
        return [one[mode].load.texts_s / one[Mode.OFF].load.texts_s for one in found]


def middle(values: Sequence[float]) -> tuple[float, float, float]:
    """The median, and where it lies in 95 of 100 drawings of as many of them (bootstrap)."""
    drawn = random.Random(0)
    medians = sorted(statistics.median(drawn.choices(values, k=len(values))) for _ in range(2000))
    return statistics.median(values), medians[50], medians[1949]


def measure_costs(
    texts: dict[str, TextSet], folder: Path, receiver: str, threads: int, sittings: int, rounds: int, seconds: int
) -> Costs:
    """`rounds` of each traffic in each of `sittings`, a process each. Raises SystemExit where none starts."""
    costs, start = Costs(), 0
    for sitting in range(sittings):
        switch = folder / f"switch-{sitting}"
        with started(_server(folder / f"home-{sitting}", switch, folder, receiver, threads), threads, folder) as one:
            for traffic in (ONE, SEVERAL):  # one after the other, so that rows of one are made in its own time
                for number in range(rounds + 1):  # the first is for warming up
                    modes = [Mode.OFF, Mode.ON] + [Mode.FULL] * (number % FULL_EVERY == 0)
                    found: Round = {}
                    for mode in modes[:: -1 if number % 2 else 1]:
                        _switch(one, switch, mode)
                        found[mode] = _measure(one, traffic, mode, texts[traffic.length], threads, seconds, start)
                        start += found[mode].load.answers
                    if number:
                        costs.rounds.setdefault(traffic.name, []).append(found)
                        print(_told(traffic, found), flush=True)
    return costs


def _server(home: Path, switch: Path, folder: Path, receiver: str, threads: int) -> Server:
    """With every option that adds something to watch."""
    options = ["--prefixes", str(_SHIPPED), "--home", str(home), "--dtype", "float32", "--threads", str(threads)]
    options += ["--answer-cache-bytes", "0", "--log-format", "json", "--otlp-endpoint", receiver]
    options += ["--prediction-log", str(folder / "predictions"), "--prediction-log-format", "parquet"]
    options += ["--prediction-log-part-bytes", str(PART_BYTES)]
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
    with running([server], threads, folder, failures) as started:
        if failures:
            raise SystemExit(f"not started: {failures}")
        started[server.name].resume()
        yield started[server.name]


def _switch(one: Running, file: Path, mode: Mode) -> None:
    """Returns when it is done, and nothing of the mode before is left to do. Raises RuntimeError where it ended."""
    file.write_text(mode)
    one.process.send_signal(signal.SIGUSR1)
    while file.read_text():
        if one.process.poll() is not None:
            raise RuntimeError(f"the server ended: {one.log.read_text(errors='replace')[-1000:]}")
        time.sleep(0.01)
    before_us = -1.0
    while (now_us := conversions_us(one.process.pid)) != before_us:
        before_us = now_us
        time.sleep(0.2)


def _measure(
    one: Running, traffic: Traffic, mode: Mode, text: TextSet, threads: int, seconds: int, start: int
) -> Phase:
    """Raises RuntimeError where the server did not do what the mode says."""
    before_us, aside_us = cpu_us(one.process.pid), conversions_us(one.process.pid)
    log_bytes = one.log.stat().st_size
    with scraping(one, SCRAPE_S, SETTLING_S) if mode is not Mode.OFF else nullcontext():
        whole_s = seconds + round(SETTLING_S + 0.5)
        load = run_wrk(one.url, [traffic.call], text.file, CONNECTIONS, whole_s, start, SETTLING_S)
    time.sleep(_DONE_S)
    used_us = sorted(us - before_us.get(thread, 0.0) for thread, us in cpu_us(one.process.pid).items())
    log_bytes = one.log.stat().st_size - log_bytes
    if (log_bytes < 100 * load.answers) != (mode is Mode.OFF):
        raise RuntimeError(f"{log_bytes} bytes of log for {load.answers} answers: it is not {mode}")
    beside_us = sum(used_us[:-threads]) / load.answers
    aside_us = (conversions_us(one.process.pid) - aside_us) / load.answers
    return Phase(load, sum(used_us) / load.answers, beside_us, aside_us)


def _told(traffic: Traffic, found: Round) -> str:
    return f"{traffic.name}: " + ", ".join(f"{mode} {phase.load.texts_s:.1f}" for mode, phase in found.items())


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
