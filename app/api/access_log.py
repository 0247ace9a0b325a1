"""A line in the log for each request: what was asked of whom, what answered, what it took. Never a text."""

from __future__ import annotations

import logging

from starlette.types import Scope

from app.api.routes import route_of
from app.service.inference import Embeddings, Prediction
from app.telemetry.logs import ACCESS

logger = logging.getLogger(ACCESS)


def log_request(scope: Scope, status: int, duration_s: float) -> None:
    """Never the reason that an answer fails."""
    try:
        if logger.isEnabledFor(logging.INFO):
            _log(scope, status, duration_s)
    except Exception:
        logger.exception("a request could not be logged")


def _log(scope: Scope, status: int, duration_s: float) -> None:
    """`said` of the request's state is the prediction or the embeddings, where there were any."""
    state, method, path = scope["state"], scope["method"], scope["path"][:200]
    fields: dict[str, object] = {
        "method": method,
        "route": route_of(scope),
        "status": status,
        "duration_ms": round(1000 * duration_s, 3),
    }
    principal = state.get("principal")
    if principal is not None:
        fields["actor"] = principal.name
    said = state.get("said")
    if said is not None:
        fields |= _cost(said)
    if isinstance(said, Prediction):
        fields["versions"] = versions(said)
    arguments = (method, path, status, 1000 * duration_s)
    # What `logger.info` would make, without a walk through the stack to find who calls.
    record = logging.LogRecord(ACCESS, logging.INFO, __file__, 0, "%s %s %d in %.1f ms", arguments, None)
    record.__dict__.update(request_id=state["request_id"], fields=fields, **state["trace"].ids)
    logger.handle(record)


def _cost(said: Prediction | Embeddings) -> dict[str, object]:
    usage, timings = said.usage, said.timings
    return {
        "generation": said.generation,
        "tokens": usage.tokens,
        "rows": usage.rows,
        "passes": usage.passes,
        "cached": usage.cached,
        "tokenization_ms": round(1000 * timings.tokenization_s, 3),
        "queue_ms": round(1000 * timings.queue_s, 3),
        "inference_ms": round(1000 * timings.inference_s, 3),
    }


def versions(said: Prediction) -> dict[str, str]:
    """By reference, "version arm" of those that answered any of the inputs."""
    return {
        reference: f"{answer.version} {answer.arm}" for answers in said.results for reference, answer in answers.items()
    }
