"""From what was counted to the figures that people read: champion and other versions side by side. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

from scipy.special import bdtr

from app.domain import Arm, ProblemType, TaskVersion
from app.errors import MalformedError, NotFoundError, UnservableError
from app.registry.comparison import ArmFigures, PairFigures, Said
from app.rollout import TaskRecord, Traffic

_LARGEST_VALUE = 3.4e38  # what float32 holds
_LISTED = 20  # labels that an error lists
_DECIMALS = 6
_FIELDS = {
    ProblemType.SINGLE_LABEL: "label",
    ProblemType.MULTI_LABEL: "labels",
    ProblemType.REGRESSION: "value",
    ProblemType.TOKEN: "spans",
}


@dataclass(frozen=True, slots=True)
class Side:
    """One version of a pair."""

    version: int
    texts: int  # that it scored, failures counted
    errors: int
    error_rate: float | None
    requests: int  # that it answered without the other beside it: they tell its honest time
    mean_latency_ms: float | None
    label_rates: dict[str, float]  # share of the pair's texts that it gave the label to
    outcomes: int  # of all texts that it scored
    accuracy: float | None
    mean_absolute_error: float | None  # regression


@dataclass(frozen=True, slots=True)
class Outcomes:
    """Of texts that both scored and whose truth was reported."""

    count: int
    both_right: int
    only_champion_right: int
    only_other_right: int
    both_wrong: int
    champion_accuracy: float
    other_accuracy: float
    accuracy_gain: float  # other minus champion
    p_value: float  # McNemar's exact test, two-sided: of such a difference where both are equally good


@dataclass(frozen=True, slots=True)
class AbsoluteErrors:
    """The same for values."""

    count: int
    champion_mean: float
    other_mean: float
    gain: float  # champion minus other: positive where the other is nearer to the truth


@dataclass(frozen=True, slots=True)
class Pair:
    version: int  # the other one
    arm: Arm | None  # challenger or shadow; None where it is not live any more
    count: int  # texts that both answered
    agreed: int
    disagreed: int
    agreement: float | None  # None for regression
    mean_score_difference: float | None  # of a text: the largest over its labels
    max_score_difference: float | None
    paired_requests: int
    unpaired_requests: int
    latency_ratio: float | None  # other over champion, unpaired requests
    champion: Side
    other: Side
    outcomes: Outcomes | None
    absolute_errors: AbsoluteErrors | None


@dataclass(frozen=True, slots=True)
class Comparison:
    task: str
    champion: int
    pairs: list[Pair]  # challengers, shadows, then versions that were compared with this champion before


def compare(record: TaskRecord, figures: Mapping[str, PairFigures]) -> Comparison:
    """`figures` are of pairs with the present champion, by the other version's digest. Raises NotFoundError."""
    traffic = record.traffic
    if traffic is None:
        raise NotFoundError(f"no version of task {record.name} is live: approve one and make it the champion")
    arms = _arms(traffic)
    counted = {number for number, version in record.versions.items() if version.digest in figures}
    others = [*arms, *sorted(counted - arms.keys() - {traffic.champion}, reverse=True)]
    pairs = []
    for number in others:
        found = figures.get(record.versions[number].digest, PairFigures())
        pairs.append(describe_pair(traffic.champion, number, arms.get(number), found))
    return Comparison(record.name, traffic.champion, pairs)


def describe_pair(champion: int, other: int, arm: Arm | None, figures: PairFigures) -> Pair:
    return Pair(
        version=other,
        arm=arm,
        count=figures.texts,
        agreed=figures.agreed,
        disagreed=figures.disagreed,
        agreement=_rounded(ratio(figures.agreed, figures.agreed + figures.disagreed)),
        mean_score_difference=_significant(ratio(figures.difference, figures.differences)),
        max_score_difference=_significant(figures.largest_difference) if figures.differences else None,
        paired_requests=figures.requests,
        unpaired_requests=figures.champion.requests + figures.other.requests,
        latency_ratio=_rounded(latency_ratio(figures)),
        champion=_side(champion, figures.champion, figures.texts),
        other=_side(other, figures.other, figures.texts),
        outcomes=_outcomes(figures) if figures.judged else None,
        absolute_errors=_absolute_errors(figures) if figures.measured else None,
    )


def ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def latency_ratio(figures: PairFigures) -> float | None:
    """The other's mean inference time over the champion's, on requests that each answered alone."""
    champion = ratio(figures.champion.seconds, figures.champion.requests)
    other = ratio(figures.other.seconds, figures.other.requests)
    return None if champion is None or other is None else ratio(other, champion)


def accuracy_gain(figures: PairFigures) -> tuple[int, float] | None:
    """How many outcomes there are, and how much better the other is on them; for values, by how much nearer."""
    if figures.judged:
        return figures.judged, (figures.only_other_right - figures.only_champion_right) / figures.judged
    if figures.measured:
        return figures.measured, (figures.champion_error - figures.other_error) / figures.measured
    return None


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact two-sided p-value (McNemar 1947): the binomial test with 1/2 on the texts that only one had right."""
    rarer, count = min(only_first, only_second), only_first + only_second
    return min(1.0, 2 * float(bdtr(rarer, count, 0.5)))


def truth_of(
    version: TaskVersion,
    *,
    label: str | None = None,
    labels: Sequence[str] | None = None,
    value: float | None = None,
    spans: Sequence[tuple[str, int, int]] | None = None,
) -> Said:
    """What was reported, as `said` puts answers. Spans are (label, start, end), offsets in characters.

    Raises MalformedError unless exactly one is given, UnservableError where it does not fit the task.
    """
    reported = {"label": label, "labels": labels, "value": value, "spans": spans}
    given = [name for name, content in reported.items() if content is not None]
    wanted = _FIELDS.get(version.problem_type)
    if len(given) != 1:
        raise MalformedError(f"report the truth as exactly one of {', '.join(reported)}")
    if given != [wanted]:
        raise UnservableError(f"task {version.task} is a {version.problem_type}: report {wanted}, not {given[0]}")
    if value is not None:
        return _checked_value(value)
    if spans is not None:
        _check_labels(version, [name for name, _, _ in spans], _entities(version))
        return [list(span) for span in sorted(set(spans))]
    if label is not None:
        _check_labels(version, [label], version.labels)
        return label
    _check_labels(version, labels or (), version.labels)
    return sorted(set(labels or ()))


def _arms(traffic: Traffic) -> dict[int, Arm]:
    challengers = {challenger.version: Arm.CHALLENGER for challenger in traffic.challengers}
    return challengers | {number: Arm.SHADOW for number in traffic.shadow if number not in challengers}


def _side(version: int, arm: ArmFigures, texts: int) -> Side:
    mean_s = ratio(arm.seconds, arm.requests)
    return Side(
        version=version,
        texts=arm.texts,
        errors=arm.errors,
        error_rate=_rounded(ratio(arm.errors, arm.texts)),
        requests=arm.requests,
        mean_latency_ms=None if mean_s is None else round(mean_s * 1000, 3),
        label_rates={label: round(count / texts, _DECIMALS) for label, count in sorted(arm.labels.items())},
        outcomes=arm.judged + arm.measured,
        accuracy=_rounded(ratio(arm.right, arm.judged)),
        mean_absolute_error=_significant(ratio(arm.absolute_error, arm.measured)),
    )


def _outcomes(figures: PairFigures) -> Outcomes:
    count, both = figures.judged, figures.both_right
    only_champion, only_other = figures.only_champion_right, figures.only_other_right
    return Outcomes(
        count=count,
        both_right=both,
        only_champion_right=only_champion,
        only_other_right=only_other,
        both_wrong=count - both - only_champion - only_other,
        champion_accuracy=round((both + only_champion) / count, _DECIMALS),
        other_accuracy=round((both + only_other) / count, _DECIMALS),
        accuracy_gain=round((only_other - only_champion) / count, _DECIMALS),
        p_value=float(f"{mcnemar(only_champion, only_other):.6g}"),
    )


def _absolute_errors(figures: PairFigures) -> AbsoluteErrors:
    champion, other = figures.champion_error / figures.measured, figures.other_error / figures.measured
    means = (float(f"{mean:.7g}") for mean in (champion, other, champion - other))
    return AbsoluteErrors(figures.measured, *means)


def _rounded(figure: float | None) -> float | None:
    return None if figure is None else round(figure, _DECIMALS)


def _significant(figure: float | None) -> float | None:
    """For what has no natural scale."""
    return None if figure is None else float(f"{figure:.7g}")


def _checked_value(value: float) -> float:
    if not isfinite(value) or abs(value) > _LARGEST_VALUE:
        raise UnservableError("value is no number that a model could have answered")
    return float(value)


def _entities(version: TaskVersion) -> list[str]:
    """What spans are labelled with: the tags without B- and I-."""
    return list(dict.fromkeys(tag.partition("-")[2] for tag in version.labels if "-" in tag))


def _check_labels(version: TaskVersion, reported: Sequence[str], known: Sequence[str]) -> None:
    for label in reported:
        if label not in known:
            more = f" and {len(known) - _LISTED} more" if len(known) > _LISTED else ""
            listing = ", ".join(known[:_LISTED]) + more
            raise UnservableError(f'"{label}" is no label of task {version.task}; they are {listing}')
