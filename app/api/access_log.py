"""A line in the log for each request: what was asked of whom, what answered, what it took. Never a text."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

from starlette.types import Scope

from app.api.routes import route_of
from app.domain import Arm
from app.service.inference import Prediction
from app.service.usage import Timings, Usage, to_ms
from app.telemetry.logs import ACCESS, Line, log_made

logger = logging.getLogger(ACCESS)
_TOLD = frozenset({"method", "route", "status", "duration_ms"})  # by the sentence; the route by the path


def log_request(scope: Scope, status: int, duration_s: float) -> None:
    """Never the reason that an answer fails."""
    try:
        if logger.isEnabledFor(logging.INFO):
            _log(scope, status, duration_s)
    except Exception:
        logger.exception("a request could not be logged")


def _log(scope: Scope, status: int, duration_s: float) -> None:
    """`said` of the request's state is the prediction or the embeddings, where there were any.

    What waits for the log's thread holds none of its texts or scores.
    """
    state = scope["state"]
    said, principal = state.get("said"), state.get("principal")
    answered = _answered(said) if isinstance(said, Prediction) else None
    cost = None if said is None else (said.generation, said.usage, said.timings)
    asked = _Asked(scope["method"], scope["path"][:200], route_of(scope), state["request_id"], state["trace"].ids)
    actor = None if principal is None else principal.name
    log_made(logger, partial(_line, time.time(), asked, actor, status, duration_s, cost, answered))


class _Asked(NamedTuple):
    method: str
    path: str
    route: str
    request_id: str
    trace: Mapping[str, str]  # its ids


def _line(
    at_s: float,
    asked: _Asked,
    actor: str | None,
    status: int,
    duration_s: float,
    cost: tuple[int, Usage, Timings] | None,
    answered: Mapping[str, tuple[int, Arm]] | None,
) -> Line:
    method, path, route, request_id, trace = asked
    fields = {"method": method, "route": route, "status": status, "duration_ms": to_ms(duration_s)}
    if actor is not None:
        fields["actor"] = actor
    if cost is not None:
        fields |= _cost(*cost)
    if answered is not None:
        fields["versions"] = _named(answered)
    shown = path.replace(" ", "%20")  # so that it looks like no pair behind the message
    message = f"{method} {shown} {status} in {1000 * duration_s:.1f} ms"
    return Line(ACCESS, at_s, message, {"request_id": request_id, **trace}, fields, _TOLD)


def _cost(generation: int, usage: Usage, timings: Timings) -> dict[str, object]:
    return {
        "generation": generation,
        "tokens": usage.tokens,
        "rows": usage.rows,
        "passes": usage.passes,
        "cached": usage.cached,
        "tokenization_ms": to_ms(timings.tokenization_s),
        "queue_ms": to_ms(timings.queue_s),
        "inference_ms": to_ms(timings.inference_s),
    }


def versions(said: Prediction) -> dict[str, str]:
    """By reference, "version arm" of those that answered any of the inputs."""
    return _named(_answered(said))


def _answered(said: Prediction) -> dict[str, tuple[int, Arm]]:
    return {
        reference: (answer.version, answer.arm) for answers in said.results for reference, answer in answers.items()
    }


def _named(answered: Mapping[str, tuple[int, Arm]]) -> dict[str, str]:
    return {reference: f"{version} {arm}" for reference, (version, arm) in answered.items()}
