"""The central types: what a task version is, what a text becomes, what the engine is asked and answers.

Standard library and `app.rollout` only. Knows nothing of tensors, HTTP, Redis or files.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from app.rollout import EMPTY_VIEW, IndexView, TaskRecord, Traffic

PLAIN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")  # of an artifact's file: it becomes a path


def content_digest(files: Mapping[str, bytes]) -> str:
    """The identity of an artifact: "sha256:…" over its files' names and contents."""
    return "sha256:" + hashlib.sha256(content_listing(files).encode()).hexdigest()


def content_listing(files: Mapping[str, bytes]) -> str:
    """A line `name:sha256` for each file, by name. Its own sha256 is the artifact's."""
    lines = (f"{name}:{hashlib.sha256(content).hexdigest()}\n" for name, content in sorted(files.items()))
    return "".join(lines)


DEFAULT_THRESHOLD = 0.5  # of a multi-label task that states none


class ProblemType(StrEnum):
    """How scores are made from logits; declared by the artifact, never guessed from the label count."""

    SINGLE_LABEL = "single_label_classification"  # softmax over labels
    MULTI_LABEL = "multi_label_classification"  # sigmoid for each label
    REGRESSION = "regression"  # the value itself
    TOKEN = "token_classification"  # softmax over BIO tags for each token
    EMBEDDING = "embedding"  # the pooled state, L2-normalised; there is no head


class ReadoutKind(StrEnum):
    """How the states of a row become what the head reads."""

    MEAN = "mean"  # mean over the text's tokens
    CLS = "cls"  # the first token
    POOLER = "pooler"  # the backbone's own pooler over the first token
    ATTENTION = "attention"  # learned queries over the tokens of each named layer, with that layer's mean
    MATCHING = "matching"  # the same over each text of a pair apart, and how the two differ
    TOKENS = "tokens"  # each token's states of the named layers side by side

    @property
    def has_queries(self) -> bool:
        return self in (ReadoutKind.ATTENTION, ReadoutKind.MATCHING)


class HeadKind(StrEnum):
    LINEAR = "linear"  # classifier
    HIDDEN = "hidden"  # dense, activation, out_proj


class InputKind(StrEnum):
    TEXT = "text"
    PAIR = "pair"


class Arm(StrEnum):
    """Why a version answers: it is the champion, a challenger, the caller pinned it; shadows are only scored."""

    CHAMPION = "champion"
    CHALLENGER = "challenger"
    PINNED = "pinned"
    SHADOW = "shadow"


@dataclass(frozen=True, slots=True)
class BackboneSpec:
    """What the rest of the system may know of the frozen encoder."""

    name: str
    family: str  # transformers' model_type
    fingerprint: str  # "sha256:…" over names, shapes and fp32 bytes of the weights
    num_layers: int  # L
    hidden_size: int  # d
    num_heads: int  # H
    head_size: int  # d_h
    max_tokens: int  # tokens of an input with position_offset 0, special tokens counted
    has_pooler: bool
    device: str = "cpu"
    dtype: str = "float32"


@dataclass(frozen=True, slots=True)
class Readout:
    kind: ReadoutKind
    layers: tuple[int, ...]  # ascending, 1…L: the states after that layer
    num_queries: int = 0  # learned queries a layer, of each member (attention and matching only)
    num_members: int = 1  # readouts with a hidden layer each, whose logits are averaged


@dataclass(frozen=True, slots=True)
class Prefix:
    """Identity and extent of one prefix; its vectors live in the engine's bank under the digest."""

    digest: str
    num_virtual_tokens: int
    first_layer: int  # 0…L-1: the first layer whose attention sees it


@dataclass(frozen=True, slots=True)
class Histogram:
    """How often values fell between edges. What lies outside counts with the outermost."""

    edges: tuple[float, ...]  # ascending: one more than there are bins
    counts: tuple[tuple[int, ...], ...]  # [rows, bins]: a row for each thing that was measured


@dataclass(frozen=True, slots=True)
class Baseline:
    """How the texts looked that a version was measured on; None where its manifest does not say."""

    scores: Histogram | None = None  # rows: as the columns of `Traits.scores`, the last may be missing
    labels: tuple[int, ...] = ()  # texts that got each label, and last those that got none
    length: Histogram | None = None  # one row
    unknown: Histogram | None = None  # one row: the share of a text's tokens that the tokenizer does not know


@dataclass(frozen=True, slots=True)
class TaskVersion:
    """One immutable version of a task: `task@version`. The digest is its identity, the name is for people."""

    task: str
    version: int
    digest: str  # "sha256:…" over the artifact's content
    problem_type: ProblemType
    labels: tuple[str, ...]
    readout: Readout
    input_kind: InputKind = InputKind.TEXT
    prefixes: tuple[Prefix, ...] = ()
    position_offset: int = 0  # what the prefixes add to the text's positions (PEFT: num_virtual_tokens)
    thresholds: tuple[float, ...] = ()  # multi-label: a label is given from this score on
    baseline: Baseline | None = field(default=None, compare=False)  # None also where only its card is known

    @property
    def first_layer(self) -> int | None:
        """The lowest layer that a prefix reaches; None for the bare trunk."""
        return min((p.first_layer for p in self.prefixes), default=None)


@dataclass(frozen=True, slots=True)
class TextInput:
    """What the caller wants read: one text, or a pair."""

    text: str
    text_pair: str | None = None

    @property
    def kind(self) -> InputKind:
        return InputKind.TEXT if self.text_pair is None else InputKind.PAIR

    @property
    def sha256(self) -> str:
        """Of the text in UTF-8; of a pair, of both with a zero byte between them."""
        whole = self.text if self.text_pair is None else f"{self.text}\0{self.text_pair}"
        return hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class Encoding:
    """A tokenized input. All sequences have one entry a token, special tokens counted."""

    input_ids: tuple[int, ...]
    token_type_ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...] = ()  # characters [start, end) in the text, (0, 0) for special tokens
    word_ids: tuple[int | None, ...] = ()  # index of the word that a token belongs to, None for special tokens
    truncated: bool = False
    pair_start: int = 0  # the first token of a pair's second text; 0: there is one text

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def first_tokens(self) -> list[int]:
        """Of each word, by `word_ids`."""
        found, last = [], None
        for token, word in enumerate(self.word_ids):
            if word is not None and word != last:
                found.append(token)
            last = word
        return found


@dataclass(frozen=True, slots=True)
class Row:
    """One line of hidden states: the trunk, or a branch that a prefix tuple forks off it."""

    prefixes: tuple[Prefix, ...]
    position_offset: int
    start_layer: int  # layers [start_layer, stop_layer) run for this row
    stop_layer: int
    from_trunk: bool  # True: starts as a copy of row 0's states; False: starts at the embeddings
    reads: tuple[int, ...]  # indices into the plan's versions


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What one text needs: its rows and who reads which. Row 0 is the trunk where there is one."""

    encoding: Encoding
    versions: tuple[TaskVersion, ...]
    rows: tuple[Row, ...]
    passes: float  # layers run for this text, over the backbone's layers
    cost_tokens: int  # sum over rows of (tokens + virtual tokens): what the batch budget counts


@dataclass(frozen=True, slots=True)
class TaskOutput:
    """What one version said of one text: `scores`, or `error` where this version failed alone."""

    scores: tuple[float, ...] = ()  # a label each; regression: the value; tokens: of each token's tag; embedding: d
    tags: tuple[int, ...] = ()  # token classification: index into labels for each token
    error: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class EngineRequest:
    """All texts of one call; they may run in different batches, and are answered together."""

    plans: tuple[Plan, ...]
    deadline_s: float | None = None  # on time.monotonic(); work that has not begun by then is dropped
    context: object | None = None  # the caller's own, told again of each batch that the request is in


@dataclass(frozen=True, slots=True)
class EngineResult:
    outputs: tuple[tuple[TaskOutput, ...], ...]  # [plan][version], in the request's order
    rows: int  # trunks and branches that ran
    passes: float  # what their plans state; more than the request's own where a plan was too large for one batch
    queue_s: float  # from submission until the first batch with one of its texts began
    inference_s: float  # the summed time of the batches it was in


@dataclass(frozen=True, slots=True, eq=False)
class BatchReport:
    """What one batch was and what it took, for whoever watches the engine."""

    rows: int  # trunks and branches
    tokens: int  # rows × (tokens they were padded to)
    collate_s: float  # laying it out
    forward_s: float  # the layers; on a CUDA device its own clock, heads included
    heads_s: float  # scoring, and the outputs on the host
    shares: Mapping[tuple[str, int], float]  # (task, version) → its part of the forward, by rows × tokens × layers
    passes: float  # bare forwards of the backbone
    began_s: float = 0.0  # on time.monotonic(): before it was laid out
    ended_s: float = 0.0  # and when its answers were out
    contexts: tuple[object, ...] = ()  # of the requests in it that have one


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """A live task: what the index says of it, and those of its versions that are resident here."""

    name: str
    record: TaskRecord
    traffic: Traffic  # the record's
    versions: Mapping[int, TaskVersion]  # resident; the champion is always there

    @property
    def champion(self) -> TaskVersion:
        return self.versions[self.traffic.champion]


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """What is live here at one generation. Never mutated: a change replaces the object in one assignment.

    While anybody holds it, its versions stay loaded: `residents` are the engine's handles.
    """

    generation: int
    tasks: Mapping[str, Task]
    representations: Mapping[str, TaskVersion] = field(default_factory=dict)  # by the model name of /v1/embeddings
    view: IndexView = EMPTY_VIEW  # also of tasks and versions that are not live
    residents: tuple[object, ...] = ()
