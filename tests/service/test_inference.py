"""The use case by itself: what cancelling, swapping and failing do to a request."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import pytest

from app.config import Settings
from app.domain import Encoding, InputKind, Snapshot, TaskOutput, TaskVersion, TextInput
from app.errors import DeadlineError, EngineError, NotFoundError, TokenizationError, TooLargeError, UnservableError
from app.service.answers import FailedAnswer, LabelAnswer
from app.service.runtime import Runtime
from app.service.usage import Usage
from tests.fakes import (
    FakeEngine,
    FakeObserver,
    FakeTokenizer,
    make_runtime,
    make_snapshot,
    make_task,
    make_version,
    snapshot_of,
)
from tests.serving import until

pytestmark = pytest.mark.anyio
HELLO = [TextInput("hello")]


class FickleEngine(FakeEngine):
    """Never says the same twice, so that what comes from the cache can be told from what is computed again."""

    def _output(self, encoding: Encoding, version: TaskVersion) -> TaskOutput:
        output = super()._output(encoding, version)
        return replace(output, scores=tuple(score / (1 + len(self.requests) / 64) for score in output.scores))


@pytest.fixture
def engine() -> FakeEngine:
    return FickleEngine()


async def begun(engine: FakeEngine) -> None:
    await until(lambda: engine.futures)


async def test_cancelling_a_request_drops_what_it_had_queued(runtime: Runtime, engine: FakeEngine) -> None:
    engine.holds = True
    request = asyncio.create_task(runtime.inference.predict(HELLO, ["spam"], False))
    await begun(engine)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    await until(engine.futures[0].cancelled)  # by the worker, where it had not come back from the engine yet
    assert runtime.admission.in_flight == 0


async def test_a_request_keeps_the_snapshot_that_it_began_with(runtime: Runtime, engine: FakeEngine) -> None:
    engine.holds = True
    request = asyncio.create_task(runtime.inference.predict(HELLO, ["spam"], False))
    await begun(engine)
    runtime.catalog.snapshot = Snapshot(8, {}, {})
    engine.release()
    prediction = await request
    assert prediction.generation == 7 and "spam" in prediction.results[0]
    with pytest.raises(NotFoundError):
        await runtime.inference.predict(HELLO, ["spam"], False)


async def test_one_request_reaches_the_engine_for_all_texts_and_tasks(runtime: Runtime, engine: FakeEngine) -> None:
    await runtime.inference.predict([TextInput("a"), TextInput("b c")], ["spam", "intent"], False)
    (request,) = engine.requests
    assert [len(plan.versions) for plan in request.plans] == [2, 2]
    assert all(len(plan.rows) == 1 for plan in request.plans), "both tasks read one trunk"


async def test_errors_give_the_permit_back(runtime: Runtime, engine: FakeEngine) -> None:
    engine.failure = EngineError("the batch failed")
    with pytest.raises(EngineError):
        await runtime.inference.predict(HELLO, None, False)
    with pytest.raises(TooLargeError):
        await runtime.inference.predict(HELLO * 33, None, False)
    assert runtime.admission.in_flight == 0


async def test_a_task_with_shifted_positions_reads_fewer_tokens(runtime: Runtime, engine: FakeEngine) -> None:
    shifted = replace(make_version("shifted"), position_offset=20)
    runtime.catalog.snapshot = Snapshot(1, {"shifted": make_task(shifted)} | dict(make_snapshot().tasks))
    prediction = await runtime.inference.predict([TextInput("word " * 30)], ["shifted"], True)
    assert prediction.usage.tokens == 12


async def test_the_pair_tasks_answer_pairs(runtime: Runtime) -> None:
    prediction = await runtime.inference.predict([TextInput("a", "b")], None, False)
    (result,) = prediction.results
    assert list(result) == ["entailment"]
    assert runtime.catalog.snapshot.tasks["entailment"].versions[1].input_kind is InputKind.PAIR


async def test_a_deadline_also_holds_while_all_workers_are_busy(settings: Settings, engine: FakeEngine) -> None:
    tokenizer, goes_on = FakeTokenizer(), threading.Event()
    runtime = make_runtime(settings.model_copy(update={"deadline_ms": 50.0}), engine, tokenizer=tokenizer)
    workers = [runtime.inference._dispatcher._workers.submit(goes_on.wait, 10) for _ in range(2)]
    try:
        with pytest.raises(DeadlineError, match="the deadline of 50 ms passed first"):
            await runtime.inference.predict(HELLO, ["spam"], False)
    finally:
        goes_on.set()
    assert all(await asyncio.gather(*map(asyncio.wrap_future, workers)))
    runtime.close()
    assert not tokenizer.calls and not engine.requests and runtime.admission.in_flight == 0


async def test_equal_texts_of_one_request_are_computed_once(runtime: Runtime, engine: FakeEngine) -> None:
    texts = [TextInput("a b"), TextInput("c"), TextInput("a b"), TextInput("a b", None)]
    prediction = await runtime.inference.predict(texts, ["spam"], False)
    assert len(engine.requests[0].plans) == 2
    first, second, *others = prediction.results
    assert others == [first, first] != [second, second]
    assert prediction.usage == Usage(tokens=15, rows=2, passes=2.0, cached=0)


# -- what was answered before ------------------------------------------------------------------------------------------


def counted(runtime: Runtime) -> tuple[float, float]:
    """Hits and misses so far."""
    lines = dict(line.rsplit(" ", 1) for line in runtime.metrics.render()[0].decode().splitlines())
    return float(lines["manifold_answer_cache_hits_total"]), float(lines["manifold_answer_cache_misses_total"])


async def test_a_text_seen_before_costs_nothing(runtime: Runtime, engine: FakeEngine, tokenizer: FakeTokenizer) -> None:
    texts = [TextInput("to New York"), TextInput("stay")]
    first = await runtime.inference.predict(texts, None, False)
    assert first.usage == Usage(tokens=8, rows=2, passes=2.0, cached=0)
    again = await runtime.inference.predict(texts, None, False)
    assert again.results == first.results
    assert again.results[0]["slots"].spans[0].text == "to"  # type: ignore[union-attr]
    assert again.usage == Usage(tokens=8, rows=0, passes=0.0, cached=10)
    assert (again.timings.tokenization_s, again.timings.queue_s, again.timings.inference_s) == (0, 0, 0)
    assert len(engine.requests) == len(tokenizer.calls) == 1
    assert counted(runtime) == (10, 10)


async def test_only_what_is_missing_is_computed(runtime: Runtime, engine: FakeEngine, tokenizer: FakeTokenizer) -> None:
    seen, fresh = TextInput("to New York"), TextInput("stay")
    first = await runtime.inference.predict([seen], ["spam", "stars"], False)
    second = await runtime.inference.predict([fresh, seen], ["stars", "intent", "spam"], False)
    assert [[v.task for v in plan.versions] for plan in engine.requests[1].plans] == [
        ["stars", "intent", "spam"],
        ["intent"],
    ]
    assert {name: second.results[1][name] for name in ("spam", "stars")} == first.results[0]
    assert second.usage == Usage(tokens=8, rows=2, passes=2.0, cached=2)
    assert tokenizer.calls == [["to New York"], ["stay"]]


async def test_spans_are_found_in_a_text_that_was_read_without_offsets(
    runtime: Runtime, engine: FakeEngine, tokenizer: FakeTokenizer
) -> None:
    text = [TextInput("to New York")]
    spam = await runtime.inference.predict(text, ["spam"], False)
    slots = await runtime.inference.predict(text, ["spam", "slots"], False)
    again = await runtime.inference.predict(text, ["slots"], False)
    assert slots.results[0]["spam"] == spam.results[0]["spam"]
    assert [version.task for version in engine.requests[1].plans[0].versions] == ["slots"]
    assert again.results[0]["slots"] == slots.results[0]["slots"]
    assert len(tokenizer.calls) == 2


async def test_a_truncated_text_is_computed_each_time(runtime: Runtime, engine: FakeEngine) -> None:
    text = [TextInput("word " * 100)]
    for _ in range(2):
        prediction = await runtime.inference.predict(text, ["spam"], True)
        assert prediction.usage == Usage(tokens=32, rows=1, passes=1.0, cached=0)
    with pytest.raises(TokenizationError, match="input 0 has 102 tokens"):
        await runtime.inference.predict(text, ["spam"], False)
    assert len(engine.requests) == 2


async def test_a_text_that_is_known_can_be_too_long_for_another_task(runtime: Runtime, engine: FakeEngine) -> None:
    shifted = replace(make_version("shifted"), position_offset=20)
    runtime.catalog.snapshot = Snapshot(1, {"shifted": make_task(shifted)} | dict(make_snapshot().tasks))
    texts = [TextInput("a"), TextInput("word " * 20)]
    await runtime.inference.predict(texts, ["spam"], False)
    with pytest.raises(TokenizationError, match="input 1 has 22 tokens and the limit is 12"):
        await runtime.inference.predict(texts, ["spam", "shifted"], False)
    cut = await runtime.inference.predict(texts[1:], ["spam", "shifted"], True)
    assert cut.usage == Usage(tokens=12, rows=2, passes=2.0, cached=0)
    whole = await runtime.inference.predict(texts[1:], ["spam"], True)
    assert whole.usage == Usage(tokens=22, rows=0, passes=0.0, cached=1)


async def test_a_swap_never_brings_an_old_answer_and_a_rollback_brings_it_back(runtime: Runtime) -> None:
    versions = [make_version("mood", number) for number in (1, 2)]
    seen = []
    for champion in (1, 2, 1):
        runtime.catalog.snapshot = snapshot_of(make_task(*versions, champion=champion))
        prediction = await runtime.inference.predict(HELLO, ["mood"], False)
        seen.append((prediction.results[0]["mood"], prediction.usage.cached))
    (old, _), (new, _), (back, _) = seen
    assert [answer.version for answer, _ in seen] == [1, 2, 1]
    assert [cached for _, cached in seen] == [0, 0, 1]
    assert back == old and replace(new, version=1) != old


async def test_a_failure_is_not_remembered(runtime: Runtime, engine: FakeEngine) -> None:
    engine.broken_tasks = {"spam"}
    broken = await runtime.inference.predict(HELLO, ["spam", "intent"], False)
    engine.broken_tasks = set()
    mended = await runtime.inference.predict(HELLO, ["spam", "intent"], False)
    assert isinstance(broken.results[0]["spam"], FailedAnswer)
    assert isinstance(mended.results[0]["spam"], LabelAnswer)
    assert mended.results[0]["intent"] == broken.results[0]["intent"]
    assert mended.usage.cached == 1


async def test_vectors_are_remembered_too(runtime: Runtime, engine: FakeEngine) -> None:
    texts = [TextInput("one"), TextInput("two three"), TextInput("one")]
    first = await runtime.inference.embed(texts, "tiny", False)
    again = await runtime.inference.embed(texts, "tiny", False)
    assert again.vectors == first.vectors and len(engine.requests) == 1
    assert first.usage == Usage(tokens=10, rows=2, passes=2.0, cached=0)
    assert again.usage == Usage(tokens=10, rows=0, passes=0.0, cached=3)
    with pytest.raises(UnservableError, match="4 dimensions"):
        await runtime.inference.embed(texts, "tiny", False, dimensions=3)


async def test_off_computes_every_time(settings: Settings, engine: FakeEngine) -> None:
    runtime = make_runtime(settings.model_copy(update={"answer_cache_bytes": 0}), engine)
    answers = [(await runtime.inference.predict(HELLO, ["spam"], False)) for _ in range(2)]
    runtime.close()
    assert answers[0].results != answers[1].results
    assert [answer.usage.cached for answer in answers] == [0, 0] and len(engine.requests) == 2
    assert counted(runtime) == (0, 0)


async def test_times_of_what_came_from_the_cache_count_for_no_version(settings: Settings, engine: FakeEngine) -> None:
    observer = FakeObserver()
    mood = make_task(*(make_version("mood", number) for number in (1, 2)), champion=1, shadow=(2,))
    runtime = make_runtime(settings, engine, snapshot_of(mood, make_task(make_version("spam"))), observer=observer)
    for text, tasks in (("a", ["mood"]), ("a", ["mood"]), ("b", ["spam"]), ("b", ["mood", "spam"]), ("c", ["mood"])):
        await runtime.inference.predict([TextInput(text)], tasks, False, request_id="r")
    runtime.close()
    seen = observer.observations
    assert [observation.seconds for observation in seen] == [0.002, None, None, 0.002]
    assert all(observation.answers[0].keys() == {1, 2} for observation in seen), "all versions are still compared"
    assert seen[0].answers == seen[1].answers
