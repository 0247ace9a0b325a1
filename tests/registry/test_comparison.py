"""Figures of versions side by side, added up in a real Redis by several servers at once."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from typing import Protocol

import pytest
from redis import Redis

from app.errors import ConflictError, NotFoundError, UnavailableError
from app.registry.comparison import ArmFigures, Batch, Comparisons, KeptAnswers, PairFigures, PairKey, Said

PAIR = PairKey("mood", "sha256:a", "sha256:b")
CANARY = PairKey("mood", "sha256:a", "sha256:c", "salt-1")


class RedisServer(Protocol):
    url: str

    def kill(self) -> None: ...

    def start(self) -> None: ...


@pytest.fixture
def redis(redis_server: RedisServer) -> Iterator[Redis]:
    with Redis.from_url(redis_server.url) as client:
        yield client


@pytest.fixture
def comparisons(redis: Redis) -> Comparisons:
    return Comparisons(redis)


def batch(pair: PairKey, figures: PairFigures, source: str = "server-1", number: int = 1) -> Batch:
    return Batch(source, number, {pair: figures}, [])


def some(texts: int = 3, seconds: float = 0.125, largest: float = 0.5) -> PairFigures:
    arm = ArmFigures(texts=texts, requests=1, seconds=seconds, labels=Counter({"joy": texts, "label.with:signs ü": 1}))
    return PairFigures(
        champion=arm, texts=texts, agreed=texts, differences=texts, difference=largest, largest_difference=largest
    )


def kept(said: dict[str, Said], request_id: str = "r-1", index: int = 0, *pairs: PairKey) -> KeptAnswers:
    return KeptAnswers(request_id, "mood", index, pairs or (PAIR,), said)


def test_figures_of_several_servers_add_up_and_the_largest_stays(comparisons: Comparisons) -> None:
    assert comparisons.add(batch(PAIR, some(largest=0.75)))
    assert comparisons.add(batch(PAIR, some(texts=2, largest=0.5), source="server-2"))
    assert comparisons.read("mood", "sha256:a") == {
        "sha256:b": PairFigures(
            champion=ArmFigures(5, 0, 2, 0.25, labels=Counter({"joy": 5, "label.with:signs ü": 2})),
            texts=5,
            agreed=5,
            differences=5,
            difference=1.25,
            largest_difference=0.75,
        )
    }
    assert comparisons.read("mood", "sha256:b") == {}
    assert comparisons.read("other", "sha256:a") == {}


def test_a_client_that_decodes_answers_reads_the_same(redis_server: RedisServer, comparisons: Comparisons) -> None:
    comparisons.add(batch(PAIR, some()))
    comparisons.keep([kept({"sha256:a": "joy", "sha256:b": "joy"})], ttl_s=60)
    with Redis.from_url(redis_server.url, decode_responses=True) as client:
        decoding = Comparisons(client)
        assert decoding.read("mood", "sha256:a") == {"sha256:b": some()}
        assert decoding.outcome("r-1", "mood", 0, "joy")


def test_a_batch_that_is_sent_again_counts_once(comparisons: Comparisons) -> None:
    assert comparisons.add(batch(PAIR, some()))
    assert not comparisons.add(batch(PAIR, some()))
    assert comparisons.read_pairs([PAIR]) == [some()]
    assert comparisons.add(batch(PAIR, some(), number=2))
    assert comparisons.read_pairs([PAIR])[0].texts == 6


def test_an_experiment_counts_for_itself_and_for_all_time(comparisons: Comparisons) -> None:
    later = PairKey("mood", "sha256:a", "sha256:c", "salt-2")
    comparisons.add(batch(CANARY, some(texts=3)))
    comparisons.add(batch(later, some(texts=4), number=2))
    overall = PairKey("mood", "sha256:a", "sha256:c")
    assert [found.texts for found in comparisons.read_pairs([CANARY, later, overall, PAIR])] == [3, 4, 7, 0]
    assert comparisons.read("mood", "sha256:a")["sha256:c"].texts == 7


def test_nothing_stays_for_ever(comparisons: Comparisons, redis: Redis) -> None:
    comparisons.add(batch(CANARY, some()))
    comparisons.keep([kept({"sha256:a": "joy"})], ttl_s=60)
    assert all(redis.ttl(key) > 0 for key in redis.scan_iter())
    assert redis.ttl("{manifold}:answers:0:mood:r-1") <= 60
    comparisons.outcome("r-1", "mood", 0, "joy")
    assert 0 < redis.ttl("{manifold}:answers:0:mood:r-1") <= 60


def test_an_outcome_says_who_was_right(comparisons: Comparisons) -> None:
    comparisons.keep(
        [kept({"sha256:a": "joy", "sha256:b": "fear", "sha256:c": None}, "r-1", 2, PAIR, CANARY)], ttl_s=60
    )
    assert comparisons.outcome("r-1", "mood", 2, "joy")
    wrong, right = ArmFigures(judged=1), ArmFigures(judged=1, right=1)
    expected = PairFigures(champion=right, other=wrong, judged=1, only_champion_right=1)
    assert comparisons.read_pairs([PAIR, CANARY]) == [expected, expected]  # a version that failed is not right


@pytest.mark.parametrize(
    ("champion", "other", "counted"),
    [
        (["joy"], ["joy"], PairFigures(judged=1, both_right=1)),
        (["fear"], ["joy"], PairFigures(judged=1, only_other_right=1)),
        (["fear"], [], PairFigures(judged=1)),
    ],
)
def test_every_cell_of_the_table_is_counted(
    comparisons: Comparisons, champion: Said, other: Said, counted: PairFigures
) -> None:
    comparisons.keep([kept({"sha256:a": champion, "sha256:b": other})], ttl_s=60)
    comparisons.outcome("r-1", "mood", 0, ["joy"])
    (found,) = comparisons.read_pairs([PAIR])
    cells = [(f.judged, f.both_right, f.only_champion_right, f.only_other_right) for f in (found, counted)]
    assert cells[0] == cells[1]


def test_an_outcome_of_a_text_that_one_version_scored_counts_for_it_alone(comparisons: Comparisons) -> None:
    comparisons.keep([kept({"sha256:b": "joy"})], ttl_s=60)
    comparisons.outcome("r-1", "mood", 0, "joy")
    assert comparisons.read_pairs([PAIR]) == [PairFigures(other=ArmFigures(judged=1, right=1))]


def test_values_are_measured_by_their_distance(comparisons: Comparisons) -> None:
    comparisons.keep([kept({"sha256:a": 3.5, "sha256:b": 4.25}), kept({"sha256:a": 1.0, "sha256:b": None}, "r-2")], 60)
    comparisons.outcome("r-1", "mood", 0, 4.0)
    comparisons.outcome("r-2", "mood", 0, 2)
    champion, other = ArmFigures(measured=2, absolute_error=1.5), ArmFigures(measured=1, absolute_error=0.25)
    expected = PairFigures(champion, other, measured=1, champion_error=0.5, other_error=0.25)
    assert comparisons.read_pairs([PAIR]) == [expected]


def test_an_outcome_counts_once(comparisons: Comparisons) -> None:
    comparisons.keep([kept({"sha256:a": "joy", "sha256:b": "joy"})], ttl_s=60)
    assert comparisons.outcome("r-1", "mood", 0, "joy")
    assert not comparisons.outcome("r-1", "mood", 0, "joy")
    with pytest.raises(ConflictError, match="another outcome was reported"):
        comparisons.outcome("r-1", "mood", 0, "fear")
    comparisons.keep([kept({"sha256:a": "joy", "sha256:b": "joy"})], ttl_s=60)  # sent again
    assert not comparisons.outcome("r-1", "mood", 0, "joy")
    assert comparisons.read_pairs([PAIR])[0].judged == 1


def test_outcomes_told_by_many_at_once_count_once(redis_server: RedisServer, comparisons: Comparisons) -> None:
    comparisons.keep([kept({"sha256:a": "joy", "sha256:b": "joy"}, index=i) for i in range(20)], ttl_s=60)
    counted: list[bool] = []

    def tell() -> None:
        with Redis.from_url(redis_server.url) as client:
            own = Comparisons(client)
            counted.extend([own.outcome("r-1", "mood", i, "joy") for i in range(20)])

    threads = [threading.Thread(target=tell) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(counted), sum(counted)) == (80, 20)
    assert comparisons.read_pairs([PAIR])[0].both_right == 20


def test_each_input_and_each_task_of_a_request_has_its_own_outcome(comparisons: Comparisons) -> None:
    other_task = KeptAnswers("r-1", "spam", 0, (PairKey("spam", "sha256:x", "sha256:y"),), {"sha256:x": "ham"})
    comparisons.keep([kept({"sha256:a": "joy"}), kept({"sha256:a": "joy"}, index=1)], ttl_s=60)
    comparisons.keep([other_task], ttl_s=60)
    assert comparisons.outcome("r-1", "mood", 0, "joy")
    assert comparisons.outcome("r-1", "mood", 1, "joy")
    assert comparisons.outcome("r-1", "spam", 0, "ham")


@pytest.mark.parametrize(("request_id", "task", "index"), [("r-2", "mood", 0), ("r-1", "spam", 0), ("r-1", "mood", 1)])
def test_an_outcome_of_what_is_not_kept_is_not_found(
    comparisons: Comparisons, request_id: str, task: str, index: int
) -> None:
    comparisons.keep([kept({"sha256:a": "joy"})], ttl_s=60)
    with pytest.raises(NotFoundError, match=f"task {task} to input {index}"):
        comparisons.outcome(request_id, task, index, "joy")


def test_names_that_are_no_utf8_hurt_nobody(comparisons: Comparisons) -> None:
    figures = PairFigures(champion=ArmFigures(labels=Counter({"\ud800": 1})), texts=1)
    comparisons.add(batch(PAIR, figures))
    assert comparisons.read_pairs([PAIR])[0].champion.labels == {"?": 1}
    comparisons.keep([kept({"sha256:a": "\ud800"}, request_id="\ud800")], ttl_s=60)
    assert comparisons.outcome("\ud800", "mood", 0, "\ud800")


def test_more_answers_than_one_round_trip_carries_are_all_kept(comparisons: Comparisons, redis: Redis) -> None:
    comparisons.keep([kept({"sha256:a": "joy"}, request_id=f"r-{i}") for i in range(2500)], ttl_s=60)
    assert redis.dbsize() == 2501  # and the list of them


def test_only_the_newest_answers_are_kept(redis: Redis) -> None:
    comparisons = Comparisons(redis, max_kept=3)
    for start in (0, 2, 4):  # some are sent again
        comparisons.keep([kept({"sha256:a": "joy"}, f"r-{i}") for i in range(start, start + 3)], ttl_s=60)
    assert redis.dbsize() == 4
    with pytest.raises(NotFoundError):
        comparisons.outcome("r-3", "mood", 0, "joy")
    assert [comparisons.outcome(f"r-{i}", "mood", 0, "joy") for i in (4, 5, 6)] == [True] * 3


def test_without_redis_every_call_says_that_it_is_unavailable(
    redis_server: RedisServer, comparisons: Comparisons
) -> None:
    redis_server.kill()
    for call in (
        lambda: comparisons.add(batch(PAIR, some())),
        lambda: comparisons.keep([kept({"sha256:a": "joy"})], 60),
        lambda: comparisons.outcome("r-1", "mood", 0, "joy"),
        lambda: comparisons.read("mood", "sha256:a"),
        lambda: comparisons.read_pairs([PAIR]),
    ):
        with pytest.raises(UnavailableError, match="the index does not answer"):
            call()


def test_figures_and_kept_answers_outlive_a_restart(redis_server: RedisServer, comparisons: Comparisons) -> None:
    comparisons.add(batch(PAIR, some()))
    comparisons.keep([kept({"sha256:a": "joy", "sha256:b": "joy"})], ttl_s=60)
    redis_server.kill()
    redis_server.start()
    assert not comparisons.add(batch(PAIR, some()))  # its scripts are gone and are loaded again
    assert comparisons.outcome("r-1", "mood", 0, "joy")
    assert comparisons.read_pairs([PAIR])[0].texts == 3
