"""What the prediction log keeps of answered requests, and that a slow or a full disk costs rows and nothing else."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.config import Settings, load_settings
from app.domain import TextInput
from app.registry.prediction_lines import Row
from app.registry.prediction_lines import rows_of as rows_of_line
from app.registry.prediction_parts import PartWriter
from app.registry.prediction_store import PredictionStore
from app.service import prediction_log
from app.service.prediction_log import PredictionLog
from app.service.prediction_rows import is_sampled, to_line
from app.service.watching import Served, Watch
from app.telemetry.metrics import Metrics
from tests.fakes import FakeEngine, FakeWatch, make_runtime
from tests.serving import wait_for

SECRET, PAIR = "Ada Lovelace owes me money", "and Grace Hopper knows"


class Counted(Metrics):
    """Keeps what is counted where a test reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.dropped = 0, dict[str, int]()

    def logged(self, rows: int) -> None:
        self.rows += rows

    def log_dropped(self, reason: str, rows: int) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + rows


@pytest.fixture
def store(tmp_path: Path) -> PredictionStore:
    return PredictionStore(str(tmp_path / "log"), tmp_path / "home", "jsonl", 10**9)


@pytest.fixture
def metrics() -> Counted:
    return Counted()


Open = Callable[..., PredictionLog]


@pytest.fixture
def open_log(store: PredictionStore, metrics: Counted) -> Iterator[Open]:
    opened: list[PredictionLog] = []

    def make(**options: Any) -> PredictionLog:
        log = PredictionLog(PartWriter(store.folder, store.server, 10**9, 3600.0), store, metrics, **options)
        log.start()
        opened.append(log)
        return log

    yield make
    for log in opened:
        log.close()


async def ask(
    settings: Settings, inputs: list[TextInput], tasks: list[str], *request_ids: str, broken: set[str] | None = None
) -> list[Served]:
    watch = FakeWatch()
    runtime = make_runtime(settings, FakeEngine(broken_tasks=broken or set()), watch=watch)
    for request_id in request_ids:
        await runtime.inference.predict(inputs, tasks, True, request_id=request_id)
    runtime.close()
    return watch.requests


@pytest.fixture
async def one(settings: Settings) -> Served:
    (served,) = await ask(settings, [TextInput("hello you")], ["spam", "stars"], "r-1")
    return served


def rows_of(served: Served, has_texts: bool = False) -> list[Row]:
    return rows_of_line(to_line(served, has_texts))


def written(store: PredictionStore) -> list[Row]:
    lines = [line for path in store.folder.iterdir() for line in path.read_bytes().splitlines()]
    return [row for line in lines for row in rows_of_line(line)]


# -- what a row says ---------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_row_has_what_an_audit_asks_for(settings: Settings) -> None:
    tasks = ["spam", "intent@2", "emotion", "stars", "slots"]
    settings = load_settings({"answer_cache_bytes": 10**6})
    first, again = await ask(settings, [TextInput("hello you"), TextInput("me")], tasks, "r-1", "r-2", broken={"stars"})
    rows = rows_of(first)
    assert [(row["input"], row["reference"]) for row in rows] == [(i, task) for i in (0, 1) for task in tasks]
    spam, intent, emotion, stars, slots = rows[:5]
    assert spam == {
        "time": spam["time"],
        "request_id": "r-1",
        "actor": "anonymous",
        "input": 0,
        "generation": 7,
        "reference": "spam",
        "task": "spam",
        "version": 1,
        "digest": "sha256:spam-1",
        "arm": "champion",
        "text_sha256": hashlib.sha256(b"hello you").hexdigest(),
        "label": "ham",
        "scores": {"ham": 0.9, "spam": 0.1},
        "tokens": 4,
        "truncated": False,
        "cached": False,
        "request_passes": first.usage.passes,
        "inference_ms": 2.0,
    }
    assert spam["time"].startswith("20") and spam["time"].endswith("Z") and len(spam["time"]) == 27
    assert (intent["task"], intent["version"], intent["arm"]) == ("intent", 2, "pinned")
    assert emotion["labels"] and set(emotion["scores"]) == {"joy", "anger", "fear"} and "label" not in emotion
    assert stars["error"] == "stars broke" and "value" not in stars
    assert slots["spans"] == [{"label": "city", "start": 0, "end": 5, "score": 0.9}]
    cached = {row["task"]: row["cached"] for row in rows_of(again)}
    assert cached == {"spam": True, "intent": True, "emotion": True, "stars": False, "slots": True}


@pytest.mark.anyio
async def test_a_text_is_named_by_its_digest_and_kept_only_where_that_is_allowed(settings: Settings) -> None:
    (single,) = await ask(settings, [TextInput(SECRET)], ["spam", "slots"], "r-1")
    (pair,) = await ask(settings, [TextInput(SECRET, PAIR)], ["entailment"], "r-2")
    for served in (single, pair):
        for word in (*SECRET.split(), *PAIR.split()):
            assert f'"{word}"'.encode() not in to_line(served, False) and b"Lovelace" not in to_line(served, False)
    assert rows_of(single)[0]["text_sha256"] == hashlib.sha256(SECRET.encode()).hexdigest()
    assert rows_of(pair)[0]["text_sha256"] == hashlib.sha256(f"{SECRET}\0{PAIR}".encode()).hexdigest()
    kept, of_slots = rows_of(single, True)
    assert kept["text"] == SECRET and "text_pair" not in kept and of_slots["spans"][0]["text"] == "Ada"
    assert (rows_of(pair, True)[0]["text"], rows_of(pair, True)[0]["text_pair"]) == (SECRET, PAIR)


@pytest.mark.anyio
async def test_what_is_no_unicode_is_kept_all_the_same(settings: Settings) -> None:
    (served,) = await ask(settings, [TextInput("half \ud83d")], ["spam"], "r-1")
    assert rows_of(served, True)[0]["text"] == "half ?"


def test_the_share_that_is_kept_is_drawn_from_the_request_id_alone() -> None:
    ids = [f"request {number}" for number in range(4_000)]
    kept = {name for name in ids if is_sampled(name, 0.25)}
    assert 900 < len(kept) < 1_100
    assert kept <= {name for name in ids if is_sampled(name, 0.5)}
    assert not any(is_sampled(name, 0.0) for name in ids) and all(is_sampled(name, 1.0) for name in ids)


# -- how it is written -------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_answers_are_on_disk_soon_and_the_last_ones_at_the_end(
    settings: Settings, store: PredictionStore, metrics: Counted, open_log: Open
) -> None:
    log = open_log()
    watch = Watch([log], lambda requests: None)
    watch.start()
    requests = await ask(settings, [TextInput("hello")], ["spam", "stars"], "r-1", "r-2")
    watch.served(requests[0])
    wait_for(lambda: len(written(store)) == 2)
    assert len(store.find("r-1").rows) == 2
    watch.served(requests[1])
    watch.close()
    assert len(store.find("r-2").rows) == 2 and (metrics.rows, metrics.dropped) == (4, {})
    (path,) = store.folder.iterdir()
    assert "_open_" not in path.name


@pytest.mark.anyio
async def test_a_sample_is_kept_whole(settings: Settings, store: PredictionStore, open_log: Open) -> None:
    names = [f"r-{number}" for number in range(40)]
    requests = await ask(settings, [TextInput("hello"), TextInput("you")], ["spam", "stars"], *names)
    log = open_log(sample=0.5)
    log.take_in(requests)
    log.close()
    kept = [name for name in names if is_sampled(name, 0.5)]
    assert 5 < len(kept) < 35
    assert [row["request_id"] for row in written(store)] == [name for name in kept for _ in range(4)]


@pytest.mark.anyio
async def test_a_disk_that_hangs_holds_nobody_up_and_what_finds_no_room_is_counted(
    one: Served, store: PredictionStore, metrics: Counted, open_log: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    opens, write, hangs = threading.Event(), os.write, threading.Event()

    def slow(descriptor: int, content: bytes) -> int:
        hangs.set()
        assert opens.wait(30)
        return write(descriptor, content)

    monkeypatch.setattr(os, "write", slow)
    log = open_log(most_waiting_bytes=10 * len(to_line(one, False)))
    log.take_in([one])
    assert hangs.wait(10)
    log.take_in([one] * 50)  # returns although nothing is written
    assert (metrics.rows, metrics.dropped) == (0, {"slow": 80})
    opens.set()
    log.close()
    assert (metrics.rows, metrics.dropped, len(written(store))) == (22, {"slow": 80}, 22)


@pytest.mark.anyio
async def test_a_full_disk_is_told_once_and_so_is_its_end(
    one: Served,
    store: PredictionStore,
    metrics: Counted,
    open_log: Open,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write = os.write

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log = open_log()
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        for number in range(1, 4):
            log.take_in([one])
            wait_for(lambda number=number: metrics.dropped == {"full": 2 * number})
    assert os.write is write
    log.take_in([one])
    log.close()
    assert metrics.rows == len(written(store)) == 2
    told = [record.getMessage() for record in caplog.records if "rows are dropped" in record.getMessage()]
    assert len(told) == 1 and "No space left on device" in told[0]


@pytest.mark.anyio
async def test_a_folder_that_takes_no_file_is_told_once_although_each_has_another_name(
    one: Served,
    metrics: Counted,
    open_log: Open,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    open_file = os.open

    def refuse(path: Any, *arguments: Any, **options: Any) -> int:
        if "_open_" in str(path):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return open_file(path, *arguments, **options)

    log = open_log()
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        for number in range(1, 4):
            log.take_in([one])
            wait_for(lambda number=number: metrics.dropped == {"error": 2 * number})
    told = [record.getMessage() for record in caplog.records if "rows are dropped" in record.getMessage()]
    assert len(told) == 1 and "Permission denied" in told[0]


@pytest.mark.anyio
async def test_a_request_that_cannot_be_written_costs_no_other(
    one: Served, store: PredictionStore, metrics: Counted, open_log: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_log()
    encode = prediction_log.to_line
    broken = [True]

    def sometimes(served: Served, has_texts: bool) -> bytes:
        if broken.pop():
            raise RuntimeError("no")
        broken.append(False)
        return encode(served, has_texts)

    monkeypatch.setattr(prediction_log, "to_line", sometimes)
    log.take_in([one])
    broken.append(False)
    log.take_in([one])
    log.close()
    assert (metrics.rows, metrics.dropped) == (2, {"error": 2})


@pytest.mark.anyio
async def test_a_store_that_does_not_answer_is_told_once(
    one: Served,
    store: PredictionStore,
    metrics: Counted,
    open_log: Open,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(prediction_log, "_EVERY_S", 0.01)
    monkeypatch.setattr(prediction_log, "_RETRY_S", 0.01)
    tries = 0

    def refuse(*_: object) -> None:
        nonlocal tries
        tries += 1
        raise ConnectionError("it is gone")

    with monkeypatch.context() as patch:
        patch.setattr(store, "_finish", refuse)
        log = open_log()
        log.take_in([one])
        wait_for(lambda: tries > 5)
        assert metrics.rows == 2
    log.close()
    told = [record.getMessage() for record in caplog.records if "cannot be written: it is gone" in record.getMessage()]
    assert len(told) == 1
    (path,) = store.folder.iterdir()
    assert "_open_" not in path.name


@pytest.mark.anyio
async def test_it_ends_with_the_process_that_made_its_rows(one: Served, store: PredictionStore, open_log: Open) -> None:
    log = open_log()
    log.take_in([one])
    log.close()
    (path,) = store.folder.iterdir()
    assert "_open_" not in path.name  # so there was one
    assert store._converter._worker is None
