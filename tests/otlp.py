"""An OTLP receiver on loopback that keeps the spans that it is sent; it can refuse, fall silent or be gone."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.serving import wait_for


class Receiver:
    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self.headers: list[dict[str, str]] = []
        self.statuses: list[int] = []  # of the next answers; 200 where there is none
        self.num_rejected = 0  # of each export
        self.answers = threading.Event()  # cleared, nobody gets one
        self.answers.set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def spans(self) -> list[Span]:
        resources = [spans for request in self.requests for spans in request.resource_spans]
        return [span for spans in resources for scope in spans.scope_spans for span in scope.spans]

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]

    def wait_for(self, name: str, count: int = 1) -> list[Span]:
        wait_for(lambda: len(self.named(name)) >= count)
        return self.named(name)

    def below(self, parent: Span) -> dict[str, Span]:
        """By name."""
        return {span.name: span for span in self.spans if span.parent_span_id == parent.span_id}

    def close(self) -> None:
        self.answers.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                receiver.answers.wait(30)
                body = self.rfile.read(int(self.headers["content-length"]))
                status = receiver.statuses.pop(0) if receiver.statuses else 200
                if status == 200 and self.path == "/v1/traces":
                    receiver.headers.append(dict(self.headers))
                    receiver.requests.append(ExportTraceServiceRequest.FromString(body))
                answer = ExportTraceServiceResponse()
                answer.partial_success.rejected_spans = receiver.num_rejected
                content = answer.SerializeToString()
                with contextlib.suppress(OSError):  # whoever asked has gone
                    self.send_response(status if self.path == "/v1/traces" else 404)
                    self.send_header("content-length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        return Handler


@contextlib.contextmanager
def receiving() -> Iterator[Receiver]:
    receiver = Receiver()
    try:
        yield receiver
    finally:
        receiver.close()


def said(span: Span) -> dict[str, object]:
    """A span's attributes."""
    return {attribute.key: _value(attribute.value) for attribute in span.attributes}


def _value(value: AnyValue) -> object:
    kind = value.WhichOneof("value")
    assert kind is not None
    found = getattr(value, kind)
    return [_value(item) for item in found.values] if kind == "array_value" else found
