"""`manifold top`: what a server does right now, in a terminal. Reads; knows neither figures nor their layout.

The metrics are read each time; tasks and changes only when the generation moved: watching shall cost the server little.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

from rich.console import Console
from rich.live import Live

from app.client import audit
from app.client.http import AnsweredError, Server, add_server_options
from app.client.rates import Between, Scrape
from app.client.top_figures import ORDERS
from app.client.top_view import CHANGES, Frame, plain, view
from app.errors import ManifoldError, UnavailableError
from app.telemetry.exposition import read_exposition

_TIMEOUT_S = 5.0  # a view that waits longer shows nothing new
_LEAST_S, _MOST_S = 0.2, 3600.0
_PIPED_WIDTH = 160
_FORBIDDEN = 403


def add_commands(commands: argparse._SubParsersAction[Any]) -> None:
    parser = commands.add_parser("top", help="watch a server: tasks, versions, rates, times, drift, last changes")
    parser.description = "Ctrl-C ends it. Where the output is not a terminal, it is printed once, as with --once."
    parser.add_argument("--interval", type=_seconds, default=2.0, metavar="S", help="between two looks; default 2")
    parser.add_argument("--once", action="store_true", help="print it once, measured over one interval")
    parser.add_argument("--sort", choices=list(ORDERS), default="answers", help="of tasks; default %(default)s")
    add_server_options(parser)
    parser.set_defaults(run=_top)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = float("nan")
    if not isfinite(seconds) or not _LEAST_S <= seconds <= _MOST_S:
        raise argparse.ArgumentTypeError(f'"{text}" is not a number of seconds from {_LEAST_S:g} to {_MOST_S:g}')
    return seconds


def _top(options: argparse.Namespace) -> int:
    feed = Feed(replace(Server.of(options), timeout_s=_TIMEOUT_S))
    first = feed.read()
    if options.once or not sys.stdout.isatty():
        time.sleep(options.interval)
        console = Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH, highlight=False)
        console.print(plain(feed.read(), options.sort, console.width))
        return 0
    with contextlib.suppress(KeyboardInterrupt):  # this is how one leaves it
        _watch(feed, first, options)
    return 0


def _watch(feed: Feed, frame: Frame, options: argparse.Namespace) -> None:
    console = Console(highlight=False)
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(view(frame, options.sort, console.size), refresh=True)
            time.sleep(options.interval)
            try:
                frame = feed.read()
            except ManifoldError as error:
                frame = replace(frame, trouble=f"{error} (tried again each {options.interval:g} s)")


@dataclass(frozen=True, slots=True)
class _Told:
    """What changes with the generation alone."""

    stamp: tuple[float | None, float | None]  # generation, and start of the server
    info: Mapping[str, Any]
    tasks: Sequence[Mapping[str, Any]]


class Feed:
    """What one server says, read again and again."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._scrape: Scrape | None = None
        self._told: _Told | None = None
        self._newest = audit.Newest()
        self._untold = ""  # why the last changes are not known
        self._may_audit = True

    def read(self) -> Frame:
        """Raises ManifoldError; what was read before is kept then."""
        scrape = self._look()
        between = Between(self._scrape, scrape)
        stamp = (between.gauge("manifold_generation"), between.gauge("process_start_time_seconds"))
        if self._told is None or self._told.stamp != stamp:
            info, tasks = self._server.ask("GET", "/info"), self._server.ask("GET", "/v1/tasks")["tasks"]
            self._read_changes()
            self._told = _Told(stamp, info, tasks)
        elif self._untold:
            self._read_changes()
        self._scrape = scrape
        told = self._told
        return Frame(self._server.url, time.time(), told.info, told.tasks, between, self._newest.changes, self._untold)

    def _look(self) -> Scrape:
        text = self._server.read("/metrics")
        try:
            return Scrape(time.monotonic(), read_exposition(text))
        except ValueError as error:
            raise UnavailableError(f"what {self._server.url}/metrics says cannot be read: {error}") from error

    def _read_changes(self) -> None:
        """Not again where the key may not: each refusal is written into that very log."""
        if not self._may_audit:
            return
        try:
            self._newest, self._untold = audit.newest(self._server, CHANGES, self._newest), ""
        except AnsweredError as error:
            self._may_audit = error.status != _FORBIDDEN
            self._untold = str(error)
