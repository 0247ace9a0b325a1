"""From texts to the engine's queue on a worker's thread: tokenize what waits together, plan, submit.

Knows tokenizer and engine by their ports; nothing of snapshots, answers or the cache.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field

from app.domain import (
    BackboneSpec,
    Encoding,
    EngineRequest,
    EngineResult,
    Plan,
    ProblemType,
    TaskOutput,
    TaskVersion,
    TextInput,
)
from app.engine.plan import make_plan, token_limit
from app.errors import EngineError, TokenizationError
from app.service.ports import EnginePort, TokenizerPort
from app.telemetry.tracing import UNTRACED, Trace

logger = logging.getLogger(__name__)
_GROUP_CHARACTERS = 20_000  # tokenized in about 10 ms: nobody waits longer than that for others of a group


@dataclass(slots=True, eq=False)
class Reading:
    """One distinct text of a request, and what is known of it so far."""

    index: int  # of the input that held it first
    text: TextInput
    asked: tuple[TaskVersion, ...]
    beside: tuple[TaskVersion, ...]  # scored too where the text is not too long for them
    encoding: Encoding | None = None  # from the cache or from a worker
    outputs: dict[str, TaskOutput] = field(default_factory=dict)  # by digest, from the cache and then the engine
    cached: frozenset[str] = frozenset()  # digests of `asked` whose outputs came from the cache

    @property
    def encoded(self) -> Encoding:
        """To be asked once the cache or a worker has filled it."""
        assert self.encoding is not None
        return self.encoding

    @property
    def has_offsets(self) -> bool:
        """Whether somebody reads where in the text a token stands."""
        return any(v.problem_type is ProblemType.TOKEN for v in (*self.asked, *self.beside))

    def missing(self, spec: BackboneSpec) -> list[TaskVersion]:
        """What is left to compute, now that its length is known."""
        fitting = (v for v in self.beside if len(self.encoded) <= token_limit(spec, (v,)))
        wanted = {version.digest: version for version in (*self.asked, *fitting)}
        return [version for digest, version in wanted.items() if digest not in self.outputs]


@dataclass(frozen=True, slots=True, eq=False)
class Computed:
    plans: tuple[tuple[Reading, Plan], ...]  # of the texts of which something was missing
    result: EngineResult  # an output for each version of each plan
    tokenization_s: float  # from submission to the encodings, the wait for a worker in it


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """One request's texts of which something is left to compute."""

    readings: tuple[Reading, ...]
    truncate: bool
    deadline_s: float
    began_s: float
    trace: Trace
    done: Future[Computed] = field(default_factory=Future)

    @property
    def unread(self) -> list[Reading]:
        return [reading for reading in self.readings if reading.encoding is None]

    @property
    def characters(self) -> int:
        return sum(len(r.text.text) + len(r.text.text_pair or "") for r in self.unread)

    @property
    def has_offsets(self) -> bool:
        return any(reading.has_offsets for reading in self.readings)


class Dispatcher:
    """An idle worker starts at once; what waits while all are busy is tokenized together by the next that is free."""

    def __init__(self, engine: EnginePort, tokenizer: TokenizerPort, workers: Executor) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._workers = workers
        self._waiting: deque[_Job] = deque()
        self._lock = threading.Lock()  # of those who take; whoever appends needs none

    def submit(
        self, readings: Sequence[Reading], truncate: bool, deadline_s: float, trace: Trace = UNTRACED
    ) -> Future[Computed]:
        """The future ends with what was computed or with any ManifoldError. Cancelling it drops what is queued."""
        job = _Job(tuple(readings), truncate, deadline_s, time.monotonic(), trace)
        self._waiting.append(job)
        wake = self._workers.submit(self._serve_next)
        wake.add_done_callback(lambda ended: ended.cancelled() and job.done.cancel())  # the workers were shut down
        return job.done

    # -- on a worker's thread ------------------------------------------------------------------------------------------

    def _serve_next(self) -> None:
        self._serve(self._take())

    def _take(self) -> list[_Job]:
        """The oldest, with those behind it that can be tokenized in one call.

        Every job has brought a call of this, so that none is forgotten where a group ends before it.
        """
        group: list[_Job] = []
        room = _GROUP_CHARACTERS
        with self._lock:
            while self._waiting:
                job = self._waiting[0]
                if group and (job.characters > room or job.has_offsets != group[0].has_offsets):
                    break
                self._waiting.popleft()
                if not job.done.cancelled():
                    group.append(job)
                    room -= job.characters
        return group

    def _serve(self, jobs: Sequence[_Job]) -> None:
        """Where the tokenizer itself breaks on a group, each is served alone: only what it cannot take fails."""
        try:
            found = iter(self._encode(jobs))
        except BaseException as error:  # a panic of the tokenizer is no Exception, and whoever waits must hear of it
            if len(jobs) == 1:
                _fail(jobs[0], error)
            else:
                for job in jobs:
                    self._serve([job])
            return
        for job in jobs:
            encoded = [next(found) for _ in job.unread]
            try:
                self._forward(job, encoded)
            except BaseException as error:
                _fail(job, error)

    def _encode(self, jobs: Sequence[_Job]) -> list[Encoding | str]:
        unread = [(job, reading) for job in jobs for reading in job.unread]
        if not unread:
            return []
        return self._tokenizer.encode_each(
            [reading.text for _, reading in unread],
            [token_limit(self._engine.spec, reading.asked) for _, reading in unread],
            [job.truncate for job, _ in unread],
            jobs[0].has_offsets,
        )

    def _forward(self, job: _Job, encoded: Sequence[Encoding | str]) -> None:
        for reading, found in zip(job.unread, encoded, strict=True):
            if isinstance(found, str):
                raise TokenizationError(f"input {reading.index} {found}")
            reading.encoding = found
        tokenized_s = time.monotonic()
        job.trace.staged("tokenize", job.began_s, tokenized_s)
        plans = tuple(_plans(job, self._engine.spec))
        if job.done.cancelled():
            return
        request = EngineRequest(tuple(plan for _, plan in plans), job.deadline_s, job.trace.context)
        queued = self._engine.submit(request)
        queued.add_done_callback(lambda ended: _pass_on(ended, job, plans, tokenized_s))
        weakly = weakref.ref(queued)  # otherwise the two futures would hold each other, and the answer, for ever
        job.done.add_done_callback(lambda _: _cancel(weakly()))  # at once where it was cancelled in between


def _plans(job: _Job, spec: BackboneSpec) -> Iterator[tuple[Reading, Plan]]:
    for reading in job.readings:
        missing = reading.missing(spec)
        if missing:
            yield reading, make_plan(reading.encoded, missing, spec.num_layers)


def _pass_on(
    ended: Future[EngineResult], job: _Job, plans: tuple[tuple[Reading, Plan], ...], tokenized_s: float
) -> None:
    """On the engine's thread, or on the event loop where the request was cancelled."""
    if ended.cancelled():
        job.done.cancel()
        return
    error = ended.exception()
    if error is not None:
        _fail(job, error)
        return
    result = ended.result()
    job.trace.staged("queue", tokenized_s, tokenized_s + result.queue_s)
    with suppress(InvalidStateError):  # it was cancelled
        job.done.set_result(Computed(plans, result, tokenized_s - job.began_s))


def _cancel(queued: Future[EngineResult] | None) -> None:
    if queued is not None:
        queued.cancel()


def _fail(job: _Job, error: BaseException) -> None:
    with suppress(InvalidStateError):
        job.done.set_exception(error if isinstance(error, Exception) else _translated(error))


def _translated(panic: BaseException) -> EngineError:
    """What is no Exception would pass by everything that answers errors, and its own words may quote a text."""
    logger.error("a request's texts could not be tokenized: %s", type(panic).__name__)
    return EngineError("the tokenizer broke on a text of this request; the server's log names the fault")
