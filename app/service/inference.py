"""The use case of prediction: admit, resolve, look up, dispatch, await, answer; labels and embeddings share it.

Knows the engine by its port; nothing of HTTP, tensors or where the snapshot comes from.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import orjson

from app.domain import Arm, EngineResult, Snapshot, Task, TaskOutput, TaskVersion, TextInput
from app.engine.plan import token_limit
from app.errors import DeadlineError, EngineError, MalformedError, TooLargeError, UnservableError
from app.rollout import Principal, Role
from app.service.access import EVERYBODY
from app.service.admission import Admission
from app.service.answer_cache import AnswerCache
from app.service.answers import Answer, FailedAnswer, make_answer
from app.service.dispatch import Computed, Dispatcher, Reading
from app.service.experiment import Observation
from app.service.ports import EnginePort, ObserverPort, PinsPort, TokenizerPort
from app.service.resolve import Asker, Target, beside, choose_targets, is_paired, pins_to_load, representation
from app.service.usage import Timings, Usage
from app.service.watching import Served, WatchPort
from app.telemetry.metrics import Metrics
from app.telemetry.tracing import UNTRACED, Trace

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    max_client_batch_size: int = 32
    deadline_ms: float = 30_000.0
    answer_cache_bytes: int = 0  # 0: every answer is computed


@dataclass(frozen=True, slots=True)
class Prediction:
    generation: int
    results: list[dict[str, Answer]]  # an input each, by the reference that the caller wrote
    results_json: bytes
    usage: Usage
    timings: Timings


@dataclass(frozen=True, slots=True)
class Embeddings:
    generation: int
    vectors: list[tuple[float, ...]]  # an input each
    usage: Usage
    timings: Timings


_NOTHING = Computed((), EngineResult((), 0, 0.0, 0.0, 0.0), 0.0)


@dataclass(frozen=True, slots=True)
class _Run:
    readings: list[Reading]  # an input each; equal texts share one
    computed: Computed
    is_fresh: bool  # nothing came from the cache

    @property
    def usage(self) -> Usage:
        tokens = sum(len(reading.encoded) for reading in self.readings)
        cached = sum(len(reading.cached) for reading in self.readings)
        result = self.computed.result
        return Usage(tokens, result.rows, round(result.passes, 4), cached)

    @property
    def timings(self) -> Timings:
        result = self.computed.result
        return Timings(self.computed.tokenization_s, result.queue_s, result.inference_s)


class InferenceService:
    """Cancelling a call (the client has gone) cancels its work: what is queued is dropped."""

    def __init__(
        self,
        engine: EnginePort,
        tokenizer: TokenizerPort,
        current_snapshot: Callable[[], Snapshot],
        workers: Executor,
        admission: Admission,
        limits: Limits,
        pins: PinsPort,
        observer: ObserverPort,
        watch: WatchPort,
        metrics: Metrics,
    ) -> None:
        self._spec = engine.spec
        self._dispatcher = Dispatcher(engine, tokenizer, workers)
        self._cache = AnswerCache(limits.answer_cache_bytes)
        self._current_snapshot = current_snapshot
        self._admission = admission
        self._limits = limits
        self._pins = pins
        self._observer = observer
        self._watch = watch
        self._metrics = metrics

    async def predict(
        self,
        inputs: Sequence[TextInput],
        tasks: Sequence[str] | None,
        truncate: bool,
        *,
        unit: str | None = None,
        request_id: str = "",
        principal: Principal = EVERYBODY,
        trace: Trace = UNTRACED,
    ) -> Prediction:
        """Answers of every named task (or every one that fits) for each input. Raises any ManifoldError."""
        with self._admission.permit():
            self._check(inputs)
            snapshot = self._current_snapshot()  # kept to the end: nothing of it is unloaded until then
            may_pin = principal.has(Role.APPROVE)
            pinned = await self._load_pins(snapshot, tasks, may_pin)
            asker = Asker(unit or request_id, may_pin, {key: version for key, (version, _) in pinned.items()})
            targets = choose_targets(snapshot, inputs, tasks, asker)
            extras = [_beside(snapshot, chosen, is_paired(request_id)) for chosen in targets]
            run = await self._run(inputs, [_distinct(chosen) for chosen in targets], truncate, trace, extras)
            results = [_answers(chosen, reading) for chosen, reading in zip(targets, run.readings, strict=True)]
            self._count(targets, results)
            self._observe(snapshot, request_id, targets, run, trace)
            results_json = orjson.dumps(results)
            usage, timings = run.usage, run.timings
            generation, actor, readings = snapshot.generation, principal.name, run.readings
            self._watch.served(
                Served(
                    request_id, actor, generation, targets, results, results_json, readings, usage, timings, time.time()
                )
            )
            return Prediction(generation, results, results_json, usage, timings)

    async def embed(
        self,
        inputs: Sequence[TextInput],
        model: str,
        truncate: bool,
        dimensions: int | None = None,
        *,
        trace: Trace = UNTRACED,
    ) -> Embeddings:
        """Vectors of one representation for each input. Raises any ManifoldError."""
        with self._admission.permit():
            self._check(inputs)
            snapshot = self._current_snapshot()
            version = representation(snapshot, model)
            run = await self._run(inputs, [(version,)] * len(inputs), truncate, trace)
            outputs = [reading.outputs[version.digest] for reading in run.readings]
            for output in outputs:
                outcome = "success" if output.error is None else "failure"
                self._metrics.predicted(version.task, version.version, Arm.CHAMPION, outcome)
            vectors = [_vector(output, dimensions) for output in outputs]
            return Embeddings(snapshot.generation, vectors, run.usage, run.timings)

    def _check(self, inputs: Sequence[TextInput]) -> None:
        limit = self._limits.max_client_batch_size
        if not inputs:
            raise MalformedError("there are no inputs: send at least one text")
        if len(inputs) > limit:
            raise TooLargeError(f"there are {len(inputs)} inputs and one request holds at most {limit}: send several")
        for index, text in enumerate(inputs):
            if not text.text.strip():
                raise MalformedError(f"input {index} is empty")
            if text.text_pair is not None and not text.text_pair.strip():
                raise MalformedError(f"text_pair of input {index} is empty")

    async def _load_pins(
        self, snapshot: Snapshot, tasks: Sequence[str] | None, may_pin_unapproved: bool
    ) -> dict[tuple[str, int], tuple[TaskVersion, object]]:
        """Pinned versions that are not live, made resident for this request, with the handles that keep them so."""
        wanted = pins_to_load(snapshot, tasks, may_pin_unapproved)
        if not wanted:
            return {}
        try:
            async with asyncio.timeout(self._limits.deadline_ms / 1000):
                return {(r.task, r.version): await asyncio.to_thread(self._pins.load, r) for r in wanted}
        except TimeoutError as error:
            raise DeadlineError(f"the deadline of {self._limits.deadline_ms:g} ms passed while loading pins") from error

    def _count(self, targets: Sequence[Sequence[Target]], results: Sequence[Mapping[str, Answer]]) -> None:
        for chosen, answers in zip(targets, results, strict=True):
            for target in chosen:
                outcome = "failure" if isinstance(answers[target.reference], FailedAnswer) else "success"
                self._metrics.predicted(target.version.task, target.version.version, target.arm, outcome)

    def _observe(
        self, snapshot: Snapshot, request_id: str, targets: Sequence[Sequence[Target]], run: _Run, trace: Trace
    ) -> None:
        """What the versions of tasks in an experiment said of the same texts. Never the reason that an answer fails."""
        try:
            self._record(snapshot, request_id, targets, run)
        except Exception:
            extra = {"request_id": request_id, **trace.ids}
            logger.exception("comparing versions failed for one request", extra=extra)

    def _record(self, snapshot: Snapshot, request_id: str, targets: Sequence[Sequence[Target]], run: _Run) -> None:
        compared: dict[str, tuple[Target, dict[int, dict[int, Answer]]]] = {}
        for index, (chosen, reading) in enumerate(zip(targets, run.readings, strict=True)):
            for target in chosen:
                task = snapshot.tasks.get(target.version.task)
                if task is None or not (task.traffic.challengers or task.traffic.shadow) or target.arm is Arm.PINNED:
                    continue
                first, answers = compared.setdefault(task.name, (target, {}))
                if first is target:
                    answers[index] = _answers_of(task, reading)
        for name, (target, answers) in compared.items():
            seconds = run.computed.result.inference_s if run.is_fresh else None
            task = snapshot.tasks[name]
            self._observer.record(Observation(task, request_id, target.version.version, seconds, answers))

    async def _run(
        self,
        inputs: Sequence[TextInput],
        versions: Sequence[tuple[TaskVersion, ...]],
        truncate: bool,
        trace: Trace,
        extras: Sequence[tuple[TaskVersion, ...]] | None = None,
    ) -> _Run:
        """`extras`: scored beside where the text is not too long for them, and never a reason to refuse it."""
        readings: dict[TextInput, Reading] = {}
        for index, (text, asked, more) in enumerate(zip(inputs, versions, extras or [()] * len(inputs), strict=True)):
            if text not in readings:  # equal texts of one request are asked for the same
                readings[text] = self._look_up(Reading(index, text, asked, more))
        unfinished = [reading for reading in readings.values() if self._is_unfinished(reading)]
        num_known = sum(len(reading.outputs) for reading in readings.values())
        computed = await self._compute(unfinished, truncate, trace) if unfinished else _NOTHING
        self._take_in(computed)
        self._count_cached(num_known, computed)
        return _Run([readings[text] for text in inputs], computed, not num_known)

    def _look_up(self, reading: Reading) -> Reading:
        """The reading with what is known of its text. Where the text is too long for this request, nothing is."""
        versions = (*reading.asked, *reading.beside)
        limit = token_limit(self._spec, reading.asked)
        known = self._cache.get(reading.text, [v.digest for v in versions], limit, reading.has_offsets)
        if known is not None:
            reading.encoding, reading.outputs = known.encoding, known.outputs
            reading.cached = frozenset(v.digest for v in reading.asked if v.digest in known.outputs)
        return reading

    def _is_unfinished(self, reading: Reading) -> bool:
        return reading.encoding is None or bool(reading.missing(self._spec))

    async def _compute(self, readings: Sequence[Reading], truncate: bool, trace: Trace) -> Computed:
        timeout_s = self._limits.deadline_ms / 1000
        deadline_s = time.monotonic() + timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                submitted = self._dispatcher.submit(readings, truncate, deadline_s, trace)
                computed = await asyncio.wrap_future(submitted)
        except (TimeoutError, DeadlineError) as error:
            self._metrics.rejected("deadline")
            if isinstance(error, DeadlineError):
                raise
            raise DeadlineError(f"the deadline of {self._limits.deadline_ms:g} ms passed first") from error
        self._metrics.staged("tokenize", computed.tokenization_s)
        self._metrics.staged("queue", computed.result.queue_s)
        return computed

    def _take_in(self, computed: Computed) -> None:
        for (reading, plan), outputs in zip(computed.plans, computed.result.outputs, strict=True):
            found = dict(zip((version.digest for version in plan.versions), outputs, strict=True))
            reading.outputs |= found
            self._cache.put(reading.text, plan.encoding, found)

    def _count_cached(self, num_known: int, computed: Computed) -> None:
        if self._limits.answer_cache_bytes:
            num_computed = sum(len(plan.versions) for _, plan in computed.plans)
            self._metrics.looked_up(num_known, num_computed, self._cache.size_bytes)


def _distinct(targets: Sequence[Target]) -> tuple[TaskVersion, ...]:
    """A version that was asked for under two names runs once."""
    return tuple({target.version.digest: target.version for target in targets}.values())


def _answers(targets: Sequence[Target], reading: Reading) -> dict[str, Answer]:
    return {target.reference: _answer(target, reading) for target in targets}


def _answer(target: Target, reading: Reading) -> Answer:
    return make_answer(target, reading.outputs[target.version.digest], reading.encoded, reading.text)


def _beside(snapshot: Snapshot, targets: Sequence[Target], paired: bool) -> tuple[TaskVersion, ...]:
    tasks = ((snapshot.tasks.get(target.version.task), target) for target in targets)
    versions = (version for task, target in tasks if task is not None for version in beside(task, target, paired))
    return tuple({version.digest: version for version in versions}.values())


def _answers_of(task: Task, reading: Reading) -> dict[int, Answer]:
    """Of every live version of one task that was scored, by its number."""
    return {
        number: _answer(Target(task.name, version, Arm.SHADOW), reading)
        for number, version in task.versions.items()
        if version.digest in reading.outputs
    }


def _vector(output: TaskOutput, dimensions: int | None) -> tuple[float, ...]:
    if output.error is not None:
        raise EngineError(output.error)
    size = len(output.scores)
    if dimensions not in (None, size):
        raise UnservableError(f"this model gives {size} dimensions and no other number: leave dimensions out")
    return output.scores
