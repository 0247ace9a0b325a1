"""Why a text got its answer, weeks and changes later: a real index, and rows as the log has them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from app.domain import ProblemType, Snapshot, TaskVersion
from app.errors import MalformedError, NotFoundError, OverloadedError, UnavailableError
from app.registry.index import Index
from app.registry.prediction_lines import to_line, to_time
from app.registry.prediction_parts import PartWriter
from app.registry.prediction_store import Found, PredictionStore
from app.rollout import AuditEntry, Challenger, NewVersion, State, TrafficWish
from app.service import why
from app.service.catalog import Catalog
from app.service.why import Explanation, Why
from tests.fakes import SPEC, make_record, make_version

LABELS, THRESHOLDS = ("joy", "anger"), (0.2, 0.6)


def emotion(number: int) -> TaskVersion:
    return make_version("emotion", number, ProblemType.MULTI_LABEL, LABELS, thresholds=THRESHOLDS)


@pytest.fixture
def store(tmp_path: Path) -> PredictionStore:
    return PredictionStore(str(tmp_path / "log"), tmp_path / "home", "jsonl", 10**9)


def write(store: PredictionStore, request_id: str, version: TaskVersion, generation: int, **more: Any) -> None:
    writer = PartWriter(store.folder, store.server, 10**9, 3600.0)
    row = {
        "time": to_time(datetime.now(UTC)),
        "request_id": request_id,
        "input": 0,
        "generation": generation,
        "task": version.task,
        "version": version.version,
        "digest": version.digest,
    }
    writer.append(to_line(row | more))
    writer.end()


def publish(index: Index, version: TaskVersion) -> None:
    card = make_record(version).card
    index.publish("paula", version.task, version.digest, card, 1_000, f"trained on {version.version}")
    index.decide("anna", version.task, version.version, State.APPROVED, f"good: {version.version}", True)


@pytest.fixture
def past(index: Index) -> Index:
    """emotion: 1 from the first start; 2 a canary (generation 4), then champion (5); 3 by a release (8); 2 retired."""
    first = emotion(1)
    index.create("manifold", [NewVersion("emotion", 1, first.digest, make_record(first).card, 1_000)], "shipped")
    publish(index, emotion(2))
    index.set_traffic("otto", "emotion", TrafficWish(1, (Challenger(2, 10.0),)), "a try", None)
    index.set_traffic("otto", "emotion", TrafficWish(2), "better", None)
    publish(index, emotion(3))
    index.release("rita", {"emotion": TrafficWish(3)}, "all at once", None)
    index.decide("anna", "emotion", 2, State.RETIRED, "too old", True)
    return index


def why_of(index: Index, store: PredictionStore | None, sample: float = 1.0) -> Why:
    catalog = Catalog(Snapshot(9, {}, view=index.view()), SPEC.num_layers)
    return Why(store, sample, catalog, index.audit)


def explain(index: Index, store: PredictionStore, request_id: str = "r-1") -> Explanation:
    return why_of(index, store).explain(request_id, None, None)


def test_a_version_that_was_retired_since_is_explained(past: Index, store: PredictionStore) -> None:
    write(store, "r-1", emotion(2), 4, labels=["joy"], scores={"joy": 0.3, "anger": 0.5})
    told = explain(past, store)
    (answering,) = told.versions
    assert (answering.task, answering.version, answering.state) == ("emotion", 2, State.RETIRED)
    assert answering.digest == emotion(2).digest and answering.thresholds == {"joy": 0.2, "anger": 0.6}
    assert answering.published is not None
    assert (answering.published.actor, answering.published.reason) == ("paula", "trained on 2")
    assert [(deed.action, deed.actor, deed.reason, deed.generation) for deed in answering.decisions] == [
        ("approve", "anna", "good: 2", 3),
        ("retire", "anna", "too old", 9),
    ]
    (then,) = told.traffic
    assert then.traffic is not None and then.put is not None
    assert (then.generation, then.traffic["champion"]) == (4, 1)
    assert then.traffic["challengers"] == [{"version": 2, "percent": 10.0}]
    assert (then.put.actor, then.put.reason, then.put.generation) == ("otto", "a try", 4)
    assert told.gaps == () and told.searched.files == 1 and told.searched.url == store.url


@pytest.mark.parametrize(
    ("generation", "champion", "actor"),
    [(1, 1, "manifold"), (3, 1, "manifold"), (5, 2, "otto"), (7, 2, "otto"), (8, 3, "rita"), (9, 3, "rita")],
)
def test_the_traffic_is_that_of_the_answers_generation(
    past: Index, store: PredictionStore, generation: int, champion: int, actor: str
) -> None:
    write(store, "r-1", emotion(1), generation)
    told = explain(past, store)
    (then,) = told.traffic
    assert then.traffic is not None and then.put is not None
    assert (then.traffic["champion"], then.put.actor) == (champion, actor)
    (answering,) = told.versions
    assert [(deed.action, deed.actor) for deed in answering.decisions] == [("create", "manifold")]


def test_a_retry_under_another_generation_is_told_beside_it(past: Index, store: PredictionStore) -> None:
    write(store, "r-1", emotion(1), 3)
    write(store, "r-1", emotion(2), 5, time=to_time(datetime.now(UTC)))
    told = explain(past, store)
    assert [row["version"] for row in told.rows] == [version.version for version in told.versions] == [1, 2]
    assert [then.generation for then in told.traffic] == [3, 5]


def test_a_version_that_the_index_lacks_is_a_gap(past: Index, store: PredictionStore) -> None:
    write(store, "r-1", emotion(7), 5)
    write(store, "r-2", make_version("gone"), 5)
    (answering,) = explain(past, store).versions
    assert answering.state is None and answering.published is None
    (gap,) = explain(past, store).gaps
    assert "the index has no version emotion@7 (sha256:emotion-7)" in gap
    told = explain(past, store, "r-2")
    assert told.traffic[0].traffic is None and "gone@1" in told.gaps[0]


def test_a_digest_that_is_not_the_versions_own_is_a_gap(past: Index, store: PredictionStore) -> None:
    write(store, "r-1", emotion(2), 5, digest="sha256:other")
    told = explain(past, store)
    (answering,) = told.versions
    assert answering.state is None and "another content than emotion@2 (sha256:other)" in told.gaps[0]
    assert answering.published is None and answering.decisions == (), "those were of the other content"


def test_what_was_put_after_the_answer_is_not_what_it_met(past: Index, store: PredictionStore) -> None:
    """The index took the place of another one, whose generations went further."""
    write(store, "r-1", emotion(2), 40, time="2026-01-09T12:00:00.000000Z")
    told = explain(past, store)
    assert told.traffic[0].traffic is None and told.traffic[0].put is None
    assert "the index is younger than the answer" in told.gaps[0]


def test_without_the_index_the_rows_are_told_all_the_same(past: Index, store: PredictionStore) -> None:
    def refuse(*_: object) -> Sequence[AuditEntry]:
        raise UnavailableError("Redis is gone")

    write(store, "r-1", emotion(2), 5)
    catalog = Catalog(Snapshot(9, {}, view=past.view()), SPEC.num_layers)
    told = Why(store, 1.0, catalog, refuse).explain("r-1", None, None)
    assert len(told.rows) == 1 and told.versions[0].state is State.RETIRED
    assert told.gaps == ("who approved what cannot be told now: Redis is gone",)


def test_an_audit_log_of_many_pages_is_read(
    past: Index, store: PredictionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(why, "_PAGE", 2)
    write(store, "r-1", emotion(3), 8)
    told = explain(past, store)
    assert told.traffic[0].put is not None and told.traffic[0].put.actor == "rita" and told.gaps == ()
    monkeypatch.setattr(why, "_MOST_PAGES", 2)
    assert "only the first 4 entries" in explain(past, store).gaps[0]


# -- what is not found -------------------------------------------------------------------------------------------------


def test_without_a_log_it_is_told_how_to_have_one(past: Index) -> None:
    with pytest.raises(NotFoundError, match="keeps no prediction log: start it with the setting prediction_log"):
        why_of(past, None).explain("r-1", None, None)


def test_what_is_not_there_is_told_with_what_was_searched(past: Index, store: PredictionStore) -> None:
    write(store, "r-1", emotion(1), 1)
    with pytest.raises(NotFoundError, match=r"no answer to request r-9 is in .*log: 1 files of 0\.0 MB were searched$"):
        explain(past, store, "r-9")
    with pytest.raises(NotFoundError, match="it keeps 25 % of the requests, and this id (is|is not) among them"):
        why_of(past, store, sample=0.25).explain("r-9", None, None)
    with pytest.raises(NotFoundError, match="it keeps 0 % of the requests, and this id is not among them"):
        why_of(past, store, sample=0.0).explain("r-9", None, None)


def test_a_search_that_was_given_up_is_told_with_where_to_go_on(
    past: Index, store: PredictionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "find", lambda *_: Found(files=3, stopped_s=1_767_960_000.0, damaged=["x.parquet"]))
    with pytest.raises(NotFoundError, match="go on with until=1767960000; x.parquet of the prediction log is damaged"):
        explain(past, store)


def test_what_was_not_searched_is_a_gap_of_what_was_found(
    past: Index, store: PredictionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(store, "r-1", emotion(1), 1)
    rows = store.find("r-1").rows
    found = Found(rows=rows, files=3, stopped_s=1_767_960_000.0, damaged=["x.parquet"])
    monkeypatch.setattr(store, "find", lambda *_: found)
    older, damaged = explain(past, store).gaps
    assert (
        "not everything before 1767960000 was searched" in older
        and "until=1767960000" in older
        and "x.parquet" in damaged
    )


def test_a_reversed_range_is_told(past: Index, store: PredictionStore) -> None:
    write(store, "r-1", emotion(1), 1)
    with pytest.raises(MalformedError, match=r"since \(1767960001\) is after until \(1767960000\)"):
        why_of(past, store).explain("r-1", 1_767_960_001.0, 1_767_960_000.0)


def test_few_search_at_once(past: Index, store: PredictionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ends = threading.Semaphore(0), threading.Event()

    def slow(*_: object) -> Found:
        begun.release()
        assert ends.wait(30)
        return Found()

    monkeypatch.setattr(store, "find", slow)
    asked = why_of(past, store)

    def ask() -> None:
        with pytest.raises(NotFoundError):
            asked.explain("r-1", None, None)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
        assert begun.acquire(timeout=10)
    with pytest.raises(OverloadedError, match="try again"):
        asked.explain("r-1", None, None)
    ends.set()
    for thread in threads:
        thread.join(10)
    ask()
