"""The health checks of the image and of the compose file, run as Docker runs them: 0 where it is well, else not."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from redis import Redis

from app.config import Settings
from app.main import create_app
from app.service.runtime import Runtime
from tests.docker.files import DOCKER, SERVICES
from tests.registry.redis_server import RedisServer
from tests.serving import running

PASSWORD = "in-the-index-only"
needs_redis_cli = pytest.mark.skipif(shutil.which("redis-cli") is None, reason="redis-cli is not installed")


@pytest.fixture
def app(settings: Settings, runtime: Runtime) -> FastAPI:
    return create_app(settings, runtime)


def ready(port: int | str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DOCKER / "ready.py")]
    environment = {**os.environ, "MANIFOLD_PORT": str(port)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20, check=False)


def test_a_server_is_healthy_for_as_long_as_it_is_ready(app: FastAPI, runtime: Runtime) -> None:
    with running(app) as url:
        port = url.rpartition(":")[2]
        done = ready(port)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        runtime.admission.drain()
        done = ready(port)
        assert done.returncode == 1 and "503" in done.stderr


def test_where_nobody_listens_nobody_is_healthy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    done = ready(port)
    assert done.returncode == 1 and f"127.0.0.1:{port}" in done.stderr


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    server.start()
    with Redis.from_url(server.url) as client:
        client.config_set("requirepass", PASSWORD)
    yield server
    server.kill()


def check_redis(server: RedisServer, password: str) -> int:
    """The compose file's own line; its redis-cli asks the server of the test."""
    tools = server.folder / "tools"
    tools.mkdir(exist_ok=True)
    cli = tools / "redis-cli"
    cli.write_text(f'#!/bin/sh\nexec {shutil.which("redis-cli")} -s {server.socket} "$@"\n')
    cli.chmod(0o755)
    kind, command = SERVICES["redis"]["healthcheck"]["test"]
    assert kind == "CMD-SHELL"
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "REDISCLI_AUTH": password}
    return subprocess.run(
        ["/bin/sh", "-c", command], env=environment, capture_output=True, timeout=20, check=False
    ).returncode


@needs_redis_cli
def test_redis_is_healthy_while_it_answers_those_who_have_its_password(redis_server: RedisServer) -> None:
    assert check_redis(redis_server, PASSWORD) == 0
    assert check_redis(redis_server, "another") != 0, "redis-cli itself says 0 of a refusal"
    redis_server.kill()
    assert check_redis(redis_server, PASSWORD) != 0
