"""The server's process: a socket that is bound early, uvicorn with a drain of our own, what is said when it is ready.

Knows the application by its runtime alone, and nothing of what it serves.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from app.config import Settings
from app.errors import SettingsError
from app.service.runtime import Runtime

logger = logging.getLogger("manifold")

_KEEP_ALIVE_S = 75  # longer than the idle time of common load balancers, so that they close first and never race us
_CLOSE_S = 2  # for the last bytes of answers, after drain_timeout_s
# Requests leave hardly any cycles behind, and Python's own threshold of 700 objects has it look for them every tenth
# request: a sixth of what the event loop does for one.
_GC_THRESHOLDS = (20_000, 20, 20)


class Server(uvicorn.Server):
    """uvicorn with a drain of our own: it would stop listening before readiness could tell anybody.

    First signal: ready turns 503 and new work is refused, what is in flight goes on; the listener stays open for
    `drain_grace_s`, and as long as something is in flight up to `drain_timeout_s`; then the process ends with status 0.
    A second signal ends it at once.
    """

    def __init__(self, app: FastAPI, runtime: Runtime, listener: socket.socket, began_s: float) -> None:
        config = uvicorn.Config(
            app,
            http="httptools",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # whoever connects is the client: a header could name anybody
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_CLOSE_S,
        )
        super().__init__(config)
        self._runtime = runtime
        self._listener = listener
        self._began_s = began_s
        self._draining: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's hook: the signals are ours, and it must not raise them again at the end."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        gc.collect()
        gc.freeze()  # else each full collection walks all that was imported and loaded: 0.4 s in which nobody is served
        gc.set_threshold(*_GC_THRESHOLDS)
        logger.info(_ready_line(self._runtime, self._listener, time.monotonic() - self._began_s))

    def _on_signal(self, number: int) -> None:
        if self._draining is not None:
            self._runtime.abandon()
            logging.shutdown()
            os._exit(128 + number)
        self._runtime.admission.drain()
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        settings, admission = self._runtime.settings, self._runtime.admission
        logger.info("draining for %g s: a second signal exits at once", settings.drain_grace_s)
        signalled_s = time.monotonic()
        await asyncio.sleep(settings.drain_grace_s)
        while admission.in_flight and time.monotonic() - signalled_s < settings.drain_timeout_s:
            await asyncio.sleep(0.02)
        if admission.in_flight:
            logger.warning("%d requests did not end in %g s", admission.in_flight, settings.drain_timeout_s)
        self.should_exit = True


def bound_socket(settings: Settings) -> socket.socket:
    """Taken before the seconds of loading, so that a port in use is told at once. It listens only when all is ready."""
    with contextlib.ExitStack() as undo:
        try:
            addresses = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)
            family, kind, protocol, _, address = addresses[0]
            listener = undo.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError as error:
            raise cannot_listen(settings, error) from error
        undo.pop_all()
    return listener


def cannot_listen(settings: Settings, error: OSError) -> SettingsError:
    return SettingsError(f"cannot listen on {settings.host} port {settings.port}: {error.strerror or error}")


def _ready_line(runtime: Runtime, listener: socket.socket, duration_s: float) -> str:
    host, port = listener.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    spec, names = runtime.engine.spec, sorted(runtime.catalog.snapshot.tasks)
    live = f"{len(names)} tasks ({', '.join(names)})" if names else "no tasks"
    return f"ready at {address} with {spec.name} on {spec.device} in {spec.dtype}, {live}, after {duration_s:.1f} s"
