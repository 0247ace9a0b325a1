"""Files of labelled texts: what is read, and what each bad file is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.domain import InputKind, ProblemType, TextInput
from app.errors import DataError
from app.learning.data import check_fits, label_names, read_table


def table(folder: Path, content: str, name: str = "train.tsv", problem_type: ProblemType | None = None):
    path = folder / name
    path.write_bytes(content.encode())
    return read_table(path, problem_type)


def test_a_tsv_has_no_quoting(tmp_path: Path) -> None:
    read = table(tmp_path, 'text\tlabel\textra\n"Yo" he said\tno\t1\nit\'s "fine\tyes\t2\n')
    assert [example.text.text for example in read.examples] == ['"Yo" he said', "it's \"fine"]
    assert [example.labels for example in read.examples] == [("no",), ("yes",)]
    assert read.problem_type is ProblemType.SINGLE_LABEL and read.input_kind is InputKind.TEXT


def test_a_csv_has_quoting_and_line_breaks_in_fields(tmp_path: Path) -> None:
    read = table(tmp_path, 'text,label\r\n"a, ""b""\r\nc",x\r\nd,y\r\n', "train.csv")
    assert [example.text.text for example in read.examples] == ['a, "b"\r\nc', "d"]


def test_json_lines_pairs_and_lists_of_labels(tmp_path: Path) -> None:
    read = table(tmp_path, '{"text_a": "x", "text_b": "y", "labels": ["b", "a"]}\n\n', "train.jsonl")
    assert read.examples[0].text == TextInput("x", "y")
    assert read.examples[0].labels == ("a", "b")
    assert read.problem_type is ProblemType.MULTI_LABEL and read.input_kind is InputKind.PAIR


def test_empty_labels_are_none_of_them(tmp_path: Path) -> None:
    read = table(tmp_path, "text\tlabels\na\tx|y\nb\t\n")
    assert [example.labels for example in read.examples] == [("x", "y"), ()]
    assert label_names(read) == ("x", "y")


def test_scores_are_numbers_and_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    read = table(tmp_path, "\ufefftext\tscore\na\t1.5\nb\t-2\n")
    assert [example.score for example in read.examples] == [1.5, -2.0]
    assert label_names(read) == ()


def test_the_problem_type_can_be_overridden(tmp_path: Path) -> None:
    read = table(tmp_path, "text\tlabel\na\t1\nb\t2\n", problem_type=ProblemType.REGRESSION)
    assert [example.score for example in read.examples] == [1.0, 2.0]


def test_bio_labels_have_both_sides_of_each_type(tmp_path: Path) -> None:
    read = table(tmp_path, '{"tokens": ["a", "b"], "tags": ["B-x", "O"]}', "train.jsonl")
    assert read.examples[0].text == TextInput("a b")
    assert label_names(read) == ("O", "B-x", "I-x")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("train.tsv", "txt\tlabel\na\tb\n", "no column text, nor text_a and text_b: it has txt, label"),
        ("train.tsv", "text\tclass\na\tb\n", "no column label, labels, score or tags: it has text, class"),
        ("train.tsv", "text\tlabel\na\tx\n  \ty\n", "train.tsv, line 3 has an empty text"),
        ("train.tsv", "text\tlabel\na\tx\nb\t\n", "train.tsv, line 3 has no label"),
        ("train.tsv", "text\tlabel\na\tx\nb\n", "line 3 has 1 fields, and the header 2"),
        ("train.tsv", "text\tlabel\n", "train.tsv has no rows"),
        ("train.tsv", "", "train.tsv has no rows"),
        ("train.tsv", "text\tscore\na\thigh\n", 'line 2: "high" is not a number'),
        ("train.tsv", "text\tscore\na\tnan\n", 'line 2: "nan" is not a number'),
        ("train.txt", "text\tlabel\na\tx\n", "must end in one of .tsv, .csv, .jsonl"),
        ("train.csv", 'text,label\n"a,x\n', "train.csv, line 2 cannot be read"),
        ("train.jsonl", '{"text": "a", "label": "x"}\nb\n', "train.jsonl, line 2 is not JSON"),
        ("train.jsonl", "[1]\n", "line 1 is not a JSON object"),
        ("train.jsonl", '{"text": "a", "label": "x"}\n{"text": "b"}\n', "line 2 has no label"),
        ("train.jsonl", '{"tokens": ["a"], "tags": ["O", "O"]}', "line 1 has 1 tokens and 2 tags"),
        ("train.jsonl", '{"tokens": ["a"], "tags": ["x"]}', 'line 1: "x" is not a BIO tag'),
        ("train.jsonl", '{"tokens": ["a", " "], "tags": ["O", "O"]}', "line 1 has an empty token"),
        ("train.jsonl", '{"tokens": "a", "tags": ["O"]}', "tokens and tags must be lists of texts"),
    ],
)
def test_what_cannot_be_used_is_named_with_its_line(tmp_path: Path, name: str, content: str, sentence: str) -> None:
    with pytest.raises(DataError) as raised:
        table(tmp_path, content, name)
    assert sentence in str(raised.value)


def test_another_encoding_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "train.tsv"
    path.write_bytes("text\tlabel\na\tx\ncafé\ty\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"train\.tsv, line 3 is not UTF-8"):
        read_table(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_table(tmp_path / "train.tsv")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("text\tlabel\na\tx\nb\tx\n", 'has one label only, "x"'),
        ("text\tlabels\na\tx\nb\tx\n", "has the same labels"),
        ("text\tscore\na\t1\nb\t1\n", "has one score only"),
    ],
)
def test_nothing_to_tell_apart(tmp_path: Path, content: str, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        label_names(table(tmp_path, content))


def test_only_outside_tags(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tag but O"):
        label_names(table(tmp_path, '{"tokens": ["a"], "tags": ["O"]}', "train.jsonl"))


def test_labels_that_train_lacks(tmp_path: Path) -> None:
    train = table(tmp_path, "text\tlabel\na\tx\nb\ty\n")
    dev = table(tmp_path, "text\tlabel\na\tz\n", "dev.tsv")
    with pytest.raises(DataError, match=r"dev\.tsv has labels that train\.tsv lacks: z"):
        check_fits(dev, train, label_names(train))


def test_tables_of_different_kinds(tmp_path: Path) -> None:
    train = table(tmp_path, "text\tlabel\na\tx\nb\ty\n")
    dev = table(tmp_path, "text_a\ttext_b\tlabel\na\tb\tx\n", "dev.tsv")
    with pytest.raises(DataError, match="of kind pair"):
        check_fits(dev, train, label_names(train))
