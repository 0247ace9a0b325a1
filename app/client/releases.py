"""`manifold releases`: several tasks changed at once, from a file or from what `manifold pack` proposed."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from app.client.control import promoted
from app.client.http import Server, add_client_options
from app.client.publish import approve, publish, read_folder
from app.client.tables import add_row, print_json, say, show, table, when
from app.domain import content_digest
from app.errors import MalformedError, UnavailableError
from app.rollout import State, traffic_in_words

_PROPOSAL = "release.json"  # in the folder that `manifold pack` writes
_WAIT_S, _POLL_S = 30.0, 0.1


def add_commands(commands: argparse._SubParsersAction[Any]) -> None:
    parser = commands.add_parser("releases", help="change the traffic of several tasks at once")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    _add_create(actions.add_parser("create", help="make a release"))
    _add_list(actions.add_parser("list", help="the releases made so far"))
    _add_rollback(actions.add_parser("rollback", help="give its tasks the traffic that they had before"))


def _add_create(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "From a file: the traffic of each task, as POST /v1/releases takes it. From a folder of `manifold pack`: its "
        "new versions are published, approved, and made champions together."
    )
    parser.add_argument("source", type=Path, metavar="FOLDER|FILE.json")
    parser.add_argument("--if-match", type=int, metavar="GENERATION", help="file: only if the index is still at this")
    _add_common(parser)
    parser.set_defaults(run=_create)


def _add_list(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--limit", type=int, default=20, metavar="N", help="default %(default)s")
    add_client_options(parser)
    parser.set_defaults(run=_list)


def _add_rollback(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("release", metavar="ID")
    _add_common(parser)
    parser.set_defaults(run=_rollback)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reason", default="", help="for the audit log")
    add_client_options(parser)


def _create(options: argparse.Namespace) -> int:
    server = Server.of(options)
    if options.source.is_dir():
        body, if_match = _from_proposal(server, options)
    else:
        body, if_match = read_object(options.source), options.if_match
    if options.reason:
        body = {**body, "reason": options.reason}
    answer = server.ask("POST", "/v1/releases", body, if_match=if_match)
    return print_json(answer) if options.json else _print_release(answer)


def _list(options: argparse.Namespace) -> int:
    answer = Server.of(options).ask("GET", "/v1/releases", parameters={"limit": options.limit})
    return print_json(answer) if options.json else _print_releases(answer)


def _rollback(options: argparse.Namespace) -> int:
    path = f"/v1/releases/{quote(options.release, safe='', errors='replace')}/rollback"
    answer = Server.of(options).ask("POST", path, {"reason": options.reason})
    if options.json:
        return print_json(answer)
    say(f"release {answer['id']} is rolled back")
    for task, traffic in answer["before"].items():
        say(f"{task}: {traffic_in_words(traffic)}")
    return 0


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object in a file. Raises MalformedError."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise MalformedError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise MalformedError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise MalformedError(f"{path} does not hold a JSON object")
    return content


# -- what pack proposed ------------------------------------------------------------------------------------------------


def _from_proposal(server: Server, options: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """The release's body, its versions approved, and the generation of the traffic that it was made from."""
    artifacts = _read_proposal(options.source)
    records = {}
    for task, files in artifacts.items():
        record, is_new = publish(server, task, files, options.reason)
        if not options.json:
            say(f"{task}@{record['version']} {'is published' if is_new else 'was published before'}", "dim")
        records[task] = record
    for task, record in records.items():
        if record["state"] == State.CANDIDATE:
            records[task] = approve(server, record, options.reason)
    view = _view(server, max(record["generation"] for record in records.values()))
    live = {task["name"]: task["traffic"] for task in view["tasks"]}
    tasks = {task: promoted(live.get(task), record["version"]) for task, record in records.items()}
    return {"tasks": tasks}, view["generation"]


def _read_proposal(folder: Path) -> dict[str, dict[str, bytes]]:
    """Files of each task with a new version. Raises MalformedError, before anything is sent."""
    proposal = read_object(folder / _PROPOSAL)
    try:
        new = {name: task["digest"] for name, task in proposal["tasks"].items() if task["is_new"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise MalformedError(f"{folder / _PROPOSAL} is not what `manifold pack` writes: {error!r}") from error
    if not new:
        raise MalformedError(f"{folder} proposes no new version: every task stays as it is")
    artifacts = {name: read_folder(folder / name) for name in new}
    changed = [name for name, files in artifacts.items() if content_digest(files) != new[name]]
    if changed:
        raise MalformedError(f"{folder / _PROPOSAL} was measured on other files of {', '.join(changed)}: pack again")
    return artifacts


def _view(server: Server, generation: int) -> Mapping[str, Any]:
    """All tasks, once the server that answers has followed that far. Raises UnavailableError."""
    until_s = time.monotonic() + _WAIT_S
    while True:
        view: dict[str, Any] = server.ask("GET", "/v1/tasks")
        if view["generation"] >= generation:
            return view
        if time.monotonic() > until_s:
            raise UnavailableError(
                f"{server.url} is still at generation {view['generation']} of {generation}: all versions are approved, "
                "so try the same command again once it has followed"
            )
        time.sleep(_POLL_S)


# -- what people read --------------------------------------------------------------------------------------------------


def _print_release(release: Mapping[str, Any]) -> int:
    shown = table("task", "before", "after")
    for task, after in release["after"].items():
        add_row(shown, task, traffic_in_words(release["before"].get(task)), traffic_in_words(after))
    show(shown)
    say(f"release {release['id']} (generation {release['generation']})")
    say(f"back again: manifold releases rollback {release['id']}", "dim")
    return 0


def _print_releases(answer: Mapping[str, Any]) -> int:
    shown = table("id", "made", "by", "tasks", "generation", "reason", "rolled back by")
    for release in answer["releases"]:
        made, generation = when(release["created_at"]), str(release["generation"])
        tasks, undone = ", ".join(release["after"]), release["rolled_back_by"] or ""
        add_row(shown, release["id"], made, release["created_by"], tasks, generation, release["reason"], undone)
    show(shown) if answer["releases"] else say("no releases yet: manifold releases create makes one")
    return 0
