"""`manifold compare` and `manifold feedback`: versions side by side, and the truth that tells which was right."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from app.client.http import Server, add_client_options, task_path
from app.client.tables import add_row, percent, print_json, say, show, table

_SHOWN_LABELS = 10  # of many, those whose rates differ most


def add_commands(commands: argparse._SubParsersAction[Any]) -> None:
    compare = commands.add_parser("compare", help="a task's champion beside its challengers and shadows")
    compare.add_argument("task", metavar="TASK")
    add_client_options(compare)
    compare.set_defaults(run=_compare)
    _add_feedback(commands.add_parser("feedback", help="tell what was right for an earlier prediction"))


def _add_feedback(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("request", metavar="REQUEST", help="the request_id of that prediction")
    parser.add_argument("task", metavar="TASK")
    parser.add_argument("--input", type=int, default=0, metavar="N", help="which input of it, from 0; default 0")
    truth = parser.add_mutually_exclusive_group(required=True)
    truth.add_argument("--label", help="the right one")
    truth.add_argument("--labels", metavar="A,B", help='all that are right; "" for none')
    truth.add_argument("--value", type=float, help="of a regression")
    truth.add_argument("--spans", type=_spans, metavar="LABEL:START:END,…", help='in characters; "" for none')
    add_client_options(parser)
    parser.set_defaults(run=_feedback)


def _spans(text: str) -> list[dict[str, Any]]:
    try:
        parts = [part.rsplit(":", 2) for part in text.split(",") if part]
        return [{"label": label, "start": int(start), "end": int(end)} for label, start, end in parts]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f'"{text}" is not spans like city:0:5,city:9:14') from error


def _feedback(options: argparse.Namespace) -> int:
    labels = None if options.labels is None else [part.strip() for part in options.labels.split(",") if part.strip()]
    truth = {"label": options.label, "labels": labels, "value": options.value, "spans": options.spans}
    body = {"request_id": options.request, "task": options.task, "input": options.input}
    body |= {name: said for name, said in truth.items() if said is not None}
    answer = Server.of(options).ask("POST", "/v1/feedback", body)
    if options.json:
        return print_json(answer)
    say("recorded" if answer["recorded"] else "the same was reported before")
    return 0


def _compare(options: argparse.Namespace) -> int:
    answer = Server.of(options).ask("GET", task_path(options.task, "comparison"))
    if options.json:
        return print_json(answer)
    if not answer["pairs"]:
        say(f"champion {answer['champion']} of {answer['task']} is beside no other version")
        say(f"next: manifold canary {answer['task']}@VERSION 10, or manifold shadow {answer['task']}@VERSION", "dim")
    for pair in answer["pairs"]:
        _print_pair(answer, pair)
    return 0


def _print_pair(answer: Mapping[str, Any], pair: Mapping[str, Any]) -> None:
    role = pair["arm"] or "earlier"
    say(f"{answer['task']}: champion {answer['champion']} and {role} {pair['version']}, {pair['count']} texts of both")
    shown = table("", f"champion {answer['champion']}", f"{role} {pair['version']}")
    _add_sides(shown, pair["champion"], pair["other"])
    show(shown)
    for sentence in _findings(pair):
        say(sentence)


def _add_sides(shown: Table, champion: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    sides = (champion, other)
    add_row(shown, "texts scored", *(str(side["texts"]) for side in sides))
    add_row(shown, "failed", *(percent(side["error_rate"]) for side in sides))
    add_row(shown, "mean time when alone", *(_milliseconds(side) for side in sides))
    if any(side["accuracy"] is not None for side in sides):
        add_row(shown, "accuracy", *(f"{percent(side['accuracy'])} of {side['outcomes']}" for side in sides))
    if any(side["mean_absolute_error"] is not None for side in sides):
        add_row(shown, "mean absolute error", *(_number(side["mean_absolute_error"]) for side in sides))
    for label, *rates in _rates(champion["label_rates"], other["label_rates"]):
        add_row(shown, f"gave {label}", *(percent(rate) for rate in rates))


def _rates(champion: Mapping[str, float], other: Mapping[str, float]) -> list[tuple[str, float, float]]:
    both = [(label, champion.get(label, 0.0), other.get(label, 0.0)) for label in sorted({*champion, *other})]
    return sorted(both, key=lambda row: -abs(row[1] - row[2]))[:_SHOWN_LABELS]


def _milliseconds(side: Mapping[str, Any]) -> str:
    mean_ms = side["mean_latency_ms"]
    return "–" if mean_ms is None else f"{mean_ms:.1f} ms over {side['requests']}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _findings(pair: Mapping[str, Any]) -> Iterator[str]:
    if pair["agreement"] is not None:
        yield f"agreement {percent(pair['agreement'])}: they differ on {pair['disagreed']} texts"
    if pair["mean_score_difference"] is not None:
        mean, largest = pair["mean_score_difference"], pair["max_score_difference"]
        yield f"scores differ by {mean:.4f} on average, at most {largest:.4f}"
    if pair["latency_ratio"] is not None:
        yield f"{pair['version']} takes {pair['latency_ratio']:.2f} times the champion's time"
    if (known := pair["outcomes"]) is not None:
        yield (
            f"outcomes of {known['count']} texts: both right {known['both_right']}, only the champion "
            f"{known['only_champion_right']}, only {pair['version']} {known['only_other_right']}, neither "
            f"{known['both_wrong']}; {100 * known['accuracy_gain']:+.1f} points, McNemar p = {known['p_value']:.3g}"
        )
    if (errors := pair["absolute_errors"]) is not None:
        yield (
            f"outcomes of {errors['count']} texts: mean absolute error {errors['champion_mean']:.4g} and "
            f"{errors['other_mean']:.4g}, a gain of {errors['gain']:+.4g}"
        )
