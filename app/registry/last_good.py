"""The last view of the index that this server served, on disk: what it starts from while the index is gone.

Knows nothing of Redis or of artifacts' contents.
"""

from __future__ import annotations

from pathlib import Path

import orjson

from app.registry.codec import view_from_json, view_to_json
from app.registry.sealed import SealedFile
from app.rollout import IndexView

SCHEMA_VERSION = 1


class LastGood:
    def __init__(self, path: Path) -> None:
        self._file = SealedFile(path, "the last good state is", SCHEMA_VERSION)

    def save(self, view: IndexView) -> None:
        """Raises UnavailableError where the disk does not take it; the file is then as it was."""
        self._file.write(orjson.dumps(view_to_json(view)))

    def load(self) -> IndexView | None:
        """None where there is none. One that cannot be read is logged, kept aside as `.damaged`, and None."""
        return self._file.read(lambda body: view_from_json(orjson.loads(body)))
