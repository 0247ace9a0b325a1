"""Clients of the application: one that calls and waits, one for several calls at once, one over a real socket."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import httpx2
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.types import Receive, Scope, Send

from app.config import Settings
from app.main import create_app
from app.rollout import Role
from app.service.access import EVERYBODY
from app.service.runtime import Runtime
from tests.fake_rollout import FakeRollout
from tests.serving import running


@pytest.fixture
def app(settings: Settings, runtime: Runtime) -> FastAPI:
    return create_app(settings, runtime)


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app, base_url="http://127.0.0.1") as opened:
        yield opened


@pytest.fixture
def rollout(runtime: Runtime) -> FakeRollout:
    assert isinstance(runtime.rollout, FakeRollout)
    return runtime.rollout


@pytest.fixture
def headers_of(rollout: FakeRollout) -> Callable[..., dict[str, str]]:
    """Makes a key and gives the header that holds it. From the first one on the server asks everybody for a key."""

    def make(name: str, *roles: Role) -> dict[str, str]:
        _, token = rollout.create_key(EVERYBODY, name, frozenset(roles))
        return {"authorization": f"Bearer {token}"}

    return make


@pytest.fixture
def url(app: FastAPI) -> Iterator[str]:
    with running(app) as address:
        yield address


@pytest.fixture
async def async_client(app: FastAPI) -> AsyncIterator[httpx2.AsyncClient]:
    async with _in_process(app) as opened:
        yield opened


@asynccontextmanager
async def _in_process(app: FastAPI) -> AsyncIterator[httpx2.AsyncClient]:
    async with app.router.lifespan_context(app) as state:

        async def with_state(scope: Scope, receive: Receive, send: Send) -> None:
            await app(scope | {"state": dict(state)}, receive, send)

        transport = httpx2.ASGITransport(with_state)
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as opened:
            yield opened
