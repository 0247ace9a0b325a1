"""From the command to ready, with the shipped tasks: a real process, asked over HTTP."""

from __future__ import annotations

import time

import httpx2

from tests.serving import ServerProcess


def measure_startup() -> float:
    """Seconds from starting `manifold serve` until /readyz answers 200."""
    began = time.perf_counter()
    with ServerProcess("app.cli", "serve", "--port", "0") as server:
        httpx2.get(f"{server.wait_until_ready()}/readyz").raise_for_status()
        return time.perf_counter() - began
