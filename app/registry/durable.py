"""Files that are there whole or not at all, also after a power cut. Knows nothing of what they hold."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def write_durably(path: Path, content: bytes) -> None:
    """Replaces `path` in one step; makes its folders. Raises OSError, and `path` is then as it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """A file's content, or what a folder holds, is on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
