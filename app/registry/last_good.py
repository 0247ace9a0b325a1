"""The last view of the index that this server served, on disk: what it starts from while the index is gone.

Two lines: a header with the schema version and the sha256 of the second, and the view as JSON.
Knows nothing of Redis or of artifacts' contents.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from pathlib import Path
from typing import Any

import orjson

from app.errors import ManifoldError, UnavailableError
from app.registry.codec import view_from_json, view_to_json
from app.registry.durable import write_durably
from app.rollout import IndexView

logger = logging.getLogger("manifold")

SCHEMA_VERSION = 1


class LastGood:
    """One process writes it; a crash at any moment leaves the old file or the new one."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def save(self, view: IndexView) -> None:
        """Raises UnavailableError where the disk does not take it; the file is then as it was."""
        body = orjson.dumps(view_to_json(view))
        header = {"schema_version": SCHEMA_VERSION, "sha256": hashlib.sha256(body).hexdigest()}
        try:
            write_durably(self._path, orjson.dumps(header) + b"\n" + body + b"\n")
        except OSError as error:
            message = f"the last good state cannot be written to {self._path}: {error.strerror or error}"
            raise UnavailableError(message) from error

    def load(self) -> IndexView | None:
        """None where there is none. One that cannot be read is logged, kept aside as `.damaged`, and None."""
        try:
            return _parse(self._path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, ManifoldError) as error:
            aside = self._path.with_name(self._path.name + ".damaged")
            logger.error("the last good state %s is not used and kept as %s: %s", self._path, aside.name, error)
            with contextlib.suppress(OSError):
                self._path.replace(aside)
            return None


def _parse(content: bytes) -> IndexView:
    """Raises ValueError with a clause, or what the codec raises."""
    first, _, body = content.partition(b"\n")
    header: Any = orjson.loads(first)
    if not isinstance(header, dict) or "schema_version" not in header:
        raise ValueError("it is not a file that Manifold wrote")
    if header["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"it has schema version {header['schema_version']}, and this software reads {SCHEMA_VERSION}")
    body = body.removesuffix(b"\n")
    if hashlib.sha256(body).hexdigest() != header.get("sha256"):
        raise ValueError("its content is damaged")
    return view_from_json(orjson.loads(body))
