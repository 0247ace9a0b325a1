"""Keys: who may do what. Their tokens are shown once, when they are made."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Path, Response

from app.api.control_schemas import KeyList, KeyRequest, KeyView, NewKey
from app.api.dependencies import Administrator, CurrentRuntime, Rollout, keyed, requires
from app.api.errors import guarded_responses
from app.api.wire import JsonRoute
from app.rollout import Role

router = APIRouter(prefix="/v1/keys", tags=["keys"], route_class=JsonRoute, dependencies=keyed)

KeyId = Annotated[str, Path(max_length=100, description="a key's id, not its token")]


@router.get("", dependencies=[requires(Role.ADMIN)], responses=guarded_responses(503))
async def list_keys(rollout: Rollout) -> KeyList:
    """Every key, without its secret."""
    found = await asyncio.to_thread(rollout.keys)
    return KeyList(keys=[KeyView.model_validate(key) for key in found])


@router.post("", status_code=201, responses=guarded_responses(400, 409, 413, 422, 503))
async def create_key(
    body: KeyRequest, principal: Administrator, runtime: CurrentRuntime, rollout: Rollout, response: Response
) -> NewKey:
    """A new key. With the first one the server asks everybody for a key, so it must have the role admin."""
    roles = frozenset(body.roles)
    runtime.access.check_new_key(body.name, roles)
    key, token = await asyncio.to_thread(rollout.create_key, principal, body.name, roles)
    response.headers["cache-control"] = "no-store"
    return NewKey(**KeyView.model_validate(key).model_dump(), token=token)


@router.delete("/{key_id}", status_code=204, responses=guarded_responses(404, 409, 413, 422, 503))
async def revoke_key(key_id: KeyId, principal: Administrator, runtime: CurrentRuntime, rollout: Rollout) -> None:
    """From the moment that a server has followed, nobody is let in with it."""
    runtime.access.check_revocation(key_id)
    await asyncio.to_thread(rollout.revoke_key, principal, key_id)
