"""POST /v1/embeddings, in OpenAI's shape."""

from __future__ import annotations

import base64
from typing import Literal

import numpy as np
from fastapi import APIRouter, Request, Response

from app.api.dependencies import keyed, requires
from app.api.errors import guarded_responses
from app.api.schemas import EmbeddingsRequest, EmbeddingsResponse
from app.api.wire import JsonRoute, json_response
from app.rollout import Role
from app.service.inference import Embeddings, InferenceService

router = APIRouter(prefix="/v1", tags=["inference"], route_class=JsonRoute, dependencies=keyed)


@router.post(
    "/embeddings",
    response_model=EmbeddingsResponse,
    dependencies=[requires(Role.PREDICT)],
    responses=guarded_responses(400, 404, 413, 422, 503, 504),
)
async def embed(body: EmbeddingsRequest, request: Request) -> Response:
    """A vector of length 1 for each text, in OpenAI's shape: their clients work against it."""
    inference: InferenceService = request.state.runtime.inference
    embeddings = await inference.embed(
        body.texts(), body.model, body.truncate, body.dimensions, trace=request.state.trace
    )
    request.state.said = embeddings
    tokens = embeddings.usage.tokens
    answer = {
        "object": "list",
        "data": _data(embeddings, body.encoding_format),
        "model": body.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    return json_response(answer, embeddings.timings)


def _data(embeddings: Embeddings, encoding_format: Literal["float", "base64"]) -> list[dict[str, object]]:
    """float32 in both forms: as the shortest digits that name the same number, or as base64 of its bytes."""
    vectors = [np.asarray(vector, dtype="<f4") for vector in embeddings.vectors]
    encoded = vectors if encoding_format == "float" else [base64.b64encode(v.tobytes()).decode() for v in vectors]
    return [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(encoded)]
