"""Takes the names of metrics and labels out of a PromQL expression, and makes one that asks for all that it names.

No parser: promtool is asked whether it is one.
"""

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
_SELECTOR = r"""\{(?:[^}"]|"(?:[^"\\]|\\.)*")*\}"""
_FILTERS = re.compile(
    rf"{_STRING.pattern}|{_SELECTOR}|{_RANGE.pattern}"  # as they are
    r"|(?P<compares>(?:==|!=|>=|<=|>|<)(?!\s*bool\b))|\b(?P<either>or|unless)\b|(?P<absent>\babsent\s*\()"
)


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


def demanding(expression: str) -> str:
    """Has data only where every part of the expression has, and the parts fit each other label by label.

    Comparisons tell 0 or 1 instead of leaving out (`bool`), what may be one or the other must be both (`or`, `unless`
    → `and`), and what must be absent must be there. So an alert that is rightly silent, and a panel that falls back to
    an empty line, still show whether what they ask for exists.
    """
    return _FILTERS.sub(_demanding, expression)


def _demanding(found: re.Match[str]) -> str:
    if found["compares"]:
        return f"{found[0]} bool"
    if found["either"]:
        return "and"
    return "(" if found["absent"] else found[0]
