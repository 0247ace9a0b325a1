"""What endpoints ask for by type. `async`, because FastAPI would send plain functions to a thread."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from app.domain import Snapshot
from app.service.inference import InferenceService
from app.service.runtime import Runtime


async def _runtime(request: Request) -> Runtime:
    runtime: Runtime = request.state.runtime
    return runtime


async def _inference(request: Request) -> InferenceService:
    runtime: Runtime = request.state.runtime
    return runtime.inference


async def _snapshot(request: Request) -> Snapshot:
    runtime: Runtime = request.state.runtime
    return runtime.catalog.snapshot


async def _request_id(request: Request) -> str:
    request_id: str = request.state.request_id
    return request_id


CurrentRuntime = Annotated[Runtime, Depends(_runtime)]
Inference = Annotated[InferenceService, Depends(_inference)]
CurrentSnapshot = Annotated[Snapshot, Depends(_snapshot)]
RequestId = Annotated[str, Depends(_request_id)]
