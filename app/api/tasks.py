"""GET /v1/tasks and below: what can be asked, what it costs, and what the index has of it."""

from __future__ import annotations

import json
from typing import Literal

from fastapi import APIRouter, Response

from app.api.control_schemas import RecordView, TrafficView
from app.api.dependencies import CurrentRuntime, CurrentSnapshot, Limit, TaskName, VersionNumber, keyed
from app.api.errors import guarded_responses
from app.api.schemas import PrefixView, ReadoutView, TaskBrief, TaskList, TaskView, VersionView
from app.domain import Snapshot
from app.rollout import TaskRecord, VersionRecord
from app.service.catalog import Catalog
from app.service.resolve import find_record, find_version

router = APIRouter(prefix="/v1/tasks", tags=["tasks"], dependencies=keyed)

# Those that read many cards are plain functions: FastAPI sends them to a thread, and predictions are not held up.


@router.get("", responses=guarded_responses())
def list_tasks(runtime: CurrentRuntime, snapshot: CurrentSnapshot) -> TaskList:
    """Every task, those without a live version too, and the representations that have embeddings."""
    return TaskList(
        generation=snapshot.generation,
        tasks=[_brief(runtime.catalog, record) for record in _tasks(snapshot)],
        representations=sorted(snapshot.representations),
    )


@router.get("/{task}", responses=guarded_responses(404, 422))
def show_task(
    task: TaskName, runtime: CurrentRuntime, snapshot: CurrentSnapshot, response: Response, limit: Limit = 100
) -> TaskView:
    """One task with its live versions and the newest others. `etag` is what a change of its traffic may name."""
    record, catalog = find_record(snapshot, task), runtime.catalog
    response.headers["etag"] = f'"{snapshot.generation}"'
    return TaskView(
        **_brief(catalog, record).model_dump(),
        generation=snapshot.generation,
        previous=list(record.previous),
        failures={name: why for name, why in catalog.left_out.items() if name.rpartition("@")[0] == task},
        details=[_view(catalog, record, record.versions[number]) for number in _shown(record, limit)],
    )


@router.get("/{task}/versions/{version}", responses=guarded_responses(404, 422))
async def show_version(
    task: TaskName, version: VersionNumber, runtime: CurrentRuntime, snapshot: CurrentSnapshot
) -> VersionView:
    """One version: its state, what it reads, what it costs, and the figures that it came with."""
    record = find_record(snapshot, task)
    return _view(runtime.catalog, record, find_version(record, version))


def _tasks(snapshot: Snapshot) -> list[TaskRecord]:
    records = [record for name, record in snapshot.view.tasks.items() if name not in snapshot.representations]
    return sorted((record for record in records if record.versions), key=lambda record: record.name)


def _shown(record: TaskRecord, limit: int) -> list[int]:
    live = record.traffic.live if record.traffic is not None else ()
    return sorted({*live, *sorted(record.versions)[-limit:]})


def _brief(catalog: Catalog, record: TaskRecord) -> TaskBrief:
    traffic = record.traffic
    number = max(record.versions) if traffic is None else traffic.champion
    version = catalog.describe(record.versions[number])
    return TaskBrief(
        name=record.name,
        problem_type=version.problem_type,
        input_kind=version.input_kind,
        labels=list(version.labels),
        traffic=None if traffic is None else TrafficView.model_validate(traffic),
        versions=sorted(record.versions),
        passes=catalog.passes_alone(version),
    )


def _view(catalog: Catalog, task: TaskRecord, record: VersionRecord) -> VersionView:
    version = catalog.describe(record)
    readout = version.readout
    return VersionView(
        **RecordView.model_validate(record).model_dump(),
        arm=_arm(task, record.version),
        problem_type=version.problem_type,
        input_kind=version.input_kind,
        labels=list(version.labels),
        thresholds=list(version.thresholds),
        readout=ReadoutView(
            kind=readout.kind,
            layers=list(readout.layers),
            num_queries=readout.num_queries,
            num_members=readout.num_members,
        ),
        prefixes=[
            PrefixView(digest=p.digest, num_virtual_tokens=p.num_virtual_tokens, first_layer=p.first_layer)
            for p in version.prefixes
        ],
        passes=catalog.passes_alone(version),
        evaluation=json.loads(record.card).get("evaluation", {}),
    )


def _arm(task: TaskRecord, number: int) -> Literal["champion", "challenger", "shadow"] | None:
    traffic = task.traffic
    if traffic is None:
        return None
    if number == traffic.champion:
        return "champion"
    if any(challenger.version == number for challenger in traffic.challengers):
        return "challenger"
    return "shadow" if number in traffic.shadow else None
