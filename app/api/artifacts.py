"""GET /v1/tasks/{task}/versions/{version}/artifact: what was handed in, handed out again as one tar."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Response

from app.api.dependencies import Rollout, TaskName, VersionNumber, keyed, requires
from app.api.errors import guarded_responses
from app.rollout import Role

_MODE = 0o644
_TYPE = "application/x-tar"
_TAR: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {_TYPE: {"schema": {"type": "string", "format": "binary"}}},
        "description": "the artifact's files",
    }
}

router = APIRouter(
    prefix="/v1/tasks/{task}/versions/{version}",
    tags=["control"],
    dependencies=[*keyed, requires(Role.PUBLISH, Role.APPROVE, Role.OPERATE)],
)


# A plain function: FastAPI sends it to a thread, and predictions are not held up.
@router.get("/artifact", response_class=Response, responses=guarded_responses(404, 422, 503) | _TAR)
def hand_out(task: TaskName, version: VersionNumber, rollout: Rollout) -> Response:
    """The artifact's files as they were handed in, an uncompressed tar. `etag` is their digest.

    A folder that came straight from PEFT has the manifest that was made of it.
    """
    record, files = rollout.artifact(task, version)
    headers = {
        "etag": f'"{record.digest}"',
        "content-disposition": f'attachment; filename="{record.task}-{record.version}.tar"',
    }
    return Response(_tar(files), headers=headers, media_type=_TYPE)


def _tar(files: Mapping[str, bytes]) -> bytes:
    """The same bytes for the same files."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as tar:
        for name, content in sorted(files.items()):
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), _MODE
            tar.addfile(member, io.BytesIO(content))
    return written.getvalue()
