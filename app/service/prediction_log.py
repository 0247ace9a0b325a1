"""The prediction log: a sample of what was answered goes to disk, and no answer waits for it or fails with it.

One thread appends, behind a queue that is bounded in bytes; another finishes parts and keeps to the limit, and may
wait for a slow store. What finds no room is dropped and counted. Knows neither formats nor stores.
"""

from __future__ import annotations

import errno
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from app.errors import UnavailableError
from app.registry.prediction_parts import PartWriter
from app.registry.prediction_store import PredictionStore
from app.service.prediction_rows import count_rows, is_sampled, to_line
from app.service.watching import Served
from app.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)

_WAITING_BYTES = 32_000_000
_AT_ONCE_BYTES = 1_000_000
_EVERY_S = 1.0
_RETRY_S = 30.0  # after a store did not answer
_CLOSE_S = 5.0  # for what is left at the end; what is not finished then is finished at the next start
_ENDING_S = 0.5  # of it, for the process that makes rows to end
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class _Line(NamedTuple):
    """A request."""

    content: bytes
    rows: int


class PredictionLog:
    """A watcher."""

    def __init__(
        self,
        writer: PartWriter,
        store: PredictionStore,
        metrics: Metrics,
        *,
        sample: float = 1.0,
        has_texts: bool = False,
        most_waiting_bytes: int = _WAITING_BYTES,
    ) -> None:
        self._writer, self._store, self._metrics = writer, store, metrics
        self._sample, self._has_texts = sample, has_texts
        self._waiting: deque[_Line] = deque()
        self._waiting_bytes, self._most_waiting_bytes = 0, most_waiting_bytes
        self._changed = threading.Condition()
        self._is_closing, self._closing = False, threading.Event()
        self._until_s = math.inf  # on time.monotonic(): what is not finished by then is left
        self._fault: tuple[type[Exception], int | None] | None = None  # why rows are dropped now
        self._lost = 0  # since it began
        self._is_store_out = False
        self._appender = threading.Thread(target=self._append_all, name="prediction-log", daemon=True)
        self._keeper = threading.Thread(target=self._keep, name="prediction-store", daemon=True)

    def start(self) -> None:
        self._appender.start()
        self._keeper.start()

    # -- on the watch's thread -----------------------------------------------------------------------------------------

    def take_in(self, served: Sequence[Served]) -> None:
        sampled = (request for request in served if is_sampled(request.request_id, self._sample))
        lines = [made for made in map(self._line, sampled) if made is not None]
        if not lines:
            return
        dropped = 0
        with self._changed:  # once: to wake the other thread takes longer than a line
            for one in lines:
                if self._waiting_bytes + len(one.content) <= self._most_waiting_bytes:
                    self._waiting.append(one)
                    self._waiting_bytes += len(one.content)
                else:
                    dropped += one.rows
            self._changed.notify()
        if dropped:
            self._metrics.log_dropped("slow", dropped)

    def _line(self, request: Served) -> _Line | None:
        rows = count_rows(request)
        try:
            return _Line(to_line(request, self._has_texts), rows)
        except Exception:
            logger.exception("a request is not in the prediction log", extra={"request_id": request.request_id})
            self._metrics.log_dropped("error", rows)
            return None

    def close(self) -> None:
        """What waits is written first, as far as it can be in a few seconds."""
        deadline_s = time.monotonic() + _CLOSE_S
        self._until_s = deadline_s - _ENDING_S
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        for thread in (self._appender, self._keeper):
            if thread.is_alive():
                thread.join(max(0.0, deadline_s - time.monotonic()))
        if self._appender.is_alive() or self._keeper.is_alive():
            logger.warning("the prediction log %s takes too long: its last part is left for later", self._store.url)

    # -- on the thread that appends ------------------------------------------------------------------------------------

    def _append_all(self) -> None:
        while not self._closing.is_set():
            lines = self._next()
            if lines:
                self._append(lines)
            elif self._is_closing:
                self._writer.end()
                self._closing.set()
            else:
                self._writer.end_if_due()

    def _next(self) -> list[_Line]:
        """Empty where nothing came for a while."""
        with self._changed:
            if not self._waiting and not self._is_closing:
                self._changed.wait(_EVERY_S)
            taken: list[_Line] = []
            size_bytes = 0
            while self._waiting and (not taken or size_bytes + len(self._waiting[0].content) <= _AT_ONCE_BYTES):
                taken.append(self._waiting.popleft())
                size_bytes += len(taken[-1].content)
            self._waiting_bytes -= size_bytes
            return taken

    def _append(self, lines: Sequence[_Line]) -> None:
        rows = sum(part.rows for part in lines)
        try:
            self._writer.append(b"".join(part.content for part in lines))
        except Exception as error:  # the thread must outlive whatever a disk brings
            self._failed(error, rows)
            return
        self._metrics.logged(rows)
        if self._fault:
            logger.info("the prediction log is written again; %d rows were dropped", self._lost)
            self._fault, self._lost = None, 0

    def _failed(self, error: Exception, rows: int) -> None:
        is_full = isinstance(error, OSError) and error.errno in _FULL
        self._metrics.log_dropped("full" if is_full else "error", rows)
        self._lost += rows
        fault = (
            type(error),
            error.errno if isinstance(error, OSError) else None,
        )  # its text may name another file each time
        if self._fault != fault:
            self._fault = fault
            logger.error("the prediction log cannot be written in %s, rows are dropped: %s", self._store.folder, error)

    # -- on the thread that keeps --------------------------------------------------------------------------------------

    def _keep(self) -> None:
        while True:
            is_last = self._closing.wait(_RETRY_S if self._is_store_out else _EVERY_S)
            try:
                self._tidy()
            except Exception:
                logger.exception("keeping the prediction log failed; it is tried again")
            if is_last:
                self._store.close()
                return

    def _tidy(self) -> None:
        lost = self._store.drop_waiting()
        if lost:
            self._metrics.log_dropped("store", lost)
        try:
            self._store.tidy(lambda: self._until_s - time.monotonic())
        except UnavailableError as error:
            if not self._is_store_out:
                logger.error("%s; what is finished waits in %s", error, self._store.folder)
            self._is_store_out = True
        else:
            if self._is_store_out:
                logger.info("the prediction log %s takes what is finished again", self._store.url)
            self._is_store_out = False
