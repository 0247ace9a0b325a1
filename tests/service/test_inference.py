"""The use case by itself: what cancelling, swapping and failing do to a request."""

from __future__ import annotations

import asyncio

import pytest

from app.domain import InputKind, Snapshot, TextInput
from app.errors import EngineError, NotFoundError, TooLargeError
from app.service.runtime import Runtime
from tests.fakes import FakeEngine, make_snapshot, make_task, make_version

pytestmark = pytest.mark.anyio
HELLO = [TextInput("hello")]


async def begun(engine: FakeEngine) -> None:
    async with asyncio.timeout(5):
        while not engine.futures:
            await asyncio.sleep(0.005)


async def test_cancelling_a_request_drops_what_it_had_queued(runtime: Runtime, engine: FakeEngine) -> None:
    engine.holds = True
    request = asyncio.create_task(runtime.inference.predict(HELLO, ["spam"], False))
    await begun(engine)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert engine.futures[0].cancelled()
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
    from dataclasses import replace

    shifted = replace(make_version("shifted"), position_offset=20)
    runtime.catalog.snapshot = Snapshot(1, {"shifted": make_task(shifted)} | dict(make_snapshot().tasks))
    prediction = await runtime.inference.predict([TextInput("word " * 30)], ["shifted"], True)
    assert prediction.usage.tokens == 12


async def test_the_pair_tasks_answer_pairs(runtime: Runtime) -> None:
    prediction = await runtime.inference.predict([TextInput("a", "b")], None, False)
    (result,) = prediction.results
    assert list(result) == ["entailment"]
    assert runtime.catalog.snapshot.tasks["entailment"].versions[1].input_kind is InputKind.PAIR
