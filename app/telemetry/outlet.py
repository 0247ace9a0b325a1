"""Sends spans to an OTLP receiver over HTTP, aside: whoever hands one over never waits, and a receiver may be gone.

Knows nothing of what spans say. Takes nothing from OTEL_* variables: settings say what there is to say.
"""

from __future__ import annotations

import logging
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from urllib.parse import urlsplit

import httpx2
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from app.telemetry.spans import Span, encode

logger = logging.getLogger(__name__)

_MOST_WAITING = 8192  # spans
_BATCH_SPANS = 512  # they are sent when so many wait, or after a while
_EVERY_S = 1.0
_TIMEOUT_S = 5.0  # of one try
_WAITS_S = (0.5, 1.0, 2.0)  # before another
_RETRIED = frozenset({429, 502, 503, 504})  # as the OTLP specification says
_FLUSH_S = 2.0  # what the last spans may take when the server stops
_WARN_EVERY_S = 60.0
_SIGNAL = "/v1/traces"
_HEADERS = {"content-type": "application/x-protobuf"}


class Outlet:
    """A bounded queue, and a thread that empties it. `send` from any thread."""

    def __init__(
        self,
        endpoint: str,
        resource: Mapping[str, str],
        dropped: Callable[[int], None],
        headers: Mapping[str, str] = MappingProxyType({}),
        most_waiting: int = _MOST_WAITING,
    ) -> None:
        """`dropped` hears how many spans are lost: no room, or the receiver did not take them.

        `headers` go with every request to the receiver.
        """
        self._dropped = dropped
        self._most_waiting = most_waiting
        self._waiting: deque[Span] = deque()
        self._num_waiting = 0
        self._lock = threading.Lock()
        self._has_many, self._closing = threading.Event(), threading.Event()
        self._post = _Post(endpoint, resource, headers, dropped)
        self._thread = threading.Thread(target=self._run, name="traces", daemon=True)
        self._thread.start()

    def send(self, span: Span) -> None:
        """With its stages, or not at all: half of it misleads."""
        count = span.count
        with self._lock:
            has_room = self._num_waiting + count <= self._most_waiting
            if has_room:
                self._num_waiting += count
                self._waiting.append(span)
        if not has_room:
            self._dropped(count)
        elif self._num_waiting >= _BATCH_SPANS and not self._has_many.is_set():
            self._has_many.set()

    def close(self) -> None:
        """What waits is sent, for a bounded time: the thread that sends is left behind where it hangs."""
        self._post.hurry(time.monotonic() + _FLUSH_S)
        self._closing.set()
        self._has_many.set()
        self._thread.join(_FLUSH_S)

    def _run(self) -> None:
        while not self._closing.is_set():
            self._has_many.wait(_EVERY_S)
            self._has_many.clear()
            self._send_one()
            while self._num_waiting >= _BATCH_SPANS:  # else the next come with what gathers meanwhile
                self._send_one()
        while self._num_waiting:  # what came between
            self._send_one()
        self._post.close()

    def _send_one(self) -> None:
        if taken := self._take():
            self._post.send(taken)

    def _take(self) -> list[Span]:
        taken, count = list[Span](), 0
        with self._lock:
            while self._waiting and (not taken or count + self._waiting[0].count <= _BATCH_SPANS):
                taken.append(self._waiting.popleft())
                count += taken[-1].count
            self._num_waiting -= count
        return taken


class _RefusedError(Exception):
    pass


class _Post:
    """On the outlet's thread. Tells of failures now and then, and never raises."""

    def __init__(
        self, endpoint: str, resource: Mapping[str, str], headers: Mapping[str, str], dropped: Callable[[int], None]
    ) -> None:
        self._headers = {**headers, **_HEADERS}
        self._url, self._resource, self._dropped = signal_url(endpoint), resource, dropped
        self._shown = urlsplit(self._url).netloc.rpartition("@")[2]  # without a password
        # Proxies and passwords that the environment names are not meant for this.
        self._client = httpx2.Client(timeout=_TIMEOUT_S, trust_env=False, verify=ssl.create_default_context())
        self._until_s: float | None = None  # on time.monotonic(): no try goes on longer
        self._hurrying = threading.Event()
        self._num_untold = 0
        self._told_s = float("-inf")

    def hurry(self, until_s: float) -> None:
        self._until_s = until_s
        self._hurrying.set()

    def send(self, spans: Sequence[Span]) -> None:
        try:
            self._deliver(encode(spans, self._resource))
        except Exception as error:  # whatever it is: these are lost, and the next may arrive
            self._lost(sum(span.count for span in spans), str(error) or type(error).__name__)

    def close(self) -> None:
        self._client.close()

    def _deliver(self, body: bytes) -> None:
        for wait_s in _WAITS_S:
            try:
                response = self._try(body)
            except httpx2.TransportError:
                pass
            else:
                if response.status_code not in _RETRIED:
                    return self._check(response)
            self._hurrying.wait(wait_s)
        self._check(self._try(body))

    def _try(self, body: bytes) -> httpx2.Response:
        left_s = _TIMEOUT_S if self._until_s is None else min(_TIMEOUT_S, self._until_s - time.monotonic())
        if left_s <= 0:
            raise TimeoutError("the server stops, and the receiver is too slow")
        return self._client.post(self._url, content=body, headers=self._headers, timeout=left_s)

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
