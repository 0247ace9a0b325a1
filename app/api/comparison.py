"""How versions did side by side, and the truth that tells which of them was right."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter

from app.api.control_schemas import FeedbackAnswer, FeedbackRequest
from app.api.dependencies import CurrentSnapshot, Rollout, TaskName, keyed, requires
from app.api.errors import guarded_responses
from app.api.wire import JsonRoute
from app.rollout import Role
from app.service.comparison import Comparison, truth_of
from app.service.resolve import find_task

router = APIRouter(prefix="/v1", tags=["comparison"], route_class=JsonRoute, dependencies=keyed)


@router.get("/tasks/{task}/comparison", responses=guarded_responses(404, 422, 503))
async def compare(task: TaskName, rollout: Rollout) -> Comparison:
    """The champion beside each challenger and shadow, on the texts that both scored."""
    return await asyncio.to_thread(rollout.comparison, task)


@router.post(
    "/feedback", dependencies=[requires(Role.PREDICT)], responses=guarded_responses(400, 404, 409, 413, 422, 503)
)
async def report_truth(body: FeedbackRequest, rollout: Rollout, snapshot: CurrentSnapshot) -> FeedbackAnswer:
    """What was right for one input of an earlier prediction. Only compared answers are kept, and only for a while."""
    spans = None if body.spans is None else [(span.label, span.start, span.end) for span in body.spans]
    champion = find_task(snapshot, body.task).champion
    truth = truth_of(champion, label=body.label, labels=body.labels, value=body.value, spans=spans)
    recorded = await asyncio.to_thread(rollout.feedback, body.request_id, body.task, body.input, truth)
    return FeedbackAnswer(recorded=recorded)
