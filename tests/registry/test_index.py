"""The index in a real Redis: each change is one step, with its entry in the log."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
from redis import Redis

from app.errors import ConflictError, ForbiddenError, NotFoundError, UnavailableError
from app.registry.connection import connect
from app.registry.index import Index
from app.rollout import (
    EMPTY_VIEW,
    Challenger,
    IndexView,
    NewVersion,
    Role,
    State,
    TaskRecord,
    Traffic,
    TrafficWish,
    hash_token,
)
from tests.registry.redis_server import RedisServer

CARD = json.dumps({"problem_type": "single_label_classification", "labels": ["joy", "fear"]})
FIRST = [NewVersion("mood", 1, "sha256:m1", CARD, 10), NewVersion("mood", 2, "sha256:m2", CARD, 20)]
FIRST += [NewVersion("spam", 4, "sha256:s4", CARD, 30)]


@pytest.fixture
def filled(index: Index) -> Index:
    assert index.create("manifold", FIRST, "first start")
    return index


@pytest.fixture
def other(redis_server: RedisServer) -> Iterator[Index]:
    """Another server's."""
    with connect(redis_server.url) as client:
        yield Index(client)


def approve(index: Index, task: str, digest: str) -> int:
    record, _ = index.publish("ann", task, digest, CARD, 10, "better")
    return index.decide("bob", task, record.version, State.APPROVED, "good", True)[0].version


def traffic(index: Index, task: str) -> Traffic:
    found = index.view().tasks[task].traffic
    assert found is not None
    return found


# -- reading -----------------------------------------------------------------------------------------------------------


def test_an_empty_index_says_so(index: Index) -> None:
    pulse = index.pulse()
    assert (pulse.index_id, pulse.generation, pulse.changed_at_s) == ("", 0, 0.0)
    assert index.view() == EMPTY_VIEW
    assert index.audit(None, 0, 10) == []
    assert index.verify_audit().ok


def test_an_index_is_made_once(index: Index, other: Index) -> None:
    assert index.create("manifold", FIRST, "first start")
    assert not other.create("manifold", [], "first start")
    view = other.view()
    assert {name: record.traffic for name, record in view.tasks.items()} == {"mood": Traffic(2), "spam": Traffic(4)}
    assert [v.state for v in view.tasks["mood"].versions.values()] == [State.APPROVED, State.APPROVED]
    assert (view.index_id, view.generation) == (other.pulse().index_id, 1)
    assert len(view.index_id) == 32


def test_an_index_may_begin_without_versions(index: Index) -> None:
    assert index.create("manifold", [], "")
    assert index.pulse().generation == 1
    assert not index.create("manifold", FIRST, "")


def test_a_refusal_noted_in_an_empty_index_does_not_fill_it(index: Index) -> None:
    index.note("eve", "authenticate", None, "wrong key", {})
    assert index.view() == EMPTY_VIEW
    assert index.create("manifold", FIRST, "first start")
    assert index.verify_audit().ok


def test_the_pulse_tells_when_the_last_change_was(filled: Index) -> None:
    pulse = filled.pulse()
    assert 0 <= pulse.now_s - pulse.changed_at_s < 60
    filled.note("eve", "authenticate", None, "wrong key", {})
    assert filled.pulse().changed_at_s == pulse.changed_at_s


def test_an_update_reads_only_what_changed(filled: Index, other: Index, client: Redis) -> None:
    before = filled.view()
    approve(other, "mood", "sha256:m3")
    reads = client.info("commandstats")["cmdstat_hgetall"]["calls"]
    after = filled.update(before)
    assert (
        client.info("commandstats")["cmdstat_hgetall"]["calls"] - reads == 7
    )  # two rounds of meta, keys and meta; one task
    assert after.tasks["spam"] is before.tasks["spam"]
    assert list(after.tasks["mood"].versions) == [1, 2, 3]
    assert after == other.view()
    assert after.tasks["mood"].changed == after.generation == 3


def test_an_update_follows_an_index_that_was_emptied_and_filled_again(filled: Index, client: Redis) -> None:
    before = filled.view()
    client.flushall()
    assert filled.update(before) == EMPTY_VIEW
    filled.create("manifold", FIRST[:1], "again")
    after = filled.update(before)
    assert after.index_id != before.index_id
    assert after.tasks["mood"].traffic == Traffic(1)
    assert set(after.tasks) == {"mood"}


def test_an_update_follows_an_older_backup_that_moved_on(filled: Index, client: Redis) -> None:
    """Its generation may be higher than the one that was seen, and tasks are other ones all the same."""
    backup = {key: client.dump(key) for key in client.scan_iter()}
    filled.set_traffic("ann", "mood", TrafficWish(1), "", None)
    seen = filled.view()
    client.flushall()
    for key, value in backup.items():
        client.restore(key, 0, value)
    for champion in (2, 1, 2):
        filled.set_traffic("ann", "mood", TrafficWish(champion, shadow=(3 - champion,)), "", None)
    assert filled.update(seen) == filled.view()


def test_a_view_is_of_one_generation_also_while_others_write(index: Index, other: Index) -> None:
    """Every change makes the same version champion of all tasks, so all must be at the same one in every view."""
    names = [f"task{n}" for n in range(8)]
    index.create("manifold", [NewVersion(name, n, f"{name}-{n}", CARD, 1) for name in names for n in (1, 2)], "")
    stop = threading.Event()

    def release() -> None:
        champion = 1
        while not stop.is_set():
            other.release("ann", {name: TrafficWish(champion) for name in names}, "", None)
            champion = 3 - champion

    writer = threading.Thread(target=release)
    writer.start()
    try:
        view = index.view()
        for _ in range(40):
            for seen in (index.view(), index.update(view)):
                assert len({record.traffic for record in seen.tasks.values()}) == 1
                assert {record.changed for record in seen.tasks.values()} == {seen.generation}
                view = seen
    finally:
        stop.set()
        writer.join()
    assert view.generation > 5


def test_a_task_that_does_not_fit_its_last_change_is_named(filled: Index, client: Redis) -> None:
    client.zadd("{manifold}:changed", {"spam": 7})
    with pytest.raises(UnavailableError, match="task spam in the index was damaged"):
        filled.view()
    client.delete("{manifold}:task:spam")
    with pytest.raises(UnavailableError, match="task spam in the index was damaged"):
        filled.view()


def test_another_layout_is_not_touched(filled: Index, client: Redis) -> None:
    client.hset("{manifold}:meta", "schema", "2")
    for use in (filled.pulse, filled.view, lambda: filled.revoke_key("ann", "k")):
        with pytest.raises(UnavailableError, match="layout 2 and this Manifold reads 1"):
            use()


def test_a_record_that_was_damaged_is_named(filled: Index, client: Redis) -> None:
    client.hset("{manifold}:task:mood", "v:2", '{"version": 2}')
    with pytest.raises(UnavailableError, match="task mood@2 cannot be read"):
        filled.view()


# -- versions ----------------------------------------------------------------------------------------------------------


def test_publish_approve_promote_and_roll_back(filled: Index) -> None:
    record, generation = filled.publish("ann", "mood", "sha256:m3", CARD, 10, "better")
    assert (record.version, record.state, record.published_by, generation) == (3, State.CANDIDATE, "ann", 2)
    with pytest.raises(ForbiddenError):
        filled.decide("ann", "mood", 3, State.APPROVED, "", True)
    record, generation = filled.decide("bob", "mood", 3, State.APPROVED, "good", True)
    assert (record.state, record.decided_by, record.reason, generation) == (State.APPROVED, "bob", "good", 3)
    task, generation = filled.set_traffic("cat", "mood", TrafficWish(3), "go", 3)
    assert (task.traffic, task.previous, generation) == (Traffic(3), (2,), 4)
    task, generation = filled.rollback("cat", "mood", "worse", None)
    assert (task.traffic, task.previous, generation) == (Traffic(2), (), 5)
    assert filled.view().tasks["mood"] == replace(task, changed=5)
    told = [(e.sequence, e.actor, e.action, e.reason, e.generation) for e in filled.audit("mood", 1, 10)]
    assert told == [
        (2, "ann", "publish", "better", 2),
        (3, "bob", "approve", "good", 3),
        (4, "cat", "traffic", "go", 4),
        (5, "cat", "rollback", "worse", 5),
    ]


def test_times_are_those_of_redis(filled: Index, client: Redis) -> None:
    record, _ = filled.publish("ann", "mood", "sha256:m3", CARD, 10, "")
    assert abs(record.published_at - client.time()[0]) < 60


def test_nothing_to_change_is_no_change(filled: Index) -> None:
    record, generation = filled.publish("eve", "mood", "sha256:m1", CARD, 10, "")
    assert (record.version, record.published_by, generation) == (1, "manifold", 1)
    assert filled.decide("eve", "mood", 1, State.APPROVED, "", True)[1] == 1
    assert filled.set_traffic("eve", "mood", TrafficWish(2), "", None)[1] == 1
    assert len(filled.audit(None, 0, 10)) == 1


def test_the_first_version_of_a_new_task(filled: Index) -> None:
    assert filled.publish("ann", "topic", "sha256:t1", CARD, 10, "")[0].version == 1
    assert filled.view().tasks["topic"].traffic is None
    filled.decide("bob", "topic", 1, State.APPROVED, "", True)
    assert filled.set_traffic("cat", "topic", TrafficWish(1), "", None)[0].previous == ()


def test_what_is_not_there_is_not_found(filled: Index) -> None:
    for use in (
        lambda: filled.decide("ann", "none", 1, State.APPROVED, "", True),
        lambda: filled.decide("ann", "mood", 9, State.APPROVED, "", True),
        lambda: filled.set_traffic("ann", "none\udfff", TrafficWish(1), "", None),
        lambda: filled.rollback("ann", "none", "", None),
        lambda: filled.trip_gate("gate", "none", Traffic(1), {}, ""),
        lambda: filled.release("ann", {"mood": TrafficWish(1), "none": TrafficWish(1)}, "", None),
        lambda: filled.rollback_release("ann", "r9\udfff", ""),
        lambda: filled.revoke_key("ann", "none"),
    ):
        with pytest.raises(NotFoundError):
            use()
    assert filled.pulse().generation == 1


# -- traffic -----------------------------------------------------------------------------------------------------------


def test_a_stale_if_match_changes_nothing(filled: Index, other: Index) -> None:
    other.publish("ann", "spam", "sha256:s5", CARD, 10, "")
    for use in (
        lambda: filled.set_traffic("ann", "mood", TrafficWish(1), "", 1),
        lambda: filled.rollback("ann", "mood", "", 1),
        lambda: filled.release("ann", {"mood": TrafficWish(1)}, "", 1),
    ):
        with pytest.raises(ConflictError, match="at generation 2 and no longer at 1") as caught:
            use()
        assert caught.value.generation == 2
    assert traffic(filled, "mood") == Traffic(2)


def test_a_note_does_not_make_if_match_stale(filled: Index) -> None:
    filled.note("eve", "forbidden", "mood", "no role", {"client": "::1"})
    assert filled.set_traffic("ann", "mood", TrafficWish(1), "", 1)[1] == 2


def test_two_operators_with_the_same_if_match_are_not_both_told_yes(filled: Index, other: Index) -> None:
    for _ in range(10):
        generation = filled.pulse().generation
        wish = TrafficWish(3 - traffic(filled, "mood").champion)
        told = promote_at_once([filled, other], wish, generation)
        assert sorted(told) == [f"no, {generation + 1}", "yes"]
        assert filled.pulse().generation == generation + 1


def promote_at_once(indexes: list[Index], wish: TrafficWish, generation: int) -> list[str]:
    told: list[str] = []
    barrier = threading.Barrier(len(indexes))

    def promote(index: Index) -> None:
        barrier.wait()
        try:
            index.set_traffic("ann", "mood", wish, "", generation)
            told.append("yes")
        except ConflictError as error:
            told.append(f"no, {error.generation}")

    threads = [threading.Thread(target=promote, args=[index]) for index in indexes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


def test_many_writers_at_once_lose_nothing(filled: Index, redis_server: RedisServer) -> None:
    def publish(number: int) -> None:
        with connect(redis_server.url) as client:
            for k in range(10):
                Index(client).publish(f"writer {number}", "mood", f"sha256:{number}-{k}", CARD, 10, "")

    threads = [threading.Thread(target=publish, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    view = filled.view()
    assert list(view.tasks["mood"].versions) == list(range(1, 43))
    assert view.generation == 41
    assert filled.verify_audit().entries == 41
    assert filled.verify_audit().ok


def test_a_gate_ends_the_canary_that_it_was_measured_on(filled: Index) -> None:
    measured = filled.set_traffic("ann", "mood", TrafficWish(2, (Challenger(1, 10),)), "", None)[0].traffic
    assert measured is not None
    filled.set_traffic("ann", "mood", TrafficWish(2, (Challenger(1, 20),)), "", None)
    assert not filled.trip_gate("gate", "mood", measured, {}, "it disagrees")
    now = traffic(filled, "mood")
    assert filled.trip_gate("gate", "mood", now, {"disagreement": 0.5}, "it disagrees")
    assert traffic(filled, "mood") == Traffic(2)
    entry = filled.audit("mood", 0, 100)[-1]
    assert (entry.actor, entry.action, entry.reason) == ("gate", "gate", "it disagrees")
    assert entry.before["traffic"]["challengers"] == [{"version": 1, "percent": 20}]
    assert entry.after["figures"] == {"disagreement": 0.5}
    assert not filled.trip_gate("gate", "mood", now, {}, "it disagrees")


# -- releases ----------------------------------------------------------------------------------------------------------


def test_a_release_moves_several_tasks_at_once_and_back(filled: Index) -> None:
    approve(filled, "spam", "sha256:s5")
    made = filled.release("ann", {"mood": TrafficWish(1), "spam": TrafficWish(5, (Challenger(4, 5),))}, "both", None)
    assert (made.id, made.created_by, made.reason, made.generation) == ("r4", "ann", "both", 4)
    assert made.before == {"mood": Traffic(2), "spam": Traffic(4)}
    view = filled.view()
    assert {name: record.traffic for name, record in view.tasks.items()} == made.after
    assert {record.changed for record in view.tasks.values()} == {4}
    undone = filled.rollback_release("bob", "r4", "worse")
    assert undone.rolled_back_by == "bob"
    assert (traffic(filled, "mood"), traffic(filled, "spam")) == (Traffic(2), Traffic(4))
    assert filled.releases(10) == [undone]
    with pytest.raises(ConflictError, match="release r4 was rolled back before, by bob"):
        filled.rollback_release("bob", "r4", "")
    assert [entry.action for entry in filled.audit("spam", 3, 10)] == ["release", "rollback_release"]


def test_a_release_with_one_fault_moves_nothing(filled: Index) -> None:
    filled.publish("ann", "spam", "sha256:s5", CARD, 10, "")
    with pytest.raises(ConflictError, match="spam@5 is candidate"):
        filled.release("ann", {"mood": TrafficWish(1), "spam": TrafficWish(5)}, "", None)
    assert traffic(filled, "mood") == Traffic(2)
    assert filled.releases(10) == []


def test_a_release_is_not_undone_over_later_changes(filled: Index) -> None:
    made = filled.release("ann", {"mood": TrafficWish(1), "spam": TrafficWish(4)}, "", None)
    filled.set_traffic("bob", "mood", TrafficWish(2), "", None)
    with pytest.raises(ConflictError, match=f"the traffic of mood was changed since release {made.id}"):
        filled.rollback_release("ann", made.id, "")


def test_releases_come_newest_first(filled: Index) -> None:
    made = [filled.release("ann", {"mood": TrafficWish(1 + n % 2)}, str(n), None).id for n in range(12)]
    assert [release.id for release in filled.releases(3)] == made[:-4:-1]
    assert len(filled.releases(100)) == 12


# -- what was lost -----------------------------------------------------------------------------------------------------


def test_an_emptied_index_gets_everything_back(filled: Index, client: Redis) -> None:
    filled.create_key("ann", "ann", frozenset({Role.ADMIN}))
    filled.set_traffic("ann", "mood", TrafficWish(1, (Challenger(2, 10),)), "", None)
    lost = filled.view()
    client.flushall()
    assert filled.restore("ann", lost, "it was emptied") == 4
    view = filled.view()
    assert view.generation == 4
    assert view.keys == lost.keys
    assert {name: replace(r, changed=0) for name, r in view.tasks.items()} == {
        name: replace(r, changed=0) for name, r in lost.tasks.items()
    }
    assert view.index_id not in ("", lost.index_id)
    assert filled.verify_audit().ok


def test_what_the_index_has_stays_as_it_is(filled: Index, client: Redis) -> None:
    backup = {key: client.dump(key) for key in client.scan_iter()}
    approve(filled, "mood", "sha256:m3")
    filled.publish("ann", "mood", "sha256:m4", CARD, 10, "")
    filled.set_traffic("ann", "mood", TrafficWish(3), "", None)
    approve(filled, "topic", "sha256:t1")
    filled.set_traffic("ann", "topic", TrafficWish(1), "", None)
    lost = filled.view()
    client.flushall()
    for key, value in backup.items():
        client.restore(key, 0, value)
    filled.publish("bob", "mood", "sha256:other", CARD, 10, "")  # takes the number 3 again
    assert filled.restore("ann", lost, "an older backup") == lost.generation + 1
    mood, topic = filled.view().tasks["mood"], filled.view().tasks["topic"]
    digests = {number: version.digest for number, version in mood.versions.items()}
    assert digests == {1: "sha256:m1", 2: "sha256:m2", 3: "sha256:other", 4: "sha256:m3", 5: "sha256:m4"}
    assert mood.traffic == Traffic(2)
    assert topic.traffic == Traffic(1)
    assert filled.view().index_id == lost.index_id


def test_a_task_that_is_there_and_not_live_goes_live_again(filled: Index, client: Redis) -> None:
    filled.publish("ann", "topic", "sha256:t1", CARD, 10, "")
    filled.decide("bob", "topic", 1, State.APPROVED, "", True)
    backup = {key: client.dump(key) for key in client.scan_iter()}
    filled.set_traffic("ann", "topic", TrafficWish(1), "", None)
    lost = filled.view()
    client.flushall()
    for key, value in backup.items():
        client.restore(key, 0, value)
    filled.restore("ann", lost, "")
    assert traffic(filled, "topic") == Traffic(1)


def test_history_comes_back_without_traffic(filled: Index, client: Redis) -> None:
    lost = filled.view()
    client.flushall()
    tasks: dict[str, TaskRecord] = {name: replace(record, traffic=None) for name, record in lost.tasks.items()}
    filled.restore("ann", IndexView(lost.index_id, lost.generation, tasks, lost.keys), "accepted")
    assert [record.traffic for record in filled.view().tasks.values()] == [None, None]


def test_ten_thousand_versions_are_read_and_restored(index: Index, client: Redis) -> None:
    versions = [NewVersion(f"task{t}", n, f"sha256:{t}-{n}", CARD, 1) for t in range(200) for n in range(1, 51)]
    index.create("manifold", versions, "")
    lost = index.view()
    assert sum(len(record.versions) for record in lost.tasks.values()) == 10_000
    client.flushall()
    index.restore("ann", lost, "")
    assert len(index.view().tasks) == 200


# -- keys --------------------------------------------------------------------------------------------------------------


def test_a_key_is_made_shown_once_and_revoked(filled: Index, client: Redis) -> None:
    record, token = filled.create_key("ann", "robot", frozenset({Role.PREDICT, Role.AUDIT}))
    mark, key_id, secret = token.split("_", 2)
    assert (mark, key_id) == ("mf", record.id)
    assert len(secret) >= 43
    assert record.hash == hash_token(token)
    view = filled.view()
    assert (view.keys, view.generation) == ({record.id: record}, 2)
    everything = b"".join(client.dump(key) or b"" for key in client.scan_iter())
    assert secret.encode() not in everything
    with pytest.raises(ConflictError, match="a key with the name robot already"):
        filled.create_key("ann", "robot", frozenset())
    filled.revoke_key("bob", record.id)
    left = filled.view().keys[record.id]
    assert (left.hash, left.roles, filled.view().generation) == ("", frozenset(), 3)
    told = [(e.actor, e.action, e.before, e.after) for e in filled.audit(None, 1, 10)]
    shown = {"id": record.id, "name": "robot", "roles": ["audit", "predict"]}
    assert told == [("ann", "create_key", None, shown), ("bob", "revoke_key", shown, None)]


# -- failures and hints ------------------------------------------------------------------------------------------------


def test_servers_report_what_they_cannot_serve(filled: Index, other: Index, client: Redis) -> None:
    filled.report_failure("a:1", "mood", 2, "its content is damaged")
    other.report_failure("b:2", "mood", 2, "it cannot be fetched")
    other.report_failure("b:2", "spam", 4, "NaN")
    assert filled.failures() == {
        "mood@2": {"a:1": "its content is damaged", "b:2": "it cannot be fetched"},
        "spam@4": {"b:2": "NaN"},
    }
    filled.clear_failure("a:1", "mood", 2)
    other.clear_failure("b:2", "spam", 4)
    assert filled.failures() == {"mood@2": {"b:2": "it cannot be fetched"}}
    client.hset("{manifold}:failures", "mood@2 b:2", json.dumps({"reason": "long ago", "at": 1}))
    assert filled.failures() == {}
    assert client.hlen("{manifold}:failures") == 0


def test_a_change_is_heard_and_silence_is_not(filled: Index, other: Index) -> None:
    hints = filled.hints()
    assert hints.wait(1)  # subscribed: whatever was before may have been missed
    assert not hints.wait(0.02)
    other.publish("ann", "mood", "sha256:m3", CARD, 10, "")
    other.publish("ann", "mood", "sha256:m4", CARD, 10, "")
    assert hints.wait(5)
    while hints.wait(0.02):
        pass
    other.note("eve", "authenticate", None, "", {})
    assert not hints.wait(0.02)
    hints.close()


def test_a_lost_connection_is_a_hint(filled: Index, other: Index, client: Redis) -> None:
    hints = filled.hints()
    assert hints.wait(1)
    client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    assert hints.wait(5)
    while hints.wait(0.02):
        pass
    other.publish("ann", "mood", "sha256:m3", CARD, 10, "")
    assert hints.wait(5)
    hints.close()
    hints.close()
