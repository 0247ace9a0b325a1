"""GET /v1/predictions/{request_id}: what answered a request, and who let it."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Path, Query

from app.api.dependencies import CurrentRuntime, keyed, requires
from app.api.errors import guarded_responses
from app.api.prediction_schemas import ExplanationView
from app.rollout import Role

router = APIRouter(prefix="/v1/predictions", tags=["control"], dependencies=[*keyed, requires(Role.AUDIT)])

RequestId = Annotated[str, Path(min_length=1, max_length=128, description="of the prediction")]
Since = Annotated[float | None, Query(ge=0, le=1e11, description="seconds since the epoch: not answered before")]
Until = Annotated[float | None, Query(ge=0, le=1e11, description="seconds since the epoch: not answered after")]


@router.get("/{request_id:path}", responses=guarded_responses(400, 404, 422, 503))
async def explain(
    request_id: RequestId, runtime: CurrentRuntime, since: Since = None, until: Until = None
) -> ExplanationView:
    """What the prediction log has of a request, with each version's state, thresholds, and who approved it and when.

    The newest files are searched first, for some seconds at most.
    """
    return ExplanationView.model_validate(await asyncio.to_thread(runtime.why.explain, request_id, since, until))
