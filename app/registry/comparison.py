"""What versions of a task answered side by side, added up in Redis by all servers; answers wait there for an outcome.

Knows neither labels nor problem types: what a version said of a text is a JSON value, right where it equals the truth.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from typing import Any, cast

from redis import Redis

from app.errors import ConflictError, NotFoundError
from app.registry.connection import reached
from app.registry.schema import (
    ADD_BATCH,
    ADD_OUTCOME,
    KEEP,
    KEPT,
    answers_key,
    comparison_key,
    comparisons_key,
    experiment_key,
    flushed_key,
)

Said = str | float | list[Any] | None  # a label, sorted labels, a value, sorted [label, start, end]; None: it failed

FIGURES_TTL_S = 90 * 86_400  # what nobody added to for this long is dropped
MAX_KEPT = 200_000  # texts whose answers are kept, the newest: about 0.5 KB each for three versions
_SOURCE_TTL_S = 86_400
_CHUNK = 1_000  # texts in one round trip


@dataclass(frozen=True, slots=True)
class PairKey:
    """Two versions by their digests. What counts for one experiment also counts for the pair over all time."""

    task: str
    champion: str
    other: str
    experiment: str = ""  # the traffic's salt; empty: over all time


@dataclass(slots=True)
class ArmFigures:
    texts: int = 0  # that it was to score, those on which it failed counted
    errors: int = 0
    requests: int = 0  # that it answered without the other beside it, nothing of it from the answer cache
    seconds: float = 0.0  # inference time of these
    judged: int = 0  # texts that it scored and whose truth is known
    right: int = 0
    measured: int = 0  # the same for values, which are not right or wrong
    absolute_error: float = 0.0
    labels: Counter[str] = field(default_factory=Counter)  # of the pair's texts: how many it gave the label to


@dataclass(slots=True)
class PairFigures:
    """Sums over texts and requests. `texts` are those that both answered; outcomes are of those that both scored."""

    champion: ArmFigures = field(default_factory=ArmFigures)
    other: ArmFigures = field(default_factory=ArmFigures)
    requests: int = 0  # with both beside each other
    texts: int = 0
    agreed: int = 0
    disagreed: int = 0
    differences: int = 0  # texts on which scores can be compared
    difference: float = 0.0  # summed; of one text: its largest over labels
    largest_difference: float = 0.0
    judged: int = 0
    both_right: int = 0
    only_champion_right: int = 0
    only_other_right: int = 0
    measured: int = 0
    champion_error: float = 0.0  # absolute, summed
    other_error: float = 0.0


_LARGEST = "largest_difference"  # the one figure that is no sum
_ARMS = ("champion", "other")
_PAIR_FIELDS = {f.name: float if f.type == "float" else int for f in fields(PairFigures) if f.name not in _ARMS}
_ARM_FIELDS = {f.name: float if f.type == "float" else int for f in fields(ArmFigures) if f.name != "labels"}
_LABEL = "label:"


@dataclass(frozen=True, slots=True)
class KeptAnswers:
    """What versions said of one text, until somebody tells the truth."""

    request_id: str
    task: str
    index: int  # of the input in its request
    pairs: tuple[PairKey, ...]
    said: Mapping[str, Said]  # by digest


@dataclass(frozen=True, slots=True)
class Batch:
    """What one server counted in a while. `number` grows with each batch of a source."""

    source: str
    number: int
    figures: Mapping[PairKey, PairFigures]
    kept: Sequence[KeptAnswers]


class Comparisons:
    """Safe from any thread. Every method raises UnavailableError where Redis does not answer."""

    def __init__(self, redis: Redis, max_kept: int = MAX_KEPT) -> None:
        self._redis = redis
        self._max_kept = max_kept
        self._keep = redis.register_script(KEEP)
        self._add_batch = redis.register_script(ADD_BATCH)
        self._add_outcome = redis.register_script(ADD_OUTCOME)

    def add(self, batch: Batch) -> bool:
        """False where this batch, sent again because its answer was lost, had been counted."""
        keys = [flushed_key(batch.source)]
        entries = _entries(batch.figures, keys)
        with reached():
            return bool(self._add_batch(keys, [batch.number, entries, FIGURES_TTL_S, _SOURCE_TTL_S]))

    def keep(self, answers: Iterable[KeptAnswers], ttl_s: int) -> None:
        """For `outcome`. Of a text that is kept already, the first answers stay: its outcome counts once."""
        remaining = iter(answers)
        with reached():
            while chunk := list(islice(remaining, _CHUNK)):
                keys = [answers_key(kept.request_id, kept.task, kept.index) for kept in chunk]
                self._keep([KEPT, *keys], [ttl_s, self._max_kept, *map(_kept_to_json, chunk)])

    def outcome(self, request_id: str, task: str, index: int, truth: Said) -> bool:
        """Counts the truth of one text for every pair of versions that was asked. False: the same was told before.

        Raises NotFoundError where no answers are kept, ConflictError where another truth was told.
        """
        key = answers_key(request_id, task, index)
        while True:  # twice at most: whoever comes between us counts it
            with reached():
                raw = self._redis.get(key)
            if raw is None:
                raise NotFoundError(
                    f"no answer of task {task} to input {index} of this request is kept: answers are there from a "
                    "second after they were given, for a while, and only while versions of the task are compared"
                )
            kept = json.loads(cast(str, raw))
            if "truth" in kept:
                return _told_before(kept["truth"], truth)
            keys = [key]
            entries = _entries(_judged(task, kept, truth), keys)
            counted = json.dumps({"truth": truth})
            with reached():
                if self._add_outcome(keys, [cast(str, raw), counted, entries, FIGURES_TTL_S]):
                    return True

    def read(self, task: str, champion: str) -> dict[str, PairFigures]:
        """The figures of every version compared with this champion, over all time, by digest."""
        with reached():
            others = self._redis.smembers(cast(str, comparisons_key(task, champion)))
        digests = sorted(_text(other) for other in others)
        figures = self.read_pairs([PairKey(task, champion, other) for other in digests])
        return {other: found for other, found in zip(digests, figures, strict=True) if found != PairFigures()}

    def read_pairs(self, pairs: Sequence[PairKey]) -> list[PairFigures]:
        """In the order of `pairs`, in one round trip; zeros where nothing was counted."""
        pipeline = self._redis.pipeline(transaction=False)
        for pair in pairs:
            pipeline.hgetall(cast(str, _hash_keys(pair)[-1]))
        with reached():
            return [_from_hash(found) for found in pipeline.execute()]


def _hash_keys(pair: PairKey) -> list[bytes]:
    overall = comparison_key(pair.task, pair.champion, pair.other)
    return [overall, *([experiment_key(overall, pair.experiment)] if pair.experiment else [])]


def _text(value: bytes | str) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _entries(figures: Mapping[PairKey, PairFigures], keys: list[bytes]) -> str:
    """What the scripts add, as JSON; the keys that it takes are put behind `keys`."""
    entries = []
    for pair, added in figures.items():
        hashes = _hash_keys(pair)
        start = len(keys) + 1  # Lua counts from 1
        keys += [*hashes, comparisons_key(pair.task, pair.champion)]
        sums = {name: repr(amount) for name, amount in _sums(added) if amount}
        largest = {_LARGEST: repr(added.largest_difference)} if added.differences else {}
        positions = list(range(start, start + len(hashes)))
        entry = {"hashes": positions, "list": start + len(hashes), "other": pair.other}
        entries.append(entry | {"sums": sums, "largest": largest})
    return json.dumps(entries)


def _sums(figures: PairFigures) -> Iterator[tuple[str, float]]:
    for name in _PAIR_FIELDS:
        if name != _LARGEST:
            yield name, getattr(figures, name)
    for arm_name in _ARMS:
        arm: ArmFigures = getattr(figures, arm_name)
        for name in _ARM_FIELDS:
            yield f"{arm_name}.{name}", getattr(arm, name)
        for label, count in arm.labels.items():
            yield f"{arm_name}.{_LABEL}{label}".encode("utf-8", "replace").decode(), count


def _from_hash(found: Mapping[bytes | str, bytes | str]) -> PairFigures:
    figures = PairFigures()
    for raw_name, raw_amount in found.items():
        name, amount = _text(raw_name), float(raw_amount)
        arm_name, dot, rest = name.partition(".")
        if not dot:
            setattr(figures, name, _PAIR_FIELDS[name](amount))
            continue
        arm: ArmFigures = getattr(figures, arm_name)
        if rest.startswith(_LABEL):
            arm.labels[rest.removeprefix(_LABEL)] = int(amount)
        else:
            setattr(arm, rest, _ARM_FIELDS[rest](amount))
    return figures


def _kept_to_json(kept: KeptAnswers) -> str:
    """The champion is the same in all pairs. `said` has the versions' order, and [] for one that did not score it."""
    champion = kept.pairs[0].champion
    others = [(pair.other, pair.experiment) for pair in kept.pairs]
    said = [[kept.said[digest]] if digest in kept.said else [] for digest in (champion, *(o for o, _ in others))]
    return json.dumps({"champion": champion, "others": others, "said": said}, separators=(",", ":"))


def _told_before(told: Said, truth: Said) -> bool:
    if told != truth:
        raise ConflictError("another outcome was reported for this answer before, and the first one counts")
    return False


def _judged(task: str, kept: Mapping[str, Any], truth: Said) -> dict[PairKey, PairFigures]:
    count = _measure if isinstance(truth, int | float) else _judge
    judged = {}
    champion_said, *others_said = kept["said"]
    for (other, experiment), other_said in zip(kept["others"], others_said, strict=True):
        figures = judged[PairKey(task, kept["champion"], other, experiment)] = PairFigures()
        count(figures, champion_said, other_said, truth)
    return judged


def _judge(figures: PairFigures, champion: Sequence[Said], other: Sequence[Said], truth: Any) -> None:
    """A version that failed was not right."""
    for arm, said in ((figures.champion, champion), (figures.other, other)):
        if said:
            arm.judged, arm.right = 1, int(said[0] == truth)
    if champion and other:
        figures.judged = 1
        rights = (figures.champion.right, figures.other.right)
        figures.both_right = int(rights == (1, 1))
        figures.only_champion_right = int(rights == (1, 0))
        figures.only_other_right = int(rights == (0, 1))


def _measure(figures: PairFigures, champion: Sequence[Any], other: Sequence[Any], truth: Any) -> None:
    """A version that failed has no error that could be measured."""
    for arm, said in ((figures.champion, champion), (figures.other, other)):
        if said and said[0] is not None:
            arm.measured, arm.absolute_error = 1, abs(said[0] - truth)
    if figures.champion.measured and figures.other.measured:
        figures.measured = 1
        figures.champion_error, figures.other_error = figures.champion.absolute_error, figures.other.absolute_error
