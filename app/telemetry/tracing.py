"""What those who work at a request know of its trace. What stands here records nothing; `traces` has what does.

Knows the header `traceparent`, and nothing of OpenTelemetry.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from app.telemetry.batch import Batch

Attribute = str | int | float | bool | tuple[str, ...]

_TRACEPARENT = re.compile(
    r"(?!ff)(?P<version>[0-9a-f]{2})-(?!0{32})(?P<trace>[0-9a-f]{32})-(?!0{16})(?P<span>[0-9a-f]{16})"
    r"-(?P<flags>[0-9a-f]{2})(?P<more>-.*)?"
)
_SAMPLED = 1


@dataclass(frozen=True, slots=True)
class Caller:
    """The span that a request comes from, as W3C's trace context says."""

    trace_id: str  # 32 hexadecimal digits
    span_id: str  # 16
    is_sampled: bool
    tracestate: str = ""


def parse_caller(traceparent: str, tracestate: str = "") -> Caller | None:
    """None where it is not valid: the request is treated as if it came without."""
    found = _TRACEPARENT.fullmatch(traceparent.strip(" \t"))
    if found is None or (found["version"] == "00" and found["more"]):  # later versions may say more
        return None
    return Caller(found["trace"], found["span"], bool(int(found["flags"], 16) & _SAMPLED), tracestate)


@dataclass(frozen=True, slots=True)
class Description:
    """What is said of a request once it has ended."""

    name: str  # of its span; there are only so many
    attributes: Mapping[str, Attribute]
    fault: str | None = None  # one sentence, where the request failed and it is ours


@dataclass(slots=True, eq=False)
class Trace:
    """One request's part of a trace that is not recorded here."""

    ids: Mapping[str, str] = field(default_factory=dict)  # what stands in its log lines

    @property
    def context(self) -> object | None:
        """What goes through the engine, so that a batch can name its requests. None where nothing is recorded."""
        return None

    def staged(self, stage: str, began_s: float, ended_s: float) -> None:
        """A part of the request's time, on time.monotonic(). From any thread."""

    def end(self, describe: Callable[[], Description]) -> None:
        """The answer is sent. Never fails; `describe` is called where somebody wants to know."""


UNTRACED = Trace()


class Tracing:
    """Records nothing. Whoever does says the same to those who call it, from any thread."""

    def begin(self, caller: Caller | None) -> Trace:
        """A request has come. It ends in the same task or thread."""
        return UNTRACED if caller is None else Trace({"trace_id": caller.trace_id})

    def ran(self, report: Batch) -> None:
        """A batch of the engine."""

    def change(self, name: str) -> AbstractContextManager[dict[str, Attribute]]:
        """Work of the server's own, such as a swap: it is recorded whoever asked for it.

        What is there to be said of it is put into the dictionary.
        """
        return nullcontext({})

    def part(self, name: str) -> AbstractContextManager[dict[str, Attribute]]:
        """The same within the change or the request that this thread is at."""
        return nullcontext({})

    def close(self) -> None:
        """Sends what is left, for a bounded time."""


NOT_TRACING = Tracing()
