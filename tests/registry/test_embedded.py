"""The redis-server that we start ourselves: shared by the servers of one home, and found again after a crash."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import RedisError

from app.errors import SettingsError, UnavailableError
from app.registry import embedded
from app.registry.connection import connect
from app.registry.embedded import EmbeddedRedis
from app.registry.index import Index

Start = Callable[[], EmbeddedRedis]


@pytest.fixture
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="home ü#?-") as folder:  # not every path is plain
        yield Path(folder)


@pytest.fixture
def start(home: Path) -> Iterator[Start]:
    """Another server of this home; all are closed at the end."""
    started: list[EmbeddedRedis] = []

    def make() -> EmbeddedRedis:
        server = EmbeddedRedis(home)
        started.append(server)
        server.ensure_running()
        return server

    yield make
    for server in started:
        server.close()


def pid(server: EmbeddedRedis) -> int:
    with connect(server.url) as client:
        return int(client.info("server")["process_id"])


def write(server: EmbeddedRedis, digest: str) -> None:
    with connect(server.url) as client:
        Index(client).publish("ann", "mood", digest, "{}", 1, "")


def digests(server: EmbeddedRedis) -> list[str]:
    with connect(server.url) as client:
        return [version.digest for version in Index(client).view().tasks["mood"].versions.values()]


def is_running(process_id: int) -> bool:
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_what_was_written_is_there_after_the_next_start(home: Path, start: Start) -> None:
    first = start()
    write(first, "sha256:a")
    old = pid(first)
    first.close()
    assert not is_running(old)
    first.close()
    second = start()
    assert digests(second) == ["sha256:a"]
    assert (home / "index" / "appendonly.aof").exists()


def test_it_is_ours_alone(start: Start) -> None:
    """No port, and a socket that only our user may use; every change is on disk before it is acknowledged."""
    server = start()
    with connect(server.url) as client:
        found = {name: client.config_get(name)[name] for name in ("port", "appendonly", "appendfsync", "unixsocket")}
    assert (found["port"], found["appendonly"], found["appendfsync"]) == ("0", "yes", "always")
    assert os.stat(found["unixsocket"]).st_mode & 0o077 == 0


def test_servers_of_one_home_share_it_and_the_last_one_ends_it(start: Start) -> None:
    first, second = start(), start()
    assert pid(first) == pid(second)
    write(first, "sha256:a")
    process_id = pid(first)
    first.close()
    assert digests(second) == ["sha256:a"]
    second.close()
    wait_until(lambda: not is_running(process_id))


def test_many_servers_that_start_at_once_start_one(home: Path) -> None:
    servers = [EmbeddedRedis(home) for _ in range(6)]
    threads = [threading.Thread(target=server.ensure_running) for server in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({pid(server) for server in servers}) == 1
    for server in servers:
        server.close()


def test_one_that_died_is_started_again_with_its_data(start: Start) -> None:
    server = start()
    write(server, "sha256:a")
    for number in range(2):
        old = pid(server)
        server.ensure_running()
        assert pid(server) == old
        os.kill(old, signal.SIGKILL)
        wait_until(lambda: not Path(f"/proc/{old}").exists())  # noqa: B023  # with all its threads and sockets
        server.ensure_running()
        assert pid(server) != old
        write(server, f"sha256:{number}")
    assert digests(server) == ["sha256:a", "sha256:0", "sha256:1"]


def test_an_orphan_of_a_killed_server_is_used_and_ended(home: Path, start: Start) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom app.registry.embedded import EmbeddedRedis\n"
        "server = EmbeddedRedis(Path(sys.argv[1]))\nserver.ensure_running()\nprint(flush=True)\ntime.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(home)], stdout=subprocess.PIPE) as killed:
        assert killed.stdout is not None
        killed.stdout.readline()
        server = EmbeddedRedis(home)
        with connect(server.url) as client:
            orphan = int(client.info("server")["process_id"])
        killed.kill()
    write(server, "sha256:a")
    server.ensure_running()
    assert pid(server) == orphan
    server.close()
    wait_until(lambda: not is_running(orphan))
    assert digests(start()) == ["sha256:a"]


def test_once_closed_nobody_starts_it_again(start: Start) -> None:
    server = start()
    process_id = pid(server)
    server.close()
    wait_until(lambda: not is_running(process_id))
    with pytest.raises(UnavailableError, match="the server ends"):
        server.ensure_running()
    with pytest.raises(RedisError):
        pid(server)


def test_one_that_is_merely_slow_gets_no_rival(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_ANSWER_S", 0.1)
    server = start()
    process_id = pid(server)
    os.kill(process_id, signal.SIGSTOP)
    try:
        with pytest.raises(UnavailableError, match="runs and does not answer"):
            server.ensure_running()
    finally:
        os.kill(process_id, signal.SIGCONT)
    server.ensure_running()
    assert pid(server) == process_id


def test_one_that_does_not_end_is_killed(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_STOP_S", 0.1)
    server = start()
    write(server, "sha256:a")
    process_id = pid(server)
    os.kill(process_id, signal.SIGSTOP)
    server.close()
    assert not is_running(process_id)
    assert digests(start()) == ["sha256:a"]


def test_a_long_path_has_its_socket_elsewhere() -> None:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / ("long" * 40)
        first, second = EmbeddedRedis(home), EmbeddedRedis(home)
        first.ensure_running()
        second.ensure_running()
        write(first, "sha256:a")
        assert digests(second) == ["sha256:a"]
        with connect(first.url) as client:
            socket = Path(client.config_get("unixsocket")["unixsocket"])
        assert socket.parent.stat().st_mode & 0o077 == 0
        assert not socket.is_relative_to(home)
        first.close()
        second.close()
        socket.parent.rmdir()


def test_a_home_that_cannot_be_written_is_a_sentence(home: Path) -> None:
    (home / "index").write_text("a file")
    with pytest.raises(SettingsError, match="the index cannot be kept in .*index"):
        EmbeddedRedis(home).ensure_running()


def test_without_a_binary_that_runs_there_is_a_sentence(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = home / "redis-server"
    broken.write_bytes(b"\x7fELF not for this machine")
    broken.chmod(0o755)
    monkeypatch.setattr(embedded, "_binary", lambda: str(broken))
    with pytest.raises(SettingsError, match="cannot be run.*set redis_url"):
        EmbeddedRedis(home).ensure_running()
    monkeypatch.undo()
    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match="has no redis-server here: set redis_url"):
        EmbeddedRedis(home).ensure_running()


def test_one_that_ends_at_once_says_why(home: Path) -> None:
    (home / "index").mkdir()
    (home / "index" / "appendonly.aof").write_text("*3\r\nnot a log\r\n")
    with pytest.raises(
        SettingsError, match=r"ended with status 1: .*redis\.log says why, .*appendonly|Bad file format"
    ):
        EmbeddedRedis(home).ensure_running()


def test_a_client_reconnects_after_it_was_started_again(start: Start) -> None:
    server = start()
    with connect(server.url) as client:
        index = Index(client)
        index.publish("ann", "mood", "sha256:a", "{}", 1, "")
        os.kill(int(client.info("server")["process_id"]), signal.SIGKILL)
        wait_until(lambda: _fails(client))
        server.ensure_running()
        assert index.publish("ann", "mood", "sha256:b", "{}", 1, "")[1] == 2


def _fails(client: Redis) -> bool:
    try:
        Index(client).pulse()
    except UnavailableError:
        return True
    return False
