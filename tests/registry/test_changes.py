"""The rules of what may become of a task."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import ConflictError, ForbiddenError, ManifoldError, NotFoundError, UnservableError
from app.registry import changes
from app.rollout import (
    SLOTS,
    Challenger,
    Gates,
    NewVersion,
    Segment,
    State,
    TaskRecord,
    Traffic,
    TrafficWish,
    VersionRecord,
)

CARD = {"problem_type": "single_label_classification", "labels": ["joy", "fear"], "input": "text"}


def version(number: int, state: State = State.APPROVED, by: str = "ann", **card: object) -> VersionRecord:
    return VersionRecord("mood", number, f"sha256:{number}", state, json.dumps(CARD | card), 10, by, 1.0)


def task(*versions: VersionRecord, traffic: Traffic | None = None, previous: tuple[int, ...] = ()) -> TaskRecord:
    return TaskRecord("mood", {v.version: v for v in versions}, traffic, previous)


def approved(count: int, traffic: Traffic | None = None, previous: tuple[int, ...] = ()) -> TaskRecord:
    return task(*map(version, range(1, count + 1)), traffic=traffic, previous=previous)


def wish(champion: int, *challengers: tuple[int, float], shadow: tuple[int, ...] = ()) -> TrafficWish:
    return TrafficWish(champion, tuple(Challenger(*arm) for arm in challengers), shadow)


def decide(record: TaskRecord, number: int, state: State, actor: str = "bob", *, separate: bool = True) -> TaskRecord:
    return changes.decide(record, number, state, actor, 9.0, "why", separate)


# -- versions ----------------------------------------------------------------------------------------------------------


def test_publishing_gives_the_next_number_to_a_candidate() -> None:
    first = changes.publish(None, "mood", "sha256:a", "{}", 10, "ann", 5.0, "new")
    assert first.versions[1] == VersionRecord(
        "mood", 1, "sha256:a", State.CANDIDATE, "{}", 10, "ann", 5.0, reason="new"
    )
    assert first.traffic is None
    other = changes.publish(approved(3), "mood", "sha256:x", "{}", 10, "ann", 5.0, "")
    assert list(other.versions) == [1, 2, 3, 4]


def test_the_same_content_again_changes_nothing() -> None:
    record = approved(2)
    assert changes.publish(record, "mood", "sha256:1", "{}", 10, "eve", 5.0, "") is record


def test_an_index_begins_with_the_highest_versions_live() -> None:
    versions = [NewVersion("mood", n, f"sha256:{n}", "{}", 1) for n in (2, 1)] + [NewVersion("spam", 7, "d", "{}", 1)]
    tasks = changes.first_tasks(versions, "manifold", 5.0, "first")
    assert {name: record.traffic for name, record in tasks.items()} == {"mood": Traffic(2), "spam": Traffic(7)}
    assert {v.state for record in tasks.values() for v in record.versions.values()} == {State.APPROVED}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (State.CANDIDATE, State.APPROVED),
        (State.CANDIDATE, State.REJECTED),
        (State.APPROVED, State.RETIRED),
    ],
)
def test_a_decision_names_who_made_it_and_why(before: State, after: State) -> None:
    decided = decide(task(version(1, before)), 1, after).versions[1]
    assert (decided.state, decided.decided_by, decided.decided_at, decided.reason) == (after, "bob", 9.0, "why")
    assert (decided.published_by, decided.published_at) == ("ann", 1.0)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (State.CANDIDATE, State.RETIRED),
        (State.APPROVED, State.REJECTED),
        (State.APPROVED, State.CANDIDATE),
        (State.RETIRED, State.APPROVED),
        (State.REJECTED, State.APPROVED),
        (State.REJECTED, State.RETIRED),
    ],
)
def test_no_other_way_leads_from_state_to_state(before: State, after: State) -> None:
    with pytest.raises(ConflictError, match=f"mood@1 is {before}: only"):
        decide(task(version(1, before)), 1, after)


@pytest.mark.parametrize("state", list(State))
def test_the_same_decision_again_changes_nothing(state: State) -> None:
    record = task(version(1, state))
    assert decide(record, 1, state, "ann") is record


def test_nobody_approves_what_they_published_unless_that_is_allowed() -> None:
    record = task(version(1, State.CANDIDATE))
    with pytest.raises(ForbiddenError, match="mood@1 was published by ann: somebody else must approve it"):
        decide(record, 1, State.APPROVED, "ann")
    assert decide(record, 1, State.APPROVED, "ann", separate=False).versions[1].state is State.APPROVED
    assert decide(record, 1, State.REJECTED, "ann").versions[1].state is State.REJECTED


@pytest.mark.parametrize(
    ("number", "state"), [(1, State.RETIRED), (2, State.RETIRED), (3, State.RETIRED), (4, State.REJECTED)]
)
def test_what_takes_part_in_traffic_stays(number: int, state: State) -> None:
    candidate = version(4, State.CANDIDATE)
    record = changes.set_traffic(
        task(version(1), version(2), version(3), candidate), wish(1, (2, 5), shadow=(3, 4)), ""
    )
    with pytest.raises(ConflictError, match=f"mood@{number} takes part in the task's traffic"):
        decide(record, number, state)


def test_a_candidate_that_is_a_shadow_can_be_approved() -> None:
    record = changes.set_traffic(task(version(1), version(2, State.CANDIDATE)), wish(1, shadow=(2,)), "")
    assert decide(record, 2, State.APPROVED).versions[2].state is State.APPROVED


def test_a_version_that_is_not_there_is_not_found() -> None:
    with pytest.raises(NotFoundError, match="task mood has no version 9"):
        decide(approved(1), 9, State.APPROVED)


# -- traffic -----------------------------------------------------------------------------------------------------------


def test_traffic_is_as_wished() -> None:
    gates = Gates(max_error_rate=0.1)
    wanted = replace(wish(1, (2, 10), (3, 0.01), shadow=(4,)), gates=gates)
    traffic = changes.set_traffic(approved(4), wanted, "salt").traffic
    segments = (Segment(0, 1000, 2), Segment(1000, 1001, 3))
    assert traffic == Traffic(1, wanted.challengers, (4,), gates, "salt", segments)


def test_the_salt_stays_while_an_experiment_goes_on_and_is_new_for_the_next() -> None:
    record = changes.set_traffic(approved(3), wish(1, (2, 10)), "one")
    record = changes.set_traffic(record, wish(1, (2, 20), (3, 5)), "two")
    record = changes.set_traffic(record, wish(2, (3, 5)), "three")
    assert record.traffic is not None and record.traffic.salt == "one"
    ended = changes.set_traffic(record, wish(2), "four")
    assert ended.traffic == Traffic(2)
    again = changes.set_traffic(ended, wish(2, (3, 5)), "five")
    assert again.traffic is not None and again.traffic.salt == "five"


def test_the_same_traffic_again_changes_nothing() -> None:
    record = changes.set_traffic(approved(2), wish(1, (2, 10)), "one")
    assert changes.set_traffic(record, wish(1, (2, 10)), "two") is record


def test_gates_without_a_canary_guard_nothing() -> None:
    traffic = changes.set_traffic(approved(1), TrafficWish(1, gates=Gates()), "").traffic
    assert traffic == Traffic(1)


def test_champions_are_remembered_the_latest_twenty() -> None:
    record = approved(30)
    for number in range(1, 31):
        record = changes.set_traffic(record, wish(number), "")
    assert record.previous == tuple(range(10, 30))


@pytest.mark.parametrize(
    ("wanted", "error", "sentence"),
    [
        (wish(9), NotFoundError, "task mood has no version 9"),
        (wish(1, (9, 5)), NotFoundError, "task mood has no version 9"),
        (wish(5), ConflictError, "mood@5 is candidate: approve it first"),
        (wish(1, (5, 5)), ConflictError, "mood@5 is candidate: approve it first"),
        (wish(6), ConflictError, "mood@6 is rejected: it cannot go live"),
        (wish(1, shadow=(7,)), ConflictError, "mood@7 is retired: it cannot go live"),
        (wish(1, (2, 0)), UnservableError, "0 percent cannot be given"),
        (wish(1, (2, -1)), UnservableError, "-1 percent cannot be given"),
        (wish(1, (2, 0.005)), UnservableError, "0.005 percent cannot be given"),
        (wish(1, (2, 10.001)), UnservableError, "10.001 percent cannot be given"),
        (wish(1, (2, 100.01)), UnservableError, "100.01 percent cannot be given"),
        (wish(1, (2, float("nan"))), UnservableError, "nan percent cannot be given"),
        (wish(1, (2, 60), (3, 40.01)), UnservableError, "the challengers have 100.01 percent together"),
        (wish(1, (1, 5)), UnservableError, "version 1 is named twice"),
        (wish(1, (2, 5), (2, 5)), UnservableError, "version 2 is named twice"),
        (wish(1, (2, 5), shadow=(2,)), UnservableError, "version 2 is named twice"),
        (wish(1, shadow=(2, 2)), UnservableError, "version 2 is named twice"),
        (wish(1, (8, 5)), UnservableError, "mood@8 and @1 differ in their problem type: multi_label"),
        (wish(1, shadow=(10,)), UnservableError, "mood@10 and @1 differ in their labels: joy, rage and fear, joy"),
        (wish(1, (11, 5)), UnservableError, "mood@11 and @1 differ in their input: pair and text"),
    ],
)
def test_traffic_that_makes_no_sense_is_refused(wanted: TrafficWish, error: type[ManifoldError], sentence: str) -> None:
    record = task(
        *map(version, range(1, 5)),
        version(5, State.CANDIDATE),
        version(6, State.REJECTED),
        version(7, State.RETIRED),
        version(8, problem_type="multi_label_classification"),
        version(10, labels=["joy", "rage"]),
        version(11, input="pair"),
    )
    with pytest.raises(error, match=sentence):
        changes.set_traffic(record, wanted, "salt")


def test_labels_may_stand_in_another_order_and_a_champion_may_bring_new_ones() -> None:
    record = task(version(1), version(2, labels=["fear", "joy"]), version(3, labels=["new"]), traffic=Traffic(1))
    assert changes.set_traffic(record, wish(1, (2, 5)), "").traffic is not None
    assert changes.set_traffic(record, wish(3), "").traffic == Traffic(3)


# -- rolling back ------------------------------------------------------------------------------------------------------


def test_rollback_goes_to_the_champion_before_and_then_further() -> None:
    record = approved(4)
    for number in (1, 2, 3):
        record = changes.set_traffic(record, wish(number, shadow=(4,)), "")
    once = changes.rollback(record)
    assert (once.traffic, once.previous) == (Traffic(2, shadow=(4,)), (1,))
    twice = changes.rollback(once)
    assert (twice.traffic, twice.previous) == (Traffic(1, shadow=(4,)), ())
    with pytest.raises(ConflictError, match="task mood has no champion before version 1 to go back to"):
        changes.rollback(twice)


def test_rollback_ends_a_canary_and_skips_what_was_retired() -> None:
    record = approved(4, Traffic(3, (Challenger(4, 10),), salt="s", segments=(Segment(0, 1000, 4),)), (1, 2))
    record = decide(record, 2, State.RETIRED)
    assert changes.rollback(record).traffic == Traffic(1)


def test_rollback_keeps_only_shadows_that_fit_the_champion() -> None:
    versions = (version(1), version(2, labels=["new"]), version(3, labels=["new"]))
    record = task(*versions, traffic=Traffic(2, shadow=(1, 3)), previous=(1,))
    assert changes.rollback(record).traffic == Traffic(1)


def test_a_task_that_was_never_live_has_nothing_to_roll_back() -> None:
    with pytest.raises(ConflictError, match="no live version"):
        changes.rollback(approved(1))


def test_traffic_comes_back_exactly_as_it_was() -> None:
    before = changes.set_traffic(approved(3), wish(1, (2, 10), shadow=(3,)), "salt")
    after = changes.set_traffic(before, wish(2), "")
    assert changes.restore_traffic(after, before.traffic) == before
    assert changes.restore_traffic(before, None).traffic is None
    retired = decide(after, 3, State.RETIRED)
    with pytest.raises(ConflictError, match="mood@3 is retired"):
        changes.restore_traffic(retired, before.traffic)


def test_the_champion_alone_keeps_its_shadows() -> None:
    record = changes.set_traffic(approved(3), wish(1, (2, 10), shadow=(3,)), "salt")
    assert changes.champion_alone(record).traffic == Traffic(1, shadow=(3,))


# -- slots -------------------------------------------------------------------------------------------------------------


@st.composite
def shares(draw: st.DrawFn) -> list[Challenger]:
    """Up to five challengers with 100 percent together at most."""
    versions = draw(st.lists(st.integers(2, 8), unique=True, max_size=5))
    left = SLOTS
    found = []
    for number in versions:
        slots = draw(st.integers(1, max(1, min(left - len(versions), SLOTS // 2))))
        left -= slots
        found.append(Challenger(number, slots / 100))
    return found


def owners(segments: Sequence[Segment]) -> dict[int, int]:
    found: dict[int, int] = {}
    for segment in segments:
        for slot in range(segment.start, segment.stop):
            assert slot not in found, "a slot has two owners"
            found[slot] = segment.version
    return found


@given(st.lists(shares(), min_size=1, max_size=4))
def test_shares_are_exact_and_units_stay_in_their_arm(steps: list[list[Challenger]]) -> None:
    segments: tuple[Segment, ...] = ()
    for wanted in steps:
        before = owners(segments)
        segments = changes.allocate(segments, wanted)
        after = owners(segments)
        sizes = {challenger.version: round(challenger.percent * 100) for challenger in wanted}
        assert Counter(after.values()) == sizes
        assert all(0 <= s.start < s.stop <= SLOTS for s in segments)
        for number, size in sizes.items():
            had = {slot for slot, owner in before.items() if owner == number}
            has = {slot for slot, owner in after.items() if owner == number}
            assert had <= has if size >= len(had) else has <= had, f"version {number} moved"


@given(shares())
def test_the_same_shares_again_move_nobody(wanted: list[Challenger]) -> None:
    segments = changes.allocate((), wanted)
    assert changes.allocate(segments, wanted) == segments
    assert changes.allocate(segments, list(reversed(wanted))) == segments


def test_a_challenger_may_have_everything() -> None:
    assert changes.allocate((Segment(5, 10, 2),), [Challenger(2, 100)]) == (Segment(0, SLOTS, 2),)


def test_units_stay_with_their_version_while_a_canary_grows() -> None:
    record = approved(3)
    units = [f"customer-{n}" for n in range(2000)]
    seen: dict[str, int] = {}
    for percent in (1, 5, 10, 25, 50, 100):
        record = changes.set_traffic(record, wish(1, (2, percent)), f"salt {percent}")
        assert record.traffic is not None
        chosen = {unit: record.traffic.choose(unit) for unit in units}
        assert all(chosen[unit] == 2 for unit, was in seen.items() if was == 2)
        seen = chosen
    assert set(seen.values()) == {2}
