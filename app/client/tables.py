"""What people read: tables and lines of plain text. Knows how versions and traffic are named, and no endpoint.

What a server sends is never markup, and never moves the cursor.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


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


def printable(text: str) -> str:
    return "".join(character if character.isprintable() else "·" for character in text)


def when(seconds: float) -> str:
    """Seconds since the epoch, in UTC."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}Z"


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def size(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:.1f} kB"


def traffic_in_words(traffic: Mapping[str, Any] | None) -> str:
    """champion 3, challenger 4 at 10 %, shadow 5"""
    if traffic is None:
        return "nothing live"
    arms = [f"champion {traffic['champion']}"]
    arms += [f"challenger {c['version']} at {c['percent']:g} %" for c in traffic.get("challengers", ())]
    arms += [f"shadow {version}" for version in traffic.get("shadow", ())]
    return ", ".join(arms)


def gates_in_words(gates: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {bound:g}" for name, bound in gates.items() if bound is not None)


def value_in_words(value: Any) -> str:
    """Any JSON value of the audit log in one line."""
    if isinstance(value, Mapping):
        if "champion" in value:
            return traffic_in_words(value)
        if set(value) == {"traffic"}:
            return value_in_words(value["traffic"])
        if {"version", "state"} <= set(value):
            return f"version {value['version']} {value['state']}"
        return ", ".join(f"{name} {value_in_words(content)}" for name, content in value.items() if content is not None)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(map(value_in_words, value))
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def figures(nested: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Nested figures as `test.accuracy 0.91`."""
    for name, value in nested.items():
        if isinstance(value, Mapping):
            yield from figures(value, f"{prefix}{name}.")
        elif isinstance(value, int | float):
            yield f"{prefix}{name} {value:.4g}"
