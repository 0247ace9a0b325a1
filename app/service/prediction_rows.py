"""What the prediction log keeps of an answered request: a row for each answer. Knows no files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from app.engine.spans import Span
from app.registry.prediction_lines import Row, to_line, to_time
from app.service.answers import Answer, FailedAnswer, LabelAnswer, LabelsAnswer, SpansAnswer, ValueAnswer
from app.service.dispatch import Reading
from app.service.resolve import Target
from app.service.watching import Served

_SALT = "prediction log\n"  # what else is drawn from request ids must not go along with this


def is_sampled(request_id: str, share: float) -> bool:
    """The same at every server and for every retry."""
    if share >= 1.0:
        return True
    drawn = hashlib.sha256((_SALT + request_id).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(drawn[:8], "big") < share * 2**64


def count_rows(served: Served) -> int:
    return sum(map(len, served.targets))


def to_lines(served: Served, has_texts: bool) -> bytes:
    """JSON lines, in the order of the inputs and of the tasks that were asked for."""
    return b"".join(map(to_line, _rows(served, has_texts)))


def _rows(served: Served, has_texts: bool) -> Iterator[Row]:
    request = {
        "time": to_time(datetime.fromtimestamp(served.at_s, UTC)),
        "request_id": served.request_id,
        "actor": served.actor,
        "generation": served.generation,
        "request_passes": served.usage.passes,
        "inference_ms": round(1000 * served.timings.inference_s, 3),
    }
    for index, (targets, answers) in enumerate(zip(served.targets, served.results, strict=True)):
        reading = served.readings[index]
        of_input = request | {"input": index} | _read(reading, has_texts)
        for target in targets:
            yield of_input | _of(target, reading) | _said(answers[target.reference], has_texts)


def _read(reading: Reading, has_texts: bool) -> Row:
    encoding, text = reading.encoded, reading.text
    row: Row = {"text_sha256": text.sha256, "tokens": len(encoding), "truncated": encoding.truncated}
    if has_texts:
        row["text"] = _clean(text.text)
        if text.text_pair is not None:
            row["text_pair"] = _clean(text.text_pair)
    return row


def _of(target: Target, reading: Reading) -> Row:
    version = target.version
    return {
        "reference": target.reference,
        "task": version.task,
        "version": version.version,
        "digest": version.digest,
        "arm": target.arm,
        "cached": version.digest in reading.cached,
    }


def _said(answer: Answer, has_texts: bool) -> Row:
    match answer:
        case LabelAnswer():
            return {"label": answer.label, "scores": answer.scores}
        case LabelsAnswer():
            return {"labels": answer.labels, "scores": answer.scores}
        case ValueAnswer():
            return {"value": answer.value}
        case SpansAnswer():
            return {"spans": _spans(answer.spans, has_texts)}
        case FailedAnswer():
            return {"error": _clean(answer.error)}


def _spans(spans: Sequence[Span], has_texts: bool) -> list[Row]:
    rows: list[Row] = [{"label": s.label, "start": s.start, "end": s.end, "score": s.score} for s in spans]
    if has_texts:
        for row, span in zip(rows, spans, strict=True):
            row["text"] = _clean(span.text)
    return rows


def _clean(text: str) -> str:
    """Half a surrogate pair is no JSON."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
