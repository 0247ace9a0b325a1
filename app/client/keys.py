"""`manifold keys`: who may do what."""

from __future__ import annotations

import argparse
from typing import Any
from urllib.parse import quote

from app.client.http import Server, add_client_options
from app.client.tables import add_row, print_json, say, show, table, when
from app.config import env_name
from app.rollout import Role


def add_commands(commands: argparse._SubParsersAction[Any]) -> None:
    parser = commands.add_parser("keys", help="create, list and revoke keys")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    create = actions.add_parser("create", help="make a key; its token is shown this once")
    create.add_argument("name", metavar="NAME", help="of who holds it, as the audit log will say")
    create.add_argument("--role", action="append", required=True, choices=list(Role), help="may be repeated")
    _add_run(create, _create)
    _add_run(actions.add_parser("list", help="every key, without its token"), _list)
    revoke = actions.add_parser("revoke", help="let nobody in with this key any more")
    revoke.add_argument("id", metavar="ID", help="as list shows it")
    _add_run(revoke, _revoke)


def _add_run(parser: argparse.ArgumentParser, run: Any) -> None:
    add_client_options(parser)
    parser.set_defaults(run=run)


def _create(options: argparse.Namespace) -> int:
    answer = Server.of(options).ask("POST", "/v1/keys", {"name": options.name, "roles": options.role})
    if options.json:
        return print_json(answer)
    say(f"key {answer['id']} of {answer['name']}: {', '.join(answer['roles'])}")
    say(answer["token"])
    say(f"it is shown this once: keep it, and give it to commands as {env_name('key')}", "dim")
    return 0


def _list(options: argparse.Namespace) -> int:
    answer = Server.of(options).ask("GET", "/v1/keys")
    if options.json:
        return print_json(answer)
    shown = table("id", "name", "roles", "created by", "created")
    for key in answer["keys"]:
        add_row(shown, key["id"], key["name"], ", ".join(key["roles"]), key["created_by"], when(key["created_at"]))
    show(shown) if answer["keys"] else say("no keys: whoever reaches the server may do everything")
    return 0


def _revoke(options: argparse.Namespace) -> int:
    Server.of(options).ask("DELETE", f"/v1/keys/{quote(options.id, safe='', errors='replace')}")
    if options.json:
        return print_json({"id": options.id, "revoked": True})
    say(f"key {options.id} is revoked")
    return 0
