"""The windows of live versions on disk, so that a restarted server goes on comparing where it was.

Two parts: a header line with the schema version and the sha256 of the rest, and arrays by digest as safetensors.
Knows nothing of what the arrays mean.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from app.errors import UnavailableError
from app.registry.durable import write_durably

logger = logging.getLogger("manifold")

SCHEMA_VERSION = 1


class SavedWindows:
    """One process writes it; a crash at any moment leaves the old file or the new one."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def save(self, windows: Mapping[str, NDArray[Any]]) -> None:
        """Raises UnavailableError where the disk does not take it; the file is then as it was."""
        body = save({digest: np.ascontiguousarray(rows) for digest, rows in windows.items()})
        header = {"schema_version": SCHEMA_VERSION, "sha256": hashlib.sha256(body).hexdigest()}
        try:
            write_durably(self._path, orjson.dumps(header) + b"\n" + body)
        except OSError as error:
            raise UnavailableError(f"{self._path} cannot be written: {error.strerror or error}") from error

    def load(self) -> dict[str, NDArray[Any]]:
        """Empty where there is none. One that cannot be read is logged, kept aside as `.damaged`, and empty."""
        try:
            return _parse(self._path.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
            aside = self._path.with_name(self._path.name + ".damaged")
            logger.error("the drift windows %s are not used and kept as %s: %s", self._path, aside.name, error)
            with contextlib.suppress(OSError):
                self._path.replace(aside)
            return {}


def _parse(content: bytes) -> dict[str, NDArray[Any]]:
    """Raises ValueError with a clause, or what safetensors raises."""
    first, _, body = content.partition(b"\n")
    header: Any = orjson.loads(first)
    if not isinstance(header, dict) or "schema_version" not in header:
        raise ValueError("it is not a file that Manifold wrote")
    if header["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"it has schema version {header['schema_version']}, and this software reads {SCHEMA_VERSION}")
    if hashlib.sha256(body).hexdigest() != header.get("sha256"):
        raise ValueError("its content is damaged")
    return load(body)
