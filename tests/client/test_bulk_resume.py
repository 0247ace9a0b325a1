"""Bulk work that is stopped: what is kept, who may go on, and that the file is the same in the end."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from app.client import bulk, bulk_source
from app.client.bulk_parts import Parts
from app.config import Settings
from app.main import create_app
from tests.client.bulk_files import Predict, read_json, some_rows, write_json
from tests.client.conftest import Done, Run
from tests.fakes import FakeEngine, make_runtime
from tests.serving import ROOT, ServerProcess, running, wait_for

ROWS = 128  # of a part, so that files need not be large
COMMAND = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests in the background may ignore it
from app.client import bulk, bulk_source
bulk.ROWS = bulk_source.ROWS = {ROWS}
from app.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "ROWS", ROWS)
    monkeypatch.setattr(bulk_source, "ROWS", ROWS)


@pytest.fixture
def predict(run: Run, tmp_path: Path) -> Predict:
    def predict_file(source: Path, out: str, *arguments: str) -> Done:
        return run("predict", "--file", str(source), "--out", str(tmp_path / out), *arguments)

    return predict_file


@pytest.fixture
def slow_url(settings: Settings) -> Iterator[str]:
    """A server that takes a quarter of a second for a part where two requests are in flight."""
    with running(create_app(settings, make_runtime(settings, FakeEngine(delay_s=0.12)))) as address:
        yield address


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_stopped_goes_on_and_gives_the_same_file(
    slow_url: str, url: str, run: Run, tmp_path: Path, number: signal.Signals
) -> None:
    source = write_json(tmp_path / "in.jsonl", some_rows(16 * ROWS))
    whole, resumed = tmp_path / "whole.parquet", tmp_path / "out.parquet"
    common = ["predict", "--file", str(source), "--task", "stars", "--out"]
    assert run(*common, str(whole)).status == 0
    command = [sys.executable, "-c", COMMAND, *common, str(resumed), "--url", slow_url, "--concurrency", "2"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: (tmp_path / "out.parquet.partial" / "part-0000000.arrow").exists(), 30)
        process.send_signal(number)
        _, err = process.communicate(timeout=20)
    assert not resumed.exists()
    if number is signal.SIGINT:
        assert process.returncode == 130
        assert re.match(r"manifold: interrupted; [\d,]+ rows are kept, and this goes on from there: manifold ", err)
    assert run(*common, str(resumed), "--json").answer["rows"] == 16 * ROWS
    assert resumed.read_bytes() == whole.read_bytes()
    assert not (tmp_path / "out.parquet.partial").exists()


def test_only_what_is_not_kept_is_asked_again(
    predict: Predict, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_json(tmp_path / "in.jsonl", some_rows(ROWS + 10))
    _stop_after_the_first_part(monkeypatch, predict, source)
    engine = FakeEngine()
    with running(create_app(settings, make_runtime(settings, engine))) as another:
        done = predict(source, "out.jsonl", "--url", another)
    assert sum(len(request.plans) for request in engine.requests) == 10
    assert f"({ROWS:,} were there before)" in done.out
    assert [row["id"] for row in read_json(tmp_path / "out.jsonl")] == [row["id"] for row in some_rows(ROWS + 10)]


def test_a_server_that_goes_away_is_told_with_the_command_that_goes_on(
    predict: Predict, tmp_path: Path, url: str
) -> None:
    source = write_json(tmp_path / "in.jsonl", some_rows(4 * ROWS))
    partial = tmp_path / "out.jsonl.partial" / "part-0000000.arrow"
    with ServerProcess("tests.fake_server", "0.12", "port", "0") as server:
        address = server.wait_until_ready()

        def end() -> None:
            wait_for(partial.exists, 30)
            server.signal(signal.SIGKILL)

        ending = threading.Thread(target=end)
        ending.start()
        options = ("--task", "stars", "--patience", "0.5", "--concurrency", "2", "--key", "a-secret")
        done = predict(source, "out.jsonl", *options, "--url", address)
        ending.join()
    assert done.status == 1 and done.err.count("\n") == 1
    assert done.err.startswith(f"manifold: the server at {address} has gone: ")
    assert f"{ROWS:,} rows are kept, and this goes on from there: manifold predict --file {source}" in done.err
    assert "--key TOKEN" in done.err and "a-secret" not in done.err
    assert predict(source, "out.jsonl", "--task", "stars").status == 0
    assert len(read_json(tmp_path / "out.jsonl")) == 4 * ROWS


def test_other_options_and_another_input_are_refused(
    predict: Predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_json(tmp_path / "in.jsonl", some_rows(ROWS + 10))
    _stop_after_the_first_part(monkeypatch, predict, source)
    refused = predict(source, "out.jsonl", "--task", "spam")
    assert refused.status == 1 and "begun with other values (--task): go on with those" in refused.err
    write_json(source, some_rows(ROWS + 11))
    refused = predict(source, "out.jsonl")
    assert "size of the file, time of the file's last change" in refused.err
    assert predict(source, "out.jsonl", "--overwrite").status == 0
    assert len(read_json(tmp_path / "out.jsonl")) == ROWS + 11


def test_a_file_that_is_there_is_replaced_only_when_asked(predict: Predict, tmp_path: Path) -> None:
    source = write_json(tmp_path / "in.jsonl", some_rows(3))
    (tmp_path / "out.jsonl").write_text("precious")
    refused = predict(source, "out.jsonl")
    assert refused.status == 1 and "out.jsonl is there already: --overwrite makes it anew" in refused.err
    assert (tmp_path / "out.jsonl").read_text() == "precious"
    assert not (tmp_path / "out.jsonl.partial").exists()
    assert predict(source, "out.jsonl", "--overwrite").status == 0
    assert len(read_json(tmp_path / "out.jsonl")) == 3


def test_two_runs_do_not_write_one_file(slow_url: str, predict: Predict, tmp_path: Path) -> None:
    source = write_json(tmp_path / "in.jsonl", some_rows(ROWS))
    command = ["predict", "--file", str(source), "--out", str(tmp_path / "out.csv"), "--url", slow_url]
    with subprocess.Popen([sys.executable, "-c", COMMAND, *command], cwd=ROOT, stdout=subprocess.PIPE) as process:
        wait_for((tmp_path / "out.csv.partial" / "run.json").exists, 30)
        refused = predict(source, "out.csv", "--overwrite")
        process.communicate(timeout=30)
    assert refused.status == 1 and "another run writes" in refused.err
    assert process.returncode == 0


def _stop_after_the_first_part(monkeypatch: pytest.MonkeyPatch, predict: Predict, source: Path) -> None:
    keep = Parts.keep

    def interrupted(parts: Parts, table: pa.Table) -> None:
        if parts.count == 1:
            raise KeyboardInterrupt
        keep(parts, table)

    with monkeypatch.context() as patched:
        patched.setattr(Parts, "keep", interrupted)
        assert predict(source, "out.jsonl").status == 130
