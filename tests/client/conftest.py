"""The command line against the real API over a real socket; the index behind it is a fake with the real rules."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from app.cli import main
from app.config import Settings
from app.main import create_app
from app.service.runtime import Runtime
from tests.fake_rollout import FakeRollout
from tests.serving import running


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def answer(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Done]


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def url(settings: Settings, runtime: Runtime) -> Iterator[str]:
    with running(create_app(settings, runtime)) as address:
        yield address


@pytest.fixture
def rollout(runtime: Runtime) -> FakeRollout:
    """One person may publish and approve."""
    assert isinstance(runtime.rollout, FakeRollout)
    runtime.rollout.separate = False
    return runtime.rollout


@pytest.fixture
def run(url: str, rollout: FakeRollout, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command against the server; the address is added where none is given."""

    def run_command(*arguments: str) -> Done:
        address = () if "--url" in arguments else ("--url", url)
        capsys.readouterr()
        status = main([*arguments, *address])
        return Done(status, *capsys.readouterr())

    return run_command


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An artifact of spam, with a report beside it."""
    return write_folder(tmp_path / "spam")


@pytest.fixture
def second(run: Run, folder: Path) -> str:
    """A second version of spam, approved."""
    assert run("publish", str(folder), "--approve").status == 0
    return "spam@2"


def write_folder(folder: Path, task: str = "spam", tensors: bytes = b"tensors", **changes: Any) -> Path:
    folder.mkdir(parents=True)
    manifest = {
        "format_version": 1,
        "task": task,
        "problem_type": "single_label_classification",
        "labels": ["ham", "spam"],
        "readout": {"kind": "mean", "layers": [6]},
        "prefixes": [],
        "evaluation": {"test": {"accuracy": 0.97}},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))
    (folder / "adapter_model.safetensors").write_bytes(tensors)
    (folder / "report.html").write_text("<html>")
    return folder
