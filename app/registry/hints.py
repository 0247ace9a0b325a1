"""Hears that the index changed, at once. Only a hint: it may be lost, so whoever follows also asks now and then."""

from __future__ import annotations

import contextlib
import time

from redis import Redis
from redis.client import PubSub
from redis.exceptions import RedisError

from app.registry.schema import HINTS

_QUIET_S = 0.2  # between tries to connect


class Hints:
    """A connection of its own, which is made again where it is lost. For one thread."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._channel: PubSub | None = None

    def wait(self, timeout_s: float) -> bool:
        """True where there may be something new: a hint came, or the connection was lost or made. Never raises."""
        try:
            return self._heard(timeout_s)
        except (RedisError, OSError, ValueError):  # ValueError: its socket was closed while it waited
            self.close()
            time.sleep(min(timeout_s, _QUIET_S))
            return True

    def close(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            with contextlib.suppress(RedisError, OSError):
                channel.close()

    def _heard(self, timeout_s: float) -> bool:
        """That we are subscribed, now or again, is a message as well."""
        if self._channel is None:
            self._channel = PubSub(self._redis.connection_pool)
            self._channel.subscribe(HINTS)
        heard = self._channel.get_message(timeout=timeout_s) is not None
        while self._channel.get_message(timeout=0) is not None:
            heard = True
        return heard
