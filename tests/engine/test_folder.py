"""How a folder of artifacts is read as tasks and versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.engine.folder import list_artifacts
from app.errors import SettingsError


def test_a_folder_is_version_one_and_numbered_folders_are_versions(tmp_path: Path) -> None:
    for name in ("spam", "intent/2", "intent/10", "intent/notes", ".git", "__pycache__"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "README.md").touch()
    found = [(folder.path.relative_to(tmp_path).as_posix(), folder.version) for folder in list_artifacts(tmp_path)]
    assert found == [("intent/2", 2), ("intent/10", 10), ("spam", 1)]


def test_the_root_of_numbered_versions_is_version_one_where_it_holds_files(tmp_path: Path) -> None:
    (tmp_path / "spam" / "2").mkdir(parents=True)
    (tmp_path / "spam" / "manifest.json").touch()
    assert [(folder.path.name, folder.version) for folder in list_artifacts(tmp_path)] == [("spam", 1), ("2", 2)]


def test_an_empty_folder_has_no_tasks(tmp_path: Path) -> None:
    assert list_artifacts(tmp_path) == []


def test_a_folder_that_is_not_there_is_a_wrong_setting(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="there is no folder"):
        list_artifacts(tmp_path / "nowhere")
