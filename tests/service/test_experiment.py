"""What is counted of requests that several versions scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from app.domain import Arm, Task
from app.engine.spans import Span
from app.errors import UnavailableError
from app.registry.comparison import Batch, KeptAnswers, PairFigures, PairKey
from app.rollout import Challenger, TaskRecord, Traffic
from app.service.answers import Answer, FailedAnswer, LabelAnswer, LabelsAnswer, SpansAnswer, ValueAnswer
from app.service.experiment import Observation, Recorder, flush, said, score_difference
from tests.fakes import make_version

CHAMPION, CHALLENGER, SHADOW = 1, 2, 3
CANARY = PairKey("mood", "sha256:mood-1", "sha256:mood-2", "salt")
SHADOWED = PairKey("mood", "sha256:mood-1", "sha256:mood-3")


@dataclass
class FakeComparisons:
    """Keeps what it is given; refuses while it is `down`, and loses its answer once where it `forgets`."""

    down: bool = False
    forgets: bool = False
    batches: list[Batch] = field(default_factory=list)
    kept: list[KeptAnswers] = field(default_factory=list)

    def add(self, batch: Batch) -> bool:
        self._check()
        known = any((b.source, b.number) == (batch.source, batch.number) for b in self.batches)
        if not known:
            self.batches.append(batch)
        if self.forgets:
            self.forgets = False
            raise UnavailableError("the connection broke")
        return not known

    def keep(self, answers: Sequence[KeptAnswers], ttl_s: int) -> None:
        self._check()
        self.kept += answers

    def _check(self) -> None:
        if self.down:
            raise UnavailableError("the index does not answer")


def task(*challengers: int, shadow: tuple[int, ...] = (), resident: tuple[int, ...] = (1, 2, 3)) -> Task:
    chosen = tuple(Challenger(number, 10.0) for number in challengers)
    traffic = Traffic(CHAMPION, chosen, shadow, salt="salt")
    versions = {number: make_version("mood", number, labels=("joy", "fear")) for number in resident}
    return Task("mood", TaskRecord("mood", traffic=traffic), traffic, versions)


def label(name: str, score: float = 0.75, version: int = 1) -> LabelAnswer:
    scores = {"joy": 1 - score, "fear": 1 - score} | {name: score}
    return LabelAnswer(version, Arm.CHAMPION, name, score, scores)


def failed() -> FailedAnswer:
    return FailedAnswer(1, Arm.CHAMPION, "it broke")


def observe(
    of: Task, *texts: dict[int, Answer], version: int = CHAMPION, seconds: float | None = 0.5, request_id: str = "r-1"
) -> Observation:
    return Observation(of, request_id, version, seconds, dict(enumerate(texts)))


def counted(*observations: Observation) -> dict[PairKey, PairFigures]:
    recorder = Recorder()
    for observation in observations:
        recorder.record(observation)
    batch = recorder.drain()
    return dict(batch.figures) if batch is not None else {}


def test_versions_that_scored_the_same_texts_are_compared() -> None:
    texts = [{1: label("joy"), 2: label("joy", 0.5)}, {1: label("joy"), 2: label("fear")}]
    figures = counted(observe(task(CHALLENGER), *texts, version=CHALLENGER))[CANARY]
    assert (figures.requests, figures.texts, figures.agreed, figures.disagreed) == (1, 2, 1, 1)
    assert (figures.differences, figures.difference, figures.largest_difference) == (2, 0.75, 0.5)
    assert figures.champion.labels == {"joy": 2}
    assert figures.other.labels == {"joy": 1, "fear": 1}
    assert (figures.champion.texts, figures.other.texts) == (2, 2)


def test_only_requests_that_ran_without_the_other_tell_a_time() -> None:
    of = task(CHALLENGER)
    figures = counted(
        observe(of, {1: label("joy")}, seconds=None),  # partly from the cache
        observe(of, {1: label("joy")}, seconds=1.0),
        observe(of, {1: label("joy")}, {1: label("joy")}, seconds=3.0),
        observe(of, {2: label("joy")}, version=CHALLENGER, seconds=5.0),
        observe(of, {1: label("joy"), 2: label("joy")}, version=CHALLENGER, seconds=100.0),
    )[CANARY]
    assert (figures.champion.requests, figures.champion.seconds) == (2, 4.0)
    assert (figures.other.requests, figures.other.seconds) == (1, 5.0)
    assert figures.requests == 1


def test_each_challenger_and_each_shadow_is_a_pair_of_its_own() -> None:
    of = task(CHALLENGER, shadow=(SHADOW,))
    figures = counted(
        observe(of, {1: label("joy"), 3: label("fear")}),
        observe(of, {2: label("joy"), 3: label("fear")}, version=CHALLENGER),
    )
    assert figures.keys() == {CANARY, SHADOWED}
    assert (figures[CANARY].requests, figures[SHADOWED].requests) == (0, 1)
    assert figures[CANARY].champion.requests == figures[CANARY].other.requests == 1
    assert figures[SHADOWED].other.requests == figures[SHADOWED].champion.requests == 0  # it never ran alone
    assert (figures[SHADOWED].other.texts, figures[SHADOWED].texts) == (2, 1)


def test_a_version_that_fails_is_counted_and_not_compared() -> None:
    figures = counted(observe(task(CHALLENGER), {1: label("joy"), 2: failed()}, version=CHALLENGER))[CANARY]
    assert (figures.other.texts, figures.other.errors, figures.champion.errors) == (1, 1, 0)
    assert (figures.texts, figures.agreed, figures.disagreed, figures.differences) == (0, 0, 0, 0)


def test_a_text_that_only_some_versions_can_read_is_compared_for_these() -> None:
    figures = counted(observe(task(shadow=(SHADOW,)), {1: label("joy"), 3: label("joy")}, {1: label("joy")}))[SHADOWED]
    assert (figures.texts, figures.champion.texts, figures.other.texts) == (1, 2, 1)


def test_values_differ_but_neither_agree_nor_disagree() -> None:
    first, second = ValueAnswer(1, Arm.CHAMPION, 2.0), ValueAnswer(3, Arm.SHADOW, 2.5)
    figures = counted(observe(task(shadow=(SHADOW,)), {1: first, 3: second}))[SHADOWED]
    assert (figures.texts, figures.agreed, figures.disagreed, figures.difference) == (1, 0, 0, 0.5)


def test_a_version_that_is_not_resident_here_is_no_pair() -> None:
    assert counted(observe(task(CHALLENGER, resident=(1,)), {1: label("joy")})) == {}


def test_a_task_without_other_versions_is_nothing_to_send() -> None:
    assert counted(observe(task(), {1: label("joy")})) == {}


SPANS = SpansAnswer(1, Arm.CHAMPION, [Span("city", 4, 8, "Bonn", 0.5), Span("date", 0, 3, "May", 0.75)])
FEWER = SpansAnswer(2, Arm.SHADOW, [Span("city", 4, 8, "Bonn", 0.25)])
LABELS = LabelsAnswer(1, Arm.CHAMPION, ["joy", "fear"], {"joy": 0.75, "fear": 0.5})
SWAPPED = LabelsAnswer(2, Arm.SHADOW, ["fear", "joy"], {"fear": 1.0, "joy": 0.75})


@pytest.mark.parametrize(
    ("answer", "claim"),
    [
        (label("joy"), "joy"),
        (LABELS, ["fear", "joy"]),
        (SPANS, [["city", 4, 8], ["date", 0, 3]]),
        (ValueAnswer(1, Arm.CHAMPION, 2.5), 2.5),
        (failed(), None),
    ],
)
def test_what_an_answer_claims_leaves_out_order_and_scores(answer: Answer, claim: object) -> None:
    assert said(answer) == claim


@pytest.mark.parametrize(
    ("first", "second", "difference"),
    [(LABELS, SWAPPED, 0.5), (SPANS, FEWER, 0.25), (FEWER, SpansAnswer(1, Arm.SHADOW, []), None)],
)
def test_scores_differ_by_the_largest_difference_of_a_text(
    first: Answer, second: Answer, difference: float | None
) -> None:
    assert score_difference(first, second) == score_difference(second, first) == difference


def test_sets_of_labels_and_spans_agree_as_wholes() -> None:
    of = task(shadow=(SHADOW,))
    figures = counted(observe(of, {1: LABELS, 3: SWAPPED}), observe(of, {1: SPANS, 3: FEWER}))[SHADOWED]
    assert (figures.agreed, figures.disagreed) == (1, 1)
    assert figures.champion.labels == {"joy": 1, "fear": 1, "city": 1, "date": 1}


def test_answers_are_kept_for_every_text_with_all_that_was_said() -> None:
    index, recorder = FakeComparisons(), Recorder()
    recorder.record(observe(task(CHALLENGER, shadow=(SHADOW,)), {1: label("joy"), 3: failed()}, {1: label("fear")}))
    flush(recorder, index, feedback_window_s=60)
    assert [(k.request_id, k.task, k.index, k.said) for k in index.kept] == [
        ("r-1", "mood", 0, {"sha256:mood-1": "joy", "sha256:mood-3": None}),
        ("r-1", "mood", 1, {"sha256:mood-1": "fear"}),
    ]
    assert set(index.kept[0].pairs) == {CANARY, SHADOWED}


def test_without_a_feedback_window_no_answers_are_kept() -> None:
    index, recorder = FakeComparisons(), Recorder()
    recorder.record(observe(task(CHALLENGER), {1: label("joy")}))
    assert flush(recorder, index, feedback_window_s=0) is index.batches[0]
    assert index.kept == []


def test_what_could_not_be_sent_is_sent_later_and_counts_once() -> None:
    index, recorder = FakeComparisons(down=True), Recorder()
    of = task(CHALLENGER)
    for texts in (1, 2, 3):
        recorder.record(observe(of, *[{1: label("joy")}] * texts))
        with pytest.raises(UnavailableError):
            flush(recorder, index, 60)
    index.down, index.forgets = False, True
    with pytest.raises(UnavailableError):
        flush(recorder, index, 60)
    for _ in range(3):
        flush(recorder, index, 60)
    assert [batch.figures[CANARY].champion.texts for batch in index.batches] == [1, 5]
    assert flush(recorder, index, 60) is None


def test_a_full_recorder_drops_and_says_how_many() -> None:
    recorder = Recorder(max_waiting=2, max_kept=1)
    for _ in range(5):
        recorder.record(observe(task(CHALLENGER), {1: label("joy")}))
    batch = recorder.drain()
    assert batch is not None and batch.figures[CANARY].champion.texts == 2
    assert (recorder.dropped, len(batch.kept), recorder.unkept) == (3, 1, 1)


def test_two_recorders_never_pass_for_one() -> None:
    batches = []
    for _ in range(2):
        recorder = Recorder()
        recorder.record(observe(task(CHALLENGER), {1: label("joy")}))
        batches.append(recorder.drain())
    assert batches[0] is not None and batches[1] is not None
    assert batches[0].source != batches[1].source
