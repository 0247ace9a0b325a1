"""The windows of live versions on disk, so that a restarted server goes on comparing where it was.

Arrays by digest, as safetensors. Knows nothing of what they mean.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
from collections.abc import Iterator, Mapping
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from app.registry.sealed import SealedFile

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
    def __init__(self, path: Path) -> None:
        self._file = SealedFile(path, "the drift windows are", SCHEMA_VERSION)

    def save(self, windows: Mapping[str, NDArray[Any]]) -> None:
        """Raises UnavailableError where the disk does not take it; the file is then as it was."""
        self._file.write(save({digest: np.ascontiguousarray(rows) for digest, rows in windows.items()}))

    def load(self) -> dict[str, NDArray[Any]]:
        """Empty where there is none. One that cannot be read is logged, kept aside as `.damaged`, and empty."""
        return self._file.read(load) or {}
