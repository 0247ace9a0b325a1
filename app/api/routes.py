"""The name of a request's route: its template, so that there are only so many. Knows no endpoint's work."""

from __future__ import annotations

from starlette.types import Scope

PERMITTED = frozenset({"/v1/predict", "/v1/embeddings"})  # those whose work takes a permit
NO_ROUTE = "none"


def route_of(scope: Scope) -> str:
    """Of one that was refused before it was routed too, where its path is a template."""
    found = getattr(scope.get("route"), "path_format", None)
    if found is not None:
        return str(found)
    return str(scope["path"]) if scope["path"] in PERMITTED else NO_ROUTE
