"""Fixtures that several packages of tests share. No test reads the settings of the machine that it runs on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.config import Settings, load_settings
from app.service.runtime import Runtime
from tests.fakes import FakeEngine, FakeTokenizer, make_runtime


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("MANIFOLD_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MANIFOLD_HOME", str(tmp_path / ".home"))
    monkeypatch.setitem(Settings.model_config, "env_file", None)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings({"prefixes": tmp_path, "payload_limit_bytes": 300_000})


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def tokenizer() -> FakeTokenizer:
    return FakeTokenizer()


@pytest.fixture
def runtime(settings: Settings, engine: FakeEngine, tokenizer: FakeTokenizer) -> Iterator[Runtime]:
    opened = make_runtime(settings, engine, tokenizer=tokenizer)
    yield opened
    opened.close()
