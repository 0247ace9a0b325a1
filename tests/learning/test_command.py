"""`manifold learn` as it is typed."""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app.errors import DataError
from app.learning import cache, command, terminal
from app.learning.cache import Memory
from app.learning.writer import check_room
from tests.learning import samples


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(arguments))


@pytest.fixture
def arguments(tmp_path: Path, model_path: Path) -> list[str]:
    source = random.Random(0)
    train, dev = (
        samples.write_rows(tmp_path / f"{name}.tsv", ("text", "label"), samples.single_rows(source, 30))
        for name in ("train", "dev")
    )
    given = ["--task", "mine", "--train", str(train), "--dev", str(dev), "--model", str(model_path)]
    return [*given, "--epochs", "2", "--dtype", "float32", "--out", str(tmp_path / "out")]


def test_it_prints_epochs_and_figures(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments, "--read-layers", "1,3", "--num-queries", "2", "--hidden", "8") == 0
    shown = capsys.readouterr().out
    assert "epoch   2" in shown and "macro_f1" in shown and "mine:" in shown
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_it_says_how_to_publish_where_that_is_not_done_anyway(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments += ["--candidates", "trunk", "--no-baselines"]
    assert run(*arguments) == 0
    shown = capsys.readouterr().out
    assert f"publish it as a candidate: manifold publish {tmp_path / 'out'}\n" in shown and "live" not in shown
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(argparse.Namespace(**vars(parser.parse_args(arguments)), publish=True)) == 0
    assert "manifold publish" not in capsys.readouterr().out


def test_states_have_the_memory_that_is_given(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory()
    for module in (cache, terminal):
        monkeypatch.setattr(module, "MEMORY", memory)
    assert run(*arguments, "--candidates", "trunk", "--no-baselines", "--memory", "0.25") == 0
    assert memory.max_bytes == 250_000_000
    for wrong in ("-1", "much", "inf", "nan"):
        with pytest.raises(SystemExit):
            run(*arguments, f"--memory={wrong}")
        assert f'"{wrong}" is no number of gigabytes, like 4 or 0.5' in capsys.readouterr().err


def test_a_disk_that_is_nearly_full_is_told_before_anything_is_trained(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=10**9, free=10**6))
    assert run(*arguments) == 1
    shown = capsys.readouterr()
    assert "has 1.0 MB left" in shown.err and "--out" in shown.err and "epoch" not in shown.out
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=0, free=0))  # it says nothing
    check_room(tmp_path / "out")


def test_the_help_says_what_class_weights_are_for() -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    told = " ".join(parser.format_help().split())
    assert (
        "--class-weight-power X for imbalanced labels, how much more rare ones count in the loss: 0 not at all" in told
    )


def test_what_is_wrong_is_one_sentence_on_stderr(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments, "--train", "nowhere.tsv") == 1
    assert capsys.readouterr().err == "manifold learn: nowhere.tsv cannot be read: No such file or directory\n"


def test_an_interrupt_writes_nothing(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("app.learning.study.train", interrupted)
    assert run(*arguments) == 130
    assert "nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_choice_that_is_given_stays_also_where_it_is_the_default(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[frozenset[str]] = []

    def learned(*rest: Any) -> None:
        given.append(rest[-1].given)
        raise DataError("enough")

    monkeypatch.setattr(command, "learn", learned)
    assert run(*arguments, "--learning-rate", "0.001", "--dropout", "0.3") == 1
    assert run(*arguments) == 1
    assert given == [{"learning_rate", "dropout"}, frozenset()]


def test_a_first_layer_without_a_prefix_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments, "--first-layer", "1") == 1
    assert "give --num-virtual-tokens too" in capsys.readouterr().err


def test_the_ceiling_needs_an_epoch(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments, "--full-finetune", "--finetune-epochs", "0") == 1
    assert capsys.readouterr().err == "manifold learn: --finetune-epochs is out of range: give 1 or more\n"
