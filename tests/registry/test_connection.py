"""URLs of Redis: which ones work, and the sentence for each that does not."""

from __future__ import annotations

import re

import pytest
from redis import Redis

from app.errors import SettingsError, UnavailableError
from app.registry.connection import connect, public_url
from app.registry.index import Index
from tests.registry.redis_server import RedisServer

NOBODY = "redis://127.0.0.1:1"


def test_a_socket_is_reached(redis_server: RedisServer) -> None:
    with connect(redis_server.url) as client:
        assert client.ping()
    with connect(redis_server.url + "?db=3") as client:
        assert client.ping()
        assert client.get_connection_kwargs()["db"] == 3


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("localhost:6379", "the Redis URL has no scheme"),
        ("", "the Redis URL has no scheme"),
        ("http://localhost", "the Redis URL begins with http://: give the URL of one Redis"),
        ("redis+sentinel://a:secret@h:26379/mymaster", "redis+sentinel:// is not supported"),
        ("sentinel://a,b/mymaster", "sentinel:// is not supported"),
        ("rediss-cluster://h:6379", "rediss-cluster:// is not supported"),
        ("redis://:secret@a:1,b:2/0", "the Redis URL names several hosts"),
        ("redis://:secret@h:6379/mymaster", "redis://h:6379/mymaster has /mymaster where a database's number may"),
        ("redis://u:secret@h:port/0", "redis://h:port/0 cannot be used"),
        ("redis://u:secret@h:99999/0", "redis://h:99999/0 cannot be used"),
        ("redis://u:secret@[::1/0", "redis://[::1/0 cannot be used"),
        ("redis://u:secret@h?timeout=3", "redis://h cannot be used"),
        ("redis://u:secret@h?socket_timeout=long", "redis://h cannot be used"),
        ("rediss://u:secret@h?ssl_cert_reqs=secret", "rediss://h cannot be used"),
    ],
)
def test_a_url_that_cannot_work_is_a_sentence(url: str, sentence: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(sentence)) as caught:
        connect(url)
    assert "secret@" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:pass@host:6379/0?socket_timeout=1", "redis://host:6379/0"),
        ("rediss://:p@ss@host", "rediss://host"),
        ("unix://user:pass@/run/redis.sock?db=1", "unix:///run/redis.sock"),
        ("redis://host", "redis://host"),
    ],
)
def test_people_see_no_credentials(url: str, shown: str) -> None:
    assert public_url(url) == shown


def test_a_redis_that_is_not_there_yet_is_no_error_until_it_is_used() -> None:
    with connect(NOBODY) as client, pytest.raises(UnavailableError, match="the index does not answer, try again"):
        Index(client).pulse()


def test_credentials_are_in_the_url_and_in_no_sentence(redis_server: RedisServer, client: Redis) -> None:
    client.execute_command("ACL", "SETUSER", "ann", "on", ">mellon", "~*", "&*", "+@all")
    client.execute_command("ACL", "SETUSER", "default", "resetpass", ">other")
    with connect(f"unix://ann:mellon@{redis_server.socket}") as named:
        assert named.ping()
    with connect(f"unix://ann:mellow@{redis_server.socket}") as wrong:
        with pytest.raises(UnavailableError) as caught:
            Index(wrong).pulse()
        assert "mell" not in str(caught.value)


def test_a_replica_is_refused(redis_server: RedisServer, client: Redis) -> None:
    client.replicaof("127.0.0.1", 1)
    with pytest.raises(SettingsError, match="is a replica, and the index is written: give the URL of its primary"):
        connect(redis_server.url)


@pytest.mark.parametrize("mode", ["cluster", "sentinel"])
def test_other_kinds_of_redis_are_refused(
    redis_server: RedisServer, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster node would need a port here, so only what it says of itself is another."""
    monkeypatch.setattr(Redis, "info", lambda _: {"redis_mode": mode, "role": "master"})
    with pytest.raises(SettingsError, match=f"is a {mode} node, and the index lives in one Redis"):
        connect(redis_server.url)


def test_a_replica_that_became_one_later_refuses_changes_with_a_sentence(client: Redis, index: Index) -> None:
    client.replicaof("127.0.0.1", 1)
    with pytest.raises(UnavailableError, match="refused the change, nothing was changed.*read only"):
        index.note("ann", "note", None, "", {})
    client.replicaof("NO", "ONE")
    index.note("ann", "note", None, "", {})
