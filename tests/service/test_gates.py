"""When a canary ends by itself."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from app.registry.comparison import ArmFigures, PairFigures, PairKey
from app.rollout import Challenger, Gates, State, TaskRecord, Traffic, VersionRecord
from app.service.gates import find_trips, tripped


def disagreeing(disagreed: int, of: int = 100) -> PairFigures:
    return PairFigures(agreed=of - disagreed, disagreed=disagreed, texts=of)


def failing(errors: int, of: int = 100) -> PairFigures:
    return PairFigures(other=ArmFigures(texts=of, errors=errors))


def timed(champion_s: float, other_s: float, requests: int = 100, others: int = 100) -> PairFigures:
    champion = ArmFigures(requests=requests, seconds=champion_s * requests)
    return PairFigures(champion, ArmFigures(requests=others, seconds=other_s * others))


def judged(only_champion: int, only_other: int, of: int = 100) -> PairFigures:
    return PairFigures(judged=of, only_champion_right=only_champion, only_other_right=only_other)


@pytest.mark.parametrize(
    ("gates", "inside", "past", "sentence"),
    [
        (
            Gates(max_disagreement=0.2),
            disagreeing(20),
            disagreeing(21),
            "differs from the champion on 21 of 100 texts (21.00%); max_disagreement allows 20.00%",
        ),
        (
            Gates(max_error_rate=0.0),
            failing(0),
            failing(1),
            "failed on 1 of 100 texts (1.00%); max_error_rate allows 0.00%",
        ),
        (
            Gates(max_latency_ratio=1.5),
            timed(2.0, 3.0),
            timed(2.0, 4.0),
            "takes 2.00 times as long as the champion; max_latency_ratio allows 1.5",
        ),
        (
            Gates(min_accuracy_gain=-0.02),
            judged(4, 2),
            judged(5, 2),
            "gains -0.03 on 100 texts with an outcome; min_accuracy_gain asks for -0.02",
        ),
        (
            Gates(min_accuracy_gain=0.0),
            PairFigures(measured=100, champion_error=10.0, other_error=10.0),
            PairFigures(measured=100, champion_error=10.0, other_error=60.0),
            "gains -0.5 on 100 texts with an outcome; min_accuracy_gain asks for +0",
        ),
    ],
)
def test_a_gate_holds_to_its_bound_and_trips_past_it(
    gates: Gates, inside: PairFigures, past: PairFigures, sentence: str
) -> None:
    assert tripped(gates, inside) is None
    assert tripped(gates, past) == sentence
    assert tripped(Gates(), past) is None


@pytest.mark.parametrize(
    ("gates", "figures"),
    [
        (Gates(max_disagreement=0.1), disagreeing(99, of=99)),
        (Gates(max_error_rate=0.1), failing(99, of=99)),
        (Gates(max_latency_ratio=1.0), timed(1.0, 9.0, others=99)),
        (Gates(max_latency_ratio=1.0), timed(1.0, 9.0, requests=99)),
        (Gates(min_accuracy_gain=0.0), judged(99, 0, of=99)),
    ],
)
def test_no_gate_trips_before_there_are_enough_of_what_it_measures(gates: Gates, figures: PairFigures) -> None:
    assert tripped(gates, figures) is None


def test_nothing_measured_trips_nothing_even_without_a_minimum() -> None:
    gates = Gates(0.0, 0.0, 0.0, 1.0, min_count=0)
    assert tripped(gates, PairFigures()) is None


def record(name: str, traffic: Traffic | None, numbers: Sequence[int] = (1, 2, 3)) -> TaskRecord:
    versions = {n: VersionRecord(name, n, f"sha256:{name}-{n}", State.APPROVED, "", 1, "ann", 1.0) for n in numbers}
    return TaskRecord(name, versions, traffic)


def canary(gates: Gates | None, *challengers: int) -> Traffic:
    return Traffic(1, tuple(Challenger(n, 10.0) for n in challengers), gates=gates, salt="salt")


def test_the_task_whose_canary_trips_is_named_with_its_figures() -> None:
    strict = canary(Gates(max_disagreement=0.1), 2, 3)
    tasks = [
        record("calm", strict),
        record("wild", strict),
        record("ungated", canary(None, 2)),
        record("alone", canary(Gates(max_disagreement=0.1))),
        record("idle", None),
    ]
    asked: list[PairKey] = []

    def read(pairs: Sequence[PairKey]) -> list[PairFigures]:
        asked.extend(pairs)
        return [disagreeing(50 if pair.other == "sha256:wild-3" else 10) for pair in pairs]

    (trip,) = find_trips(tasks, read)
    assert asked == [
        PairKey(task, f"sha256:{task}-1", f"sha256:{task}-{n}", "salt") for task in ("calm", "wild") for n in (2, 3)
    ]
    assert (trip.task, trip.version, trip.expected) == ("wild", 3, strict)
    assert trip.reason.startswith("version 3 differs from the champion on 50 of 100 texts")
    assert json.loads(json.dumps(trip.figures))["disagreed"] == 50


def test_a_task_trips_once_however_many_of_its_challengers_do() -> None:
    trips = find_trips([record("wild", canary(Gates(max_error_rate=0.1), 2, 3))], lambda pairs: [failing(50)] * 2)
    assert [trip.version for trip in trips] == [2]


def test_without_gates_nothing_is_read() -> None:
    def read(pairs: Sequence[PairKey]) -> list[PairFigures]:
        raise AssertionError("there is nothing to ask")

    assert find_trips([record("calm", canary(None, 2))], read) == []
