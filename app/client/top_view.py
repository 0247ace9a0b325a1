"""How `manifold top` looks. Knows no server; what does not fit is cut, the least important first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from rich.cells import cell_len
from rich.console import ConsoleDimensions, Group, RenderableType
from rich.table import Table
from rich.text import Text

from app.client.audit import change_in_words
from app.client.rates import Between
from app.client.tables import add_row, percent, size, when
from app.client.top_figures import (
    Requests,
    Row,
    cached,
    device_busy,
    groups,
    passes_per_request,
    requests,
    stage_means_s,
    unserved,
)
from app.rollout import printable

CHANGES = 5  # how many of the last ones are shown
_UNKNOWN = "–"
_CHANGES_HEAD = 2  # lines above the first change
_WORDS = {"task", "arm"}
_GAP = 2  # between two columns
_UNFOLDED = 10_000  # columns, which no line of the head fills
_INDENT = 11  # of what is said behind a name

# Heading, and how a row says it.
_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("task", lambda row: row.task),
    ("version", lambda row: row.version),
    ("arm", lambda row: row.arm),
    ("answers/s", lambda row: _figure(row.answers, ".1f")),
    ("drift", lambda row: _UNKNOWN if row.drift is None else f"{row.drift[0]:.2f} {row.drift[1]}"),
    ("failed", lambda row: percent(row.failed)),
    ("passes", lambda row: _figure(row.passes, ".2f")),
    ("device", lambda row: percent(row.device)),
)
_DISPENSABLE = ("device", "passes", "failed", "drift", "arm", "version")  # left out in this order where it is narrow


@dataclass(frozen=True, slots=True)
class Frame:
    """All that is shown at once."""

    url: str
    read_at: float  # seconds since the epoch
    info: Mapping[str, Any]
    tasks: Sequence[Mapping[str, Any]]
    between: Between
    changes: Sequence[Mapping[str, Any]]  # of the audit log, oldest first
    untold: str = ""  # why the changes are not known
    trouble: str = ""  # why all of this is old


def view(frame: Frame, order: str, room: ConsoleDimensions) -> RenderableType:
    """What fits a terminal of this size: the tasks that come first in the order, changes on at most a third of it."""
    head, changes = list(_head(frame, room.width)), list(_changes(frame))
    if len(head) > room.height // 2:
        head = list(_head(frame, _UNFOLDED))  # cut where it is too narrow
    rows = [row for group in groups(frame.tasks, frame.between, order) for row in group]
    left = max(room.height - len(head) - 3, 0)  # an empty line, the headings, and what says how many are left out
    if len(rows) + len(changes) > left:
        changes = changes[: max(left - len(rows), left // 3)]
        changes = changes if len(changes) > _CHANGES_HEAD else []
    fitting = max(left - len(changes), 0)
    missing = [_line(f"… {len(rows) - fitting} more rows")] if len(rows) > fitting else []
    return Group(*head, Text(), _table(rows[:fitting], room.width), *missing, *changes)


def plain(frame: Frame, order: str, width: int) -> RenderableType:
    """All of it, at any length."""
    rows = [row for group in groups(frame.tasks, frame.between, order) for row in group]
    return Group(*_head(frame, width), Text(), _table(rows, width), *_changes(frame))


# -- the head ----------------------------------------------------------------------------------------------------------


def _head(frame: Frame, width: int) -> Iterator[Text]:
    if frame.trouble:
        yield _line(f"{frame.trouble}; all below is of {when(frame.read_at)}", "bold red")
    yield from _folded(frame.url, _server(frame), width, "bold")
    for asked in requests(frame.between):
        yield from _folded(asked.route.rpartition("/")[2], _requests(asked), width)
    yield from _folded("engine", _engine(frame.between), width)
    yield from _folded("stages", _stages(frame.between), width)
    yield from _index(frame.between)


def _server(frame: Frame) -> Sequence[str]:
    backbone, between = frame.info["backbone"], frame.between
    started = between.gauge("process_start_time_seconds")
    up = _UNKNOWN if started is None else str(timedelta(seconds=max(int(frame.read_at - started), 0)))
    return (
        f"{backbone['name']} on {backbone['device']} in {backbone['dtype']}",
        f"generation {_figure(between.gauge('manifold_generation'), '.0f')}",
        f"up {up}",
        when(frame.read_at),
    )


def _requests(asked: Requests) -> Sequence[str]:
    return (
        f"{_figure(asked.rate, '.1f')}/s",
        f"p50 {_time(asked.p50_s)}",
        f"p99 {_time(asked.p99_s)}",
        f"failed {percent(asked.failed)}",
    )


def _engine(between: Between) -> Sequence[str]:
    rejected = _figure(between.rate("manifold_rejected_total") or 0.0, ".1f")
    memory = between.gauge("process_resident_memory_bytes")
    return (
        f"{_figure(passes_per_request(between), '.2f')} passes a request",
        f"device {percent(device_busy(between))}",
        f"{_figure(between.mean('manifold_batch_rows'), '.1f')} rows a batch",
        f"{_figure(between.gauge('manifold_queue_rows'), '.0f')} waiting",
        f"turned away {rejected}/s",
        f"cached {percent(cached(between))}",
        f"memory {_UNKNOWN if memory is None else size(int(memory))}",
    )


def _stages(between: Between) -> list[Text]:
    """The longest one is bold, but never queue: where requests wait, it is for the others."""
    means_s = stage_means_s(between)
    longest = max((mean for stage, mean in means_s.items() if mean is not None and stage != "queue"), default=None)
    return [
        _line(f"{stage} {_time(mean)}", "bold" if mean is not None and mean == longest and stage != "queue" else "")
        for stage, mean in means_s.items()
    ]


def _folded(name: str, parts: Sequence[str | Text], width: int, style: str = "") -> Iterator[Text]:
    """On as many lines as it takes: what is cut off may be what somebody looks for."""
    line = _line(f"{name:<{_INDENT}}", style)
    is_first = True
    for part in (one if isinstance(one, Text) else _line(one, style) for one in parts):
        if not is_first and line.cell_len + _GAP + part.cell_len > width:
            yield line
            line, is_first = _line(" " * _INDENT), True
        line.append(" " if is_first else "  ").append_text(part)
        is_first = False
    yield line


def _index(between: Between) -> Iterator[Text]:
    """Only what is wrong."""
    if between.gauge("manifold_index_up") == 0:
        staleness_s = _figure(between.gauge("manifold_index_staleness_seconds"), ".0f")
        yield _line(f"the index does not answer for {staleness_s} s: what is live stays live", "bold red")
    if failures := between.increase("manifold_prefix_load_failures_total"):
        yield _line(f"{failures:.0f} loads of versions failed: manifold index says which", "bold red")
    if count := unserved(between):
        yield _line(f"{count} live versions are not served here: manifold index says which", "bold red")


# -- tasks and changes -------------------------------------------------------------------------------------------------


def _table(rows: Sequence[Row], width: int) -> Table:
    columns = _fitting([(heading, [say(row) for row in rows]) for heading, say in _COLUMNS], width)
    shown = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    for heading, _ in columns:
        shown.add_column(heading, no_wrap=True, overflow="ellipsis", justify="left" if heading in _WORDS else "right")
    for cells in zip(*(cells for _, cells in columns), strict=True):
        add_row(shown, *cells)
    return shown


def _fitting(columns: list[tuple[str, list[str]]], width: int) -> list[tuple[str, list[str]]]:
    needed = {heading: max(map(cell_len, (heading, *cells))) + _GAP for heading, cells in columns}
    for heading in _DISPENSABLE:
        if sum(needed.values()) - _GAP > width:
            del needed[heading]
    return [column for column in columns if column[0] in needed]


def _changes(frame: Frame) -> Iterator[Text]:
    """The newest first."""
    yield Text()
    if frame.untold:
        yield _line(f"the last changes are left out: {frame.untold}", "dim")
        return
    yield _line("last changes" if frame.changes else "no changes found", "bold")
    for entry in reversed(frame.changes):
        told = (when(entry["at"]), entry["actor"], entry["action"], entry["task"] or "", change_in_words(entry))
        yield _line("  ".join(part for part in (*told, entry["reason"]) if part))


def _line(text: str, style: str = "") -> Text:
    return Text(printable(text), style, no_wrap=True, overflow="ellipsis", end="\n")


def _figure(value: float | None, form: str) -> str:
    return _UNKNOWN if value is None else format(value, form)


def _time(value_s: float | None) -> str:
    if value_s is None:
        return _UNKNOWN
    return f"{value_s:.1f} s" if value_s >= 1 else f"{1000 * value_s:.3g} ms"
