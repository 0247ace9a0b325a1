"""How this server stands to the index, and what to do after the index lost something."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter

from app.api.control_schemas import Because, Generation, IndexView, reason_of
from app.api.dependencies import Administrator, Rollout, keyed
from app.api.errors import guarded_responses
from app.api.wire import JsonRoute

router = APIRouter(prefix="/v1/index", tags=["control"], route_class=JsonRoute, dependencies=keyed)


@router.get("", responses=guarded_responses())
async def show_index(rollout: Rollout) -> IndexView:
    """Whether the index answers, how old this server's view of it is, and which versions which servers cannot serve."""
    return IndexView.model_validate(await asyncio.to_thread(rollout.index_state))


@router.post("/restore", responses=guarded_responses(400, 409, 413, 422, 503))
async def restore(principal: Administrator, rollout: Rollout, body: Because | None = None) -> Generation:
    """Writes back what the index lost and this server still knows. What the index has stays as it is."""
    return Generation(generation=await asyncio.to_thread(rollout.restore, principal, reason_of(body)))


@router.post("/accept", responses=guarded_responses(400, 409, 413, 422, 503))
async def accept(principal: Administrator, rollout: Rollout, body: Because | None = None) -> Generation:
    """Takes the index as it is now: tasks that are gone from it are not served any more."""
    return Generation(generation=await asyncio.to_thread(rollout.accept, principal, reason_of(body)))
