"""`manifold audit`: who changed what, when and why; and whether the log is still what was written."""

from __future__ import annotations

import argparse
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.client.http import Server, add_client_options
from app.client.tables import add_row, print_json, say, shorten, show, table, when
from app.rollout import value_in_words

_PAGE = 1000
_NOTES, _MOST_PAGES = 10, 9  # among the newest at first, and pages behind them where there are more
_HEAD = re.compile(r"([0-9]{1,15}):([0-9a-f]*)")
_BROKEN = 1


def add_commands(commands: argparse._SubParsersAction[Any]) -> None:
    parser = commands.add_parser("audit", help="who changed what, when and why")
    parser.add_argument("--task", metavar="NAME", help="only what concerns this task")
    parser.add_argument("--after", type=int, metavar="N", help="the entries after number N; default the newest")
    parser.add_argument("--limit", type=int, default=20, metavar="N", help="default %(default)s")
    parser.add_argument("--verify", action="store_true", help="check that no entry was changed or is missing")
    parser.add_argument(
        "--expect", type=_head, metavar="HEAD", help="and that the log still holds this head of an earlier --verify"
    )
    add_client_options(parser)
    parser.set_defaults(run=_audit)


def _head(text: str) -> tuple[int, str]:
    found = _HEAD.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError(f'"{text}" is not a head as --verify prints it, a number, a colon and a hash')
    return int(found[1]), found[2]


def _audit(options: argparse.Namespace) -> int:
    server = Server.of(options)
    if options.verify or options.expect:
        return _verify(server, options)
    if options.after is None:
        answer = {"entries": list(deque(_entries(server, options.task), maxlen=max(options.limit, 0)))}
    else:
        answer = _page(server, options.task, options.after, options.limit)
    return print_json(answer) if options.json else _print_entries(answer["entries"])


def _entries(server: Server, task: str | None) -> Iterator[Mapping[str, Any]]:
    """All of them, oldest first."""
    after = 0
    while entries := _page(server, task, after, _PAGE)["entries"]:
        yield from entries
        after = entries[-1]["sequence"]


@dataclass(frozen=True, slots=True)
class Newest:
    """The last entries that changed something, oldest first; refusals and such keep the generation."""

    end: int = 0  # the number of the last entry that was looked at
    changes: Sequence[Mapping[str, Any]] = ()


def newest(server: Server, count: int, before: Newest | None = None) -> Newest:
    """What came after `before`, too, or all anew where the log has lost that.

    Only so far back that `count` are found, and at most some thousand entries: anybody can fill a log with refusals.
    """
    if before is None or (before.end and not _has(server, before.end)):
        before = Newest()
    end = _end(server, before.end, count)
    oldest, changes = end, list[Mapping[str, Any]]()
    for size in (count + _NOTES, *[_PAGE - 1] * _MOST_PAGES):
        if len(changes) >= count or oldest <= before.end:
            break
        first = max(oldest - size, before.end)  # is not looked at, but says which generation was before
        entries = _page(server, None, max(first - 1, 0), oldest - max(first - 1, 0))["entries"]
        changes[:0] = _changes(entries, 0 if first == 0 else None)
        oldest = first
    return Newest(end, [*before.changes, *changes][-count:])


def _changes(entries: Sequence[Mapping[str, Any]], generation: int | None) -> Iterator[Mapping[str, Any]]:
    """`generation`: before the first of them; None where that one only says it."""
    for entry in entries:
        if generation is not None and entry["generation"] != generation:
            yield entry
        generation = entry["generation"]


def _end(server: Server, known: int, step: int) -> int:
    """The last entry's number, by halving: a log may be long, and its numbers have no gaps. It has `known`."""
    held = known
    while _has(server, held + step):
        held, step = held + step, step * 2
    beyond = held + step
    while beyond - held > 1:
        middle = (held + beyond) // 2
        held, beyond = (middle, beyond) if _has(server, middle) else (held, middle)
    return held


def _has(server: Server, sequence: int) -> bool:
    return bool(_page(server, None, sequence - 1, 1)["entries"])


def _page(server: Server, task: str | None, after: int, limit: int) -> Any:
    of_task = {} if task is None else {"task": task}
    return server.ask("GET", "/v1/audit", parameters={**of_task, "after": after, "limit": limit})


def _verify(server: Server, options: argparse.Namespace) -> int:
    verdict = server.ask("GET", "/v1/audit/verify")
    if verdict["ok"] and options.expect:
        fault = _missing(server, *options.expect)
        verdict = {**verdict, "ok": not fault, "fault": fault}
    if options.json:
        print_json(verdict)
    elif verdict["ok"]:
        say(f"the log is whole: {verdict['entries']} entries")
        say(f"head {verdict['entries']}:{verdict['head']}")
        say("keep the head elsewhere: --expect shows whether the log was cut or written anew since", "dim")
    else:
        say(f"the log is NOT what was written: {verdict['fault']}", "bold")
    return 0 if verdict["ok"] else _BROKEN


def _missing(server: Server, sequence: int, wanted: str) -> str:
    """What is wrong with the entry that was the head once; empty where it is there as it was."""
    if sequence == 0:
        return ""  # the head of an empty log
    found = _page(server, None, sequence - 1, 1)["entries"]
    if not found:
        return f"it ends before entry {sequence}, which it had"
    return "" if found[0]["hash"] == wanted else f"entry {sequence} is another one than it was"


def _print_entries(entries: Sequence[Mapping[str, Any]]) -> int:
    shown = table("#", "time", "who", "action", "task", "change", "reason")
    for entry in entries:
        cells = (str(entry["sequence"]), when(entry["at"]), entry["actor"], entry["action"], entry["task"] or "")
        add_row(shown, *cells, change_in_words(entry), entry["reason"])
    show(shown)
    return 0


def change_in_words(entry: Mapping[str, Any]) -> str:
    """From what to what."""
    known = [shorten(value_in_words(entry[side])) for side in ("before", "after") if entry[side] is not None]
    return " → ".join(known)
