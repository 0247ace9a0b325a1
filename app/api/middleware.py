"""What every request passes, as plain ASGI: id, time, an answer to any error, a key, a bounded body.

Knows nothing of endpoints, but which paths are free, which one takes artifacts and which ones take a permit.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
import time
from functools import lru_cache
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.access_log import log_request
from app.api.errors import error_response
from app.api.routes import PERMITTED, route_of
from app.api.span import describe
from app.config import is_loopback
from app.errors import EngineError, ForbiddenError, ManifoldError, TooLargeError
from app.rollout import Role
from app.service.access import EVERYBODY
from app.service.runtime import Runtime
from app.telemetry.metrics import Metrics
from app.telemetry.tracing import UNTRACED, Caller, Trace, parse_caller

logger = logging.getLogger(__name__)
_MAX_REQUEST_ID = 128
_WITH_BODY = frozenset({"POST", "PUT", "PATCH", "DELETE"})
_GONE = 499  # as nginx has it: the client has gone, and nobody hears this
_FREE = frozenset({"/livez", "/readyz", "/healthz", "/metrics", "/docs", "/openapi.json"})
_ARTIFACTS = re.compile(r"/v1/tasks/[^/]+/versions")


class Border:
    """Gives each request an id (the caller's where it is sane), its time and its trace.

    Every exception becomes an answer. Of a request whose client leaves before its answer the status is 499.
    """

    def __init__(self, app: ASGIApp, logs_requests: bool = False) -> None:
        self.app = app
        self.logs_requests = logs_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began_s = time.monotonic()
        request_id = _request_id(header(scope, b"x-request-id"))
        scope.setdefault("state", {})["request_id"] = request_id
        trace = scope["state"]["trace"] = _begin_trace(scope)
        status: int | None = None
        fault: Exception | None = None

        async def send_stamped(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                duration_s = time.monotonic() - began_s
                self._tell(scope, status, duration_s)
                total = milliseconds(duration_s)
                stamps = (b"x-request-id", request_id.encode()), (b"x-total-time", total.encode())
                message = {**message, "headers": [*message["headers"], *stamps]}
            await send(message)

        try:
            await self.app(scope, receive, send_stamped)
            if status is None and _has_arrived(scope):
                self._tell(scope, _GONE, time.monotonic() - began_s)
        except Exception as error:
            fault = error
            _log(error, request_id, trace)
            if status is not None:
                raise
            await error_response(error)(scope, receive, send_stamped)
        finally:
            if status != 401:  # whoever has no key could fill the receiver with what he says is to be recorded
                trace.end(lambda: describe(scope, status, fault))
            fault = None  # its traceback holds this frame, and so the body: a cycle that would wait for the collector

    def _tell(self, scope: Scope, status: int, duration_s: float) -> None:
        _count(scope, status, duration_s)
        if self.logs_requests and scope["path"] not in _FREE:
            log_request(scope, status, duration_s)


class Gatekeeper:
    """Asks for a key before anything of the body is read, and leaves the principal in the request's state.

    Where no permit is free the answer is 429 without reading the body; the permit itself is taken once the body is
    here, so that slow senders hold none.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _FREE:
            return await self.app(scope, receive, send)
        runtime: Runtime = scope["state"]["runtime"]
        access = runtime.access
        principal = scope["state"]["principal"] = access.authenticate(header(scope, b"authorization"), _client(scope))
        try:
            if principal is EVERYBODY and scope["method"] != "GET":
                _check_browser(scope)
            if _takes_artifact(scope):  # large bodies are read only of those whose artifacts are taken
                access.require(principal, Role.PUBLISH)
            if scope["path"] in PERMITTED and scope["method"] == "POST":
                runtime.admission.check()
            await self.app(scope, receive, send)
        except ForbiddenError as error:
            access.refused(principal, asked(scope), str(error))
            raise


def _client(scope: Scope) -> str:
    address = scope.get("client")
    return str(address[0]) if address else "this machine"  # a unix socket has no address


def _check_browser(scope: Scope) -> None:
    """Where no key is asked for, any page that a browser on this machine shows could change what is live."""
    settings = scope["state"]["runtime"].settings
    origin, host = header(scope, b"origin"), header(scope, b"host") or ""
    if _is_loopback(settings.host) and not _is_here(host):
        raise ForbiddenError(
            f"{host[:200]} is not a name of this machine: without keys, ask http://{settings.host} itself"
        )
    if origin and urlsplit(origin).netloc != host and not {origin, "*"} & set(settings.cors_allow_origins):
        raise ForbiddenError("pages of other origins may not ask this server: name theirs in cors_allow_origins")


_is_loopback = lru_cache(maxsize=256)(is_loopback)


@lru_cache(maxsize=256)
def _is_here(host: str) -> bool:
    """Whether the value of a host header is a name of this machine."""
    try:
        return is_loopback(urlsplit(f"//{host}").hostname or "")
    except ValueError:
        return False


class Body:
    """Reads the body up to a limit before the app runs, and leaves it in the request's state too.

    While the app runs, cancels it when the client goes.
    """

    def __init__(self, app: ASGIApp, limit_bytes: int, artifact_limit_bytes: int) -> None:
        self.app = app
        self.limit_bytes = limit_bytes
        self.artifact_limit_bytes = artifact_limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in _WITH_BODY:
            return await self.app(scope, receive, send)
        limit_bytes = self.artifact_limit_bytes if _takes_artifact(scope) else self.limit_bytes
        _check(_declared_length(scope), limit_bytes)
        body = await _read(receive, limit_bytes)
        if body is not None:
            await self._run_while_connected(body, scope, receive, send)

    async def _run_while_connected(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["body"] = body
        work, is_running = asyncio.current_task(), True
        assert work is not None

        def cancel(_: asyncio.Task[None]) -> None:
            if is_running:
                work.cancel()

        gone = asyncio.create_task(_until_gone(receive))
        gone.add_done_callback(cancel)
        try:
            await self.app(scope, _Replay(body, gone).receive, send)
        except asyncio.CancelledError:
            if not gone.done() or work.uncancel():  # it was not us, or not us alone
                raise
        finally:
            is_running = False
            gone.cancel()


async def _read(receive: Receive, limit_bytes: int) -> bytes | None:
    """The whole body, or None where the client went before it had sent it."""
    chunks, length = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        chunks.append(message.get("body", b""))
        length += len(chunks[-1])
        _check(length, limit_bytes)
        if not message.get("more_body", False):
            return b"".join(chunks)


def _check(length: int, limit_bytes: int) -> None:
    if length > limit_bytes:
        raise TooLargeError(f"the body is larger than {limit_bytes} bytes: send less at once")


class _Replay:
    """Hands the app the body that was read already; after it, only the client's going is left to hear of."""

    def __init__(self, body: bytes, gone: asyncio.Task[None]) -> None:
        self._body: bytes | None = body
        self._gone = gone

    async def receive(self) -> Message:
        if self._body is None:
            await asyncio.wait((self._gone,))
            return {"type": "http.disconnect"}
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def header(scope: Scope, name: bytes) -> str | None:
    """The first of this name, which is in lower case."""
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value).decode("latin-1")
    return None


def _begin_trace(scope: Scope) -> Trace:
    """Probes are no work that anybody follows."""
    runtime: Runtime = scope["state"]["runtime"]
    return UNTRACED if scope["path"] in _FREE else runtime.traces.begin(_caller(scope))


def _caller(scope: Scope) -> Caller | None:
    traceparent = header(scope, b"traceparent")
    if traceparent is None:
        return None
    states = [bytes(value).decode("latin-1") for key, value in scope["headers"] if key == b"tracestate"]
    return parse_caller(traceparent, ",".join(states))  # the one header that may come in pieces


def asked(scope: Scope) -> str:
    """What a request asks for, for the audit log."""
    return f"{scope['method']} {scope['path'][:200]}"


def _count(scope: Scope, status: int, duration_s: float) -> None:
    metrics: Metrics = scope["state"]["runtime"].metrics
    metrics.answered(route_of(scope), status, duration_s)


def milliseconds(duration_s: float) -> str:
    return f"{duration_s * 1000:.2f}"


def _request_id(given: str | None) -> str:
    """The caller's own id where it is short and plain, so that it can stand in any log; else a new one."""
    if given and len(given) <= _MAX_REQUEST_ID and given.isascii() and given.isprintable():
        return given
    return f"{random.getrandbits(128):032x}"  # it is no secret; a call of the system would let go of the interpreter


def _has_arrived(scope: Scope) -> bool:
    """Whole: what a client sends for ever so long says nothing of the server."""
    return "body" in scope["state"] or scope["method"] not in _WITH_BODY


def _takes_artifact(scope: Scope) -> bool:
    return scope["method"] == "POST" and _ARTIFACTS.fullmatch(scope["path"]) is not None


def _declared_length(scope: Scope) -> int:
    declared = header(scope, b"content-length") or ""
    return int(declared) if declared.isascii() and declared.isdecimal() else 0


def _log(error: Exception, request_id: str, trace: Trace) -> None:
    """Callers' mistakes are theirs to read; what is ours goes to the log with its trace."""
    if not isinstance(error, ManifoldError) or isinstance(error, EngineError):
        extra = {"request_id": request_id, **trace.ids}
        logger.error("request failed: %s", error, exc_info=error, extra=extra)
