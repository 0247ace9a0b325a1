"""The answers to one part's rows: requests of several rows each, so many in flight as go through, tried until answered.

A row that cannot be served fails alone. Knows its predictor by a port; nothing of files.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from itertools import groupby
from typing import Any, Protocol

from app.client.bulk_columns import Outcome
from app.client.bulk_source import Chunk, Fault
from app.domain import InputKind, TextInput
from app.errors import (
    DeadlineError,
    EngineError,
    MalformedError,
    OverloadedError,
    TooLargeError,
    UnavailableError,
    UnservableError,
)

_ROWS_OWN = (UnservableError, MalformedError, TooLargeError, EngineError, DeadlineError)  # other rows may be answered
_FIRST_IN_FLIGHT = 2
_QUICK_S = 2.0  # answers that take longer wait for each other: more in flight would bring nothing but deadlines
_AFTER_DEADLINE_S = 0.1
_JITTER = 0.25


class AwayError(UnavailableError):
    """The predictor may come back."""

    def __init__(self, sentence: str, retry_after_s: float = 1.0) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(sentence)


class Predictor(Protocol):
    max_rows: int  # of one call

    async def predict(self, inputs: Sequence[TextInput]) -> list[Outcome]:
        """One outcome each. Raises ManifoldError, AwayError where it makes sense to try again."""
        ...

    async def close(self) -> None: ...


class Gate:
    """How many requests are in flight: few at first, one more with each quick answer, half where they were too many."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._limit = min(_FIRST_IN_FLIGHT, most)
        self._owed = 0  # permits that are to be taken back when they are returned
        self._permits = asyncio.Semaphore(self._limit)

    async def __aenter__(self) -> None:
        await self._permits.acquire()

    async def __aexit__(self, *_: object) -> None:
        self._give_permit()

    def widen(self) -> None:
        if self._limit < self._most:
            self._limit += 1
            self._give_permit()

    def narrow(self) -> None:
        taken = self._limit - max(1, self._limit // 2)
        self._limit -= taken
        self._owed += taken

    def _give_permit(self) -> None:
        if self._owed:
            self._owed -= 1
        else:
            self._permits.release()


class Flow:
    """`patience_s`: how long a predictor that is away is waited for. `advance` hears of rows that are done."""

    def __init__(
        self, predictor: Predictor, concurrency: int, patience_s: float, advance: Callable[[int], None]
    ) -> None:
        self._predictor = predictor
        self._gate = Gate(concurrency)
        self._patience_s = patience_s
        self._advance = advance

    async def answer(self, chunk: Chunk) -> list[Outcome]:
        """An outcome for each row, in their order. Raises ManifoldError where the whole run must stop."""
        outcomes = {row: Outcome({}, error=i.sentence) for row, i in enumerate(chunk.inputs) if isinstance(i, Fault)}
        self._advance(len(outcomes))
        await _all(self._begin(rows, outcomes) for rows in groups(chunk, self._predictor.max_rows))
        return [outcomes[row] for row in range(len(chunk.inputs))]

    async def _begin(self, rows: dict[int, TextInput], outcomes: dict[int, Outcome]) -> None:
        """Its permit is held until all of it is answered: what is asked again does not queue behind later parts."""
        async with self._gate:
            await self._ask(rows, outcomes)

    async def _ask(self, rows: dict[int, TextInput], outcomes: dict[int, Outcome]) -> None:
        """Halves what is refused, until the rows that are to blame stand alone."""
        try:
            answers = await self._insist(list(rows.values()))
        except _ROWS_OWN as error:
            if len(rows) > 1:
                await _all(self._ask(half, outcomes) for half in _halves(rows))
                return
            answers = [Outcome({}, error=str(error).replace("input 0", "this row"))]
        outcomes.update(zip(rows, answers, strict=True))
        self._advance(len(rows))

    async def _insist(self, inputs: Sequence[TextInput]) -> list[Outcome]:
        away_since_s: float | None = None
        while True:
            try:
                return await self._ask_once(inputs)
            except OverloadedError as error:  # it is there, and says when
                away_since_s, pause_s = None, error.retry_after_s
            except AwayError as error:
                away_since_s = away_since_s or time.monotonic()
                pause_s = error.retry_after_s
                if time.monotonic() + pause_s - away_since_s > self._patience_s:
                    raise
            await asyncio.sleep(pause_s * random.uniform(1, 1 + _JITTER))

    async def _ask_once(self, inputs: Sequence[TextInput]) -> list[Outcome]:
        began_s = time.monotonic()
        try:
            answers = await self._predictor.predict(inputs)
        except (OverloadedError, AwayError):
            self._gate.narrow()
            raise
        except DeadlineError as error:
            self._gate.narrow()
            if len(inputs) > 1:
                raise
            # It is the predictor that is slow, and no row's fault.
            raise AwayError(f"a request of one row took too long: {error}", _AFTER_DEADLINE_S) from error
        if time.monotonic() - began_s < _QUICK_S:
            self._gate.widen()
        return answers


async def _all(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Until all are done, or one fails: the others end with it."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def groups(chunk: Chunk, most: int) -> list[dict[int, TextInput]]:
    """Rows to be asked together, of like length, so that they pad little; pairs and single texts apart."""
    rows = [(row, text) for row, text in enumerate(chunk.inputs) if isinstance(text, TextInput)]
    rows.sort(key=lambda item: (item[1].kind, len(item[1].text) + len(item[1].text_pair or "")))
    found = []
    for _, same in groupby(rows, key=_kind):
        of_kind = list(same)
        found += [dict(of_kind[start : start + most]) for start in range(0, len(of_kind), most)]
    return found


def _kind(item: tuple[int, TextInput]) -> InputKind:
    return item[1].kind


def _halves(rows: dict[int, TextInput]) -> tuple[dict[int, TextInput], dict[int, TextInput]]:
    items = list(rows.items())
    middle = len(items) // 2
    return dict(items[:middle]), dict(items[middle:])
