"""Labelled texts from files: TSV, CSV or JSON lines. Knows columns and lines; nothing of tokens, tensors or models.

Columns: `text` or `text_a`,`text_b`, then `label` (one), `labels` (joined by `|`, empty for none) or `score`
(a number). JSON lines may hold `tokens` and `tags` (BIO) instead. Rows that cannot be read are listed with the reason.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import hashlib
import io
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

from app.domain import InputKind, ProblemType, TextInput
from app.errors import DataError

OUTSIDE = "O"
_MAX_FIELD_CHARS = 2**24
_MAX_UNREADABLE = 0.2  # of a file's rows: beyond it the file itself is wrong
_HEAD_ROWS = 100  # in which a row with the columns must stand
_SHOWN_CHARS = 40
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_FORMATS = {".tsv": "tsv", ".csv": "csv", ".jsonl": "json", ".ndjson": "json", ".json": "json"}
# problem type → the columns its answers may stand in, the first that is there
_ANSWER_COLUMNS = {
    ProblemType.TOKEN: ("tags",),
    ProblemType.MULTI_LABEL: ("labels", "label"),
    ProblemType.REGRESSION: ("score", "label"),
    ProblemType.SINGLE_LABEL: ("label",),
}
_Record = Mapping[str, Any]
_Row = tuple[int, _Record | str]  # line, and the fields or the reason why there are none
_Read = TypeVar("_Read")


@dataclass(frozen=True, slots=True)
class Example:
    """One row: what is read, and the answer in the fields that its problem type uses."""

    text: TextInput
    line: int
    labels: tuple[str, ...] = ()  # single-label: one; multi-label: any number; tokens: a BIO tag for each word
    score: float = 0.0  # regression
    words: tuple[str, ...] = ()  # tokens: the file's own words; `text` joins them by spaces
    num_tokens: int = 0  # of the whole text, special ones too; 0: not counted


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A row that is left out."""

    line: int
    reason: str  # a sentence that begins with the line


@dataclass(frozen=True, slots=True)
class Table:
    """One file's rows, all of one problem type and one input kind."""

    name: str  # of the file, without its folder
    sha256: str
    problem_type: ProblemType
    input_kind: InputKind
    examples: tuple[Example, ...]
    unreadable: tuple[Unreadable, ...] = ()

    @property
    def texts(self) -> list[TextInput]:
        return [example.text for example in self.examples]


def read_table(path: Path, problem_type: ProblemType | None = None) -> Table:
    """Read a file of labelled texts. `problem_type` overrides what its columns say.

    Raises DataError where the file cannot be used; single rows that cannot be read go to `unreadable`.
    """
    with _opened(path) as file:
        return _read(path, file, problem_type)


def label_names(train: Table) -> tuple[str, ...]:
    """The labels of a training table, sorted; for BIO tags `O`, then `B-` and `I-` of each type.

    Raises DataError where there is nothing to tell apart.
    """
    if train.problem_type is ProblemType.REGRESSION:
        if len({example.score for example in train.examples}) < 2:
            raise DataError(f"{train.name} has one score only: there is nothing to learn")
        return ()
    seen = sorted({label for example in train.examples for label in example.labels})
    if train.problem_type is ProblemType.TOKEN:
        types = sorted({label[2:] for label in seen if label != OUTSIDE})
        if not types:
            raise DataError(f"{train.name} has no tag but {OUTSIDE}: there is nothing to learn")
        return (OUTSIDE, *(f"{side}-{name}" for name in types for side in "BI"))
    if train.problem_type is ProblemType.SINGLE_LABEL and len(seen) < 2:
        raise DataError(f'{train.name} has one label only, "{seen[0]}": at least two are needed')
    if len({example.labels for example in train.examples}) < 2:
        raise DataError(f"every row of {train.name} has the same labels: there is nothing to learn")
    return tuple(seen)


def check_fits(table: Table, train: Table, labels: Sequence[str]) -> None:
    """Raise DataError where `table` (dev or test) is not of the same kind as `train`, or has labels of its own."""
    if table.problem_type is not train.problem_type or table.input_kind is not train.input_kind:
        raise DataError(
            f"{table.name} holds {table.problem_type} of kind {table.input_kind}, "
            f"and {train.name} {train.problem_type} of kind {train.input_kind}: give both files the same columns"
        )
    unknown = sorted({label for example in table.examples for label in example.labels} - set(labels))
    if unknown:
        named = ", ".join(unknown[:5]) + (", …" if len(unknown) > 5 else "")
        raise DataError(
            f"{table.name} has labels that {train.name} lacks ({named}): correct them, "
            f"add rows of them to {train.name}, or take theirs out of {table.name}"
        )


def without(table: Table, faults: Mapping[int, str]) -> Table:
    """`table` without these rows, by index; what is wrong with each, to follow its line, joins the unreadable ones.

    Raises DataError where too many cannot be read then.
    """
    if not faults:
        return table
    lines = {row: table.examples[row].line for row in faults}
    added = [Unreadable(lines[row], f"line {lines[row]} {fault}") for row, fault in faults.items()]
    unreadable = sorted((*table.unreadable, *added), key=lambda row: row.line)
    examples = tuple(example for row, example in enumerate(table.examples) if row not in faults)
    _check_share(table.name, unreadable, len(examples))
    return replace(table, examples=examples, unreadable=tuple(unreadable))


def read_inputs(path: Path, input_kind: InputKind) -> list[TextInput]:
    """Texts without answers, one a line; of pairs with a tab between. Empty lines do not count."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    parts = [tuple(line.split("\t")) for line in lines]
    size = 1 if input_kind is InputKind.TEXT else 2
    wrong = next((i for i, fields in enumerate(parts, start=1) if len(fields) != size or not all(fields)), None)
    if wrong is not None or not parts:
        wanted = "a text a line" if size == 1 else "two texts a line with a tab between"
        raise DataError(f"{path.name} must hold {wanted}" + ("" if wrong is None else f": input {wrong} does not"))
    return [TextInput(*fields) for fields in parts]


def read_texts(path: Path) -> list[TextInput]:
    """The texts of a table, whatever answers it has or lacks.

    Raises DataError where the file cannot be used; single rows that cannot be read are left out.
    """
    with _opened(path) as file:
        rows = _rows(path, _lines(path, file))
        head = list(islice(rows, _HEAD_ROWS))
        has_words, kind = _of_head(path, head, lambda columns: _text_columns(path, columns))
        read = _joined if has_words else partial(_text_input, input_kind=kind)
        return _sorted_out(path, chain(head, rows), lambda _, record: read(record))[0]


# -- files -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    if path.suffix.lower() not in _FORMATS:
        raise DataError(f"{path.name} must end in one of {', '.join(_FORMATS)}")
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _read(path: Path, file: io.BufferedReader, problem_type: ProblemType | None) -> Table:
    """Line by line: a file may be larger than what should stand in memory twice."""
    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    file.seek(0)
    rows = _rows(path, _lines(path, file))
    head = list(islice(rows, _HEAD_ROWS))
    layout = _of_head(path, head, lambda columns: _layout(path, columns, problem_type))
    examples, unreadable = _sorted_out(path, chain(head, rows), lambda line, record: _example(line, record, layout))
    return Table(path.name, sha256, layout.problem_type, layout.input_kind, tuple(examples), tuple(unreadable))


def _sorted_out(
    path: Path, rows: Iterable[_Row], read: Callable[[int, _Record], _Read]
) -> tuple[list[_Read], list[Unreadable]]:
    """What was read, and what cannot be."""
    found: list[_Read] = []
    unreadable: list[Unreadable] = []
    for line, record in rows:
        try:
            if isinstance(record, str):
                raise _UnreadableError(record)
            found.append(read(line, record))
        except _UnreadableError as error:
            unreadable.append(Unreadable(line, f"line {line}{error}"))
    _check_share(path.name, unreadable, len(found))
    return found, unreadable


def _check_share(name: str, unreadable: Sequence[Unreadable], num_read: int) -> None:
    total = num_read + len(unreadable)
    if len(unreadable) > _MAX_UNREADABLE * total:
        raise DataError(
            f"{len(unreadable)} of the {total} rows of {name} cannot be read, which is too many to go on; "
            f"correct the file: {unreadable[0].reason}"
        )


def _lines(path: Path, file: io.BufferedReader) -> Iterator[str]:
    """With their ends."""
    for number, line in enumerate(file, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            is_utf16 = number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
            told = " but UTF-16" if is_utf16 else ""
            raise DataError(f"{path.name}, line {number} is not UTF-8{told}: save the file in UTF-8") from error


def _rows(path: Path, lines: Iterator[str]) -> Iterator[_Row]:
    match _FORMATS[path.suffix.lower()]:
        case "json":
            return _json_rows(lines)
        case "tsv":
            return _table_rows(_tsv_fields(lines))
        case _:
            return _table_rows(_csv_fields(path, lines))


def _json_rows(lines: Iterator[str]) -> Iterator[_Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if _SURROGATE.search(line):
                json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            yield number, " has half a surrogate pair, which is no character"
        except (ValueError, RecursionError) as error:
            yield number, f" is not JSON: {error}"
        else:
            yield number, record if isinstance(record, dict) else " is not a JSON object"


def _table_rows(rows: Iterator[tuple[int, list[str]]]) -> Iterator[_Row]:
    _, header = next(rows, (0, []))
    for line, fields in rows:
        if len(fields) == len(header):
            yield line, dict(zip(header, fields, strict=True))
        else:
            yield line, f" has {len(fields)} fields, and the header {len(header)}"


def _tsv_fields(lines: Iterator[str]) -> Iterator[tuple[int, list[str]]]:
    """There is no quoting."""
    for number, line in enumerate(lines, start=1):
        content = line.rstrip("\r\n")
        if content:
            yield number, content.split("\t")


def _csv_fields(path: Path, lines: Iterator[str]) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(_MAX_FIELD_CHARS)
    # StringIO also ends lines at a bare carriage return; str.splitlines would at U+2028 too
    whole = 0  # the last line of the records before
    reader = csv.reader(chain.from_iterable(io.StringIO(line, newline="") for line in lines), strict=True)
    try:
        for fields in reader:
            if fields:
                yield reader.line_num, fields
            whole = reader.line_num
    except csv.Error as error:
        raise DataError(
            f"{path.name}, line {reader.line_num} cannot be read: {error}; what it is part of begins on line "
            f"{whole + 1}, where a quotation mark may not be closed, or not be doubled"
        ) from error


# -- columns -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Layout:
    """What stands in which columns."""

    problem_type: ProblemType
    answer: str
    input_kind: InputKind


def _layout(path: Path, columns: Sequence[str], problem_type: ProblemType | None) -> _Layout:
    kind = problem_type or _problem_type(path, columns)
    return _Layout(kind, _answer_column(path, columns, kind), _input_kind(path, columns, kind))


def _text_columns(path: Path, columns: Sequence[str]) -> tuple[bool, InputKind]:
    """Whether texts are lists of words, and their kind."""
    if "tokens" in columns:
        return True, InputKind.TEXT
    return False, _text_kind(path, columns)


def _of_head(path: Path, head: Sequence[_Row], read: Callable[[Sequence[str]], _Read]) -> _Read:
    """Of the first row that has the columns: JSON lines may lack some."""
    fault: DataError | None = None
    for _, record in head:
        if isinstance(record, str):
            continue
        try:
            return read(tuple(record))
        except DataError as error:
            fault = fault or error
    if fault is not None:
        raise fault
    if not head:
        raise DataError(f"{path.name} has no rows")
    line, reason = head[0]
    raise DataError(f"none of the first {len(head)} rows of {path.name} can be read: line {line}{reason}")


def _problem_type(path: Path, columns: Sequence[str]) -> ProblemType:
    for kind, answers in _ANSWER_COLUMNS.items():
        if answers[0] in columns:
            return kind
    raise DataError(
        f"{path.name} has no column label, labels, score or tags: it has {_named(path, columns)}; "
        "rename the one with the answers to label (one a text), labels (several, joined by |) or score (a number)"
    )


def _named(path: Path, columns: Sequence[str]) -> str:
    """With a hint where a header fell into one piece."""
    wanted = "tabs" if _FORMATS[path.suffix.lower()] == "tsv" else "commas"
    is_other = len(columns) == 1 and any(mark in columns[0] for mark in ";\t,|")
    hint = f" (in one piece: {path.suffix.lower()} files need {wanted} between columns)" if is_other else ""
    return ", ".join(columns) + hint


def _answer_column(path: Path, columns: Sequence[str], kind: ProblemType) -> str:
    for name in _ANSWER_COLUMNS.get(kind, ()):
        if name in columns:
            return name
    wanted = " or ".join(_ANSWER_COLUMNS.get(kind, ()))
    raise DataError(
        f"{path.name} has no column {wanted} for {kind}: it has {', '.join(columns)}; "
        "rename the one with the answers, or change --problem-type"
    )


def _input_kind(path: Path, columns: Sequence[str], kind: ProblemType) -> InputKind:
    if kind is ProblemType.TOKEN:
        if "tokens" in columns:
            return InputKind.TEXT
        raise DataError(
            f"{path.name} has no column tokens: it has {', '.join(columns)}; rename the one with the lists of words"
        )
    return _text_kind(path, columns)


def _text_kind(path: Path, columns: Sequence[str]) -> InputKind:
    if "text" in columns:
        return InputKind.TEXT
    if "text_a" in columns and "text_b" in columns:
        return InputKind.PAIR
    raise DataError(
        f"{path.name} has no column text, nor text_a and text_b: it has {', '.join(columns)}; "
        "rename the one with the texts to text, or of pairs the two to text_a and text_b"
    )


# -- rows --------------------------------------------------------------------------------------------------------------


class _UnreadableError(Exception):
    """What follows "line 3"."""


def _example(line: int, record: _Record, layout: _Layout) -> Example:
    kind = layout.problem_type
    value = record.get(layout.answer)
    if value is None:
        raise _UnreadableError(f" has no {layout.answer}")
    if kind is ProblemType.TOKEN:
        return _tagged(line, record.get("tokens"), value)
    text = _text_input(record, layout.input_kind)
    if kind is ProblemType.REGRESSION:
        return Example(text, line, score=_number(value))
    labels = _labels(value) if kind is ProblemType.MULTI_LABEL else (sys.intern(str(value).strip()),)
    if kind is ProblemType.SINGLE_LABEL and not labels[0]:
        raise _UnreadableError(" has no label")
    return Example(text, line, labels)


def _joined(record: _Record) -> TextInput:
    words = record.get("tokens")
    if not _is_strings(words) or not words or not all(word.strip() for word in words):
        raise _UnreadableError(": tokens must be a list of texts")
    return TextInput(" ".join(words))


def _text_input(record: _Record, input_kind: InputKind) -> TextInput:
    names = ("text",) if input_kind is InputKind.TEXT else ("text_a", "text_b")
    texts = [record.get(name) for name in names]
    for name, text in zip(names, texts, strict=True):
        if not isinstance(text, str) or not text.strip():
            raise _UnreadableError(f" has an empty {name}")
    return TextInput(*(str(text) for text in texts))


def _labels(value: Any) -> tuple[str, ...]:
    parts = value if isinstance(value, list) else str(value or "").split("|")
    return tuple(sorted({sys.intern(str(part).strip()) for part in parts} - {""}))


def _number(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise _UnreadableError(f': "{_shown(value)}" is not a number')
    return number


def _tagged(line: int, words: Any, tags: Any) -> Example:
    if not _is_strings(words) or not _is_strings(tags):
        raise _UnreadableError(": tokens and tags must be lists of texts")
    if len(words) != len(tags):
        raise _UnreadableError(f" has {len(words)} tokens and {len(tags)} tags")
    if not words or not all(word.strip() for word in words):
        raise _UnreadableError(" has an empty token")
    for tag in tags:
        if tag != OUTSIDE and not (tag[:2] in ("B-", "I-") and tag[2:]):
            raise _UnreadableError(f': "{_shown(tag)}" is not a BIO tag')
    return Example(TextInput(" ".join(words)), line, tuple(map(sys.intern, tags)), words=tuple(map(sys.intern, words)))


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "…"


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
