"""What a request's span says: OpenTelemetry's HTTP attributes, what answered and what it cost. Never a text."""

from __future__ import annotations

from starlette.types import Scope

from app.api.access_log import versions
from app.errors import ManifoldError
from app.service.inference import Embeddings, Prediction
from app.telemetry.tracing import Attribute, Description

_METHODS = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"})
_GONE = "client_gone"  # the answer did not begin before its client left


def describe(scope: Scope, status: int | None, error: Exception | None) -> Description:
    """`status`: of the answer, where one began. `error`: what the application raised.

    As the conventions say, a caller's mistake is no error of this span.
    """
    is_expected = error is None or isinstance(error, ManifoldError)
    is_ours = status is not None and (status >= 500 or not is_expected)
    attributes = _http(scope) | _of_manifold(scope)
    if status is None:
        attributes["error.type"] = _GONE
    else:
        attributes["http.response.status_code"] = status
    if is_ours:
        attributes["error.type"] = type(error).__name__ if error is not None else str(status)
    route = scope.get("route")
    method = _method(scope)
    name = "HTTP" if method == "_OTHER" else method
    return Description(
        name if route is None else f"{name} {route.path}", attributes, _sentence(error) if is_ours else None
    )


def _http(scope: Scope) -> dict[str, Attribute]:
    attributes: dict[str, Attribute] = {
        "http.request.method": _method(scope),
        "url.scheme": scope["scheme"],
        "url.path": scope["path"][:200],
        "network.protocol.version": scope["http_version"],
    }
    route = scope.get("route")
    if route is not None:
        attributes["http.route"] = route.path
    return attributes


def _method(scope: Scope) -> str:
    """Names of spans are few, and a client can make any method up."""
    return str(scope["method"]) if scope["method"] in _METHODS else "_OTHER"


def _of_manifold(scope: Scope) -> dict[str, Attribute]:
    said = scope["state"].get("said")
    attributes: dict[str, Attribute] = {"manifold.request_id": scope["state"]["request_id"]}
    if isinstance(said, (Prediction, Embeddings)):
        attributes |= {
            "manifold.generation": said.generation,
            "manifold.tokens": said.usage.tokens,
            "manifold.rows": said.usage.rows,
            "manifold.passes": said.usage.passes,
            "manifold.cached": said.usage.cached,
        }
    if isinstance(said, Prediction):
        attributes["manifold.versions"] = tuple([f"{name}: {version}" for name, version in versions(said).items()])
    return attributes


def _sentence(error: Exception | None) -> str:
    """Ours are made to be read by anybody; what others say may hold a text."""
    return str(error) if isinstance(error, ManifoldError) else "the log has the cause"
