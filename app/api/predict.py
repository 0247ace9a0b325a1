"""POST /v1/predict."""

from __future__ import annotations

import orjson
from fastapi import APIRouter, Request, Response

from app.api.dependencies import keyed, requires
from app.api.errors import guarded_responses
from app.api.schemas import PredictRequest, PredictResponse
from app.api.wire import JsonRoute, json_response
from app.rollout import Role
from app.service.runtime import Runtime

router = APIRouter(prefix="/v1", tags=["inference"], route_class=JsonRoute, dependencies=keyed)


@router.post(
    "/predict",
    response_model=PredictResponse,
    dependencies=[requires(Role.PREDICT)],
    responses=guarded_responses(400, 404, 413, 422, 503, 504),
)
async def predict(body: PredictRequest, request: Request) -> Response:
    """Every prediction for one text, or for each of several, from one shared pass.

    A task that fails at run time fails alone: its answer holds `error` and `error_type`.
    """
    runtime: Runtime = request.state.runtime
    request_id: str = request.state.request_id
    prediction = await runtime.inference.predict(
        body.texts(),
        body.tasks,
        body.truncate,
        unit=body.unit,
        request_id=request_id,
        principal=request.state.principal,
        trace=request.state.trace,
    )
    request.state.said = prediction
    answer = {
        "request_id": request_id,
        "model": runtime.engine.spec.name,
        "generation": prediction.generation,
        "results": orjson.Fragment(prediction.results_json),
        "usage": prediction.usage,
    }
    return json_response(answer, prediction.timings)
