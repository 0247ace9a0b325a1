"""`manifold drift`: which live versions see other texts, or answer otherwise, than when they were measured."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from app.client.http import Server, add_client_options
from app.client.tables import add_row, print_json, say, show, table

_UNKNOWN = "–"
_LEAST_P_VALUE = 1e-300


def add_commands(commands: argparse._SubParsersAction[Any]) -> None:
    parser = commands.add_parser("drift", help="whose texts or answers look unlike those it was measured on")
    parser.add_argument("task", nargs="?", metavar="TASK", help="default: every live one")
    add_client_options(parser)
    parser.set_defaults(run=_drift)


def _drift(options: argparse.Namespace) -> int:
    parameters = None if options.task is None else {"task": options.task}
    answer = Server.of(options).ask("GET", "/v1/drift", parameters=parameters)
    if options.json:
        return print_json(answer)
    if not answer["window"]:
        say("this server does not look for drift: its setting drift_window is 0")
        return 0
    _print_rows(answer)
    if answer["without_baseline"]:
        say(f"without a baseline: {', '.join(answer['without_baseline'])}")
        say("next: manifold baseline FOLDER --data FILE, and publish the folder again", "dim")
    return 0


def _print_rows(answer: Mapping[str, Any]) -> None:
    rows = answer["drift"]
    if rows:
        shown = table("version", "arm", "kind", "PSI", "p-value", "texts", "baseline", "")
        for row in rows:
            add_row(shown, *_cells(row))
        show(shown)
    drifting = dict.fromkeys(f"{row['task']}@{row['version']}" for row in rows if row["drifting"])
    say(f"drifting: {', '.join(drifting)}" if drifting else "nothing drifts", "bold" if drifting else "")
    if any(row["psi"] is None for row in rows):
        say(f"– : nothing is said before {answer['least_texts']} texts", "dim")


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    kind = row["kind"] if row["label"] is None else f"{row['kind']} of {row['label']}"
    psi, p_value = (_UNKNOWN if row[name] is None else say(row[name]) for name, say in _SAID)
    version, counts = f"{row['task']}@{row['version']}", (str(row["texts"]), str(row["baseline_texts"]))
    return version, row["arm"], kind, psi, p_value, *counts, "DRIFTING" if row["drifting"] else ""


def _p_value(value: float) -> str:
    """Never 0, which no chance is: of many texts that are quite different it is too small for a number."""
    return f"<{_LEAST_P_VALUE:g}" if value < _LEAST_P_VALUE else f"{value:.2g}"


_SAID: Sequence[tuple[str, Callable[[float], str]]] = (("psi", "{:.3g}".format), ("p_value", _p_value))
