"""How time and memory grow with tasks, resident versions, the text's length and concurrency, with a law fitted to each.

    make bench-growth

Writes tests/bench/GROWTH.md and its plots. Time is of the engine in this process, and of a server where wrk is at hand.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from app.domain import Encoding, EngineRequest, EngineResult, TaskVersion
from app.engine.backbone import Backbone, set_threads
from app.engine.engine import Engine
from app.engine.host_memory import keep_freed_memory
from app.engine.plan import make_plan
from tests.bench.growth_report import Axis, Growth, write_report
from tests.bench.limits_cases import even_case, timed_turn
from tests.bench.limits_torch import forward, load_network
from tests.bench.load import Call, run_wrk
from tests.bench.load_texts import make_texts
from tests.bench.memory import forget_peak, give_back_freed, peak_mb, resident_mb, taken_mb
from tests.engine.models import make_artifact
from tests.serving import ServerProcess

REPORT = Path(__file__).with_name("GROWTH.md")
TASKS = (1, 2, 4, 8, 16, 32, 64)
VERSIONS = (10, 100, 1000, 10_000)
LENGTHS = (16, 32, 64, 128, 256, 512)
CONCURRENCIES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
TOKENS = 32
Run = Callable[[], object]

_READOUT: dict[str, object] = {"readout": "attention", "layers": [2, 4, 6], "num_queries": 2, "hidden": 32}
_PREFIX: dict[str, object] = {"prefixes": [(16, 4)]}
_SMALL: dict[str, object] = {"prefixes": [(4, 5)]}  # 12 KB of prefix and 6 KB of head in float32


@dataclass(frozen=True)
class Effort:
    rounds: int
    turn_s: float
    concurrency_s: int  # of load at each concurrency


@contextmanager
def running_engine(backbone: Backbone) -> Iterator[Engine]:
    engine = Engine(backbone)
    engine.start()
    yield engine
    engine.close()


def load(engine: Engine, kind: dict[str, object], seed: int, labels: int = 4) -> TaskVersion:
    artifact = make_artifact(engine.spec, f"task{seed}", seed=seed, labels=labels, **kind)  # type: ignore[arg-type]
    engine.load(artifact)
    return artifact.version(1)


def request(engine: Engine, versions: Sequence[TaskVersion], texts: int, tokens: int) -> EngineRequest:
    encodings = [Encoding(tuple(ids), (0,) * tokens) for ids in even_case(texts, tokens).texts]
    return EngineRequest(tuple(make_plan(encoding, versions, engine.spec.num_layers) for encoding in encodings))


def grow(name: str, axis: Axis, runs: dict[int, Run], effort: Effort) -> Growth:
    """Time of each run, in turns, and what it takes in memory."""
    for run in runs.values():
        run()
    turns: dict[int, list[float]] = {x: [] for x in runs}
    for _ in range(effort.rounds):
        for x, run in runs.items():
            turns[x].append(1000 * timed_turn(run, effort.turn_s))
    taken = [max(0.0, taken_mb(run)) for run in runs.values()]
    return Growth(name, axis, list(runs), [statistics.median(ms) for ms in turns.values()], taken)


def with_tasks(engine: Engine, most: int, effort: Effort) -> Iterator[Growth]:
    kinds = {"own prefix, first layer 4": _PREFIX, "attention readouts, 2 queries": _READOUT}
    for name, kind in kinds.items():
        versions = [load(engine, kind, seed) for seed in range(most)]
        requests = {n: request(engine, versions[:n], 8, TOKENS) for n in TASKS if n <= most}
        yield grow(name, Axis.TASKS, {n: _submission(engine, r) for n, r in requests.items()}, effort)
        for version in versions:
            engine.unload(version.digest)


def with_length(engine: Engine, path: str, most: int, effort: Effort) -> Iterator[Growth]:
    version = load(engine, {}, 0)
    network = load_network(path, "float32")
    lengths = [n for n in LENGTHS if n <= most]
    for texts in (1, 8):
        requests = {n: request(engine, [version], texts, n) for n in lengths}
        runs = {n: _submission(engine, r) for n, r in requests.items()}
        yield grow(f"engine, {texts} at once", Axis.LENGTH, runs, effort)
    bare: dict[int, Run] = {n: forward(network, even_case(1, n).texts) for n in lengths}
    yield grow("bare encoder, 1 at once", Axis.LENGTH, bare, effort)
    engine.unload(version.digest)


def with_versions(engine: Engine, path: str, most: int, effort: Effort) -> Iterator[Growth]:
    """One request's time among so many, over the bare encoder's in the same turns; memory is what loading them took."""
    counts = [n for n in VERSIONS if n <= most]
    first = load(engine, _SMALL, 0)
    submission = _submission(engine, request(engine, [first], 1, TOKENS))
    bare = forward(load_network(path, "float32"), even_case(1, TOKENS).texts)
    submission(), bare()
    give_back_freed()
    before_mb, loaded = resident_mb(), 1
    request_ms, memory_mb, load_ms = [], [], []
    for count in counts:
        seconds = []
        for seed in range(loaded, count):
            artifact = make_artifact(engine.spec, f"task{seed}", seed=seed, labels=4, **_SMALL)  # type: ignore[arg-type]
            began_s = time.perf_counter()
            engine.load(artifact)
            seconds.append(time.perf_counter() - began_s)
        loaded = count
        give_back_freed()
        memory_mb.append(resident_mb() - before_mb)
        load_ms.append(1000 * statistics.median(seconds[-100:]))
        pairs = [(timed_turn(submission, effort.turn_s), timed_turn(bare, effort.turn_s)) for _ in range(effort.rounds)]
        request_ms.append(statistics.median(mine / theirs for mine, theirs in pairs))
    yield Growth("a request of one task", Axis.VERSIONS, counts, request_ms, memory_mb)
    yield Growth("loading one more", Axis.LOADING, counts, load_ms, None)


def with_concurrency(engine: Engine, most: int, effort: Effort) -> Growth:
    """So many requests in flight, each of one text; whoever is answered sends the next."""
    version = load(engine, {}, 0)
    requests = [
        EngineRequest((make_plan(Encoding(tuple(ids), (0,) * TOKENS), [version], engine.spec.num_layers),))
        for ids in even_case(1024, TOKENS).texts
    ]
    counts = [n for n in CONCURRENCIES if n <= most]
    p50_ms, memory_mb, rates = [], [], []
    for count in counts:
        give_back_freed()
        forget_peak()
        before_mb = resident_mb()
        seconds, elapsed_s = _closed_loop(engine, requests, count, effort.concurrency_s)
        p50_ms.append(1000 * statistics.median(seconds))
        rates.append(len(seconds) / elapsed_s)
        memory_mb.append(peak_mb() - before_mb)
    engine.unload(version.digest)
    return Growth("engine", Axis.CONCURRENCY, counts, p50_ms, memory_mb, rates)


def _closed_loop(
    engine: Engine, requests: Sequence[EngineRequest], in_flight: int, seconds: float
) -> tuple[list[float], float]:
    """Seconds of each request that ended within the span, and how long the span was."""
    found: list[float] = []
    began_s = time.perf_counter()

    def client(start: int) -> None:
        index = start
        while time.perf_counter() - began_s < seconds:
            sent_s = time.perf_counter()
            result: EngineResult = engine.submit(requests[index % len(requests)]).result()
            assert result.outputs[0][0].error is None
            found.append(time.perf_counter() - sent_s)
            index += in_flight

    clients = [threading.Thread(target=client, args=(start,)) for start in range(in_flight)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    return found, time.perf_counter() - began_s


def with_server(path: str, threads: int, most: int, effort: Effort) -> Growth | None:
    """The same over HTTP, load by wrk. None where that is not installed."""
    if shutil.which("wrk") is None:
        print("wrk is not installed: the server under concurrency is left out")
        return None
    counts = [n for n in CONCURRENCIES if n <= most]
    call = Call("/v1/predict", '{"inputs": ', ', "tasks": ["sentiment"]}')
    arguments = ["--port", "0", "--threads", str(threads), "--dtype", "float32", "--answer-cache-bytes", "0"]
    p50_ms, memory_mb, rates = [], [], []
    with tempfile.TemporaryDirectory() as folder, ServerProcess("app.cli", "serve", *arguments) as process:
        url = process.wait_until_ready()
        texts = make_texts(path, str(TOKENS), Path(folder)).file
        run_wrk(url, [call], texts, 8, effort.concurrency_s)
        for count in counts:
            load = run_wrk(url, [call], texts, count, effort.concurrency_s)
            if load.failed:
                raise RuntimeError(f"{load.failed} requests failed at concurrency {count}")
            p50_ms.append(load.p50_ms)
            rates.append(load.texts_s)
            memory_mb.append(resident_mb(process.process.pid))
    return Growth("server", Axis.CONCURRENCY, counts, p50_ms, memory_mb, rates)


def _submission(engine: Engine, asked: EngineRequest) -> Run:
    return lambda: engine.submit(asked).result()


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-growth", description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--turn-s", type=float, default=0.3)
    parser.add_argument("--concurrency-s", type=int, default=8, help="seconds of load at each concurrency")
    parser.add_argument("--most", type=int, nargs=4, metavar=("TASKS", "VERSIONS", "TOKENS", "CONCURRENCY"))
    parser.add_argument("--out", type=Path, default=REPORT)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    keep_freed_memory()
    set_threads(options.threads)
    effort = Effort(options.rounds, options.turn_s, options.concurrency_s)
    tasks, versions, tokens, concurrency = options.most or (64, 10_000, 512, 512)
    backbone = Backbone.load("embedded", "cpu", "float32")
    found: list[Growth] = []
    with running_engine(backbone) as engine:
        for growths in (
            with_tasks(engine, tasks, effort),
            with_length(engine, backbone.path, tokens, effort),
            [with_concurrency(engine, concurrency, effort)],
            with_versions(engine, backbone.path, versions, effort),
        ):
            for growth in growths:
                found.append(growth)
                print(growth, flush=True)
    served = with_server(backbone.path, options.threads, concurrency, effort)
    found += [served] if served is not None else []
    write_report(options.out, found, options.threads)
    print(options.out.read_text())


if __name__ == "__main__":
    main()
