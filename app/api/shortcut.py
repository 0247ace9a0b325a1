"""The short way to the hot endpoints: right requests go past FastAPI's router and dependencies, all others through.

FastAPI describes these endpoints, and says what is wrong with a request. Knows nothing of what they do.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.middleware import header
from app.rollout import Role

_JSON = frozenset({"application/json", "application/json; charset=utf-8"})  # FastAPI knows other spellings


class Shortcut:
    """`routes`: of endpoints that take `body` and `request`, from those with the role predict.

    Between two batches all of this code is cold: what a request passes on FastAPI's way, before it is known where it
    goes and what it holds, took longer than the rest of HTTP together.
    """

    def __init__(self, app: ASGIApp, routes: Iterable[BaseRoute]) -> None:
        self.app = app
        self.routes = {("POST", route.path): route for route in routes if isinstance(route, APIRoute)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self.routes.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        body = None if route is None else _right_body(route, scope)
        if route is None or body is None:
            return await self.app(scope, receive, send)
        scope["route"] = route
        response: Response = await route.endpoint(body, Request(scope, receive))
        await response(scope, receive, send)


def _right_body(route: APIRoute, scope: Scope) -> Any:
    """None where FastAPI would not call the endpoint."""
    state = scope["state"]
    if header(scope, b"content-type") not in _JSON or not state["principal"].has(Role.PREDICT):
        return None
    assert route.body_field is not None
    try:
        body, _ = route.body_field.validate(orjson.loads(state["body"]))
    except orjson.JSONDecodeError:
        return None
    return body
