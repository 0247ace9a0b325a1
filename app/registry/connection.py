"""The connection to Redis: a URL becomes a client, and Redis's errors become ours. Knows no keys."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.retry import Retry

from app.errors import SettingsError, UnavailableError

TIMEOUT_S = 2.0
_HEALTH_CHECK_S = 15
_SCHEMES = ("redis", "rediss", "unix")
_ANY_OTHER = "give the URL of one Redis: redis://, rediss:// or unix://"


def connect(url: str) -> Redis:
    """A client of one Redis, which need not be there yet. Credentials stand in the URL: redis://user:password@host:6379/0.

    Raises SettingsError for a URL that cannot work, and for a Redis that says that it cannot hold the index. No
    sentence has the password.
    """
    _check(url)
    try:
        client = Redis.from_url(
            url,
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
            health_check_interval=_HEALTH_CHECK_S,
            retry=Retry(NoBackoff(), 1, (RedisConnectionError,)),  # a connection may have gone while it was idle
            client_name="manifold",
        )
        client.connection_pool.make_connection()
    except (ValueError, TypeError, RedisError) as error:
        raise SettingsError(f"the Redis URL {public_url(url)} cannot be used: {error}") from None
    _check_role(client, url)
    return client


def public_url(url: str) -> str:
    """The URL for people: without credentials and options."""
    scheme, separator, rest = url.partition("://")
    return scheme + separator + rest.partition("?")[0].rpartition("@")[2]


@contextmanager
def reached() -> Iterator[None]:
    """Raises UnavailableError for all that Redis, or the way to it, can do wrong."""
    try:
        yield
    except RedisError as error:
        raise UnavailableError(f"the index does not answer, try again later: {error}") from error


def _check(url: str) -> None:
    scheme, found, rest = url.partition("://")
    if not found:
        raise SettingsError(f"the Redis URL has no scheme: {_ANY_OTHER}")
    if "sentinel" in scheme or "cluster" in scheme:
        raise SettingsError(f"{scheme}:// is not supported, the index lives in one Redis: {_ANY_OTHER}")
    if scheme not in _SCHEMES:
        raise SettingsError(f"the Redis URL begins with {scheme[:20]}://: {_ANY_OTHER}")
    if "," in rest.rpartition("@")[2].partition("/")[0]:
        raise SettingsError(f"the Redis URL names several hosts: {_ANY_OTHER}")
    database = "" if scheme == "unix" else _path(url)
    if not re.fullmatch(r"(/\d*)?", database):
        raise SettingsError(f"the Redis URL {public_url(url)} has {database} where a database's number may stand")


def _check_role(client: Redis, url: str) -> None:
    """What a Redis that does not answer now cannot tell is told by the first change that it refuses."""
    try:
        info = client.info()
    except RedisError:
        return
    where = f"the Redis at {public_url(url)}"
    if info.get("redis_mode") in ("cluster", "sentinel"):
        raise SettingsError(f"{where} is a {info['redis_mode']} node, and the index lives in one Redis: {_ANY_OTHER}")
    if info.get("role") == "slave":
        raise SettingsError(f"{where} is a replica, and the index is written: give the URL of its primary")


def _path(url: str) -> str:
    try:
        return urlsplit(url).path
    except ValueError as error:
        raise SettingsError(f"the Redis URL {public_url(url)} cannot be used: {error}") from None
