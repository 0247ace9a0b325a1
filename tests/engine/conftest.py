"""Engines over tiny random encoders. Real forward passes, in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from app.engine.engine import Engine
from tests.engine.models import tiny_backbone


@pytest.fixture
def make_engine() -> Iterator[Callable[..., Engine]]:
    """An engine of a family, started; closed when the test ends."""
    engines: list[Engine] = []

    def make(family: str = "bert", **options: object) -> Engine:
        engine = Engine(tiny_backbone(family), **options)
        engines.append(engine)
        engine.start()
        return engine

    yield make
    for engine in engines:
        engine.close()
