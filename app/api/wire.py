"""How bodies enter and leave: JSON read and written by orjson, which refuses lone surrogates and invalid UTF-8."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.routing import APIRoute

from app.api.middleware import milliseconds
from app.service.usage import Timings


class JsonRequest(Request):
    async def json(self) -> Any:
        return orjson.loads(await self.body())


class JsonRoute(APIRoute):
    """A route whose body is read by orjson: strict, fast, and bounded in depth."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(JsonRequest(request.scope, request.receive))

        return handle


def json_response(body: Mapping[str, Any], timings: Timings) -> Response:
    """`body` may hold dataclasses and numpy arrays. The stages' times go into the headers."""
    headers = {
        "x-tokenization-time": milliseconds(timings.tokenization_s),
        "x-queue-time": milliseconds(timings.queue_s),
        "x-inference-time": milliseconds(timings.inference_s),
    }
    content = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(content, headers=headers, media_type="application/json")
