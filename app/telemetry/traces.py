"""Traces in OpenTelemetry's terms: spans of requests, of the engine's batches, and of changes such as swaps.

Knows nothing of what happens within them, nor where they go. Settings say what there is to say, never OTEL_* variables.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from app.telemetry.batch import Batch
from app.telemetry.outlet import Outlet
from app.telemetry.spans import Context, Span, Stage
from app.telemetry.tracing import Attribute, Caller, Description, Trace, Tracing

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Place:
    """What a thread or task is at. Without a context it is a request that is not recorded, and so is what it does."""

    context: Context | None


_place: ContextVar[_Place | None] = ContextVar("manifold_place", default=None)
_UNRECORDED = _Place(None)


class Traces(Tracing):
    """Spans are made when their work has ended, from times that are taken anyway."""

    def __init__(self, outlet: Outlet, sample: float) -> None:
        """`sample`: the share of requests that is recorded where their callers do not say."""
        self._outlet = outlet
        self._sample = sample

    def begin(self, caller: Caller | None) -> Trace:
        is_sampled = random.random() < self._sample if caller is None else caller.is_sampled
        if not is_sampled:
            return _Unrecorded({} if caller is None else {"trace_id": caller.trace_id})
        parent = None if caller is None else Context.of(caller)
        return _Recorded(self._outlet, Context.below(parent), parent)

    def ran(self, report: Batch) -> None:
        contexts = [context for context in report.contexts if isinstance(context, Context)]
        if not contexts:
            return
        attributes = {
            "manifold.requests": len(contexts),
            "manifold.rows": report.rows,
            "manifold.tokens": report.tokens,
            "manifold.passes": report.passes,
        }
        collated_s = report.began_s + report.collate_s
        heads_s = max(collated_s, report.ended_s - report.heads_s)
        forward_s = max(collated_s, heads_s - report.forward_s)  # a CUDA device may begin later than it is asked to
        stages = (
            ("collate", report.began_s, collated_s),
            ("forward", forward_s, heads_s),
            ("heads", heads_s, report.ended_s),
        )
        began_s, ended_s = report.began_s, report.ended_s
        batch = Span("batch", Context.below(None), None, began_s, ended_s, attributes, contexts, stages=stages)
        self._outlet.send(batch)

    @contextmanager
    def change(self, name: str) -> Iterator[dict[str, Attribute]]:
        place = _place.get()
        span = Span(name, Context.below(None))
        if place is not None and place.context is not None:
            span.links = [place.context]
        with self._open(span) as told:
            yield told

    @contextmanager
    def part(self, name: str) -> Iterator[dict[str, Attribute]]:
        place = _place.get()
        if place is not None and place.context is None:
            yield {}
            return
        parent = None if place is None else place.context
        with self._open(Span(name, Context.below(parent), parent)) as told:
            yield told

    def close(self) -> None:
        self._outlet.close()

    @contextmanager
    def _open(self, span: Span) -> Iterator[dict[str, Attribute]]:
        before = _place.set(_Place(span.context))
        told: dict[str, Attribute] = {}
        try:
            yield told
        except BaseException as error:
            span.fault = str(error)
            told["error.type"] = type(error).__name__
            raise
        finally:
            _place.reset(before)
            span.attributes, span.ended_s = told, time.monotonic()
            self._outlet.send(span)


class _Unrecorded(Trace):
    """A request that nothing is recorded of, nor of what it makes the server do at once."""

    def __init__(self, ids: Mapping[str, str], place: _Place = _UNRECORDED) -> None:
        super().__init__(ids)
        self._before = _place.set(place)

    def end(self, describe: Callable[[], Description]) -> None:  # noqa: ARG002  # nobody wants to know
        _place.reset(self._before)


class _Recorded(_Unrecorded):
    """A request: its span, and those of the stages that it went through."""

    def __init__(self, outlet: Outlet, context: Context, parent: Context | None) -> None:
        ids = {"trace_id": context.trace_id.hex(), "span_id": context.span_id.hex()}
        super().__init__(ids, _Place(context))
        self._outlet = outlet
        self._span = Span("", context, parent, is_request=True)
        self._stages: list[Stage] = []

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
        span.name, span.attributes, span.fault = said.name, said.attributes, said.fault
        span.stages = tuple(self._stages)
        self._outlet.send(span)
