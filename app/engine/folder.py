"""Where artifacts lie in a folder: `<root>/<task>/` is version 1 of a task, `<root>/<task>/<n>/` its version n.

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
    numbered = {int(f.name): f for f in _folders(task) if f.name.isascii() and f.name.isdecimal()}
    if not numbered or (1 not in numbered and any(child.is_file() for child in task.iterdir())):
        numbered[1] = task
    return [ArtifactFolder(folder, number) for number, folder in sorted(numbered.items())]


def _folders(parent: Path) -> list[Path]:
    return sorted(child for child in parent.iterdir() if child.is_dir() and not child.name.startswith((".", "_")))
