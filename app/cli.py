"""`manifold …`: serve and learning run here; every other command is a client of the REST API, in `app.client`.

What takes long to import (torch with serve and learning, the HTTP client) is imported by the command that needs it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from app.client import audit, comparison, control, drift, index, inference, keys, publish, pull, releases, top, why
from app.client.http import AnsweredError, MisuseError, Server, add_server_options, settings_of
from app.client.setting_options import add_setting_options, given_settings
from app.config import Settings
from app.errors import ManifoldError, UnavailableError
from app.rollout import printable

_FAILED, _MISUSED, _INTERRUPTED = 1, 2, 130
_NOT_ALLOWED = (401, 403)
_OR_LIVE = "; or give a folder of the live artifacts with --live"
_LEARNING = {  # command → its module in app.learning, and what it does
    "learn": ("command", "train a task from a file of texts and labels"),
    "combine": ("combine_command", "make a representation of several prefixes"),
    "pack": ("pack_command", "propose a release in which many tasks cost about one pass"),
    "compress": ("compress_command", "make a prefix shorter"),
    "baseline": ("baseline_command", "measure anew what live texts are compared with, to see them drift"),
    "experiment": ("experiment_command", "compare combined prefixes with other ways, on data of yours"),
}
_CLIENTS = (inference, publish, pull, control, comparison, drift, releases, audit, why, keys, index, top)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status: 0, 1 where it failed, 2 where it was called wrongly.

    `predict --file` returns 3 where some of the rows could not be answered.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options = _parser(arguments).parse_args(arguments)  # which imports what takes long
        status: int = options.run(options)
        sys.stdout.flush()
    except ManifoldError as error:
        sys.stderr.write(f"manifold: {printable(str(error))}\n")
        return _MISUSED if isinstance(error, MisuseError) else _FAILED
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILED
    except KeyboardInterrupt:
        return _INTERRUPTED
    return status


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("manifold", description="One text in, every prediction out.")
    parser.set_defaults(arguments=arguments, open_runtime=_open_runtime)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_serve(commands.add_parser("serve", help="run the server", formatter_class=_WideHelp))
    for clients in _CLIENTS:
        clients.add_commands(commands)
    for name, (module, told) in _LEARNING.items():
        command = commands.add_parser(name, help=told)
        if arguments[:1] == [name]:  # the others would only make it start slowly
            _add_learning(command, name, module)
    return parser


class _WideHelp(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=112)


# -- serve and learning -----------------------------------------------------------------------------------------------


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.description = "Runs the server. Each option can also be an environment variable, or a line in .env."
    add_setting_options(parser, [name for name in Settings.model_fields if name != "key"])  # key is the clients' own
    parser.set_defaults(run=_serve)


def _serve(options: argparse.Namespace) -> int:
    settings = settings_of(given_settings(options))
    from app.main import serve

    return serve(settings)


def _open_runtime(settings: Settings) -> Any:
    """For the command that can do without a server."""
    from app.main import open_runtime

    return open_runtime(settings)


def _add_learning(parser: argparse.ArgumentParser, name: str, module: str) -> None:
    command = import_module(f"app.learning.{module}")
    command.add_arguments(parser)
    parser.set_defaults(run=command.run)
    if name == "learn":
        _add_publishing(parser, command.run)
    elif name == "pack":
        _add_pulling(parser, command.run)


def _add_publishing(parser: argparse.ArgumentParser, learn: Callable[[argparse.Namespace], int]) -> None:
    group = parser.add_argument_group("after learning")
    group.add_argument("--publish", action="store_true", help="hand it in to a server as the task's next version")
    add_server_options(group)
    parser.set_defaults(run=lambda options: _learn_and_publish(options, learn))


def _learn_and_publish(options: argparse.Namespace, learn: Callable[[argparse.Namespace], int]) -> int:
    if not options.publish:
        return learn(options)
    if options.out is None:
        raise MisuseError("--publish needs --out: it goes with one task, and not with --config")
    server = Server.of(options)
    if options.key:  # the artifact keeps the command as it was typed
        sys.argv = [argument.replace(options.key, "TOKEN") for argument in sys.argv]
    status = learn(options)
    if status == 0:
        publish.publish_folder(server, options.out)
    return status


def _add_pulling(parser: argparse.ArgumentParser, pack: Callable[..., int]) -> None:
    group = parser.add_argument_group("the server whose champions are live, without --live")
    add_server_options(group)
    parser.set_defaults(run=lambda options: pack(options, _puller(options)))


def _puller(options: argparse.Namespace) -> Callable[[Collection[str], Path], Mapping[str, int]] | None:
    """None where a folder has what is live."""
    if options.live is None:
        return partial(_pull_live, Server.of(options))
    if options.url is not None:
        raise MisuseError("--live and --url both say where the live artifacts are: give one of them")
    return None


def _pull_live(server: Server, names: Collection[str], folder: Path) -> Mapping[str, int]:
    try:
        return pull.pull_live(server, names, folder)
    except UnavailableError as error:
        raise UnavailableError(f"{error}{_OR_LIVE}") from error
    except AnsweredError as error:
        if error.status not in _NOT_ALLOWED:
            raise
        raise AnsweredError(f"{error}{_OR_LIVE}", error.status) from error


if __name__ == "__main__":
    sys.exit(main())
