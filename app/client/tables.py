"""What people read: tables and lines of plain text. Knows no endpoint.

What a server sends is never markup, and never moves the cursor.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from app.rollout import printable


def print_json(answer: Any) -> int:
    sys.stdout.write(json.dumps(answer, indent=2, ensure_ascii=False) + "\n")
    return 0


_PIPED_WIDTH = 200  # nobody's terminal: names are not cut where they need not be


def table(*headings: str) -> Table:
    return Table(*headings, box=None, pad_edge=False, header_style="bold")


def add_row(to: Table, *cells: str) -> None:
    to.add_row(*(Text(printable(cell)) for cell in cells))


def show(shown: Table) -> None:
    Console(soft_wrap=False, width=None if sys.stdout.isatty() else _PIPED_WIDTH).print(shown)


def say(sentence: str, style: str = "") -> None:
    """One line, as long as it is."""
    Console(soft_wrap=True).print(Text(printable(sentence), style))


def shorten(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def short_digest(digest: str) -> str:
    return digest.removeprefix("sha256:")[:12]


def when(seconds: float) -> str:
    """Seconds since the epoch, in UTC."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}Z"


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def size(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:.1f} kB"


def gates_in_words(gates: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {bound:g}" for name, bound in gates.items() if bound is not None)


def figures(nested: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Nested figures as `test.accuracy 0.91`."""
    for name, value in nested.items():
        if isinstance(value, Mapping):
            yield from figures(value, f"{prefix}{name}.")
        elif isinstance(value, int | float):
            yield f"{prefix}{name} {value:.4g}"
