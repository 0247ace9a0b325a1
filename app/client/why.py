"""`manifold why`: what answered a request, with the versions behind it, and who let them answer."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from app.client.http import Server, add_client_options
from app.client.tables import add_row, print_json, say, shorten, show, table, when
from app.domain import TextInput
from app.rollout import traffic_in_words

_SHOWN_SCORES = 3
_ANOTHER_TEXT = 1
_DONE = {
    "publish": "published", "approve": "approved", "reject": "rejected", "retire": "retired",
    "create": "approved at the first start", "restore": "restored",
}  # fmt: skip


def add_commands(commands: argparse._SubParsersAction[Any]) -> None:
    parser = commands.add_parser("why", help="what answered a request, and who approved it")
    parser.add_argument("request", metavar="REQUEST", help="the request_id of that prediction")
    parser.add_argument("--since", type=_moment, metavar="TIME", help="not answered before, such as 2026-11-05T12:00")
    parser.add_argument("--until", type=_moment, metavar="TIME", help="not answered after; both in UTC")
    parser.add_argument("--text", help="check that this is a text that was answered; status 1 where it is not")
    parser.add_argument("--pair", metavar="TEXT", help="its second text, where it was a pair")
    add_client_options(parser)
    parser.set_defaults(run=lambda options: _why(parser, options))


def _moment(text: str) -> float:
    try:
        return float(text) if text.replace(".", "", 1).isdecimal() else _from_iso(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f'"{text}" is no time like 2026-11-05 or 2026-11-05T12:00') from error


def _from_iso(text: str) -> float:
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()


def _why(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    if options.pair is not None and options.text is None:
        parser.error("--pair goes with --text")
    if not options.request:
        parser.error("REQUEST is empty: give the request_id of an answer")
    times = {"since": options.since, "until": options.until}
    parameters = {name: repr(seconds) for name, seconds in times.items() if seconds is not None}
    named = quote(options.request, safe="", errors="replace").replace(".", "%2E")  # ".." would lead out of the path
    path = f"/v1/predictions/{named}"
    answer = Server.of(options).ask("GET", path, parameters=parameters)
    status = 0
    if options.text is not None:
        sha256 = TextInput(options.text, options.pair).sha256
        status = 0 if any(row.get("text_sha256") == sha256 for row in answer["rows"]) else _ANOTHER_TEXT
    if options.json:
        print_json(answer)
        return status
    _print(answer)
    if options.text is not None:
        say("the text is one that was answered" if status == 0 else "the text is NOT one that was answered", "bold")
    return status


def _print(answer: Mapping[str, Any]) -> None:
    by_time: dict[tuple[str, int, str | None], list[Mapping[str, Any]]] = {}
    for row in answer["rows"]:
        by_time.setdefault((row["time"], row["generation"], row.get("actor")), []).append(row)
    for (time, generation, actor), rows in by_time.items():
        asked = f", asked by {actor}" if actor is not None else ""  # rows of earlier releases do not say it
        say(f"request {answer['request_id']}{asked}, answered {time}, generation {generation}", "bold")
        _print_rows(rows, answer["versions"])
    for version in answer["versions"]:
        say("")
        _print_version(version, [traffic for traffic in answer["traffic"] if traffic["task"] == version["task"]])
    for gap in answer["gaps"]:
        say(f"not told: {gap}", "dim")


def _print_rows(rows: Sequence[Mapping[str, Any]], versions: Sequence[Mapping[str, Any]]) -> None:
    for row in {row["input"]: row for row in rows}.values():
        text = " | ".join(shorten(row[name]) for name in ("text", "text_pair") if name in row)
        cut = ", cut to the limit" if row.get("truncated") else ""
        say(f"input {row['input']}: {text or 'text not kept'}, {row['tokens']} tokens{cut}")
        say(f"  sha256 {row['text_sha256']}", "dim")
    thresholds = {(v["task"], v["version"], v["digest"]): v["thresholds"] for v in versions}
    shown = table("input", "asked for", "version", "arm", "answer", "highest scores")
    for row in rows:
        bounds = thresholds.get((row["task"], row["version"], row["digest"]), {})
        cells = (str(row["input"]), row["reference"], str(row["version"]), row["arm"], _answer(row))
        add_row(shown, *cells, ", ".join(_scores(row.get("scores", {}), bounds)))
    show(shown)
    cached = sum(bool(row.get("cached")) for row in rows)
    known = f", {cached} of {len(rows)} answers from the cache" if cached else ""
    say(f"{rows[0]['request_passes']:g} passes, {rows[0]['inference_ms']:g} ms{known}", "dim")


def _answer(row: Mapping[str, Any]) -> str:
    if "error" in row:
        return f"failed: {row['error']}"
    if "spans" in row:
        spans = (f"{s['label']} {s['start']}:{s['end']} {s['score']:.3f}" for s in row["spans"])
        return ", ".join(spans) or "none"
    if "labels" in row:
        return ", ".join(row["labels"]) or "none"
    return str(row["label"]) if "label" in row else f"{row['value']:g}"


def _scores(scores: Mapping[str, float], bounds: Mapping[str, float]) -> Iterator[str]:
    """The best, with the threshold where there is one."""
    for label in sorted(scores, key=lambda label: -scores[label])[:_SHOWN_SCORES]:
        bound = f" (from {bounds[label]:g} on)" if label in bounds else ""
        yield f"{label} {scores[label]:.3f}{bound}"


def _print_version(version: Mapping[str, Any], traffic: Sequence[Mapping[str, Any]]) -> None:
    say(f"{version['task']}@{version['version']} is {version['state'] or 'not in the index'}", "bold")
    say(f"  {version['digest']}", "dim")
    deeds = [version["published"], *version["decisions"]]
    for deed in {deed["sequence"]: deed for deed in deeds if deed is not None}.values():
        say(f"  {_deed(_DONE.get(deed['action'], deed['action']), deed)}")
    for then in traffic:
        if then["traffic"] is not None:
            say(f"  in generation {then['generation']}: {traffic_in_words(then['traffic'])}")
            say(f"    {_deed('put', then['put'])}")


def _deed(done: str, deed: Mapping[str, Any]) -> str:
    why = f": {deed['reason']}" if deed["reason"] else ""
    return f"{done} by {deed['actor']}, {when(deed['at'])}, generation {deed['generation']}{why}"
