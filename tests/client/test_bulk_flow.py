"""How rows are asked: of like length together, no more at once than go through, and the guilty ones alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from app.client import bulk_flow
from app.client.bulk_columns import Outcome
from app.client.bulk_flow import AwayError, Flow, groups
from app.client.bulk_source import Chunk, Fault
from app.domain import TextInput
from app.errors import DeadlineError, EngineError, NotFoundError, OverloadedError, UnservableError

pytestmark = pytest.mark.anyio


@dataclass
class FakePredictor:
    """Says of each text how long it is, after it has heard of `trouble` for the request."""

    trouble: Callable[[Sequence[TextInput], int], Exception | None] = lambda _texts, _in_flight: None
    max_rows: int = 4
    delay_s: float = 0.001
    in_flight: int = 0
    most_in_flight: int = 0
    asked: list[list[str]] = field(default_factory=list)

    async def predict(self, inputs: Sequence[TextInput]) -> list[Outcome]:
        self.asked.append([text.text for text in inputs])
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            error = self.trouble(inputs, self.in_flight)
            await asyncio.sleep(self.delay_s)
        finally:
            self.in_flight -= 1
        if error is not None:
            raise error
        return [Outcome({"length": {"version": len(text.text)}}, 1) for text in inputs]

    async def close(self) -> None: ...


def chunk_of(*inputs: str | Fault) -> Chunk:
    return Chunk(tuple(TextInput(i) if isinstance(i, str) else i for i in inputs), ())


async def answer(
    predictor: FakePredictor, chunk: Chunk, concurrency: int = 8, patience_s: float = 1.0
) -> list[Outcome]:
    return await Flow(predictor, concurrency, patience_s, lambda _: None).answer(chunk)


def lengths(outcomes: Sequence[Outcome]) -> list[object]:
    return [outcome.error or outcome.answers["length"]["version"] for outcome in outcomes]


async def test_rows_of_like_length_are_asked_together_and_answered_in_their_order() -> None:
    texts = ["a" * n for n in (9, 1, 8, 2, 7, 3, 6, 4)]
    predictor = FakePredictor()
    assert lengths(await answer(predictor, chunk_of(*texts))) == [9, 1, 8, 2, 7, 3, 6, 4]
    assert [[len(text) for text in request] for request in predictor.asked] == [[1, 2, 3, 4], [6, 7, 8, 9]]


async def test_pairs_and_single_texts_are_not_mixed() -> None:
    inputs = (TextInput("a"), TextInput("a", "b"), Fault("no"), TextInput("b"), TextInput("c", "d"))
    assert sorted(sorted(group) for group in groups(Chunk(inputs, ()), 32)) == [[0, 3], [1, 4]]


async def test_a_row_that_is_refused_fails_alone() -> None:
    def trouble(texts: Sequence[TextInput], _: int) -> Exception | None:
        if any("bad" in text.text for text in texts):
            return UnservableError("input 0 has a fault" if len(texts) == 1 else "one of them has a fault")
        return EngineError("it broke") if any("worse" in text.text for text in texts) else None

    chunk = chunk_of("good", "bad", "a text", "worse", Fault("unreadable"))
    said = lengths(await answer(FakePredictor(trouble), chunk))
    assert said == [4, "this row has a fault", 6, "it broke", "unreadable"]


async def test_a_part_ends_before_the_next_whatever_its_rows_are() -> None:
    """Else a run that is stopped would have much begun and little kept."""

    def trouble(texts: Sequence[TextInput], _: int) -> Exception | None:
        return UnservableError("no") if any("bad" in text.text for text in texts) else None

    predictor = FakePredictor(trouble)
    flow = Flow(predictor, 2, 1.0, lambda _: None)
    first = asyncio.create_task(flow.answer(chunk_of("bad", *["text"] * 15)))
    second = asyncio.create_task(flow.answer(chunk_of(*["later text"] * 200)))
    await first
    assert sum("later text" in request for request in predictor.asked) < 10
    await second


async def test_more_are_in_flight_while_answers_are_quick() -> None:
    predictor = FakePredictor(max_rows=1)
    await answer(predictor, chunk_of(*map(str, range(100))), concurrency=6)
    assert predictor.most_in_flight == 6


async def test_slow_answers_leave_few_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk_flow, "_QUICK_S", 0.0)
    predictor = FakePredictor(max_rows=1)
    await answer(predictor, chunk_of(*map(str, range(20))))
    assert predictor.most_in_flight == 2


async def test_too_many_in_flight_become_fewer_and_all_are_answered() -> None:
    def trouble(_: Sequence[TextInput], in_flight: int) -> Exception | None:
        return OverloadedError("full", retry_after_s=0.001) if in_flight > 3 else None

    predictor = FakePredictor(trouble, max_rows=1)
    assert lengths(await answer(predictor, chunk_of(*(["text"] * 200)), concurrency=50)) == [4] * 200
    assert predictor.most_in_flight <= 8


async def test_a_deadline_is_met_with_smaller_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk_flow, "_QUICK_S", 0.0)

    def trouble(texts: Sequence[TextInput], in_flight: int) -> Exception | None:
        return DeadlineError("too late") if len(texts) * in_flight > 1 else None

    assert lengths(await answer(FakePredictor(trouble), chunk_of("a", "bb", "ccc", "dddd", "eeeee"))) == [1, 2, 3, 4, 5]


async def test_a_deadline_that_not_even_one_row_meets_stops_the_run() -> None:
    with pytest.raises(AwayError, match="one row took too long: too late"):
        await answer(FakePredictor(lambda *_: DeadlineError("too late")), chunk_of("a", "b"), patience_s=0.05)


async def test_who_is_away_is_waited_for_while_patience_lasts() -> None:
    troubles: list[Exception | None] = [AwayError("gone", 0.001)] * 3 + [None]
    assert lengths(await answer(FakePredictor(lambda *_: troubles.pop(0)), chunk_of("a"))) == [1]
    with pytest.raises(AwayError, match="gone"):
        await answer(FakePredictor(lambda *_: AwayError("gone", 0.001)), chunk_of("a", "b"), patience_s=0.05)


async def test_what_no_row_is_to_blame_for_stops_the_run_and_its_other_requests() -> None:
    def trouble(texts: Sequence[TextInput], _: int) -> Exception | None:
        return NotFoundError("no such task") if texts[0].text == "a" else None

    predictor = FakePredictor(trouble, max_rows=1, delay_s=0.05)
    with pytest.raises(NotFoundError):
        await answer(predictor, chunk_of("a", *("bb" for _ in range(50))), concurrency=2)
    await asyncio.sleep(0.1)
    assert len(predictor.asked) <= 4 and predictor.in_flight == 0
