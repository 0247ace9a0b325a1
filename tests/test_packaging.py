"""Holds what a fresh clone is installed from: the lock, the versions it pins, and paths that exist elsewhere too."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PLACES = ("app", "docker", "prefixes", "tests", "tools", ".ci")
TEXTS = {".py", ".json", ".md", ".toml", ".yml", ".txt", ".lock", ""}
SOMEONES_MACHINE = re.compile(r"(?<![\w.])/(root|work|Users|home/\w+|tmp/\w+|opt/(pypi|wheels))/")


def pins(lock: str) -> dict[str, str]:
    lines = (ROOT / lock).read_text("utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith(("#", "-r ")))


def wanted() -> list[Requirement]:
    return [Requirement(line) for line in [*PROJECT["project"]["dependencies"], *PROJECT["dependency-groups"]["dev"]]]


def texts() -> Iterator[Path]:
    inside = (path for place in PLACES for path in (ROOT / place).rglob("*"))
    at_the_top = ROOT.glob("*")
    for path in [*inside, *at_the_top]:
        if path.is_file() and path.suffix in TEXTS and "__pycache__" not in path.parts:
            yield path


@pytest.mark.parametrize("requirement", wanted(), ids=lambda requirement: requirement.name)
def test_the_lock_holds_what_the_project_asks_for(requirement: Requirement) -> None:
    locked = pins("requirements.lock") | pins("requirements-dev.lock")
    assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)])


def test_the_lock_fits_machines_with_and_without_a_gpu() -> None:
    locked = pins("requirements.lock") | pins("requirements-dev.lock")
    assert locked["torch"] == "2.13.0"
    assert not [name for name in locked if name.startswith(("nvidia-", "cuda-", "triton"))]
    assert not [version for version in locked.values() if not re.fullmatch(r"[\w.]+", version)]


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    assert [str(path.relative_to(ROOT)) for path in texts() if SOMEONES_MACHINE.search(path.read_text("utf-8"))] == []
