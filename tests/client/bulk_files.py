"""Files for the tests of bulk work, and the runs over them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.client.conftest import Done

Predict = Callable[..., Done]  # of a source, the name of an output, and options
Rows = list[dict[str, Any]]


def some_rows(count: int) -> Rows:
    """Of many lengths, so that nothing stays in its place by chance."""
    return [{"id": f"r{i}", "text": f"text{i}" + " word" * (i * 7 % 13)} for i in range(count)]


def write_json(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_json(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text().splitlines()]
