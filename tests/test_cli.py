"""What people see in their terminal: tables, help, and one sentence instead of a traceback."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from app.cli import main
from app.config import Settings, env_name, option_name
from app.main import create_app
from app.service.runtime import Runtime
from tests.fakes import FakeEngine
from tests.serving import ROOT, running

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def url(settings: Settings, runtime: Runtime) -> Iterator[str]:
    with running(create_app(settings, runtime)) as address:
        yield address


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


def test_predict_prints_a_line_for_each_task(url: str, capsys: Captured) -> None:
    assert main(["predict", "Paris is nice", "hello", "--url", url]) == 0
    out = capsys.readouterr().out
    assert "Paris is nice" in out and "city: Paris" in out
    assert "fear, joy" in out and "0.750, 0.250" in out
    assert "tiny, 8 tokens, 2 rows, 2 passes" in out


def test_predict_asks_for_named_tasks_and_pairs(url: str, capsys: Captured) -> None:
    assert main(["predict", "a b", "--pair", "c", "--task", "entailment@1", "--url", url, "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert result["entailment@1"]["arm"] == "pinned"


def test_predict_shows_a_task_that_failed_beside_the_others(url: str, engine: FakeEngine, capsys: Captured) -> None:
    engine.broken_tasks = {"spam"}
    assert main(["predict", "hello", "--task", "spam", "--task", "stars", "--url", url]) == 0
    out = capsys.readouterr().out
    assert "failed: spam broke" in out and "stars" in out


def test_what_a_text_holds_is_neither_markup_nor_a_command_to_the_terminal(url: str, capsys: Captured) -> None:
    assert main(["predict", "[bold]hi[/bold] \x1b[2J there", "--task", "spam", "--url", url]) == 0
    out = capsys.readouterr().out
    assert "[bold]hi[/bold] ·[2J there" in out
    assert "\x1b[2J" not in out


def test_tasks_lists_what_can_be_asked(url: str, capsys: Captured) -> None:
    assert main(["tasks", "--url", url]) == 0
    out = capsys.readouterr().out
    assert "entailment" in out and "pair" in out and "3: book, cancel, pay" in out and "embeddings: tiny" in out


def test_tasks_shows_the_versions_of_one(url: str, capsys: Captured) -> None:
    assert main(["tasks", "spam", "--url", url]) == 0
    out = capsys.readouterr().out
    assert "champion" in out and "mean of 6" in out and "approved" in out and "paula, anna" in out
    assert main(["tasks", "spam", "--url", url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "spam"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["predict", "hello", "--task", "wether"], 'there is no task "wether"'),
        (["predict", ""], "input 0 is empty"),
        (["predict", "hello", "--task", "entailment"], "task entailment reads a pair"),
        (["predict", "word " * 50], "input 0 has 52 tokens"),
        (["tasks", "a/../b"], "there is no GET /v1/tasks/a"),
        (["predict", "caf\udce9"], "the text is not valid UTF-8"),
    ],
)
def test_the_servers_sentence_is_the_error(url: str, capsys: Captured, arguments: list[str], sentence: str) -> None:
    assert main([*arguments, "--url", url]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"manifold: {sentence}") and captured.err.count("\n") == 1


def test_a_server_that_is_not_there_is_told_with_what_to_do(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    monkeypatch.setenv("MANIFOLD_PORT", str(port))
    assert main(["tasks"]) == 1
    assert capsys.readouterr().err == (
        f"manifold: nothing answers at http://127.0.0.1:{port}: "
        "start a server with `manifold serve`, or say with --url where it is\n"
    )


@pytest.mark.parametrize("url", ["nonsense", "ftp://x", "http://", "http://[::1", "http://127.0.0.1:99999"])
def test_an_address_that_is_none_is_one_sentence(capsys: Captured, url: str) -> None:
    assert main(["tasks", "--url", url]) == 1
    error = capsys.readouterr().err
    assert error.startswith("manifold: ") and error.count("\n") == 1


def test_another_server_at_the_address_is_recognised(capsys: Captured) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Other) as server:
        Thread(target=server.handle_request, daemon=True).start()
        assert main(["tasks", "--url", f"http://127.0.0.1:{server.server_port}"]) == 1
    assert "is not Manifold" in capsys.readouterr().err


def test_help_prints_every_setting_with_its_variable_and_default(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["serve", "--help"])
    assert stopped.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    for name, field in Settings.model_fields.items():
        if name == "key":  # the clients' own
            continue
        assert option_name(name) in out and env_name(name) in out and str(field.description) in out
    assert "[MANIFOLD_MAX_CLIENT_BATCH_SIZE; default 32]" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--port", "eighty"], "port (--port, MANIFOLD_PORT) is 'eighty'"),
        (["--max-batch-rows", "0"], "max_batch_rows"),
    ],
)
def test_a_bad_setting_ends_with_2_and_one_sentence(capsys: Captured, arguments: list[str], sentence: str) -> None:
    assert main(["serve", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"manifold: {sentence}") and error.count("\n") == 1


def test_a_host_that_others_reach_needs_keys(capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.main.configure_logging", lambda log_format: None)  # its streams end with this test
    assert main(["serve", "--host", "0.0.0.0", "--port", "0", "--home", str(tmp_path)]) == 1
    assert "manifold: host 0.0.0.0 can be reached from other machines" in capsys.readouterr().err


def test_a_bad_variable_is_told_to_clients_too(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANIFOLD_PORT", "x")
    assert main(["tasks"]) == 2
    assert "MANIFOLD_PORT" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["sing"], ["predict"], ["serve", "--prot", "1"]])
def test_a_wrong_call_shows_the_usage(capsys: Captured, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: manifold" in capsys.readouterr().err


def test_clients_start_without_torch() -> None:
    code = "import sys, app.cli; app.cli.main(['tasks', '--url', 'http://127.0.0.1:9']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    assert done.stderr.count("\n") == 1
