"""Sends spans to an OTLP receiver over HTTP, aside: whoever hands one over never waits, and a receiver may be gone.

Knows nothing of what spans say. Takes nothing from OTEL_* variables, which the SDK's own exporter would obey.
"""

from __future__ import annotations

import logging
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

import httpx2
from google.protobuf.message import DecodeError
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

logger = logging.getLogger(__name__)

_MOST_WAITING = 8192  # spans
_BATCH_SPANS = 256
_EVERY_MS = 1000
_TIMEOUT_S = 5.0  # of one try
_WAITS_S = (0.5, 1.0, 2.0)  # before another
_RETRIED = frozenset({429, 502, 503, 504})  # as the OTLP specification says
_FLUSH_S = 2.0  # what the last spans may take when the server stops
_WARN_EVERY_S = 60.0
_SIGNAL = "/v1/traces"
_HEADERS = {"content-type": "application/x-protobuf"}


class Outlet:
    """A bounded queue, and a thread of the SDK's that empties it. `send` from any thread."""

    def __init__(self, endpoint: str, dropped: Callable[[int], None], most_waiting: int = _MOST_WAITING) -> None:
        """`dropped` hears how many spans are lost: no room, or the receiver did not take them."""
        self._dropped = dropped
        self._most_waiting = most_waiting
        self._num_waiting = 0
        self._lock = threading.Lock()
        self._exporter = _Exporter(signal_url(endpoint), self._taken, dropped)
        self._processor = BatchSpanProcessor(
            self._exporter,
            max_queue_size=most_waiting,
            schedule_delay_millis=_EVERY_MS,
            max_export_batch_size=min(_BATCH_SPANS, most_waiting),
            export_timeout_millis=1000 * _TIMEOUT_S,
            meter_provider=NoOpMeterProvider(),
        )

    def send(self, spans: Sequence[ReadableSpan]) -> None:
        """All of them or none: half a trace misleads. The SDK would throw out older ones, and not say how many."""
        with self._lock:
            has_room = self._num_waiting + len(spans) <= self._most_waiting
            if has_room:
                self._num_waiting += len(spans)
        if not has_room:
            self._dropped(len(spans))
            return
        for span in spans:
            self._processor.on_end(span)

    def close(self) -> None:
        """What waits is sent, for a bounded time: the thread that sends is left behind where it hangs."""
        self._exporter.hurry(time.monotonic() + _FLUSH_S)
        ending = threading.Thread(target=self._processor.shutdown, name="traces-end", daemon=True)
        ending.start()
        ending.join(_FLUSH_S)

    def _taken(self, count: int) -> None:
        with self._lock:
            self._num_waiting -= count


class _RefusedError(Exception):
    pass


class _Exporter(SpanExporter):
    """On the SDK's thread. Tells of failures now and then, and never raises."""

    def __init__(self, url: str, taken: Callable[[int], None], dropped: Callable[[int], None]) -> None:
        self._url, self._taken, self._dropped = url, taken, dropped
        self._shown = urlsplit(url).netloc.rpartition("@")[2]  # without a password
        # Proxies and passwords that the environment names are not meant for this.
        self._client = httpx2.Client(timeout=_TIMEOUT_S, trust_env=False, verify=ssl.create_default_context())
        self._until_s: float | None = None  # on time.monotonic(): no try goes on longer
        self._hurrying = threading.Event()
        self._num_untold = 0
        self._told_s = float("-inf")

    def hurry(self, until_s: float) -> None:
        self._until_s = until_s
        self._hurrying.set()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._taken(len(spans))
        try:
            self._deliver(encode_spans(spans).SerializeToString())
        except Exception as error:  # whatever it is: these are lost, and the next may arrive
            self._lost(len(spans), str(error) or type(error).__name__)
            return SpanExportResult.FAILURE
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        self._client.close()

    def _deliver(self, body: bytes) -> None:
        for wait_s in _WAITS_S:
            try:
                response = self._post(body)
            except httpx2.TransportError:
                pass
            else:
                if response.status_code not in _RETRIED:
                    return self._check(response)
            self._hurrying.wait(wait_s)
        self._check(self._post(body))

    def _post(self, body: bytes) -> httpx2.Response:
        left_s = _TIMEOUT_S if self._until_s is None else min(_TIMEOUT_S, self._until_s - time.monotonic())
        if left_s <= 0:
            raise TimeoutError("the server stops, and the receiver is too slow")
        return self._client.post(self._url, content=body, headers=_HEADERS, timeout=left_s)

    def _check(self, response: httpx2.Response) -> None:
        if not response.is_success:
            raise _RefusedError(f"it answers {response.status_code}")  # httpx2 would name the URL, password and all
        try:
            partial = ExportTraceServiceResponse.FromString(response.content).partial_success
        except DecodeError:
            return  # a receiver that only says yes
        if partial.rejected_spans:
            self._lost(partial.rejected_spans, partial.error_message or "it gives no reason")

    def _lost(self, count: int, reason: str) -> None:
        self._dropped(count)
        self._num_untold += count
        now_s = time.monotonic()
        if now_s - self._told_s > _WARN_EVERY_S:
            logger.warning("%d spans are lost: %s does not take them: %s", self._num_untold, self._shown, reason)
            self._num_untold, self._told_s = 0, now_s


def signal_url(endpoint: str) -> str:
    """Where traces go: an endpoint is for all signals, as OTEL_EXPORTER_OTLP_ENDPOINT is, or names this one."""
    base = endpoint.rstrip("/")
    return base if base.endswith(_SIGNAL) else base + _SIGNAL
