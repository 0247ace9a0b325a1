"""What publishers see."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

from app import cli
from app.config import load_settings
from app.main import create_app
from tests.client.conftest import Run, write_folder
from tests.fake_rollout import FakeRollout
from tests.fakes import make_runtime
from tests.serving import running


def test_a_folder_becomes_a_candidate_and_what_comes_next_is_said(run: Run, folder: Path, rollout: FakeRollout) -> None:
    done = run("publish", str(folder), "--reason", "more data")
    assert done.status == 0
    assert "spam@2 is candidate (" in done.out and "0.2 kB, generation 8)" in done.out
    assert "next: manifold approve spam@2" in done.out
    (files,) = rollout.files.values()
    assert set(files) == {"manifest.json", "adapter_model.safetensors"}
    assert rollout.view.tasks["spam"].versions[2].reason == "more data"


def test_the_same_folder_again_is_the_same_version(run: Run, folder: Path) -> None:
    run("publish", str(folder), "--approve")
    done = run("publish", str(folder))
    assert "spam@2 is approved, and was published before" in done.out
    assert "manifold canary spam@2 10" in done.out


def test_published_and_approved_in_one_command(run: Run, folder: Path) -> None:
    done = run("publish", str(folder), "--approve", "--json")
    assert (done.answer["version"], done.answer["state"], done.answer["generation"]) == (2, "approved", 9)
    shown = run("tasks", "spam")
    assert "test.accuracy 0.97" in shown.out and "mean of 6" in shown.out


def test_who_may_not_approve_reads_that_it_is_published(run: Run, folder: Path, rollout: FakeRollout) -> None:
    rollout.separate = True
    done = run("publish", str(folder), "--approve")
    assert done.status == 1
    assert done.err.startswith("manifold: spam@2 is published and not approved: ") and "somebody else" in done.err


def test_a_folder_straight_from_peft_takes_options(run: Run, tmp_path: Path, rollout: FakeRollout) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    assert "give --task" in run("publish", str(tmp_path)).err
    kind = ("--problem-type", "single_label_classification", "--labels", "no,yes", "--input", "pair")
    assert run("publish", str(tmp_path), "--task", "nli", *kind).status == 0
    assert rollout.options == {"problem_type": kind[1], "labels": ["no", "yes"], "input": "pair"}
    assert "nothing live" in run("tasks", "nli").out


def test_the_servers_fault_is_the_sentence(run: Run, folder: Path) -> None:
    done = run("publish", str(folder), "--task", "ham")
    assert done.status == 1 and "of task spam" in done.err


@pytest.mark.parametrize(
    ("manifest", "sentence"),
    [("{", "is no JSON object"), ("[]", "is no JSON object: 'list'"), ('{"task": 3}', "does not say which task")],
)
def test_a_manifest_that_cannot_be_read_is_one_sentence(run: Run, folder: Path, manifest: str, sentence: str) -> None:
    (folder / "manifest.json").write_text(manifest)
    done = run("publish", str(folder))
    assert done.status in (1, 2)
    assert sentence in done.err and done.err.count("\n") == 1


def test_what_is_no_artifact_is_one_sentence(run: Run, tmp_path: Path) -> None:
    assert "nowhere is no folder" in run("publish", str(tmp_path / "nowhere")).err
    (tmp_path / "file").touch()
    assert "file is no folder" in run("publish", str(tmp_path / "file")).err
    (tmp_path / "empty").mkdir()
    assert "has no adapter_model.safetensors" in run("publish", str(tmp_path / "empty")).err


def test_an_artifact_may_be_larger_than_other_bodies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = load_settings({"payload_limit_bytes": 1000, "artifact_limit_bytes": 50_000})
    runtime = make_runtime(settings)
    with running(create_app(settings, runtime)) as url:
        assert cli.main(["publish", str(write_folder(tmp_path / "a", tensors=b"x" * 40_000)), "--url", url]) == 0
        assert cli.main(["publish", str(write_folder(tmp_path / "b", tensors=b"x" * 60_000)), "--url", url]) == 1
    runtime.close()
    assert "larger than 50000 bytes" in capsys.readouterr().err


# -- learn --publish ---------------------------------------------------------------------------------------------------


@pytest.fixture
def learning(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Instead of training, writes a folder; the list gets the command lines that an artifact would keep."""
    typed: list[list[str]] = []

    def learn(options: argparse.Namespace) -> int:
        typed.append(list(sys.argv))
        if options.train is None:
            return 130
        write_folder(options.out, options.task)
        return 0

    monkeypatch.setattr("app.learning.command.run", learn)
    return typed


def test_what_was_learned_is_published(run: Run, tmp_path: Path, learning: list[list[str]]) -> None:
    done = run("learn", "--task", "spam", "--train", "x.tsv", "--out", str(tmp_path / "new"), "--publish")
    assert done.status == 0
    assert "spam@2 is candidate" in done.out


def test_what_was_not_learned_is_not_published(
    run: Run, tmp_path: Path, learning: list[list[str]], rollout: FakeRollout
) -> None:
    assert run("learn", "--task", "spam", "--out", str(tmp_path / "new"), "--publish").status == 130
    assert rollout.files == {}
    assert "--publish needs --out" in run("learn", "--config", "tasks.toml", "--publish").err


def test_the_artifact_does_not_keep_the_key(
    run: Run, tmp_path: Path, learning: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["learn", "--task", "spam", "--train", "x", "--out", str(tmp_path / "new"), "--publish", "--key=mf_abc"]
    monkeypatch.setattr(sys, "argv", ["manifold", *arguments])
    assert run(*arguments).status == 0
    assert "mf_abc" not in json.dumps(learning) and "--key=TOKEN" in learning[0]
