"""What a search has fitted, in a folder: one that was broken off goes on from there.

Knows recipes and lines of JSON; nothing of how anything is fitted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.errors import SettingsError
from app.learning.recipe import Recipe

_FILE = "fits.jsonl"


@dataclass(frozen=True, slots=True)
class Trial:
    """A completed recipe, and how it did on dev."""

    recipe: Recipe
    dev: float
    seconds: float


class Notes:
    """Not for several processes at once."""

    def __init__(self, folder: Path) -> None:
        """Raises SettingsError where the folder cannot be used."""
        self.folder = folder
        self._path = folder / _FILE
        self._known: dict[str, tuple[float, float]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._path.open("a+", encoding="utf-8") as file:
                file.seek(0)
                text = file.read()
                if text and not text.endswith("\n"):
                    file.write("\n")  # behind half a line, so that the next is whole
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it holds no notes of a search"
            raise SettingsError(f"{folder} cannot be used: {reason}; name another folder with --work") from error
        for line in text.splitlines():
            with suppress(ValueError, KeyError, TypeError):  # half a line: the run ended while it was written
                entry = json.loads(line)
                self._known[entry["key"]] = float(entry["dev"]), float(entry["seconds"])

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def trial(self, key: str, recipe: Recipe) -> Trial:
        return Trial(recipe, *self._known[key])

    def forget(self, key: str) -> None:
        self._known.pop(key, None)

    def add(self, key: str, trial: Trial) -> None:
        """Raises SettingsError where it cannot be written."""
        entry = {"key": key, "task": trial.recipe.task, "dev": trial.dev, "seconds": trial.seconds}
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise SettingsError(f"{self._path} cannot be written: {error.strerror}; make room there") from error
        self._known[key] = trial.dev, trial.seconds


def key_of(recipe: Recipe, made_from: Mapping[str, Any]) -> str:
    """The same for the same fit: `made_from` names the data, the frozen prefixes and the model."""
    told = {"task": recipe.task, "settings": recipe.settings(), **made_from}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]
