"""Bulk work with the shipped artifacts: an engine in the command's own process against a server's."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.cli import main
from tests.client.bulk_files import read_json, write_json
from tests.serving import ServerProcess

TEXTS = [
    *(
        "I lost my card yesterday, I am so worried",
        "Please play some jazz by Miles Davis.",
        "WIN a free prize, call now",
    ),
    *("word " * 700, "", "ok", "You are an idiot", "What a lovely day, thank you so much for everything!"),
]


def test_the_engine_of_a_command_says_what_the_engine_of_a_server_says(tmp_path: Path) -> None:
    rows = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
    rows.append({"id": len(TEXTS), "text": "A man sleeps.", "text_pair": "Nobody is awake."})
    source = write_json(tmp_path / "in.jsonl", rows)
    here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    common = ["predict", "--scores", "--file", str(source), "--out"]
    assert main([*common, str(here), "--in-process", "--dtype", "float32"]) == 3
    with ServerProcess("app.cli", "serve", "--port", "0", "--dtype", "float32") as server:
        assert main([*common, str(there), "--url", server.wait_until_ready()]) == 3
    for mine, theirs in zip(read_json(here), read_json(there), strict=True):
        assert list(mine) == list(theirs)
        for name, value in mine.items():
            assert value == pytest.approx(theirs[name], abs=2e-5) if _is_numbers(value) else value == theirs[name], name
    answered = read_json(here)
    assert answered[2]["spam_label"] == "spam" and answered[-1]["entailment_label"] == "contradiction"
    assert [row["error"] is None for row in answered] == [i not in (3, 4) for i in range(len(rows))]
    assert "slots_spans" in answered[1] and len(answered[1]["banking_all_scores"]) == 77


def _is_numbers(value: object) -> bool:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return all(isinstance(number, float) for number in values)
