"""Traces by OpenTelemetry: spans of requests, of the engine's batches, and of changes such as swaps.

Knows nothing of what happens within them, nor where they go. Settings say what there is to say, never OTEL_* variables.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import (
    Link,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
    format_span_id,
    format_trace_id,
)

from app.telemetry.batch import Batch
from app.telemetry.outlet import Outlet
from app.telemetry.tracing import Attribute, Caller, Description, Trace, Tracing

logger = logging.getLogger(__name__)

_LONGEST_TRACESTATE = 512  # characters; of a longer one nothing is kept
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_SCOPE = InstrumentationScope("manifold")
_new_ids = RandomIdGenerator()


@dataclass(frozen=True, slots=True)
class _Place:
    """What a thread or task is at. Without a context it is a request that is not recorded, and so is what it does."""

    context: SpanContext | None


_place: ContextVar[_Place | None] = ContextVar("manifold_place", default=None)


class Traces(Tracing):
    """Spans are made when their work has ended, from times that are taken anyway.

    They are `ReadableSpan`s of our own making: one from the SDK's tracer takes 60 µs instead of 3, for locks and
    limits that are needed where several write to an open span.
    """

    def __init__(self, outlet: Outlet, sample: float, resource: Mapping[str, str]) -> None:
        """`sample`: the share of requests that is recorded where their callers do not say."""
        self._outlet = outlet
        self._sample = sample
        self._resource = _Source(dict(resource))

    def begin(self, caller: Caller | None) -> Trace:
        is_sampled = random.random() < self._sample if caller is None else caller.is_sampled
        if not is_sampled:
            return _Unrecorded({} if caller is None else {"trace_id": caller.trace_id})
        parent = None if caller is None else _context_of(caller)
        return _Recorded(self, _below(parent), parent)

    def ran(self, report: Batch) -> None:
        contexts = [context for context in report.contexts if isinstance(context, SpanContext)]
        if not contexts:
            return
        attributes = {
            "manifold.requests": len(contexts),
            "manifold.rows": report.rows,
            "manifold.tokens": report.tokens,
            "manifold.passes": report.passes,
        }
        batch = _Span("batch", _below(None), None, report.began_s, report.ended_s, attributes)
        batch.links = [Link(context) for context in contexts]
        collated_s = report.began_s + report.collate_s
        heads_s = max(collated_s, report.ended_s - report.heads_s)
        forward_s = max(collated_s, heads_s - report.forward_s)  # a CUDA device may begin later than it is asked to
        self.send(
            batch,
            batch.part("collate", report.began_s, collated_s),
            batch.part("forward", forward_s, heads_s),
            batch.part("heads", heads_s, report.ended_s),
        )

    @contextmanager
    def change(self, name: str) -> Iterator[dict[str, Attribute]]:
        place = _place.get()
        span = _Span(name, _below(None))
        if place is not None and place.context is not None:
            span.links = [Link(place.context)]
        with self._open(span) as told:
            yield told

    @contextmanager
    def part(self, name: str) -> Iterator[dict[str, Attribute]]:
        place = _place.get()
        if place is not None and place.context is None:
            yield {}
            return
        parent = None if place is None else place.context
        with self._open(_Span(name, _below(parent), parent)) as told:
            yield told

    def close(self) -> None:
        self._outlet.close()

    def send(self, *spans: _Span) -> None:
        unix_ns = time.time_ns() - time.monotonic_ns()
        self._outlet.send([span.readable(self._resource, unix_ns) for span in spans])

    @contextmanager
    def _open(self, span: _Span) -> Iterator[dict[str, Attribute]]:
        before = _place.set(_Place(span.context))
        told: dict[str, Attribute] = {}
        try:
            yield told
        except BaseException as error:
            span.status = Status(StatusCode.ERROR, str(error))
            told["error.type"] = type(error).__name__
            raise
        finally:
            _place.reset(before)
            span.attributes, span.ended_s = told, time.monotonic()
            self.send(span)


class _Source(Resource):
    """Its hash is kept: the encoder asks for it at each span, and the SDK would write JSON each time."""

    def __init__(self, attributes: dict[str, Attribute]) -> None:
        super().__init__(attributes)
        self._hash = super().__hash__()

    def __hash__(self) -> int:
        return self._hash


class _Unrecorded(Trace):
    """A request that nothing is recorded of, nor of what it makes the server do at once."""

    def __init__(self, ids: Mapping[str, str], context: SpanContext | None = None) -> None:
        super().__init__(ids)
        self._before = _place.set(_Place(context))

    def end(self, describe: Callable[[], Description]) -> None:  # noqa: ARG002  # nobody wants to know
        _place.reset(self._before)


class _Recorded(_Unrecorded):
    """A request: its span, and those of the stages that it went through."""

    def __init__(self, traces: Traces, context: SpanContext, parent: SpanContext | None) -> None:
        ids = {"trace_id": format_trace_id(context.trace_id), "span_id": format_span_id(context.span_id)}
        super().__init__(ids, context)
        self._traces = traces
        self._span = _Span("", context, parent)
        self._stages: list[tuple[str, float, float]] = []

    @property
    def context(self) -> object | None:
        return self._span.context

    def staged(self, stage: str, began_s: float, ended_s: float) -> None:
        self._stages.append((stage, began_s, ended_s))

    def end(self, describe: Callable[[], Description]) -> None:
        super().end(describe)
        try:
            self._end(describe())
        except Exception:
            logger.exception("a request could not be traced")

    def _end(self, said: Description) -> None:
        span = self._span
        span.ended_s = time.monotonic()
        span.name, span.attributes, span.kind = said.name, said.attributes, SpanKind.SERVER
        if said.fault is not None:
            span.status = Status(StatusCode.ERROR, said.fault)
        self._traces.send(span, *(span.part(*stage) for stage in self._stages))


@dataclass(slots=True, eq=False)
class _Span:
    """Times are on time.monotonic()."""

    name: str
    context: SpanContext
    parent: SpanContext | None = None
    began_s: float = field(default_factory=time.monotonic)
    ended_s: float = 0.0
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    links: Sequence[Link] = ()
    kind: SpanKind = SpanKind.INTERNAL
    status: Status = Status()

    def part(self, name: str, began_s: float, ended_s: float) -> _Span:
        return _Span(name, _below(self.context), self.context, began_s, ended_s)

    def readable(self, resource: Resource, unix_ns: int) -> ReadableSpan:
        """`unix_ns`: what time.monotonic() is behind the time since 1970."""
        return ReadableSpan(
            self.name,
            self.context,
            self.parent,
            resource,
            self.attributes,
            links=self.links,
            kind=self.kind,
            status=self.status,
            start_time=unix_ns + round(self.began_s * 1e9),
            end_time=unix_ns + round(self.ended_s * 1e9),
            instrumentation_scope=_SCOPE,
        )


def _below(parent: SpanContext | None) -> SpanContext:
    """Of a new span within `parent`, or of a new trace."""
    span_id = _new_ids.generate_span_id()
    if parent is None:
        return SpanContext(_new_ids.generate_trace_id(), span_id, False, _SAMPLED)
    return SpanContext(parent.trace_id, span_id, False, _SAMPLED, parent.trace_state)


def _context_of(caller: Caller) -> SpanContext:
    state = None
    if caller.tracestate and len(caller.tracestate) <= _LONGEST_TRACESTATE:
        state = TraceState.from_header([caller.tracestate])
    return SpanContext(int(caller.trace_id, 16), int(caller.span_id, 16), True, _SAMPLED, state)
