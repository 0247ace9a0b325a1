"""GET /v1/audit: who changed what, when, why, from what to what."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Query

from app.api.control_schemas import AuditEntryView, AuditPage, AuditVerdictView
from app.api.dependencies import Limit, Rollout, keyed, requires
from app.api.errors import guarded_responses
from app.rollout import Role

router = APIRouter(prefix="/v1/audit", tags=["control"], dependencies=[*keyed, requires(Role.AUDIT)])

OfTask = Annotated[str | None, Query(max_length=200, description="only entries of this task")]
After = Annotated[int, Query(ge=0, le=10**15, description="only entries of a higher sequence")]


@router.get("", responses=guarded_responses(422, 503))
async def read_audit(rollout: Rollout, task: OfTask = None, after: After = 0, limit: Limit = 100) -> AuditPage:
    """The log, oldest first. Each entry names its actor, its reason, and what was before and after."""
    entries = await asyncio.to_thread(rollout.audit, task, after, limit)
    return AuditPage(entries=[AuditEntryView.model_validate(entry) for entry in entries])


@router.get("/verify", responses=guarded_responses(503))
async def verify_audit(rollout: Rollout) -> AuditVerdictView:
    """Computes every hash again: an edit, a gap or a cut shows."""
    return AuditVerdictView.model_validate(await asyncio.to_thread(rollout.verify_audit))
