"""What a manifest says of the texts that an artifact was measured on: counted, checked, and read again."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.config import SHIPPED_PREFIXES
from app.domain import Encoding, ProblemType, TaskOutput, TaskVersion
from app.engine.baseline import baseline_faults, measured_baseline, read_baseline
from app.engine.traits import Traits, answer_names, traits_of
from tests.fakes import make_version

UNKNOWN = 99
TAGS = ("O", "B-city", "I-city", "B-name")


def encoding(*words: int, unknown: int = 0) -> Encoding:
    """Two special tokens around one for each entry of `words`, which says which word it belongs to."""
    ids = (1, *[UNKNOWN] * unknown, *range(10, 10 + len(words) - unknown), 2)
    return Encoding(ids, (0,) * len(ids), word_ids=(None, *words, None))


def traits(version: TaskVersion, *scores: tuple[float, ...]) -> Traits:
    texts = [encoding(*range(3 + i), unknown=i) for i in range(len(scores))]
    return traits_of(version, [TaskOutput(row) for row in scores], texts, UNKNOWN)


def test_a_text_has_a_length_and_a_share_of_unknown_tokens() -> None:
    found = traits(make_version("spam"), (0.3, 0.7), (0.6, 0.4))
    assert found.lengths.tolist() == [5, 6]
    assert found.unknown.tolist() == pytest.approx([0, 1 / 6])
    assert traits_of(make_version("spam"), [TaskOutput((0.3, 0.7))], [encoding(0)], None).unknown.tolist() == [0]


def test_one_label_is_given_and_its_score_is_the_highest() -> None:
    found = traits(make_version("spam"), (0.3, 0.7), (0.6, 0.4))
    assert found.scores.tolist() == [[0.3, 0.7, 0.7], [0.6, 0.4, 0.6]]
    assert found.given.tolist() == [[False, True, False], [True, False, False]]


def test_several_labels_or_none_are_given_by_their_thresholds() -> None:
    version = make_version("tone", 1, ProblemType.MULTI_LABEL, ("joy", "anger"), thresholds=(0.2, 0.6))
    found = traits(version, (0.3, 0.7), (0.1, 0.5))
    assert found.given.tolist() == [[True, True, False], [False, False, True]]
    bare = make_version("tone", 1, ProblemType.MULTI_LABEL, ("joy", "anger"))
    assert traits(bare, (0.3, 0.7)).given.tolist() == [[False, True, False]]


def test_of_a_regression_the_value_counts() -> None:
    version = make_version("stars", 1, ProblemType.REGRESSION, ())
    found = traits(version, (3.5,), (-1.0,))
    assert found.scores.tolist() == [[3.5], [-1.0]] and found.given.shape == (2, 0)
    assert answer_names(version) == ("value",)


def test_words_count_by_their_first_token_and_spans_by_their_kind() -> None:
    version = make_version("slots", 1, ProblemType.TOKEN, TAGS)
    assert answer_names(version) == ("city", "name")
    found = traits_of(
        version,
        [
            TaskOutput((0.1, 0.9, 0.2, 0.7, 0.1), (0, 1, 0, 2, 0)),  # the first word has two tokens
            TaskOutput((0.1, 0.5, 0.1), (0, 0, 0)),
        ],
        [encoding(0, 0, 1), encoding(0)],
        UNKNOWN,
    )
    assert found.scores.tolist() == [[pytest.approx(0.8)], [0.5]]
    assert found.given.tolist() == [[True, False, False], [False, False, True]]
    assert found.by_answer[0, 0] == pytest.approx(0.8) and np.isnan(found.by_answer[1]).all()


def test_scores_that_are_no_numbers_are_left_out() -> None:
    found = traits(make_version("spam"), (0.3, 0.7), (float("nan"), 0.4))
    assert found.lengths.tolist() == [5] and len(found.scores) == len(found.given) == len(found.unknown) == 1


# -- in a manifest -----------------------------------------------------------------------------------------------------


def stated(version: TaskVersion, found: Traits) -> dict[str, Any]:
    """As it comes back from a file."""
    manifest: dict[str, Any] = json.loads(json.dumps({"score_baseline": measured_baseline(version, found)}))
    assert baseline_faults(manifest) == []
    return manifest


def test_what_was_measured_is_read_again() -> None:
    version = make_version("spam")
    manifest = stated(version, traits(version, (0.3, 0.7), (0.6, 0.4), (0.05, 0.95)))
    raw, baseline = manifest["score_baseline"], read_baseline(manifest, version)
    assert baseline is not None and baseline.scores is not None
    assert baseline.labels == (1, 2, 0) and raw["texts"] == 3
    assert baseline.scores.counts == (*map(tuple, raw["counts"]), tuple(raw["top"])) and len(raw["counts"]) == 2
    assert baseline.length is not None and baseline.length.counts[0][0] == baseline.length.counts[0][-1] == 0
    assert baseline.unknown is not None and sum(baseline.unknown.counts[0]) == 3


@pytest.mark.parametrize("values", [[(1.0,), (2.5,), (4.0,)], [(2.0,), (2.0,)]])
def test_a_regression_is_counted_over_its_own_range(values: list[tuple[float, ...]]) -> None:
    version = make_version("stars", 1, ProblemType.REGRESSION, ())
    baseline = read_baseline(stated(version, traits(version, *values)), version)
    assert baseline is not None and baseline.scores is not None
    assert sum(baseline.scores.counts[0]) == len(values) and baseline.labels == ()


def test_earlier_manifests_have_less() -> None:
    raw = {"edges": [0.0, 0.5, 1.0], "counts": [[3, 1], [1, 3]]}
    version = make_version("spam")
    assert baseline_faults({"score_baseline": raw}) == []
    baseline = read_baseline({"score_baseline": raw}, version)
    assert baseline is not None and baseline.scores is not None
    assert baseline.scores.counts == ((3, 1), (1, 3)) and baseline.length is None and baseline.labels == ()
    of_tags = read_baseline({"score_baseline": raw}, make_version("slots", 1, ProblemType.TOKEN, TAGS))
    assert of_tags is not None and of_tags.scores is None
    assert read_baseline({}, version) is None and baseline_faults({}) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("edges",), [0.0, 0.5]),
        (("edges",), [0.0, 0.7, 0.5, *[1.0] * 8]),
        (("counts",), []),
        (("counts", 0), [1] * 9),
        (("counts", 0, 3), -1),
        (("counts", 0, 3), 1.5),
        (("top",), "many"),
        (("labels",), [True, 2, 3]),
        (("length",), [1, 2]),
        (("length", "edges", 0), float("nan")),
        (("unknown", "counts"), None),
    ],
)
def test_a_baseline_that_cannot_be_read_is_told(path: tuple[str | int, ...], value: object) -> None:
    version = make_version("spam")
    manifest = copy.deepcopy(stated(version, traits(version, (0.3, 0.7), (0.6, 0.4))))
    place: Any = manifest["score_baseline"]
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    (fault,) = baseline_faults(manifest)
    assert fault.startswith("score_baseline") and "must" in fault


def test_a_baseline_is_an_object() -> None:
    assert baseline_faults({"score_baseline": [1]}) == ["score_baseline must be an object"]


@pytest.mark.parametrize("folder", sorted(SHIPPED_PREFIXES.glob("*/manifest.json")), ids=lambda path: path.parent.name)
def test_the_shipped_tasks_can_be_watched_whole(folder: Path) -> None:
    raw = json.loads(folder.read_text())["score_baseline"]
    assert {"edges", "counts", "labels", "length", "unknown"} <= set(raw)
    assert raw["texts"] == sum(raw["length"]["counts"]) == sum(raw["unknown"]["counts"]) >= 500
