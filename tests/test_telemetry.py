"""What a log collector reads."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from app.telemetry import configure_logging


@pytest.fixture(autouse=True)
def _root_logger_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_json_is_an_object_a_line_with_request_and_trace(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("json")
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("manifold").exception("it %s", "broke", extra={"request_id": "r-1"})
    (line,) = capsys.readouterr().err.splitlines()
    event = json.loads(line)
    assert (event["level"], event["logger"], event["message"], event["request_id"]) == (
        "error",
        "manifold",
        "it broke",
        "r-1",
    )
    assert "ValueError" in event["exception"]
    assert event["time"].endswith("Z")


def test_text_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("text")
    logging.getLogger("manifold").info("ready")
    assert capsys.readouterr().err.endswith("INFO manifold: ready\n")
