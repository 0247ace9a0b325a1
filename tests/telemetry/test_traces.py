"""Spans as a receiver sees them: parents, links, times, status; and what is not recorded."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import pytest

from app.domain import BatchReport
from app.telemetry import outlet as outlets
from app.telemetry.outlet import Outlet
from app.telemetry.traces import Traces
from app.telemetry.tracing import Attribute, Caller, Description, Trace
from tests.otlp import Receiver, receiving, said

CALLER = Caller("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", True, "rojo=00f0,congo=t61")
DONE = Description("POST /v1/predict", {"http.response.status_code": 200, "manifold.versions": ("spam: 1 champion",)})


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as opened:
        yield opened


@pytest.fixture
def traces(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> Iterator[Traces]:
    monkeypatch.setattr(outlets, "_EVERY_S", 0.02)
    opened = tracing(receiver)
    yield opened
    opened.close()


def tracing(receiver: Receiver, sample: float = 1.0) -> Traces:
    return Traces(Outlet(receiver.endpoint, {"service.name": "tested"}, lambda count: None), sample)


def batch(*requests: Trace) -> BatchReport:
    """It began 10 s ago and took 6 s: collated in 1, forward in 3, heads in 2."""
    began_s = time.monotonic() - 10
    contexts = tuple(trace.context for trace in requests if trace.context is not None)
    return BatchReport(4, 64, 1.0, 3.0, 2.0, {}, 1.5, began_s, began_s + 6, contexts)


def test_a_request_is_its_callers_child_and_the_parent_of_its_stages(traces: Traces, receiver: Receiver) -> None:
    trace = traces.begin(CALLER)
    now_s = time.monotonic()
    trace.staged("tokenize", now_s, now_s + 0.25)
    trace.end(lambda: DONE)
    (request,) = receiver.wait_for("POST /v1/predict")
    assert (request.trace_id.hex(), request.parent_span_id.hex()) == (CALLER.trace_id, CALLER.span_id)
    assert trace.ids == {"trace_id": CALLER.trace_id, "span_id": request.span_id.hex()}
    assert (request.trace_state, request.kind) == (CALLER.tracestate, request.SPAN_KIND_SERVER)
    assert said(request) == {"http.response.status_code": 200, "manifold.versions": ["spam: 1 champion"]}
    assert abs(request.end_time_unix_nano - time.time_ns()) < 60e9
    stage = receiver.below(request)["tokenize"]
    assert stage.trace_id == request.trace_id
    assert stage.end_time_unix_nano - stage.start_time_unix_nano == pytest.approx(0.25e9, abs=1e3)


@pytest.mark.parametrize(
    "tracestate", ["", "not a state", "a=" + "b" * 600, "a=1,b", "a=1\n", ",", "a=b ," * 100 + "!"]
)
def test_a_state_that_is_not_valid_is_left_out(traces: Traces, receiver: Receiver, tracestate: str) -> None:
    traces.begin(Caller(CALLER.trace_id, CALLER.span_id, True, tracestate)).end(lambda: DONE)
    (request,) = receiver.wait_for("POST /v1/predict")
    assert (request.trace_id.hex(), request.trace_state) == (CALLER.trace_id, "")


def test_a_caller_is_in_another_process_and_what_it_makes_us_do_is_not(traces: Traces, receiver: Receiver) -> None:
    trace = traces.begin(CALLER)
    trace.staged("tokenize", 1.0, 2.0)
    trace.end(lambda: DONE)
    (request,) = receiver.wait_for("POST /v1/predict")
    stage = receiver.below(request)["tokenize"]
    assert [span.flags & bit for span in (request, stage) for bit in (0x100, 0x200)] == [
        *(0x100, 0x200),
        *(0x100, 0),
    ]


def test_what_is_said_of_a_request_keeps_its_kind(traces: Traces, receiver: Receiver) -> None:
    """Also where it equals what was said before it, as 1 does."""
    told: list[tuple[Attribute, object]] = [(value, value) for value in ("text", True, 1, 1.0, 0, False, 0.5)]
    told += [("\udc80 half", "? half"), (("a", "b"), ["a", "b"]), ((), [])]
    for value, _ in told:
        traces.begin(None).end(partial(Description, "one", {"it": value}))
    found = [said(request)["it"] for request in receiver.wait_for("one", len(told))]
    assert [(type(one), one) for one in found] == [(type(one), one) for _, one in told]


def test_empty_members_of_a_state_are_passed_over(traces: Traces, receiver: Receiver) -> None:
    traces.begin(Caller(CALLER.trace_id, CALLER.span_id, True, "a=1,, b=2 ,")).end(lambda: DONE)
    (request,) = receiver.wait_for("POST /v1/predict")
    assert request.trace_state == "a=1,b=2"


def test_a_fault_of_ours_is_the_spans_status(traces: Traces, receiver: Receiver) -> None:
    traces.begin(None).end(lambda: Description("POST /v1/predict", {}, "the engine died"))
    (request,) = receiver.wait_for("POST /v1/predict")
    assert (request.status.code, request.status.message) == (request.status.STATUS_CODE_ERROR, "the engine died")
    assert request.parent_span_id == b""


def test_a_batch_names_the_requests_in_it(traces: Traces, receiver: Receiver) -> None:
    unsampled = traces.begin(Caller(CALLER.trace_id, CALLER.span_id, False))
    requests = [traces.begin(CALLER), traces.begin(None)]
    traces.ran(batch(*requests, unsampled))
    for trace in reversed(requests):
        trace.end(lambda: DONE)
    unsampled.end(lambda: DONE)
    sent = {span.span_id: span.trace_id for span in receiver.wait_for("POST /v1/predict", 2)}
    (found,) = receiver.wait_for("batch")
    assert {link.span_id: link.trace_id for link in found.links} == sent
    assert found.trace_id not in sent.values() and found.parent_span_id == b""
    assert said(found) == {
        "manifold.requests": 2,
        "manifold.rows": 4,
        "manifold.tokens": 64,
        "manifold.passes": 1.5,
    }


def test_the_stages_of_a_batch_follow_each_other(traces: Traces, receiver: Receiver) -> None:
    trace = traces.begin(None)
    traces.ran(batch(trace))
    trace.end(lambda: DONE)
    (whole,) = receiver.wait_for("batch")
    stages = receiver.below(whole)
    ordered = [stages[name] for name in ("collate", "forward", "heads")]
    bounds = [(stage.start_time_unix_nano, stage.end_time_unix_nano) for stage in ordered]
    begin = whole.start_time_unix_nano
    seconds = [(round((start - begin) / 1e9, 3), round((end - begin) / 1e9, 3)) for start, end in bounds]
    assert seconds == [(0, 1), (1, 4), (4, 6)]


def test_what_is_not_sampled_is_not_sent_nor_what_it_makes_the_server_do(traces: Traces, receiver: Receiver) -> None:
    trace = traces.begin(Caller(CALLER.trace_id, CALLER.span_id, False))
    assert trace.ids == {"trace_id": CALLER.trace_id} and trace.context is None
    with traces.part("load"):
        pass
    traces.ran(batch(trace))
    trace.end(lambda: DONE)
    traces.begin(None).end(lambda: Description("the next", {}))
    receiver.wait_for("the next")
    traces.close()
    assert [span.name for span in receiver.spans] == ["the next"]


def test_without_a_caller_the_share_decides(receiver: Receiver) -> None:
    for sample, is_recorded in ((0.0, False), (1.0, True)):
        opened = tracing(receiver, sample)
        for _ in range(20):
            trace = opened.begin(None)
            assert (trace.context is not None) == is_recorded
            trace.end(lambda: DONE)
        trace = opened.begin(CALLER)
        assert trace.context is not None
        trace.end(lambda: DONE)
        opened.close()


def test_a_change_is_recorded_whoever_asked_for_it(traces: Traces, receiver: Receiver) -> None:
    asked = traces.begin(CALLER)
    with traces.change("swap") as told:
        told["manifold.generation"] = 7
        with traces.part("version"), traces.part("fetch"):
            pass
    with traces.part("load"):
        pass
    asked.end(lambda: DONE)
    unsampled = traces.begin(Caller(CALLER.trace_id, CALLER.span_id, False))
    with traces.change("swap"):
        pass
    unsampled.end(lambda: DONE)

    first, second = receiver.wait_for("swap", 2)
    (request,) = receiver.wait_for("POST /v1/predict")
    assert [link.span_id for link in first.links] == [request.span_id] and not second.links
    assert first.trace_id != request.trace_id and said(first) == {"manifold.generation": 7}
    assert set(receiver.below(receiver.below(first)["version"])) == {"fetch"}
    assert set(receiver.below(request)) == {"load"}


def test_what_fails_says_so_and_raises_all_the_same(traces: Traces, receiver: Receiver) -> None:
    with pytest.raises(ValueError, match="broken"), traces.change("swap"), traces.part("fetch"):
        raise ValueError("broken")
    with traces.part("later"):
        pass
    spans = {span.name: span for span in (*receiver.wait_for("swap"), *receiver.wait_for("later"))}
    for span in (spans["swap"], receiver.below(spans["swap"])["fetch"]):
        assert (span.status.code, span.status.message) == (span.status.STATUS_CODE_ERROR, "broken")
        assert said(span)["error.type"] == "ValueError"
    assert spans["later"].parent_span_id == b""  # what failed is left behind


def test_a_description_that_breaks_costs_its_span_alone(traces: Traces, caplog: pytest.LogCaptureFixture) -> None:
    def describe() -> Description:
        raise KeyError("a bug")

    traces.begin(None).end(describe)
    assert "a request could not be traced" in caplog.text
