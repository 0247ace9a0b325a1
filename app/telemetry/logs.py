"""Log lines, as text or as JSON. Knows nothing of what is logged."""

from __future__ import annotations

import atexit
import json
import logging
import queue
import sys
import time
from logging.handlers import QueueHandler, QueueListener
from typing import Literal

ACCESS = "manifold.access"  # the logger with a line a request
_OF_REQUEST = ("request_id", "trace_id", "span_id")
_MOST_LINES = 10_000  # that wait to be written
_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class JsonFormatter(logging.Formatter):
    """A JSON object a line: time (UTC), level, logger, message; where there are: ids, fields, exception."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: getattr(record, name) for name in _OF_REQUEST if hasattr(record, name)}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def configure_logging(log_format: Literal["text", "json"]) -> None:
    """Replaces the root logger's handlers; for the server's process only, tests keep their own."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else logging.Formatter(_TEXT))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for chatty in ("httpx", "httpx2", "httpcore", "uvicorn.access"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # what it says at start and stop, we say ourselves
    logging.getLogger("opentelemetry").setLevel(logging.ERROR)  # it warns of each header that a client got wrong
    access = logging.getLogger(ACCESS)
    access.handlers[:] = [_Aside(handler)]
    access.propagate = False


class _Aside(QueueHandler):
    """Writes on a thread of its own, so that a slow reader of the log holds no answer up.

    Lines that it cannot keep up with are dropped, and the next one that finds room says how many.
    """

    def __init__(self, handler: logging.Handler) -> None:
        super().__init__(queue.Queue(_MOST_LINES))
        self._num_dropped = 0
        listener = QueueListener(self.queue, handler)
        listener.start()
        atexit.register(listener.stop)

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record  # it stays in this process

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            if self._num_dropped:
                told = {"name": record.name, "levelno": logging.WARNING, "levelname": "WARNING"}
                told["msg"] = f"{self._num_dropped} lines were dropped: the log is read too slowly"
                self.queue.put_nowait(logging.makeLogRecord(told))
                self._num_dropped = 0
            self.queue.put_nowait(record)
        except queue.Full:
            self._num_dropped += 1
