"""Counts in memory what versions of a task answer side by side, until a thread hands it to the index.

Knows nothing of how answers were made, and asks nothing of the event loop but an append for each observation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol
from uuid import uuid4

from app.domain import Task
from app.registry.comparison import ArmFigures, Batch, KeptAnswers, PairFigures, PairKey, Said
from app.service.answers import Answer, FailedAnswer, LabelAnswer, LabelsAnswer, SpansAnswer, ValueAnswer

MAX_WAITING = 10_000  # observations that nobody has counted yet
MAX_KEPT = 20_000  # texts whose answers wait for being sent

Answers = Mapping[int, Answer]  # by version


@dataclass(frozen=True, slots=True)
class Observation:
    """One task's part of one request that a live arm answered: never one for a pin, never two for a task."""

    task: Task
    request_id: str
    version: int  # that answered
    seconds: float | None  # inference time of the request; None where part of it came from the cache: it tells nothing
    answers: Mapping[int, Answers]  # by the input's index in the request: of every version that scored it


class Recorder:
    """`record` on the event loop; `drain` and `sent` on one other thread."""

    def __init__(self, max_waiting: int = MAX_WAITING, max_kept: int = MAX_KEPT) -> None:
        self.dropped = 0  # observations that found no room
        self.unkept = 0  # texts that were counted but whose answers found no room
        self._waiting: deque[Observation] = deque()
        self._max_waiting = max_waiting
        self._max_kept = max_kept
        self._source = uuid4().hex
        self._number = 0
        self._figures: dict[PairKey, PairFigures] = {}
        self._kept: list[KeptAnswers] = []
        self._sealed: Batch | None = None

    def record(self, observation: Observation) -> None:
        if len(self._waiting) >= self._max_waiting:
            self.dropped += 1
        else:
            self._waiting.append(observation)

    def drain(self) -> Batch | None:
        """What is to be sent next, the same until it was `sent`: so that it counts once however often it is tried."""
        for _ in range(len(self._waiting)):
            self._count(self._waiting.popleft())
        if self._sealed is None and self._figures:
            self._number += 1
            self._sealed = Batch(self._source, self._number, self._figures, self._kept)
            self._figures, self._kept = {}, []
        return self._sealed

    def sent(self) -> None:
        self._sealed = None

    def _count(self, observation: Observation) -> None:
        pairs = list(_pairs(observation.task))
        for number, pair in pairs:
            count_pair(self._figures.setdefault(pair, PairFigures()), observation, number)
        if observation.request_id and pairs:
            self._keep(observation, tuple(pair for _, pair in pairs))

    def _keep(self, observation: Observation, pairs: tuple[PairKey, ...]) -> None:
        versions = observation.task.versions
        for index, answers in observation.answers.items():
            if len(self._kept) >= self._max_kept:
                self.unkept += 1
                continue
            spoken = {versions[number].digest: said(answer) for number, answer in answers.items() if number in versions}
            self._kept.append(KeptAnswers(observation.request_id, observation.task.name, index, pairs, spoken))


class ComparisonsPort(Protocol):
    def add(self, batch: Batch) -> bool: ...

    def keep(self, answers: list[KeptAnswers], ttl_s: int) -> None: ...


def flush(recorder: Recorder, comparisons: ComparisonsPort, feedback_window_s: int) -> Batch | None:
    """Hands what was counted to the index, and returns it. Where that fails, the next call tries the same again.

    `feedback_window_s`: how long answers wait for an outcome; 0 keeps none. Raises UnavailableError.
    """
    batch = recorder.drain()
    if batch is None:
        return None
    if feedback_window_s > 0:
        comparisons.keep(list(batch.kept), feedback_window_s)
    comparisons.add(batch)
    recorder.sent()
    return batch


def count_pair(figures: PairFigures, observation: Observation, other: int) -> None:
    """Adds what an observation says of the champion and one other version."""
    champion = observation.task.traffic.champion
    is_paired = any(champion in answers and other in answers for answers in observation.answers.values())
    figures.requests += is_paired
    for number, arm in ((champion, figures.champion), (other, figures.other)):
        if observation.version == number and not is_paired and observation.seconds is not None:
            arm.requests += 1
            arm.seconds += observation.seconds
    for answers in observation.answers.values():
        _count_text(figures, answers.get(champion), answers.get(other))


def said(answer: Answer) -> Said:
    """What an answer claims, without its scores: equal where two versions agree. None where it failed."""
    match answer:
        case LabelAnswer():
            return answer.label
        case LabelsAnswer():
            return sorted(answer.labels)
        case ValueAnswer():
            return answer.value
        case SpansAnswer():
            return sorted([span.label, span.start, span.end] for span in answer.spans)
        case FailedAnswer():
            return None


def _pairs(task: Task) -> Iterator[tuple[int, PairKey]]:
    """Each other live version with its pair; a challenger's belongs to the traffic's experiment."""
    traffic = task.traffic
    experiments = dict.fromkeys(traffic.shadow, "") | {c.version: traffic.salt for c in traffic.challengers}
    for number, experiment in experiments.items():
        if number in task.versions:
            yield number, PairKey(task.name, task.champion.digest, task.versions[number].digest, experiment)


def _count_text(figures: PairFigures, champion: Answer | None, other: Answer | None) -> None:
    for arm, answer in ((figures.champion, champion), (figures.other, other)):
        if answer is not None:
            arm.texts += 1
            arm.errors += isinstance(answer, FailedAnswer)
    if champion is None or other is None or isinstance(champion, FailedAnswer) or isinstance(other, FailedAnswer):
        return
    figures.texts += 1
    _count_labels(figures.champion, champion)
    _count_labels(figures.other, other)
    if not isinstance(champion, ValueAnswer):
        agreed = said(champion) == said(other)
        figures.agreed += agreed
        figures.disagreed += not agreed
    difference = score_difference(champion, other)
    if difference is not None:
        figures.differences += 1
        figures.difference += difference
        figures.largest_difference = max(figures.largest_difference, difference)


def _count_labels(arm: ArmFigures, answer: Answer) -> None:
    match answer:
        case LabelAnswer():
            arm.labels[answer.label] += 1
        case LabelsAnswer():
            arm.labels.update(answer.labels)
        case SpansAnswer():
            arm.labels.update({span.label for span in answer.spans})


def score_difference(first: Answer, second: Answer) -> float | None:
    """The largest between two answers to one text, over labels, or over the spans that both found."""
    if isinstance(first, ValueAnswer) and isinstance(second, ValueAnswer):
        return abs(first.value - second.value)
    scores, others = _scores(first), _scores(second)
    return max((abs(scores[key] - others[key]) for key in scores.keys() & others.keys()), default=None)


def _scores(answer: Answer) -> Mapping[object, float]:
    match answer:
        case LabelAnswer() | LabelsAnswer():
            return dict(answer.scores.items())
        case SpansAnswer():
            return {(span.label, span.start, span.end): span.score for span in answer.spans}
        case _:
            return {}
