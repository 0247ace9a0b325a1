"""The wire of predictions and views: what bodies hold, in the words of /docs.

Answers are the service's own dataclasses; requests end here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from app.api.control_schemas import RecordView, TrafficView, Wire
from app.domain import Arm, InputKind, ProblemType, ReadoutKind, TextInput
from app.service.answers import Answer
from app.service.usage import Usage
from app.service.windows import DRIFT_P_VALUE, DRIFT_PSI, Kind

_MAX_NAME = 200
_MAX_TASKS = 1000
_MAX_UNIT = 256


class TextPair(Wire):
    text: str
    text_pair: str | None = Field(None, description="makes the input a pair, for tasks that read pairs")


def _shape(value: Any) -> str | None:
    if isinstance(value, str):
        return "<text>"
    if isinstance(value, list):
        return "<list>"
    return "<object>" if isinstance(value, dict | TextPair) else None


_Text = Annotated[str, Tag("<text>")]
_Object = Annotated[TextPair, Tag("<object>")]
_Item = Annotated[
    _Text | _Object,
    Discriminator(_shape, "input_type", "must be a text, or an object with text and text_pair"),
]
_Inputs = Annotated[
    _Text | _Object | Annotated[list[_Item], Tag("<list>")],
    Discriminator(_shape, "inputs_type", "must be a text, or a list of texts and of objects with text and text_pair"),
]
Reference = Annotated[str, Field(max_length=_MAX_NAME, examples=["sentiment", "intent@7", "spam@challenger"])]


class PredictRequest(Wire):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"inputs": "I love this!", "tasks": ["sentiment"]},
                {"inputs": ["book a table for two", "what is my balance?"]},
                {"inputs": [{"text": "A man sleeps.", "text_pair": "Nobody is awake."}], "tasks": ["entailment"]},
            ]
        }
    )

    inputs: _Inputs = Field(description="one text, or a list of texts and pairs")
    tasks: list[Reference] | None = Field(
        None,
        max_length=_MAX_TASKS,
        description="task, task@number, task@champion or task@challenger; absent: every live task that fits the input. "
        "Each answer is keyed by its reference as written here; a reference given twice is answered once",
    )
    unit: str | None = Field(
        None,
        max_length=_MAX_UNIT,
        description="who the request is about: keeps a unit on one side of a canary; absent: the request id",
    )
    truncate: bool = Field(False, description="read the beginning of texts that are too long, instead of refusing them")

    def texts(self) -> list[TextInput]:
        items = self.inputs if isinstance(self.inputs, list) else [self.inputs]
        return [TextInput(i) if isinstance(i, str) else TextInput(i.text, i.text_pair) for i in items]


class PredictResponse(BaseModel):
    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "request_id": "0b2f6c1e5d1f4a0e9d3c7f0a8b6d4e21",
                "model": "all-MiniLM-L6-v2",
                "generation": 1,
                "results": [
                    {
                        "spam": {
                            "version": 1,
                            "arm": "champion",
                            "label": "ham",
                            "score": 0.998211,
                            "scores": {"ham": 0.998211, "spam": 0.001789},
                        }
                    }
                ],
                "usage": {"tokens": 8, "rows": 1, "passes": 1.0, "cached": 0},
            }
        }
    )

    request_id: str
    model: str = Field(description="the backbone")
    generation: int = Field(description="the state of the index that answered")
    results: list[dict[str, Answer]] = Field(description="an object for each input: an answer for each reference")
    usage: Usage


def _refuse_token_ids(value: Any) -> Any:
    if isinstance(value, list) and any(isinstance(item, int | list) for item in value):
        raise PydanticCustomError("token_ids", "holds token ids, which are not read here: send the text itself")
    return value


_EmbeddingInput = Annotated[
    _Text | Annotated[list[str], Tag("<list>")],
    Discriminator(_shape, "input_type", "must be a text or a list of texts"),
    BeforeValidator(_refuse_token_ids),
]


class EmbeddingsRequest(BaseModel):
    """OpenAI's request. Fields of theirs that we have no use for are ignored, as its other servers do."""

    model_config = ConfigDict(
        strict=True, json_schema_extra={"example": {"model": "all-MiniLM-L6-v2", "input": ["one text", "another"]}}
    )

    model: str = Field(max_length=_MAX_NAME, description="a representation's name; the backbone's is one")
    input: _EmbeddingInput = Field(description="one text or a list of texts; token ids are refused")
    encoding_format: Literal["float", "base64"] = Field(
        "float", description="numbers, or base64 over little-endian float32"
    )
    dimensions: int | None = Field(None, description="only the representation's own size is served")
    user: str | None = Field(None, description="accepted and ignored")
    truncate: bool = Field(False, description="read the beginning of texts that are too long, instead of refusing them")

    def texts(self) -> list[TextInput]:
        return [TextInput(text) for text in (self.input if isinstance(self.input, list) else [self.input])]


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingsUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage


class TaskBrief(BaseModel):
    name: str
    problem_type: ProblemType = Field(description="of the champion; of the newest version where none is live")
    input_kind: InputKind
    labels: list[str]
    traffic: TrafficView | None = Field(description="absent where no version is live yet")
    versions: list[int] = Field(description="all that the index has; task@number asks for one")
    passes: float = Field(description="what the champion costs when it is asked alone")


class TaskList(BaseModel):
    generation: int
    tasks: list[TaskBrief]
    representations: list[str] = Field(description="model names of POST /v1/embeddings")


class PrefixView(BaseModel):
    digest: str
    num_virtual_tokens: int
    first_layer: int


class ReadoutView(BaseModel):
    kind: ReadoutKind
    layers: list[int]
    num_queries: int
    num_members: int = Field(description="readouts whose logits are averaged, each with so many queries")


class VersionView(RecordView):
    arm: Literal["champion", "challenger", "shadow"] | None = Field(description="what it does at the moment")
    problem_type: ProblemType
    input_kind: InputKind
    labels: list[str]
    thresholds: list[float] = Field(description="multi-label: a label is given from this score on; empty: from 0.5 on")
    readout: ReadoutView
    prefixes: list[PrefixView]
    passes: float = Field(description="its cost when it is asked alone")
    evaluation: Mapping[str, Any] = Field(description="the figures that its artifact came with")


class TaskView(TaskBrief):
    generation: int
    previous: list[int] = Field(description="champions before this one, newest last: where a rollback goes")
    failures: dict[str, str] = Field(description="versions that this server cannot serve, and why")
    details: list[VersionView] = Field(description="those that are live, and the newest others")


class BackboneView(BaseModel):
    name: str
    family: str
    fingerprint: str
    num_layers: int
    hidden_size: int
    max_tokens: int
    device: str
    dtype: str


class LimitsView(BaseModel):
    max_concurrent_requests: int
    max_client_batch_size: int
    payload_limit_bytes: int
    deadline_ms: float
    max_batch_tokens: int


class Info(BaseModel):
    software: str = Field(description="Manifold's own version")
    backbone: BackboneView
    generation: int
    tasks: list[str]
    representations: list[str]
    left_out: dict[str, str] = Field(description="artifacts that could not be served, and why")
    limits: LimitsView


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class HealthDetails(Health):
    generation: int
    tasks: int
    queue_rows: int = Field(description="rows that wait for the engine")
    in_flight: int = Field(description="requests at work")
    index_up: bool = Field(description="whether the index answers; without it what is live stays live")
    index_staleness_s: float = Field(description="how long ago the index was last read")


# -- drift -------------------------------------------------------------------------------------------------------------


class DriftView(BaseModel):
    """How one thing about a live version's last texts stands to its baseline."""

    task: str
    version: int
    arm: Arm
    kind: Kind = Field(description="score, label, length (in tokens) or unknown (the share of unknown tokens)")
    psi: float | None = Field(description="population stability index, less what chance shows; null: too few texts yet")
    p_value: float | None = Field(description="of a chi-square test that both come from the same texts")
    texts: int = Field(description="that are compared: the last ones")
    baseline_texts: int
    label: str | None = Field(description="of scores: the label whose scores moved most; null: the highest score")
    drifting: bool = Field(description=f"PSI above {DRIFT_PSI} and p-value below {DRIFT_P_VALUE}")


class DriftList(BaseModel):
    window: int = Field(description="texts that are compared at most")
    least_texts: int = Field(description="texts before anything is said")
    drift: list[DriftView]
    without_baseline: list[str] = Field(description="live versions that came without one: task@version")
