"""`manifold learn --config`: files of tasks that cannot be run, and tasks learned by processes of their own."""

from __future__ import annotations

import argparse
import io
import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from app.errors import SettingsError
from app.learning import command, jobs, jobs_file
from tests.learning import samples
from tests.serving import wait_for

Write = Callable[[str], Path]


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file of tasks beside the files that they name."""
    source = random.Random(0)
    for name in ("train", "dev"):
        samples.write_rows(tmp_path / f"{name}.tsv", ("text", "label"), samples.single_rows(source, 30))
    samples.write_rows(tmp_path / "broken.tsv", ("words", "label"), samples.single_rows(source, 3))

    def write_file(content: str) -> Path:
        path = tmp_path / "tasks.toml"
        path.write_text(content)
        return path

    return write_file


def defaults(model_path: Path) -> str:
    return f"""
        [defaults]
        model = "{model_path}"
        dev = "dev.tsv"
        epochs = 1
        read-layers = [1, 3]
        baselines = false
        dtype = "float32"
    """


def run(config: Path, at_once: int, parser: argparse.ArgumentParser, width: int = 200) -> tuple[int, str]:
    """The exit status and what was shown."""
    shown = io.StringIO()
    return jobs.run(config, at_once, parser, Console(file=shown, width=width)), shown.getvalue()


def test_one_failing_does_not_stop_the_others(
    write: Write, tmp_path: Path, model_path: Path, parser: argparse.ArgumentParser
) -> None:
    tasks = """
        [tasks.first]
        train = "train.tsv"
        epochs = 2
        [tasks.wrong]
        train = "broken.tsv"
        [tasks.second]
        task = "other"
        train = "train.tsv"
        test = "dev.tsv"
        out = "elsewhere/second"
        num_queries = 1
    """
    status, shown = run(write(defaults(model_path) + tasks), 2, parser)
    assert status == 1
    assert (tmp_path / "out" / "first" / "manifest.json").is_file()
    assert '"task": "other"' in (tmp_path / "elsewhere" / "second" / "manifest.json").read_text()
    assert not (tmp_path / "out" / "wrong").exists()
    log = (tmp_path / "out" / "first.log").read_text()
    assert "epoch   2" in log
    assert "first started" in shown and "second done after" in shown and "macro_f1" not in shown
    assert "wrong failed: broken.tsv has no column text" in shown and f"(see {tmp_path}/out/wrong.log)" in shown
    rows = {line.split("│")[1].strip(): line for line in shown.splitlines() if "│" in line}
    assert "accuracy" in rows["second"] and rows["second"].count("0.") >= 2 and "1.00" in rows["second"]
    assert "failed" in rows["wrong"]
    assert f"first: publish it as a candidate: manifold publish {tmp_path}/out/first\n" in shown
    assert f"second: publish it as a candidate: manifold publish {tmp_path}/elsewhere/second\n" in shown
    assert "wrong: publish" not in shown
    noted = (tmp_path / "elsewhere" / "second.log").read_text().count("note: ")
    assert noted and f"second: {noted} note" in shown and f"on its data, see {tmp_path}/elsewhere/second.log\n" in shown


@pytest.mark.parametrize(("number", "is_terminal"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_a_signal_leaves_no_process_and_no_artifact(
    number: signal.Signals,
    is_terminal: bool,
    write: Write,
    tmp_path: Path,
    model_path: Path,
    parser: argparse.ArgumentParser,
) -> None:
    names = ("first", "second", "third[red]")
    config = write(defaults(model_path) + "\n".join(f'[tasks."{name}"]\ntrain = "train.tsv"' for name in names))
    before = set(psutil.Process().children())

    def children() -> set[psutil.Process]:
        return set(psutil.Process().children()) - before

    def is_python(child: psutil.Process) -> bool:
        return child.cmdline()[:2] == [sys.executable, "-u"]

    def interrupt() -> None:
        wait_for(lambda: len([child for child in children() if is_python(child)]) == 2)
        given.extend(argument for child in children() for argument in child.cmdline())
        os.kill(os.getpid(), number)

    given: list[str] = []
    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    shown = io.StringIO()
    console = Console(file=shown, width=100, force_terminal=is_terminal, color_system=None)
    assert jobs.run(config, 2, parser, console) == 130
    interrupter.join()
    assert not children()
    assert given.count("--memory=2") == 2, "of 4 GB"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"first.log", "second.log"}
    states = {name: line for name in names for line in shown.getvalue().splitlines() if line.startswith(f"│ {name} ")}
    assert [states[name].split("│")[2].strip() for name in names] == ["interrupted", "interrupted", "waiting"]
    assert ("last line" in shown.getvalue()) == is_terminal
    assert ("second started, its output is in" in shown.getvalue()) == (not is_terminal)


def test_arguments_are_what_the_tables_say(write: Write, tmp_path: Path, parser: argparse.ArgumentParser) -> None:
    (tmp_path / "own").mkdir()
    tasks = """
        [defaults]
        batch-size = 8
        baselines = true
        prefixes = ["own", "shipped"]
        [tasks.spam]
        train = "train.tsv"
        batch_size = 4
        learning_rate = 1e-3
        baselines = false
        full-finetune = true
        [tasks.other]
        train = "train.tsv"
        model = "own"
        out = "there"
    """
    spam, other = jobs_file.read_jobs(write(tasks), parser)
    first, second = parser.parse_args(spam.arguments), parser.parse_args(other.arguments)
    assert (first.task, first.train, first.out) == ("spam", tmp_path / "train.tsv", tmp_path / "out" / "spam")
    assert (first.batch_size, first.learning_rate, first.baselines, first.full_finetune) == (4, 1e-3, False, True)
    assert first.prefixes == (tmp_path / "own", Path("shipped")) and first.model == "embedded"
    assert (second.batch_size, second.baselines, second.model) == (8, True, str(tmp_path / "own"))
    assert (other.out, other.log) == (tmp_path / "there", tmp_path / "there.log")


TRAIN = '[tasks.a]\ntrain = "train.tsv"\n'


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "tasks.toml has no tasks: add a table"),
        ("[tasks", "is not TOML in UTF-8"),
        ("epochs = 3\n" + TRAIN, "tasks.toml: epochs has no meaning here"),
        ("[tasks]\na = 3", "tasks.toml, [tasks.a] must be a table of options"),
        (TRAIN + "epoch = 3", "tasks.toml, [tasks.a]: epoch is no option of manifold learn: epochs is"),
        (TRAIN + 'config = "x"', "tasks.toml, [tasks.a]: config is no option of manifold learn"),
        (
            '[defaults]\ntask = "x"\n' + TRAIN,
            "tasks.toml, [defaults]: task is of one task alone: put it under [tasks.NAME]",
        ),
        ("[defaults]\nzzz = 3\n" + TRAIN, "tasks.toml, [defaults]: zzz is no option of manifold learn"),
        (TRAIN + "batch_size = 3\nbatch-size = 4", "[tasks.a]: batch-size is given twice"),
        (TRAIN + 'epochs = "ten"', '[tasks.a]: epochs must be a whole number, not "ten"'),
        (TRAIN + "epochs = 1.5", "[tasks.a]: epochs must be a whole number, not 1.5"),
        (TRAIN + "epochs = true", "[tasks.a]: epochs must be a whole number, not true"),
        (TRAIN + "epochs = [1]", "[tasks.a]: epochs must be a whole number, not [1]"),
        (TRAIN + "dropout = 2020-01-01", '[tasks.a]: dropout must be a number, not "2020-01-01"'),
        (TRAIN + "model = 3", "[tasks.a]: model must be text in quotes, not 3"),
        (TRAIN + 'baselines = "yes"', '[tasks.a]: baselines must be true or false, not "yes"'),
        (TRAIN + 'readout = "best"', "[tasks.a]: readout must be one of mean, "),
        (TRAIN + 'read_layers = ["x"]', '[tasks.a]: read_layers: "x" is not numbers joined by commas'),
        (TRAIN + 'dev = "nowhere.tsv"', "nowhere.tsv, and no such file is there"),
        ('[tasks.a]\ndev = "dev.tsv"', "[tasks.a]: train is missing"),
        (TRAIN + TRAIN.replace(".a", ".b") + 'out = "out/../out/a"', "as in [tasks.a]: give each task its own"),
    ],
)
def test_what_cannot_be_run_is_one_sentence(
    content: str, sentence: str, write: Write, tmp_path: Path, parser: argparse.ArgumentParser
) -> None:
    with pytest.raises(SettingsError) as caught:
        run(write(content), 1, parser)
    assert sentence in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_there(tmp_path: Path, parser: argparse.ArgumentParser) -> None:
    with pytest.raises(SettingsError, match="tasks.toml cannot be read: No such file"):
        run(tmp_path / "tasks.toml", 1, parser)


def test_jobs_must_be_positive(write: Write, parser: argparse.ArgumentParser) -> None:
    with pytest.raises(SettingsError, match="--jobs must be 1 or more"):
        run(write(TRAIN), 0, parser)
