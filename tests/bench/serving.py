"""Servers under load: Manifold over the bare encoder, and beside its peers on the same backbone and texts, in one run.

    make bench-serving            25 minutes on two cores; writes tests/bench/SERVING.md
    make bench-serving ARGS=--quick

Run it on a machine that does nothing else. `make bench-peers` installs the peers; those that are missing are named.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from app.engine.backbone import Backbone
from tests.bench.load import require_wrk, run_wrk
from tests.bench.load_open import Answer, run_alone, run_open, stages
from tests.bench.load_texts import LENGTHS, MIXED, TextSet, make_texts
from tests.bench.machine import describe
from tests.bench.serving_artifacts import (
    HEADS,
    JOBS,
    PREFIX,
    PREFIXES,
    READOUT,
    READOUTS,
    Job,
    export_onnx,
    write_classifiers,
    write_prefixes,
)
from tests.bench.serving_bare import Bare, start_bare
from tests.bench.serving_report import plot, report
from tests.bench.serving_results import Alone, Results, Row, Stream, median
from tests.bench.serving_servers import (
    MANIFOLD,
    ROOT,
    Running,
    Server,
    environment_variables,
    manifold,
    one_task_peers,
    running,
    several_task_peers,
)

FOLDER = Path(__file__).parent
KEPT = ROOT / "build/serving.json"
SHARE = 0.7  # of saturation
FLOOD = 3.0
_LONGEST_S = 12
console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Extent:
    """How much is measured."""

    rounds: int = 3
    least_s: int = 2  # of a run of wrk, which takes whole seconds
    cycles: int = 3  # a run answers each caller so many times at least
    bare_s: float = 1.0
    requests_alone: int = 100
    stream_s: float = 8.0
    lengths: tuple[str, ...] = LENGTHS
    concurrencies: tuple[int, ...] = (1, 8, 64)
    peer_cells: tuple[tuple[str, int], ...] = (("64", 1), ("64", 8), ("64", 64), ("16", 64), (MIXED, 64))
    several: int = 16  # texts at work at once where peers run eight models: more would not end in seconds
    has_half: bool = True


QUICK = Extent(1, 1, 2, 0.7, 40, 4.0, ("64",), (1, 64), (("64", 1), ("64", 64)), 8, False)


@dataclass
class Bench:
    """One run: what everything is measured with, and what came of it."""

    extent: Extent
    threads: int
    folder: Path
    model: str
    texts: dict[str, TextSet]
    classifiers: Sequence[Path]
    bare: Bare
    results: Results = field(default_factory=Results)
    began_s: float = field(default_factory=time.monotonic)
    at: int = 0  # the next text: no run repeats another's before all have been sent
    expected: dict[str, float] = field(default_factory=dict)  # the bare encoder's texts a second, of each length
    rates: dict[tuple[str, str, str, int], float] = field(default_factory=dict)  # texts a second that were measured

    def load(self, section: str, one: Running, job: str, texts: str, concurrency: int, number: int) -> Row:
        """One run of wrk, without the bare encoder's figures."""
        work = one.server.jobs[job]
        key = (one.server.name, job, texts, concurrency)
        expected_s = self.rates.get(key, 0.7 * self.expected[texts] / work.passes)
        self.at += 997
        one.resume()
        for call in work.calls:  # what a run before has left in the queue is done before this one begins
            run_alone(one.url, call.path, [call.body('"warm up"')])
        connections = concurrency * len(work.calls)
        for _ in range(2):  # again where it was much slower than expected
            seconds = math.ceil((self.extent.cycles + 1) * concurrency / expected_s)
            seconds = min(_LONGEST_S, max(self.extent.least_s, seconds))
            load = run_wrk(one.url, work.calls, self.texts[texts].file, connections, seconds, self.at)
            if load.answers >= 3 * connections or seconds == _LONGEST_S:
                break
            expected_s = max(1, load.answers) / len(work.calls) / seconds
        self.rates[key] = load.texts_s or expected_s
        one.pause()
        row = Row(section, one.server.name, job, texts, concurrency, number, *astuple(load))
        console.print(
            f"{time.monotonic() - self.began_s:4.0f} s {section:8} {one.server.name:46} {job:40} {texts:>5} tokens × "
            f"{concurrency:2}: {row.texts_s:7.1f} texts/s, p50 {row.p50_ms:7.1f} ms, p99 {row.p99_ms:7.1f} ms"
            + (f", {row.failed} failed" if row.failed else "")
        )
        return row

    def beside_bare(self, texts: str, rows: Iterator[Row], bare: Bare | None = None, with_one: bool = False) -> None:
        """Keeps `rows`, which are measured as they are drawn, with the bare encoder before and after them."""
        bare = bare or self.bare
        before = bare.texts_s(texts, self.extent.bare_s)
        one_ms = bare.one_ms(texts, self.extent.bare_s / 2) if with_one else 0.0
        measured = list(rows)
        after = bare.texts_s(texts, self.extent.bare_s)
        console.print(f"{'':15} bare encoder, {texts} tokens: {before:.1f} and {after:.1f} texts/s")
        mean = (before + after) / 2
        self.results.rows += [replace(row, bare_texts_s=mean, bare_one_ms=one_ms) for row in measured]


# -- sections ----------------------------------------------------------------------------------------------------------


def measure_manifold(bench: Bench, one: Running) -> None:
    """Every job at every length and concurrency; eight rows a text of 256 tokens are too slow for 64 at once."""

    def is_measured(job: Job, texts: str, concurrency: int) -> bool:
        if job is PREFIX:
            return texts == "64"
        return job is not PREFIXES or concurrency < 64 or texts in ("16", "64")

    extent = bench.extent
    for number in range(extent.rounds):
        for texts in extent.lengths:
            for job in JOBS:
                at_once = [c for c in reversed(extent.concurrencies) if is_measured(job, texts, c)]
                runs = (bench.load("manifold", one, job.name, texts, c, number) for c in at_once)
                if at_once:
                    bench.beside_bare(texts, runs)


def measure_alone(bench: Bench, one: Running) -> None:
    count = bench.extent.requests_alone
    for number in range(bench.extent.rounds):
        for texts in (t for t in bench.extent.lengths if t != MIXED):
            for job in (READOUT, READOUTS):
                call = one.server.jobs[job.name].calls[0]
                bodies = _bodies(bench, call.before, call.after, texts, count + 5)
                one.resume()
                answers = run_alone(one.url, call.path, bodies)[5:]
                one.pause()
                kept = Alone(job.name, texts, number, *stages(answers)[:3])
                bench.results.alone.append(kept)
                console.print(
                    f"alone    {job.name:40} {texts:>5} tokens: {kept.latency_ms:.2f} ms, "
                    f"beside the engine {kept.beside_ms:.2f} ms"
                )


def measure_streams(bench: Bench, one: Running) -> None:
    """70 % of saturation and three times saturation, with all permits and with as many as the promised p99 allows."""
    rows = bench.results.cell("manifold", MANIFOLD, READOUT.name, "64", 64)
    saturation_s = median(rows, lambda row: row.texts_s)
    permits = 512
    for number in range(bench.extent.rounds):
        bench.results.streams.append(_stream(bench, one, permits, SHARE, saturation_s, number))
        bench.results.streams.append(_stream(bench, one, permits, FLOOD, saturation_s, number))
    calm_ms = median((s for s in bench.results.streams if s.share == SHARE), lambda s: s.p50_ms)
    permits = max(2, round(2 * calm_ms / 1000 * saturation_s))
    server = manifold(bench.folder, bench.threads, permits=permits, name=f"{MANIFOLD} with {permits} permits")
    with running([server], bench.threads, bench.folder, bench.results.failures) as started:
        for few in started.values():
            for number in range(bench.extent.rounds):
                bench.results.streams.append(_stream(bench, few, permits, SHARE, saturation_s, number))
                bench.results.streams.append(_stream(bench, few, permits, FLOOD, saturation_s, number))


def _stream(bench: Bench, one: Running, permits: int, share: float, saturation_s: float, number: int) -> Stream:
    call = one.server.jobs[READOUT.name].calls[0]
    rate_s = share * saturation_s
    bodies = _bodies(bench, call.before, call.after, "64", 4000)
    one.resume()
    run_alone(one.url, call.path, bodies[:3])
    answers = run_open(one.url, call.path, bodies, rate_s, bench.extent.stream_s, seed=number)
    one.pause()
    good = [a for a in answers if a.status == 200]
    refused = [a for a in answers if a.status == 429]
    stream = Stream(
        permits, share, rate_s, number,
        len(answers), len(good), len(refused), len(answers) - len(good) - len(refused),
        _percentile(good, 50), _percentile(good, 99), _percentile(refused, 50), _percentile(refused, 99),
        1000 * sorted(a.late_s for a in answers)[int(0.99 * (len(answers) - 1))],
    )  # fmt: skip
    console.print(
        f"stream   {permits} permits, {share:g} × saturation: {stream.sent} sent, {stream.accepted} accepted, p50 "
        f"{stream.p50_ms:.1f}, p99 {stream.p99_ms:.1f}; {stream.refused} refused, p99 {stream.refusal_p99_ms:.1f} ms; "
        f"{stream.failed} failed"
    )
    return stream


def _percentile(answers: Sequence[Answer], percent: float) -> float:
    ordered = sorted(1000 * a.duration_s for a in answers)
    return ordered[min(len(ordered) - 1, int(percent / 100 * len(ordered)))] if ordered else 0.0


def _bodies(bench: Bench, before: str, after: str, texts: str, count: int) -> list[bytes]:
    chosen = bench.texts[texts]
    bench.at += 997
    quoted = chosen.file.read_text().splitlines()
    return [f"{before}{quoted[(bench.at + i) % len(quoted)]}{after}".encode() for i in range(count)]


def measure_one_task(bench: Bench, started: Mapping[str, Running]) -> None:
    """In turns, so that a slow moment of the machine hits all; twice the rounds, because peers are close."""
    for number in range(2 * bench.extent.rounds):
        for texts, concurrency in bench.extent.peer_cells:
            runs = (
                bench.load("one", one, _first_job(one.server), texts, concurrency, number) for one in started.values()
            )
            bench.beside_bare(texts, runs, with_one=concurrency == 1)


def measure_several(bench: Bench, started: Mapping[str, Running]) -> None:
    jobs = [READOUTS.name, PREFIXES.name, HEADS.name]
    for number in range(bench.extent.rounds):
        runs = (
            bench.load("several", one, job, "64", bench.extent.several, number)
            for one in started.values()
            for job in (jobs if one.server.name == MANIFOLD else one.server.jobs)
        )
        bench.beside_bare("64", runs)


def measure_half(bench: Bench) -> None:
    """bfloat16: the bare encoder, Manifold and the peers that take it."""
    servers = [
        manifold(bench.folder, bench.threads, "bfloat16", name=f"{MANIFOLD} bfloat16"),
        *one_task_peers(bench.classifiers, bench.threads, "bfloat16"),
    ]
    bare = start_bare(bench.model, "bfloat16", bench.threads, environment_variables(bench.threads))
    bare.find_best(bench.texts["64"], bench.extent.bare_s / 2)
    failures: dict[str, str] = {}
    with running(servers, bench.threads, bench.folder, failures) as started:
        for number in range(bench.extent.rounds):
            runs = (bench.load("half", one, _first_job(one.server), "64", 64, number) for one in started.values())
            bench.beside_bare("64", runs, bare)
    bare.close()
    bench.results.failures |= {f"{name} in bfloat16": error for name, error in failures.items()}


def _first_job(server: Server) -> str:
    return next(iter(server.jobs))


# -- the run -----------------------------------------------------------------------------------------------------------


def prepare(folder: Path, extent: Extent, threads: int) -> Bench:
    backbone = Backbone.load("embedded", "cpu", "float32")
    write_prefixes(folder / "prefixes", backbone.spec)
    classifiers = write_classifiers(folder, backbone.path)
    export_onnx(backbone.path, ROOT / ".venv-peers-infinity/bin/optimum-cli", folder / "onnx")
    texts = {name: make_texts(backbone.path, name, folder) for name in extent.lengths}
    bare = start_bare(backbone.path, "float32", threads, environment_variables(threads))
    bench = Bench(extent, threads, folder, backbone.path, texts, classifiers, bare)
    for one in texts.values():
        bare.find_best(one, extent.bare_s / 2)
        bench.expected[one.name] = bare.texts_s(one.name, extent.bare_s / 2)
        console.print(f"bare encoder, {one.name} tokens: {bench.expected[one.name]:.1f} texts/s in {bare.best}")
    bench.results.best_batch = bare.best
    return bench


def run(bench: Bench, peers: bool) -> None:
    failures = bench.results.failures
    own = manifold(bench.folder, bench.threads)
    with running([own], bench.threads, bench.folder, failures) as started:
        if MANIFOLD not in started:
            raise SystemExit(f"Manifold's server does not start: {failures[MANIFOLD]}")
        one = started[MANIFOLD]
        measure_manifold(bench, one)
        measure_alone(bench, one)
        measure_streams(bench, one)
        if peers:
            for servers, measure in (
                (one_task_peers(bench.classifiers, bench.threads), measure_one_task),
                (several_task_peers(bench.classifiers, bench.threads), measure_several),
            ):
                with running(servers, bench.threads, bench.folder, failures) as others:
                    measure(bench, {MANIFOLD: one, **others})
                bench.results.settings |= {server.name: server.settings for server in servers}
    bench.results.settings[MANIFOLD] = own.settings
    if peers and bench.threads != os.cpu_count():
        failures["infinity, ONNX Runtime"] = "it takes a thread a core, and the others have another number"
    if peers and bench.extent.has_half:
        measure_half(bench)
    bench.bare.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-serving", description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="three minutes: one length, one round; writes no report")
    parser.add_argument("--rounds", type=int, default=3, help="a spread needs three")
    parser.add_argument("--no-peers", action="store_true", help="Manifold and the bare encoder alone")
    parser.add_argument("--render", action="store_true", help="write the report again from the last run's figures")
    options = parser.parse_args()
    if options.render:
        return write(Results.load(KEPT))
    require_wrk()
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="serving-") as folder:
        bench = prepare(Path(folder), QUICK if options.quick else Extent(options.rounds), options.threads)
        run(bench, peers=not options.no_peers)
    bench.results.conditions = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": describe(options.threads),
        "minutes": f"{(time.monotonic() - began_s) / 60:.0f}",
        "rounds": str(bench.extent.rounds),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", "unset"),
    }
    bench.results.save(KEPT if not options.quick else KEPT.with_name("serving-quick.json"))
    if options.quick:
        print(report(bench.results))
    else:
        write(bench.results)


def write(results: Results) -> None:
    (FOLDER / "SERVING.md").write_text(report(results))
    for name, drawing in plot(results).items():
        (FOLDER / name).write_text(drawing)
    console.print("written: tests/bench/SERVING.md")


if __name__ == "__main__":
    main()
