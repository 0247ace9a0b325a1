"""Servers for tests: an application in a thread, and the command in a process of its own, on free loopback ports."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from fastapi import FastAPI

ROOT = Path(__file__).resolve().parents[1]
_START_S = 60.0
READY = re.compile(r"ready at (http://\S+) ")


@contextlib.contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """The address of `app`, served by uvicorn in a thread."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, http="httptools", ws="none", log_config=None, timeout_graceful_shutdown=2)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)


def wait_for(condition: object, timeout_s: float = 10.0) -> None:
    assert callable(condition)
    until_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until_s, "it did not happen in time"
        time.sleep(0.01)


async def until(condition: object, timeout_s: float = 10.0) -> None:
    """`wait_for` inside a coroutine."""
    assert callable(condition)
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


class ServerProcess:
    """`python -m <module> <arguments>`, its log, and the address that its ready line names."""

    def __init__(self, module: str, *arguments: str) -> None:
        self.log: list[str] = []
        self.reads = threading.Event()  # cleared: nobody reads what it writes
        self.reads.set()
        self._home = tempfile.TemporaryDirectory(prefix="home-")
        if "serve" in arguments and "--home" not in arguments:
            arguments = (*arguments, "--home", self._home.name)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MANIFOLD_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env=environment | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            for _ in range(2):  # the second ends it at once, its own redis-server with it
                self.process.terminate()
                time.sleep(0.05)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()
        self.reads.set()
        self._reader.join(5)
        assert self.process.stderr is not None
        self.process.stderr.close()
        self._home.cleanup()

    def wait_until_ready(self) -> str:
        wait_for(lambda: READY.search("".join(self.log)) or self.process.poll() is not None, _START_S)
        found = READY.search("".join(self.log))
        assert found is not None, "".join(self.log)
        return found[1]

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 20.0) -> int:
        status = self.process.wait(timeout_s)
        self.reads.set()
        self._reader.join(5)
        return status

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            self.reads.wait()
