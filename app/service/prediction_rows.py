"""What the prediction log keeps of an answered request. Knows no files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import orjson

from app.domain import Arm
from app.registry.prediction_lines import Row
from app.service.answers import Answer, SpansAnswer
from app.service.dispatch import Reading
from app.service.resolve import Target
from app.service.usage import to_ms
from app.service.watching import Served
from app.telemetry.logs import utc_second

_SALT = "prediction log\n"  # what else is drawn from request ids must not go along with this


def is_sampled(request_id: str, share: float) -> bool:
    """The same at every server and for every retry."""
    if share >= 1.0:
        return True
    drawn = hashlib.sha256((_SALT + request_id).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(drawn[:8], "big") < share * 2**64


def count_rows(served: Served) -> int:
    return sum(map(len, served.targets))


def to_line(served: Served, has_texts: bool) -> bytes:
    """A JSON line: of each input what it was and who was asked for it, and the results as the caller has them.

    Rows are made of it later, in another process: here each takes processor time from those who answer.
    """
    asked = zip(served.targets, served.readings, strict=True)
    row: Row = {
        "time": _time(served.at_s),
        "request_id": served.request_id,
        "actor": served.actor,
        "generation": served.generation,
        "request_passes": served.usage.passes,
        "inference_ms": to_ms(served.timings.inference_s),
        "inputs": [_input(targets, reading, has_texts) for targets, reading in asked],
        "results": _results(served, has_texts),
    }
    return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)


def _input(targets: Sequence[Target], reading: Reading, has_texts: bool) -> Row:
    encoding, text = reading.encoded, reading.text
    row: Row = {
        "text_sha256": text.sha256,
        "tokens": len(encoding),
        "truncated": encoding.truncated,
        "targets": [_told(target, target.version.digest in reading.cached) for target in targets],
    }
    if has_texts:
        row["text"] = _clean(text.text)
        if text.text_pair is not None:
            row["text_pair"] = _clean(text.text_pair)
    return row


def _told(target: Target, is_cached: bool) -> orjson.Fragment:
    version = target.version
    return _target(target.reference, version.task, version.version, version.digest, target.arm, is_cached)


@lru_cache(maxsize=1024)
def _target(reference: str, task: str, version: int, digest: str, arm: Arm, is_cached: bool) -> orjson.Fragment:
    told = {"reference": reference, "task": task, "version": version, "digest": digest, "arm": arm, "cached": is_cached}
    return orjson.Fragment(orjson.dumps(told))


def _results(served: Served, has_texts: bool) -> orjson.Fragment | list[Row]:
    """By reference, for each input. Spans quote the text."""
    kinds = {type(answer) for results in served.results for answer in results.values()}
    if has_texts or SpansAnswer not in kinds:
        return orjson.Fragment(served.results_json)
    return [{name: _untold(answer) for name, answer in results.items()} for results in served.results]


def _untold(answer: Answer) -> Answer | Row:
    if not isinstance(answer, SpansAnswer):
        return answer
    return {"spans": [{"label": s.label, "start": s.start, "end": s.end, "score": s.score} for s in answer.spans]}


def _time(at_s: float) -> str:
    return f"{utc_second(int(at_s))}.{int(1e6 * (at_s % 1)):06d}Z"


def _clean(text: str) -> str:
    """Half a surrogate pair is no JSON."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
