"""Labelled texts from files: TSV, CSV or JSON lines. Knows columns and lines; nothing of tokens, tensors or models.

Columns: `text` or `text_a`,`text_b`, then `label` (one), `labels` (joined by `|`, empty for none) or `score`
(a number). JSON lines may hold `tokens` and `tags` (BIO) instead.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.domain import InputKind, ProblemType, TextInput
from app.errors import DataError

OUTSIDE = "O"
_MAX_FIELD_CHARS = 2**24
_FORMATS = {".tsv": "tsv", ".csv": "csv", ".jsonl": "json", ".ndjson": "json", ".json": "json"}
# problem type → the columns its answers may stand in, the first that is there
_ANSWER_COLUMNS = {
    ProblemType.TOKEN: ("tags",),
    ProblemType.MULTI_LABEL: ("labels", "label"),
    ProblemType.REGRESSION: ("score", "label"),
    ProblemType.SINGLE_LABEL: ("label",),
}
_Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Example:
    """One row: what is read, and the answer in the fields that its problem type uses."""

    text: TextInput
    line: int
    labels: tuple[str, ...] = ()  # single-label: one; multi-label: any number; tokens: a BIO tag for each word
    score: float = 0.0  # regression
    words: tuple[str, ...] = ()  # tokens: the file's own words; `text` joins them by spaces


@dataclass(frozen=True, slots=True)
class Table:
    """One file's rows, all of one problem type and one input kind."""

    name: str  # of the file, without its folder
    sha256: str
    problem_type: ProblemType
    input_kind: InputKind
    examples: tuple[Example, ...]

    @property
    def texts(self) -> list[TextInput]:
        return [example.text for example in self.examples]


def read_table(path: Path, problem_type: ProblemType | None = None) -> Table:
    """Read a file of labelled texts. `problem_type` overrides what its columns say.

    Raises DataError, naming file and line, for whatever cannot be used.
    """
    content = _read_bytes(path)
    text = _decode(path, content)
    records = list(_records(path, text))
    if not records:
        raise DataError(f"{path.name} has no rows")
    columns = tuple(records[0][1])
    kind = problem_type or _problem_type(path, columns)
    answer = _answer_column(path, columns, kind)
    input_kind = _input_kind(path, columns, kind)
    examples = tuple(_example(path, line, record, kind, answer, input_kind) for line, record in records)
    return Table(path.name, hashlib.sha256(content).hexdigest(), kind, input_kind, examples)


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
            f"and {train.name} {train.problem_type} of kind {train.input_kind}"
        )
    unknown = sorted({label for example in table.examples for label in example.labels} - set(labels))
    if unknown:
        raise DataError(f"{table.name} has labels that {train.name} lacks: {', '.join(unknown[:5])}")


# -- files -------------------------------------------------------------------------------------------------------------


def _read_bytes(path: Path) -> bytes:
    if path.suffix.lower() not in _FORMATS:
        raise DataError(f"{path.name} must end in one of {', '.join(_FORMATS)}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _decode(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(f"{path.name}, line {line} is not UTF-8: save the file in UTF-8") from error


def _records(path: Path, text: str) -> Iterator[tuple[int, _Record]]:
    """(line, fields) of each row."""
    kind = _FORMATS[path.suffix.lower()]
    yield from _json_records(path, text) if kind == "json" else _table_records(path, text, kind == "tsv")


def _json_records(path: Path, text: str) -> Iterator[tuple[int, _Record]]:
    for line, row in enumerate(text.split("\n"), start=1):
        if not row.strip():
            continue
        try:
            record = json.loads(row)
        except ValueError as error:
            raise DataError(f"{path.name}, line {line} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise DataError(f"{path.name}, line {line} is not a JSON object")
        yield line, record


def _table_records(path: Path, text: str, is_tsv: bool) -> Iterator[tuple[int, _Record]]:
    csv.field_size_limit(_MAX_FIELD_CHARS)
    lines = text.split("\n") if is_tsv else list(io.StringIO(text, newline=""))  # splitlines also splits at U+2028
    reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if is_tsv else csv.reader(lines, strict=True)
    try:
        header = next(reader, None)
        for fields in reader:
            if not fields:
                continue
            if header is None or len(fields) != len(header):
                raise DataError(
                    f"{path.name}, line {reader.line_num} has {len(fields)} fields, and the header {len(header or ())}"
                )
            yield reader.line_num, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise DataError(f"{path.name}, line {reader.line_num} cannot be read: {error}") from error


# -- columns -----------------------------------------------------------------------------------------------------------


def _problem_type(path: Path, columns: Sequence[str]) -> ProblemType:
    for kind, answers in _ANSWER_COLUMNS.items():
        if answers[0] in columns:
            return kind
    raise DataError(f"{path.name} has no column label, labels, score or tags: it has {', '.join(columns)}")


def _answer_column(path: Path, columns: Sequence[str], kind: ProblemType) -> str:
    for name in _ANSWER_COLUMNS.get(kind, ()):
        if name in columns:
            return name
    wanted = " or ".join(_ANSWER_COLUMNS.get(kind, ()))
    raise DataError(f"{path.name} has no column {wanted} for {kind}: it has {', '.join(columns)}")


def _input_kind(path: Path, columns: Sequence[str], kind: ProblemType) -> InputKind:
    if kind is ProblemType.TOKEN:
        if "tokens" in columns:
            return InputKind.TEXT
        raise DataError(f"{path.name} has no column tokens: it has {', '.join(columns)}")
    if "text" in columns:
        return InputKind.TEXT
    if "text_a" in columns and "text_b" in columns:
        return InputKind.PAIR
    raise DataError(f"{path.name} has no column text, nor text_a and text_b: it has {', '.join(columns)}")


# -- rows --------------------------------------------------------------------------------------------------------------


def _example(path: Path, line: int, record: _Record, kind: ProblemType, answer: str, input_kind: InputKind) -> Example:
    where = f"{path.name}, line {line}"
    if record.get(answer) is None:
        raise DataError(f"{where} has no {answer}")
    value = record[answer]
    if kind is ProblemType.TOKEN:
        return _tagged(where, line, record.get("tokens"), value)
    text = _text_input(where, record, input_kind)
    if kind is ProblemType.REGRESSION:
        return Example(text, line, score=_number(where, value))
    labels = _labels(value) if kind is ProblemType.MULTI_LABEL else (str(value).strip(),)
    if kind is ProblemType.SINGLE_LABEL and not labels[0]:
        raise DataError(f"{where} has no label")
    return Example(text, line, labels)


def _text_input(where: str, record: _Record, input_kind: InputKind) -> TextInput:
    names = ("text",) if input_kind is InputKind.TEXT else ("text_a", "text_b")
    texts = [record.get(name) for name in names]
    for name, text in zip(names, texts, strict=True):
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where} has an empty {name}")
    return TextInput(*(str(text) for text in texts))


def _labels(value: Any) -> tuple[str, ...]:
    parts = value if isinstance(value, list) else str(value or "").split("|")
    return tuple(sorted({str(part).strip() for part in parts} - {""}))


def _number(where: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f'{where}: "{value}" is not a number')
    return number


def _tagged(where: str, line: int, words: Any, tags: Any) -> Example:
    if not _is_strings(words) or not _is_strings(tags):
        raise DataError(f"{where}: tokens and tags must be lists of texts")
    if len(words) != len(tags):
        raise DataError(f"{where} has {len(words)} tokens and {len(tags)} tags")
    if not words or not all(word.strip() for word in words):
        raise DataError(f"{where} has an empty token")
    for tag in tags:
        if tag != OUTSIDE and not (tag[:2] in ("B-", "I-") and tag[2:]):
            raise DataError(f'{where}: "{tag}" is not a BIO tag')
    return Example(TextInput(" ".join(words)), line, tuple(tags), words=tuple(words))


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
