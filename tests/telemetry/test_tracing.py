"""Which headers name a caller's span, and which are treated as if they were not there."""

from __future__ import annotations

import subprocess
import sys

import pytest

from app.telemetry.tracing import Caller, Description, Tracing, parse_caller

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.parametrize(
    ("header", "is_sampled"),
    [
        (f"00-{TRACE}-{SPAN}-01", True),
        (f"00-{TRACE}-{SPAN}-00", False),
        (f"00-{TRACE}-{SPAN}-03", True),  # flags that we do not know are no fault
        (f"00-{TRACE}-{SPAN}-02", False),
        (f" 00-{TRACE}-{SPAN}-01\t", True),
        (f"cc-{TRACE}-{SPAN}-01-what-the-future-says", True),
    ],
)
def test_a_caller_is_read(header: str, is_sampled: bool) -> None:
    assert parse_caller(header, "a=b") == Caller(TRACE, SPAN, is_sampled, "a=b")


@pytest.mark.parametrize(
    "header",
    [
        "",
        "nonsense",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-01\n",
        f"00-{TRACE[:-1]}-{SPAN}-01",
    ],
)
def test_a_header_that_is_not_valid_names_nobody(header: str) -> None:
    assert parse_caller(header) is None


def test_without_a_receiver_the_callers_trace_is_only_named() -> None:
    tracing = Tracing()
    assert tracing.begin(None).ids == {}
    trace = tracing.begin(Caller(TRACE, SPAN, True))
    assert trace.ids == {"trace_id": TRACE} and trace.context is None

    def describe() -> Description:
        raise AssertionError("nobody wants to know")

    trace.end(describe)
    with tracing.change("swap") as told, tracing.part("fetch"):
        told["manifold.generation"] = 1
    with tracing.change("swap") as told:
        assert told == {}


def test_a_server_without_a_receiver_does_not_load_what_sends() -> None:
    sending = {"app.telemetry.traces", "app.telemetry.outlet", "opentelemetry.proto", "google.protobuf"}
    program = f"import sys, app.main; print(*{sending!r}.intersection(sys.modules))"
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert found.stdout.split() == []
