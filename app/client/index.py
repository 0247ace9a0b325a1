"""`manifold index`: how a server stands to the index, and what to do after the index lost something."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from app.client.http import Server, add_client_options
from app.client.tables import add_row, print_json, say, show, table

_SETTLE = {
    "restore": "write back what the index lost and the server still knows",
    "accept": "take the index as it is: what is gone from it is not served any more",
}


def add_commands(commands: argparse._SubParsersAction[Any]) -> None:
    parser = commands.add_parser("index", help="how the server stands to the version index")
    parser.description = "; ".join(f"{action}: {told}" for action, told in _SETTLE.items())
    parser.add_argument("action", nargs="?", choices=["show", *_SETTLE], default="show", help="default show")
    parser.add_argument("--reason", default="", help="for the audit log")
    add_client_options(parser)
    parser.set_defaults(run=_index)


def _index(options: argparse.Namespace) -> int:
    server = Server.of(options)
    if options.action == "show":
        answer = server.ask("GET", "/v1/index")
        return print_json(answer) if options.json else _print_state(answer)
    answer = server.ask("POST", f"/v1/index/{options.action}", {"reason": options.reason})
    if options.json:
        return print_json(answer)
    done = "has back what it lost" if options.action == "restore" else "is taken as it is"
    say(f"the index {done} (generation {answer['generation']})")
    return 0


def _print_state(answer: Mapping[str, Any]) -> int:
    state = "answers" if answer["up"] else "DOES NOT ANSWER"
    say(f"{answer['url']} {state}: generation {answer['generation']}, read {answer['staleness_s']:.1f} s ago")
    if answer["regressed"]:
        say(f"{answer['regressed']}", "bold")
        say("next: manifold index restore, or manifold index accept", "dim")
    if answer["failures"]:
        shown = table("version", "server", "cannot serve it, because")
        for version, servers in answer["failures"].items():
            for server, reason in servers.items():
                add_row(shown, version, server, reason)
        show(shown)
    return 0
