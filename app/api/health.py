"""Probes and /info. They take no permit and touch no worker, so a full server still answers them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import anyio.to_thread
from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse

from app.api.dependencies import CurrentRuntime, keyed
from app.api.errors import error_responses, guarded_responses
from app.api.schemas import BackboneView, Health, HealthDetails, Info, LimitsView
from app.config import Settings
from app.domain import BackboneSpec

router = APIRouter(tags=["health"])
_ONE_AT_A_TIME = anyio.CapacityLimiter(1)


@router.get("/livez", responses=error_responses(503))
async def livez(runtime: CurrentRuntime) -> Health:
    """503 only where a restart is the cure: the engine is dead. Stays 200 while draining."""
    runtime.check_live()
    return Health()


@router.get("/readyz", responses=error_responses(503))
async def readyz(runtime: CurrentRuntime) -> Health:
    """200 while new requests are welcome: loaded, a forward succeeded, the engine lives, not draining."""
    runtime.check_ready()
    return Health()


@router.get("/healthz", responses=error_responses(503))
async def healthz(runtime: CurrentRuntime) -> HealthDetails:
    """Ready, with figures for people."""
    runtime.check_ready()
    return HealthDetails(
        generation=runtime.catalog.snapshot.generation,
        tasks=len(runtime.catalog.snapshot.tasks),
        queue_rows=runtime.engine.queue_rows,
        in_flight=runtime.admission.in_flight,
        index_up=runtime.index_health().up,
        index_staleness_s=round(runtime.index_health().staleness_s, 3),
    )


@router.get("/metrics", response_class=PlainTextResponse, responses=error_responses(500))
async def metrics(runtime: CurrentRuntime) -> Response:
    """Everything that is measured, in Prometheus' text format."""
    # With many tasks it takes milliseconds. asyncio's own threads may all wait for a slow store, just when it matters.
    content, media_type = await anyio.to_thread.run_sync(runtime.metrics.render, limiter=_ONE_AT_A_TIME)
    return Response(content, media_type=media_type)


@router.get("/info", responses=guarded_responses(), dependencies=keyed)
async def info(runtime: CurrentRuntime) -> Info:
    """The backbone, what is live, what was left out and why, and the limits."""
    snapshot = runtime.catalog.snapshot
    return Info(
        software=software_version(),
        backbone=_backbone(runtime.engine.spec),
        generation=snapshot.generation,
        tasks=sorted(snapshot.tasks),
        representations=sorted(snapshot.representations),
        left_out=dict(runtime.catalog.left_out),
        limits=_limits(runtime.settings, runtime.engine.max_batch_tokens),
    )


def software_version() -> str:
    try:
        return version("manifold")
    except PackageNotFoundError:  # run from a checkout that was not installed
        return "0+unknown"


def _backbone(spec: BackboneSpec) -> BackboneView:
    return BackboneView.model_validate(spec, from_attributes=True)


def _limits(settings: Settings, max_batch_tokens: int) -> LimitsView:
    """The engine's own number: where the setting is unset, the device decides."""
    return LimitsView(
        max_concurrent_requests=settings.max_concurrent_requests,
        max_client_batch_size=settings.max_client_batch_size,
        payload_limit_bytes=settings.payload_limit_bytes,
        deadline_ms=settings.deadline_ms,
        max_batch_tokens=max_batch_tokens,
    )
