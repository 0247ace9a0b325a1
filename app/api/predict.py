"""POST /v1/predict."""

from __future__ import annotations

from fastapi import APIRouter, Response

from app.api.dependencies import Caller, CurrentRuntime, RequestId, keyed
from app.api.errors import guarded_responses
from app.api.schemas import PredictRequest, PredictResponse
from app.api.wire import JsonRoute, json_response

router = APIRouter(prefix="/v1", tags=["inference"], route_class=JsonRoute, dependencies=keyed)


@router.post("/predict", response_model=PredictResponse, responses=guarded_responses(400, 404, 413, 422, 503, 504))
async def predict(body: PredictRequest, runtime: CurrentRuntime, request_id: RequestId, principal: Caller) -> Response:
    """Every prediction for one text, or for each of several, from one shared pass.

    A task that fails at run time fails alone: its answer holds `error` and `error_type`.
    """
    prediction = await runtime.inference.predict(
        body.texts(), body.tasks, body.truncate, unit=body.unit, request_id=request_id, principal=principal
    )
    answer = {
        "request_id": request_id,
        "model": runtime.engine.spec.name,
        "generation": prediction.generation,
        "results": prediction.results,
        "usage": prediction.usage,
    }
    return json_response(answer, prediction.timings)
