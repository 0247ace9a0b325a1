"""The wire of control: what operators send and read, in the words of /docs. Times are seconds since the epoch."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from app.rollout import Challenger, Gates, Role, State, TrafficWish

_HIGHEST = 10**9
_MAX_ARMS = 100
_MAX_TASKS = 1000
_MAX_LABELS = 1000
_MAX_SPANS = 10_000

Number = Annotated[int, Field(ge=1, le=_HIGHEST)]
Percent = Annotated[float, Field(gt=0, le=100, description="of units, in steps of 0.01")]
Share = Annotated[float, Field(ge=0, le=1)]
Reason = Annotated[str, Field(max_length=1000, description="why, for the audit log")]
Time = Annotated[float, Field(description="seconds since the epoch, by the index's clock")]


class Wire(BaseModel):
    """Wrong types are refused, never converted; a field that we do not know is a mistake of the caller's."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class View(BaseModel):
    """Reads the central types, field by field."""

    model_config = ConfigDict(from_attributes=True)


class Because(Wire):
    reason: Reason = ""


def reason_of(body: Because | None) -> str:
    """Bodies that hold nothing but a reason may be left out."""
    return "" if body is None else body.reason


# -- versions ----------------------------------------------------------------------------------------------------------


class RecordView(View):
    task: str
    version: int
    digest: str = Field(description="its identity: sha256 over the artifact's files")
    state: State
    size_bytes: int
    published_by: str
    published_at: Time
    decided_by: str | None = Field(description="who approved, rejected or retired it last")
    decided_at: Time | None
    reason: str = Field(description="of the last decision, or of publishing")


class Decided(RecordView):
    generation: int = Field(description="of the index after it")


# -- traffic -----------------------------------------------------------------------------------------------------------


class ChallengerBody(Wire):
    model_config = ConfigDict(from_attributes=True)

    version: Number
    percent: Percent


class GatesBody(Wire):
    """Bounds on a canary. Past one, the champion takes over by itself."""

    model_config = ConfigDict(from_attributes=True)

    max_disagreement: Share | None = Field(None, description="share of texts on which both differ")
    max_error_rate: Share | None = Field(None, description="share of the challenger's answers that failed")
    max_latency_ratio: float | None = Field(None, gt=0, description="challenger's mean time over the champion's")
    min_accuracy_gain: float | None = Field(None, description="challenger's accuracy minus the champion's")
    min_count: int = Field(100, ge=1, le=_HIGHEST, description="of what a gate is measured on, before it is looked at")


class TrafficView(View):
    """In the form that PUT takes."""

    champion: int = Field(description="the version that answers")
    challengers: list[ChallengerBody] = Field(description="versions that answer a share of the units")
    shadow: list[int] = Field(description="versions that are scored beside the answer, and only recorded")
    gates: GatesBody | None


class TrafficBody(Wire):
    champion: Number
    challenger: Number | None = Field(None, description="short for one challenger; with canary_percent")
    canary_percent: Percent | None = None
    challengers: list[ChallengerBody] = Field([], max_length=_MAX_ARMS)
    shadow: list[Number] = Field([], max_length=_MAX_ARMS)
    gates: GatesBody | None = None

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if (self.challenger is None) != (self.canary_percent is None):
            raise PydanticCustomError("traffic", "challenger and canary_percent must be given together")
        if self.challenger is not None and self.challengers:
            raise PydanticCustomError("traffic", "challenger is short for one entry of challengers: give one of them")
        return self

    def wish(self) -> TrafficWish:
        short = () if self.challenger is None else ((self.challenger, self.canary_percent or 0.0),)
        arms = [*short, *((c.version, c.percent) for c in self.challengers)]
        gates = None if self.gates is None else Gates(**self.gates.model_dump())
        return TrafficWish(self.champion, tuple(Challenger(*arm) for arm in arms), tuple(self.shadow), gates)


class TrafficRequest(TrafficBody):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"champion": 3, "challenger": 4, "canary_percent": 10, "shadow": [5], "reason": "4 is cheaper"},
                {
                    "champion": 3,
                    "challengers": [{"version": 4, "percent": 10}, {"version": 5, "percent": 2.5}],
                    "gates": {"max_disagreement": 0.1, "max_error_rate": 0.01, "min_count": 200},
                },
            ]
        }
    )

    reason: Reason = ""


class TrafficAnswer(BaseModel):
    task: str
    traffic: TrafficView
    previous: list[int] = Field(description="champions before this one, newest last: where a rollback goes")
    generation: int


# -- releases ----------------------------------------------------------------------------------------------------------


class ReleaseRequest(Wire):
    tasks: dict[Annotated[str, Field(max_length=200)], TrafficBody] = Field(min_length=1, max_length=_MAX_TASKS)
    reason: Reason = ""


class ReleaseView(View):
    id: str
    created_by: str
    created_at: Time
    reason: str
    generation: int
    before: dict[str, TrafficView | None] = Field(description="by task; null: no version was live")
    after: dict[str, TrafficView]
    rolled_back_by: str | None


class ReleaseList(BaseModel):
    releases: list[ReleaseView] = Field(description="newest first")


# -- audit -------------------------------------------------------------------------------------------------------------


class AuditEntryView(View):
    sequence: int = Field(description="1, 2, 3, … without gaps")
    at: Time
    generation: int = Field(description="of the index after it")
    actor: str
    action: str
    task: str | None
    reason: str
    before: Any
    after: Any
    previous_hash: str
    hash: str = Field(description="covers the rest of the entry, and by previous_hash all before it")


class AuditPage(BaseModel):
    entries: list[AuditEntryView] = Field(description="oldest first; go on with the last one's sequence as `after`")


class AuditVerdictView(View):
    ok: bool
    entries: int
    head: str = Field(description="the newest entry's hash: kept elsewhere, it shows a log that was cut short")
    fault: str = Field(description="the first entry that does not fit, and why; empty where all do")


# -- keys --------------------------------------------------------------------------------------------------------------


class KeyRequest(Wire):
    model_config = ConfigDict(json_schema_extra={"example": {"name": "shop", "roles": ["predict"]}})

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._@-]{0,99}$", description="of who holds it: the name in the audit log"
    )
    roles: list[Annotated[Role, Field(strict=False)]] = Field(min_length=1, max_length=len(Role))


class KeyView(View):
    id: str
    name: str
    roles: list[Role]
    created_by: str
    created_at: Time


class NewKey(KeyView):
    token: str = Field(description="the bearer token; it is shown this once and stored nowhere")


class KeyList(BaseModel):
    keys: list[KeyView]


# -- comparison --------------------------------------------------------------------------------------------------------


class TrueSpan(Wire):
    label: Annotated[str, Field(max_length=200)]
    start: int = Field(ge=0, le=_HIGHEST, description="in characters")
    end: int = Field(ge=0, le=_HIGHEST, description="exclusive")


class FeedbackRequest(Wire):
    """What was right. One of label, labels, value and spans, as the task answers."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"request_id": "0b2f6c1e", "task": "spam", "input": 0, "label": "ham"}}
    )

    request_id: str = Field(min_length=1, max_length=128, description="of the prediction")
    task: str = Field(max_length=200)
    input: int = Field(0, ge=0, le=_HIGHEST, description="which input of that request")
    label: Annotated[str, Field(max_length=200)] | None = None
    labels: Annotated[list[Annotated[str, Field(max_length=200)]], Field(max_length=_MAX_LABELS)] | None = None
    value: float | None = None
    spans: Annotated[list[TrueSpan], Field(max_length=_MAX_SPANS)] | None = None


class FeedbackAnswer(BaseModel):
    recorded: bool = Field(description="false: the same was reported before")


# -- index -------------------------------------------------------------------------------------------------------------


class IndexView(View):
    url: str = Field(description="without credentials")
    up: bool
    index_id: str
    generation: int = Field(description="that this server has")
    staleness_s: float = Field(description="since the index was last read")
    regressed: str | None = Field(description="where the index was emptied, replaced or went back: in which way")
    failures: dict[str, dict[str, str]] = Field(description="task@version → server → why it does not serve it")


class Generation(BaseModel):
    generation: int
