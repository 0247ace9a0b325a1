"""What operators do to one task: publish, approve, reject, retire, traffic, rollback."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Depends, File, Form, Path, Request, Response, UploadFile

from app.api.control_schemas import Because, Decided, RecordView, TrafficAnswer, TrafficRequest, TrafficView, reason_of
from app.api.dependencies import Approver, IfMatch, Operator, Publisher, Rollout, TaskName, VersionNumber, keyed
from app.api.errors import guarded_responses
from app.api.wire import JsonRoute
from app.domain import PLAIN_NAME, InputKind, ProblemType
from app.errors import UnservableError
from app.rollout import Principal, State, TaskRecord, VersionRecord
from app.service.ports import RolloutPort

router = APIRouter(prefix="/v1/tasks/{task}", tags=["control"], route_class=JsonRoute, dependencies=keyed)

_MAX_FILES = 16
_FIELDS = {"files", "problem_type", "labels", "input", "reason"}


async def _files(
    request: Request,
    files: Annotated[list[UploadFile], File(max_length=_MAX_FILES, description="the artifact's files, by their names")],
) -> dict[str, bytes]:
    """Their contents by name. Raises UnservableError for names that are paths, and for fields that we do not know."""
    unknown = sorted(set(await request.form()) - _FIELDS)
    if unknown:
        raise UnservableError(f"{unknown[0][:100]} is not a field of this request: it has {', '.join(sorted(_FIELDS))}")
    contents: dict[str, bytes] = {}
    for upload in files:
        name = upload.filename or ""
        if not PLAIN_NAME.fullmatch(name):
            raise UnservableError(f'the file name "{name[:100]}" is not plain: send letters, digits, ., _ and - alone')
        if name in contents:
            raise UnservableError(f"the file {name} was sent twice")
        contents[name] = await upload.read()
    return contents


async def _options(
    problem_type: Annotated[ProblemType | None, Form(description="where the folder does not say it")] = None,
    labels: Annotated[list[str] | None, Form(description="in the head's order; repeated, or with commas")] = None,
    input_kind: Annotated[InputKind | None, Form(alias="input", description="where the folder does not say it")] = None,
) -> dict[str, Any]:
    """What completes a folder that comes straight from PEFT."""
    named = [label.strip() for part in labels or () for label in part.split(",") if label.strip()]
    options = {"problem_type": problem_type, "labels": named, "input": input_kind}
    return {name: value for name, value in options.items() if value}


# A new task's name becomes part of paths and of task@version.
NewName = Annotated[str, Path(pattern="^[a-z0-9][a-z0-9_.-]{0,63}$", description="the task's name")]
Files = Annotated[dict[str, bytes], Depends(_files)]
Options = Annotated[dict[str, Any], Depends(_options)]
FormReason = Annotated[str, Form(max_length=1000, description="why, for the audit log")]


@router.post(
    "/versions",
    status_code=201,
    responses=guarded_responses(400, 409, 413, 422, 503) | {200: {"model": Decided, "description": "it was there"}},
)
async def publish(
    task: NewName,
    principal: Publisher,
    rollout: Rollout,
    files: Files,
    options: Options,
    response: Response,
    reason: FormReason = "",
) -> Decided:
    """Hands in an artifact as the next version of a task, a candidate. 200 where the task has this content already."""
    published = await asyncio.to_thread(rollout.publish, principal, task, files, options, reason)
    if not published.is_new:
        response.status_code = 200
    return _decided(published.record, published.generation)


@router.post("/versions/{version}/approve", responses=guarded_responses(400, 404, 409, 413, 422, 503))
async def approve(
    task: TaskName, version: VersionNumber, principal: Approver, rollout: Rollout, body: Because | None = None
) -> Decided:
    """A candidate may go live from now on. Publisher and approver must differ where keys exist."""
    return await _decide(rollout, principal, task, version, State.APPROVED, body)


@router.post("/versions/{version}/reject", responses=guarded_responses(400, 404, 409, 413, 422, 503))
async def reject(
    task: TaskName, version: VersionNumber, principal: Approver, rollout: Rollout, body: Because | None = None
) -> Decided:
    """A candidate will never go live."""
    return await _decide(rollout, principal, task, version, State.REJECTED, body)


@router.post("/versions/{version}/retire", responses=guarded_responses(400, 404, 409, 413, 422, 503))
async def retire(
    task: TaskName, version: VersionNumber, principal: Approver, rollout: Rollout, body: Because | None = None
) -> Decided:
    """An approved version that is not live will not go live again."""
    return await _decide(rollout, principal, task, version, State.RETIRED, body)


@router.put("/traffic", responses=guarded_responses(400, 404, 409, 413, 422, 503))
async def set_traffic(
    task: TaskName,
    principal: Operator,
    rollout: Rollout,
    if_match: IfMatch,
    body: TrafficRequest,
    response: Response,
) -> TrafficAnswer:
    """Which version answers, which ones answer a share of the units, which ones are scored beside it."""
    changed = await asyncio.to_thread(rollout.set_traffic, principal, task, body.wish(), body.reason, if_match)
    return _traffic_answer(*changed, response)


@router.post("/rollback", responses=guarded_responses(400, 404, 409, 413, 422, 503))
async def rollback(
    task: TaskName,
    principal: Operator,
    rollout: Rollout,
    if_match: IfMatch,
    response: Response,
    body: Because | None = None,
) -> TrafficAnswer:
    """Back to the champion before this one, alone."""
    changed = await asyncio.to_thread(rollout.rollback, principal, task, reason_of(body), if_match)
    return _traffic_answer(*changed, response)


async def _decide(
    rollout: RolloutPort, principal: Principal, task: str, version: int, state: State, body: Because | None
) -> Decided:
    return _decided(*await asyncio.to_thread(rollout.decide, principal, task, version, state, reason_of(body)))


def _decided(record: VersionRecord, generation: int) -> Decided:
    return Decided(**RecordView.model_validate(record).model_dump(), generation=generation)


def _traffic_answer(record: TaskRecord, generation: int, response: Response) -> TrafficAnswer:
    response.headers["etag"] = f'"{generation}"'
    traffic = TrafficView.model_validate(record.traffic)
    return TrafficAnswer(task=record.name, traffic=traffic, previous=list(record.previous), generation=generation)
