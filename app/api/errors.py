"""The one table from our errors to statuses, and the one body that every error has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from app.api.faults import describe_faults
from app.errors import (
    ConflictError,
    DeadlineError,
    EngineError,
    ForbiddenError,
    MalformedError,
    ManifoldError,
    NotFoundError,
    OverloadedError,
    TokenizationError,
    TooLargeError,
    UnauthorizedError,
    UnavailableError,
    UnservableError,
)

ErrorType = Literal[
    "overloaded",
    "validation",
    "tokenization",
    "engine",
    "not_found",
    "unauthorized",
    "forbidden",
    "conflict",
    "unavailable",
    "deadline",
]

TABLE: Mapping[type[ManifoldError], tuple[int, ErrorType]] = {
    MalformedError: (400, "validation"),
    UnauthorizedError: (401, "unauthorized"),
    ForbiddenError: (403, "forbidden"),
    NotFoundError: (404, "not_found"),
    ConflictError: (409, "conflict"),
    TooLargeError: (413, "validation"),
    TokenizationError: (422, "tokenization"),
    UnservableError: (422, "validation"),
    OverloadedError: (429, "overloaded"),
    EngineError: (500, "engine"),
    UnavailableError: (503, "unavailable"),
    DeadlineError: (504, "deadline"),
    ManifoldError: (500, "engine"),
}

_MEANINGS = {
    400: "the body is malformed or empty",
    401: "no key, or one that is not known: send `Authorization: Bearer <key>`",
    403: "the key lacks a role, or the rule of two people says no",
    404: "no such task, version or model",
    409: "somebody else changed it first (`etag` is the generation to read), or its state does not allow it",
    413: "the body or the batch is over its limit",
    422: "valid JSON that cannot be served: wrong types, too long, or a task and an input that do not fit",
    429: "all permits are taken, or too many wrong keys were sent: `Retry-After` says when to try again",
    500: "ours: it is logged under the request id",
    503: "not ready, draining, the engine is dead, or the index cannot be reached",
    504: "the deadline passed first",
}
_RETRY_UNAVAILABLE_S = 1.0


class ErrorBody(BaseModel):
    """What every error looks like."""

    model_config = ConfigDict(json_schema_extra={"example": {"error": "input 0 is empty", "error_type": "validation"}})

    error: str = Field(description="one sentence for people")
    error_type: ErrorType = Field(description="one word for programs")


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What an endpoint's OpenAPI says of the errors it can answer."""
    return {status: {"model": ErrorBody, "description": _MEANINGS[status]} for status in statuses}


def guarded_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The same for an endpoint behind keys."""
    return error_responses(*sorted({401, 403, 429, 500, *statuses}))


def error_response(error: Exception) -> Response:
    """The answer to any exception: ours by the table, anything else is a 500 that tells nothing of our inside."""
    if not isinstance(error, ManifoldError):
        return _response(500, "the server failed at this request: its log has the cause", "engine")
    status, error_type = next(TABLE[cls] for cls in type(error).__mro__ if cls in TABLE)
    return _response(status, str(error), error_type, _headers_of(error))


def install_handlers(app: FastAPI) -> None:
    """Replaces FastAPI's own handlers, so that no other error body ever leaves. Our errors pass to the middleware."""
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    sentence = {
        404: f"there is no {request.method} {request.url.path[:200]} here: /docs lists what there is",
        405: f"{request.url.path[:200]} does not answer {request.method}",
    }.get(error.status_code, str(error.detail))
    error_type: ErrorType = "not_found" if error.status_code == 404 else "validation"
    return _response(error.status_code, sentence, error_type, error.headers)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    status, sentence = describe_faults(error.errors(), request.headers.get("content-type", ""))
    return _response(status, sentence, "validation")


def _headers_of(error: ManifoldError) -> dict[str, str]:
    if isinstance(error, OverloadedError):
        return {"retry-after": str(math.ceil(error.retry_after_s))}
    if isinstance(error, UnauthorizedError):
        return {"www-authenticate": "Bearer"}
    if isinstance(error, ConflictError) and error.generation is not None:
        return {"etag": f'"{error.generation}"'}
    if isinstance(error, UnavailableError):
        # The next request of this client should open a new connection, to a server that is not on its way out.
        return {"retry-after": str(math.ceil(_RETRY_UNAVAILABLE_S)), "connection": "close"}
    return {}


def _response(status: int, sentence: str, error_type: ErrorType, headers: Mapping[str, str] | None = None) -> Response:
    content = orjson.dumps({"error": sentence, "error_type": error_type})
    return Response(content, status, dict(headers or {}), "application/json")
