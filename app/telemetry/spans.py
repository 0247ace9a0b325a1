"""Spans, and how they look as OTLP. Knows nothing of what they are of, nor where they go."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2 as otlp

from app.telemetry.tracing import Attribute, Caller

if TYPE_CHECKING:
    from google.protobuf.internal.containers import RepeatedCompositeFieldContainer

_LONGEST_STATE = 512  # characters; of a longer one nothing is kept
_MEMBER = re.compile(r"[a-z0-9][a-z0-9_\-*/@]{0,255}=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{1,256}")
_SAMPLED = 1
_INTEGERS = 1 << 63  # from here on OTLP has none
_KNOWS_IF_REMOTE, _IS_REMOTE = 0x100, 0x200  # whether the parent is in another process
_SCOPE = "manifold"


class Context(NamedTuple):
    """What names a span."""

    trace_id: bytes  # 16
    span_id: bytes  # 8
    state: str = ""
    is_remote: bool = False

    @staticmethod
    def below(parent: Context | None) -> Context:
        """Of a new span within `parent`, or of a new trace."""
        if parent is None:
            return Context(_new_id(16), _new_id(8))
        return Context(parent.trace_id, _new_id(8), parent.state)

    @staticmethod
    def of(caller: Caller) -> Context:
        return Context(bytes.fromhex(caller.trace_id), bytes.fromhex(caller.span_id), _valid(caller.tracestate), True)


def _valid(state: str) -> str:
    """What is no valid state is left out, as W3C asks; members may be empty."""
    if len(state) > _LONGEST_STATE:
        return ""
    members = [member for part in state.split(",") if (member := part.strip(" \t"))]
    return ",".join(members) if all(map(_MEMBER.fullmatch, members)) else ""


def _new_id(size: int) -> bytes:
    """Not all zeros, which would be none."""
    return (random.getrandbits(8 * size) or 1).to_bytes(size, "big")


Stage = tuple[str, float, float]  # its name, and when it began and ended


@dataclass(slots=True, eq=False)
class Span:
    """Moments are on time.monotonic()."""

    name: str
    context: Context
    parent: Context | None = None
    began_s: float = field(default_factory=time.monotonic)
    ended_s: float = 0.0
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    links: Sequence[Context] = ()
    fault: str | None = None  # why it failed, where it did
    is_request: bool = False  # that came from outside
    stages: Sequence[Stage] = ()  # each is sent as a span of its own, below this one

    @property
    def count(self) -> int:
        """As how many spans it is sent."""
        return 1 + len(self.stages)


def encode(spans: Sequence[Span], resource: Mapping[str, str]) -> bytes:
    """An ExportTraceServiceRequest. Spans are filled in place: to make them first takes twice as long."""
    unix_ns = time.time_ns() - time.monotonic_ns()
    request = ExportTraceServiceRequest()
    of = request.resource_spans.add()
    of.resource.attributes.extend([_pair(name, value) for name, value in resource.items()])
    scoped = of.scope_spans.add()
    scoped.scope.name = _SCOPE
    for span in spans:
        _add(scoped.spans, span, unix_ns)
    return bytes(request.SerializeToString())


def _add(spans: RepeatedCompositeFieldContainer[otlp.Span], span: Span, unix_ns: int) -> None:
    """With its stages. `unix_ns`: what time.monotonic() is behind the time since 1970."""

    def add(span_id: bytes, parent: Context | None, stage: Stage) -> otlp.Span:
        name, began_s, ended_s = stage
        added: otlp.Span = spans.add(
            trace_id=span.context.trace_id,
            span_id=span_id,
            parent_span_id=None if parent is None else parent.span_id,
            trace_state=span.context.state,
            name=name,
            kind=otlp.Span.SPAN_KIND_INTERNAL,
            start_time_unix_nano=unix_ns + round(began_s * 1e9),
            end_time_unix_nano=unix_ns + round(ended_s * 1e9),
            flags=_SAMPLED | _flags(parent),
        )
        return added

    made = add(span.context.span_id, span.parent, (span.name, span.began_s, span.ended_s))
    if span.is_request:
        made.kind = otlp.Span.SPAN_KIND_SERVER
    _put(made, span.attributes)
    for link in span.links:
        made.links.add(trace_id=link.trace_id, span_id=link.span_id, trace_state=link.state, flags=_flags(link))
    if span.fault is not None:
        made.status.code, made.status.message = otlp.Status.STATUS_CODE_ERROR, _clean(span.fault)
    for stage in span.stages:
        add(_new_id(8), span.context, stage)


def _flags(other: Context | None) -> int:
    return _KNOWS_IF_REMOTE | (_IS_REMOTE if other is not None and other.is_remote else 0)


def _put(made: otlp.Span, attributes: Mapping[str, Attribute]) -> None:
    """Serialized messages, joined, parse as one with the repeated fields of all: half the work of adding each."""
    made.MergeFromString(b"".join([_attribute(name, value) for name, value in attributes.items()]))


@lru_cache(maxsize=128, typed=True)
def _attribute(name: str, value: Attribute) -> bytes:
    """A span of nothing else, serialized: most of what is said of a request was said of the one before."""
    return bytes(otlp.Span(attributes=[_pair(name, value)]).SerializeToString())


def _pair(name: str, value: Attribute) -> KeyValue:
    pair = KeyValue(key=name)
    _set(pair.value, value)
    return pair


def _set(made: AnyValue, value: Attribute) -> None:
    match value:
        case str():
            made.string_value = _clean(value)
        case bool():  # before int, which it also is
            made.bool_value = value
        case int() if -_INTEGERS <= value < _INTEGERS:
            made.int_value = value
        case int():
            made.string_value = str(value)
        case float():
            made.double_value = value
        case _:
            made.array_value.SetInParent()  # also where it is empty
            for item in value:
                made.array_value.values.add().string_value = _clean(item)


def _clean(text: str) -> str:
    """Half a surrogate pair is nothing that can be sent."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
