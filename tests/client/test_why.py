"""What an auditor reads on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.config import Settings
from app.domain import TextInput
from app.main import create_app
from app.registry.prediction_lines import to_line
from app.registry.prediction_parts import PartWriter
from app.registry.prediction_store import PredictionStore
from app.rollout import TrafficWish
from app.service.access import EVERYBODY
from tests.commands import CommandLine
from tests.fakes import make_runtime
from tests.serving import running

ODD_ID = 'a/b ?c&d#e%2f"f'
DOTTED_IDS = (".", "..", "../..", "a/../b", "1.5")
TEXT, PAIR = "I am so glad", "and he is not"
EMOTION = {"task": "emotion", "version": 1, "digest": "sha256:emotion-1", "arm": "champion"}
SPAM = {"task": "spam", "version": 1, "digest": "sha256:spam-1", "arm": "champion"}
ENTAILMENT = {"task": "entailment", "version": 1, "digest": "sha256:entailment-1", "arm": "pinned"}


def row(request_id: str, index: int, read: TextInput, of_version: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "time": "2026-01-09T12:00:00.123456Z",
        "request_id": request_id,
        "input": index,
        "generation": 8,
        "reference": of_version["task"],
        **of_version,
        "text_sha256": read.sha256,
        "tokens": 5,
        "truncated": False,
        "cached": False,
        "request_passes": 1.6667,
        "inference_ms": 12.25,
        **more,
    }


@pytest.fixture
def shell(settings: Settings, tmp_path: Path) -> Iterator[CommandLine]:
    store = PredictionStore(str(tmp_path / "log"), tmp_path / "home", "jsonl", 10**9)
    writer = PartWriter(store.folder, store.server, 10**9, 3600.0, clock=lambda: 1_767_960_000.0)  # 2026-01-09 12:00
    text, pair = TextInput(TEXT), TextInput(TEXT, PAIR)
    scores = {"joy": 0.9, "anger": 0.25, "fear": 0.1}
    for line in (
        row("r-1", 0, text, EMOTION, labels=["joy"], scores=scores, cached=True),
        row("r-1", 0, text, SPAM, label="ham", scores={"ham": 0.991, "spam": 0.009}),
        row("r-1", 0, text, SPAM, label="spam", actor="shop"),
        row("r-1", 1, pair, ENTAILMENT, error="it broke", reference="entailment@1", truncated=True),
        row(ODD_ID, 0, text, {**SPAM, "version": 9}, value=3.5),
        row(ODD_ID, 0, text, SPAM, spans=[{"label": "city", "start": 0, "end": 4, "score": 0.5}], text="glad\x1b[31m"),
        *(row(request_id, 0, text, SPAM, label="ham") for request_id in DOTTED_IDS),
    ):
        writer.append(to_line(line))
    runtime = make_runtime(settings, predictions=store)
    runtime.rollout.set_traffic(EVERYBODY, "emotion", TrafficWish(1, shadow=()), "as it was", None)
    with running(create_app(settings, runtime)) as url:
        yield CommandLine(url)


def test_everything_that_an_audit_asks_is_there_to_read(shell: CommandLine) -> None:
    told = shell.say("why", "r-1")
    lines = [" ".join(line.split()) for line in told.splitlines()]
    assert "request r-1, asked by shop, answered 2026-01-09T12:00:00.123456Z, generation 8" in lines
    assert lines[0] == "request r-1, answered 2026-01-09T12:00:00.123456Z, generation 8"
    assert "input 0: text not kept, 5 tokens" in lines and "input 1: text not kept, 5 tokens, cut to the limit" in lines
    assert f"sha256 {TextInput(TEXT).sha256}" in lines
    scores = "joy 0.900 (from 0.2 on), anger 0.250 (from 0.6 on), fear 0.100 (from 0.5 on)"
    assert f"0 emotion 1 champion joy {scores}" in lines
    assert "0 spam 1 champion ham ham 0.991, spam 0.009" in lines
    assert "1 entailment@1 1 pinned failed: it broke" in lines
    assert "1.6667 passes, 12.25 ms, 1 of 3 answers from the cache" in lines
    assert "emotion@1 is approved" in lines and "sha256:emotion-1" in lines
    assert "in generation 8: champion 1" in lines
    assert "put by anonymous, 2023-11-14 22:13:20Z, generation 8: as it was" in lines


def test_what_is_odd_is_printed_as_what_it_is(shell: CommandLine) -> None:
    told = shell.say("why", ODD_ID)
    assert "input 0: glad·[31m, 5 tokens" in told
    assert "city 0:4 0.500" in told and "3.5" in told
    assert "spam@9 is not in the index" in told and "not told: the index has no version spam@9" in told


def test_json_is_the_servers_answer(shell: CommandLine) -> None:
    answer = shell.json("why", "r-1")
    assert [r["task"] for r in answer["rows"]] == ["emotion", "spam", "spam", "entailment"]
    assert answer["versions"][0]["thresholds"] == {"joy": 0.2, "anger": 0.6, "fear": 0.5}


def test_a_text_is_compared_by_its_digest(shell: CommandLine) -> None:
    assert "the text is one that was answered" in shell.say("why", "r-1", "--text", TEXT)
    assert "the text is one that was answered" in shell.say("why", "r-1", "--text", TEXT, "--pair", PAIR)
    wrong = shell("why", "r-1", "--text", f"{TEXT}!")
    assert wrong.status == 1 and "the text is NOT one that was answered" in wrong.out
    assert shell("why", "r-1", "--text", "no", "--json").status == 1
    assert shell("why", ODD_ID, "--text", TEXT, "--pair", PAIR).status == 1


def test_times_narrow_the_search(shell: CommandLine) -> None:
    assert shell.json("why", "r-1", "--since", "2026-01-09", "--until", "2099-01-09T12:00")["rows"]
    assert "0 files of 0.0 MB were searched" in shell.refused("why", "r-1", "--until", "2001-01-09T12:00:00+02:00")
    assert "0 files" in shell.refused("why", "r-1", "--until", "1000000000.5")
    assert "no answer to request nobody" in shell.refused("why", "nobody")
    answered = "2026-01-09T12:00:00.123456Z"
    assert shell.json("why", "r-1", "--since", answered, "--until", answered)["rows"]
    assert "no answer to request r-1" in shell.refused("why", "r-1", "--since", "2026-01-09T12:00:01")
    assert "is after until" in shell.refused("why", "r-1", "--since", "2026-01-10", "--until", "2026-01-09")


@pytest.mark.parametrize("request_id", DOTTED_IDS)
def test_dots_are_part_of_an_id(shell: CommandLine, request_id: str) -> None:
    assert shell.json("why", request_id)["request_id"] == request_id


def test_an_empty_id_is_told_with_the_usage(shell: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        shell("why", "")
    assert left.value.code == 2


@pytest.mark.parametrize("wrong", [("--since", "yesterday"), ("--until", "1.2.3"), ("--pair", "x")])
def test_what_makes_no_sense_is_told_with_the_usage(
    shell: CommandLine, wrong: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        shell("why", "r-1", *wrong)
    assert left.value.code == 2
