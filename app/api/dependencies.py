"""What endpoints ask for by type. `async`, because FastAPI would send plain functions to a thread."""

from __future__ import annotations

import re
from typing import Annotated, Any

from fastapi import Depends, Header, Path, Query, Request, Security
from fastapi.security import HTTPBearer

from app.domain import Snapshot
from app.errors import MalformedError
from app.rollout import Principal, Role
from app.service.ports import RolloutPort
from app.service.runtime import Runtime

_GENERATION = re.compile(r'("?)([0-9]{1,18})\1')
# The gatekeeper has read the header already; this tells /docs and clients that are made from it.
_bearer = HTTPBearer(auto_error=False, scheme_name="key", description="a key; none is needed where there are no keys")


async def _runtime(request: Request) -> Runtime:
    runtime: Runtime = request.state.runtime
    return runtime


async def _rollout(request: Request) -> RolloutPort:
    runtime: Runtime = request.state.runtime
    return runtime.rollout


async def _snapshot(request: Request) -> Snapshot:
    runtime: Runtime = request.state.runtime
    return runtime.catalog.snapshot


def requires(*roles: Role) -> Any:
    """What an endpoint depends on that only a principal with one of these roles may ask."""

    async def require(request: Request) -> Principal:
        principal: Principal = request.state.principal
        runtime: Runtime = request.state.runtime
        runtime.access.require(principal, *roles)
        return principal

    return Depends(require)


async def _if_match(
    if_match: Annotated[
        str | None,
        Header(description='the generation that the change was made from, such as "17"; absent or *: whatever it is'),
    ] = None,
) -> int | None:
    if if_match is None or if_match.strip() == "*":
        return None
    found = _GENERATION.fullmatch(if_match.strip())
    if found is None:
        raise MalformedError('the header if-match must hold one generation, such as "17", or *')
    return int(found[2])


CurrentRuntime = Annotated[Runtime, Depends(_runtime)]
Rollout = Annotated[RolloutPort, Depends(_rollout)]
CurrentSnapshot = Annotated[Snapshot, Depends(_snapshot)]

keyed = [Security(_bearer)]  # dependencies of a router whose endpoints want any key at all
Publisher = Annotated[Principal, requires(Role.PUBLISH)]
Approver = Annotated[Principal, requires(Role.APPROVE)]
Operator = Annotated[Principal, requires(Role.OPERATE)]
Administrator = Annotated[Principal, requires(Role.ADMIN)]

TaskName = Annotated[str, Path(max_length=200, description="a task's name")]
VersionNumber = Annotated[int, Path(ge=1, le=10**9, description="a version's number")]
Limit = Annotated[int, Query(ge=1, le=1000, description="how many at most")]
IfMatch = Annotated[int | None, Depends(_if_match)]
