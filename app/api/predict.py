"""POST /v1/predict."""

from __future__ import annotations

from fastapi import APIRouter, Response

from app.api.dependencies import CurrentRuntime, RequestId
from app.api.errors import error_responses
from app.api.schemas import PredictRequest, PredictResponse
from app.api.wire import JsonRoute, json_response

router = APIRouter(prefix="/v1", tags=["inference"], route_class=JsonRoute)


@router.post(
    "/predict", response_model=PredictResponse, responses=error_responses(400, 404, 413, 422, 429, 500, 503, 504)
)
async def predict(body: PredictRequest, runtime: CurrentRuntime, request_id: RequestId) -> Response:
    """Every prediction for one text, or for each of several, from one shared pass.

    A task that fails at run time fails alone: its answer holds `error` and `error_type`.
    """
    prediction = await runtime.inference.predict(body.texts(), body.tasks, body.truncate)
    answer = {
        "request_id": request_id,
        "model": runtime.engine.spec.name,
        "generation": prediction.generation,
        "results": prediction.results,
        "usage": prediction.usage,
    }
    return json_response(answer, prediction.timings)
