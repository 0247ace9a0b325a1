"""The windows of live versions on disk, so that a restarted server goes on comparing where it was.

Two parts: a header line with the schema version and the sha256 of the rest, and arrays by digest as safetensors.
Knows nothing of what the arrays mean.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
from collections.abc import Iterator, Mapping
from itertools import chain, count
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


@contextlib.contextmanager
def claimed_windows(path: Path) -> Iterator[SavedWindows]:
    """At `path`, or the first of `path`-2, `path`-3, … that no other process has: none overwrites another's.

    A process that ends, however it does, lets go of its file, and the next one goes on with it.
    """
    with contextlib.ExitStack() as claim:
        yield SavedWindows(_claimed(path, claim))


def _claimed(path: Path, claim: contextlib.ExitStack) -> Path:
    """`claim` holds it."""
    for candidate in chain([path], (path.with_name(f"{path.name}-{number}") for number in count(2))):
        try:
            lock = claim.enter_context(candidate.with_name(f"{candidate.name}.lock").open("wb"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        except OSError as error:
            logger.error("%s cannot be locked: servers that share it overwrite each other's: %s", candidate, error)
        return candidate
    raise AssertionError  # there is always one more


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
