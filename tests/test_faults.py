"""Faults at whole servers under a steady load: nothing acknowledged is lost, no answer is wrong, each fault is told.

Two servers follow one real redis-server, the second through a proxy that can be cut, and share an artifact store.
Every score is checked against the version that its answer names.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from redis import Redis

from app.domain import TextInput
from app.engine.artifact import read_artifact
from app.engine.backbone import Backbone
from app.engine.engine import Engine
from app.engine.golden import predict
from app.engine.tokenizer import TextTokenizer
from tests.artifacts import write_artifact
from tests.registry.redis_server import RedisServer
from tests.serving import ServerProcess, wait_for

LABELS = ("a", "b", "c")
TEXTS = ("the parcel never came", "what a wonderful evening, thank you all so much for it", "move it to friday")
SEEDS = range(1, 8)
FIRST = (1, 2, 3)  # versions that the index begins with; the highest of them is live then
TOLERANCE = 2e-5  # what the texts beside it in a batch make of a score; versions differ by much more
PATIENCE_S = 30.0
EVERY_S = 0.05  # between requests of the load
PAUSE_S = 30.0
SAVED_S = 1.5  # the last good state is written each second


# -- artifacts and what they say ---------------------------------------------------------------------------------------


@dataclass
class Shelf:
    """An artifact for each seed and task, and its scores as the API rounds them."""

    folder: Path
    scores: dict[tuple[str, int, str], dict[str, float]] = field(default_factory=dict)  # by task, seed, text

    def artifact(self, task: str, seed: int) -> Path:
        return self.folder / task / str(seed)

    def prefixes(self, folder: Path, *tasks: str) -> Path:
        for task in tasks:
            for version in FIRST:
                shutil.copytree(self.artifact(task, version), folder / task / str(version))
        return folder


@pytest.fixture(scope="module")
def shelf() -> Iterator[Shelf]:
    with tempfile.TemporaryDirectory(prefix="shelf-") as folder:
        backbone = Backbone.load("embedded", "cpu", "float32")
        engine, tokenizer, made = Engine(backbone), TextTokenizer(backbone.path), Shelf(Path(folder))
        engine.start()
        for task, seed in itertools.product(("spam", "topic", "mood"), SEEDS):
            weights = hash_of(task) + seed
            draft = write_artifact(made.folder / "drafts" / task / str(seed), engine.spec, task, LABELS, seed=weights)
            artifact = read_artifact(draft, engine.spec)
            engine.load(artifact)
            outputs = predict(engine, tokenizer, artifact, [TextInput(text) for text in TEXTS])
            golden = [{"text": text, "scores": list(o.scores)} for text, o in zip(TEXTS, outputs, strict=True)]
            path = made.artifact(task, seed)
            write_artifact(path, engine.spec, task, LABELS, seed=weights, golden=golden)
            for text, output in zip(TEXTS, outputs, strict=True):
                named = zip(LABELS, output.scores, strict=True)
                made.scores[task, seed, text] = {label: round(score, 6) for label, score in named}
        engine.close()
        yield made


def hash_of(task: str) -> int:
    return 100 * sum(task.encode())


# -- the load ----------------------------------------------------------------------------------------------------------


class Load(threading.Thread):
    """Asks each server in turn, and checks every answer."""

    def __init__(self, urls: Sequence[str], shelf: Shelf, seeds: dict[tuple[str, int], int]) -> None:
        super().__init__(daemon=True)
        self._urls, self._shelf, self._seeds = urls, shelf, seeds
        self._stop_asked = threading.Event()
        self.answers = 0
        self.failed: list[str] = []
        self.wrong: list[str] = []

    def run(self) -> None:
        with httpx2.Client(timeout=PATIENCE_S) as client:
            for number in itertools.count():
                if self._stop_asked.wait(EVERY_S):
                    return
                self._ask(client, self._urls[number % len(self._urls)], TEXTS[number % len(TEXTS)])

    def stop(self) -> None:
        self._stop_asked.set()
        self.join()

    def _ask(self, client: httpx2.Client, url: str, text: str) -> None:
        try:
            answer = client.post(f"{url}/v1/predict", json={"inputs": text, "tasks": ["spam", "topic"]})
        except httpx2.HTTPError as error:
            self.failed.append(repr(error))
            return
        if answer.status_code != 200:
            self.failed.append(answer.text)
            return
        self.answers += 1
        self.wrong += faults_of(answer.json()["results"][0], text, self._shelf, self._seeds)


def faults_of(result: dict[str, Any], text: str, shelf: Shelf, seeds: dict[tuple[str, int], int]) -> list[str]:
    """Where the scores are not those of the version that is named."""
    faults = []
    for task, said in result.items():
        expected = shelf.scores[task, seeds[task, said["version"]], text]
        if not close(said.get("scores"), expected):
            faults.append(f"{task}@{said['version']} said {said.get('scores', said)} of {text!r}, not {expected}")
    return faults


def close(said: dict[str, float] | None, expected: dict[str, float]) -> bool:
    return said is not None and all(abs(said[label] - score) <= TOLERANCE for label, score in expected.items())


# -- operators ---------------------------------------------------------------------------------------------------------


def promote(url: str, task: str, version: int, if_match: int | None = None) -> httpx2.Response:
    headers = {} if if_match is None else {"if-match": f'"{if_match}"'}
    body = {"champion": version, "reason": f"to version {version}"}
    return httpx2.put(f"{url}/v1/tasks/{task}/traffic", json=body, headers=headers, timeout=PATIENCE_S)


def post(url: str, **body: Any) -> httpx2.Response:
    return httpx2.post(url, json=body, timeout=PATIENCE_S)


def get(url: str) -> Any:
    answer = httpx2.get(url, timeout=PATIENCE_S)
    assert answer.status_code == 200, answer.text
    return answer.json()


def publish(url: str, task: str, folder: Path) -> httpx2.Response:
    files = [("files", (file.name, file.read_bytes())) for file in sorted(folder.iterdir())]
    return httpx2.post(f"{url}/v1/tasks/{task}/versions", files=files, timeout=PATIENCE_S)


def metric(url: str, name: str) -> float:
    text = httpx2.get(f"{url}/metrics", timeout=PATIENCE_S).text
    (line,) = [line for line in text.splitlines() if line.startswith(f"manifold_{name} ")]
    return float(line.split()[1])


def champion(url: str, task: str) -> int | None:
    """The version that really answers; None where the task does not."""
    answer = post(f"{url}/v1/predict", inputs=TEXTS[0], tasks=[task])
    return answer.json()["results"][0][task]["version"] if answer.status_code == 200 else None


def check_told(answer: httpx2.Response, status: int, told: str) -> None:
    assert answer.status_code == status, answer.text
    assert re.search(told, answer.json()["error"]), answer.text


class Operator(threading.Thread):
    """Moves the traffic of a task to one version after the other, and keeps what was acknowledged."""

    def __init__(self, urls: Sequence[str], task: str) -> None:
        super().__init__(daemon=True)
        self._urls, self._task = urls, task
        self._stop_asked = threading.Event()
        self.acknowledged: list[tuple[int, int]] = []  # generation, champion
        self.refused: list[httpx2.Response] = []
        self.cut = 0  # no answer at all

    def run(self) -> None:
        for number in itertools.count():
            if self._stop_asked.wait(0.02):
                return
            version = FIRST[number % len(FIRST)]
            try:
                answer = promote(self._urls[number % len(self._urls)], self._task, version)
            except httpx2.HTTPError:
                self.cut += 1
                continue
            if answer.status_code == 200:
                self.acknowledged.append((answer.json()["generation"], version))
            else:
                self.refused.append(answer)

    def wait_for(self, count: int) -> None:
        target = len(self.acknowledged) + count
        wait_for(lambda: len(self.acknowledged) >= target, PATIENCE_S)

    def stop(self) -> None:
        self._stop_asked.set()
        self.join()

    def check(self, url: str) -> None:
        """Every change that was acknowledged is in the log, and the log is whole."""
        moved = {entry["generation"]: entry for entry in audit(url, self._task) if entry["action"] == "traffic"}
        for generation, version in self.acknowledged:
            assert moved[generation]["after"]["traffic"]["champion"] == version
        verdict = get(f"{url}/v1/audit/verify")
        assert verdict["ok"], verdict["fault"]
        for answer in self.refused:
            check_told(answer, 503, "the index")


def audit(url: str, task: str) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    while True:
        after = entries[-1]["sequence"] if entries else 0
        page = get(f"{url}/v1/audit?task={task}&limit=500&after={after}")["entries"]
        if not page:
            return entries
        entries += page


@contextlib.contextmanager
def operating(urls: Sequence[str], task: str = "spam") -> Iterator[Operator]:
    operator = Operator(urls, task)
    operator.start()
    try:
        yield operator
    finally:
        operator.stop()


# -- the machinery -----------------------------------------------------------------------------------------------------


class Proxy:
    """Carries connections from a TCP port to a unix socket, until they are cut."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self.is_open = True
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> int:
        """Closes all connections. How many there were."""
        with self._lock:
            sockets, self._sockets = self._sockets, set()
        for each in sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        return len(sockets)

    def close(self) -> None:
        self.is_open = False
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX)
                try:
                    if not self.is_open:
                        raise ConnectionRefusedError
                    server.connect(str(self._target))
                except OSError:
                    client.close()
                    server.close()
                    continue
                with self._lock:
                    self._sockets |= {client, server}
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self._carry, args=pair, daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while content := source.recv(65536):
                sink.sendall(content)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class Plant:
    """Two servers with homes of their own, one index and one store."""

    def __init__(self, folder: Path, shelf: Shelf) -> None:
        self.folder, self.shelf = folder, shelf
        self.seeds = {(task, version): version for task in ("spam", "topic", "mood") for version in FIRST}
        self.redis = RedisServer(folder / "redis")
        self.redis.folder.mkdir()
        self.redis.start()
        self.proxy = Proxy(self.redis.socket)
        self.store = folder / "artifacts"
        self.prefixes = shelf.prefixes(folder / "prefixes", "spam", "topic")
        self.servers: list[ServerProcess] = []
        self.urls: list[str] = []
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> Plant:
        self.servers = [self._spawn(number) for number in (0, 1)]
        self.urls = [server.wait_until_ready() for server in self.servers]
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()
        self.proxy.close()
        self.redis.kill()

    def _spawn(self, number: int) -> ServerProcess:
        redis_url = (self.redis.url, self.proxy.url)[number]
        arguments = ["--port", "0", "--threads", "1", "--dtype", "float32"]
        arguments += ["--home", str(self.home(number)), "--redis-url", redis_url]
        arguments += ["--artifacts-url", f"file://{self.store}", "--prefixes", str(self.prefixes)]
        arguments += ["--answer-cache-bytes", "0"]  # the few texts that it asks would seldom reach the engine
        return self._opened.enter_context(ServerProcess("app.cli", "serve", *arguments))

    def home(self, number: int) -> Path:
        return self.folder / f"home{number}"

    def kill(self, number: int) -> None:
        self.servers[number].process.kill()
        self.servers[number].wait()

    def start(self, number: int) -> str:
        self.servers[number] = self._spawn(number)
        self.urls[number] = self.servers[number].wait_until_ready()
        return self.urls[number]

    @contextlib.contextmanager
    def load(self, *urls: str) -> Iterator[Load]:
        """At its end no request has failed, and no answer was wrong."""
        load = Load(urls or list(self.urls), self.shelf, self.seeds)
        load.start()
        try:
            yield load
        finally:
            load.stop()
        assert load.failed == []
        assert load.wrong == []
        assert load.answers > 0

    def check_answers(self, url: str, *tasks: str) -> dict[str, int]:
        """Right answers to every text, at once. The versions that gave them."""
        answer = post(f"{url}/v1/predict", inputs=list(TEXTS), tasks=list(tasks or ("spam", "topic")))
        assert answer.status_code == 200, answer.text
        results = answer.json()["results"]
        for text, result in zip(TEXTS, results, strict=True):
            assert faults_of(result, text, self.shelf, self.seeds) == []
        return {task: said["version"] for task, said in results[0].items()}

    def publish(self, url: str, task: str, seed: int) -> int:
        answer = publish(url, task, self.shelf.artifact(task, seed))
        assert answer.status_code == 201, answer.text
        version = int(answer.json()["version"])
        self.seeds[task, version] = seed
        return version

    def approve(self, url: str, task: str, version: int) -> None:
        answer = post(f"{url}/v1/tasks/{task}/versions/{version}/approve", reason="it is good")
        assert answer.status_code == 200, answer.text

    def wait_until(self, task: str, version: int | None, *urls: str) -> None:
        for url in urls or self.urls:
            wait_for(lambda url=url: champion(url, task) == version, PATIENCE_S)

    def wait_until_index_is(self, up: bool, *urls: str) -> None:
        for url in urls or self.urls:
            wait_for(lambda url=url: metric(url, "index_up") == up, PATIENCE_S)

    def wait_until_settled(self) -> None:
        for url in self.urls:
            wait_for(lambda url=url: get(f"{url}/v1/index")["regressed"] is None, PATIENCE_S)


@pytest.fixture(scope="module")
def plant(shelf: Shelf) -> Iterator[Plant]:
    with tempfile.TemporaryDirectory(prefix="plant-") as folder, Plant(Path(folder), shelf) as made:
        yield made


# -- Redis -------------------------------------------------------------------------------------------------------------


def test_redis_killed_while_an_operator_promotes(plant: Plant) -> None:
    with plant.load(), operating(plant.urls) as operator:
        for _ in range(3):
            operator.wait_for(10)
            plant.redis.kill()
            time.sleep(0.3)
            plant.redis.start()
        operator.wait_for(10)
        operator.stop()
        last = operator.acknowledged[-1][1]
        plant.wait_until("spam", last)
        plant.wait_until_index_is(True)
    operator.check(plant.urls[0])
    generations = {get(f"{url}/healthz")["generation"] for url in plant.urls}
    assert generations == {audit(plant.urls[0], "spam")[-1]["generation"]}


def test_redis_paused(plant: Plant) -> None:
    first, second = plant.urls
    before = champion(first, "spam")
    other = next(version for version in FIRST if version != before)
    with plant.load():
        resume_s = time.monotonic() + PAUSE_S
        plant.redis.pause()
        try:
            plant.wait_until_index_is(False)
            seen = [metric(url, "index_staleness_seconds") for url in plant.urls]
            check_told(promote(first, "spam", other), 503, "the index does not answer.*nothing was changed")
            check_told(publish(second, "spam", plant.shelf.artifact("spam", 4)), 503, "the index does not answer")
            for path in ("/v1/audit", "/v1/audit/verify", "/v1/keys", "/v1/releases"):
                check_told(httpx2.get(second + path, timeout=PATIENCE_S), 503, "the index does not answer")
            for url, stale_s in zip(plant.urls, seen, strict=True):
                assert get(f"{url}/readyz") == {"status": "ok"}
                assert not get(f"{url}/v1/index")["up"]
                assert metric(url, "index_staleness_seconds") > stale_s
                assert plant.check_answers(url)["spam"] == before
            time.sleep(max(0.0, resume_s - time.monotonic()))
            assert min(metric(url, "index_staleness_seconds") for url in plant.urls) > PAUSE_S / 2
        finally:
            plant.redis.resume()
        plant.wait_until_index_is(True)
        assert promote(first, "spam", other).status_code == 200
        plant.wait_until("spam", other)
    assert metric(second, "index_staleness_seconds") < PAUSE_S / 2
    assert get(f"{first}/v1/audit/verify")["ok"]


def test_connections_cut_again_and_again_and_then_for_a_while(plant: Plant) -> None:
    first, second = plant.urls
    with plant.load():
        with operating([second]) as operator:
            cuts = 0
            for _ in range(8):
                operator.wait_for(2)
                cuts += plant.proxy.cut()
            assert cuts >= 8
        operator.check(first)
        plant.wait_until("spam", operator.acknowledged[-1][1])
        plant.proxy.is_open = False
        plant.proxy.cut()
        plant.wait_until_index_is(False, second)
        check_told(promote(second, "topic", 1), 503, "the index does not answer.*nothing was changed")
        before = champion(second, "topic")
        after = next(version for version in FIRST if version != before)
        assert promote(first, "topic", after).status_code == 200
        plant.wait_until("topic", after, first)
        assert champion(second, "topic") == before
        plant.proxy.is_open = True
        plant.wait_until("topic", after, second)
        plant.wait_until_index_is(True)


# -- operators ---------------------------------------------------------------------------------------------------------


def test_of_two_operators_who_promote_at_once_one_is_told_that_the_other_was_first(plant: Plant) -> None:
    with plant.load():
        for number in range(6):
            assert promote(plant.urls[0], "spam", 1).status_code == 200
            generation = get(f"{plant.urls[0]}/healthz")["generation"]
            barrier, answers = threading.Barrier(2), list[httpx2.Response]()

            def decide(url: str, version: int, barrier: threading.Barrier, seen: int, into: list[Any]) -> None:
                barrier.wait()
                into.append(promote(url, "spam", version, seen))

            asked = zip((plant.urls[0], plant.urls[number % 2]), (2, 3), strict=True)
            threads = [threading.Thread(target=decide, args=(*a, barrier, generation, answers)) for a in asked]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            done, refused = sorted(answers, key=lambda answer: answer.status_code)
            assert done.status_code == 200 and done.json()["generation"] == generation + 1
            check_told(refused, 409, f"the index is at generation {generation + 1} and no longer at {generation}")
            assert refused.headers["etag"] == f'"{generation + 1}"'
            plant.wait_until("spam", done.json()["traffic"]["champion"])


# -- artifacts ---------------------------------------------------------------------------------------------------------


def failures(url: str, version: str) -> dict[str, str]:
    return dict(get(f"{url}/v1/index")["failures"].get(version, {}))


def test_an_artifact_store_that_is_gone_for_a_while(plant: Plant) -> None:
    first = plant.urls[0]
    assert promote(first, "topic", 1).status_code == 200
    plant.wait_until("topic", 1)
    version = plant.publish(first, "topic", 4)
    aside = plant.store.with_name("elsewhere")
    with plant.load():
        plant.store.rename(aside)
        try:
            plant.approve(first, "topic", version)
            assert promote(first, "topic", version).status_code == 200
            wait_for(lambda: len(failures(first, f"topic@{version}")) == 2, PATIENCE_S)
            assert all(str(plant.store) in told for told in failures(first, f"topic@{version}").values())
            assert [plant.check_answers(url)["topic"] for url in plant.urls] == [1, 1]
            assert str(plant.store) in get(f"{plant.urls[1]}/info")["left_out"][f"topic@{version}"]
        finally:
            aside.rename(plant.store)
        plant.wait_until("topic", version)
        wait_for(lambda: not failures(first, f"topic@{version}"), PATIENCE_S)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def test_bits_that_flipped_in_the_store(plant: Plant) -> None:
    first = plant.urls[0]
    known = set(plant.store.glob("blobs/*/*"))
    assert promote(first, "spam", 1).status_code == 200
    plant.wait_until("spam", 1)
    version = plant.publish(first, "spam", 5)
    with plant.load():
        weights = max(set(plant.store.glob("blobs/*/*")) - known, key=lambda path: path.stat().st_size)
        flip(weights)
        plant.approve(first, "spam", version)
        assert promote(first, "spam", version).status_code == 200
        wait_for(lambda: len(failures(first, f"spam@{version}")) == 2, PATIENCE_S)
        told = failures(first, f"spam@{version}").values()
        assert all("adapter_model.safetensors is damaged in the artifact store" in each for each in told)
        assert all("publish the artifact again" in each for each in told)
        assert [plant.check_answers(url)["spam"] for url in plant.urls] == [1, 1]
        again = publish(first, "spam", plant.shelf.artifact("spam", 5))
        assert (again.status_code, again.json()["version"]) == (200, version)
        plant.wait_until("spam", version)
        wait_for(lambda: not failures(first, f"spam@{version}"), PATIENCE_S)


# -- servers -----------------------------------------------------------------------------------------------------------


def test_a_server_killed_in_the_middle_of_swaps_starts_without_index_and_store(plant: Plant) -> None:
    with operating([plant.urls[0]]) as operator:
        operator.wait_for(10)
        time.sleep(SAVED_S)
        plant.kill(0)
        wait_for(lambda: operator.cut > 0)
    operator.check(plant.urls[1])
    aside = plant.store.with_name("elsewhere")
    plant.redis.kill()
    plant.store.rename(aside)
    try:
        with plant.load(plant.urls[1]):
            url = plant.start(0)
            assert plant.check_answers(url)["spam"] in FIRST
            assert get(f"{url}/readyz") == {"status": "ok"}
            assert metric(url, "index_up") == 0
            assert any("starting from the last good state" in line for line in plant.servers[0].log)
            check_told(promote(url, "spam", 1), 503, "the index does not answer.*nothing was changed")
    finally:
        aside.rename(plant.store)
        plant.redis.start()
    with plant.load():
        plant.wait_until_index_is(True)
        for version in (1, 2):
            assert promote(url, "spam", version).status_code == 200
            plant.wait_until("spam", version)
        assert [get(f"{url}/v1/index")["regressed"] for url in plant.urls] == [None, None]


# -- an index that lost something --------------------------------------------------------------------------------------


def replace_files(redis: RedisServer, content: bytes | None) -> None:
    redis.kill()
    (redis.folder / "appendonly.aof").unlink()
    if content is not None:
        (redis.folder / "appendonly.aof").write_bytes(content)
    redis.start()


def regressed(url: str) -> str:
    return str(get(f"{url}/v1/index")["regressed"])


def test_an_emptied_index_is_told_and_restored(plant: Plant) -> None:
    before = plant.check_answers(plant.urls[0])
    generation = get(f"{plant.urls[0]}/healthz")["generation"]
    with plant.load():
        replace_files(plant.redis, None)
        for url in plant.urls:
            wait_for(lambda url=url: "the index was emptied" in regressed(url), PATIENCE_S)
            assert "the traffic of spam, the traffic of topic" in regressed(url)
            assert plant.check_answers(url) == before
        answer = post(f"{plant.urls[0]}/v1/index/restore", reason="somebody emptied it")
        assert (answer.status_code, answer.json()["generation"]) == (200, generation + 1)
        plant.wait_until_settled()
        assert [plant.check_answers(url) for url in plant.urls] == [before, before]
        check_told(post(f"{plant.urls[0]}/v1/index/restore"), 409, "the index lost nothing")
        assert sorted(get(f"{plant.urls[1]}/v1/tasks/spam")["versions"]) == sorted(
            version for task, version in plant.seeds if task == "spam"
        )
        assert promote(plant.urls[1], "topic", 2).status_code == 200
        plant.wait_until("topic", 2)
    assert get(f"{plant.urls[0]}/v1/audit/verify")["ok"]


def test_an_older_index_is_told_and_accepted(plant: Plant) -> None:
    first, second = plant.urls
    backup = (plant.redis.folder / "appendonly.aof").read_bytes()
    version = plant.publish(first, "mood", 1)
    plant.approve(first, "mood", version)
    assert promote(first, "mood", version).status_code == 200
    plant.wait_until("mood", version)
    generation = get(f"{second}/healthz")["generation"]
    with plant.load():
        replace_files(plant.redis, backup)
        for url in plant.urls:
            wait_for(lambda url=url: f"went back from generation {generation}" in regressed(url), PATIENCE_S)
            assert f"other or missing: mood@{version}, the traffic of mood" in regressed(url)
            assert plant.check_answers(url, "mood") == {"mood": version}
        for number in range(5):  # it goes on, past where it was
            assert promote(first, "topic", FIRST[number % 2]).status_code == 200
        plant.wait_until("topic", 1)
        for url in plant.urls:
            assert plant.check_answers(url, "mood", "topic") == {"mood": version, "topic": 1}
            assert "the traffic of mood" in regressed(url)
    time.sleep(SAVED_S)
    plant.kill(1)
    with plant.load(first):
        second = plant.start(1)  # remembers it
        assert plant.check_answers(second, "mood", "topic") == {"mood": version, "topic": 1}
        assert "the traffic of mood" in regressed(second)
    with plant.load():
        answer = post(f"{second}/v1/index/accept", reason="the backup is right")
        assert answer.status_code == 200, answer.text
        plant.wait_until("mood", None)
        plant.wait_until_settled()
        assert all(get(f"{url}/v1/tasks/mood")["traffic"] is None for url in plant.urls)
        assert get(f"{first}/v1/audit/verify")["ok"]


# -- the index of our own ----------------------------------------------------------------------------------------------


def test_a_server_killed_in_the_middle_of_swaps_adopts_its_redis_and_mends_its_cache(shelf: Shelf) -> None:
    with tempfile.TemporaryDirectory(prefix="home-") as name, contextlib.ExitStack() as opened:
        folder = Path(name)
        home, prefixes = folder / "home", shelf.prefixes(folder / "prefixes", "spam", "topic")
        arguments = (
            "--port",
            "0",
            "--threads",
            "1",
            "--dtype",
            "float32",
            "--home",
            str(home),
            "--prefixes",
            str(prefixes),
        )
        seeds = {(task, version): version for task in ("spam", "topic") for version in FIRST}

        def start() -> tuple[ServerProcess, str]:
            server = opened.enter_context(ServerProcess("app.cli", "serve", *arguments, "--drain-grace-s", "0"))
            return server, server.wait_until_ready()

        def redis_pid() -> int:
            with Redis(unix_socket_path=str(home / "index" / "redis.sock")) as client:
                return int(client.info()["process_id"])

        server, url = start()
        pid = redis_pid()
        opened.callback(end, pid, home)
        with operating([url]) as operator:
            operator.wait_for(10)
            server.process.kill()
            wait_for(lambda: operator.cut > 0)
        server.wait()
        for file in home.glob("cache/*/adapter_model.safetensors"):
            flip(file)

        server, url = start()
        assert redis_pid() == pid
        result = post(f"{url}/v1/predict", inputs=TEXTS[0], tasks=["spam", "topic"]).json()["results"][0]
        assert faults_of(result, TEXTS[0], shelf, seeds) == []
        operator.check(url)
        assert any("is damaged and is fetched again" in line for line in server.log)
        assert get(f"{url}/info")["left_out"] == {}
        assert result["spam"]["version"] == audit(url, "spam")[-1]["after"]["traffic"]["champion"]

        load = Load([url], shelf, seeds)
        load.start()
        os.kill(pid, signal.SIGKILL)  # and the server starts it again
        wait_for(lambda: promote(url, "topic", 1).status_code == 200, PATIENCE_S)
        assert redis_pid() != pid
        opened.callback(end, redis_pid(), home)
        load.stop()
        assert (load.failed, load.wrong) == ([], [])
        operator.check(url)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        wait_for(lambda: not is_running(redis_pid))


def end(pid: int, home: Path) -> None:
    """Where it is still the redis-server of that home."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if str(home) in " ".join(process.cmdline()):
            process.kill()


def is_running(redis_pid: Callable[[], int]) -> bool:
    try:
        redis_pid()
    except OSError:
        return False
    except Exception:  # redis-py's own
        return False
    return True
