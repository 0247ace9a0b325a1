"""Workers, one busy and the rest waiting: who is tokenized together, who fails alone, who is dropped."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

import pytest

from app.domain import Encoding, ProblemType, TaskVersion, TextInput
from app.errors import EngineError, TokenizationError, UnavailableError
from app.service.dispatch import Computed, Dispatcher, Reading
from tests.fakes import FakeEngine, FakeTokenizer, make_version
from tests.serving import wait_for

SPAM = make_version("spam")
SLOTS = make_version("slots", 1, ProblemType.TOKEN, ("O", "B-city"))
HELD, POISON = "held", "poison"


class Panic(BaseException):
    """What a library in another language raises when it breaks."""


class SlowTokenizer(FakeTokenizer):
    """Begins on what is HELD and goes on when it is told to; breaks on what holds POISON."""

    def __init__(self) -> None:
        super().__init__()
        self.has_begun, self.goes_on = threading.Event(), threading.Event()

    def encode_each(
        self, inputs: Sequence[TextInput], limits: Sequence[int], truncate: Sequence[bool], has_offsets: bool
    ) -> list[Encoding | str]:
        found = super().encode_each(inputs, limits, truncate, has_offsets)
        texts = [text.text for text in inputs]
        if HELD in texts:
            self.has_begun.set()
            assert self.goes_on.wait(10)
        if POISON in texts:
            raise Panic(f"index out of bounds in {texts}")
        return found


class Desk:
    """One worker, which is busy until it is `freed`."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.tokenizer = engine, SlowTokenizer()
        self.workers = ThreadPoolExecutor(1)
        self.dispatcher = Dispatcher(engine, self.tokenizer, self.workers)
        self.held = self.send(HELD)
        assert self.tokenizer.has_begun.wait(10)

    def send(self, *texts: str, version: TaskVersion = SPAM, truncate: bool = False) -> Future[Computed]:
        readings = [Reading(index, TextInput(text), (version,), ()) for index, text in enumerate(texts)]
        return self.dispatcher.submit(readings, truncate, time.monotonic() + 10)

    def freed(self) -> None:
        self.tokenizer.goes_on.set()
        self.held.result(10)

    @property
    def calls(self) -> list[list[str]]:
        """The texts of each call, but the held one."""
        return self.tokenizer.calls[1:]


@pytest.fixture
def desk(engine: FakeEngine) -> Iterator[Desk]:
    opened = Desk(engine)
    yield opened
    opened.tokenizer.goes_on.set()
    opened.workers.shutdown()


def lengths(done: Future[Computed]) -> list[int]:
    return [len(plan.encoding) for _, plan in done.result(10).plans]


def test_an_idle_worker_starts_at_once_and_what_waits_is_tokenized_together(desk: Desk) -> None:
    waiting = [desk.send("a"), desk.send("b c", "d"), desk.send("e " * 100, truncate=True)]
    assert desk.calls == []
    desk.freed()
    assert [lengths(done) for done in waiting] == [[3], [4, 3], [32]]
    assert desk.calls == [["a", "b c", "d", "e " * 100]]
    assert len(desk.engine.requests) == 4, "each request reaches the engine by itself"
    assert all(done.result().tokenization_s > 0 for done in waiting)


def test_the_one_that_is_too_long_fails_alone_and_by_its_own_number(desk: Desk) -> None:
    first, long, last = desk.send("a"), desk.send("b", "word " * 100), desk.send("c")
    desk.freed()
    assert (lengths(first), lengths(last)) == ([3], [3])
    with pytest.raises(TokenizationError, match="input 1 has 102 tokens and the limit is 32"):
        long.result(10)
    assert len(desk.calls) == 1 and len(desk.engine.requests) == 3


def test_the_one_that_the_tokenizer_breaks_on_fails_alone(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    first, poisoned, last = desk.send("a"), desk.send(POISON), desk.send("c")
    desk.freed()
    assert (lengths(first), lengths(last)) == ([3], [3])
    with pytest.raises(EngineError, match="the tokenizer broke on a text") as raised:  # an error that has an answer
        poisoned.result(10)
    assert [record.getMessage() for record in caplog.records] == ["a request's texts could not be tokenized: Panic"]
    assert POISON not in f"{raised.value} {raised.value.__cause__} {raised.value.__context__} {caplog.text}"


def test_requests_that_need_offsets_are_not_mixed_with_others(desk: Desk) -> None:
    waiting = [desk.send("a"), desk.send("b"), desk.send("New York", version=SLOTS), desk.send("c")]
    desk.freed()
    encodings = [done.result(10).plans[0][1].encoding for done in waiting]
    assert desk.calls == [["a", "b"], ["New York"], ["c"]]
    assert [bool(encoding.offsets) for encoding in encodings] == [False, False, True, False]


def test_a_large_text_keeps_nobody_waiting(desk: Desk) -> None:
    large = "a" * 30_000
    waiting = [desk.send("a"), desk.send(large), desk.send("b")]
    desk.freed()
    assert [lengths(done) for done in waiting] == [[3], [3], [3]]
    assert desk.calls == [["a"], [large], ["b"]]


def test_what_is_cancelled_while_it_waits_is_never_tokenized(desk: Desk) -> None:
    first, last = desk.send("a"), desk.send("b")
    assert first.cancel()
    desk.freed()
    assert lengths(last) == [3]
    assert desk.calls == [["b"]] and len(desk.engine.requests) == 2


def test_what_is_cancelled_while_it_is_tokenized_never_reaches_the_engine(desk: Desk) -> None:
    assert desk.held.cancel()
    desk.tokenizer.goes_on.set()
    assert lengths(desk.send("b")) == [3]
    assert len(desk.engine.requests) == 1


def test_what_is_cancelled_in_the_engine_is_dropped_there(desk: Desk) -> None:
    desk.freed()
    desk.engine.holds = True
    done = desk.send("a")
    wait_for(lambda: len(desk.engine.futures) == 2)
    assert done.cancel()
    wait_for(desk.engine.futures[1].cancelled)


def test_an_answered_request_leaves_nothing_to_the_garbage_collector(desk: Desk) -> None:
    desk.freed()
    gc.disable()
    try:
        done = desk.send("a")
        assert lengths(done) == [3]
        desk.workers.submit(bool).result(10)  # the worker has let go of it
        desk.engine.futures.clear()
        last = weakref.ref(done)
        del done
        wait_for(lambda: last() is None)
    finally:
        gc.enable()


def test_the_engines_errors_reach_whoever_waits(desk: Desk) -> None:
    desk.freed()
    desk.engine.failure = EngineError("the batch failed")
    with pytest.raises(EngineError, match="the batch failed"):
        desk.send("a").result(10)
    desk.engine.alive = False
    with pytest.raises(UnavailableError, match="does not run"):
        desk.send("a").result(10)


def test_nobody_waits_for_workers_that_were_shut_down(desk: Desk) -> None:
    waiting = desk.send("a")
    desk.workers.shutdown(wait=False, cancel_futures=True)
    with pytest.raises(CancelledError):
        waiting.result(10)
    desk.freed()


def test_a_text_whose_encoding_is_known_is_not_tokenized_again(desk: Desk) -> None:
    desk.freed()
    known = Reading(0, TextInput("a b"), (SPAM,), (), Encoding((1, 2, 3, 4), (0,) * 4))
    done = desk.dispatcher.submit([known, Reading(1, TextInput("c"), (SPAM,), ())], False, time.monotonic() + 10)
    assert lengths(done) == [4, 3]
    assert desk.calls == [["c"]]
