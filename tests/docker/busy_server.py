"""A real server, and what can happen to it within some seconds: traffic, errors, swaps, a Redis that goes away."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from safetensors.numpy import load_file, save_file

from app.client.http import Server
from app.client.publish import approve, publish, read_folder
from app.config import SHIPPED_PREFIXES
from app.domain import BackboneSpec
from app.engine.backbone import Backbone
from app.errors import ManifoldError
from tests.artifacts import write_artifact
from tests.registry.redis_server import RedisServer
from tests.serving import ServerProcess, wait_for

PERMITS = 4
_BASELINE = json.loads((SHIPPED_PREFIXES / "spam/manifest.json").read_text("utf-8"))["score_baseline"]
TENSORS = "adapter_model.safetensors"


class BusyServer:
    """`spam` has a champion, a challenger and a shadow, `stars` a number, `slots` spans, and `broken` fails always."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spec: BackboneSpec = Backbone.load("embedded", "cpu", "float32").spec
        self.redis = RedisServer(folder / "redis")
        self.faults: list[BaseException] = []
        self._ended = threading.Event()
        for name in ("redis", "prefixes"):
            (folder / name).mkdir()

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        """Its address, while it is ready and not yet busy."""
        prefixes = self.folder / "prefixes"
        write_artifact(prefixes / "spam", self.spec, "spam", ("ham", "spam"), score_baseline=_BASELINE)
        write_artifact(prefixes / "gated", self.spec, "gated", ("ham", "spam"))
        write_artifact(prefixes / "stars", self.spec, "stars", (), "regression")
        write_artifact(prefixes / "slots", self.spec, "slots", ("O", "B-who", "I-who"), "token_classification")
        _break(write_artifact(prefixes / "broken", self.spec, "broken", ("no", "yes")))
        self.redis.start()
        options = ("--port", "0", "--device", "cpu", "--dtype", "float32", "--prefixes", str(prefixes))
        index = ("--redis-url", self.redis.url, "--home", str(self.folder / "home"), "--index-poll-ms", "200")
        log = ("--prediction-log", str(self.folder / "predictions"))
        limits = ("--max-concurrent-requests", str(PERMITS), "--drain-grace-s", "0", "--no-log-requests")
        try:
            with ServerProcess("app.cli", "serve", *options, *index, *limits, *log) as process:
                self.url = process.wait_until_ready()
                self.server = Server(self.url)
                yield self.url
        finally:
            self.redis.kill()

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Predictions and errors all the time; beside them the changes, one after the other, and then swaps."""
        threads = [threading.Thread(target=self._guarded, args=(work,), daemon=True) for work in (self._ask, self._run)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._ended.set()
            for thread in threads:
                thread.join(20)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as fault:  # a thread's own would only be printed
            self.faults.append(fault)

    # -- who asks ------------------------------------------------------------------------------------------------------

    def _ask(self) -> None:
        number = 0
        with httpx2.Client(base_url=self.url, trust_env=False, timeout=20) as client:
            while not self._ended.is_set():
                number += 1
                self._ask_once(client, number)
                if number % 20 == 0:
                    self._overload()
                    self._leave(number)

    def _ask_once(self, client: httpx2.Client, number: int) -> None:
        text = f"You have won prize {number // 2}!"  # every other one is in the cache
        bodies = [{"inputs": text, "unit": str(number)}, {"inputs": [text, "hello"], "tasks": ["spam@1", "gated"]}]
        bodies += [{"inputs": "hello", "tasks": ["nowhere"]}, {"inputs": "word " * 2000, "tasks": ["spam"]}]
        codes = [client.post("/v1/predict", json=body).status_code for body in bodies]
        assert set(codes[:2]) <= {200, 429} and set(codes[2:]) <= {404, 422, 429}, codes
        client.post("/v1/embeddings", json={"input": f"a cat {number}", "model": "all-MiniLM-L6-v2"})
        client.get("/v1/tasks")

    def _overload(self) -> None:
        bodies = [{"inputs": f"{time.monotonic()} of {row}"} for row in range(5 * PERMITS)]
        with ThreadPoolExecutor(len(bodies)) as many:
            list(many.map(lambda body: httpx2.post(f"{self.url}/v1/predict", json=body, timeout=20), bodies))

    def _leave(self, number: int) -> None:
        """Before the answer, which takes longer than this client waits."""
        body = {"inputs": [f"{row} of {number} {'word ' * 100}" for row in range(32)]}
        with contextlib.suppress(httpx2.TimeoutException):
            httpx2.post(f"{self.url}/v1/predict", json=body, timeout=0.05)

    # -- who changes ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        second, third = (self._publish("spam", seed) for seed in (2, 3))
        gated = self._publish("gated", 9)
        self._traffic("spam", champion=1, challenger=second, canary_percent=50, shadow=[third])
        self._traffic("gated", champion=1, challenger=gated, canary_percent=50, gates=_TIGHT)
        self._lose_an_artifact(11)
        self._lose_redis()
        self._lose_an_artifact(12)  # once more, so that its counter grows and an alert goes on firing
        seed = 20
        while not self._ended.wait(0.5):  # a version that is new to the server, and a champion that was before
            seed += 1
            self._traffic("stars", champion=self._publish("stars", seed))
            self.server.ask("POST", "/v1/tasks/stars/rollback", {})

    def _publish(self, task: str, seed: int) -> int:
        kinds = {"stars": ((), "regression")}
        labels, kind = kinds.get(task, (("ham", "spam"), "single_label_classification"))
        folder = write_artifact(self.folder / f"{task}-{seed}", self.spec, task, labels, kind, seed=seed)
        record, _ = publish(self.server, task, read_folder(folder), "")
        return int(approve(self.server, record, "")["version"])

    def _traffic(self, task: str, **wish: Any) -> None:
        self.server.ask("PUT", f"/v1/tasks/{task}/traffic", wish)

    def _lose_an_artifact(self, seed: int) -> None:
        """Its files are gone from the store and from the cache by the time it is approved."""
        folder = write_artifact(self.folder / f"lost-{seed}", self.spec, "spam", ("ham", "spam"), seed=seed)
        record, _ = publish(self.server, "spam", read_folder(folder), "")
        digest = record["digest"].removeprefix("sha256:")
        for path in (self.folder / "home").rglob(f"*{digest[2:]}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        approve(self.server, record, "")

    def _lose_redis(self) -> None:
        """A change is answered 503 meanwhile."""
        self.redis.kill()
        with contextlib.suppress(ManifoldError):
            self._traffic("spam", champion=1)
        wait_for(lambda: not self.server.ask("GET", "/v1/index")["up"], 20)
        time.sleep(2.5)  # a scrape sees it
        self.redis.start()
        wait_for(lambda: self.server.ask("GET", "/v1/index")["up"], 20)


_TIGHT = {"max_disagreement": 0.0, "min_count": 5}


def _break(folder: Path) -> None:
    """Its scores are not finite, whatever the text."""
    tensors = load_file(folder / TENSORS)
    save_file({name: np.full_like(tensor, 3e38) for name, tensor in tensors.items()}, folder / TENSORS)
