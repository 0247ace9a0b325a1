"""What operators do to versions and to one task's traffic, a command each.

`promote`, `canary` and `shadow` read the traffic, change what they say and nothing else, and name the generation that
they read: where somebody else was faster, the server refuses.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.client.http import Server, add_client_options, task_path
from app.client.publish import tell_next
from app.client.tables import gates_in_words, print_json, say
from app.errors import MalformedError, NotFoundError
from app.rollout import traffic_in_words

Wish = dict[str, Any]  # one task's traffic as the server reads and shows it

_DECISIONS = {
    "approve": "a candidate may go live",
    "reject": "a candidate will not go live",
    "retire": "an approved version will not go live again",
}
GATES = {
    "max_disagreement": ("SHARE", float, "of texts on which it may differ from the champion"),
    "max_error_rate": ("SHARE", float, "of its answers that may fail"),
    "max_latency_ratio": ("X", float, "what its mean time may be of the champion's"),
    "min_accuracy_gain": ("SHARE", float, "how much better it must be, by what feedback told"),
    "min_count": ("N", int, "texts or answers before a gate is looked at; default 100"),
}


@dataclass(frozen=True, slots=True)
class Reference:
    task: str
    version: int

    def __str__(self) -> str:
        return f"{self.task}@{self.version}"


def reference(text: str) -> Reference:
    task, _, number = text.rpartition("@")
    if not task or not (number.isascii() and number.isdecimal() and len(number) < 10 and int(number)):
        raise argparse.ArgumentTypeError(f'"{text}" is not a version like spam@3')
    return Reference(task, int(number))


def add_commands(commands: argparse._SubParsersAction[Any]) -> None:
    for name, told in _DECISIONS.items():
        _add_version(commands.add_parser(name, help=told)).set_defaults(run=_decide, decision=name)
    _add_version(commands.add_parser("promote", help="make a version the champion")).set_defaults(run=_promote)
    canary = _add_version(commands.add_parser("canary", help="let a version answer a share of the units; 0 ends it"))
    canary.add_argument("percent", type=float, metavar="PERCENT", help="of units, in steps of 0.01")
    _add_gates(canary)
    canary.set_defaults(run=_canary)
    shadow = _add_version(commands.add_parser("shadow", help="score a version beside the answers, unseen"))
    shadow.add_argument("--off", action="store_true", help="do so no longer")
    shadow.set_defaults(run=_shadow)
    _add_rollback(commands.add_parser("rollback", help="make the champion before this one answer again"))


def _add_version(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("version", type=reference, metavar="TASK@VERSION")
    _add_common(parser)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reason", default="", help="for the audit log")
    add_client_options(parser)


def _add_gates(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("gates", "Past one of these the champion takes over by itself.")
    for name, (metavar, kind, told) in GATES.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=told)
    group.add_argument("--no-gates", action="store_true", help="take away those that are there")


def _add_rollback(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", metavar="TASK")
    parser.add_argument("--if-match", type=int, metavar="GENERATION", help="only if the index is still at this one")
    _add_common(parser)
    parser.set_defaults(run=_rollback)


# -- versions ----------------------------------------------------------------------------------------------------------


def _decide(options: argparse.Namespace) -> int:
    path = task_path(options.version.task, "versions", options.version.version, options.decision)
    answer = Server.of(options).ask("POST", path, {"reason": options.reason})
    if options.json:
        return print_json(answer)
    say(f"{options.version} is {answer['state']} (generation {answer['generation']})")
    tell_next(str(options.version), answer["state"])
    return 0


# -- traffic -----------------------------------------------------------------------------------------------------------


def _promote(options: argparse.Namespace) -> int:
    server = Server.of(options)
    view = server.ask("GET", task_path(options.version.task))
    return _set(server, options, view, promoted(view["traffic"], options.version.version))


def _canary(options: argparse.Namespace) -> int:
    server = Server.of(options)
    view = server.ask("GET", task_path(options.version.task))
    asked = {name: value for name in GATES if (value := getattr(options, name)) is not None}
    gates = None if options.no_gates else {**(_live(view)["gates"] or {}), **asked}
    return _set(server, options, view, with_canary(_live(view), options.version, options.percent, gates))


def _shadow(options: argparse.Namespace) -> int:
    server = Server.of(options)
    view = server.ask("GET", task_path(options.version.task))
    return _set(server, options, view, with_shadow(_live(view), options.version, options.off))


def _rollback(options: argparse.Namespace) -> int:
    path = task_path(options.task, "rollback")
    answer = Server.of(options).ask("POST", path, {"reason": options.reason}, if_match=options.if_match)
    return _tell(options, answer)


def promoted(traffic: Wish | None, version: int) -> Wish:
    """The version answers; its own canary or shadow has ended, those of others go on."""
    if traffic is None:
        return {"champion": version}
    challengers = [c for c in traffic["challengers"] if c["version"] != version]
    return {
        "champion": version,
        "challengers": challengers,
        "shadow": [other for other in traffic["shadow"] if other != version],
        "gates": traffic["gates"] if challengers else None,
    }


def with_canary(traffic: Wish, version: Reference, percent: float, gates: Mapping[str, Any] | None) -> Wish:
    """Raises NotFoundError where there is no canary to end."""
    before = [c["version"] for c in traffic["challengers"]]
    if percent == 0 and version.version not in before:
        raise NotFoundError(f"{version} is no challenger: there is no canary to end")
    shares = {c["version"]: c["percent"] for c in traffic["challengers"]} | {version.version: percent}
    challengers = [{"version": number, "percent": share} for number, share in shares.items() if share != 0]
    return {
        "champion": traffic["champion"],
        "challengers": challengers,
        "shadow": [other for other in traffic["shadow"] if other != version.version],
        "gates": (gates or None) if challengers else None,
    }


def with_shadow(traffic: Wish, version: Reference, is_off: bool) -> Wish:
    """Raises NotFoundError where there is no shadow to take away."""
    if is_off and version.version not in traffic["shadow"]:
        raise NotFoundError(f"{version} is no shadow: there is nothing to take away")
    others = [other for other in traffic["shadow"] if other != version.version]
    return {**traffic, "shadow": others if is_off else [*others, version.version]}


def _live(view: Mapping[str, Any]) -> Wish:
    """Raises MalformedError where the task has no champion."""
    traffic: Wish | None = view["traffic"]
    if traffic is None:
        raise MalformedError(f"no version of task {view['name']} is live yet: promote one first")
    return traffic


def _set(server: Server, options: argparse.Namespace, view: Mapping[str, Any], wish: Wish) -> int:
    path, body = task_path(view["name"], "traffic"), {**wish, "reason": options.reason}
    return _tell(options, server.ask("PUT", path, body, if_match=view["generation"]))


def _tell(options: argparse.Namespace, answer: Mapping[str, Any]) -> int:
    if options.json:
        return print_json(answer)
    say(f"{answer['task']}: {traffic_in_words(answer['traffic'])} (generation {answer['generation']})")
    if answer["traffic"]["gates"]:
        say(f"gates: {gates_in_words(answer['traffic']['gates'])}")
    return 0
