"""Who answers bulk work: a server over HTTP, or an engine in this process. Both say the same in the same words."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx2
import orjson

from app.client.bulk_columns import Outcome
from app.client.bulk_flow import AwayError
from app.client.http import AnsweredError, Server
from app.config import is_loopback
from app.domain import TextInput
from app.errors import (
    DeadlineError,
    EngineError,
    MalformedError,
    ManifoldError,
    OverloadedError,
    TooLargeError,
    UnavailableError,
    UnservableError,
)

_MOST_ROWS = 128  # of one request; larger ones only make the answers come later
_SLACK_S = 30.0  # beyond the server's own deadline
_ERRORS: dict[int, type[ManifoldError]] = {
    400: MalformedError,
    413: TooLargeError,
    422: UnservableError,
    500: EngineError,
    504: DeadlineError,
}
_AWAY = (502, 503)  # 502: a proxy in between finds nobody


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of every row."""

    tasks: tuple[str, ...] | None = None  # None: every live task that fits
    unit: str | None = None
    truncate: bool = False


class ServerPredictor:
    def __init__(self, server: Server, question: Question, concurrency: int) -> None:
        """Asks the server what it takes. Raises ManifoldError where it is not there or does not let us in."""
        limits = server.ask("GET", "/info")["limits"]
        self.max_rows = min(int(limits["max_client_batch_size"]), _MOST_ROWS)
        self._server = server
        self._body: dict[str, Any] = {"truncate": question.truncate}
        if question.tasks is not None:
            self._body["tasks"] = question.tasks
        if question.unit is not None:
            self._body["unit"] = question.unit
        headers = {"content-type": "application/json"}
        if server.key is not None:
            headers["authorization"] = f"Bearer {server.key}"
        self._client = httpx2.AsyncClient(
            headers=headers,
            timeout=limits["deadline_ms"] / 1000 + _SLACK_S,
            limits=httpx2.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
            trust_env=not is_loopback(urlsplit(server.url).hostname or ""),
        )

    async def predict(self, inputs: Sequence[TextInput]) -> list[Outcome]:
        body = orjson.dumps(self._body | {"inputs": [_wire(text) for text in inputs]})
        try:
            response = await self._client.post(f"{self._server.url}/v1/predict", content=body)
        except httpx2.HTTPError as error:
            told = str(error) or type(error).__name__
            raise AwayError(f"the server at {self._server.url} has gone: {told}") from error
        answer = _decode(response)
        if response.is_success and "results" in answer:
            return [Outcome(results, answer["generation"]) for results in answer["results"]]
        raise _error(response, answer)

    async def close(self) -> None:
        await self._client.aclose()


class EnginePredictor:
    """`ask` is InferenceService.predict, which can only be awaited in one event loop."""

    def __init__(self, ask: Callable[..., Awaitable[Any]], question: Question, max_rows: int) -> None:
        self.max_rows = min(max_rows, _MOST_ROWS)
        self._ask = ask
        self._question = question

    async def predict(self, inputs: Sequence[TextInput]) -> list[Outcome]:
        asked = self._question
        # As on a server, a request's id decides its side of a canary where no unit does.
        request_id = uuid.uuid4().hex
        answer = await self._ask(inputs, asked.tasks, asked.truncate, unit=asked.unit, request_id=request_id)
        results = orjson.loads(orjson.dumps(answer.results, option=orjson.OPT_SERIALIZE_NUMPY))
        return [Outcome(result, answer.generation) for result in results]

    async def close(self) -> None: ...


def _wire(text: TextInput) -> str | dict[str, str]:
    return text.text if text.text_pair is None else {"text": text.text, "text_pair": text.text_pair}


def _decode(response: httpx2.Response) -> dict[str, Any]:
    """Empty where it is not JSON, as a proxy's own pages are not."""
    try:
        answer = orjson.loads(response.content)
    except orjson.JSONDecodeError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _error(response: httpx2.Response, answer: dict[str, Any]) -> ManifoldError:
    status = response.status_code
    sentence = str(answer.get("error") or f"the server answered with status {status}")
    if response.is_success:
        return UnavailableError("what answers is not Manifold")
    if status == 429:
        return OverloadedError(sentence, _retry_after_s(response))
    if status in _AWAY:
        return AwayError(sentence, _retry_after_s(response))
    return _ERRORS[status](sentence) if status in _ERRORS else AnsweredError(sentence, status)


def _retry_after_s(response: httpx2.Response) -> float:
    given = response.headers.get("retry-after", "")
    return float(given) if given.isascii() and given.isdecimal() else 1.0
