"""The server as a process: start, ready line, drain, signals, ports; with a fake engine where time must be certain."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import pytest

from app.cli import main
from app.engine.backbone import Backbone
from app.learning.baseline_command import renew
from tests.artifacts import write_artifact
from tests.serving import ServerProcess, wait_for

BODY = {"inputs": "hello", "tasks": ["spam"]}


def fake_server(delay_s: float, **settings: object) -> ServerProcess:
    options = [str(part) for name, value in ({"port": 0} | settings).items() for part in (name, value)]
    return ServerProcess("tests.fake_server", str(delay_s), *options)


class Caller(threading.Thread):
    """Posts one prediction and keeps what came."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.url = url
        self.response: httpx2.Response | None = None
        self.start()

    def run(self) -> None:
        self.response = httpx2.post(f"{self.url}/v1/predict", json=BODY, timeout=20)


def in_flight(url: str) -> int:
    return int(httpx2.get(f"{url}/healthz").json()["in_flight"])


def test_a_signal_drains() -> None:
    """Ready 503 first, live 200, new work refused, work in flight answered, the grace kept, status 0."""
    with fake_server(3.0, drain_grace_s=1.0) as server, httpx2.Client() as idle:
        url = server.wait_until_ready()
        assert (
            idle.get(f"{url}/readyz").status_code == 200
        )  # this connection stays open and must not hold the server up
        caller = Caller(url)
        wait_for(lambda: in_flight(url) == 1)
        server.signal(signal.SIGTERM)
        signalled_s = time.monotonic()
        wait_for(lambda: httpx2.get(f"{url}/readyz").status_code == 503)
        assert httpx2.get(f"{url}/livez").status_code == 200
        refused = httpx2.post(f"{url}/v1/predict", json=BODY)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert server.wait() == 0
        assert time.monotonic() - signalled_s >= 1.0
        caller.join(5)
        assert caller.response is not None and caller.response.status_code == 200
        assert not any("Traceback" in line for line in server.log), "".join(server.log)
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"{url}/livez")


def test_a_request_that_takes_too_long_does_not_hold_the_server_up() -> None:
    with fake_server(30.0, drain_grace_s=0.1, drain_timeout_s=0.3) as server:
        url = server.wait_until_ready()
        with contextlib.suppress(httpx2.HTTPError):
            caller = Caller(url)
            wait_for(lambda: in_flight(url) == 1)
            server.signal(signal.SIGTERM)
            assert server.wait(15) == 0
        assert any("1 requests did not end" in line for line in server.log)
        caller.join(5)


def test_a_second_signal_ends_it_at_once() -> None:
    with fake_server(30.0, drain_grace_s=30) as server:
        url = server.wait_until_ready()
        server.signal(signal.SIGINT)
        wait_for(lambda: httpx2.get(f"{url}/readyz").status_code == 503)
        server.signal(signal.SIGINT)
        assert server.wait(5) == 128 + signal.SIGINT


def test_a_log_that_nobody_reads_holds_nothing_up() -> None:
    """Not answers, not what is logged on the event loop itself, not the end."""
    with fake_server(0.0, drain_grace_s=0) as server:
        url = server.wait_until_ready()
        server.reads.clear()
        with httpx2.Client(base_url=url) as client:
            for number in range(600):  # more than pipe and buffers take
                assert client.get(f"/v1/tasks/nobody{number:04}{'x' * 150}").status_code == 404
            port = int(url.rpartition(":")[2])
            for _ in range(3):
                with socket.create_connection(("127.0.0.1", port)) as raw:  # uvicorn warns of it, on the loop
                    raw.sendall(b"GARBAGE\x00\r\n\r\n")
                    raw.recv(1000)
            assert client.get("/livez").status_code == 200
            assert client.post("/v1/predict", json=BODY).status_code == 200
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


@pytest.fixture
def _serve_in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("app.main.configure_logging", lambda log_format: None)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_serve_in_this_process")
def test_a_port_in_use_is_one_sentence_and_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--port", port]) == 1
    assert capsys.readouterr().err == f"manifold: cannot listen on 127.0.0.1 port {port}: Address already in use\n"


@pytest.mark.usefixtures("_serve_in_this_process")
@pytest.mark.parametrize("option", ["--model", "--prefixes", "--device"])
def test_what_cannot_be_loaded_is_one_sentence_and_status_1(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--port", "0", option, str(tmp_path / "nowhere")]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("manifold: ")]
    assert "nowhere" in line


def test_a_signal_while_loading_ends_it_at_once(tmp_path: Path) -> None:
    with ServerProcess("app.cli", "serve", "--port", "0", "--prefixes", str(tmp_path)) as server:
        wait_for(lambda: any("the index is embedded" in line for line in server.log), 30)
        server.signal(signal.SIGTERM)
        assert server.wait(10) == 128 + signal.SIGTERM


def test_nobody_but_the_engine_keeps_helpers_of_openmp(tmp_path: Path) -> None:
    """Else there are more of them than processors, and none waits awake for an operator."""
    write_artifact(tmp_path / "spam", Backbone.load("embedded", "cpu", "float32").spec, "spam", ("ham", "spam"))
    arguments = ("--port", "0", "--prefixes", str(tmp_path), "--drain-grace-s", "0", "--tokenization-workers", "1")
    counts = {}
    for threads in (1, 3):
        with ServerProcess("app.cli", "serve", *arguments, "--threads", str(threads)) as server:
            url = server.wait_until_ready()
            assert httpx2.post(f"{url}/v1/predict", json={"inputs": "You won! " * 50}).status_code == 200
            counts[threads] = len(os.listdir(f"/proc/{server.process.pid}/task"))
    assert counts[3] == counts[1] + 2 * 2  # the engine's, and those of another pool that torch makes of the same size


def test_the_real_server_answers_with_the_embedded_backbone(tmp_path: Path) -> None:
    spec = Backbone.load("embedded", "cpu", "float32").spec
    write_artifact(tmp_path / "spam", spec, "spam", ("ham", "spam"))
    write_artifact(tmp_path / "stars", spec, "stars", (), "regression")
    write_artifact(tmp_path / "broken", spec, "broken", labels=())
    arguments = ("--port", "0", "--prefixes", str(tmp_path), "--log-format", "json", "--drain-grace-s", "0")
    with ServerProcess("app.cli", "serve", *arguments) as server:
        url = server.wait_until_ready()
        assert any("broken" in line and "is left out" in line for line in server.log)
        events = [json.loads(line) for line in server.log if line.startswith("{")]
        assert "2 tasks (spam, stars)" in events[-1]["message"]

        response = httpx2.post(f"{url}/v1/predict", json={"inputs": ["You won!", "See you at nine."]})
        first, second = response.json()["results"]
        assert set(first) == {"spam", "stars"} and first != second
        assert float(response.headers["x-inference-time"]) > 0

        with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
            answer = client.embeddings.create(model="all-MiniLM-L6-v2", input=["a cat", "a kitten", "tax law"])
        cat, kitten, law = (item.embedding for item in answer.data)
        assert sum(x * x for x in cat) == pytest.approx(1, abs=1e-4)
        assert dot(cat, kitten) > dot(cat, law) + 0.3

        too_long = httpx2.post(f"{url}/v1/predict", json={"inputs": "word " * 20_000})
        assert (too_long.status_code, too_long.json()["error_type"]) == (422, "tokenization")
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


def test_a_restarted_server_compares_texts_from_where_it_was(tmp_path: Path) -> None:
    backbone = Backbone.load("embedded", "cpu", "float32")
    folder = write_artifact(tmp_path / "prefixes" / "spam", backbone.spec, "spam", ("ham", "spam"))
    (tmp_path / "texts.txt").write_text("".join(f"See you at {i} o'clock, dear.\n" for i in range(200)))
    renew(folder, tmp_path / "texts.txt", backbone, {})
    arguments = ("--port", "0", "--prefixes", str(folder.parent), "--home", str(tmp_path / "home"))
    arguments = (*arguments, "--drain-grace-s", "0")

    def texts(url: str) -> set[int]:
        return {row["texts"] for row in httpx2.get(f"{url}/v1/drift").json()["drift"]}

    def drifting(url: str) -> dict[str, bool]:
        return {row["kind"]: row["drifting"] for row in httpx2.get(f"{url}/v1/drift").json()["drift"]}

    with ServerProcess("app.cli", "serve", *arguments) as server:
        url = server.wait_until_ready()
        for start in range(0, 320, 32):
            inputs = [f"{i} " + "a much longer text than any before " * 5 for i in range(start, start + 32)]
            assert httpx2.post(f"{url}/v1/predict", json={"inputs": inputs}, timeout=60).status_code == 200
        wait_for(lambda: texts(url) == {320}, 30)
        first = drifting(url)
        assert first["length"] and not first["unknown"]
        server.signal(signal.SIGTERM)
        assert server.wait() == 0

    with ServerProcess("app.cli", "serve", *arguments) as server:
        url = server.wait_until_ready()
        wait_for(lambda: texts(url) == {320}, 30)
        assert drifting(url) == first
        wait_for(lambda: "manifold_drift_psi{" in httpx2.get(f"{url}/metrics").text, 30)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


def dot(left: list[float], right: list[float]) -> float:
    return sum(x * y for x, y in zip(left, right, strict=True))
