"""Releases: several tasks' traffic in one change, and back again."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Path, Response

from app.api.control_schemas import Because, ReleaseList, ReleaseRequest, ReleaseView, reason_of
from app.api.dependencies import IfMatch, Limit, Operator, Rollout, keyed
from app.api.errors import guarded_responses
from app.api.wire import JsonRoute

router = APIRouter(prefix="/v1/releases", tags=["control"], route_class=JsonRoute, dependencies=keyed)

ReleaseId = Annotated[str, Path(max_length=100, description="a release's id")]


@router.post("", status_code=201, responses=guarded_responses(400, 404, 409, 413, 422, 503))
async def release(
    body: ReleaseRequest, principal: Operator, rollout: Rollout, if_match: IfMatch, response: Response
) -> ReleaseView:
    """Changes the traffic of all these tasks at once, or of none."""
    wishes = {task: traffic.wish() for task, traffic in body.tasks.items()}
    made = await asyncio.to_thread(rollout.release, principal, wishes, body.reason, if_match)
    response.headers["etag"] = f'"{made.generation}"'
    return ReleaseView.model_validate(made)


@router.get("", responses=guarded_responses(422, 503))
async def list_releases(rollout: Rollout, limit: Limit = 20) -> ReleaseList:
    """The newest first."""
    found = await asyncio.to_thread(rollout.releases, limit)
    return ReleaseList(releases=[ReleaseView.model_validate(made) for made in found])


@router.post("/{release_id}/rollback", responses=guarded_responses(400, 404, 409, 413, 422, 503))
async def rollback_release(
    release_id: ReleaseId, principal: Operator, rollout: Rollout, body: Because | None = None
) -> ReleaseView:
    """Each of its tasks gets the traffic that it had before. 409 where one was changed since."""
    undone = await asyncio.to_thread(rollout.rollback_release, principal, release_id, reason_of(body))
    return ReleaseView.model_validate(undone)
