"""The prediction log's files: what is written stays readable, is finished, bounded, and found again."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from app.errors import SettingsError, UnavailableError
from app.registry import prediction_store
from app.registry.prediction_lines import Row, to_line
from app.registry.prediction_parquet import SCHEMA
from app.registry.prediction_parts import PartName, PartWriter
from app.registry.prediction_store import PredictionStore
from tests.serving import ROOT

KINDS = ("jsonl", "parquet")
NOON_S = 1_767_960_000.0  # 2026-01-09 12:00


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    """An object store in this process, empty."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()


@pytest.fixture(params=["folder", "object store"])
def url(request: pytest.FixtureRequest, tmp_path: Path, memory: MemoryFileSystem) -> str:
    return str(tmp_path / "log") if request.param == "folder" else "memory://log"


def open_store(url: str, home: Path, kind: Any = "jsonl", limit_bytes: int = 10**9) -> PredictionStore:
    return PredictionStore(url, home, kind, limit_bytes)


class Clock:
    now_s = NOON_S

    def __call__(self) -> float:
        return self.now_s


def writer_of(store: PredictionStore, most_bytes: int = 10**9, most_s: float = 3600.0, clock: Any = None) -> PartWriter:
    return PartWriter(store.folder, store.server, most_bytes, most_s, clock or Clock())


def row(number: int, **more: Any) -> Row:
    return {
        "time": "2026-01-09T12:00:00.000000Z",
        "request_id": f"r-{number}",
        "actor": "shop",
        "input": 0,
        "generation": 7,
        "reference": "spam",
        "task": "spam",
        "version": 1,
        "digest": "sha256:ab",
        "arm": "champion",
        "text_sha256": "cd",
        "label": "ham",
        "scores": {"ham": 0.75, "spam": 0.25},
        "tokens": 5,
        "truncated": False,
        "cached": False,
        "request_passes": 1.5,
        "inference_ms": 12.25,
        **more,
    }


def names(url: str) -> list[PartName]:
    fs, root = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    entries = fs.ls(root, detail=False) if fs.exists(root) else []
    return [name for entry in entries if (name := PartName.parse(entry.rpartition("/")[2])) is not None]


def ids(store: PredictionStore, *numbers: int) -> list[int]:
    """Those of them that are found."""
    return [number for number in numbers if store.find(f"r-{number}").rows]


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_found_as_it_was_while_it_is_written_and_once_it_is_finished(
    url: str, kind: str, tmp_path: Path
) -> None:
    rows = [
        row(1, labels=["joy", "fear"], scores={"joy": 0.9, "fear": 0.4, "anger": 0.1}),
        row(2, value=3.25),
        row(3, spans=[{"label": "city", "start": 0, "end": 5, "score": 0.5, "text": "Paris"}]),
        row(4, error='it "broke"', text='she said: "request_id":"r-9"\n', text_pair="ö"),
        row(4, input=1),
        row(5),
        {name: value for name, value in row(6).items() if name != "scores"},
        row(7, scores={}),
    ]
    store = open_store(url, tmp_path / "home", kind)
    writer = writer_of(store)
    for each in rows:
        writer.append(to_line(each))
    for is_finished in (False, True):
        if is_finished:
            writer.end()
            store.tidy()
        for number in range(1, 8):
            assert store.find(f"r-{number}").rows == [each for each in rows if each["request_id"] == f"r-{number}"]
        assert store.find("r-9").rows == [] and store.find("r-").rows == [] and store.find('r-1"').rows == []
    (finished,) = names(url)
    assert (finished.kind, finished.server) == (kind, store.server) and finished.ended_s is not None
    assert [path for path in store.folder.iterdir() if PartName.parse(path.name)] == (
        [] if "memory" in url else [store.folder / str(finished)]
    )


def test_a_search_goes_over_blocks_and_lines_of_any_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.registry.prediction_lines._BLOCK_BYTES", 100)
    store = open_store(str(tmp_path / "log"), tmp_path / "home")
    writer = writer_of(store)
    for number in range(50):
        writer.append(to_line(row(number, text="x" * (37 * number))))
    assert ids(store, *range(50)) == list(range(50))


def test_parquet_has_the_schema_that_is_promised(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "log"), tmp_path / "home", "parquet")
    writer = writer_of(store)
    for number in range(2_500):
        writer.append(to_line(row(number)))
    writer.end()
    store.tidy()
    (path,) = store.folder.glob("*.parquet")
    table = pq.read_table(path)
    assert table.schema.equals(SCHEMA)
    assert table["request_id"].to_pylist() == [f"r-{number}" for number in range(2_500)]
    assert table["scores"][0].as_py(maps_as_pydicts="strict") == {"ham": 0.75, "spam": 0.25}
    assert ids(store, 0, 2_499, 2_500) == [0, 2_499]


def test_parquet_of_a_release_that_did_not_know_who_asked_is_read(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "log"), tmp_path / "home", "parquet")
    writer = writer_of(store)
    writer.append(to_line(row(1)))
    writer.end()
    store.tidy()
    (path,) = store.folder.glob("*.parquet")
    pq.write_table(pq.read_table(path).drop_columns(["actor"]), path)
    assert store.find("r-1").rows == [{name: value for name, value in row(1).items() if name != "actor"}]


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_killed_process_left_is_finished_up_to_its_last_whole_row(url: str, kind: str, tmp_path: Path) -> None:
    store = open_store(url, tmp_path / "home", kind)
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from app.registry.prediction_parts import PartWriter\n"
        "writer = PartWriter(Path(sys.argv[1]), sys.argv[2], 10**9, 3600.0)\n"
        "writer.append(sys.stdin.buffer.read())\n"
        'os.write(writer._part._descriptor, b\'{"request_id":"r-torn\')\n'
        "print('written', flush=True)\n"
        "signal.pause()\n"
    )
    lines = b"".join(to_line(row(number)) for number in range(10))
    arguments = [sys.executable, "-c", code, str(store.folder), store.server]
    with subprocess.Popen(arguments, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(lines)
        process.stdin.close()
        assert process.stdout.readline() == b"written\n"
        store.tidy()
        assert [path.name.count("_open_") for path in store.folder.glob("*.jsonl")] == [1]
        assert ids(store, 0, 9) == [0, 9]  # while it lives, its part is its own
        process.send_signal(signal.SIGKILL)
        process.wait()
    store.tidy()
    (finished,) = names(url)
    assert finished.ended_s is not None
    assert ids(store, *range(11)) == list(range(10))
    if kind == "jsonl":
        fs, root = fsspec.core.url_to_fs(url)
        assert fs.cat_file(f"{root}/{finished}") == lines


WRONG: list[Row] = [
    {"scores": [1]},
    {"scores": {"ham": "x"}},
    {"time": "noon"},
    {"time": None},
    {"tokens": "5"},
    {"tokens": 2**63},
]


@pytest.mark.parametrize("good", [0, 200])
def test_a_part_whose_last_rows_are_all_damaged_is_finished(good: int, tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "log"), tmp_path / "home", "parquet")
    writer = writer_of(store)
    for number in range(good):
        writer.append(to_line(row(number)))
    writer.append(b'{"request_id":"r-999"}\n')
    writer.end()
    store.tidy()
    assert len(list(store.folder.glob("*.parquet"))) == 1 and not list(store.folder.glob("*open*"))
    assert ids(store, 0, 199, 999) == ([0, 199] if good else [])


def test_a_time_without_its_zone_is_utc(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "log"), tmp_path / "home", "parquet")
    writer = writer_of(store)
    writer.append(to_line(row(1, time="2026-01-09T12:00:00")))
    writer.end()
    store.tidy()
    assert [found["time"] for found in store.find("r-1").rows] == ["2026-01-09T12:00:00.000000Z"]


def test_damage_costs_the_damaged_rows_alone(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "log"), tmp_path / "home", "parquet")
    writer = writer_of(store)
    for line in (to_line(row(1)), b"\x00\x00\n", b'{"request_id":"r-3"}\n', b"[1]\n", to_line(row(2))):
        writer.append(line)
    for number, wrong in enumerate(WRONG, 4):
        writer.append(to_line(row(number, **wrong)))
    assert ids(store, 1, 2) == [1, 2]
    writer.end()
    store.tidy()
    assert ids(store, *range(1, 4 + len(WRONG))) == [1, 2]
    broken = store.folder / str(PartName(NOON_S, NOON_S + 1, "other", "0" * 8, "parquet"))
    broken.write_bytes(b"PAR1 not really")
    found = store.find("r-2")
    assert len(found.rows) == 1 and found.damaged == [] or found.damaged == [broken.name]
    assert store.find("r-9").damaged == [broken.name]


# -- rotation and bound ------------------------------------------------------------------------------------------------


def test_a_part_ends_by_size_and_by_time(tmp_path: Path) -> None:
    store, clock = open_store(str(tmp_path / "log"), tmp_path / "home"), Clock()
    writer = writer_of(store, most_bytes=1_100, most_s=60, clock=clock)
    for number in range(7):  # of about 335 bytes
        writer.append(to_line(row(number)))
    assert len(names(store.url)) == 2
    clock.now_s += 61
    writer.end_if_due()
    store.tidy()
    assert all(name.ended_s is not None for name in names(store.url))
    clock.now_s += 61
    writer.end_if_due()
    assert len(names(store.url)) == 2  # nothing came: nothing is begun


@pytest.mark.parametrize("kind", KINDS)
def test_the_oldest_parts_go_and_those_of_others_stay(url: str, kind: str, tmp_path: Path) -> None:
    other, clock = open_store(url, tmp_path / "other", kind), Clock()
    theirs = writer_of(other)
    theirs.append(to_line(row(100)))
    theirs.end()
    other.tidy()
    store = open_store(url, tmp_path / "home", kind, limit_bytes=30_000 if kind == "parquet" else 900)
    writer = writer_of(store, clock=clock)
    for number in range(8):
        clock.now_s += 10
        writer.append(to_line(row(number)))
        writer.end()
        store.tidy()
    kept = ids(store, *range(8))
    assert 0 < len(kept) < 8 and kept == list(range(8 - len(kept), 8))
    assert ids(store, 100) == [100]
    fs, root = fsspec.core.url_to_fs(url)
    own = [name for name in names(url) if name.server == store.server]
    assert sum(fs.size(f"{root}/{name}") for name in own) <= store._limit_bytes


def test_the_limit_holds_for_what_earlier_processes_of_the_same_home_wrote(tmp_path: Path) -> None:
    url = str(tmp_path / "log")
    for number in range(3):
        store = open_store(url, tmp_path / "home", limit_bytes=500)
        writer = writer_of(store)
        writer.append(to_line(row(number)))
        writer.end()
        store.tidy()
    assert len(names(url)) == 1


def test_old_parts_go_though_nothing_is_written(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction_store, "_TRIM_EVERY_S", 0.0)
    other = open_store(url, tmp_path / "other")
    store = PredictionStore(url, tmp_path / "home", "jsonl", 10**9, limit_s=1000.0)
    for number, of in enumerate((other, store, store)):
        writer = writer_of(of)
        writer.append(to_line(row(number)))
        if number < 2:
            os.utime(next(iter(of._waiting())).path, (time.time() - 2000,) * 2)
        writer.end()
        of.tidy()
    assert ids(store, 0, 1, 2) == [0, 2]
    now = time.time()
    monkeypatch.setattr(prediction_store.time, "time", lambda: now + 1001)
    store.tidy()
    assert [name.server for name in names(url)] == [other.server]


def test_a_log_whose_folder_is_emptied_goes_on_in_another_file(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "log"), tmp_path / "home")
    writer = writer_of(store)
    writer.append(to_line(row(1)))
    for path in store.folder.iterdir():
        path.unlink()
    writer.append(to_line(row(2)))
    assert ids(store, 1, 2) == [2]


# -- searching ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hourly(tmp_path: Path) -> PredictionStore:
    """Row n was written in hour n, at its half."""
    store, clock = open_store(str(tmp_path / "log"), tmp_path / "home"), Clock()
    writer = writer_of(store, clock=clock)
    for number in range(6):
        writer.append(to_line(row(number, time=f"2026-01-09T{12 + number}:30:00.000000Z")))
        os.utime(next(store.folder.glob("*_open_*")), (clock.now_s + 3600,) * 2)
        writer.end()
        store.tidy()
        clock.now_s += 3600
    return store


def test_a_search_is_narrowed_by_time(hourly: PredictionStore) -> None:
    assert hourly.find("r-0").files == 6
    narrow = hourly.find("r-3", since_s=NOON_S + 3.4 * 3600, until_s=NOON_S + 3.6 * 3600)
    assert len(narrow.rows) == 1 and narrow.files == 1 and narrow.oldest_s == NOON_S + 3 * 3600
    assert hourly.find("r-3", since_s=NOON_S + 4.5 * 3600).rows == []
    assert hourly.find("r-3", until_s=NOON_S + 2.5 * 3600).rows == []
    slack = hourly.find("r-3", since_s=NOON_S + 3.6 * 3600)  # its file is searched, and the row is older
    assert slack.rows == [] and slack.files == 3
    exact_s = NOON_S + 3.5 * 3600
    assert len(hourly.find("r-3", exact_s, exact_s).rows) == 1
    assert hourly.find("r-3", until_s=NOON_S + 3.4 * 3600).rows == []


def test_a_later_request_with_the_same_id_hides_no_earlier_one(hourly: PredictionStore) -> None:
    clock = Clock()
    clock.now_s += 86_400
    writer_of(hourly, clock=clock).append(to_line(row(0, time="2026-01-10T12:00:00.000000Z")))
    assert [found["time"] for found in hourly.find("r-0").rows] == [
        "2026-01-09T12:30:00.000000Z",
        "2026-01-10T12:00:00.000000Z",
    ]


def test_files_that_nobody_can_read_hide_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(str(tmp_path / "log"), tmp_path / "home", "parquet")
    writer, clock = writer_of(store, clock=(clock := Clock())), clock
    for number in range(3):
        for _ in range(100):
            writer.append(to_line(row(number)))
        writer.end()
        store.tidy()
        clock.now_s += 10
    first, second, _ = sorted(store.folder.glob("*.parquet"))
    content = first.read_bytes()
    first.write_bytes(content[:4] + b"\xff" * 200 + content[204:])  # its pages, which its end still describes
    open_file = Path.open

    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == second:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return open_file(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    found = store.find("r-2")
    assert len(found.rows) == 100 and sorted(found.damaged) == [first.name, second.name]
    assert len([record for record in caplog.records if "cannot be read" in record.getMessage()]) == 2


def test_a_place_that_is_gone_is_no_damaged_file(hourly: PredictionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("it is gone")

    monkeypatch.setattr(hourly, "_opened", refuse)
    with pytest.raises(UnavailableError, match="cannot be read: it is gone"):
        hourly.find("r-1")


def test_a_search_that_would_take_too_long_says_where_to_go_on(
    hourly: PredictionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction_store, "_SEARCHED_BYTES", 1_100)
    found = hourly.find("r-1")
    assert found.rows == [] and found.files == 3 and found.stopped_s == NOON_S + 3 * 3600
    later = hourly.find("r-5")  # what is found may not be all
    assert len(later.rows) == 1 and later.stopped_s == NOON_S + 3 * 3600
    while not found.rows:
        assert found.stopped_s is not None
        found = hourly.find("r-1", until_s=found.stopped_s)


def test_a_search_that_was_given_up_among_files_of_one_moment_comes_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path / "log"), tmp_path / "home", "jsonl")
    for hour in range(4):
        for server in ("a", "b", "c"):
            name = PartName(NOON_S + 3600 * hour, NOON_S + 3600 * (hour + 1) - 5, server, f"{hour:08x}", "jsonl")
            (store.folder / str(name)).write_bytes(to_line(row(hour)))
    monkeypatch.setattr(prediction_store, "_SEARCH_S", -1.0)  # each file takes too long
    stops, found = list[float](), store.find("r-0")
    while found.stopped_s is not None and not found.rows:
        stops.append(found.stopped_s)
        found = store.find("r-0", until_s=found.stopped_s)
    assert found.rows and stops == sorted(set(stops), reverse=True)


def test_a_part_that_is_uploaded_while_it_is_looked_for_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store("memory://uploaded-meanwhile", tmp_path / "home", "jsonl")
    writer = writer_of(store)
    writer.append(to_line(row(1)))
    writer.end()
    here: Callable[[], Any] = store._here

    def late() -> Any:
        monkeypatch.setattr(store, "_here", here)
        store.tidy()
        return here()

    monkeypatch.setattr(store, "_here", late)
    assert len(store.find("r-1").rows) == 1


def test_a_part_that_is_finished_while_it_is_looked_for_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path / "log"), tmp_path / "home", "parquet")
    writer = writer_of(store)
    writer.append(to_line(row(1)))
    files: Callable[[], Any] = store._files

    def late() -> Any:
        listed = files()
        writer.end()
        store.tidy()
        return listed

    monkeypatch.setattr(store, "_files", late)
    assert len(store.find("r-1").rows) == 1


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_a_full_disk_takes_no_half_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel does on a full disk: some bytes fit, then none."""
    store = open_store(str(tmp_path / "log"), tmp_path / "home")
    writer = writer_of(store)
    writer.append(to_line(row(1)))
    write = os.write
    room = [100]

    def full(descriptor: int, content: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken, room[0] = write(descriptor, content[: room[0]]), 0
        return taken

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        writer.append(to_line(row(2)))
    monkeypatch.setattr(os, "write", write)
    writer.append(to_line(row(3)))
    (path,) = store.folder.iterdir()
    assert [json.loads(line)["request_id"] for line in path.read_bytes().splitlines()] == ["r-1", "r-3"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_that_does_not_answer_gets_everything_later(
    kind: str, memory: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store("memory://log", tmp_path / "home", kind)
    writer = writer_of(store)

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("it is gone")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "put_file", refuse)
        for number in range(3):
            writer.append(to_line(row(number)))
            writer.end()
            with pytest.raises(UnavailableError, match="the prediction log memory://log cannot be written: it is gone"):
                store.tidy()
    assert names("memory://log") == [] and ids(store, 0, 1, 2) == [0, 1, 2]
    open_store("memory://log", tmp_path / "home", kind).tidy()  # the next process
    assert len(names("memory://log")) == 3
    assert ids(store, 0, 1, 2) == [0, 1, 2]
    assert {path.name for path in store.folder.iterdir()} == {"server"}


@pytest.mark.parametrize("num_bad", [1, 4])
def test_a_part_that_cannot_be_finished_holds_up_no_other_and_is_told_once(
    num_bad: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, clock = open_store(str(tmp_path / "log"), tmp_path / "home"), Clock()
    writer, rename = writer_of(store, clock=clock), Path.rename

    def write(number: int) -> None:
        clock.now_s += 1
        writer.append(to_line(row(number)))
        writer.end()

    for number in range(num_bad):
        write(number)
    bad = {path.name for path in store.folder.iterdir()}
    chances = [name.removesuffix(".jsonl")[-8:] for name in bad]

    def refuse(path: Path, target: Path) -> Path:
        if any(chance in path.name for chance in chances):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        for number in range(10, 18):
            write(number)
            with contextlib.suppress(UnavailableError):
                store.tidy()
        assert {path.name for path in store.folder.glob("*_open_*")} == bad
        told = [record.getMessage() for record in caplog.records]
        assert sorted(name for line in told for name in bad if name in line) == sorted(bad)
    monkeypatch.setattr(prediction_store, "_STUCK_S", -1.0)
    for _ in range(2):
        store.tidy()
    assert list(store.folder.glob("*_open_*")) == []


def test_what_waits_for_a_store_is_bounded_and_the_oldest_rows_are_counted(
    memory: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store("memory://log", tmp_path / "home")
    monkeypatch.setattr(prediction_store, "_WAITING_BYTES", 1_000)
    writer, clock = writer_of(store, clock=(clock := Clock())), clock
    for number in range(4):
        clock.now_s += 1
        writer.append(to_line(row(10 * number)) + to_line(row(10 * number + 1)))
        writer.end()
    assert store.drop_waiting() == 6 and store.drop_waiting() == 0
    assert ids(store, 0, 10, 20, 30) == [30]


@pytest.mark.parametrize("kind", KINDS)
def test_what_can_never_be_finished_is_bounded_too(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no process can be started. The newest rows stay."""
    store, clock = open_store(str(tmp_path / "log"), tmp_path / "home", kind, limit_bytes=1_500), Clock()
    writer = writer_of(store, clock=clock)
    monkeypatch.setattr("sys.executable", str(tmp_path / "no-python"))
    lost = 0
    for number in range(12):
        clock.now_s += 1
        writer.append(to_line(row(number)))
        writer.end()
        lost += store.drop_waiting()
        with contextlib.suppress(UnavailableError):
            store.tidy()
    assert sum(path.stat().st_size for path in store.folder.iterdir()) <= 1_500 + 400
    assert 0 < lost < 12 and ids(store, *range(12)) == list(range(lost, 12))


def test_what_waits_for_a_store_does_not_outlive_its_days(memory: MemoryFileSystem, tmp_path: Path) -> None:
    store = PredictionStore("memory://log", tmp_path / "home", "jsonl", 10**9, limit_s=1000.0)
    writer = writer_of(store, clock=(clock := Clock()))
    for number in range(3):
        clock.now_s += 1
        writer.append(to_line(row(number)))
        writer.end()
    first, second, _ = store._waiting()
    for file in (first, second):
        os.utime(file.path, (time.time() - 2000,) * 2)
    assert store.drop_waiting() == 2 and store.drop_waiting() == 0
    assert ids(store, 0, 1, 2) == [2]


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("/proc/nowhere/log", "the prediction log /proc/nowhere/log cannot be written: No such file"),
        ("/dev/null/log", "the prediction log /dev/null/log cannot be written: Not a directory"),
        ("nothing://user:secret@host/log", "nothing://…@host/log is no place for predictions"),
    ],
)
def test_a_place_that_cannot_be_written_is_told_at_once(url: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=told) as caught:
        open_store(url, tmp_path / "home")
    assert "secret" not in str(caught.value)


def test_a_place_without_locks_is_told_at_once_and_nothing_is_left_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path / "log"), tmp_path / "home")
    writer = writer_of(store)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    opened = len(os.listdir("/proc/self/fd"))
    for number in range(3):
        with pytest.raises(OSError, match="No locks available"):
            writer.append(to_line(row(number)))
    assert list(store.folder.iterdir()) == [] and len(os.listdir("/proc/self/fd")) == opened
    with pytest.raises(SettingsError, match="cannot be written: No locks available; give the server a place"):
        open_store(str(tmp_path / "log"), tmp_path / "home")
    assert list(store.folder.iterdir()) == []


def test_a_store_that_refuses_is_told_at_once(
    memory: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("Forbidden for user:secret")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", refuse)
    told = "memory://…@log cannot be written: Forbidden for …; give the server a place"
    with pytest.raises(SettingsError, match=told):
        open_store("memory://user:secret@log", tmp_path / "home")
    assert memory.find("/") == []
