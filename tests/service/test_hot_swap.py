"""Following a real index with a real engine: swaps, faults, and an index that is gone, emptied or older."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from app.domain import BatchReport, EngineRequest, TextInput
from app.engine.artifact import FILES
from app.engine.backbone import Backbone
from app.engine.engine import Engine
from app.engine.plan import make_plan
from app.engine.tokenizer import TextTokenizer
from app.errors import NotFoundError, SettingsError, UnavailableError
from app.registry.index import Index
from app.registry.last_good import LastGood
from app.registry.store import ArtifactStore
from app.rollout import Challenger, Role, State, TrafficWish
from app.service.first_start import begin, find_beginning
from app.service.hot_swap import Follower
from app.service.loading import Loader, card_of
from app.service.residents import Failure
from app.telemetry.metrics import Metrics
from tests.artifacts import write_artifact
from tests.registry.redis_server import RedisServer


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone.load("embedded", "cpu", "float32")


@pytest.fixture
def loader(backbone: Backbone) -> Iterator[Loader]:
    engine = Engine(backbone)
    engine.start()
    yield Loader(engine, TextTokenizer(backbone.path))
    engine.close()


class World:
    """One server's follower, and operators who change the index behind its back."""

    def __init__(self, tmp: Path, index: Index, loader: Loader) -> None:
        self.tmp, self.index, self.loader = tmp, index, loader
        self.store = ArtifactStore(f"file://{tmp / 'artifacts'}", tmp / "cache", 10**9)
        self.last_good = LastGood(tmp / "last-good.json")
        self.prefixes = tmp / "prefixes"
        self.prefixes.mkdir(exist_ok=True)
        self.follower = self.restarted()

    def restarted(self, most_others: int = 32) -> Follower:
        self.metrics = Metrics()
        return Follower(
            self.index, self.store, self.loader, self.last_good, self.metrics, server="here", most_others=most_others
        )

    def begin(self) -> Follower:
        beginning = find_beginning(self.index, self.last_good)
        begin(self.follower, beginning, self.index, self.store, self.prefixes)
        return self.follower

    def artifact(self, task: str, seed: int = 0, **manifest: object) -> Path:
        folder = self.tmp / "made" / f"{task}-{seed}"
        return write_artifact(folder, self.loader.engine.spec, task, ("no", "yes"), seed=seed, **manifest)

    def publish(self, task: str, seed: int, *, approve: bool = True, **manifest: object) -> int:
        return self.publish_folder(self.artifact(task, seed, **manifest), task, approve=approve)

    def publish_folder(self, folder: Path, task: str, *, approve: bool = True) -> int:
        digest = self.store.put({n: (folder / n).read_bytes() for n in FILES if (folder / n).exists()})
        card = card_of(json.loads((folder / "manifest.json").read_text()))
        record, _ = self.index.publish("paula", task, digest, card, 1000, "")
        if approve:
            self.index.decide("anna", task, record.version, State.APPROVED, "", True)
        return record.version

    def promote(self, task: str, version: int, **wish: object) -> int:
        _, generation = self.index.set_traffic("otto", task, TrafficWish(version, **wish), "", None)  # type: ignore[arg-type]
        return generation

    def live(self) -> dict[str, int]:
        return {name: task.traffic.champion for name, task in self.follower.catalog.snapshot.tasks.items()}


@pytest.fixture
def world(tmp_path: Path, index: Index, loader: Loader) -> Iterator[World]:
    made = World(tmp_path, index, loader)
    yield made
    made.follower.close()


@pytest.fixture
def spam(world: World) -> World:
    """An index in which spam@1 is live."""
    write_artifact(world.prefixes / "spam", world.loader.engine.spec, "spam", ("no", "yes"))
    world.begin()
    return world


def test_an_empty_index_begins_with_the_folder(world: World) -> None:
    for number in (1, 2):
        write_artifact(world.prefixes / "intent" / str(number), world.loader.engine.spec, "intent", seed=number)
    write_artifact(world.prefixes / "broken", world.loader.engine.spec, "broken", labels=("a", "a"))
    follower = world.begin()
    assert world.live() == {"intent": 2}
    assert follower.catalog.snapshot.generation == 1
    assert {v.state for v in follower.catalog.snapshot.view.tasks["intent"].versions.values()} == {State.APPROVED}
    assert "broken" in follower.catalog.left_out
    assert list(follower.catalog.snapshot.representations) == ["all-MiniLM-L6-v2"]
    assert [entry.action for entry in world.index.audit(None, 0, 10)] == ["create"]


def test_a_second_server_reads_what_the_first_one_made(spam: World, tmp_path: Path) -> None:
    other = World(tmp_path / "other", spam.index, spam.loader)
    (tmp_path / "other").mkdir(exist_ok=True)
    other.store = ArtifactStore(f"file://{spam.tmp / 'artifacts'}", tmp_path / "other" / "cache", 10**9)
    other.follower = other.restarted()
    other.begin()
    assert other.live() == {"spam": 1}
    other.follower.close()


def test_a_folder_that_is_not_there_is_told(world: World) -> None:
    world.prefixes.rmdir()
    with pytest.raises(SettingsError, match="there is no folder"):
        world.begin()


def test_a_swap_is_one_new_snapshot_and_the_old_one_still_answers(spam: World) -> None:
    before = spam.follower.catalog.snapshot
    generation = spam.promote("spam", spam.publish("spam", seed=2))
    assert spam.follower.catalog.snapshot is before
    assert spam.follower.sync()
    after = spam.follower.catalog.snapshot
    assert (after.generation, after.tasks["spam"].traffic.champion) == (generation, 2)
    assert before.tasks["spam"].traffic.champion == 1
    encoding = spam.loader.tokenizer.encode([TextInput("hello")], [64], False)[0]
    for snapshot in (before, after):
        champion = snapshot.tasks["spam"].champion
        plan = make_plan(encoding, [champion], spam.loader.engine.spec.num_layers)
        result = spam.loader.engine.submit(EngineRequest((plan,))).result(10)
        assert result.outputs[0][0].error is None


def test_the_time_of_a_swap_ends_when_the_change_is_served(spam: World, monkeypatch: pytest.MonkeyPatch) -> None:
    spam.follower.sync()
    spam.promote("spam", spam.publish("spam", seed=2))
    load = spam.loader.load

    def load_slowly(folder: Path) -> object:
        time.sleep(0.4)
        return load(folder)

    monkeypatch.setattr(spam.loader, "load", load_slowly)
    spam.follower.sync()
    assert spam.live() == {"spam": 2}
    assert (_sample(spam.metrics, "manifold_swap_propagation_seconds_sum") or 0.0) >= 0.4


def _sample(metrics: Metrics, name: str) -> float | None:
    """Its value; None where there is no such series."""
    lines = dict(line.rsplit(" ", 1) for line in metrics.render()[0].decode().splitlines())
    return float(lines[name]) if name in lines else None


def test_every_server_logs_who_changed_what_and_a_start_logs_no_history(
    spam: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "manifold.index")
    spam.follower.sync()
    spam.promote("spam", spam.publish("spam", seed=2))
    other = World(tmp_path, spam.index, spam.loader)
    other.begin()
    for follower in (other.follower, spam.follower):
        follower.sync()
    told = [
        ("paula", "publish", None, "version 2 candidate"),
        ("anna", "approve", "version 2 candidate", "version 2 approved"),
        ("otto", "traffic", "champion 1", "champion 2"),
    ]
    assert changes_in(caplog) == told  # the other one began with all of it
    caplog.clear()
    spam.index.note("eve", "forbidden", "spam", "no", {})
    spam.index.rollback("otto", "spam", "complaints", None)
    for follower in (other.follower, spam.follower):
        follower.sync()
        follower.sync()
    assert changes_in(caplog) == [("otto", "rollback", "champion 2", "champion 1")] * 2
    other.follower.close()


def changes_in(caplog: pytest.LogCaptureFixture) -> list[tuple[object, ...]]:
    fields = [record.__dict__["fields"] for record in caplog.records if record.name == "manifold.index"]
    return [(f["actor"], f["action"], f["from"], f["to"]) for f in fields]


def test_what_nobody_holds_any_more_is_unloaded(spam: World) -> None:
    spam.follower = spam.restarted(most_others=1)
    spam.begin()
    digests = []
    for seed in (2, 3, 4):
        spam.promote("spam", spam.publish("spam", seed))
        spam.follower.sync()
        digests.append(spam.follower.catalog.snapshot.tasks["spam"].champion.digest)
    bank = spam.loader.engine.bank
    assert bank.get(digests[-1]) and bank.get(digests[-2])
    with pytest.raises(NotFoundError):
        bank.get(digests[0])


def test_what_was_counted_of_a_task_goes_with_its_last_version(spam: World) -> None:
    def series(task: str) -> set[str]:
        text = spam.metrics.render()[0].decode()
        return set(re.findall(rf'^(\w+){{.*task="{task}"', text, re.MULTILINE))

    spam.follower = spam.restarted(most_others=1)
    spam.begin()
    spam.promote("topic", spam.publish("topic", seed=7))
    spam.follower.sync()
    for task in ("spam", "topic"):
        spam.metrics.ran(BatchReport(1, 9, 0.0, 0.0, 0.0, {(task, 1): 1.0}, passes=1.0))
        spam.metrics.rolled_back(task, "operator")
        spam.metrics.disagreed(task)
    counted = {"manifold_passes_total", "manifold_rollbacks_total", "manifold_arm_disagreement_total"}
    view = spam.follower.catalog.snapshot.view
    stopped = replace(view.tasks["topic"], traffic=None)
    spam.follower.resume(replace(view, tasks={**view.tasks, "topic": stopped}), is_whole=True)
    assert counted <= series("topic"), "its version is kept for a while"
    spam.promote("spam", spam.publish("spam", seed=2))
    spam.follower.load(spam.index.view().tasks["spam"].versions[2])
    assert series("topic") == set()
    assert counted <= series("spam")


def test_what_ends_behind_its_versions_eviction_is_not_counted_for_ever(spam: World) -> None:
    def counted() -> set[tuple[str, str]]:
        text = spam.metrics.render()[0].decode()
        return set(re.findall(r'task="(\w+)",version="(\d+)"', text))

    spam.follower = spam.restarted(most_others=1)
    spam.begin()
    (own,) = spam.follower.catalog.snapshot.representations.values()
    for seed in (2, 3):
        spam.promote("spam", spam.publish("spam", seed))
        spam.follower.sync()
    for name, version in ((own.task, own.version), ("spam", 1), ("spam", 2), ("spam", 3)):  # 1 is evicted by now
        spam.metrics.predicted(name, version, "pinned", "success")
    spam.metrics.ran(BatchReport(1, 9, 0.0, 0.0, 0.0, {("spam", 1): 0.5, ("gone", 4): 0.5}, passes=1.0))
    assert {("spam", "1"), ("gone", "4")} <= counted()
    spam.follower.sync()
    assert counted() == {("spam", "2"), ("spam", "3"), (own.task, str(own.version))}
    assert 'task="gone"' not in spam.metrics.render()[0].decode()


def test_only_what_changed_is_built_again(spam: World) -> None:
    spam.promote("topic", spam.publish("topic", seed=7))
    spam.follower.sync()
    before = spam.follower.catalog.snapshot
    spam.promote("topic", spam.publish("topic", seed=8))
    spam.follower.sync()
    after = spam.follower.catalog.snapshot
    assert after.tasks["spam"] is before.tasks["spam"]
    assert after.tasks["topic"] is not before.tasks["topic"]


def corrupt_bits(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def break_tensors(change: Callable[[dict[str, object]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)  # type: ignore[arg-type]
        save_file(tensors, folder / "adapter_model.safetensors")

    return damage


def set_nan(tensors: dict[str, object]) -> None:
    tensors["base_model.classifier.weight"][0, 0] = float("nan")  # type: ignore[index]


def other_fingerprint(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["backbone"]["fingerprint"] = "sha256:another"
    (folder / "manifest.json").write_text(json.dumps(manifest))


def wrong_golden(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["golden"] = [{"text": "hello", "scores": [0.123, 0.877]}]
    (folder / "manifest.json").write_text(json.dumps(manifest))


def truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (break_tensors(set_nan), "finite"),
        (other_fingerprint, "fingerprint"),
        (wrong_golden, "golden scores differ"),
        (truncate, "safetensors"),
    ],
)
def test_a_version_that_cannot_be_served_is_reported_and_the_old_one_goes_on(
    spam: World, damage: Callable[[Path], None], told: str
) -> None:
    folder = spam.artifact("spam", seed=2)
    damage(folder)
    spam.promote("spam", spam.publish_folder(folder, "spam"))
    spam.follower.sync()
    assert spam.live() == {"spam": 1}
    assert told in spam.follower.catalog.left_out["spam@2"]
    assert told in spam.index.failures()["spam@2"]["here"]
    spam.index.rollback("otto", "spam", "", None)
    spam.follower.sync()
    assert spam.live() == {"spam": 1}
    assert "spam@2" in spam.index.failures(), "whoever looks at version 2 again should know"
    spam.index.decide("anna", "spam", 2, State.RETIRED, "", True)
    spam.follower.sync()
    assert not spam.follower.failures
    assert not spam.index.failures()


def test_live_versions_that_are_not_served_are_counted_for_as_long_as_they_are(spam: World) -> None:
    def unserved(task: str = "spam") -> float | None:
        return _sample(spam.metrics, f'manifold_versions_unserved{{task="{task}"}}')

    folder = spam.artifact("spam", seed=2)
    wrong_golden(folder)
    version = spam.publish_folder(folder, "spam")
    spam.follower.sync()
    assert unserved() == 0, "it was approved and cannot be loaded, but nobody made it live"
    spam.promote("spam", version)
    spam.follower.sync()
    assert unserved() == 1
    spam.follower.close()
    spam.follower = spam.restarted()
    spam.begin()
    assert spam.live() == {"spam": 1} and unserved() == 1, "a restart mends no version"
    spam.index.rollback("otto", "spam", "", None)
    spam.follower.sync()
    assert unserved() == 0
    assert unserved("topic") is None


def test_a_version_that_can_be_served_later_is_not_counted_any_more(
    spam: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(_: str) -> Path:
        raise UnavailableError("the store is away")

    with monkeypatch.context() as patch:
        patch.setattr(spam.store, "fetch", gone)
        spam.promote("topic", spam.publish("topic", seed=7))
        spam.follower.sync()
    name = 'manifold_versions_unserved{task="topic"}'
    assert _sample(spam.metrics, name) == 1
    monkeypatch.setattr(Failure, "is_due", True)
    spam.follower.sync()
    assert spam.live() == {"spam": 1, "topic": 1}
    assert _sample(spam.metrics, name) == 0


def test_bits_that_flipped_in_the_store_are_noticed(spam: World) -> None:
    version = spam.publish("spam", seed=2)
    for blob in (spam.tmp / "artifacts" / "blobs").rglob("*"):
        if blob.is_file() and spam.follower.catalog.snapshot.tasks["spam"].champion:
            corrupt_bits(blob)
    spam.promote("spam", version)
    spam.follower.sync()
    assert spam.live() == {"spam": 1}
    assert "spam@2" in spam.follower.failures


def test_a_challenger_that_fails_leaves_the_champion_its_share(spam: World) -> None:
    folder = spam.artifact("spam", seed=2)
    wrong_golden(folder)
    version = spam.publish_folder(folder, "spam")
    spam.promote("spam", 1, challengers=(Challenger(version, 50.0),))
    spam.follower.sync()
    task = spam.follower.catalog.snapshot.tasks["spam"]
    assert {task.traffic.choose(f"unit {n}") for n in range(100)} == {1}


def test_without_the_index_what_is_live_stays_live_also_after_a_restart(spam: World, redis_server: RedisServer) -> None:
    spam.follower.close()
    redis_server.kill()
    assert not spam.follower.sync()
    assert not spam.follower.health.up
    assert spam.live() == {"spam": 1}
    spam.follower = spam.restarted()
    spam.begin()
    assert spam.live() == {"spam": 1}
    assert not spam.follower.health.up
    redis_server.start()
    version = spam.publish("spam", seed=2)
    spam.promote("spam", version)
    assert spam.follower.sync()
    assert spam.live() == {"spam": 2}
    assert spam.follower.health.up
    assert sorted(spam.follower.catalog.snapshot.view.tasks["spam"].versions) == [1, 2]


def test_without_index_and_last_good_state_there_is_nothing_to_start_from(
    world: World, redis_server: RedisServer
) -> None:
    redis_server.kill()
    with pytest.raises(UnavailableError, match="no last good state"):
        world.begin()


def test_an_emptied_index_takes_no_live_task_with_it(spam: World, client: object) -> None:
    client.flushall()  # type: ignore[attr-defined]
    spam.follower.sync()
    assert spam.live() == {"spam": 1}
    loss = spam.follower.loss
    assert loss is not None and "emptied" in loss.told and "spam@1" in loss.told
    spam.index.restore("otto", loss.before, "it was emptied", loss.seen)
    spam.follower.sync()
    assert spam.live() == {"spam": 1}
    assert spam.follower.loss is None
    assert spam.index.view().tasks["spam"].traffic is not None


def test_an_older_index_says_so_and_new_changes_are_followed(
    spam: World, client: object, redis_server: RedisServer
) -> None:
    dumps = {key: client.dump(key) for key in client.keys("*")}  # type: ignore[attr-defined]
    spam.promote("topic", spam.publish("topic", seed=7))
    spam.follower.sync()
    assert spam.live() == {"spam": 1, "topic": 1}
    client.flushall()  # type: ignore[attr-defined]
    for key, dump in dumps.items():
        client.restore(key, 0, dump)  # type: ignore[attr-defined]
    spam.follower.sync()
    assert spam.live() == {"spam": 1, "topic": 1}
    assert spam.follower.loss is not None and "went back from generation" in spam.follower.loss.told
    spam.promote("spam", spam.publish("spam", seed=2))
    spam.follower.sync()
    assert spam.live() == {"spam": 2, "topic": 1}


def test_a_restart_on_an_emptied_index_keeps_tasks_and_keys(spam: World, client: object) -> None:
    key, _ = spam.index.create_key("anna", "root", frozenset({Role.ADMIN}))
    spam.follower.sync()
    client.flushall()  # type: ignore[attr-defined]
    spam.follower.sync()
    for _ in range(2):
        spam.follower.close()
        spam.follower = spam.restarted()
        spam.begin()
        assert spam.live() == {"spam": 1}
        assert list(spam.follower.catalog.snapshot.view.keys) == [key.id]
        assert spam.follower.loss is not None and "emptied" in spam.follower.loss.told
    spam.publish("spam", seed=5, approve=False)
    spam.follower.sync()
    assert spam.live() == {"spam": 1}, "a candidate in the new index takes nothing away"


def test_a_restart_on_an_older_index_says_so(spam: World, client: object) -> None:
    spam.follower.sync()
    dumps = {name: client.dump(name) for name in client.keys("*")}  # type: ignore[attr-defined]
    spam.promote("spam", spam.publish("spam", seed=2))
    spam.follower.sync()
    spam.follower.close()
    client.flushall()  # type: ignore[attr-defined]
    for name, dump in dumps.items():
        client.restore(name, 0, dump)  # type: ignore[attr-defined]
    spam.follower = spam.restarted()
    spam.begin()
    loss = spam.follower.loss
    assert loss is not None and "spam@2" in loss.told and "the traffic of spam" in loss.told
    spam.index.restore("otto", loss.before, "an old backup", loss.seen)
    spam.follower.sync()
    assert spam.live() == {"spam": 2}
    assert spam.follower.loss is None


def test_a_restart_on_an_older_index_that_went_on_past_where_it_was_drops_nothing(spam: World, client: object) -> None:
    dumps = {key: client.dump(key) for key in client.keys("*")}  # type: ignore[attr-defined]
    spam.promote("topic", spam.publish("topic", seed=7))
    spam.follower.sync()
    before = spam.follower.catalog.snapshot.generation
    client.flushall()  # type: ignore[attr-defined]
    for key, dump in dumps.items():
        client.restore(key, 0, dump)  # type: ignore[attr-defined]
    for seed in (2, 3):
        spam.promote("spam", spam.publish("spam", seed))
    for _ in range(2):
        spam.follower.close()
        spam.follower = spam.restarted()
        spam.begin()
        assert spam.follower.catalog.snapshot.generation > before
        assert spam.live() == {"spam": 3, "topic": 1}
        assert spam.follower.loss is not None and "topic@1" in spam.follower.loss.told
    spam.index.restore("otto", spam.follower.loss.before, "it was a backup", spam.follower.loss.seen)
    spam.follower.sync()
    assert spam.live() == {"spam": 3, "topic": 1}
    assert spam.follower.loss is None


def test_what_is_lost_can_be_let_go(spam: World, client: object) -> None:
    client.flushall()  # type: ignore[attr-defined]
    spam.follower.sync()
    loss = spam.follower.loss
    assert loss is not None
    tasks = {name: replace(record, traffic=None) for name, record in loss.before.tasks.items()}
    spam.index.restore("otto", replace(loss.before, tasks=tasks), "good riddance", loss.seen)
    spam.follower.sync()
    assert spam.live() == {} and spam.follower.loss is None
    assert sorted(spam.index.view().tasks["spam"].versions) == [1]


def test_a_revoked_key_stays_revoked_whatever_the_index_lost(spam: World, client: object) -> None:
    key, _ = spam.index.create_key("anna", "root", frozenset({Role.ADMIN}))
    spam.follower.sync()
    client.flushall()  # type: ignore[attr-defined]
    spam.follower.sync()
    loss = spam.follower.loss
    assert loss is not None
    spam.index.revoke_key("anna", key.id, loss.keys)
    spam.follower.sync()
    assert spam.follower.catalog.snapshot.view.keys[key.id].hash == ""
    spam.index.restore("anna", loss.before, "", loss.seen)
    spam.follower.sync()
    assert spam.index.view().keys[key.id].hash == ""


def test_an_approved_version_that_fails_stays_reported_and_makes_no_snapshots(spam: World) -> None:
    folder = spam.artifact("spam", seed=2)
    wrong_golden(folder)
    number = spam.publish_folder(folder, "spam", approve=False)
    spam.follower.sync()
    spam.index.decide("anna", "spam", number, State.APPROVED, "", True)
    spam.follower.sync()
    assert "spam@2" in spam.index.failures()
    snapshot = spam.follower.catalog.snapshot
    spam.follower._failures = {k: replace(f, retry_s=0.0) for k, f in spam.follower._failures.items()}
    spam.follower.sync()
    assert spam.follower.catalog.snapshot is snapshot
    assert "spam@2" in spam.index.failures()


def test_what_began_in_the_folder_is_in_the_cache(spam: World) -> None:
    (spam.tmp / "artifacts").rename(spam.tmp / "elsewhere")
    spam.follower.close()
    spam.follower = spam.restarted()
    spam.begin()
    assert spam.live() == {"spam": 1}


def test_the_thread_follows_by_hints(spam: World) -> None:
    from tests.serving import wait_for

    spam.follower.start()
    spam.promote("spam", spam.publish("spam", seed=2))
    wait_for(lambda: spam.live() == {"spam": 2})


def test_a_pinned_version_is_loaded_for_its_request(spam: World) -> None:
    number = spam.publish("spam", seed=2)
    spam.follower.sync()
    record = spam.follower.catalog.snapshot.view.tasks["spam"].versions[number]
    version, handle = spam.follower.load(record)
    assert (version.task, version.version, version.digest) == ("spam", number, record.digest)
    assert spam.loader.engine.bank.get(record.digest) is handle
