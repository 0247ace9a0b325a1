"""What becomes of spans where the receiver takes them, refuses, falls silent or is gone."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from app.telemetry import outlet as outlets
from app.telemetry.outlet import Outlet, signal_url
from app.telemetry.spans import Context, Span
from tests.otlp import Receiver, receiving
from tests.serving import wait_for


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as opened:
        yield opened


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlets, "_EVERY_S", 0.02)
    monkeypatch.setattr(outlets, "_WAITS_S", (0.01, 0.01))
    monkeypatch.setattr(outlets, "_FLUSH_S", 0.5)


RESOURCE = {"service.name": "tested"}


def spans(name: str, *stages: str) -> Span:
    return Span(name, Context.below(None), None, 1.0, 2.0, stages=[(stage, 1.0, 2.0) for stage in stages])


def test_an_endpoint_is_for_all_signals_or_names_this_one() -> None:
    for endpoint in ("http://c:4318", "http://c:4318/", "http://c:4318/v1/traces"):
        assert signal_url(endpoint) == "http://c:4318/v1/traces"
    assert signal_url("https://c/otlp/") == "https://c/otlp/v1/traces"


def test_spans_arrive_and_nothing_of_the_environment_meddles(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "OTEL_SDK_DISABLED": "true",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1",
        "OTEL_EXPORTER_OTLP_TRACES_HEADERS": "authorization=secret",
        "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
        "OTEL_BSP_MAX_QUEUE_SIZE": "nonsense",
        "OTEL_RESOURCE_ATTRIBUTES": "team=theirs",
        "OTEL_SERVICE_NAME": "theirs",
        "http_proxy": "http://127.0.0.1:1",
    }.items():
        monkeypatch.setenv(name, value)
    lost: list[int] = []
    outlet = Outlet(receiver.endpoint, RESOURCE, lost.append)
    outlet.send(spans("a", "b"))
    receiver.wait_for("b")
    outlet.close()
    assert "authorization" not in {name.lower() for name in receiver.headers[0]}
    (resource,) = (spans.resource for spans in receiver.requests[0].resource_spans)
    assert [(a.key, a.value.string_value) for a in resource.attributes] == [("service.name", "tested")]
    assert lost == []


def test_headers_go_with_every_request_but_do_not_say_what_is_in_it(receiver: Receiver) -> None:
    headers = {"authorization": "Bearer abc", "content-type": "text/plain"}
    outlet = Outlet(receiver.endpoint, RESOURCE, lambda count: None, headers)
    outlet.send(spans("a"))
    receiver.wait_for("a")
    outlet.close()
    sent = {name.lower(): value for name, value in receiver.headers[0].items()}
    assert (sent["authorization"], sent["content-type"]) == ("Bearer abc", "application/x-protobuf")


def test_what_waits_at_the_end_is_sent(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlets, "_EVERY_S", 60.0)
    monkeypatch.setattr(outlets, "_FLUSH_S", 30)
    outlet = Outlet(receiver.endpoint, RESOURCE, lambda count: None)
    outlet.send(spans("last"))
    outlet.close()
    assert len(receiver.named("last")) == 1


def test_a_receiver_that_is_busy_is_asked_again(receiver: Receiver) -> None:
    receiver.statuses = [503, 429]
    lost: list[int] = []
    outlet = Outlet(receiver.endpoint, RESOURCE, lost.append)
    outlet.send(spans("a"))
    receiver.wait_for("a")
    outlet.close()
    assert lost == [] and receiver.statuses == []


def test_a_number_that_otlp_has_not_is_sent_as_text(receiver: Receiver) -> None:
    lost: list[int] = []
    outlet = Outlet(receiver.endpoint, RESOURCE, lost.append)
    odd = spans("odd")
    odd.attributes = {"large": 2**70, "small": -(2**63)}
    outlet.send(odd)
    receiver.wait_for("odd")
    outlet.close()
    (sent,) = receiver.named("odd")
    values = {a.key: a.value for a in sent.attributes}
    assert (values["large"].string_value, values["small"].int_value, lost) == (str(2**70), -(2**63), [])


def test_what_is_refused_is_counted_and_told_once(receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    receiver.statuses = [400, 400]
    lost: list[int] = []
    outlet = Outlet(receiver.endpoint.replace("http://", "http://me:secret@"), RESOURCE, lost.append)
    for _ in range(2):
        already = len(lost)
        outlet.send(spans("a", "b", "c"))
        wait_for(lambda already=already: len(lost) > already)
    outlet.send(spans("d"))
    receiver.wait_for("d")
    outlet.close()
    assert lost == [3, 3]
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert warning.getMessage().startswith("3 spans are lost: 127.0.0.1:") and "400" in warning.getMessage()
    assert "secret" not in warning.getMessage()


def test_spans_that_a_receiver_takes_in_part_are_counted(receiver: Receiver) -> None:
    receiver.num_rejected = 2
    lost: list[int] = []
    outlet = Outlet(receiver.endpoint, RESOURCE, lost.append)
    outlet.send(spans("a", "b", "c"))
    wait_for(lambda: lost == [2])
    outlet.close()


def test_where_there_is_no_room_whole_traces_are_dropped_and_counted(receiver: Receiver) -> None:
    receiver.answers.clear()
    lost: list[int] = []
    outlet = Outlet(receiver.endpoint, RESOURCE, lost.append, most_waiting=4)
    outlet.send(spans("sending", "one", "two", "three"))
    wait_for(lambda: outlet._num_waiting == 0)  # it has left with its stages, and nobody answers
    outlet.send(spans("a", "b", "c"))
    outlet.send(spans("d", "e"))  # half of it would find room
    outlet.send(spans("f"))
    assert lost == [2]
    receiver.answers.set()
    receiver.wait_for("f")
    outlet.close()
    assert [span.name for span in receiver.spans] == ["sending", "one", "two", "three", "a", "b", "c", "f"]
    assert lost == [2]


def test_a_receiver_that_never_answers_does_not_hold_up_the_end(receiver: Receiver) -> None:
    receiver.answers.clear()
    lost: list[int] = []
    outlet = Outlet(receiver.endpoint, RESOURCE, lost.append)
    outlet.send(spans("a"))
    wait_for(lambda: outlet._num_waiting == 0)
    outlet.send(spans("b"))
    outlet.close()
    assert receiver.requests == []  # it would answer in half a minute


def test_a_receiver_that_is_gone_loses_what_is_sent_and_nothing_else() -> None:
    with receiving() as receiver:
        endpoint = receiver.endpoint
    lost: list[int] = []
    outlet = Outlet(endpoint, RESOURCE, lost.append)
    outlet.send(spans("a", "b"))
    wait_for(lambda: lost == [2])
    outlet.send(spans("c"))
    outlet.close()
    wait_for(lambda: lost == [2, 1])


def test_spans_that_come_while_others_are_sent_are_gathered(receiver: Receiver) -> None:
    outlet = Outlet(receiver.endpoint, RESOURCE, lambda count: None)
    outlet.send(spans("first"))
    receiver.wait_for("first")
    for number in range(30):
        outlet.send(spans(f"next {number}"))
    receiver.wait_for("next 29")
    outlet.close()
    assert len(receiver.requests) < 10
