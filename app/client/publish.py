"""`manifold publish`: a folder becomes the next version of its task. Reads files; checks none of what they hold."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.client.http import AnsweredError, MisuseError, Server, add_client_options, task_path
from app.client.tables import print_json, say, short_digest, size
from app.domain import InputKind, ProblemType
from app.errors import MalformedError
from app.rollout import State

_CONFIG, _TENSORS, _MANIFEST = "adapter_config.json", "adapter_model.safetensors", "manifest.json"
_FILES = (_CONFIG, _TENSORS, _MANIFEST)  # of an artifact; reports and the like stay here


def add_commands(commands: argparse._SubParsersAction[Any]) -> None:
    parser = commands.add_parser("publish", help="hand in a folder as the next version of a task")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="what `manifold learn` wrote, or PEFT saved")
    parser.add_argument("--task", metavar="NAME", help="default: what its manifest says")
    parser.add_argument("--approve", action="store_true", help="also approve it")
    parser.add_argument("--reason", default="", help="for the audit log")
    group = parser.add_argument_group("for a folder without a manifest, as PEFT saves it")
    group.add_argument("--problem-type", choices=[kind.value for kind in ProblemType if kind != ProblemType.EMBEDDING])
    group.add_argument("--labels", metavar="A,B", help="in the order of the head")
    group.add_argument("--input", choices=list(InputKind), help="default text")
    add_client_options(parser)
    parser.set_defaults(run=_publish)


def _publish(options: argparse.Namespace) -> int:
    given = {name: getattr(options, name) for name in ("problem_type", "labels", "input")}
    fields = {name: value for name, value in given.items() if value is not None}
    files = read_folder(options.folder)
    task = options.task or task_of(files, options.folder)
    server = Server.of(options)
    record, is_new = publish(server, task, files, options.reason, fields)
    if options.approve:
        record = approve(server, record, options.reason)
    if options.json:
        return print_json(record)
    tell(record, is_new)
    return 0


def publish_folder(server: Server, folder: Path) -> None:
    """What was just learned into `folder`, as a candidate."""
    files = read_folder(folder)
    tell(*publish(server, task_of(files, folder), files, ""))


def read_folder(folder: Path) -> dict[str, bytes]:
    """The artifact's files by name. Raises MalformedError."""
    try:
        files = {name: (folder / name).read_bytes() for name in _FILES if (folder / name).is_file()}
    except OSError as error:
        raise MalformedError(f"{folder} cannot be read: {error.strerror}") from error
    if not folder.is_dir():
        raise MalformedError(f"{folder} is no folder: name the one that holds {_TENSORS}")
    if _TENSORS not in files:
        raise MalformedError(f"{folder} has no {_TENSORS}, which an artifact needs; pickles are not taken")
    return files


def task_of(files: Mapping[str, bytes], folder: Path) -> str:
    """Raises MisuseError where no manifest says it."""
    try:
        task = json.loads(files.get(_MANIFEST, b"{}")).get("task")
    except (ValueError, AttributeError) as error:
        raise MalformedError(f"{folder / _MANIFEST} is no JSON object: {error}") from error
    if not isinstance(task, str) or not task:
        raise MisuseError(f"{folder} does not say which task it is of: give --task")
    return task


def publish(
    server: Server, task: str, files: Mapping[str, bytes], reason: str, fields: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], bool]:
    """The version as the index has it, and whether it is new: the same content again is not."""
    path = task_path(task, "versions")
    answer, is_new = server.upload(path, files, {**(fields or {}), "reason": reason})
    return answer, is_new


def approve(server: Server, record: Mapping[str, Any], reason: str) -> dict[str, Any]:
    """The published version, approved. Raises AnsweredError that tells how far it came."""
    path = task_path(record["task"], "versions", record["version"], "approve")
    try:
        approved: dict[str, Any] = server.ask("POST", path, {"reason": reason})
    except AnsweredError as error:
        name = f"{record['task']}@{record['version']}"
        raise AnsweredError(f"{name} is published and not approved: {error}", error.status) from error
    return approved


def tell(record: Mapping[str, Any], is_new: bool) -> None:
    name, state = f"{record['task']}@{record['version']}", record["state"]
    content = f"{short_digest(record['digest'])}, {size(record['size_bytes'])}"
    known = "" if is_new else ", and was published before"
    say(f"{name} is {state}{known} ({content}, generation {record['generation']})")
    tell_next(name, state)


def tell_next(name: str, state: str) -> None:
    """What can be done with a version in this state."""
    if state == State.CANDIDATE:
        say(f"next: manifold approve {name}, or first manifold shadow {name}", "dim")
    elif state == State.APPROVED:
        say(f"next: manifold canary {name} 10, or at once manifold promote {name}", "dim")
