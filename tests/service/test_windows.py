"""The last texts of a version beside its baseline: a ring that counts right, noise that is none, shifts are seen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from app.domain import Baseline, Encoding, ProblemType, TaskOutput, TaskVersion
from app.engine.baseline import BASELINE, measured_baseline, read_baseline
from app.engine.traits import Traits, traits_of
from app.service.windows import Kind, Window
from tests.fakes import make_version

UNKNOWN = 3
SPAM = make_version("spam", labels=("ham", "spam"))
TONE = make_version("tone", 1, ProblemType.MULTI_LABEL, ("joy", "anger", "fear"), thresholds=(0.5, 0.5, 0.9))
STARS = make_version("stars", 1, ProblemType.REGRESSION, ())
MANY = make_version("intent", labels=tuple(f"intent-{i}" for i in range(60)))


class Stream:
    """Texts whose answers are drawn: `lean` shifts scores, `length` how long they are, `unknown` what is known."""

    def __init__(self, version: TaskVersion, seed: int = 0) -> None:
        self.version = version
        self._random = np.random.default_rng(seed)

    def texts(self, count: int, lean: float = 0.0, length: float = 12, unknown: float = 0.0) -> Traits:
        random, labels = self._random, max(1, len(self.version.labels))
        logits = random.normal(size=(count, labels)) * 2
        logits[:, 0] += lean
        lengths = 3 + random.poisson(length, count)
        encodings = [
            Encoding(tuple(np.where(random.random(n) < unknown, UNKNOWN, 10).tolist()), (0,) * n) for n in lengths
        ]
        return traits_of(self.version, self._outputs(logits), encodings, UNKNOWN)

    def _outputs(self, logits: np.ndarray) -> list[TaskOutput]:
        match self.version.problem_type:
            case ProblemType.SINGLE_LABEL:
                shares = np.exp(logits)
                return [TaskOutput(tuple(row)) for row in (shares / shares.sum(axis=1, keepdims=True)).tolist()]
            case ProblemType.MULTI_LABEL:
                return [TaskOutput(tuple(row)) for row in (1 / (1 + np.exp(-logits))).tolist()]
            case _:
                return [TaskOutput(tuple(row)) for row in logits.tolist()]


def baseline_of(version: TaskVersion, count: int = 1000, seed: int = 7) -> Baseline:
    found = measured_baseline(version, Stream(version, seed).texts(count))
    baseline = read_baseline({BASELINE: found}, version)
    assert baseline is not None
    return baseline


def window_of(version: TaskVersion, size: int = 500) -> Window:
    return Window(version, baseline_of(version), size)


def drifting(window: Window) -> set[Kind]:
    return {drift.kind for drift in window.compare() if drift.is_drifting}


@pytest.mark.parametrize("version", [SPAM, TONE, STARS, MANY], ids=lambda version: version.task)
def test_a_ring_compares_as_a_window_that_saw_only_its_last_texts(version: TaskVersion) -> None:
    stream, ring, fresh = Stream(version), window_of(version, 300), window_of(version, 300)
    for count in (7, 250, 100, 299, 1, 900, 120):
        texts = stream.texts(count, lean=count / 100)
        ring.add(texts)
    fresh.restore(ring.rows)
    assert ring.texts == 300 and ring.rows.tolist() == fresh.rows.tolist()
    assert ring.compare() == fresh.compare()


@pytest.mark.parametrize("version", [SPAM, TONE, STARS, MANY], ids=lambda version: version.task)
def test_texts_like_those_of_the_baseline_never_drift(version: TaskVersion) -> None:
    stream, window = Stream(version), window_of(version)
    for _ in range(200):
        window.add(stream.texts(50))
        assert drifting(window) == set()


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        ({"lean": 6}, {Kind.SCORE, Kind.LABEL}),
        ({"length": 30}, {Kind.LENGTH}),
        ({"unknown": 0.4}, {Kind.UNKNOWN}),
    ],
    ids=lambda given: next(iter(given)),
)
@pytest.mark.parametrize("version", [SPAM, TONE, STARS, MANY], ids=lambda version: version.task)
def test_a_shift_is_seen_for_what_it_is(version: TaskVersion, change: dict[str, float], kinds: set[Kind]) -> None:
    stream, window = Stream(version), window_of(version)
    window.add(stream.texts(500))
    window.add(stream.texts(400, **change))
    expected = kinds - {Kind.LABEL} if version is STARS else kinds  # a regression has its values, and no labels
    assert drifting(window) == expected


def test_nothing_is_said_of_few_texts() -> None:
    window = window_of(SPAM)
    window.add(Stream(SPAM).texts(199, lean=5))
    assert {(d.texts, d.baseline_texts, d.psi, d.p_value) for d in window.compare()} == {(199, 1000, None, None)}
    assert drifting(window) == set()
    window.add(Stream(SPAM).texts(1, lean=5))
    assert drifting(window)


def test_a_sure_and_small_difference_is_no_drift() -> None:
    window = window_of(SPAM, 100_000)
    window.add(Stream(SPAM).texts(50_000, lean=1))
    found = {drift.kind: drift for drift in window.compare()}
    label = found[Kind.LABEL]
    assert label.p_value is not None and label.p_value < 1e-4 and not label.is_drifting


def drawn(texts: int, counts: list[int]) -> np.ndarray:
    """Scores [texts, labels]: high for so many of them."""
    is_given = np.arange(texts)[:, None] < np.array(counts)
    return np.where(np.random.default_rng(texts).permuted(is_given, axis=0), 0.9, 0.1)


def test_labels_that_come_together_are_not_counted_as_texts_of_their_own() -> None:
    """The same texts, with each label ten times: what chance explained before it explains still."""
    tenfold = replace(TONE, labels=tuple(f"{name} {i}" for name in TONE.labels for i in range(10)), thresholds=())
    rows = drawn(500, [100, 125, 75])
    expected = drawn(1000, [200, 200, 200])
    found = []
    for version, times in ((replace(TONE, thresholds=()), 1), (tenfold, 10)):
        encodings = [Encoding((10,) * 5, (0,) * 5)] * 1000
        traits = [
            traits_of(version, [TaskOutput(tuple(np.repeat(row, times).tolist())) for row in part], encodings[:n], 3)
            for part, n in ((rows, 500), (expected, 1000))
        ]
        baseline = read_baseline({BASELINE: measured_baseline(version, traits[1])}, version)
        assert baseline is not None
        window = Window(version, baseline, 500)
        window.add(traits[0])
        (label,) = [drift for drift in window.compare() if drift.kind is Kind.LABEL]
        found.append(label.p_value)
    assert None not in found and min(found[0] or 0.0, found[1] or 0.0) > 0.01


def test_the_label_whose_scores_moved_is_named() -> None:
    window = window_of(TONE)
    texts = Stream(TONE).texts(500)
    texts.scores[:, 1] = 0.99
    window.add(texts)
    (score,) = [drift for drift in window.compare() if drift.kind is Kind.SCORE]
    assert score.label == "anger" and score.is_drifting


def test_of_many_labels_the_commonest_have_scores_that_are_looked_at() -> None:
    window = window_of(MANY)
    window.add(Stream(MANY).texts(300))
    assert window.rows.shape == (300, 32 + 2 + 8)  # scores, length and unknown, a bit for each label and none


def test_an_earlier_baseline_covers_what_it_has() -> None:
    whole = measured_baseline(SPAM, Stream(SPAM, 7).texts(1000))
    raw = {name: whole[name] for name in ("edges", "counts")}
    baseline = read_baseline({BASELINE: raw}, SPAM)
    assert baseline is not None
    window = Window(SPAM, baseline, 500)
    window.add(Stream(SPAM).texts(400, lean=3))
    assert [drift.kind for drift in window.compare()] == [Kind.SCORE] and drifting(window) == {Kind.SCORE}


def test_a_baseline_that_says_nothing_compares_nothing() -> None:
    window = Window(SPAM, Baseline(), 500)
    window.add(Stream(SPAM).texts(400))
    assert window.compare() == []


@pytest.mark.parametrize(
    "rows", [np.zeros((3, 99), np.uint8), np.zeros((3, 6), np.int64), np.full((3, 6), 77, np.uint8)]
)
def test_rows_of_another_window_are_not_taken(rows: np.ndarray) -> None:
    window = window_of(SPAM)
    assert window.rows.shape[1] == 6
    with pytest.raises(ValueError, match="a window has"):
        window.restore(rows)
    assert window.texts == 0
