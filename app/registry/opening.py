"""Opens all that the registry consists of, from settings to connections: index, store, last good state.

The only place that knows what lies where below the home folder.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from redis import Redis

from app.errors import SettingsError
from app.registry.connection import connect, public_url
from app.registry.embedded import EmbeddedRedis
from app.registry.index import Index
from app.registry.last_good import LastGood
from app.registry.saved_windows import SavedWindows, claimed_windows
from app.registry.store import ArtifactStore


@dataclass(frozen=True, slots=True)
class Registry:
    redis: Redis
    index: Index
    store: ArtifactStore
    last_good: LastGood
    windows: SavedWindows
    shown_url: str  # of the index, without credentials
    abandon: Callable[[], None]  # ends an index of our own, when the process is about to end without closing
    revive: Callable[[], None] | None  # starts an index of our own again; None where it is somebody else's


@contextlib.contextmanager
def open_registry(
    home: Path, redis_url: str | None, artifacts_url: str | None, cache_limit_bytes: int
) -> Iterator[Registry]:
    """Without `redis_url` a redis-server of our own is started, and ended at the end. Raises SettingsError."""
    home = home.absolute()
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"the home folder {home} cannot be made: {error.strerror or error}") from error
    with contextlib.ExitStack() as opened:
        revive, abandon = None, _nothing
        if redis_url is None:
            embedded = EmbeddedRedis(home)
            opened.callback(embedded.close)
            embedded.ensure_running()
            redis_url, revive, abandon = embedded.url, embedded.ensure_running, embedded.close
            shown_url = f"embedded in {home}"
        else:
            shown_url = public_url(redis_url)
        redis = connect(redis_url)
        opened.callback(redis.close)
        store = ArtifactStore(artifacts_url or f"file://{home / 'artifacts'}", home / "cache", cache_limit_bytes)
        last_good = LastGood(home / "last-good.json")
        windows = opened.enter_context(claimed_windows(home / "drift-windows"))
        yield Registry(redis, Index(redis), store, last_good, windows, shown_url, abandon, revive)


def _nothing() -> None:
    """What there is to do for an index that is somebody else's."""
