"""Log lines, as text or as JSON. Knows nothing of what is logged."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import orjson

ACCESS = "manifold.access"  # the logger with a line a request
_OF_REQUEST = ("request_id", "trace_id", "span_id")
_IN_TEXT = ("request_id", "trace_id")
_MOST_LINES = 10_000  # that wait to be written
_GATHER_S = 0.25
_LINES_TOGETHER = 100
_MOST_WAIT_S = 2.0  # for a slow reader at the end
_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_BREAKING = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # a line, or a terminal
_BARE = re.compile(r"[^\s\"'=\\]+")  # a value that needs no quotes


class Line(NamedTuple):
    """What is said at level info, without the machinery of a record, which takes longer than all the rest."""

    logger: str
    at_s: float  # seconds since the epoch
    message: str
    ids: Mapping[str, str]
    fields: Mapping[str, object]
    told: Collection[str] = ()  # fields that the message says already

    def record(self) -> logging.LogRecord:
        """What `logger.info` would make, without a walk through the stack to find who calls."""
        record = logging.LogRecord(self.logger, logging.INFO, __file__, 0, self.message, (), None)
        record.__dict__.update(
            created=self.at_s, msecs=1000 * (self.at_s % 1), fields=self.fields, told=self.told, **self.ids
        )
        return record


class JsonFormatter(logging.Formatter):
    """A JSON object a line: time (UTC), level, logger, message; where there are: ids, fields, exception."""

    def format(self, record: logging.LogRecord) -> str:
        line = _head(record.created, record.levelname.lower(), record.name, record.getMessage())
        line |= {name: getattr(record, name) for name in _OF_REQUEST if hasattr(record, name)}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _to_json(line)

    def line(self, said: Line) -> str:
        """The same of what is no record yet."""
        return _to_json({**_head(said.at_s, "info", said.logger, said.message), **said.ids, **said.fields})


def _head(at_s: float, level: str, logger: str, message: str) -> dict[str, object]:
    time_told = f"{utc_second(int(at_s))}.{int(1000 * (at_s % 1)):03d}Z"
    return {"time": time_told, "level": level, "logger": logger, "message": message}


@lru_cache(maxsize=4)
def utc_second(unix_s: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(unix_s))


def _to_json(line: Mapping[str, object]) -> str:
    try:
        return orjson.dumps(line).decode()
    except TypeError:  # half a surrogate pair, a number of more than 64 bits, or something that only its text can show
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """For people: behind the message ids and fields as ` key=value`, but those that the record's `told` names.

    What a message or a value quotes of a caller can neither begin a line nor move the cursor, nor a value end its pair.
    """

    def __init__(self) -> None:
        super().__init__(_TEXT)

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = " ".join((record.message, *_pairs(record)))
        record.message = _BREAKING.sub(lambda found: repr(found[0])[1:-1], line)
        return super().formatMessage(record)


def _pairs(record: logging.LogRecord) -> Iterator[str]:
    told = getattr(record, "told", ())  # fields that the message says already
    ids = {name: getattr(record, name) for name in _IN_TEXT if hasattr(record, name)}
    for name, value in {**ids, **getattr(record, "fields", {})}.items():
        if value is not None and name not in told:
            yield f"{name}={_value(value)}"


def _value(value: object) -> str:
    text = ",".join(f"{key}:{of}" for key, of in value.items()) if isinstance(value, Mapping) else str(value)
    return text if _BARE.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def configure_logging(log_format: Literal["text", "json"]) -> None:
    """Replaces the root logger's handlers; for the server's process only, tests keep their own."""
    aside = _Aside(JsonFormatter() if log_format == "json" else TextFormatter(), _Stream())
    logging.basicConfig(level=logging.INFO, handlers=[aside], force=True)
    # No line says what thread or process it comes from, and to find out takes time.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    for chatty in ("httpx", "httpx2", "httpcore", "uvicorn.access"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # what it says at start and stop, we say ourselves


def log_made(logger: logging.Logger, make: Callable[[], Line]) -> None:
    """Log what `make` makes, once. Where lines are written aside it is made there, behind others of its kind.

    Between two batches whatever runs is cold in the processor's caches, so that a line takes five times as long to
    make as many in a row.
    """
    handlers = logging.root.handlers
    if len(handlers) == 1 and isinstance(handlers[0], _Aside):
        handlers[0].take(make)
    else:
        logger.handle(make().record())


def flush_logging() -> None:
    """Until all that was said is written, or for as long as a slow reader may make anybody wait."""
    for handler in logging.getLogger().handlers:
        handler.flush()


_Said = logging.LogRecord | Callable[[], Line]  # the latter makes one


class _Stream:
    """Standard error without Python's buffer, whose lock a reader that stopped would hold for ever."""

    def write(self, text: str) -> None:
        try:
            number = sys.stderr.fileno()
        except (OSError, ValueError, AttributeError):  # it is no file
            sys.stderr.write(text)
            return
        left = text.encode("utf-8", "backslashreplace")
        while left:
            left = left[os.write(number, left) :]


class _Aside(logging.Handler):
    """Writes on a thread of its own, so that a slow reader of the log holds nobody up: no answer, no swap, no end.

    The thread takes what has gathered within a quarter of a second: to wake it for each line would take more time than
    the line. Lines that it cannot keep up with are dropped, and the next one that finds room says how many.
    """

    def __init__(self, formatter: logging.Formatter, stream: _Stream) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self._stream = stream
        self._num_dropped = 0
        self._waiting: deque[_Said | threading.Event] = deque()  # an event: all before it is written
        self._has_work, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def createLock(self) -> None:
        """None: a deque needs none, and nobody is to wait for the thread."""
        self.lock = None

    def emit(self, record: logging.LogRecord) -> None:
        self.take(record)

    def take(self, line: _Said) -> None:
        if len(self._waiting) >= _MOST_LINES:
            self._num_dropped += 1
            return
        if self._num_dropped:
            told = {"name": "manifold", "levelno": logging.WARNING, "levelname": "WARNING"}
            told["msg"] = f"{self._num_dropped} lines were dropped: the log is read too slowly"
            self._num_dropped = 0
            self._waiting.append(logging.makeLogRecord(told))
        self._waiting.append(line)
        if not self._has_work.is_set():
            self._has_work.set()

    def flush(self) -> None:
        """Until all that waits is written, or for as long as anybody can be made to wait."""
        if self._thread.is_alive():
            written = threading.Event()
            self._waiting.append(written)
            self._has_work.set()
            written.wait(_MOST_WAIT_S)

    def close(self) -> None:
        self._closing.set()
        self._has_work.set()
        self._thread.join(_MOST_WAIT_S)  # where nobody reads, it ends with the process
        super().close()

    def _run(self) -> None:
        while not self._closing.is_set():
            self._has_work.wait()
            self._closing.wait(_GATHER_S)
            self._has_work.clear()
            self._write_all()
        self._write_all()  # what came between

    def _write_all(self) -> None:
        while self._waiting:
            self._write([self._waiting.popleft() for _ in range(min(len(self._waiting), _LINES_TOGETHER))])

    def _write(self, taken: Sequence[_Said | threading.Event]) -> None:
        lines = [one for one in taken if not isinstance(one, threading.Event)]
        try:
            self._stream.write("".join(map(self._text, lines)))
        except Exception:  # the thread must outlive a stream that breaks
            self._num_dropped += len(lines)
        for one in taken:
            if isinstance(one, threading.Event):
                one.set()

    def _text(self, said: _Said) -> str:
        """Of a line that cannot be made or has no text, what went wrong: the thread and other lines outlive it."""
        try:
            return f"{self._formatted(said)}\n"
        except Exception as error:
            told = {"name": "manifold", "levelno": logging.ERROR, "levelname": "ERROR"}
            told["msg"] = f"a line could not be made: {type(error).__name__}"
            return f"{self.format(logging.makeLogRecord(told))}\n"

    def _formatted(self, said: _Said) -> str:
        if isinstance(said, logging.LogRecord):
            return self.format(said)
        line = said()
        return self.formatter.line(line) if isinstance(self.formatter, JsonFormatter) else self.format(line.record())
