"""From pydantic's findings to one sentence and its status. Knows how the wire schemas name things."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_SENTENCES = {  # pydantic's words are for Python people; these are for callers
    "string_type": "must be a text",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "missing": "is missing",
    "extra_forbidden": "is not a field of this request",
    "model_attributes_type": "must be an object",
    "model_type": "must be an object",
    "dict_type": "must be an object",
    "string_unicode": "holds a lone surrogate, which is not text",
}
_MALFORMED = {"json_invalid", "string_unicode"}


def describe_faults(faults: Sequence[Mapping[str, Any]], content_type: str) -> tuple[int, str]:
    """(status, sentence): 400 where there is no JSON to speak of, 422 where it is not what was asked for."""
    fault = faults[0]
    if fault["type"] == "json_invalid":
        return 400, f"the body is not valid JSON: {fault['ctx']['error']}"
    if fault["loc"] == ("body",) and "json" not in content_type:
        return 400, "the body must be JSON, with the header content-type: application/json"
    if fault["loc"] == ("body",) and fault["type"] == "missing":
        return 400, "the body is empty: send a JSON object"
    more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
    return (400 if fault["type"] in _MALFORMED else 422), _sentence(fault) + more


def _sentence(fault: Mapping[str, Any]) -> str:
    where = _path(fault["loc"]) or "the body"
    message = _SENTENCES.get(fault["type"])
    if message is None:
        message = (
            str(fault["msg"])
            .replace("Input should be", "must be")
            .replace("String should", "must")
            .replace("List should", "must")
        )
    return f"{where} {message}"


def _path(location: Sequence[str | int]) -> str:
    """("body", "inputs", "<list>", 3, "text") → inputs[3].text; the tags of unions, in <>, are ours alone."""
    path = ""
    for part in location[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith("<"):
            path += f".{part[:100]}" if path else part[:100]
    return path
