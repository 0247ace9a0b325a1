"""The use case of prediction: admit, resolve, tokenize, plan, submit, await, answer; labels and embeddings share it.

Knows the engine by its port; nothing of HTTP, tensors or where the snapshot comes from.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from app.domain import (
    Arm,
    Encoding,
    EngineRequest,
    EngineResult,
    Plan,
    Snapshot,
    Task,
    TaskOutput,
    TaskVersion,
    TextInput,
)
from app.engine.plan import make_plan, token_limit
from app.errors import DeadlineError, EngineError, MalformedError, TooLargeError, UnservableError
from app.rollout import Principal, Role
from app.service.access import EVERYBODY
from app.service.admission import Admission
from app.service.answers import Answer, FailedAnswer, make_answer
from app.service.experiment import Observation
from app.service.ports import EnginePort, ObserverPort, PinsPort, TokenizerPort
from app.service.resolve import Asker, Target, beside, choose_targets, is_paired, pins_to_load, representation
from app.telemetry import Metrics

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    max_client_batch_size: int = 32
    deadline_ms: float = 30_000.0


@dataclass(frozen=True, slots=True)
class Usage:
    tokens: int  # of all inputs, special tokens counted
    rows: int  # trunks and branches that ran
    passes: float  # bare forwards of the backbone that they cost, summed over the inputs


@dataclass(frozen=True, slots=True)
class Timings:
    tokenization_s: float
    queue_s: float
    inference_s: float


@dataclass(frozen=True, slots=True)
class Prediction:
    generation: int
    results: list[dict[str, Answer]]  # an input each, by the reference that the caller wrote
    usage: Usage
    timings: Timings


@dataclass(frozen=True, slots=True)
class Embeddings:
    generation: int
    vectors: list[tuple[float, ...]]  # an input each
    usage: Usage
    timings: Timings


@dataclass(frozen=True, slots=True)
class _Run:
    plans: list[Plan]
    result: EngineResult
    tokenization_s: float

    @property
    def usage(self) -> Usage:
        tokens = sum(len(plan.encoding) for plan in self.plans)
        return Usage(tokens, self.result.rows, round(self.result.passes, 4))

    @property
    def timings(self) -> Timings:
        return Timings(self.tokenization_s, self.result.queue_s, self.result.inference_s)


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
        metrics: Metrics,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._current_snapshot = current_snapshot
        self._workers = workers
        self._admission = admission
        self._limits = limits
        self._pins = pins
        self._observer = observer
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
            run = await self._run(inputs, [_distinct(chosen) for chosen in targets], truncate, extras)
            results = [
                _answers(text, chosen, plan, outputs)
                for text, chosen, plan, outputs in zip(inputs, targets, run.plans, run.result.outputs, strict=True)
            ]
            self._count(targets, results)
            self._observe(snapshot, request_id, inputs, targets, run)
            return Prediction(snapshot.generation, results, run.usage, run.timings)

    async def embed(
        self, inputs: Sequence[TextInput], model: str, truncate: bool, dimensions: int | None = None
    ) -> Embeddings:
        """Vectors of one representation for each input. Raises any ManifoldError."""
        with self._admission.permit():
            self._check(inputs)
            snapshot = self._current_snapshot()
            version = representation(snapshot, model)
            run = await self._run(inputs, [(version,)] * len(inputs), truncate)
            vectors = [_vector(outputs[0], dimensions) for outputs in run.result.outputs]
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
        self,
        snapshot: Snapshot,
        request_id: str,
        inputs: Sequence[TextInput],
        targets: Sequence[Sequence[Target]],
        run: _Run,
    ) -> None:
        """What the versions of tasks in an experiment said of the same texts. Never the reason that an answer fails."""
        try:
            self._record(snapshot, request_id, inputs, targets, run)
        except Exception:
            logger.exception("comparing versions failed for one request", extra={"request_id": request_id})

    def _record(
        self,
        snapshot: Snapshot,
        request_id: str,
        inputs: Sequence[TextInput],
        targets: Sequence[Sequence[Target]],
        run: _Run,
    ) -> None:
        compared: dict[str, tuple[Target, dict[int, dict[int, Answer]]]] = {}
        for index, (text, chosen, plan) in enumerate(zip(inputs, targets, run.plans, strict=True)):
            for target in chosen:
                task = snapshot.tasks.get(target.version.task)
                if task is None or not (task.traffic.challengers or task.traffic.shadow) or target.arm is Arm.PINNED:
                    continue
                first, answers = compared.setdefault(task.name, (target, {}))
                if first is target:
                    answers[index] = _answers_of(task, text, plan, run.result.outputs[index])
        for name, (target, answers) in compared.items():
            seconds = run.result.inference_s
            task = snapshot.tasks[name]
            self._observer.record(Observation(task, request_id, target.version.version, seconds, answers))

    async def _run(
        self,
        inputs: Sequence[TextInput],
        versions: Sequence[tuple[TaskVersion, ...]],
        truncate: bool,
        extras: Sequence[tuple[TaskVersion, ...]] | None = None,
    ) -> _Run:
        """`extras`: scored beside where the text is not too long for them, and never a reason to refuse it."""
        deadline_s = time.monotonic() + self._limits.deadline_ms / 1000
        try:
            async with asyncio.timeout(self._limits.deadline_ms / 1000):
                began_s = time.monotonic()
                encodings = await self._tokenize(inputs, versions, truncate)
                tokenization_s = time.monotonic() - began_s
                plans = self._plans(encodings, versions, extras or [()] * len(inputs))
                result = await asyncio.wrap_future(self._engine.submit(EngineRequest(tuple(plans), deadline_s)))
        except TimeoutError as error:
            raise DeadlineError(f"the deadline of {self._limits.deadline_ms:g} ms passed first") from error
        return _Run(plans, result, tokenization_s)

    def _plans(
        self,
        encodings: Sequence[Encoding],
        versions: Sequence[tuple[TaskVersion, ...]],
        extras: Sequence[tuple[TaskVersion, ...]],
    ) -> list[Plan]:
        spec = self._engine.spec
        plans = []
        for encoding, asked, more in zip(encodings, versions, extras, strict=True):
            known = {version.digest for version in asked}
            fitting = [e for e in more if e.digest not in known and len(encoding) <= token_limit(spec, (e,))]
            plans.append(make_plan(encoding, [*asked, *fitting], spec.num_layers))
        return plans

    async def _tokenize(
        self, inputs: Sequence[TextInput], versions: Sequence[tuple[TaskVersion, ...]], truncate: bool
    ) -> list[Encoding]:
        limits = [token_limit(self._engine.spec, chosen) for chosen in versions]
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._workers, self._tokenizer.encode, inputs, limits, truncate)


def _distinct(targets: Sequence[Target]) -> tuple[TaskVersion, ...]:
    """A version that was asked for under two names runs once."""
    return tuple({target.version.digest: target.version for target in targets}.values())


def _answers(
    text: TextInput, targets: Sequence[Target], plan: Plan, outputs: Sequence[TaskOutput]
) -> dict[str, Answer]:
    by_digest = {version.digest: output for version, output in zip(plan.versions, outputs, strict=True)}
    return {t.reference: make_answer(t, by_digest[t.version.digest], plan.encoding, text) for t in targets}


def _beside(snapshot: Snapshot, targets: Sequence[Target], paired: bool) -> tuple[TaskVersion, ...]:
    tasks = ((snapshot.tasks.get(target.version.task), target) for target in targets)
    versions = (version for task, target in tasks if task is not None for version in beside(task, target, paired))
    return tuple({version.digest: version for version in versions}.values())


def _answers_of(task: Task, text: TextInput, plan: Plan, outputs: Sequence[TaskOutput]) -> dict[int, Answer]:
    """Of every live version of one task that was scored, by its number."""
    by_digest = {version.digest: output for version, output in zip(plan.versions, outputs, strict=True)}
    return {
        number: make_answer(Target(task.name, version, Arm.SHADOW), by_digest[version.digest], plan.encoding, text)
        for number, version in task.versions.items()
        if version.digest in by_digest
    }


def _vector(output: TaskOutput, dimensions: int | None) -> tuple[float, ...]:
    if output.error is not None:
        raise EngineError(output.error)
    size = len(output.scores)
    if dimensions not in (None, size):
        raise UnservableError(f"this model gives {size} dimensions and no other number: leave dimensions out")
    return output.scores
