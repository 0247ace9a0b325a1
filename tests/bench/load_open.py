"""Open-loop load: requests leave when they are due (a Poisson stream), however slow answers are; wrk cannot do that.

Also one caller alone on one connection. Speaks HTTP/1.1 itself, so that little of what is measured is its own.
"""

from __future__ import annotations

import asyncio
import gc
import random
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

import httptools
import uvloop

_STAGES = ("tokenization", "queue", "inference", "total")


@dataclass(frozen=True)
class Answer:
    due_s: float  # since the run began
    late_s: float  # how much later than due the generator sent it
    duration_s: float  # from when it was due until the answer's last byte
    status: int
    headers: dict[str, str]


class _Response:
    """What httptools calls while it reads answers of one connection."""

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.is_complete = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode().lower()] = value.decode()

    def on_message_complete(self) -> None:
        self.is_complete = True


class _Connection(asyncio.Protocol):
    """One request at a time."""

    def __init__(self) -> None:
        self.is_open = True
        self._answered: asyncio.Future[tuple[int, dict[str, str]]] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def ask(self, request: bytes) -> asyncio.Future[tuple[int, dict[str, str]]]:
        self._response = _Response()
        self._parser = httptools.HttpResponseParser(self._response)
        self._answered = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._answered

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)
        if self._response.is_complete and self._answered is not None:
            self._answered.set_result((self._parser.get_status_code(), self._response.headers))
            self._answered = None

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        if self._answered is not None:
            self._answered.set_exception(exc or ConnectionResetError("the server closed the connection"))
            self._answered = None

    def close(self) -> None:
        self._transport.close()


def run_open(url: str, path: str, bodies: Sequence[bytes], rate_s: float, seconds: float, seed: int) -> list[Answer]:
    """Every request that was due within `seconds`, with its answer; connections are opened as they are needed."""
    gc.collect()
    gc.disable()
    try:
        return uvloop.run(_run_open(url, path, bodies, list(_due(rate_s, seconds, seed))))
    finally:
        gc.enable()


async def _run_open(url: str, path: str, bodies: Sequence[bytes], due: Sequence[float]) -> list[Answer]:
    address, idle, answers = urlsplit(url), list[_Connection](), list[Answer]()
    loop = asyncio.get_running_loop()
    requests = [as_request(url, path, bodies[index % len(bodies)]) for index in range(len(due))]
    began_s = loop.time()

    async def ask(request: bytes, due_s: float) -> None:
        late_s = loop.time() - began_s - due_s
        try:
            connection = idle.pop() if idle else await _connect(address.hostname or "", address.port or 80)
            if not connection.is_open:
                raise ConnectionResetError("the server closed an idle connection")
            status, headers = await connection.ask(request)
            idle.append(connection)
        except OSError:
            status, headers = 0, {}
        answers.append(Answer(due_s, late_s, loop.time() - began_s - due_s, status, headers))

    async with asyncio.TaskGroup() as group:
        for request, due_s in zip(requests, due, strict=True):
            await asyncio.sleep(max(0.0, began_s + due_s - loop.time()))
            group.create_task(ask(request, due_s))
    for connection in idle:
        connection.close()
    return answers


async def _connect(host: str, port: int) -> _Connection:
    _, connection = await asyncio.get_running_loop().create_connection(_Connection, host, port)
    return connection


def _due(rate_s: float, seconds: float, seed: int) -> Iterator[float]:
    drawn, at_s = random.Random(seed), 0.0
    while (at_s := at_s + drawn.expovariate(rate_s)) < seconds:
        yield at_s


def run_alone(url: str, path: str, bodies: Sequence[bytes]) -> list[Answer]:
    """One caller, who asks again as soon as an answer is there, from a thread that waits in the kernel."""
    address, answers = urlsplit(url), []
    with socket.create_connection((address.hostname or "", address.port or 80)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for body in bodies:
            request = as_request(url, path, body)
            response = _Response()
            parser = httptools.HttpResponseParser(response)
            began_s = time.perf_counter()
            connection.sendall(request)
            while not response.is_complete:
                parser.feed_data(connection.recv(1 << 16))
            duration_s = time.perf_counter() - began_s
            answers.append(Answer(0.0, 0.0, duration_s, parser.get_status_code(), response.headers))
    return answers


def stages(answers: Sequence[Answer]) -> list[float]:
    """Medians in milliseconds: latency, engine, what is beside it, and that in four parts.

    Tokenizing, queue, HTTP and threads, socket and client. The server says its own in headers.
    """
    found = []
    for answer in answers:
        tokenization, queue, engine, total = (float(answer.headers[f"x-{stage}-time"]) for stage in _STAGES)
        latency = 1000 * answer.duration_s
        threads = total - tokenization - queue - engine
        found.append((latency, engine, latency - engine, tokenization, queue, threads, latency - total))
    return [statistics.median(column) for column in zip(*found, strict=True)]


def as_request(url: str, path: str, body: bytes) -> bytes:
    host = urlsplit(url).netloc
    head = (
        f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
