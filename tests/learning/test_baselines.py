"""The baselines find what plain words tell, say what guessing is worth, and cope with small and odd tables."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from app.domain import InputKind, ProblemType, TextInput
from app.learning.baselines import Baseline, text_baselines
from app.learning.data import Example, Table, label_names, read_table
from tests.learning import samples

HEADERS = {
    samples.single_rows: ("text", "label"),
    samples.multi_rows: ("text", "labels"),
    samples.regression_rows: ("text", "score"),
    samples.pair_rows: ("text_a", "text_b", "label"),
}


def tables(folder: Path, rows: Callable[[random.Random, int], Sequence[Sequence[str]]], count: int) -> list[Table]:
    source = random.Random(0)
    return [
        read_table(samples.write_rows(folder / f"{name}.tsv", HEADERS[rows], rows(source, size)))
        for name, size in (("train", count), ("dev", 60), ("test", 60))
    ]


def table(problem_type: ProblemType, rows: Sequence[tuple[str, tuple[str, ...]]]) -> Table:
    examples = tuple(Example(TextInput(text), line, labels) for line, (text, labels) in enumerate(rows, start=2))
    return Table("some.tsv", "", problem_type, InputKind.TEXT, examples)


def measured(train: Table, dev: Table, test: Table | None, labels: tuple[str, ...]) -> dict[str, Baseline]:
    return {name: work() for name, work in text_baselines(train, dev, test, labels).items()}


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        (samples.single_rows, ["accuracy", "macro_f1", "mcc", "auroc", "ece", "rows"]),
        (samples.multi_rows, ["micro_f1", "macro_f1", "accuracy", "auroc", "ece", "rows"]),
        (samples.regression_rows, ["pearson", "spearman", "rmse", "rows"]),
        (samples.pair_rows, ["accuracy", "macro_f1", "mcc", "auroc", "ece", "rows"]),
    ],
    ids=["single", "multi", "regression", "pair"],
)
def test_words_tell_and_guessing_does_not(
    tmp_path: Path, rows: Callable[[random.Random, int], Sequence[Sequence[str]]], names: list[str]
) -> None:
    train, dev, test = tables(tmp_path, rows, 400)
    found = measured(train, dev, test, label_names(train))
    assert list(found) == ["majority", "tfidf"]
    for baseline in found.values():
        assert [list(figures) for figures in baseline.figures.values()] == [names, names]
        assert list(baseline.figures) == ["dev", "test"] and baseline.seconds > 0
    assert found["tfidf"].figures["test"][names[0]] > 0.95
    assert found["majority"].figures["test"][names[0]] < 0.7


def test_guessing_is_right_as_often_as_the_label_is_given(tmp_path: Path) -> None:
    train, dev, _ = tables(tmp_path, samples.single_rows, 60)
    labels = label_names(train)
    most = max(labels, key=lambda label: sum(example.labels == (label,) for example in train.examples))
    figures = measured(train, dev, None, labels)["majority"].figures
    share = sum(example.labels == (most,) for example in dev.examples) / 60
    assert list(figures) == ["dev"]
    assert figures["dev"]["accuracy"] == pytest.approx(share, abs=1e-5) and figures["dev"]["auroc"] == 0.5


def test_of_several_labels_those_are_guessed_that_most_texts_have() -> None:
    rows = [("a b", ("x",)), ("b c", ("x", "y")), ("c d", ("x",)), ("d e", ())]
    both = table(ProblemType.MULTI_LABEL, rows)
    figures = measured(both, both, None, ("x", "y"))["majority"].figures["dev"]
    assert figures["accuracy"] == 0.5 and figures["micro_f1"] == pytest.approx(2 * 3 / (4 + 4))


def test_tagged_words_are_all_guessed_outside(tmp_path: Path) -> None:
    path = tmp_path / "tags.jsonl"
    path.write_text("\n".join(samples.tagged_lines(random.Random(0), 20)))
    tagged = read_table(path)
    found = measured(tagged, tagged, None, label_names(tagged))
    assert list(found) == ["majority"]
    assert found["majority"].figures["dev"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "rows": 20}


def test_the_same_twice(tmp_path: Path) -> None:
    train, dev, test = tables(tmp_path, samples.single_rows, 60)
    first, second = (measured(train, dev, test, label_names(train)) for _ in range(2))
    assert {name: b.figures for name, b in first.items()} == {name: b.figures for name, b in second.items()}


# -- odd tables --------------------------------------------------------------------------------------------------------


def test_a_label_that_train_lacks_is_never_found(tmp_path: Path) -> None:
    train, dev, _ = tables(tmp_path, samples.single_rows, 100)
    few = replace(train, examples=tuple(e for e in train.examples if e.labels != ("city",)))
    figures = measured(few, dev, None, label_names(train))["tfidf"].figures["dev"]
    share = sum(example.labels != ("city",) for example in dev.examples) / 60
    assert figures["accuracy"] == pytest.approx(share, abs=1e-5)


def test_one_label_alone_leaves_nothing_to_fit() -> None:
    rows = [("good", ("x",)), ("bad", ("x",))]
    only = table(ProblemType.SINGLE_LABEL, rows)
    found = measured(only, only, None, ("x", "y"))
    assert list(found) == ["majority"]
    assert set(found["majority"].figures["dev"]) == {"accuracy", "macro_f1", "ece", "rows"}


@pytest.mark.parametrize("labels", [("x",), ("x", "never"), ("always", "x")])
def test_several_labels_of_which_some_say_nothing(labels: tuple[str, ...]) -> None:
    rows = [(text, tuple(n for n in labels if n == "always" or (n == "x") == ("good" in text))) for text in TEXTS]
    rows = [(text, tuple(n for n in given if n != "never")) for text, given in rows]
    both = table(ProblemType.MULTI_LABEL, rows)
    assert measured(both, both, None, labels)["tfidf"].figures["dev"]["accuracy"] > 0.9


TEXTS = [f"{mood} {thing}" for mood in ("good", "bad") for thing in ("day", "night", "bread", "tea", "road")]


def test_texts_without_words() -> None:
    both = table(ProblemType.SINGLE_LABEL, [("?!", ("ask",)), ("!", ("cry",)), ("??", ("ask",)), ("!!", ("cry",))])
    assert measured(both, both, None, ("ask", "cry"))["tfidf"].figures["dev"]["accuracy"] == 1.0
