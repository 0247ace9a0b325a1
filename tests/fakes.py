"""First-class fakes: an engine, a tokenizer and tasks that behave as the real ones do, without weights."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from app.config import Settings
from app.domain import (
    BackboneSpec,
    Encoding,
    EngineRequest,
    EngineResult,
    InputKind,
    ProblemType,
    Readout,
    ReadoutKind,
    Snapshot,
    Task,
    TaskOutput,
    TaskVersion,
    TextInput,
)
from app.errors import UnavailableError
from app.registry.prediction_store import PredictionStore
from app.rollout import SLOTS, Challenger, IndexView, Segment, State, TaskRecord, Traffic, VersionRecord
from app.service.access import Access
from app.service.admission import Admission
from app.service.catalog import Catalog, described
from app.service.drift import DriftWatcher
from app.service.experiment import Observation
from app.service.hot_swap import IndexHealth
from app.service.inference import InferenceService, Limits
from app.service.runtime import Runtime
from app.service.watching import Served
from app.service.why import Why
from app.service.windows import Rows
from app.telemetry.metrics import Metrics
from app.telemetry.tracing import NOT_TRACING, Tracing
from tests.fake_rollout import FakeRollout

SPEC = BackboneSpec(
    name="tiny",
    family="bert",
    fingerprint="sha256:tiny",
    num_layers=6,
    hidden_size=4,
    num_heads=2,
    head_size=2,
    max_tokens=32,
    has_pooler=False,
)


@dataclass
class FakeEngine:
    """Answers at once, after `delay_s`, or where it `holds` when `release` is called."""

    spec: BackboneSpec = SPEC
    alive: bool = True
    max_batch_tokens: int = 16384
    holds: bool = False
    delay_s: float | None = None
    broken_tasks: set[str] = field(default_factory=set)  # these fail alone
    failure: Exception | None = None  # the whole request fails with it
    requests: list[EngineRequest] = field(default_factory=list)
    futures: list[Future[EngineResult]] = field(default_factory=list)

    @property
    def queue_rows(self) -> int:
        waiting = zip(self.requests, self.futures, strict=True)
        return sum(len(plan.rows) for request, future in waiting if not future.done() for plan in request.plans)

    def submit(self, request: EngineRequest) -> Future[EngineResult]:
        if not self.alive:
            raise UnavailableError("the engine does not run")
        future: Future[EngineResult] = Future()
        self.requests.append(request)
        self.futures.append(future)
        if self.delay_s is not None:
            timer = threading.Timer(self.delay_s, self._answer, (request, future))
            timer.daemon = True
            timer.start()
        elif not self.holds:
            self._answer(request, future)
        return future

    def release(self) -> None:
        for request, future in zip(self.requests, self.futures, strict=True):
            if not future.done():
                self._answer(request, future)

    def close(self) -> None:
        self.alive = False

    def _answer(self, request: EngineRequest, future: Future[EngineResult]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        if self.failure is not None:
            future.set_exception(self.failure)
            return
        outputs = tuple(tuple(self._output(plan.encoding, v) for v in plan.versions) for plan in request.plans)
        rows = sum(len(plan.rows) for plan in request.plans)
        passes = sum(plan.passes for plan in request.plans)
        future.set_result(EngineResult(outputs, rows, passes, queue_s=0.001, inference_s=0.002))

    def _output(self, encoding: Encoding, version: TaskVersion) -> TaskOutput:
        if version.task in self.broken_tasks:
            return TaskOutput(error=f"{version.task} broke")
        count = len(version.labels)
        match version.problem_type:
            case ProblemType.SINGLE_LABEL:
                return TaskOutput(_softmaxed(len(encoding), count))
            case ProblemType.MULTI_LABEL:
                return TaskOutput(tuple((i + 1) / (count + 1) for i in range(count)))
            case ProblemType.REGRESSION:
                return TaskOutput((float(len(encoding)),))
            case ProblemType.TOKEN:
                tags = tuple(1 if word == 0 else 0 for word in encoding.word_ids)
                return TaskOutput((0.9,) * len(tags), tags)
            case ProblemType.EMBEDDING:
                return TaskOutput((0.5,) * self.spec.hidden_size)


def _softmaxed(best: int, count: int) -> tuple[float, ...]:
    """0.9 for one label, the rest shared."""
    return tuple(0.9 if i == best % count else 0.1 / (count - 1) for i in range(count))


class FakeTokenizer:
    """A token for each word between spaces, and two special ones."""

    def __init__(self) -> None:
        self.threads: set[str] = set()  # names of those that it ran in
        self.calls: list[list[str]] = []  # the texts of each

    def encode_each(
        self, inputs: Sequence[TextInput], limits: Sequence[int], truncate: Sequence[bool], has_offsets: bool
    ) -> list[Encoding | str]:
        self.threads.add(threading.current_thread().name)
        self.calls.append([text.text for text in inputs])
        asked = zip(inputs, limits, truncate, strict=True)
        return [self._encode(text, limit, cut, has_offsets) for text, limit, cut in asked]

    def _encode(self, text: TextInput, limit: int, truncate: bool, has_offsets: bool) -> Encoding | str:
        words = _words(text.text) + _words(text.text_pair or "")
        if not words:
            return "has nothing that the model can read"
        if len(words) + 2 > limit and not truncate:
            return f"has {len(words) + 2} tokens and the limit is {limit}"
        kept = words[: limit - 2]
        return Encoding(
            input_ids=(1, *(10 + i for i in range(len(kept))), 2),
            token_type_ids=(0,) * (len(kept) + 2),
            offsets=((0, 0), *kept, (0, 0)) if has_offsets else (),
            word_ids=(None, *range(len(kept)), None) if has_offsets else (),
            truncated=len(kept) < len(words),
        )


def _words(text: str) -> list[tuple[int, int]]:
    found, position = [], 0
    for word in text.split():
        start = text.index(word, position)
        position = start + len(word)
        if word.isprintable():
            found.append((start, position))
    return found


def make_version(
    task: str,
    version: int = 1,
    problem_type: ProblemType = ProblemType.SINGLE_LABEL,
    labels: tuple[str, ...] = ("no", "yes"),
    input_kind: InputKind = InputKind.TEXT,
    thresholds: tuple[float, ...] = (),
) -> TaskVersion:
    readout = Readout(ReadoutKind.MEAN, (SPEC.num_layers,))
    digest = f"sha256:{task}-{version}"
    return TaskVersion(task, version, digest, problem_type, labels, readout, input_kind, thresholds=thresholds)


def make_task(
    *versions: TaskVersion, champion: int | None = None, challenger: int | None = None, shadow: tuple[int, ...] = ()
) -> Task:
    """All of them approved and resident; a challenger gets a tenth of the units."""
    by_number = {version.version: version for version in versions}
    challengers = () if challenger is None else (Challenger(challenger, 10.0),)
    segments = tuple(Segment(0, SLOTS // 10, c.version) for c in challengers)
    traffic = Traffic(champion or max(by_number), challengers, shadow, salt="salt", segments=segments)
    name = versions[0].task
    record = TaskRecord(name, {v.version: make_record(v) for v in versions}, traffic, changed=1)
    return Task(name, record, traffic, by_number)


def make_record(version: TaskVersion, state: State = State.APPROVED, **evaluation: object) -> VersionRecord:
    """What the index holds of a version that was published and approved by two people."""
    card = {
        "format_version": 1,
        "task": version.task,
        "problem_type": version.problem_type,
        "labels": version.labels,
        "input": version.input_kind,
        "readout": {"kind": version.readout.kind, "layers": version.readout.layers},
        "prefixes": [],
        "position_offset": version.position_offset,
        "thresholds": version.thresholds,
        "evaluation": evaluation,
    }
    return VersionRecord(
        task=version.task,
        version=version.version,
        digest=version.digest,
        state=state,
        card=json.dumps(card),
        size_bytes=1000,
        published_by="paula",
        published_at=1_700_000_000.0,
        decided_by="anna",
        decided_at=1_700_000_100.0,
    )


def make_snapshot() -> Snapshot:
    """A task of every kind; `intent` has three versions, of which 3 is the challenger."""
    intents = [make_version("intent", number, labels=("book", "cancel", "pay")) for number in (1, 2, 3)]
    return snapshot_of(
        make_task(*intents, champion=2, challenger=3),
        make_task(make_version("spam", labels=("ham", "spam"))),
        make_task(
            make_version("emotion", 1, ProblemType.MULTI_LABEL, ("joy", "anger", "fear"), thresholds=(0.2, 0.6, 0.5))
        ),
        make_task(make_version("stars", 1, ProblemType.REGRESSION, ())),
        make_task(make_version("slots", 1, ProblemType.TOKEN, ("O", "B-city"))),
        make_task(make_version("entailment", 1, labels=("no", "yes"), input_kind=InputKind.PAIR)),
    )


def snapshot_of(*tasks: Task, generation: int = 7) -> Snapshot:
    embedding = make_version("embedding", 1, ProblemType.EMBEDDING, ())
    view = IndexView("index", generation, {task.name: task.record for task in tasks}, {})
    return Snapshot(generation, {task.name: task for task in tasks}, {SPEC.name: embedding}, view)


class FakePins:
    """Makes any approved version resident at once."""

    def load(self, record: VersionRecord) -> tuple[TaskVersion, object]:
        return described(record.card, record.digest, record.version), object()


@dataclass
class FakeObserver:
    observations: list[Observation] = field(default_factory=list)

    def record(self, observation: Observation) -> None:
        self.observations.append(observation)


@dataclass
class FakeWatch:
    requests: list[Served] = field(default_factory=list)

    def served(self, served: Served) -> None:
        self.requests.append(served)


@dataclass
class FakeWindows:
    """Keeps windows in memory; full on request."""

    kept: dict[str, Rows] = field(default_factory=dict)
    is_full: bool = False
    num_tries: int = 0

    def save(self, windows: Mapping[str, Rows]) -> None:
        self.num_tries += 1
        if self.is_full:
            raise UnavailableError("no space left on device")
        self.kept = {digest: rows.copy() for digest, rows in windows.items()}

    def load(self) -> dict[str, Rows]:
        return dict(self.kept)


def make_runtime(
    settings: Settings,
    engine: FakeEngine | None = None,
    snapshot: Snapshot | None = None,
    tokenizer: FakeTokenizer | None = None,
    observer: FakeObserver | None = None,
    watch: FakeWatch | None = None,
    traces: Tracing = NOT_TRACING,
    predictions: PredictionStore | None = None,
) -> Runtime:
    engine = engine if engine is not None else FakeEngine()
    metrics = Metrics()
    admission = Admission(settings.max_concurrent_requests, metrics.rejected)
    catalog = Catalog(snapshot or make_snapshot(), SPEC.num_layers)
    workers = ThreadPoolExecutor(settings.tokenization_workers, thread_name_prefix="tokenizer")
    inference = InferenceService(
        engine,
        tokenizer or FakeTokenizer(),
        lambda: catalog.snapshot,
        workers,
        admission,
        Limits(settings.max_client_batch_size, settings.deadline_ms, settings.answer_cache_bytes),
        FakePins(),
        observer or FakeObserver(),
        watch or FakeWatch(),
        metrics,
    )

    rollout = FakeRollout(catalog)
    secret = settings.admin_key
    admin_key = None if secret is None else secret.get_secret_value()
    access = Access(lambda: catalog.snapshot.view.keys, admin_key, rollout.note)

    def close() -> None:
        engine.close()
        workers.shutdown(cancel_futures=True)

    return Runtime(
        settings,
        engine,
        catalog,
        inference,
        admission,
        rollout,
        access,
        Why(predictions, settings.prediction_log_sample, catalog, rollout.audit),
        DriftWatcher(lambda: catalog.snapshot, None, settings.drift_window, FakeWindows(), metrics),
        metrics,
        traces,
        lambda: IndexHealth(up=True),
        lambda: None,
        close,
    )
