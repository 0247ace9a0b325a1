"""`manifold pull`: the files of a version, as they were handed in, into a folder. Checks none of what they hold."""

from __future__ import annotations

import argparse
import io
import shlex
import shutil
import tarfile
import uuid
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from app.client.control import reference
from app.client.http import MisuseError, Server, add_client_options, task_path
from app.client.tables import print_json, say, short_digest, size
from app.domain import PLAIN_NAME, content_digest
from app.errors import DataError, NotFoundError, UnavailableError


def add_commands(commands: argparse._SubParsersAction[Any]) -> None:
    parser = commands.add_parser("pull", help="get the artifact of a version back as a folder")
    parser.add_argument(
        "version", type=_wanted, metavar="TASK[@VERSION]", help="without a version, the champion of the task"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    add_client_options(parser)
    parser.set_defaults(run=_pull)


def _wanted(text: str) -> tuple[str, int | None]:
    if "@" not in text:
        return text, None
    named = reference(text)
    return named.task, named.version


def _pull(options: argparse.Namespace) -> int:
    check_out(options.out)
    server = Server.of(options)
    task, version = options.version
    record, files = download(server, task, _champion(server, task) if version is None else version)
    write_folder(files, options.out)
    if options.json:
        return print_json(record)
    content = f"{short_digest(record['digest'])}, {size(record['size_bytes'])}"
    say(f"{_name(record)} is in {options.out} ({content})")
    say(f"next: manifold publish {shlex.quote(str(options.out))} --url URL, to hand it in to another server", "dim")
    return 0


def pull_live(server: Server, names: Collection[str], folder: Path) -> dict[str, int]:
    """The champions of these tasks, as far as they are live, each into a folder of its name below `folder`.

    Returns the champion of every live task, of others too.
    """
    tasks = server.ask("GET", "/v1/tasks")["tasks"]
    champions = {task["name"]: task["traffic"]["champion"] for task in tasks if task["traffic"] is not None}
    for name in sorted(champions.keys() & set(names)):
        _, files = download(server, name, champions[name])
        write_folder(files, folder / name)
    return champions


def _champion(server: Server, task: str) -> int:
    traffic = server.ask("GET", task_path(task))["traffic"]
    if traffic is None:
        raise NotFoundError(f"no version of {task} is live: name one, as in {task}@1")
    champion: int = traffic["champion"]
    return champion


# -- what the server sends ---------------------------------------------------------------------------------------------


def download(server: Server, task: str, version: int) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The version as the index has it, and its files by name. Raises UnavailableError where others than these came."""
    path = task_path(task, "versions", version)
    record: dict[str, Any] = server.ask("GET", path)
    files = _read_tar(server.download(f"{path}/artifact"), _name(record))
    arrived = content_digest(files)
    if arrived != record["digest"]:
        raise UnavailableError(
            f"{_name(record)} did not arrive as it is: its digest is {short_digest(record['digest'])}, and that of "
            f"what came is {short_digest(arrived)}; nothing was written, so try again"
        )
    return record, files


def _read_tar(content: bytes, name: str) -> dict[str, bytes]:
    """Contents by name. Only plain files with plain names are taken, and nothing is ever extracted by its path."""
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            for member, file in _members(tar, len(content)):
                is_plain = PLAIN_NAME.fullmatch(member.name) is not None
                if file is None or not is_plain or member.name in files:
                    raise UnavailableError(
                        f'the archive of {name} holds "{member.name[:100]}", which is no file with a plain name of '
                        "its own; nothing was written"
                    )
                files[member.name] = file
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        raise UnavailableError(f"what came for {name} is no archive ({error}); nothing was written") from error
    return files


def _members(tar: tarfile.TarFile, most_bytes: int) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """Each with its content, None where it is no plain file: a sparse one could be of any size."""
    for member in tar:
        is_file = member.isreg() and not member.issparse()
        if is_file and not 0 <= member.size <= most_bytes:
            raise tarfile.TarError(f"a file of {member.size} bytes in {most_bytes}")
        file = tar.extractfile(member) if is_file else None
        yield member, None if file is None else file.read()


def _name(record: Mapping[str, Any]) -> str:
    return f"{record['task']}@{record['version']}"


# -- the folder --------------------------------------------------------------------------------------------------------


def check_out(out: Path) -> None:
    """Raises MisuseError where `out` cannot become the folder."""
    if not out.exists():
        return
    if not out.is_dir() or any(out.iterdir()):
        raise MisuseError(f"{out} exists and is not empty: name a new folder with --out")
    if out.samefile(Path()):
        raise MisuseError(f"{out} is where you are, and would be replaced: name a new folder with --out")


def write_folder(files: Mapping[str, bytes], out: Path) -> None:
    """All files or none: they are written beside `out`, and moved there in one step. Raises DataError."""
    out = out.absolute()
    draft = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    try:
        draft.mkdir(parents=True)
        for name, content in files.items():
            (draft / name).write_bytes(content)
        draft.rename(out)
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
