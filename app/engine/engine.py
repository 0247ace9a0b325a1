"""The engine: one thread that owns the device, an inbox, and futures that always end.

Knows plans, versions and batches; nothing of texts, task names on the wire, HTTP or Redis.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch

from app.domain import BatchReport, Encoding, EngineRequest, EngineResult, Plan, TaskOutput
from app.engine.artifact import Artifact
from app.engine.backbone import Backbone, apart
from app.engine.batch import Batch, Work, lay_out, shares
from app.engine.forward import Begun, begin_batch
from app.engine.graphs import TrunkGraphs
from app.engine.plan import make_plan, split_plan
from app.engine.prefix_bank import PrefixBank
from app.engine.scheduler import Scheduler
from app.errors import DeadlineError, EngineError, ManifoldError, UnavailableError, UnservableError

log = logging.getLogger(__name__)

CPU_CHUNK_TOKENS = 2048  # what a layer makes of so many tokens stays in a CPU's caches; larger calls are slower a token
# Padded tokens and rows of a batch that fill the device, by its type: more would only make the others wait.
_BATCH = {"cpu": (16384, 512), "cuda": (131072, 4096)}


@dataclass(slots=True, eq=False)
class _Ticket:
    """One request on its way: its future, and the outputs that are there so far."""

    future: Future[EngineResult]
    deadline_s: float | None
    wanted: list[tuple[str, ...]]  # [plan]: its versions' digests, in the request's order
    outputs: list[dict[str, TaskOutput]]  # [plan]: by digest, what is there so far
    missing: int  # parts still to come
    rows: int
    passes: float
    arrived_s: float
    context: object | None
    begun_s: float | None = None
    inference_s: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class _Item:
    """One text (or a part of one that has too many branches) in the queue."""

    ticket: _Ticket
    plan_index: int
    work: Work
    num_rows: int
    num_tokens: int
    num_virtual_tokens: int
    arrived_s: float


@dataclass(frozen=True, slots=True, eq=False)
class _Begun:
    """A batch that the device has been given."""

    shared: list[tuple[Work, list[_Item]]]  # what runs, and for whom
    batch: Batch
    running: Begun
    started_s: float
    collate_s: float


@dataclass(frozen=True, slots=True)
class _Wake:
    """Put into the inbox to make the thread look at its state."""


@dataclass(slots=True)
class _Life:
    running: bool = False
    closing: bool = False
    fault: BaseException | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class Engine:
    """`submit` from any thread; everything on the device happens on one thread of its own.

    A task that breaks fails alone in the outputs; a batch that breaks fails its requests and the thread lives on; a
    thread that dies fails everything that waits, and `alive` says so.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        max_batch_tokens: int | None = None,
        max_batch_rows: int | None = None,
        max_queue_delay_ms: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        observe: Callable[[BatchReport], None] | None = None,
    ) -> None:
        """`observe` is told of each batch behind its answers, on the engine's thread."""
        self.backbone = backbone
        self.spec = backbone.spec
        self.bank = PrefixBank(backbone.device, backbone.dtype)
        most_tokens, most_rows = _BATCH[backbone.device.type]
        self._scheduler: Scheduler[_Item] = Scheduler(
            max_batch_tokens or most_tokens, max_batch_rows or most_rows, max_queue_delay_ms / 1000
        )
        self._inbox: queue.SimpleQueue[list[_Item] | _Wake] = queue.SimpleQueue()
        self._chunk_tokens = CPU_CHUNK_TOKENS if backbone.device.type == "cpu" else None
        # While a CUDA device computes, the next batch is laid out. A CPU's own cores would have to do both.
        self._works_ahead = backbone.device.type != "cpu"
        self._graphs = TrunkGraphs(backbone) if backbone.device.type == "cuda" else None
        self._begun: _Begun | None = None
        self._rows_in, self._rows_out = 0, 0  # of the queue so far: written under the lock, and by the engine's thread
        self._clock = clock
        self._observe = observe
        self._life = _Life()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # -- from any thread -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._life.running = True
        self._thread.start()

    def close(self) -> None:
        """End the thread after the batch that runs; what still waits gets UnavailableError."""
        with self._life.lock:
            self._life.closing = True
        self._inbox.put(_Wake())
        if self._thread.is_alive():
            self._thread.join()
        self._fail_waiting(UnavailableError("the engine was closed"))

    @property
    def alive(self) -> bool:
        return self._life.running and not self._life.closing and self._life.fault is None

    @property
    def queue_rows(self) -> int:
        """Rows that wait for a batch, those included that came while one runs."""
        rows_out = self._rows_out  # first: what comes in between must not make it negative
        return self._rows_in - rows_out

    @property
    def max_batch_tokens(self) -> int:
        """Padded tokens that one batch may hold."""
        return self._scheduler.max_batch_tokens

    def device_bytes(self) -> int | None:
        """Memory taken on the device; None where it has none of its own."""
        if self.backbone.device.type != "cuda":
            return None
        return int(torch.cuda.memory_allocated(self.backbone.device))

    def load(self, artifact: Artifact) -> object:
        """Make a version resident, off the engine's thread: new tensors, no batch waits.

        Whoever holds the handle that is returned keeps it resident, also after `unload`.
        """
        return apart(lambda: self.bank.load(artifact))

    def unload(self, digest: str) -> None:
        """Forget a version. Requests that were submitted before, or hold its handle, still end with its answer."""
        self.bank.unload(digest)

    def submit(self, request: EngineRequest) -> Future[EngineResult]:
        """Queue a request. The future ends with outputs, with a ManifoldError, or cancelled.

        Raises NotFoundError for a version that is not resident, UnavailableError where the engine does not run.
        """
        items, future = self._items(request)
        with self._life.lock:
            if not self.alive:
                raise UnavailableError(self._why_not_alive())
            self._rows_in += sum(item.num_rows for item in items)
            self._inbox.put(items)
        return future

    def _why_not_alive(self) -> str:
        fault = self._life.fault
        return f"the engine died: {fault}" if fault is not None else "the engine does not run"

    def _items(self, request: EngineRequest) -> tuple[list[_Item], Future[EngineResult]]:
        now = self._clock()
        if not all(plan.versions for plan in request.plans):
            raise UnservableError("a plan asks for no version")
        parts = [split_plan(p, self.spec.num_layers, self._scheduler.max_batch_tokens) for p in request.plans]
        ticket = _Ticket(
            future=Future(),
            deadline_s=request.deadline_s,
            wanted=[tuple(version.digest for version in plan.versions) for plan in request.plans],
            outputs=[{} for _ in request.plans],
            missing=sum(map(len, parts)),
            rows=sum(len(plan.rows) for pieces in parts for plan in pieces),
            passes=sum(plan.passes for pieces in parts for plan in pieces),
            arrived_s=now,
            context=request.context,
        )
        items = [self._item(ticket, plan_index, plan) for plan_index, pieces in enumerate(parts) for plan in pieces]
        if not items:
            ticket.future.set_result(EngineResult((), 0, 0.0, 0.0, 0.0))
        return items, ticket.future

    def _item(self, ticket: _Ticket, plan_index: int, plan: Plan) -> _Item:
        residents = tuple(self.bank.get(version.digest) for version in plan.versions)
        rows, tokens = len(plan.rows), len(plan.encoding)
        return _Item(
            ticket,
            plan_index,
            Work(plan, residents),
            num_rows=rows,
            num_tokens=tokens,
            num_virtual_tokens=plan.cost_tokens - rows * tokens,
            arrived_s=ticket.arrived_s,
        )

    # -- on the engine's thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            if self._graphs is not None:
                self._graphs.warm((1,), range(16, 129, 16), self.spec.num_layers)
            while not self._life.closing:
                self.step()
            self._finish_begun()
        except BaseException as fault:
            log.critical("the engine's thread died", exc_info=fault)
            with self._life.lock:
                self._life.fault = fault
            self._fail_waiting(UnavailableError(self._why_not_alive()))

    def step(self) -> None:
        """Take in what came, choose a batch, hand it to the device, answer the one before."""
        self._take_in()
        begun = None
        try:
            if self._is_due():
                begun = self._begin(self._taken(self._scheduler.next_batch()))
        finally:
            self._finish_begun()
            self._begun = begun
        if not self._works_ahead:
            self._finish_begun()

    def _finish_begun(self) -> None:
        begun, self._begun = self._begun, None
        if begun is not None:
            self._finish(begun)

    def _is_due(self) -> bool:
        return self._scheduler.wait_s(self._clock()) == 0.0

    def _take_in(self) -> None:
        """Wait for the inbox only when no batch is due or begun, then empty it."""
        timeout = self._scheduler.wait_s(self._clock()) if self._begun is None else 0.0
        try:
            message = self._inbox.get(block=timeout != 0.0, timeout=timeout)
            while True:
                if not isinstance(message, _Wake):
                    for item in message:
                        self._scheduler.add(item)
                message = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _taken(self, items: list[_Item]) -> list[_Item]:
        self._rows_out += sum(item.num_rows for item in items)
        return items

    def _still_wanted(self, ticket: _Ticket, now: float) -> bool:
        """Also asked of the later texts of a request that has begun: its future stays cancellable to the end."""
        if ticket.future.done():
            return False
        if ticket.deadline_s is not None and now > ticket.deadline_s:
            _fail(ticket, DeadlineError("the deadline passed while the request was queued"))
            return False
        if ticket.begun_s is None:
            ticket.begun_s = now
        return True

    def _begin(self, waiting: Sequence[_Item]) -> _Begun | None:
        """Hand over what is still wanted: cancelled requests are dropped, late ones get DeadlineError."""
        started_s = self._clock()
        items = [item for item in waiting if self._still_wanted(item.ticket, started_s)]
        if not items:
            return None
        begun: _Begun | None = None
        with _failing(items):
            shared = _share(items, self.spec.num_layers)
            batch = lay_out([work for work, _ in shared], self.spec.num_layers, self._chunk_tokens, self._graphs)
            collate_s = self._clock() - started_s
            running = begin_batch(batch, self.backbone, self._graphs)
            begun = _Begun(shared, batch, running, started_s, collate_s)
        return begun

    def _finish(self, begun: _Begun) -> None:
        items = [item for _, members in begun.shared for item in members]
        with _failing(items):
            forward_s = begun.running.forward_s()
            arrived_s = self._clock()
            outputs = begun.running.scores.outputs()
            ended_s = self._clock()
            heads_s = begun.running.heads_s + ended_s - arrived_s
            for ticket in {id(item.ticket): item.ticket for item in items}.values():
                ticket.inference_s += ended_s - begun.started_s
            of_work = {id(work): out for work, out in zip(begun.batch.works, outputs, strict=True)}
            for work, members in begun.shared:
                digests = (version.digest for version in work.plan.versions)
                found = dict(zip(digests, of_work[id(work)], strict=True))
                for item in members:
                    _deliver(item, found)
            _log_failed(items, begun.batch.works, outputs)
            self._report(begun, items, forward_s, heads_s, ended_s)

    def _report(self, begun: _Begun, items: Sequence[_Item], forward_s: float, heads_s: float, ended_s: float) -> None:
        """Behind the answers, and never their fault."""
        if self._observe is None:
            return
        names = {v.digest: (v.task, v.version) for item in items for v in item.work.plan.versions}
        batch, contexts = begun.batch, (item.ticket.context for item in items)
        report = BatchReport(
            rows=batch.num_rows,
            tokens=batch.num_rows * batch.num_tokens,
            collate_s=begun.collate_s,
            forward_s=forward_s,
            heads_s=heads_s,
            shares={names[digest]: share for digest, share in shares(batch).items()},
            passes=sum(work.plan.passes for work in batch.works),
            began_s=begun.started_s,
            ended_s=ended_s,
            contexts=tuple({id(context): context for context in contexts if context is not None}.values()),
        )
        try:
            self._observe(report)
        except Exception:
            log.exception("a batch could not be reported")

    def _fail_waiting(self, error: ManifoldError) -> None:
        """Where the engine's thread has ended, or ends with this."""
        for item in self._taken(self._scheduler.drain()):
            _fail(item.ticket, error)
        while True:
            try:
                message = self._inbox.get_nowait()
            except queue.Empty:
                return
            if not isinstance(message, _Wake):
                for item in self._taken(message):
                    _fail(item.ticket, error)


@contextmanager
def _failing(items: Sequence[_Item]) -> Iterator[None]:
    """What breaks inside fails these items' requests, and the thread lives on."""
    try:
        yield
    except Exception:
        log.exception("a batch of %d texts failed", len(items))
        for item in items:
            _fail(item.ticket, EngineError("the batch that this request was in failed; the server's log says why"))
    except BaseException:  # the thread ends, and these are in no queue any more
        for item in items:
            _fail(item.ticket, UnavailableError("the engine died while it computed this request"))
        raise


def _share(items: Sequence[_Item], num_layers: int) -> list[tuple[Work, list[_Item]]]:
    """What is run, and for whom: items of one text are one work, with one trunk and each version once.

    Taggers read a text's words too; whoever came without them stands beside any that have them.
    """
    encodings = [item.work.plan.encoding for item in items]
    words = {_text_of(encoding): encoding.word_ids for encoding in encodings if encoding.word_ids}
    alike: dict[tuple[tuple[int | None, ...], ...], list[_Item]] = {}
    for item, encoding in zip(items, encodings, strict=True):
        text = _text_of(encoding)
        alike.setdefault((*text, encoding.word_ids or words.get(text, ())), []).append(item)
    return [(_merged(members, num_layers), members) for members in alike.values()]


def _text_of(encoding: Encoding) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int]]:
    """Where a text holds separators of its own, two pairs can have the same tokens, and begin elsewhere."""
    return encoding.input_ids, encoding.token_type_ids, (encoding.pair_start,)


def _merged(members: Sequence[_Item], num_layers: int) -> Work:
    if len(members) == 1:
        return members[0].work
    residents = {r.version.digest: r for item in members for r in item.work.residents}
    versions = [resident.version for resident in residents.values()]
    encoding = max((item.work.plan.encoding for item in members), key=lambda one: len(one.word_ids))  # with words
    plan = make_plan(encoding, versions, num_layers)
    return Work(plan, tuple(residents.values()))


def _deliver(item: _Item, outputs: Mapping[str, TaskOutput]) -> None:
    ticket = item.ticket
    digests = (version.digest for version in item.work.plan.versions)
    ticket.outputs[item.plan_index].update((digest, outputs[digest]) for digest in digests)
    ticket.missing -= 1
    if ticket.missing:
        return
    begun = ticket.begun_s if ticket.begun_s is not None else ticket.arrived_s
    joined = tuple(
        tuple(outputs[digest] for digest in digests)
        for digests, outputs in zip(ticket.wanted, ticket.outputs, strict=True)
    )
    result = EngineResult(joined, ticket.rows, ticket.passes, begun - ticket.arrived_s, ticket.inference_s)
    with suppress(InvalidStateError):  # it has ended already: cancelled, or failed with another of its texts
        ticket.future.set_result(result)


def _log_failed(items: Sequence[_Item], works: Sequence[Work], outputs: Sequence[tuple[TaskOutput, ...]]) -> None:
    """A line for each version that failed in a batch, however many texts it failed for."""
    failed = Counter(
        (version.digest, output.error)
        for work, of_versions in zip(works, outputs, strict=True)
        for version, output in zip(work.plan.versions, of_versions, strict=True)
        if output.error is not None
    )
    if not failed:
        return
    names = {v.digest: f"{v.task}@{v.version}" for item in items for v in item.work.plan.versions}
    for (digest, error), count in failed.items():
        log.error("%s failed for %d texts of a batch: %s", names[digest], count, error)


def _fail(ticket: _Ticket, error: ManifoldError) -> None:
    with suppress(InvalidStateError):
        ticket.future.set_exception(error)
