"""GET /v1/tasks and below: what can be asked, and what it costs."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Path

from app.api.dependencies import CurrentRuntime, CurrentSnapshot
from app.api.errors import error_responses
from app.api.schemas import PrefixView, ReadoutView, TaskBrief, TaskList, TaskView, Traffic, VersionView
from app.domain import Task, TaskVersion
from app.service.catalog import Catalog
from app.service.resolve import find_task, find_version

router = APIRouter(prefix="/v1/tasks", tags=["tasks"])

TaskName = Annotated[str, Path(max_length=200, description="a task's name")]
VersionNumber = Annotated[int, Path(ge=1, description="a version's number")]


@router.get("", responses=error_responses(500))
async def list_tasks(runtime: CurrentRuntime, snapshot: CurrentSnapshot) -> TaskList:
    """Every live task, and the representations that have embeddings."""
    return TaskList(
        generation=snapshot.generation,
        tasks=[_brief(runtime.catalog, task) for task in snapshot.tasks.values()],
        representations=sorted(snapshot.representations),
    )


@router.get("/{task}", responses=error_responses(404, 422, 500))
async def show_task(task: TaskName, runtime: CurrentRuntime, snapshot: CurrentSnapshot) -> TaskView:
    """One task with all its versions."""
    found = find_task(snapshot, task)
    brief = _brief(runtime.catalog, found)
    details = [_view(runtime.catalog, found, version) for version in found.versions.values()]
    return TaskView(**brief.model_dump(), generation=snapshot.generation, details=details)


@router.get("/{task}/versions/{version}", responses=error_responses(404, 422, 500))
async def show_version(
    task: TaskName, version: VersionNumber, runtime: CurrentRuntime, snapshot: CurrentSnapshot
) -> VersionView:
    """One version: what it reads, what it costs, and the figures that it came with."""
    found = find_task(snapshot, task)
    return _view(runtime.catalog, found, find_version(found, version))


def _brief(catalog: Catalog, task: Task) -> TaskBrief:
    champion = task.versions[task.champion]
    return TaskBrief(
        name=task.name,
        problem_type=champion.problem_type,
        input_kind=champion.input_kind,
        labels=list(champion.labels),
        traffic=Traffic(champion=task.champion, challenger=task.challenger),
        versions=sorted(task.versions),
        passes=catalog.passes_alone(champion),
    )


def _view(catalog: Catalog, task: Task, version: TaskVersion) -> VersionView:
    readout = version.readout
    return VersionView(
        version=version.version,
        digest=version.digest,
        state=_state(task, version.version),
        problem_type=version.problem_type,
        input_kind=version.input_kind,
        labels=list(version.labels),
        thresholds=list(version.thresholds),
        readout=ReadoutView(kind=readout.kind, layers=list(readout.layers), num_queries=readout.num_queries),
        prefixes=[
            PrefixView(digest=p.digest, num_virtual_tokens=p.num_virtual_tokens, first_layer=p.first_layer)
            for p in version.prefixes
        ],
        passes=catalog.passes_alone(version),
        evaluation=catalog.evaluations.get(version.digest, {}),
    )


def _state(task: Task, number: int) -> Literal["champion", "challenger", "approved"]:
    if number == task.champion:
        return "champion"
    return "challenger" if number == task.challenger else "approved"
