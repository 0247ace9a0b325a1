"""A dev part split off, rows drawn for few-label experiments, and what is found in the data."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from app.domain import InputKind, ProblemType, TextInput
from app.errors import DataError
from app.learning.data import Example, Table, Unreadable, read_table
from app.learning.splits import findings, sampled_rows, split_off_dev, subsample
from tests.learning.samples import multi_rows, regression_rows, single_rows, tagged_lines, write_rows


@pytest.fixture(autouse=True)
def few_rows_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.learning.splits._FEW_DEV_ROWS", 0)


def table(*rows: tuple[str, str]) -> Table:
    examples = tuple(Example(TextInput(text), line, (label,)) for line, (text, label) in enumerate(rows, start=2))
    return Table("train.tsv", "digest", ProblemType.SINGLE_LABEL, InputKind.TEXT, examples)


def numbered(**sizes: int) -> Table:
    """So many rows of each label, all texts different."""
    return table(*[(f"{label} {number}", label) for label, size in sizes.items() for number in range(size)])


def labels(of: Table) -> Counter[str]:
    return Counter(label for example in of.examples for label in example.labels)


def lines(of: Table) -> list[int]:
    return [example.line for example in of.examples]


# -- a dev part --------------------------------------------------------------------------------------------------------


def test_each_label_gives_its_share_to_dev() -> None:
    train, dev = split_off_dev(numbered(a=200, b=50, c=10))
    assert labels(dev) == {"a": 20, "b": 5, "c": 1}
    assert sorted(lines(train) + lines(dev)) == list(range(2, 262))
    assert lines(train) == sorted(lines(train)) and lines(dev) == sorted(lines(dev))
    assert (train.name, dev.name) == ("train.tsv", "train.tsv (dev part)")
    assert train.sha256 == dev.sha256 == "digest"


def test_many_small_labels_give_their_share_together() -> None:
    many = numbered(**{f"label{number}": 3 for number in range(40)})
    train, dev = split_off_dev(many)
    assert len(dev.examples) == 12
    assert labels(train).keys() == labels(many).keys()


def test_a_label_with_one_row_stays_in_train() -> None:
    rare = {f"rare{number}": 1 for number in range(30)}
    for seed in range(5):
        train, dev = split_off_dev(numbered(a=30, b=30, **rare), share=0.5, seed=seed)
        assert rare.keys() <= labels(train).keys() and labels(dev).keys() == {"a", "b"}
        assert all(14 <= count <= 16 for count in labels(dev).values())


def test_the_seed_decides() -> None:
    whole = numbered(a=100, b=100)
    assert split_off_dev(whole, seed=3) == split_off_dev(whole, seed=3)
    assert lines(split_off_dev(whole, seed=3)[1]) != lines(split_off_dev(whole, seed=4)[1])


def test_no_text_is_in_both_parts() -> None:
    source = random.Random(0)
    rows = [(f"Text  {source.randrange(60)}", source.choice("ab")) for _ in range(200)]
    rows += [(text.lower().replace("  ", " "), label) for text, label in rows[:50]]
    train, dev = split_off_dev(table(*rows), share=0.3)
    assert 60 <= len(dev.examples) <= 80
    assert findings({"train": train, "dev": dev}).overlaps["dev"].count == 0


@pytest.mark.parametrize(("rows_of", "header"), [(multi_rows, "labels"), (regression_rows, "score")])
def test_other_problems_are_split_at_random(tmp_path: Path, rows_of, header: str) -> None:
    whole = read_table(write_rows(tmp_path / "train.tsv", ("text", header), rows_of(random.Random(0), 300)))
    train, dev = split_off_dev(whole)
    assert len(train.examples) + len(dev.examples) == 300 and 25 <= len(dev.examples) <= 31
    assert labels(train).keys() == labels(whole).keys()


def test_tagged_texts_are_split_too(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(tagged_lines(random.Random(0), 100)))
    train, dev = split_off_dev(read_table(path))
    assert (len(train.examples), len(dev.examples)) == (90, 10)


def test_too_few_rows_to_split() -> None:
    with pytest.raises(DataError, match=r"train\.tsv has 10 rows, too few .* give 20 at least, or a --dev file"):
        split_off_dev(numbered(a=5, b=5))
    assert len(split_off_dev(numbered(a=10, b=10))[1].examples) == 2


@pytest.mark.parametrize(
    "rows", [[("same", "a"), ("same", "b")] * 20, [(str(number), str(number)) for number in range(40)]]
)
def test_nothing_to_spare(rows: list[tuple[str, str]]) -> None:
    with pytest.raises(DataError, match="no rows that train can spare for dev: give more rows or a --dev file"):
        split_off_dev(table(*rows))


def test_unreadable_rows_are_told_of_once() -> None:
    whole = replace(numbered(a=10, b=10), unreadable=(Unreadable(1, "line 1 has no label"),))
    train, dev = split_off_dev(whole)
    assert train.unreadable == whole.unreadable and dev.unreadable == ()


# -- fewer rows --------------------------------------------------------------------------------------------------------


def test_a_sample_keeps_the_shares_of_the_labels() -> None:
    assert labels(subsample(numbered(a=600, b=300, c=100), 100)) == {"a": 60, "b": 30, "c": 10}


def test_a_sample_has_a_row_of_each_label_where_it_can() -> None:
    whole = numbered(a=1000, b=3, c=2, d=1)
    assert labels(subsample(whole, 16)) == {"a": 13, "b": 1, "c": 1, "d": 1}
    assert labels(subsample(whole, 4)) == {"a": 1, "b": 1, "c": 1, "d": 1}
    assert len(subsample(numbered(**{f"label{number}": 5 for number in range(77)}), 16).examples) == 16


def test_the_seed_decides_which_rows() -> None:
    whole = numbered(**{f"label{number}": 5 for number in range(77)})
    assert subsample(whole, 16, seed=1) == subsample(whole, 16, seed=1)
    assert labels(subsample(whole, 16, seed=1)) != labels(subsample(whole, 16, seed=2))
    assert lines(subsample(whole, 100)) == [whole.examples[row].line for row in sampled_rows(whole, 100)]


def test_a_sample_of_all_rows_is_the_table() -> None:
    whole = numbered(a=3, b=2)
    assert subsample(whole, 5) == subsample(whole, 100) == whole


def test_scores_are_drawn_at_random(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "train.tsv", ("text", "score"), regression_rows(random.Random(0), 50))
    assert len(subsample(read_table(path), 16).examples) == 16


# -- findings ----------------------------------------------------------------------------------------------------------


def test_texts_of_test_that_train_has_too() -> None:
    train = table(("One  text", "a"), ("another", "b"), ("pair", "a"))
    test = replace(table(("new", "a"), ("one TEXT ", "b"), *[("another", "b")] * 6), name="test.tsv")
    found = findings({"train": train, "test": test})
    assert found.overlaps["test"].count == 7
    assert found.overlaps["test"].lines == (3, 4, 5, 6, 7)
    (sentence,) = found.sentences()
    assert sentence.startswith("7 of 8 texts of test.tsv also stand in train.tsv (lines 3, 4, 5, 6, 7, …)")


def test_a_part_split_off_for_dev_still_counts_as_train() -> None:
    whole = table(*((f"text {number}", "ab"[number % 2]) for number in range(40)), *[("same", "a"), ("same", "b")] * 3)
    for seed in range(8):
        train, dev = split_off_dev(whole, share=0.3, seed=seed)
        found = findings({"train": train, "dev": dev, "test": replace(whole, name="test.tsv")}, whole)
        assert found.overlaps.keys() == {"test"} and found.in_dev.count == 0
        assert found.overlaps["test"].count == len(whole.examples)
        assert found.contradictions["train"].count == 6


def test_texts_of_test_that_a_dev_file_has_too() -> None:
    train, dev, test = (
        replace(table(*((text, "a") for text in texts)), name=f"{name}.tsv")
        for name, texts in (("train", "xyz"), ("dev", "vwx"), ("test", "uvx"))
    )
    found = findings({"train": train, "dev": dev, "test": test})
    assert [sentence.partition(":")[0] for sentence in found.sentences()] == [
        "1 of 3 texts of dev.tsv also stand in train.tsv (line 4)",
        "1 of 3 texts of test.tsv also stand in train.tsv (line 4)",
        "2 of 3 texts of test.tsv also stand in dev.tsv (lines 3, 4)",
    ]


def test_a_pair_is_the_same_where_both_texts_are() -> None:
    train, test = (
        Table("file", "", ProblemType.SINGLE_LABEL, InputKind.PAIR, (Example(TextInput(*pair), 2, ("a",)),))
        for pair in (("x", "y"), ("y", "x"))
    )
    found = findings({"train": train, "test": test})
    assert found.overlaps["test"].count == 0


def test_rows_of_train_that_contradict_each_other() -> None:
    found = findings({"train": table(("x", "a"), ("y", "a"), ("X", "a"), ("x", "b"), ("y", "a"), ("z", "b"))})
    assert found.contradictions["train"].count == 3
    assert found.contradictions["train"].lines == ((2, 5),)
    (sentence,) = found.sentences()
    assert sentence.startswith("3 rows of train.tsv share a text and differ in their answers (first lines 2 and 5)")


def test_rows_of_dev_and_test_that_contradict_each_other() -> None:
    good, bad = table(("x", "a"), ("y", "b")), table(("v", "a"), ("w", "b"), ("v", "b"))
    tables = {"train": good, "dev": replace(bad, name="dev.tsv"), "test": replace(good, name="test.tsv")}
    found = findings(tables)
    assert {name: c.count for name, c in found.contradictions.items()} == {"train": 0, "dev": 2, "test": 0}
    assert "2 rows of dev.tsv share a text and differ in their answers (first lines 2 and 4)" in found.sentences()[-1]
    split_off = findings({"train": good, "dev": bad}, whole=bad)
    assert {name: c.count for name, c in split_off.contradictions.items()} == {"train": 2}, "dev is a part of that file"


def test_scores_that_differ_contradict() -> None:
    examples = tuple(Example(TextInput("x"), line, score=line) for line in (2, 3))
    scored = Table("train.tsv", "", ProblemType.REGRESSION, InputKind.TEXT, examples)
    assert findings({"train": scored}).contradictions["train"].count == 2


def test_tags_that_begin_a_span_with_its_inside_are_told() -> None:
    tags = [("B-x", "I-x"), ("O", "I-x"), ("I-x",), ("B-y", "I-x"), ("B-x", "I-x", "I-x", "O"), ("B-x", "O", "I-x")]
    examples = tuple(Example(TextInput(f"text {line}"), line, found) for line, found in enumerate(tags, start=1))
    tagged = Table("train.jsonl", "", ProblemType.TOKEN, InputKind.TEXT, examples)
    found = findings({"train": tagged})
    assert found.unopened.lines == (2, 3, 4, 6)
    (sentence,) = found.sentences()
    assert sentence.startswith("4 rows of train.jsonl begin a span with I, not B (lines 2, 3, 4, 6)")
    assert findings({"train": table(("x", "I-x"), ("y", "a"))}).unopened.count == 0


def test_what_could_not_be_read_is_told(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "train.tsv", ("text", "label"), [*single_rows(random.Random(0), 18), ("", "a"), ("b",)]
    )
    found = findings({"train": read_table(path)})
    assert found.unreadable["train"].count == 2
    assert found.unreadable["train"].reasons == (
        "line 20 has an empty text",
        "line 21 has 1 fields, and the header 2",
    )
    assert found.sentences()[0].startswith(
        "2 rows of train.tsv cannot be read and are left out (the first: line 20 has an empty text)"
    )


def test_data_in_order_needs_no_sentence_and_is_counted() -> None:
    train, dev = table(("one", "a"), ("fifteen", "b"), ("two", "a")), table(("four", "a"), ("five", "b"))
    found = findings({"train": train, "dev": dev})
    assert found.sentences() == []
    assert found.rows == {"train": 3, "dev": 2}


def test_a_dev_of_few_rows_or_without_some_label_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    train, dev = (
        replace(table(*rows), name=name)
        for name, rows in (
            ("train.tsv", [("one", "a"), ("two", "b"), ("three", "c")]),
            ("dev.tsv", [("four", "a"), ("five", "a")]),
        )
    )
    (unasked,) = findings({"train": train, "dev": dev}).sentences()
    assert unasked.startswith("dev.tsv has no row of labels b, c: how well such texts are answered is not known")
    monkeypatch.setattr("app.learning.splits._FEW_DEV_ROWS", 3)
    few, _ = findings({"train": train, "dev": dev}).sentences()
    assert few.startswith("dev.tsv has 2 rows: one answer moves its score by 50.0 points")


def test_one_file_in_two_places_is_told_by_them() -> None:
    same = table(("one", "a"), ("two", "b"))
    found = findings({"train": same, "dev": same, "test": same}).sentences()
    assert [sentence.partition(" (line")[0] for sentence in found] == [
        "2 of 2 texts of train.tsv (dev) also stand in train.tsv (train)",
        "2 of 2 texts of train.tsv (test) also stand in train.tsv (train)",
        "2 of 2 texts of train.tsv (test) also stand in train.tsv (dev)",
    ]
