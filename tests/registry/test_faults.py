"""What happens to the index when Redis is killed, paused, cut off or full: nothing that was acknowledged is lost."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from app.errors import UnavailableError
from app.registry import commit
from app.registry.commit import Ledger
from app.registry.connection import connect
from app.registry.index import Index
from app.rollout import NewVersion, TrafficWish
from tests.registry.redis_server import RedisServer

CARD = '{"problem_type": "single_label_classification", "labels": ["a", "b"]}'


@pytest.fixture
def hasty(redis_server: RedisServer) -> Iterator[Index]:
    """Waits for no answer as long as others do."""
    with connect(redis_server.url + "?socket_timeout=0.2") as client:
        yield Index(client)


@contextlib.contextmanager
def writers(redis_server: RedisServer, count: int, acknowledged: list[str]) -> Iterator[None]:
    """They publish without end, and note what was acknowledged. They know no error but UnavailableError."""
    stop, wrong = threading.Event(), list[BaseException]()

    def write(name: int) -> None:
        with connect(redis_server.url + "?socket_timeout=0.5") as client:
            index = Index(client)
            for number in itertools.count():
                if stop.is_set():
                    return
                digest = f"sha256:{name}-{number}"
                try:
                    index.publish(f"writer {name}", f"task{name}", digest, CARD, 1, "")
                    acknowledged.append(digest)
                except UnavailableError:
                    time.sleep(0.005)
                except BaseException as error:
                    wrong.append(error)
                    return

    threads = [threading.Thread(target=write, args=(name,)) for name in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []


def wait_for(count: int, acknowledged: list[str]) -> None:
    target, deadline_s = len(acknowledged) + count, time.monotonic() + 60
    while len(acknowledged) < target:
        assert time.monotonic() < deadline_s, "nothing is acknowledged any more"
        time.sleep(0.002)


def check(index: Index, acknowledged: list[str]) -> None:
    """All that was acknowledged is there, once; the log has an entry for each change and verifies."""
    view = index.view()
    digests = [version.digest for record in view.tasks.values() for version in record.versions.values()]
    assert set(acknowledged) <= set(digests)
    assert len(digests) == len(set(digests))
    for record in view.tasks.values():
        assert list(record.versions) == list(range(1, len(record.versions) + 1))
    verdict = index.verify_audit()
    assert verdict.ok, verdict.fault
    assert verdict.entries == view.generation == len(digests)


def test_killed_in_the_middle_of_writes(redis_server: RedisServer, index: Index) -> None:
    acknowledged: list[str] = []
    with writers(redis_server, 3, acknowledged):
        for _ in range(4):
            wait_for(20, acknowledged)
            redis_server.kill()
            redis_server.start()
        wait_for(20, acknowledged)
    check(index, acknowledged)


def test_a_log_file_that_was_cut_anywhere_holds_whole_changes(redis_server: RedisServer, index: Index) -> None:
    for number in range(5):
        index.publish("ann", "mood", f"sha256:{number}", CARD, 1, "")
    redis_server.kill()
    file = redis_server.folder / "appendonly.aof"
    whole = redis_server.folder / "whole.aof"
    shutil.copy(file, whole)
    size = whole.stat().st_size
    seen = set()
    for cut in (1, 60, 250, 500, 900, 1300, 1700):
        shutil.copy(whole, file)
        with file.open("r+b") as opened:
            opened.truncate(size - cut)
        redis_server.start()
        check(index, [])
        seen.add(index.pulse().generation)
        redis_server.kill()
    assert len(seen) > 1
    redis_server.start()


def test_connections_that_are_cut_again_and_again(redis_server: RedisServer, client: Redis, index: Index) -> None:
    acknowledged: list[str] = []
    with writers(redis_server, 3, acknowledged):
        for _ in range(20):
            wait_for(3, acknowledged)
            client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    check(index, acknowledged)


def test_paused_before_a_change(redis_server: RedisServer, hasty: Index) -> None:
    hasty.publish("ann", "mood", "sha256:1", CARD, 1, "")
    redis_server.pause()
    for use in (hasty.pulse, hasty.view, lambda: hasty.audit(None, 0, 1), hasty.verify_audit, hasty.failures):
        with pytest.raises(UnavailableError, match="the index does not answer, try again later"):
            use()
    with pytest.raises(UnavailableError, match="nothing was changed"):
        hasty.publish("ann", "mood", "sha256:2", CARD, 1, "")
    redis_server.resume()
    assert hasty.pulse().generation == 1


def between(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], None]) -> None:
    """Something happens once, after a change was made from what was read and before it is written."""
    original, left = Ledger._apply, [happens]

    def interrupted(self: Ledger, *args: object) -> bool:
        if left:
            left.pop()()
        return original(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Ledger, "_apply", interrupted)


def test_paused_in_the_middle_of_a_change(
    redis_server: RedisServer, hasty: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    between(monkeypatch, redis_server.pause)
    threading.Timer(0.7, redis_server.resume).start()
    record, generation = hasty.publish("ann", "mood", "sha256:1", CARD, 1, "")
    assert (record.version, generation) == (1, 1)
    check(hasty, ["sha256:1"])


def test_killed_in_the_middle_of_a_change_and_started_again(
    redis_server: RedisServer, hasty: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    between(monkeypatch, redis_server.kill)
    starter = threading.Timer(0.3, redis_server.start)
    starter.start()
    hasty.publish("ann", "mood", "sha256:1", CARD, 1, "")
    starter.join()
    check(hasty, ["sha256:1"])


def test_gone_in_the_middle_of_a_change_and_for_long(
    redis_server: RedisServer, hasty: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit, "_SETTLE_S", 0.3)
    between(monkeypatch, redis_server.kill)
    with pytest.raises(UnavailableError, match="not known whether the change was made: look into the audit log for en"):
        hasty.publish("ann", "mood", "sha256:1", CARD, 1, "")
    redis_server.start()
    assert hasty.view().tasks == {}
    hasty.publish("ann", "mood", "sha256:1", CARD, 1, "")
    check(hasty, ["sha256:1"])


def test_an_answer_that_was_lost_is_asked_for_again(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    original, lost = Ledger._try, ["the answer"]

    def losing(self: Ledger, *args: object) -> bool:
        done = original(self, *args)  # type: ignore[arg-type]
        if lost:
            raise RedisConnectionError(f"lost: {lost.pop()}")
        return done

    monkeypatch.setattr(Ledger, "_try", losing)
    assert index.publish("ann", "mood", "sha256:1", CARD, 1, "")[1] == 1
    check(index, ["sha256:1"])


def test_a_change_whose_place_was_taken_is_made_again(
    redis_server: RedisServer, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.create("manifold", [NewVersion("mood", 1, "sha256:1", CARD, 1), NewVersion("mood", 2, "b", CARD, 1)], "")

    def somebody_else() -> None:
        with connect(redis_server.url) as client:
            Index(client).set_traffic("bob", "mood", TrafficWish(1), "", None)

    between(monkeypatch, somebody_else)
    record, generation = index.set_traffic("ann", "mood", TrafficWish(2, shadow=(1,)), "", None)
    assert (record.previous, generation) == ((2, 1), 3)
    assert index.verify_audit().ok


def test_a_full_redis_refuses_changes_with_a_sentence(client: Redis, index: Index) -> None:
    index.publish("ann", "mood", "sha256:1", CARD, 1, "")
    client.config_set("maxmemory", 1)
    with pytest.raises(UnavailableError, match="the index refused the change, nothing was changed.*maxmemory"):
        index.publish("ann", "mood", "sha256:2", CARD, 1, "")
    assert index.pulse().generation == 1
    client.config_set("maxmemory", 0)
    index.publish("ann", "mood", "sha256:2", CARD, 1, "")
    check(index, ["sha256:1", "sha256:2"])


def test_operators_clocks_do_not_matter(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong_s in (0.0, 4e9, 1e9):
        monkeypatch.setattr(time, "time", lambda: wrong_s)  # noqa: B023
        index.publish("ann", "mood", f"sha256:{wrong_s}", CARD, 1, "")
    times = [entry.at for entry in index.audit(None, 0, 10)]
    assert times == sorted(times)
    assert times[-1] - times[0] < 60


def test_hints_go_on_when_redis_comes_back(redis_server: RedisServer, index: Index) -> None:
    hints = index.hints()
    assert hints.wait(1)
    redis_server.kill()
    for _ in range(3):
        hints.wait(0.01)
    redis_server.start()
    with connect(redis_server.url) as client:
        deadline_s = time.monotonic() + 30
        while not client.pubsub_numsub("{manifold}:hints")[0][1]:
            hints.wait(0.01)
            assert time.monotonic() < deadline_s
        while hints.wait(0.01):
            pass
        Index(client).publish("ann", "mood", "sha256:1", CARD, 1, "")
        assert hints.wait(5)
    hints.close()
