"""`manifold predict --file`: every format, order, errors, and both who may answer, against real servers."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from app import cli
from app.client.bulk_source import ROWS
from app.config import load_settings
from app.main import create_app
from tests.client.bulk_files import Predict, Rows, read_json, some_rows, write_json
from tests.client.conftest import Done, Run
from tests.client.recorded import answering
from tests.fakes import FakeEngine, FakeTokenizer, make_runtime
from tests.serving import running

INFO = {"limits": {"max_client_batch_size": 32, "deadline_ms": 30_000.0}}


@pytest.fixture
def predict(run: Run, tmp_path: Path) -> Predict:
    def predict_file(source: Path, out: str, *arguments: str) -> Done:
        return run("predict", "--file", str(source), "--out", str(tmp_path / out), *arguments)

    return predict_file


# -- rows and answers --------------------------------------------------------------------------------------------------


def test_rows_keep_their_order_and_their_columns(predict: Predict, tmp_path: Path) -> None:
    rows = some_rows(ROWS + 100)
    done = predict(write_json(tmp_path / "in.jsonl", rows), "out.jsonl", "--task", "spam", "--task", "stars")
    assert (done.status, done.err) == (0, "")
    assert f"{len(rows):,} rows in" in done.out
    answered = read_json(tmp_path / "out.jsonl")
    assert [(row["id"], row["text"]) for row in answered] == [(row["id"], row["text"]) for row in rows]
    # the fakes' stars are the text's tokens, so each row has the answer to its own text
    assert [row["stars_value"] for row in answered] == [len(row["text"].split()) + 2 for row in rows]
    assert list(answered[0]) == [
        *("id", "text", "spam_label", "spam_score", "spam_version", "stars_value", "stars_version"),
        *("generation", "error"),
    ]
    assert {row["generation"] for row in answered} == {7}
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_every_live_task_that_fits_answers_where_none_is_named(predict: Predict, tmp_path: Path) -> None:
    rows = [{"text": "Paris is nice"}, {"text": "a", "text_pair": "b"}]
    assert predict(write_json(tmp_path / "in.jsonl", rows), "out.parquet", "--scores").status == 0
    single, pair = pq.read_table(tmp_path / "out.parquet").to_pylist(maps_as_pydicts="strict")
    assert single["emotion_labels"] == ["fear", "joy"] and single["emotion_scores"] == [0.75, 0.25]
    assert single["emotion_all_scores"] == {"joy": 0.25, "anger": 0.5, "fear": 0.75}
    assert single["slots_spans"] == [{"label": "city", "start": 0, "end": 5, "text": "Paris", "score": 0.9}]
    assert single["intent_version"] in (2, 3) and single["entailment_label"] is None  # champion, or its challenger
    assert pair["entailment_label"] in ("no", "yes") and pair["intent_label"] is None


def test_a_row_that_cannot_be_answered_fails_alone(predict: Predict, tmp_path: Path) -> None:
    lines = [json.dumps({"id": i, "text": f"text {i}"}) for i in range(40)]
    lines[3], lines[5], lines[7] = '{"id": 3, "text": " "}', '{"id": 5,', '["text"]'
    lines[9], lines[11] = '{"id": 9, "text": 9}', '{"id": 11}'
    lines[13] = json.dumps({"id": 13, "text": "word " * 50})
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    done = predict(tmp_path / "in.jsonl", "out.jsonl", "--task", "spam")
    assert done.status == 3
    assert "40 rows" in done.out and "34 answered, 6 not" in done.out
    assert "6 rows have an error; the first is row 4: the text is empty" in done.err
    answered = read_json(tmp_path / "out.jsonl")
    errors = {index: row["error"] for index, row in enumerate(answered) if row["error"]}
    assert sorted(errors) == [3, 5, 7, 9, 11, 13]
    assert errors[5].startswith("line 6 is not JSON: ") and errors[7] == "line 8 is not a JSON object"
    assert errors[9] == "the text is not a text but int" and errors[11] == "there is no text"
    assert errors[13].startswith("this row has 52 tokens and the limit is 32")
    assert [row["spam_label"] is None for row in answered] == [index in errors for index in range(40)]
    again = predict(tmp_path / "in.jsonl", "out.jsonl", "--task", "spam", "--truncate", "--overwrite")
    assert "35 answered, 5 not" in again.out and read_json(tmp_path / "out.jsonl")[13]["spam_label"]


def test_a_task_that_fails_alone_leaves_the_answers_of_the_others(
    predict: Predict, engine: FakeEngine, tmp_path: Path
) -> None:
    engine.broken_tasks = {"spam"}
    source = write_json(tmp_path / "in.jsonl", some_rows(2))
    assert predict(source, "out.jsonl", "--task", "spam", "--task", "stars").status == 3
    for row in read_json(tmp_path / "out.jsonl"):
        assert row["error"] == "spam: spam broke" and row["stars_value"] >= 3


def test_a_task_and_an_input_that_do_not_fit_are_errors_of_the_rows(predict: Predict, tmp_path: Path) -> None:
    source = write_json(tmp_path / "in.jsonl", [{"text": "a"}, {"text_a": "a", "text_b": "b"}])
    assert predict(source, "out.jsonl", "--task", "entailment").status == 3
    first, second = read_json(tmp_path / "out.jsonl")
    assert "reads a pair" in first["error"] and second["error"] is None and second["entailment_label"]


def test_an_unknown_task_stops_at_once_and_leaves_nothing(predict: Predict, tmp_path: Path) -> None:
    source = write_json(tmp_path / "in.jsonl", some_rows(3))
    done = predict(source, "out.jsonl", "--task", "wether")
    assert done.status == 1 and done.err.startswith('manifold: there is no task "wether"') and done.err.count("\n") == 1
    assert [path.name for path in tmp_path.glob("out*")] == []


def test_an_empty_file_gives_an_empty_one(predict: Predict, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("\n")
    assert predict(tmp_path / "in.jsonl", "out.parquet").status == 0
    assert pq.read_table(tmp_path / "out.parquet").num_rows == 0


def test_the_answer_is_also_json(predict: Predict, tmp_path: Path) -> None:
    done = predict(write_json(tmp_path / "in.jsonl", some_rows(3)), "out.csv", "--json")
    assert done.answer["rows"] == 3 and done.answer["failed"] == 0


# -- formats -----------------------------------------------------------------------------------------------------------

TABLE = 'id,text,note\n007,"hello, you","a ""quoted"" note"\n008,"two\nlines",\n'


def as_csv(folder: Path) -> Path:
    (folder / "in.csv").write_text("\ufeff" + TABLE, "utf-8")
    return folder / "in.csv"


def as_packed_csv(folder: Path) -> Path:
    (folder / "in.csv.gz").write_bytes(gzip.compress(TABLE.encode()))
    return folder / "in.csv.gz"


def as_parquet(folder: Path) -> Path:
    columns = {"id": ["007", "008"], "text": ["hello, you", "two\nlines"], "note": ['a "quoted" note', ""]}
    pq.write_table(pa.table(columns), folder / "in.parquet")
    return folder / "in.parquet"


def as_json(folder: Path) -> Path:
    rows = [{"id": "007", "text": "hello, you", "note": 'a "quoted" note'}]
    return write_json(folder / "in.ndjson", [*rows, {"id": "008", "text": "two\nlines", "note": ""}])


@pytest.mark.parametrize("write", [as_csv, as_packed_csv, as_parquet, as_json])
def test_every_format_becomes_every_other(predict: Predict, tmp_path: Path, write: Callable[[Path], Path]) -> None:
    source = write(tmp_path)
    for out in ("out.parquet", "out.csv", "out.jsonl"):
        assert predict(source, out, "--task", "slots", "--task", "stars").status == 0
        rows = _read(tmp_path / out)
        assert [(row["id"], row["text"]) for row in rows] == [("007", "hello, you"), ("008", "two\nlines")]
        assert rows[0]["note"] == 'a "quoted" note' and not rows[1]["note"]
        spans = rows[0]["slots_spans"]
        assert (json.loads(spans) if isinstance(spans, str) else spans)[0]["text"] == "hello,"
        assert float(rows[0]["stars_value"]) == 4.0


def _read(path: Path) -> Rows:
    if path.suffix == ".jsonl":
        return read_json(path)
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    as_text = pa_csv.ConvertOptions(column_types={"id": pa.string()})
    parsed = pa_csv.ParseOptions(newlines_in_values=True)
    return pa_csv.read_csv(path, parse_options=parsed, convert_options=as_text).to_pylist()


def test_tsv_has_no_quotes_and_lines_of_other_lengths_are_errors(predict: Predict, tmp_path: Path) -> None:
    (tmp_path / "in.tsv").write_bytes(b'id\ttext_a\ttext_b\n1\tsay "hi\tyou\n2\tb\n3\t\xff\xfe\tc\n4\tno pair\t\n')
    assert predict(tmp_path / "in.tsv", "out.jsonl").status == 3
    first, second, third, fourth = read_json(tmp_path / "out.jsonl")
    assert first["text_a"] == 'say "hi' and first["entailment_label"]
    assert second["error"] == "line 3 has 2 fields, and the header 3" and second["id"] == "2"
    assert third["error"] == "the text is not valid UTF-8"
    assert fourth["spam_label"] and fourth["error"] is None


def test_columns_of_other_types_are_carried_over(predict: Predict, tmp_path: Path) -> None:
    columns = {
        "text": pa.array(["a", "b"]).dictionary_encode(),
        "day": [date(2026, 1, 2), None],
        "price": [Decimal("1.50"), Decimal("2.25")],
        "raw": [b"\xff", b"x"],
        "list": [[1, 2], None],
        "time": pa.array([1, 2], pa.timestamp("ns")),
    }
    table = pa.table(columns)
    pq.write_table(table, tmp_path / "in.parquet")
    assert predict(tmp_path / "in.parquet", "out.parquet", "--task", "spam").status == 0
    carried = pq.read_table(tmp_path / "out.parquet").select(table.column_names)
    assert carried.drop(["time"]).to_pylist() == table.drop(["time"]).to_pylist()
    assert carried.schema.field("time").type == pa.timestamp("ns")
    for out in ("out.jsonl", "out.csv"):
        assert predict(tmp_path / "in.parquet", out, "--task", "spam").status == 0
    first = read_json(tmp_path / "out.jsonl")[0]
    assert (first["day"], first["price"], first["raw"], first["list"]) == ("2026-01-02", "1.50", "/w==", [1, 2])
    assert '"[1,2]"' in (tmp_path / "out.csv").read_text()


def test_json_values_of_several_kinds_are_carried_over(predict: Predict, tmp_path: Path) -> None:
    """Kinds that change within a part, and from one part to the next."""
    rows: Rows = [{"text": "a", "meta": {"a": [1]}, "mixed": 1, "late": 7} for _ in range(ROWS)]
    rows += [{"text": "b", "meta": None, "mixed": "one", "late": "seven", "new": True, "error": "theirs"}]
    source = write_json(tmp_path / "in.jsonl", rows)
    assert predict(source, "out.jsonl", "--task", "spam").status == 0
    first, *_, last = read_json(tmp_path / "out.jsonl")
    assert (first["meta"], first["mixed"], first["late"], first["new"]) == ({"a": [1]}, 1, 7, None)
    assert (last["meta"], last["mixed"], last["late"], last["new"]) == (None, "one", "seven", True)
    assert (last["error"], last["input_error"]) == (None, "theirs")
    assert predict(source, "out.parquet", "--task", "spam").status == 0
    assert pq.read_table(tmp_path / "out.parquet")["late"].to_pylist()[-2:] == ["7", '"seven"']


# -- servers that are full, small or out of order ----------------------------------------------------------------------


def test_a_full_server_is_waited_for(run: Run, tmp_path: Path) -> None:
    settings = load_settings({"prefixes": tmp_path, "max_concurrent_requests": 1, "max_client_batch_size": 4})
    runtime = make_runtime(settings, FakeEngine(delay_s=0.05))
    source = write_json(tmp_path / "in.jsonl", some_rows(60))
    with running(create_app(settings, runtime)) as address:
        done = run("predict", "--file", str(source), "--out", str(tmp_path / "out.jsonl"), "--url", address)
        content, _ = runtime.metrics.render()
    assert done.status == 0
    assert [row["id"] for row in read_json(tmp_path / "out.jsonl")] == [row["id"] for row in some_rows(60)]
    assert b'code="429"' in content


def test_requests_that_are_too_large_are_made_smaller(run: Run, tmp_path: Path) -> None:
    settings = load_settings({"prefixes": tmp_path, "payload_limit_bytes": 3000})
    source = write_json(tmp_path / "in.jsonl", [{"text": f"{i}" * 150} for i in range(10, 74)] + [{"text": "x" * 4000}])
    with running(create_app(settings, make_runtime(settings))) as address:
        out = str(tmp_path / "out.jsonl")
        assert run("predict", "--file", str(source), "--out", out, "--url", address).status == 3
    errors = [row["error"] for row in read_json(tmp_path / "out.jsonl")]
    assert errors[:64] == [None] * 64 and "larger than 3000 bytes" in errors[64]


def test_a_server_that_is_unavailable_is_asked_again_for_a_while(run: Run, tmp_path: Path) -> None:
    source = write_json(tmp_path / "in.jsonl", [{"text": "a"}])
    good = {"results": [{"spam": {"version": 1, "arm": "champion", "label": "ham", "score": 1.0}}], "generation": 3}
    bad: list[tuple[int, Any]] = [(503, {"error": "draining"}), (502, b"<html>")]
    answers = {"GET /info": [(200, INFO)], "POST /v1/predict": [*bad, *bad, (200, good)]}
    common = ("predict", "--file", str(source), "--out", str(tmp_path / "out.jsonl"))
    with answering(answers) as recorded:
        assert run(*common, "--url", recorded.url, "--patience", "0.5").status == 1
        assert run(*common, "--url", recorded.url, "--patience", "9").status == 0
    assert read_json(tmp_path / "out.jsonl")[0]["generation"] == 3


# -- in this process ---------------------------------------------------------------------------------------------------


def test_in_process_gives_what_a_server_gives(
    run: Run, predict: Predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def open_runtime(settings: Any) -> Any:
        opened.append(make_runtime(settings, FakeEngine(), tokenizer=FakeTokenizer()))
        assert settings.max_client_batch_size == 5 and settings.deadline_ms > 1_000_000
        return opened[-1]

    monkeypatch.setattr(cli, "_open_runtime", open_runtime)
    rows = [*some_rows(70), {"id": "e", "text": ""}, {"id": "l", "text": "word " * 50}]
    source = write_json(tmp_path / "in.jsonl", rows)
    common = ("--scores", "--unit", "u")  # one side of the canary
    assert predict(source, "server.parquet", *common).status == 3
    arguments = ["predict", "--file", str(source), "--out", str(tmp_path / "here.parquet"), *common]
    assert cli.main([*arguments, "--in-process", "--max-client-batch-size", "5"]) == 3
    assert (tmp_path / "here.parquet").read_bytes() == (tmp_path / "server.parquet").read_bytes()
    assert not opened[0].engine.alive


# -- calls that are wrong ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--file", "none.jsonl", "--out", "out.parquet"], "there is no file none.jsonl"),
        (["--file", "in.jsonl"], "--out names the file to write"),
        (["--file", "in.jsonl", "--out", "out.xlsx"], "--out names the file to write"),
        (["--file", "in.jsonl", "--out", "no/such/out.csv"], "there is no folder"),
        (["--file", "in.jsonl", "--out", "./in.jsonl", "--overwrite"], "--out is the file that is read"),
        (["--file", "in.txt", "--out", "out.csv"], "does not say what it is: give --input-format"),
        (["--file", "in.jsonl", "--out", "out.csv", "--device", "cpu"], "--device goes with --in-process"),
        (["--file", "in.jsonl", "--out", "out.csv", "--in-process", "--url", "x"], "exclude each other"),
    ],
)
def test_a_wrong_call_is_one_sentence(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("in.jsonl", "in.txt"):
        write_json(tmp_path / name, some_rows(1))
    assert cli.main(["predict", *arguments]) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("in.csv", b"id,words\n1,a\n", "there is no column text or text_a; there are id, words"),
        ("in.csv", b"text,text\n1,a\n", "two columns have the same name"),
        ("in.parquet", b"PAR1 not really", "cannot be read"),
        ("in.jsonl.gz", b"not gzip", "cannot be read"),
    ],
)
def test_a_file_that_is_not_what_it_says_is_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, content: bytes, sentence: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with answering({"GET /info": [(200, INFO)]}) as server:
        files = ["--file", str(tmp_path / name), "--out", str(tmp_path / "out.csv")]
        assert cli.main(["predict", *files, "--url", server.url]) == 1
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    "arguments", [["--file", "x", "hello"], ["--file", "x", "--concurrency", "0"], ["hello", "--out", "x.csv"]]
)
def test_texts_and_files_are_not_mixed(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["predict", *arguments])
    assert stopped.value.code == 2
    assert "usage: manifold predict TEXT" in capsys.readouterr().err
