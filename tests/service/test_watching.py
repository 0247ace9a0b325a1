"""What is handed aside of an answered request, and what becomes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from app.config import Settings
from app.domain import Arm, TextInput
from app.errors import NotFoundError
from app.service.usage import Timings, Usage
from app.service.watching import Served, Watch
from tests.fakes import FakeWatch, make_runtime
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


def request(name: str) -> Served:
    return Served(name, "shop", 1, [], [], [], Usage(0, 0, 0.0, 0), Timings(0.0, 0.0, 0.0))


def never() -> None:
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


def test_one_that_breaks_keeps_nothing_from_the_others(caplog: pytest.LogCaptureFixture) -> None:
    broken, kept = Kept(breaks=True), Kept()
    watch = Watch([broken, kept], never)
    watch.served(request("a"))
    watch.once()
    assert kept.requests == ["a"]
    assert "Kept failed on 1 requests" in caplog.text


def test_what_finds_no_room_is_dropped_and_told() -> None:
    dropped: list[int] = []
    kept = Kept()
    watch = Watch([kept], lambda: dropped.append(1), max_waiting=2)
    for name in "abc":
        watch.served(request(name))
    watch.once()
    assert kept.requests == ["a", "b"] and len(dropped) == 1
