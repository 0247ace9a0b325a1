"""A real index and store for what follows them."""

from __future__ import annotations

from tests.registry.conftest import client, index, redis_server

__all__ = ["client", "index", "redis_server"]
