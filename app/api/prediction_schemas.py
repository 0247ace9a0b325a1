"""The wire of GET /v1/predictions, in the words of /docs."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from app.api.control_schemas import Time, View
from app.domain import ProblemType
from app.rollout import State


class DeedView(View):
    action: str
    actor: str
    at: Time
    generation: int = Field(description="of the index after it")
    sequence: int = Field(description="in the audit log")
    reason: str


class AnsweringView(View):
    """A version that answered, as the index has it now."""

    task: str
    version: int
    digest: str
    state: State | None = Field(description="now; null where the index lacks it")
    problem_type: ProblemType | None
    labels: list[str]
    thresholds: dict[str, float] = Field(description="multi-label: a label is given from this score on")
    published: DeedView | None
    decisions: list[DeedView] = Field(description="approved, rejected, retired; oldest first")


class TrafficThenView(View):
    task: str
    generation: int = Field(description="that the answer names")
    traffic: dict[str, Any] | None = Field(description="which versions answered then; null where nothing tells")
    put: DeedView | None


class SearchedView(View):
    url: str = Field(description="without credentials")
    files: int
    size_bytes: int
    oldest_s: float | None = Field(description="seconds since the epoch: when the oldest file searched began")
    damaged: list[str] = Field(description="files that cannot be read: broken, or not for this server")
    stopped_s: float | None = Field(description="not everything older was searched: go on with it as `until`")


class ExplanationView(View):
    request_id: str
    rows: list[dict[str, Any]] = Field(
        description="as they stand in the log, one for each input and task: time, actor, input, generation, reference, "
        "task, version, digest, arm, text_sha256, label or labels or value or spans or error, scores, tokens, "
        "truncated, cached, request_passes, inference_ms; text where texts are kept"
    )
    versions: list[AnsweringView]
    traffic: list[TrafficThenView]
    searched: SearchedView
    gaps: list[str] = Field(description="what could not be told, and why")
