"""A folder of artifacts as an index: `<root>/<task>/` is version 1 of a task, `<root>/<task>/<n>/` its version n.

Knows names and paths; opens no file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from app.errors import SettingsError


@dataclass(frozen=True, slots=True)
class ArtifactFolder:
    path: Path
    version: int


def list_artifacts(root: Path) -> list[ArtifactFolder]:
    """Every artifact folder below `root`, by task and version. Raises SettingsError where `root` is no folder."""
    if not root.is_dir():
        raise SettingsError(f"there is no folder {root}: prefixes must name the folder of the artifacts to serve")
    return [artifact for task in _folders(root) for artifact in _versions(task)]


def _versions(task: Path) -> list[ArtifactFolder]:
    numbered = [folder for folder in _folders(task) if folder.name.isascii() and folder.name.isdecimal()]
    if not numbered:
        return [ArtifactFolder(task, 1)]
    return [ArtifactFolder(folder, int(folder.name)) for folder in sorted(numbered, key=lambda f: int(f.name))]


def _folders(parent: Path) -> list[Path]:
    return sorted(child for child in parent.iterdir() if child.is_dir() and not child.name.startswith((".", "_")))
