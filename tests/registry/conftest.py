"""A redis-server of its own for each test, and an index in it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from app.registry.connection import connect
from app.registry.index import Index
from tests.registry.redis_server import RedisServer


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    folder = Path(tempfile.mkdtemp(prefix="redis-"))  # short: a socket's path has 107 bytes at most
    server = RedisServer(folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder)


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[Redis]:
    with connect(redis_server.url) as client:
        yield client


@pytest.fixture
def index(client: Redis) -> Index:
    return Index(client)
