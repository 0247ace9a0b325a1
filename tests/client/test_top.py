"""What whoever watches a server sees: in a pipe, in a terminal, and while the server is away."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import httpx2
import pytest
from rich.console import Console, ConsoleDimensions

from app.cli import main
from app.client.audit import Newest, newest
from app.client.http import Server
from app.client.rates import Between, Scrape
from app.client.top_figures import ORDERS
from app.client.top_view import Frame, view
from app.domain import BatchReport
from app.telemetry.exposition import read_exposition
from app.telemetry.metrics import Metrics
from tests.client.conftest import Run
from tests.client.recorded import Answer, answering
from tests.fake_rollout import FakeRollout
from tests.serving import ROOT, ServerProcess, wait_for

INFO = {"backbone": {"name": "tiny", "device": "cpu", "dtype": "float32"}}
SPAM = {"champion": 1, "challengers": [{"version": 2, "percent": 10.0}], "shadow": [3], "gates": None}
TONE = {"champion": 4, "challengers": [], "shadow": [], "gates": None}
TASKS = [{"name": "new", "traffic": None}, {"name": "spam", "traffic": SPAM}, {"name": "tone", "traffic": TONE}]
FORBIDDEN = (403, {"error": "key k1 lacks the role audit", "error_type": "forbidden"})


def entry(sequence: int, reason: str) -> dict[str, Any]:
    before, after = {**TONE, "champion": sequence - 1}, {**TONE, "champion": sequence}
    who = {
        "sequence": sequence,
        "generation": sequence,
        "at": 1700000000.0,
        "actor": "ada",
        "action": "traffic",
        "task": "tone",
    }
    return {**who, "reason": reason, "before": before, "after": after}


def scraped(metrics: Metrics, *, drift: bool = False) -> bytes:
    text = metrics.render()[0].decode()
    gauge = 'manifold_drift_psi{task="spam",version="1",kind="%s"} %s\n'
    return (text + (gauge % ("score", 0.05) + gauge % ("length", 0.31) if drift else "")).encode()


@pytest.fixture
def metrics() -> Metrics:
    """Of a server that has long run."""
    counted = Metrics()
    counted.following(17, 4)
    counted.index_answered()
    counted.watch(lambda: 3, None)
    counted.predicted("spam", 1, "champion", "success", 1000)
    for _ in range(50):
        counted.answered("/v1/predict", 200, 20.0)
    return counted


def work(metrics: Metrics) -> None:
    """Ten requests of 15 to 20 ms for spam, four of their answers by the challenger, one of which failed."""
    for _ in range(10):
        metrics.answered("/v1/predict", 200, 0.016)
    metrics.predicted("spam", 1, "champion", "success", 6)
    metrics.predicted("spam", 2, "challenger", "success", 3)
    metrics.predicted("spam", 2, "challenger", "failure", 1)
    metrics.predicted("spam", 9, "pinned", "success", 1)
    for stage in ("tokenize", "queue"):
        metrics.staged(stage, 0.0015)
    shares = {("spam", 1): 0.5, ("spam", 2): 0.25, ("spam", 3): 0.25}
    metrics.ran(BatchReport(8, 256, 0.0001, 0.02, 0.001, shares, passes=22.0))
    metrics.answered("/livez", 200, 0.001)


def server(counted: Metrics, **changes: Sequence[Answer]) -> dict[str, list[Answer]]:
    """What it answers to two looks; it works between them."""
    before = scraped(counted)
    work(counted)
    answers: dict[str, Sequence[Answer]] = {
        "metrics": [(200, before), (200, scraped(counted))],
        "info": [(200, INFO)],
        "tasks": [(200, {"generation": 17, "tasks": TASKS})],
        "audit": [(200, {"entries": []})],
    }
    paths = {"metrics": "/metrics", "info": "/info", "tasks": "/v1/tasks", "audit": "/v1/audit"}
    return {f"GET {paths[name]}": list(given) for name, given in (answers | changes).items()}


def once(answers: Mapping[str, list[Answer]], capsys: pytest.CaptureFixture[str], *options: str) -> list[str]:
    with answering(answers) as recorded:
        assert main(["top", "--once", "--interval", "0.2", "--url", recorded.url, *options]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "\x1b" not in out
    return out.splitlines()


def cells(lines: Sequence[str], arm: str) -> list[str]:
    """Of the first row in this arm."""
    line = next(line for line in lines if f" {arm} " in line)
    return re.split(r"\s{2,}", line.strip())


# -- once --------------------------------------------------------------------------------------------------------------


def test_the_figures_are_of_the_time_between_two_looks(metrics: Metrics, capsys: pytest.CaptureFixture[str]) -> None:
    """And not of the fifty slow requests and the thousand answers before."""
    lines = once(server(metrics), capsys)
    text = "\n".join(lines)
    assert "tiny on cpu in float32  generation 17" in lines[0]
    assert re.search(r"predict +\d+\.\d/s  p50 15 ms  p99 19.9 ms  failed 0.0 %", text)
    assert "2.20 passes a request" in text and "8.0 rows a batch  3 waiting" in text
    assert "tokenize 1.5 ms  queue 1.5 ms  collate 0.1 ms  forward 20 ms  heads 1 ms" in text
    assert "livez" not in text and "embeddings" not in text


def test_every_version_is_shown_in_its_arm(metrics: Metrics, capsys: pytest.CaptureFixture[str]) -> None:
    lines = once(server(metrics), capsys)
    task, version, _, answers, drift, failed, passes, device = cells(lines, "champion")
    assert (task, version, drift, failed, passes) == ("spam", "1", "–", "0.0 %", "2.00")
    assert float(answers) > 0 and float(device.removesuffix(" %")) > 0
    assert cells(lines, "challenger 10 %")[1:7:4] == ["2", "25.0 %"]
    assert cells(lines, "shadow")[1:7] == ["3", "shadow", "–", "–", "–", "–"]
    assert cells(lines, "pinned")[:3] == ["spam", "9", "pinned"]
    assert not any(line.startswith("new ") for line in lines)  # nothing of it is live


def test_the_worst_drift_of_a_version_is_shown(metrics: Metrics, capsys: pytest.CaptureFixture[str]) -> None:
    lines = once(server(metrics, metrics=[(200, scraped(metrics, drift=True))]), capsys)
    assert any("0.31 length" in line and line.startswith("spam") for line in lines)


def test_a_pipe_gets_one_look(metrics: Metrics, capsys: pytest.CaptureFixture[str]) -> None:
    with answering(server(metrics)) as recorded:
        assert main(["top", "--interval", "0.2", "--url", recorded.url]) == 0
    assert "p50 15 ms" in capsys.readouterr().out


def test_a_restart_between_two_looks_is_no_rate_below_zero(
    metrics: Metrics, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh = Metrics()
    work(fresh)
    text = "\n".join(once(server(metrics, metrics=[(200, scraped(metrics)), (200, scraped(fresh))]), capsys))
    assert "-" not in text.replace("2023-11-14", "").partition("up")[2].partition("Z")[2]
    assert "p50 15 ms" in text and "2.20 passes a request" in text


def test_the_last_changes_are_the_newest_first(metrics: Metrics, capsys: pytest.CaptureFixture[str]) -> None:
    entries = [entry(1, ""), entry(2, "it is better"), entry(3, "[bold]no\x1b[2J")]
    answers = [(200, {"entries": entries[:1]})] + [(200, {"entries": []})] * 3
    lines = once(server(metrics, audit=[*answers, (200, {"entries": entries})]), capsys)
    told = lines[lines.index("last changes") + 1 :]
    assert told[0].endswith("ada  traffic  tone  champion 2 → champion 3  [bold]no·[2J")
    assert told[1] == "2023-11-14 22:13:20Z  ada  traffic  tone  champion 1 → champion 2  it is better"


def test_a_key_without_the_role_is_refused_only_once(metrics: Metrics, capsys: pytest.CaptureFixture[str]) -> None:
    """Each refusal stands in the audit log."""
    answers = server(metrics, audit=[FORBIDDEN])
    metrics.following(18, 4)
    answers["GET /metrics"].append((200, scraped(metrics)))
    with answering(answers) as recorded:
        assert main(["top", "--once", "--interval", "0.2", "--url", recorded.url]) == 0
    assert "the last changes are left out: key k1 lacks the role audit" in capsys.readouterr().out
    assert [path for _, path, _ in recorded.asked].count("/v1/audit") == 1


def test_an_index_that_is_out_at_first_leaves_no_gap_behind(
    metrics: Metrics, capsys: pytest.CaptureFixture[str]
) -> None:
    """The generation is the same when it is back."""
    out = (503, {"error": "the index is out of reach", "error_type": "unavailable"})
    lines = once(server(metrics, audit=[out, (200, {"entries": []})]), capsys)
    assert "no changes found" in lines and not any("left out" in line for line in lines)


def test_tasks_are_read_again_only_when_the_generation_moved(
    metrics: Metrics, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = server(metrics)
    with answering(answers) as recorded:
        assert main(["top", "--once", "--interval", "0.2", "--url", recorded.url]) == 0
    assert [path for _, path, _ in recorded.asked].count("/v1/tasks") == 1
    metrics.following(18, 4)
    other = [(200, {"tasks": []}), (200, {"tasks": [{"name": "fresh", "traffic": TONE}]})]
    moved = server(metrics, tasks=other)
    metrics.following(19, 4)
    lines = once({**moved, "GET /metrics": [moved["GET /metrics"][0], (200, scraped(metrics))]}, capsys)
    assert any(line.startswith("fresh") for line in lines)


@pytest.mark.parametrize(("order", "first"), [("answers", "spam"), ("task", "able")])
def test_tasks_stand_in_the_order_that_is_asked_for(
    metrics: Metrics, capsys: pytest.CaptureFixture[str], order: str, first: str
) -> None:
    tasks = [*TASKS, {"name": "able", "traffic": TONE}]
    lines = once(server(metrics, tasks=[(200, {"tasks": tasks})]), capsys, "--sort", order)
    assert lines[next(number for number, line in enumerate(lines) if line.startswith("task")) + 1].startswith(first)


def test_what_is_wrong_with_the_index_is_told(metrics: Metrics, capsys: pytest.CaptureFixture[str]) -> None:
    answers = server(metrics)
    metrics.index_lost(12.0)
    metrics.load_failed("ArtifactError")
    answers["GET /metrics"][1] = (200, scraped(metrics))
    text = "\n".join(once(answers, capsys))
    assert "the index does not answer for 12 s" in text and "1 loads of versions failed" in text


@pytest.mark.parametrize(
    ("answers", "sentence"),
    [
        ({"metrics": [(200, b"<html>")]}, "/metrics says cannot be read"),
        ({"metrics": [(404, b"<html>")]}, "is not Manifold (status 404)"),
        ({"tasks": [(401, {"error": "no"})]}, "this server asks for a key"),
    ],
)
def test_what_cannot_be_watched_is_one_sentence(
    metrics: Metrics, capsys: pytest.CaptureFixture[str], answers: dict[str, list[Answer]], sentence: str
) -> None:
    with answering(server(metrics, **answers)) as recorded:
        assert main(["top", "--once", "--url", recorded.url]) == 1
    out, err = capsys.readouterr()
    assert out == "" and sentence in err and err.count("\n") == 1


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "inf", "soon"])
def test_an_interval_is_a_number_of_seconds(interval: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["top", "--interval", interval])
    assert "is not a number of seconds" in capsys.readouterr().err


class Log:
    """The audit log of a running server."""

    def __init__(self, url: str, rollout: FakeRollout) -> None:
        self._asked, self._rollout = Server(url), rollout
        self._seen = Newest()
        self._move_to(0)

    def change(self) -> None:
        self._move_to(self._rollout.view.generation + 1)
        self.refuse(1)

    def _move_to(self, generation: int) -> None:
        catalog = self._rollout.catalog
        catalog.snapshot = replace(catalog.snapshot, view=replace(catalog.snapshot.view, generation=generation))

    def refuse(self, count: int) -> None:
        for _ in range(count):
            self._rollout.note("anna", "note", None, "", None)

    def anew(self) -> list[int]:
        return [entry["sequence"] for entry in newest(self._asked, 3).changes]

    def further(self) -> list[int]:
        self._seen = newest(self._asked, 3, self._seen)
        return [entry["sequence"] for entry in self._seen.changes]


@pytest.fixture
def log(run: Run, url: str, rollout: FakeRollout) -> Log:
    return Log(url, rollout)


def test_the_end_of_a_log_is_found_whatever_its_length(log: Log) -> None:
    assert log.anew() == log.further() == []
    for length in range(1, 18):
        log.change()
        expected = list(range(max(length - 2, 1), length + 1))
        assert log.anew() == expected
        if length in {1, 2, 3, 7, 17}:
            assert log.further() == expected


def test_refusals_do_not_crowd_out_changes(log: Log) -> None:
    """Anybody who reaches the server can cause them."""
    log.refuse(2)
    assert log.anew() == log.further() == []
    log.change()
    log.refuse(3)
    log.change()
    assert log.anew() == log.further() == [3, 7]
    log.refuse(2500)
    assert log.anew() == log.further() == [3, 7]
    log.change()
    log.refuse(1)
    log.change()
    assert log.anew() == log.further() == [7, 2508, 2510]
    log.refuse(10_000)
    assert log.anew() == [] and log.further() == [7, 2508, 2510]  # so far nobody looks back


def test_a_log_that_was_lost_is_read_anew(log: Log, rollout: FakeRollout) -> None:
    for _ in range(20):
        log.change()
    assert log.further() == [18, 19, 20]
    del rollout.entries[5:]
    assert log.further() == [3, 4, 5]


# -- in a terminal -----------------------------------------------------------------------------------------------------


def shown(width: int, height: int, num_tasks: int, trouble: str = "") -> list[str]:
    tasks = [{"name": f"task-{number:03}", "traffic": SPAM} for number in range(num_tasks)]
    changes = [entry(number, "why not") for number in range(1, 6)]
    metrics = Metrics()
    metrics.index_answered()
    metrics.watch(lambda: 0, None)
    before, after = scraped(metrics), (work(metrics), scraped(metrics))[1]
    between = Between(*(Scrape(at_s, read_exposition(text.decode())) for at_s, text in ((1.0, before), (3.0, after))))
    frame = Frame("http://127.0.0.1:8080", 1700000000.0, INFO, tasks, between, changes, trouble=trouble)
    console = Console(width=width, height=height, force_terminal=False)
    with console.capture() as captured:
        console.print(view(frame, "answers", ConsoleDimensions(width, height)))
    return captured.get().splitlines()


def test_a_large_terminal_shows_everything() -> None:
    lines = shown(120, 40, 3)
    heading = next(line for line in lines if line.startswith("task"))
    assert heading.split() == ["task", "version", "arm", "answers/s", "drift", "failed", "passes", "device"]
    assert sum(line.startswith("task-") for line in lines) == 9 and sum("why not" in line for line in lines) == 5


@pytest.mark.parametrize(("width", "height"), [(80, 24), (50, 24), (30, 12), (20, 8)])
def test_a_small_one_shows_what_fits(width: int, height: int) -> None:
    lines = shown(width, height, 50)
    assert len(lines) <= height and all(len(line) <= width for line in lines)
    assert any(line.startswith("task-000") for line in lines)
    assert any("more rows" in line for line in lines)
    assert ("device" in "".join(line for line in lines if line.startswith("task "))) is (width >= 80)


def test_a_narrow_one_folds_what_somebody_may_look_for() -> None:
    text = "\n".join(shown(60, 40, 1))
    assert all(word in text for word in ("heads 1 ms", "turned away", "cached", "memory"))


def test_what_answers_in_the_place_of_a_version_that_cannot_be_loaded_is_shown(
    metrics: Metrics, capsys: pytest.CaptureFixture[str]
) -> None:
    """The index wants tone@4, and tone@3 goes on answering."""
    metrics.predicted("tone", 3, "champion", "success", 5)
    before = scraped(metrics)
    metrics.predicted("tone", 3, "champion", "success", 5)
    metrics.unserved({"tone": 1})
    lines = once(server(metrics, metrics=[(200, before), (200, scraped(metrics))]), capsys)
    assert "1 live versions are not served here: manifold index says which" in lines
    assert float(cells(lines, "champion in its place")[3]) > 0


def test_the_stage_to_look_at_is_never_the_queue() -> None:
    counted = Metrics()
    before = scraped(counted)
    for stage, duration_s in (("tokenize", 0.001), ("queue", 0.5), ("forward", 0.02)):
        counted.staged(stage, duration_s)
    scrapes = (Scrape(at_s, read_exposition(text.decode())) for at_s, text in ((1.0, before), (3.0, scraped(counted))))
    frame = Frame("http://127.0.0.1:8080", 1700000000.0, INFO, [], Between(*scrapes), [])
    console = Console(width=120, force_terminal=True)
    with console.capture() as captured:
        console.print(view(frame, "answers", ConsoleDimensions(120, 24)))
    assert "\x1b[1mforward 20 ms" in captured.get() and "\x1b[1mqueue" not in captured.get()


def test_trouble_stands_first_and_says_how_old_the_rest_is() -> None:
    lines = shown(160, 24, 1, trouble="nothing answers at http://127.0.0.1:8080")
    assert lines[0].startswith("nothing answers at http://127.0.0.1:8080; all below is of 2023-11-14 22:13:20Z")


def test_every_order_sorts_tasks_that_nothing_is_known_of() -> None:
    assert all(isinstance(order([]), float) for order in ORDERS.values())


# -- a real server, in a real terminal ---------------------------------------------------------------------------------

COMMAND = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests in the background may ignore it
from app.cli import main
sys.exit(main(sys.argv[1:]))
"""


class Terminal:
    """`manifold …` on a pseudo-terminal, and all that it has written so far."""

    def __init__(self, *arguments: str, columns: int = 200, rows: int = 30) -> None:
        self.written = ""
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        environment = {name: value for name, value in os.environ.items() if name not in {"COLUMNS", "LINES"}}
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *arguments],
            cwd=ROOT,
            env=environment | {"TERM": "xterm"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._ours)

    def type(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    def shows(self, pattern: str) -> bool:
        self._read()
        return re.search(pattern, self.written) is not None

    def forget(self) -> None:
        self._read()
        self.written = ""

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # its end is closed
            while select.select([self._ours], [], [], 0)[0]:
                self.written += os.read(self._ours, 65536).decode(errors="replace")


@contextlib.contextmanager
def asking(url: str) -> Iterator[None]:
    """Somebody sends predictions all the time, whether the server is there or not."""
    ended = threading.Event()

    def ask() -> None:
        number = 0
        with httpx2.Client(trust_env=False) as client:
            while not ended.is_set():
                number += 1
                with contextlib.suppress(httpx2.HTTPError):
                    client.post(f"{url}/v1/predict", json={"inputs": f"hello {number}"})
                time.sleep(0.02)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    yield
    ended.set()
    thread.join(10)


def test_a_server_is_watched_while_it_goes_away_and_comes_back() -> None:
    with ServerProcess("tests.fake_server", "0.01", "port", "0") as first:
        url = first.wait_until_ready()
        with asking(url), Terminal("top", "--interval", "0.3", "--url", url) as terminal:
            wait_for(lambda: terminal.shows(r"predict +[1-9]\d*\.\d/s +p50 [\d.]+ ms"), 30)
            assert terminal.shows("tiny on cpu") and terminal.shows("spam +1 +champion") and terminal.shows("changes")
            first.signal(signal.SIGKILL)
            first.wait()
            wait_for(lambda: terminal.shows("nothing answers at .*all below is of"), 30)
            assert terminal.process.poll() is None
            terminal.forget()
            with ServerProcess("tests.fake_server", "0.01", "port", url.rpartition(":")[2]) as second:
                second.wait_until_ready()
                wait_for(lambda: terminal.shows(r"predict +[1-9]\d*\.\d/s +p50 [\d.]+ ms"), 30)
                assert not terminal.shows(r"-\d+\.\d/s")
                terminal.type(b"\x03")
                assert terminal.process.wait(10) == 0
                assert terminal.shows(r"\x1b\[\?25h\x1b\[\?1049l$")  # as the terminal was before
        assert "Traceback" not in terminal.written
