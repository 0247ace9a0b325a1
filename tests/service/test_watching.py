"""What is handed aside of an answered request, and what becomes of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from app.config import Settings
from app.domain import Arm, TaskOutput, TextInput
from app.errors import NotFoundError
from app.service.dispatch import Reading
from app.service.usage import Timings, Usage
from app.service.watching import Served, Watch
from tests.fakes import FakeTokenizer, FakeWatch, make_runtime
from tests.serving import wait_for


@dataclass
class Kept:
    """A watcher that keeps what it is told, or breaks."""

    breaks: bool = False
    requests: list[str] = field(default_factory=list)
    is_closed: bool = False

    def take_in(self, served: Sequence[Served]) -> None:
        if self.breaks:
            raise RuntimeError("no")
        self.requests += [request.request_id for request in served]

    def close(self) -> None:
        self.is_closed = True


def request(name: str, *texts: TextInput) -> Served:
    readings = [Reading(number, text, (), ()) for number, text in enumerate(texts)]
    return Served(name, "shop", 1, [], [], b"[]", readings, Usage(0, 0, 0.0, 0), Timings(0.0, 0.0, 0.0), 0.0)


def never(requests: int) -> None:
    raise AssertionError("it was dropped")


@pytest.mark.anyio
async def test_an_answer_is_handed_over_with_what_made_it(settings: Settings) -> None:
    watch = FakeWatch()
    runtime = make_runtime(settings, watch=watch)
    inputs = [TextInput("a"), TextInput("b c")]
    prediction = await runtime.inference.predict(inputs, ["spam", "intent@2"], False, request_id="r-1")
    with pytest.raises(NotFoundError):
        await runtime.inference.predict(inputs, ["nobody"], False)
    (served,) = watch.requests
    assert (served.request_id, served.generation, served.usage) == ("r-1", 7, prediction.usage)
    assert served.results == prediction.results
    assert [reading.text for reading in served.readings] == inputs
    for targets, reading in zip(served.targets, served.readings, strict=True):
        assert [(target.reference, target.arm) for target in targets] == [
            ("spam", Arm.CHAMPION),
            ("intent@2", Arm.PINNED),
        ]
        assert all(target.version.digest in reading.outputs for target in targets)
    runtime.close()


def test_every_watcher_is_told_in_order_and_the_last_at_the_end() -> None:
    first, second = Kept(), Kept()
    watch = Watch([first, second], never)
    watch.start()
    watch.served(request("a"))
    watch.served(request("b"))
    wait_for(lambda: second.requests == ["a", "b"])
    watch.served(request("c"))
    watch.close()
    assert first.requests == second.requests == ["a", "b", "c"]
    assert first.is_closed and second.is_closed


def test_one_that_breaks_keeps_nothing_from_the_others() -> None:
    broken, kept = Kept(breaks=True), Kept()
    watch = Watch([broken, kept], lambda requests: None)
    watch.served(request("a"))
    watch.once()
    assert kept.requests == ["a"]


def test_one_that_always_breaks_is_told_once_and_what_it_misses_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    dropped: list[int] = []
    first, second = Kept(breaks=True), Kept(breaks=True)
    watch = Watch([first, second], dropped.append)
    for names in ("ab", "", "c"):
        for name in names:
            watch.served(request(name))
        watch.once()
    assert caplog.text.count("Kept fails") == caplog.text.count("Traceback") == 2  # each of them once
    assert dropped == [2, 1]
    first.breaks = second.breaks = False
    watch.served(request("d"))
    watch.once()
    watch.once()
    assert caplog.text.count("Kept works again") == 2
    assert first.requests == second.requests == ["d"] and dropped == [2, 1]
    first.breaks = True
    watch.once()
    assert caplog.text.count("Kept fails") == 3


def test_what_finds_no_room_is_dropped_and_told() -> None:
    dropped: list[int] = []
    kept = Kept()
    watch = Watch([kept], dropped.append, max_waiting=2)
    for name in "abc":
        watch.served(request(name))
    watch.once()
    assert kept.requests == ["a", "b"] and dropped == [1]


def test_few_requests_with_long_texts_take_no_more_room_than_many() -> None:
    dropped: list[int] = []
    kept = Kept()
    watch = Watch([kept], dropped.append, max_waiting_bytes=104)
    for _ in range(3):  # what was taken makes room again
        watch.served(request("a", TextInput("x" * 30), TextInput("x" * 20, "y" * 10)))
        watch.served(request("b", TextInput("x" * 41)))
        watch.served(request("c", TextInput("x" * 40)))
        watch.once()
    assert kept.requests == ["a", "c"] * 3 and dropped == [1] * 3


def test_tokens_take_room_too() -> None:
    (encoding,) = FakeTokenizer().encode_each([TextInput("one two three")], [99], [False], True)
    assert not isinstance(encoding, str)
    served = request("a", TextInput("one two three"))
    served.readings[0].encoding = encoding
    assert served.memory_bytes > 13 + 8 * len(encoding)


def test_scores_take_room_too() -> None:
    served = request("a", TextInput("one"))
    served.readings[0].outputs = {"sha256:1": TaskOutput((0.5,) * 384), "sha256:2": TaskOutput(error="it broke")}
    assert served.memory_bytes >= 3 + 32 * 384
