"""Files of labelled texts: what is read, and what each bad file is told."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from app.domain import InputKind, ProblemType, TextInput
from app.errors import DataError
from app.learning.data import Unreadable, check_fits, label_names, read_table


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
        (
            "train.tsv",
            "txt\tlabel\na\tb\n",
            "no column text, nor text_a and text_b: it has txt, label; rename the one with the texts to text, or",
        ),
        (
            "train.tsv",
            "text\tclass\na\tb\n",
            "no column label, labels, score or tags: it has text, class; rename the one with the answers to label",
        ),
        (
            "train.jsonl",
            '{"text": "a", "tags": ["O"]}',
            "no column tokens: it has text, tags; rename the one with the lists of words",
        ),
        ("train.tsv", "text\tlabel\n", "train.tsv has no rows"),
        ("train.tsv", "", "train.tsv has no rows"),
        ("train.jsonl", "\n \n", "train.jsonl has no rows"),
        ("train.txt", "text\tlabel\na\tx\n", "must end in one of .tsv, .csv, .jsonl"),
        ("train.csv", 'text,label\n"a,x\n', "train.csv, line 2 cannot be read"),
        (
            "train.csv",
            'text,label\na,x\n"b,x\nc,y\nd,y\n',
            "what it is part of begins on line 3, where a quotation mark",
        ),
        ("train.csv", "text;label\na;x\n", "it has text;label (in one piece: .csv files need commas between columns)"),
        ("train.tsv", "text,label\na,x\n", "it has text,label (in one piece: .tsv files need tabs between columns)"),
        ("train.csv", 'text,label\na,x\n"b"c,x\nd,y\n', "train.csv, line 3 cannot be read"),
        ("train.json", "[\n1\n]\n", "none of the first 3 rows of train.json can be read: line 1 is not JSON"),
        ("train.jsonl", '{"txt": "a", "label": "x"}\n', "no column text, nor text_a and text_b: it has txt, label"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, name: str, content: str, sentence: str) -> None:
    with pytest.raises(DataError) as raised:
        table(tmp_path, content, name)
    assert sentence in str(raised.value)


_SINGLE = '{"text": "a", "label": "x"}'
_TAGS = '{"tokens": ["a"], "tags": ["O"]}'


@pytest.mark.parametrize(
    ("name", "header", "good", "bad", "reason"),
    [
        ("train.tsv", "text\tlabel", "a\tx", "  \ty", "has an empty text"),
        ("train.tsv", "text_a\ttext_b\tlabel", "a\tb\tx", "a\t \tx", "has an empty text_b"),
        ("train.tsv", "text\tlabel", "a\tx", "b\t", "has no label"),
        ("train.tsv", "text\tlabel", "a\tx", "b", "has 1 fields, and the header 2"),
        ("train.csv", "text,label", "a,x", "b,x,", "has 3 fields, and the header 2"),
        ("train.tsv", "text\tscore", "a\t1", "a\thigh", ': "high" is not a number'),
        ("train.tsv", "text\tscore", "a\t1", "a\tnan", ': "nan" is not a number'),
        ("train.tsv", "text\tscore", "a\t1", "a\t" + 50 * "b", f': "{40 * "b"}…" is not a number'),
        ("train.jsonl", _SINGLE, _SINGLE, "b", "is not JSON: Expecting value: line 1 column 1 (char 0)"),
        ("train.jsonl", _SINGLE, _SINGLE, "[1]", "is not a JSON object"),
        ("train.jsonl", _SINGLE, _SINGLE, '{"text": "b"}', "has no label"),
        ("train.jsonl", _SINGLE, _SINGLE, '{"label": "x"}', "has an empty text"),
        (
            "train.jsonl",
            _SINGLE,
            _SINGLE,
            '{"text": "\\ud83d", "label": "x"}',
            "has half a surrogate pair, which is no c",
        ),
        ("train.jsonl", _TAGS, _TAGS, '{"tokens": ["a"], "tags": ["O", "O"]}', "has 1 tokens and 2 tags"),
        ("train.jsonl", _TAGS, _TAGS, '{"tokens": ["a"], "tags": ["x"]}', ': "x" is not a BIO tag'),
        ("train.jsonl", _TAGS, _TAGS, '{"tokens": ["a", " "], "tags": ["O", "O"]}', "has an empty token"),
        ("train.jsonl", _TAGS, _TAGS, '{"tokens": [], "tags": []}', "has an empty token"),
        ("train.jsonl", _TAGS, _TAGS, '{"tokens": "a", "tags": ["O"]}', ": tokens and tags must be lists of texts"),
    ],
)
def test_a_row_that_cannot_be_read_is_listed_with_its_line(
    tmp_path: Path, name: str, header: str, good: str, bad: str, reason: str
) -> None:
    read = table(tmp_path, "\n".join([header, good, bad, *[good] * 8]) + "\n", name)
    (row,) = read.unreadable
    assert row.line == 3
    assert row.reason.startswith(f"line 3{reason}" if reason.startswith(":") else f"line 3 {reason}")
    assert len(read.examples) == 9 + name.endswith("jsonl") and 3 not in {example.line for example in read.examples}


def test_a_fifth_of_the_rows_may_be_unreadable_and_no_more(tmp_path: Path) -> None:
    rows = ["text\tlabel", "\tx", "a\tx", "b\ty", "c\tx", "d\ty"]
    assert table(tmp_path, "\n".join(rows)).unreadable == (Unreadable(2, "line 2 has an empty text"),)
    with pytest.raises(DataError) as raised:
        table(tmp_path, "\n".join([*rows, "e"]))
    assert "2 of the 6 rows of train.tsv cannot be read" in str(raised.value)
    assert str(raised.value).endswith("line 2 has an empty text")


def test_the_first_rows_of_json_lines_may_lack_columns(tmp_path: Path) -> None:
    rows = ["{", '{"text": "a"}', *[_SINGLE] * 8]
    read = table(tmp_path, "\n".join(rows), "train.jsonl")
    assert [row.line for row in read.unreadable] == [1, 2] and len(read.examples) == 8


def test_lines_are_counted_and_ended_as_each_format_has_it(tmp_path: Path) -> None:
    tsv = table(tmp_path, "text\tlabel\r\n\r\na\u2028b\tx\r\nc\ty")
    assert [(e.line, e.text.text, e.labels) for e in tsv.examples] == [(3, "a\u2028b", ("x",)), (4, "c", ("y",))]
    old_mac = table(tmp_path, "text,label\ra,x\rb,y\r", "train.csv")
    assert [(e.line, e.text.text) for e in old_mac.examples] == [(2, "a"), (3, "b")]


def test_the_digest_is_the_files(tmp_path: Path) -> None:
    content = "\ufefftext\tlabel\r\na\tx\r\n"
    assert table(tmp_path, content).sha256 == hashlib.sha256(content.encode()).hexdigest()


def test_another_encoding_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "train.tsv"
    path.write_bytes("text\tlabel\na\tx\ncafé\ty\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"train\.tsv, line 3 is not UTF-8: save"):
        read_table(path)
    path.write_bytes("text\tlabel\na\tx\n".encode("utf-16"))
    with pytest.raises(DataError, match=r"train\.tsv, line 1 is not UTF-8 but UTF-16: save"):
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
    with pytest.raises(DataError) as raised:
        check_fits(dev, train, label_names(train))
    assert str(raised.value) == (
        "dev.tsv has labels that train.tsv lacks (z): correct them, add rows of them to train.tsv, or take theirs out "
        "of dev.tsv"
    )


def test_a_problem_type_without_its_column(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no column tags for .*; rename the one with the answers, or change --problem"):
        table(tmp_path, "text\tlabel\na\tx\n", problem_type=ProblemType.TOKEN)


def test_tables_of_different_kinds(tmp_path: Path) -> None:
    train = table(tmp_path, "text\tlabel\na\tx\nb\ty\n")
    dev = table(tmp_path, "text_a\ttext_b\tlabel\na\tb\tx\n", "dev.tsv")
    with pytest.raises(DataError, match="of kind pair, and .*: give both files the same columns"):
        check_fits(dev, train, label_names(train))
