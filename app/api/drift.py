"""How the texts and answers of live versions stand to those that the versions were measured on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from fastapi import APIRouter, Query

from app.api.dependencies import CurrentRuntime, CurrentSnapshot, keyed
from app.api.errors import guarded_responses
from app.api.schemas import DriftList, DriftView
from app.config import LEAST_WINDOW
from app.service.drift import VersionDrift
from app.service.resolve import find_task

router = APIRouter(prefix="/v1/drift", tags=["drift"], dependencies=keyed)

OnlyTask = Annotated[str | None, Query(max_length=200, description="only this task; absent: every live one")]


@router.get("", responses=guarded_responses(404, 422))
def show_drift(runtime: CurrentRuntime, snapshot: CurrentSnapshot, task: OnlyTask = None) -> DriftList:
    """Each live version's last texts beside its baseline: scores, labels, lengths, unknown tokens."""
    tasks = snapshot.tasks.values() if task is None else [find_task(snapshot, task)]
    versions = [version for one in tasks for version in runtime.drift.drift_of(one)]
    return DriftList(
        window=runtime.settings.drift_window,
        least_texts=LEAST_WINDOW,
        drift=[view for version in versions for view in _views(version)],
        without_baseline=[f"{version.task}@{version.version}" for version in versions if not version.has_baseline],
    )


def _views(version: VersionDrift) -> Iterator[DriftView]:
    for drift in version.kinds:
        yield DriftView(
            task=version.task,
            version=version.version,
            arm=version.arm,
            kind=drift.kind,
            psi=drift.psi,
            p_value=drift.p_value,
            texts=drift.texts,
            baseline_texts=drift.baseline_texts,
            label=drift.label,
            drifting=drift.is_drifting,
        )
