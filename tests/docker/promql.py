"""Takes the names of metrics and labels out of a PromQL expression. No parser: promtool is asked whether it is one."""

from __future__ import annotations

import re
from dataclasses import dataclass

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"' + r"|'(?:[^'\\]|\\.)*'")
_MATCHERS = re.compile(r"\{([^}]*)\}")
_LABEL = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")
_RANGE = re.compile(r"\[[^\]]*\]")
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_NAME = re.compile(r"(?<![\w:.$])[A-Za-z_:][\w:]*(?!\s*\()(?![\w:])")
_WORDS = {"and", "or", "unless", "offset", "bool", "by", "without", "on", "ignoring", "group_left", "group_right"}


@dataclass(frozen=True)
class Names:
    metrics: frozenset[str]
    labels: frozenset[str]


def names(expression: str) -> Names:
    rest = _STRING.sub('""', expression)
    labels = {label for block in _MATCHERS.findall(rest) for label in _LABEL.findall(block)}
    rest = _RANGE.sub("", _MATCHERS.sub("", rest))
    labels |= {label.strip() for group in _GROUPING.findall(rest) for label in group.split(",") if label.strip()}
    rest = _GROUPING.sub(" ", rest)
    return Names(frozenset(_NAME.findall(rest)) - _WORDS, frozenset(labels))
