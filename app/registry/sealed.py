"""State files: a header line with a schema version and the sha256 of the rest, then the rest. Knows not what it means.

One process writes such a file; a crash at any moment leaves the old one or the new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import orjson

from app.errors import UnavailableError
from app.registry.durable import write_durably

logger = logging.getLogger("manifold")

Content = TypeVar("Content")


@dataclass(frozen=True, slots=True)
class SealedFile:
    path: Path
    told: str  # what is in it, with its verb, as messages say it: "the windows are"
    schema_version: int

    def write(self, body: bytes) -> None:
        """Raises UnavailableError where the disk does not take it; the file is then as it was."""
        header = {"schema_version": self.schema_version, "sha256": hashlib.sha256(body).hexdigest()}
        try:
            write_durably(self.path, orjson.dumps(header) + b"\n" + body)
        except OSError as error:
            raise UnavailableError(f"state cannot be written to {self.path}: {error.strerror or error}") from error

    def read(self, parse: Callable[[bytes], Content]) -> Content | None:
        """None where there is none. One that cannot be read is logged, kept aside as `.damaged`, and None.

        `parse` takes the body, and may raise anything where it cannot.
        """
        try:
            return parse(self._body(self.path.read_bytes()))
        except FileNotFoundError:
            return None
        except Exception as error:  # whatever lies there, the server starts without it
            aside = self.path.with_name(self.path.name + ".damaged")
            logger.error("%s not used and kept as %s beside %s: %s", self.told, aside.name, self.path, error)
            with contextlib.suppress(OSError):
                self.path.replace(aside)
            return None

    def _body(self, content: bytes) -> bytes:
        """Raises ValueError with a clause."""
        first, _, body = content.partition(b"\n")
        header: Any = orjson.loads(first)
        if not isinstance(header, dict) or "schema_version" not in header:
            raise ValueError("it is not a file that Manifold wrote")
        stated = header["schema_version"]
        if stated != self.schema_version:
            raise ValueError(f"it has schema version {stated}, and this software reads {self.schema_version}")
        without_break = body.removesuffix(b"\n")  # earlier files end with one that their sha256 does not cover
        for whole in (body, without_break):
            if hashlib.sha256(whole).hexdigest() == header.get("sha256"):
                return whole
        raise ValueError("its content is damaged")
