"""Changes under traffic: three servers, one Redis, swaps while predictions flow, and how soon a change is everywhere.

    make bench-swaps

Every answer is checked: its scores are those of the version that it names, and its versions those of the generation
that it names. Writes tests/bench/SWAPS.md.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2

from app.domain import TextInput
from app.engine.artifact import FILES, read_artifact
from app.engine.backbone import Backbone
from app.engine.engine import Engine
from app.engine.golden import predict
from app.engine.tokenizer import TextTokenizer
from app.registry.connection import connect
from app.registry.index import Index
from app.registry.store import ArtifactStore
from app.rollout import IndexView, NewVersion
from app.service.loading import card_of
from tests.artifacts import write_artifact
from tests.bench.machine import describe
from tests.bench.memory import give_back_freed, resident_mb
from tests.registry.redis_server import RedisServer
from tests.serving import ServerProcess

REPORT = Path(__file__).with_name("SWAPS.md")
TASKS = tuple(f"task{i}" for i in range(5))
VERSIONS = (1, 2, 3, 4)
LABELS = ("a", "b", "c")
TEXTS = (
    "the parcel never came and nobody answers",
    "what a wonderful evening, thank you all so much for it",
    "move my appointment to friday, please, at ten if that is possible",
)
SERVERS = 3
TOLERANCE = 2e-5  # what the texts beside it in a batch make of a score; versions differ by much more


@dataclass
class Golden:
    """What each version really says of each text: task → version → text → scores, as the API rounds them."""

    scores: dict[tuple[str, int, str], dict[str, float]] = field(default_factory=dict)


@dataclass
class Load:
    """What a phase of steady requests saw."""

    seconds: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    seen: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)  # generation, versions of TASKS


def make_artifacts(folder: Path) -> Golden:
    backbone = Backbone.load("embedded", "cpu", "float32")
    engine, tokenizer = Engine(backbone), TextTokenizer(backbone.path)
    engine.start()
    golden = Golden()
    for task_number, task in enumerate(TASKS):
        for version in VERSIONS:
            path = folder / task / str(version)
            seed = 100 * task_number + version
            draft = folder / "drafts" / task / str(version)
            write_artifact(draft, engine.spec, task, LABELS, seed=seed)
            artifact = read_artifact(draft, engine.spec)
            engine.load(artifact)
            outputs = predict(engine, tokenizer, artifact, [TextInput(text) for text in TEXTS])
            for text, output in zip(TEXTS, outputs, strict=True):
                named = zip(LABELS, output.scores, strict=True)
                golden.scores[task, version, text] = {label: round(score, 6) for label, score in named}
            stated = [{"text": t, "scores": list(o.scores)} for t, o in zip(TEXTS, outputs, strict=True)]
            write_artifact(path, engine.spec, task, LABELS, seed=seed, golden=stated)
    engine.close()
    shutil.rmtree(folder / "drafts")
    return golden


@contextlib.contextmanager
def servers(work: Path, redis_url: str, prefixes: Path, *options: str) -> Iterator[list[str]]:
    with contextlib.ExitStack() as opened:
        processes = []
        for number in range(SERVERS):
            arguments = ["--home", str(work / f"home{number}"), "--redis-url", redis_url]
            arguments += ["--artifacts-url", f"file://{work / 'artifacts'}", "--prefixes", str(prefixes)]
            arguments += ["--answer-cache-bytes", "0"]  # the same few texts are asked for ever
            process = ServerProcess("app.cli", "serve", "--port", "0", "--threads", "1", *arguments, *options)
            processes.append(opened.enter_context(process))
        yield [process.wait_until_ready() for process in processes]


async def request(client: httpx2.AsyncClient, url: str, golden: Golden, load: Load) -> None:
    text = random.choice(TEXTS)
    began_s = time.perf_counter()
    try:
        answer = await client.post(f"{url}/v1/predict", json={"inputs": text, "tasks": list(TASKS)})
    except httpx2.HTTPError as error:
        load.failed.append(repr(error))
        return
    load.seconds.append(time.perf_counter() - began_s)
    if answer.status_code != 200:
        load.failed.append(answer.text)
        return
    body = answer.json()
    (result,) = body["results"]
    for task in TASKS:
        said = result[task]
        expected = golden.scores[task, said["version"], text]
        if any(abs(said["scores"][label] - score) > TOLERANCE for label, score in expected.items()):
            load.wrong.append(f"{task}@{said['version']}: {said['scores']} is not {expected}")
    load.seen.append((body["generation"], tuple(result[task]["version"] for task in TASKS)))


async def steady(urls: Sequence[str], golden: Golden, rate: float, stop: asyncio.Event, load: Load) -> None:
    """Requests at fixed times, whatever became of those before."""
    limits = httpx2.Limits(max_connections=200, max_keepalive_connections=200)
    async with httpx2.AsyncClient(timeout=30, limits=limits) as client:
        pending: set[asyncio.Task[None]] = set()
        began_s, number = time.perf_counter(), 0
        while not stop.is_set():
            task = asyncio.create_task(request(client, urls[number % len(urls)], golden, load))
            pending.add(task)
            task.add_done_callback(pending.discard)
            number += 1
            await asyncio.sleep(max(0.0, began_s + number / rate - time.perf_counter()))
        await asyncio.gather(*pending)


async def put_release(client: httpx2.AsyncClient, url: str, version: int) -> dict[str, Any]:
    tasks = {task: {"champion": version} for task in TASKS}
    answer = await client.post(f"{url}/v1/releases", json={"tasks": tasks, "reason": f"to version {version}"})
    answer.raise_for_status()
    body: dict[str, Any] = answer.json()
    return body


async def swap(urls: Sequence[str], count: int, every_s: float, versions: Sequence[int]) -> dict[int, int]:
    """Generation → the version that all tasks have in it."""
    made: dict[int, int] = {}
    async with httpx2.AsyncClient(timeout=30) as client:
        began_s = time.perf_counter()
        for number in range(count):
            version = versions[number % len(versions)]
            body = await put_release(client, urls[number % len(urls)], version)
            made[body["generation"]] = version
            await asyncio.sleep(max(0.0, began_s + (number + 1) * every_s - time.perf_counter()))
    return made


@dataclass(frozen=True)
class Swapped:
    answers: int
    failed: int
    wrong: int
    p99_without_ms: float
    p99_with_ms: float
    p50_without_ms: float
    p50_with_ms: float
    swaps: int


async def measure_swaps(
    urls: Sequence[str], golden: Golden, rate: float, swaps: int, every_s: float, versions: Sequence[int]
) -> Swapped:
    """Halves of the run alternate: with swaps and without, so that other work on the machine meets both."""
    without, during = Load(), Load()
    made: dict[int, int] = {}
    rounds = 5
    for _ in range(rounds):
        for load, is_swapping in ((without, False), (during, True)):
            stop = asyncio.Event()
            traffic = asyncio.create_task(steady(urls, golden, rate, stop, load))
            if is_swapping:
                made |= await swap(urls, swaps // rounds, every_s, versions)
            else:
                await asyncio.sleep(swaps // rounds * every_s)
            stop.set()
            await traffic
    wrong = [*without.wrong, *during.wrong]
    for generation, answered in (*without.seen, *during.seen):
        if generation in made and set(answered) != {made[generation]}:
            wrong.append(f"generation {generation} is version {made[generation]} and answered {answered}")
    failed = [*without.failed, *during.failed]
    for sentence in (*failed[:3], *wrong[:3]):
        print(sentence)
    return Swapped(
        answers=len(without.seen) + len(during.seen),
        failed=len(failed),
        wrong=len(wrong),
        p99_without_ms=1000 * percentile(without.seconds, 99),
        p99_with_ms=1000 * percentile(during.seconds, 99),
        p50_without_ms=1000 * percentile(without.seconds, 50),
        p50_with_ms=1000 * percentile(during.seconds, 50),
        swaps=len(made),
    )


async def measure_propagation(urls: Sequence[str], count: int) -> list[float]:
    """Seconds from a PUT's answer until the last server answers with the new version."""
    seconds = []
    async with httpx2.AsyncClient(timeout=30) as client:
        for number in range(count):
            version = VERSIONS[number % len(VERSIONS)]
            body = {"champion": version}
            answer = await client.put(f"{urls[number % len(urls)]}/v1/tasks/{TASKS[0]}/traffic", json=body)
            answer.raise_for_status()
            began_s = time.perf_counter()
            await asyncio.gather(*(_until(client, url, version) for url in urls))
            seconds.append(time.perf_counter() - began_s)
            await asyncio.sleep(random.uniform(0.05, 0.3))
    return seconds


async def _until(client: httpx2.AsyncClient, url: str, version: int) -> None:
    while True:
        answer = await client.post(f"{url}/v1/predict", json={"inputs": TEXTS[0], "tasks": [TASKS[0]]})
        if answer.json()["results"][0][TASKS[0]]["version"] == version:
            return
        await asyncio.sleep(0.002)


def percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


@dataclass(frozen=True)
class Large:
    versions: int
    tasks: int
    create_s: float
    start_s: float
    memory_mb: float  # of the server, as soon as it is ready
    small_memory_mb: float  # of one with the same tasks, each of a single version
    view_mb: float  # that the index takes in a process
    view_s: float
    update_ms: float
    seen_ms: float


def measure_large(work: Path, tasks: int, versions: int) -> Large:
    """An index of many versions: start to ready, memory, and what one change costs."""
    backbone = Backbone.load("embedded", "cpu", "float32")
    prefixes = work / "large"
    server = RedisServer(work / "redis-large")
    server.folder.mkdir()
    server.start()
    try:
        index, store = Index(connect(server.url)), ArtifactStore(f"file://{work / 'artifacts-large'}", work / "c", 0)
        news = []
        for number in range(tasks):
            folder = write_artifact(prefixes / f"t{number}", backbone.spec, f"t{number}", LABELS, seed=number)
            digest = store.put({name: (folder / name).read_bytes() for name in FILES if (folder / name).exists()})
            card = card_of(json.loads((folder / "manifest.json").read_text()))
            each = versions // tasks
            size = sum(f.stat().st_size for f in folder.iterdir())
            for version in range(1, each):
                news.append(NewVersion(f"t{number}", version, f"sha256:{number:032x}{version:032x}", card, size))
            news.append(NewVersion(f"t{number}", each, digest, card, size))
        began_s = time.perf_counter()
        assert index.create("bench", news, "a large index")
        create_s = time.perf_counter() - began_s
        give_back_freed()
        before_mb = resident_mb()
        began_s = time.perf_counter()
        view = index.view()
        view_s = time.perf_counter() - began_s
        give_back_freed()
        view_mb = resident_mb() - before_mb
        memory, start_s, seen_ms, update_ms = _start(work, server, index, view)
        small = _start_small(work, prefixes)
        return Large(versions, tasks, create_s, start_s, memory, small, view_mb, view_s, update_ms, seen_ms)
    finally:
        server.kill()


def _start(work: Path, server: RedisServer, index: Index, view: IndexView) -> tuple[float, float, float, float]:
    arguments = ["--home", str(work / "home-large"), "--redis-url", server.url, "--threads", "1"]
    arguments += ["--artifacts-url", f"file://{work / 'artifacts-large'}"]
    began_s = time.perf_counter()
    with ServerProcess("app.cli", "serve", "--port", "0", *arguments) as process:
        url = process.wait_until_ready()
        start_s = time.perf_counter() - began_s
        memory = resident_mb(process.process.pid)
        seen, updates = [], []
        for number in range(20):
            before = view
            _, generation = index.publish("bench", f"t{number}", f"sha256:{number:064x}", "{}", 1, "")
            began_s = time.perf_counter()
            view = index.update(before)
            updates.append(time.perf_counter() - began_s)
            while httpx2.get(f"{url}/healthz").json()["generation"] < generation:
                time.sleep(0.001)
            seen.append(time.perf_counter() - began_s)
            assert sum(view.tasks[name] is not before.tasks[name] for name in before.tasks) == 1
    return memory, start_s, 1000 * statistics.median(seen), 1000 * statistics.median(updates)


def _start_small(work: Path, prefixes: Path) -> float:
    arguments = ["--home", str(work / "small"), "--prefixes", str(prefixes), "--threads", "1"]
    with ServerProcess("app.cli", "serve", "--port", "0", *arguments) as process:
        process.wait_until_ready()
        return resident_mb(process.process.pid)


def report(rows: Sequence[tuple[str, Swapped]], spread: Sequence[tuple[str, list[float], float]], large: Large) -> str:
    lines = [
        "# Swaps: changes of the index under traffic",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {describe(1)}. {SERVERS} servers with a thread each, one real redis-server, "
        "the load and the checks, all on this machine. Written by `make bench-swaps`.",
        "",
        f"A swap changes {len(TASKS)} tasks at once. Every answer is checked against the scores of the version that it "
        "names, and its versions against the generation that it names. Halves with and without swaps alternate.",
        "",
        "| | swaps | answers | failed | wrong | p50 without, with | p99 without, with | p99 ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, r in rows:
        ratio = r.p99_with_ms / r.p99_without_ms
        lines.append(
            f"| {name} | {r.swaps} | {r.answers} | {r.failed} | {r.wrong} | {r.p50_without_ms:.1f}, "
            f"{r.p50_with_ms:.1f} ms | {r.p99_without_ms:.1f}, {r.p99_with_ms:.1f} ms | {ratio:.2f} |"
        )
    lines += [
        "",
        f"From the PUT's answer until the last of {SERVERS} servers answers with the new version:",
        "",
        "| | changes | median | p95 | allowed |",
        "|---|---|---|---|---|",
    ]
    for name, seconds, allowed_ms in spread:
        median, p95 = 1000 * statistics.median(seconds), 1000 * percentile(seconds, 95)
        lines.append(f"| {name} | {len(seconds)} | {median:.0f} ms | {p95:.0f} ms | {allowed_ms:.0f} ms |")
    lines += [
        "",
        f"An index of {large.versions:,} versions, of which {large.tasks} are live:",
        "",
        "| | |",
        "|---|---|",
        f"| making it, in one change | {large.create_s:.1f} s |",
        f"| reading all of it | {large.view_s:.2f} s |",
        f"| start of a server to ready, artifacts not fetched yet | {large.start_s:.1f} s |",
        f"| what the index takes in its memory | {large.view_mb:.1f} MB |",
        f"| its memory at ready; with one version a task | {large.memory_mb:.0f} MB; {large.small_memory_mb:.0f} MB |",
        f"| reading one change (one task's records) | {large.update_ms:.1f} ms |",
        f"| from one change until a server names its generation | {large.seen_ms:.1f} ms |",
        "",
        "A server is at its largest while it loads the encoder, and keeps what it freed since for its batches; the "
        "index fits into that.",
    ]
    return "\n".join(lines) + "\n"


async def run(work: Path, swaps: int, rate: float, changes: int) -> None:
    prefixes = work / "prefixes"
    golden = make_artifacts(prefixes)
    rows, spread = [], []
    redis = RedisServer(work / "redis")
    redis.folder.mkdir()
    redis.start()
    try:
        with servers(work, redis.url, prefixes) as urls:
            measured = await measure_swaps(urls, golden, rate, swaps, 0.1, VERSIONS)
            rows.append(("versions that were live a while ago", measured))
            spread.append(("with hints", await measure_propagation(urls, changes), 250.0))
        with servers(work, redis.url, prefixes, "--pinned-versions", "1") as urls:
            measured = await measure_swaps(urls, golden, rate, max(swaps // 5, 5), 0.5, VERSIONS)
            rows.append(("each version read, checked and loaded anew", measured))
            spread.append(("with hints, each version loaded anew", await measure_propagation(urls, changes), 250.0))
        with servers(work, redis.url, prefixes, "--no-index-hints", "--index-poll-ms", "1000") as urls:
            spread.append(("polling each second, no hints", await measure_propagation(urls, changes // 2), 1250.0))
    finally:
        redis.kill()
    text = report(rows, spread, measure_large(work, tasks=200, versions=10_000))
    REPORT.write_text(text)
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--swaps", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=30.0, help="requests a second, over all servers")
    parser.add_argument("--changes", type=int, default=100, help="how many are timed until they are everywhere")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="swaps-") as folder:
        asyncio.run(run(Path(folder), options.swaps, options.rate, options.changes))


if __name__ == "__main__":
    main()
