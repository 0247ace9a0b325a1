"""`manifold …`: serve and learn run here; predict and tasks are clients of the REST API.

What takes long to import (torch with serve and learn, the HTTP client) is imported by the command that needs it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from pydantic.fields import FieldInfo
from rich.console import Console
from rich.table import Table
from rich.text import Text

from app.config import Settings, env_name, is_loopback, load_settings, local_url, option_name
from app.errors import MalformedError, ManifoldError, SettingsError, UnavailableError

if TYPE_CHECKING:
    import httpx2

_FAILED, _MISUSED, _INTERRUPTED = 1, 2, 130
_TIMEOUT_S = 60.0
_LEARNING = {  # command → its module in app.learning, and what it does
    "learn": ("command", "train a task from a file of texts and labels"),
    "combine": ("combine_command", "make a representation of several prefixes"),
    "pack": ("pack_command", "propose a release in which many tasks cost about one pass"),
    "compress": ("compress_command", "make a prefix shorter"),
    "experiment": ("experiment_command", "compare combined prefixes with other ways, on data of yours"),
}


class _MisuseError(ManifoldError):
    """The command or the settings cannot work as they were given."""


class _AnsweredError(ManifoldError):
    """The server answered with an error; its sentence is ours."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status: 0, 1 where it failed, 2 where it was called wrongly."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser(arguments[0] if arguments else "").parse_args(arguments)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except ManifoldError as error:
        sys.stderr.write(f"manifold: {_printable(str(error))}\n")
        return _MISUSED if isinstance(error, _MisuseError) else _FAILED
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILED
    except KeyboardInterrupt:
        return _INTERRUPTED
    return status


def _settings(overrides: Mapping[str, object]) -> Settings:
    try:
        return load_settings(overrides)
    except SettingsError as error:
        raise _MisuseError(str(error)) from error


def _parser(wanted: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("manifold", description="One text in, every prediction out.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_serve(commands.add_parser("serve", help="run the server", formatter_class=_WideHelp))
    _add_predict(commands.add_parser("predict", help="ask a running server about texts"))
    _add_tasks(commands.add_parser("tasks", help="list what a running server can be asked"))
    for name, (module, told) in _LEARNING.items():
        command = commands.add_parser(name, help=told)
        if name == wanted:  # the others would only make it start slowly
            _add_learning(command, module)
    return parser


class _WideHelp(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=112)


# -- serve and learn ---------------------------------------------------------------------------------------------------


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.description = "Runs the server. Each option can also be an environment variable, or a line in .env."
    for name, field in Settings.model_fields.items():
        _add_setting(parser, name, field)
    parser.set_defaults(run=_serve)


def _add_setting(parser: argparse.ArgumentParser, name: str, field: FieldInfo) -> None:
    told = f"{field.description} [{env_name(name)}; default {_default(field.default)}]".replace("%", "%%")
    if field.annotation is bool:
        parser.add_argument(option_name(name), action=argparse.BooleanOptionalAction, help=told)
    else:
        parser.add_argument(option_name(name), metavar=name.rpartition("_")[2].upper(), help=told)


def _default(value: object) -> str:
    match value:
        case None | ():
            return "unset"
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}"
        case _:
            return str(value)


def _serve(options: argparse.Namespace) -> int:
    given = {name: getattr(options, name) for name in Settings.model_fields}
    settings = _settings({name: value for name, value in given.items() if value is not None})
    from app.main import serve

    return serve(settings)


def _add_learning(parser: argparse.ArgumentParser, module: str) -> None:
    command = import_module(f"app.learning.{module}")
    command.add_arguments(parser)
    parser.set_defaults(run=command.run)


# -- predict and tasks: clients ----------------------------------------------------------------------------------------


def _add_predict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("texts", nargs="+", metavar="TEXT")
    parser.add_argument("--pair", metavar="TEXT", help="the second text, for tasks that read pairs")
    parser.add_argument(
        "--task", action="append", metavar="NAME", help="task, task@number or task@challenger; may be repeated"
    )
    parser.add_argument("--truncate", action="store_true", help="read the beginning of texts that are too long")
    _add_client_options(parser)
    parser.set_defaults(run=_predict)


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", nargs="?", help="show the versions of this one")
    _add_client_options(parser)
    parser.set_defaults(run=_tasks)


def _add_client_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", help="where the server is; default: this machine, at the port of the settings")
    parser.add_argument("--json", action="store_true", help="print the server's answer as it came")


def _predict(options: argparse.Namespace) -> int:
    pair = {} if options.pair is None else {"text_pair": options.pair}
    body = {"inputs": [{"text": text, **pair} for text in options.texts], "truncate": options.truncate}
    if options.task:
        body["tasks"] = options.task
    answer = _ask(options, "POST", "/v1/predict", body)
    return _print_json(answer) if options.json else _print_prediction(options.texts, answer)


def _tasks(options: argparse.Namespace) -> int:
    path = "/v1/tasks" if options.task is None else f"/v1/tasks/{quote(options.task, safe='')}"
    answer = _ask(options, "GET", path, None)
    if options.json:
        return _print_json(answer)
    return _print_tasks(answer) if options.task is None else _print_versions(answer)


def _ask(options: argparse.Namespace, method: str, path: str, body: dict[str, Any] | None) -> Any:
    """The server's answer as JSON. Raises ManifoldError with a sentence for whatever goes wrong."""
    import httpx2

    url = (options.url or local_url(_settings({}))).rstrip("/")
    content = None if body is None else _encode(body)
    headers = {"content-type": "application/json"}
    # A proxy from the environment is not meant for a server on this machine.
    try:
        with httpx2.Client(timeout=_TIMEOUT_S, trust_env=not _is_local(url)) as client:
            return _decode(url, client.request(method, url + path, content=content, headers=headers))
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
        raise MalformedError(f"{url} is not an address of a server: {error}") from error
    except httpx2.ConnectError as error:
        raise UnavailableError(
            f"nothing answers at {url}: start a server with `manifold serve`, or say with --url where it is"
        ) from error
    except httpx2.HTTPError as error:
        raise UnavailableError(f"the connection to {url} failed: {str(error) or type(error).__name__}") from error


def _is_local(url: str) -> bool:
    try:
        return is_loopback(urlsplit(url).hostname or "")
    except ValueError:
        return False


def _encode(body: dict[str, Any]) -> bytes:
    try:
        return json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise MalformedError("the text is not valid UTF-8") from error


def _decode(url: str, response: httpx2.Response) -> Any:
    try:
        answer = response.json()
    except ValueError as error:
        raise UnavailableError(f"what answers at {url} is not Manifold (status {response.status_code})") from error
    if response.is_success:
        return answer
    told = answer.get("error") if isinstance(answer, dict) else None
    raise _AnsweredError(str(told) if told else f"the server answered with status {response.status_code}")


# -- what people read --------------------------------------------------------------------------------------------------


def _print_json(answer: Any) -> int:
    sys.stdout.write(json.dumps(answer, indent=2, ensure_ascii=False) + "\n")
    return 0


def _print_prediction(texts: Sequence[str], answer: dict[str, Any]) -> int:
    table = _table("text", "task", "version", "answer", "score")
    for text, results in zip(texts, answer["results"], strict=True):
        shown = _shorten(text)
        for reference, result in results.items():
            said, score = _said(result)
            _add_row(table, shown, reference, str(result["version"]), said, score)
            shown = ""
        table.add_section()
    usage = answer["usage"]
    _console().print(table)
    _console().print(
        f"{answer['model']}, {usage['tokens']} tokens, {usage['rows']} rows, {usage['passes']:g} passes", style="dim"
    )
    return 0


def _said(result: dict[str, Any]) -> tuple[str, str]:
    """An answer of any kind in words, and its score."""
    if "error" in result:
        return f"failed: {result['error']}", ""
    if "label" in result:
        return result["label"], f"{result['score']:.3f}"
    if "labels" in result:
        best = [result["scores"][label] for label in result["labels"]]
        return ", ".join(result["labels"]) or "(none)", ", ".join(f"{score:.3f}" for score in best)
    if "spans" in result:
        spans = result["spans"]
        return "; ".join(f"{s['label']}: {s['text']}" for s in spans) or "(none)", _scores_of(spans)
    return f"{result['value']:g}", ""


def _scores_of(spans: Sequence[dict[str, Any]]) -> str:
    return ", ".join(f"{span['score']:.3f}" for span in spans)


def _print_tasks(answer: dict[str, Any]) -> int:
    table = _table("task", "kind", "reads", "labels", "champion", "passes")
    for task in answer["tasks"]:
        kind = task["problem_type"].replace("_classification", "").replace("_", " ")
        champion = str(task["traffic"]["champion"])
        labels = _shorten(f"{len(task['labels'])}: {', '.join(task['labels'])}")
        _add_row(table, task["name"], kind, task["input_kind"], labels, champion, f"{task['passes']:g}")
    _console().print(table)
    _console().print(f"embeddings: {', '.join(answer['representations'])}", style="dim", highlight=False)
    return 0


def _print_versions(answer: dict[str, Any]) -> int:
    table = _table("version", "state", "readout", "prefixes", "passes", "evaluation", "digest")
    for version in answer["details"]:
        layers = ",".join(map(str, version["readout"]["layers"]))
        prefixes = ", ".join(f"{p['num_virtual_tokens']} from layer {p['first_layer']}" for p in version["prefixes"])
        readout = f"{version['readout']['kind']} of {layers}"
        figures = ", ".join(_figures(version["evaluation"]))
        digest = version["digest"].removeprefix("sha256:")[:12]
        cells = (str(version["version"]), version["state"], readout, prefixes or "none", f"{version['passes']:g}")
        _add_row(table, *cells, figures, digest)
    _console().print(table)
    return 0


def _figures(evaluation: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Nested figures as `test.accuracy 0.91`."""
    for name, value in evaluation.items():
        if isinstance(value, dict):
            yield from _figures(value, f"{prefix}{name}.")
        elif isinstance(value, int | float):
            yield f"{prefix}{name} {value:.4g}"


def _table(*headings: str) -> Table:
    return Table(*headings, box=None, pad_edge=False, header_style="bold")


def _add_row(table: Table, *cells: str) -> None:
    """As plain text: what a text or a label holds is never markup, and never moves the cursor."""
    table.add_row(*(Text(_printable(cell)) for cell in cells))


def _shorten(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "·" for character in text)


def _console() -> Console:
    return Console(soft_wrap=False)


if __name__ == "__main__":
    sys.exit(main())
