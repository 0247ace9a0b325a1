"""`manifold predict` and `manifold tasks`: what a running server answers, and what it can be asked."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from app.client.http import Server, add_client_options, task_path
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
    traffic_in_words,
)


def add_commands(commands: argparse._SubParsersAction[Any]) -> None:
    _add_predict(commands.add_parser("predict", help="ask a running server about texts"))
    _add_tasks(commands.add_parser("tasks", help="list what a running server can be asked"))


def _add_predict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("texts", nargs="+", metavar="TEXT")
    parser.add_argument("--pair", metavar="TEXT", help="the second text, for tasks that read pairs")
    parser.add_argument(
        "--task", action="append", metavar="NAME", help="task, task@number or task@challenger; may be repeated"
    )
    parser.add_argument("--unit", help="who the texts are about: keeps to one side of a canary")
    parser.add_argument("--truncate", action="store_true", help="read the beginning of texts that are too long")
    add_client_options(parser)
    parser.set_defaults(run=_predict)


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", nargs="?", help="show the versions of this one")
    parser.add_argument("--limit", type=int, default=100, metavar="N", help="of the versions; default %(default)s")
    add_client_options(parser)
    parser.set_defaults(run=_tasks)


def _predict(options: argparse.Namespace) -> int:
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
    yield f"{version['readout']['kind']} of {','.join(map(str, version['readout']['layers']))}"
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
