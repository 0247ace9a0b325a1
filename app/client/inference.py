"""`manifold predict` and `manifold tasks`: what a running server answers, and what it can be asked.

All rows of a file are `app.client.bulk`'s, which takes long to import.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from app.client.http import Server, add_client_options, task_path
from app.client.setting_options import add_setting_options
from app.client.tables import (
    add_row,
    figures,
    gates_in_words,
    print_json,
    say,
    short_digest,
    shorten,
    show,
    table,
)
from app.config import Settings
from app.rollout import traffic_in_words

_INPUT_FORMATS = ("jsonl", "csv", "tsv", "parquet")
_OF_SERVERS = {  # settings that mean nothing where nobody connects
    "key",
    "admin_key",
    "host",
    "port",
    "allow_remote",
    "cors_allow_origins",
    "payload_limit_bytes",
    "drain_grace_s",
    "drain_timeout_s",
    "log_format",
}


def add_commands(commands: argparse._SubParsersAction[Any]) -> None:
    _add_predict(commands.add_parser("predict", help="ask about texts, or about all rows of a file"))
    _add_tasks(commands.add_parser("tasks", help="list what a running server can be asked"))


def _add_predict(parser: argparse.ArgumentParser) -> None:
    parser.usage = "manifold predict TEXT … [options]\n       manifold predict --file FILE --out FILE [options]"
    parser.description = "Asks a running server about texts, or about all rows of a file."
    parser.epilog = (
        "With --file the exit status is 3 where some rows have an error, and 1 where the run was stopped: the same "
        "command goes on with it. By its kind, a task has the columns TASK_label and TASK_score, TASK_labels and "
        "TASK_scores, TASK_value, or TASK_spans in the output; and TASK_version. In CSV, lists are JSON."
    )
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="printed with what the tasks say of it")
    parser.add_argument("--pair", metavar="TEXT", help="the second text, for tasks that read pairs")
    parser.add_argument(
        "--task", action="append", metavar="NAME", help="task, task@number or task@challenger; may be repeated"
    )
    parser.add_argument("--unit", help="who the texts are about: keeps to one side of a canary")
    parser.add_argument("--truncate", action="store_true", help="read the beginning of texts that are too long")
    add_client_options(parser)
    _add_file_options(parser)
    parser.set_defaults(run=lambda options: _predict(parser, options))


def _add_file_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("all rows of a file")
    group.add_argument(
        "--file",
        metavar="FILE",
        help="JSON lines, CSV, TSV (also .gz) or Parquet; has text, or text and text_pair",
    )
    group.add_argument(
        "--out", metavar="FILE", help="ends in .parquet, .jsonl or .csv; all columns, predictions, generation, error"
    )
    group.add_argument("--input-format", choices=_INPUT_FORMATS, help="where the name of the file does not say it")
    group.add_argument("--scores", action="store_true", help="TASK_all_scores too: the score of each label")
    group.add_argument("--overwrite", action="store_true", help="begin again, and replace what --out names")
    group.add_argument(
        "--concurrency", type=_positive, default=16, metavar="N", help="requests in flight at most; default %(default)s"
    )
    group.add_argument(
        "--patience",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds that a server which does not answer is waited for; default %(default)g",
    )
    group.add_argument(
        "--in-process",
        action="store_true",
        help="load the engine here instead of asking a server; takes the options of `manifold serve` (--model, "
        "--device, --home, …)",
    )
    add_setting_options(parser, [name for name in Settings.model_fields if name not in _OF_SERVERS], is_hidden=True)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'"{text}" is no number from 1 on')
    return int(text)


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", nargs="?", help="show the versions of this one")
    parser.add_argument("--limit", type=int, default=100, metavar="N", help="of the versions; default %(default)s")
    add_client_options(parser)
    parser.set_defaults(run=_tasks)


def _predict(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    if options.file is not None:
        if options.texts or options.pair is not None:
            parser.error("--file has the texts: leave TEXT and --pair out")
        from app.client.bulk import predict_file

        return predict_file(options)
    if not options.texts:
        parser.error("there is nothing to ask about: give a text, or --file")
    if options.out is not None or options.in_process:
        parser.error("--out and --in-process go with --file")
    return _predict_texts(options)


def _predict_texts(options: argparse.Namespace) -> int:
    pair = {} if options.pair is None else {"text_pair": options.pair}
    body = {"inputs": [{"text": text, **pair} for text in options.texts], "truncate": options.truncate}
    if options.task:
        body["tasks"] = options.task
    if options.unit is not None:
        body["unit"] = options.unit
    answer = Server.of(options).ask("POST", "/v1/predict", body)
    return print_json(answer) if options.json else _print_prediction(options.texts, answer)


def _tasks(options: argparse.Namespace) -> int:
    server = Server.of(options)
    if options.task is None:
        answer = server.ask("GET", "/v1/tasks")
        return print_json(answer) if options.json else _print_tasks(answer)
    answer = server.ask("GET", task_path(options.task), parameters={"limit": options.limit})
    return print_json(answer) if options.json else _print_versions(answer)


def _print_prediction(texts: Sequence[str], answer: Mapping[str, Any]) -> int:
    shown = table("text", "task", "version", "arm", "answer", "score")
    for text, results in zip(texts, answer["results"], strict=True):
        first = shorten(text)
        for reference, result in results.items():
            said, score = _said(result)
            add_row(shown, first, reference, str(result["version"]), result.get("arm", ""), said, score)
            first = ""
        shown.add_section()
    show(shown)
    usage, model = answer["usage"], answer["model"]
    say(f"{model}, {usage['tokens']} tokens, {usage['rows']} rows, {usage['passes']:g} passes", "dim")
    say(f"generation {answer['generation']}, request {answer['request_id']}", "dim")
    return 0


def _said(result: Mapping[str, Any]) -> tuple[str, str]:
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
        scores = ", ".join(f"{span['score']:.3f}" for span in spans)
        return "; ".join(f"{span['label']}: {span['text']}" for span in spans) or "(none)", scores
    return f"{result['value']:g}", ""


def _print_tasks(answer: Mapping[str, Any]) -> int:
    shown = table("task", "kind", "reads", "labels", "live", "versions", "passes")
    for task in answer["tasks"]:
        kind = task["problem_type"].replace("_classification", "").replace("_", " ")
        labels = shorten(f"{len(task['labels'])}: {', '.join(task['labels'])}")
        live, versions = traffic_in_words(task["traffic"]), str(len(task["versions"]))
        add_row(shown, task["name"], kind, task["input_kind"], labels, live, versions, f"{task['passes']:g}")
    show(shown)
    say(f"embeddings: {', '.join(answer['representations'])}", "dim")
    return 0


def _print_versions(answer: Mapping[str, Any]) -> int:
    shown = table("version", "state", "live as", "reads", "passes", "evaluation", "by", "digest")
    for version in answer["details"]:
        evaluation = version["evaluation"]
        measured = {"test": evaluation["test"]} if "test" in evaluation else evaluation
        people = dict.fromkeys(name for name in (version["published_by"], version["decided_by"]) if name)
        add_row(
            shown,
            str(version["version"]),
            version["state"],
            version["arm"] or "",
            ", ".join(_reads(version)),
            f"{version['passes']:g}",
            ", ".join(figures(measured)),
            ", ".join(people),
            short_digest(version["digest"]),
        )
    show(shown)
    _print_live(answer)
    return 0


def _reads(version: Mapping[str, Any]) -> Iterator[str]:
    readout = version["readout"]
    members = f", {count} averaged" if (count := readout.get("num_members", 1)) > 1 else ""
    yield f"{readout['kind']} of {','.join(map(str, readout['layers']))}{members}"
    for prefix in version["prefixes"]:
        yield f"{prefix['num_virtual_tokens']} tokens from layer {prefix['first_layer']}"


def _print_live(answer: Mapping[str, Any]) -> None:
    traffic = answer["traffic"]
    say(f"{traffic_in_words(traffic)} (generation {answer['generation']})")
    if traffic and traffic["gates"]:
        say(f"gates: {gates_in_words(traffic['gates'])}")
    if answer["previous"]:
        say(f"champions before, newest last: {', '.join(map(str, answer['previous']))}", "dim")
    for name, reason in answer["failures"].items():
        say(f"{name} cannot be served here: {reason}")
