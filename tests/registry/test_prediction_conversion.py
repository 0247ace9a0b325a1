"""A part of the prediction log gets its last form aside: rows of requests, in nobody's time, and nothing half done."""

from __future__ import annotations

import gc
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, Literal

import orjson
import pyarrow.parquet as pq
import pytest

from app.registry import prediction_conversion
from app.registry.prediction_conversion import Converter
from app.registry.prediction_lines import Row, rows_of, to_line
from app.registry.prediction_parts import PartName, PartWriter, left_alone
from app.registry.prediction_store import PredictionStore
from tests.serving import ROOT, wait_for

Kind = Literal["jsonl", "parquet"]
KINDS: tuple[Kind, ...] = ("jsonl", "parquet")


def request(number: int = 0) -> Row:
    """Two texts, of which two versions each said something."""
    targets = [
        {"reference": name, "task": "spam", "version": v, "digest": f"sha256:{v}", "arm": "champion", "cached": False}
        for v, name in ((1, "spam"), (2, "spam@2"))
    ]
    answers = {
        "spam": {"version": 1, "arm": "champion", "label": "ham", "score": 0.75, "scores": {"ham": 0.75, "spam": 0.25}},
        "spam@2": {"version": 2, "arm": "pinned", "error": "it broke", "error_type": "engine"},
    }
    return {
        "time": "2026-01-09T12:00:00.000000Z",
        "request_id": f"r-{number}",
        "inputs": [{"text_sha256": text, "tokens": 5, "truncated": False, "targets": targets} for text in ("ab", "cd")],
        "results": [answers, answers],
    }


@contextmanager
def part_of(path: Path, lines: bytes) -> Iterator[int]:
    path.write_bytes(lines)
    with left_alone(path) as part:
        assert part is not None
        yield part


def convert(part: int, target: Path, kind: Kind, is_pressing: Callable[[], bool], left_s: Callable[[], float]) -> bool:
    converter = Converter(kind)
    try:
        return converter.convert(part, target, is_pressing, left_s)
    finally:
        converter.close()


def never() -> bool:
    return False


def forever() -> float:
    return math.inf


def conversions() -> list[int]:
    """This process's children that are at it, whichever thread began them."""
    found = [(task / "children").read_text().split() for task in Path("/proc/self/task").iterdir()]
    return [int(p) for pids in found for p in pids if b"_conversion" in Path(f"/proc/{p}/cmdline").read_bytes()]


def is_there(child: int) -> bool:
    return Path(f"/proc/{child}").exists()


MANY = b"".join(to_line(request(number)) for number in range(20_000))  # about a second of work


# -- what a line says --------------------------------------------------------------------------------------------------


def test_a_request_is_a_row_for_each_input_and_what_was_asked_for_it() -> None:
    rows = rows_of(to_line(request()))
    assert [(row["input"], row["text_sha256"], row["reference"]) for row in rows] == [
        (0, "ab", "spam"),
        (0, "ab", "spam@2"),
        (1, "cd", "spam"),
        (1, "cd", "spam@2"),
    ]
    assert rows[0] == {
        "time": "2026-01-09T12:00:00.000000Z",
        "request_id": "r-0",
        "input": 0,
        "text_sha256": "ab",
        "tokens": 5,
        "truncated": False,
        "reference": "spam",
        "task": "spam",
        "version": 1,
        "digest": "sha256:1",
        "arm": "champion",
        "cached": False,
        "label": "ham",
        "scores": {"ham": 0.75, "spam": 0.25},
    }
    assert rows[1]["error"] == "it broke" and not {"label", "score", "error_type"} & rows[1].keys()


@pytest.mark.parametrize(
    "damage",
    [
        lambda said: said.pop("results"),
        lambda said: said["results"].pop(),
        lambda said: said["results"].__setitem__(1, {}),
        lambda said: said.__setitem__("inputs", 3),
        lambda said: said["inputs"][0].pop("targets"),
        lambda said: said["inputs"][0]["targets"][0].pop("reference"),
    ],
    ids=("no results", "a result less", "an answer less", "a number", "no targets", "no reference"),
)
def test_a_damaged_request_has_no_rows(damage: Callable[[Any], Any]) -> None:
    said = orjson.loads(to_line(request()))
    damage(said)
    assert rows_of(to_line(said)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_it_makes_rows_and_tells_how_much_is_damaged(
    kind: Kind, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = to_line(request(1)) + b'{"inputs":\n' + b"7\n" + to_line(request(2))
    with part_of(tmp_path / "part", lines) as part:
        convert(part, tmp_path / "made", kind, never, forever)
    (told,) = caplog.records
    assert told.getMessage().startswith("2 damaged lines or rows")
    wanted = [row for number in (1, 2) for row in rows_of(to_line(request(number)))]
    if kind == "jsonl":
        assert [orjson.loads(line) for line in (tmp_path / "made").read_bytes().splitlines()] == wanted
    else:
        found = pq.read_table(tmp_path / "made").to_pylist(maps_as_pydicts="lossy")
        assert [(r["request_id"], r["input"], r["label"], r["scores"], r["error"]) for r in found] == [
            (r["request_id"], r["input"], r.get("label"), r.get("scores"), r.get("error")) for r in wanted
        ]


# -- how it runs -------------------------------------------------------------------------------------------------------


def scheduling(seen: set[int]) -> Callable[[], float]:
    """Sees in passing how the other process is scheduled."""

    def look() -> float:
        seen.update(os.sched_getscheduler(child) for child in conversions())
        return math.inf

    return look


def test_it_takes_idle_time(tmp_path: Path) -> None:
    seen: set[int] = set()
    with part_of(tmp_path / "part", MANY) as part:
        assert convert(part, tmp_path / "made", "parquet", never, scheduling(seen))
    assert os.SCHED_IDLE in seen


def test_it_takes_any_time_where_it_presses(tmp_path: Path) -> None:
    seen: set[int] = set()
    with part_of(tmp_path / "part", MANY) as part:
        assert convert(part, tmp_path / "made", "parquet", lambda: True, scheduling(seen))
    assert seen == {os.SCHED_OTHER}


def test_where_no_time_is_idle_it_begins_again_with_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction_conversion, "_MOST_IDLE_S", 0.0)
    seen: set[int] = set()
    with part_of(tmp_path / "part", MANY) as part:
        assert convert(part, tmp_path / "made", "parquet", never, scheduling(seen))
    assert os.SCHED_OTHER in seen and pq.read_metadata(tmp_path / "made").num_rows == 4 * 20_000


def test_what_takes_too_long_at_the_end_is_left_for_later(tmp_path: Path) -> None:
    begun: list[int] = []

    def left_s() -> float:
        begun.extend(conversions())
        return 0.0 if begun else math.inf

    with part_of(tmp_path / "part", MANY) as part:
        assert not convert(part, tmp_path / "made", "parquet", never, left_s)
    assert begun and not conversions()


@pytest.fixture
def converter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Converter]:
    monkeypatch.setattr(prediction_conversion, "_MOST_IDLE_S", math.inf)  # however busy this machine is
    made = Converter("parquet")
    yield made
    made.close()


def convert_one(converter: Converter, folder: Path, is_pressing: Callable[[], bool] = never) -> int:
    """By which process."""
    with part_of(folder / "part", to_line(request())) as part:
        assert converter.convert(part, folder / "made", is_pressing, forever)
    assert pq.read_metadata(folder / "made").num_rows == 4
    assert converter._worker is not None
    return converter._worker._process.pid


def test_the_process_is_kept_for_the_next_part_in_the_same_haste(converter: Converter, tmp_path: Path) -> None:
    first = convert_one(converter, tmp_path)
    assert convert_one(converter, tmp_path) == first
    pressed = convert_one(converter, tmp_path, lambda: True)
    assert pressed != first and os.sched_getscheduler(pressed) == os.SCHED_OTHER
    assert convert_one(converter, tmp_path, lambda: True) == pressed
    assert os.sched_getscheduler(convert_one(converter, tmp_path)) == os.SCHED_IDLE


def test_a_process_with_nothing_to_do_goes(
    converter: Converter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converter.rest()
    kept = convert_one(converter, tmp_path)
    converter.rest()
    assert is_there(kept)
    with monkeypatch.context() as patch:
        patch.setattr(prediction_conversion, "_KEPT_S", 0.0)
        converter.rest()
    assert not is_there(kept)
    convert_one(converter, tmp_path)


def test_of_a_kept_process_that_was_killed_the_next_part_knows_nothing(converter: Converter, tmp_path: Path) -> None:
    first = convert_one(converter, tmp_path)
    os.kill(first, signal.SIGKILL)
    os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
    assert convert_one(converter, tmp_path) != first


def test_one_that_is_killed_at_its_work_is_told_and_the_next_try_has_another(
    converter: Converter, tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill() -> float:
        for child in conversions() if not killed else ():
            os.kill(child, signal.SIGKILL)
            killed.append(child)
        return math.inf

    with part_of(tmp_path / "part", MANY) as part, pytest.raises(OSError, match="ended with status -9"):
        converter.convert(part, tmp_path / "made", never, kill)
    assert killed and not any(map(is_there, killed))
    convert_one(converter, tmp_path)


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("raise MemoryError('too much')", "^MemoryError: too much$"),
        ("import os, time; os.close(0); time.sleep(600)", "broke and did not end$"),
    ],
)
def test_how_it_breaks_is_told_and_the_next_try_has_another(
    converter: Converter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, told: str
) -> None:
    with (
        monkeypatch.context() as patch,
        part_of(tmp_path / "part", to_line(request())) as part,
        pytest.raises(OSError, match=told),
    ):
        patch.setattr(prediction_conversion, "_CODE", code)
        patch.setattr(prediction_conversion, "_LAST_S", 2.0)
        converter.convert(part, tmp_path / "made", never, forever)
    convert_one(converter, tmp_path)


def test_what_it_says_in_passing_is_not_why_it_ends_later(
    converter: Converter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much it says."""
    talks = "import sys; sys.stderr.write('by the way ' * 100_000); sys.stderr.flush(); "
    monkeypatch.setattr(prediction_conversion, "_CODE", talks + prediction_conversion._CODE)
    convert_one(converter, tmp_path)

    asked = count()

    def kill() -> float:
        if next(asked):  # not before it is at it: in its place another one would begin, and talk
            for child in conversions():
                os.kill(child, signal.SIGKILL)
        return math.inf

    with part_of(tmp_path / "part", MANY) as part, pytest.raises(OSError, match="ended with status -9"):
        converter.convert(part, tmp_path / "made", never, kill)


def test_whatever_goes_wrong_no_answer_is_taken_for_that_of_the_next_part(converter: Converter, tmp_path: Path) -> None:
    class Broken(Exception): ...

    def breaks() -> float:
        if conversions():
            raise Broken
        return math.inf

    with part_of(tmp_path / "part", MANY) as part, pytest.raises(Broken):
        converter.convert(part, tmp_path / "made", never, breaks)
    convert_one(converter, tmp_path)


def test_it_lets_go_of_a_part_that_it_is_done_with(converter: Converter, tmp_path: Path) -> None:
    kept = convert_one(converter, tmp_path)
    with left_alone(tmp_path / "part") as part:
        assert part is not None and is_there(kept)


def test_one_that_nobody_closes_ends_with_who_made_it(tmp_path: Path) -> None:
    converter = Converter("parquet")
    kept = convert_one(converter, tmp_path)
    assert is_there(kept)
    del converter
    gc.collect()
    assert not is_there(kept)


def test_nobody_else_can_read_what_is_half_made(tmp_path: Path) -> None:
    modes: set[int] = set()

    def look() -> float:
        if (tmp_path / "made").exists():
            modes.add((tmp_path / "made").stat().st_mode & 0o777)
        return math.inf

    with part_of(tmp_path / "part", MANY) as part:
        assert convert(part, tmp_path / "made", "parquet", never, look)
    assert modes == {0o600}


def test_what_it_cannot_write_is_told_in_a_sentence(tmp_path: Path) -> None:
    with (
        part_of(tmp_path / "part", to_line(request())) as part,
        pytest.raises(OSError, match="^No such file or directory"),
    ):
        convert(part, tmp_path / "none" / "made", "jsonl", never, forever)


def test_who_stops_the_server_does_not_stop_it(tmp_path: Path) -> None:
    """A signal to the whole group, as from a terminal, is the server's to heed."""
    told: list[int] = []

    def stop() -> float:
        for child in conversions() if not told else ():
            os.kill(child, signal.SIGINT)
            os.kill(child, signal.SIGTERM)
            told.append(child)
        return math.inf

    with part_of(tmp_path / "part", MANY) as part:
        assert convert(part, tmp_path / "made", "parquet", never, stop)
    assert told and pq.read_metadata(tmp_path / "made").num_rows == 4 * 20_000


def test_a_killed_server_leaves_a_part_that_nobody_finishes_twice(tmp_path: Path) -> None:
    """Its other process has the lock until it ends; then the next server's begins anew."""
    store = PredictionStore(str(tmp_path / "log"), tmp_path / "home", "parquet", 10**9)
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from app.registry.prediction_parts import PartWriter\n"
        "from app.registry.prediction_store import PredictionStore\n"
        'store = PredictionStore(sys.argv[1], Path(sys.argv[2]), "parquet", 10**9)\n'
        "writer = PartWriter(store.folder, store.server, 10**9, 3600.0)\n"
        "writer.append(sys.stdin.buffer.read())\n"
        "writer.end()\n"
        "store.tidy()\n"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "log"), str(tmp_path / "home")]
    with subprocess.Popen(arguments, cwd=ROOT, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(MANY)
        process.stdin.close()
        wait_for(lambda: any((tmp_path / "log").glob(".*.partial")))
        process.kill()
    (part,) = (tmp_path / "log").glob("*_open_*")
    with left_alone(part) as ours:
        assert ours is None
    other = PartName.parse(part.name)
    assert other is not None
    stray = part.with_name(f".{replace(other, ended_s=other.began_s, kind='jsonl')}.partial")
    stray.touch()  # of a try at another format
    store.tidy()
    assert part.exists()
    wait_for(lambda: (store.tidy(), not part.exists())[1])
    (made,) = (tmp_path / "log").iterdir()
    assert pq.read_metadata(made).num_rows == 4 * 20_000


def test_parts_of_a_release_that_wrote_rows_are_finished_beside_those_of_this_one(tmp_path: Path) -> None:
    store = PredictionStore(str(tmp_path / "log"), tmp_path / "home", "parquet", 10**9)
    writer = PartWriter(store.folder, store.server, 10**9, 3600.0)
    writer.append(b"".join(map(to_line, rows_of(to_line(request(1))))) + to_line(request(2)))
    writer.end()
    store.tidy()
    assert [len(store.find(f"r-{number}").rows) for number in (1, 2)] == [4, 4]


def test_at_the_end_what_is_left_waits_and_nothing_is_called_a_fault(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = PredictionStore(str(tmp_path / "log"), tmp_path / "home", "parquet", 10**9)
    writer = PartWriter(store.folder, store.server, 1, 3600.0)
    for number in range(3):
        writer.append(to_line(request(number)))
    writer.end()
    store.tidy(lambda: 0.0)
    assert len(list(store.folder.glob("*_open_*"))) == 3 and not caplog.records
    assert len(store.find("r-1").rows) == 4
