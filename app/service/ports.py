"""What the use cases need of the engine and the tokenizer, so that both can be replaced by fakes in tests."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

from app.domain import BackboneSpec, Encoding, EngineRequest, EngineResult, TextInput


class EnginePort(Protocol):
    @property
    def spec(self) -> BackboneSpec: ...

    @property
    def alive(self) -> bool: ...

    @property
    def queue_rows(self) -> int: ...

    def submit(self, request: EngineRequest) -> Future[EngineResult]:
        """Raises UnavailableError where the engine is dead or closed."""
        ...


class TokenizerPort(Protocol):
    def encode(self, inputs: Sequence[TextInput], limits: Sequence[int], truncate: bool) -> list[Encoding]:
        """Blocking and thread-safe. Raises TokenizationError with a sentence that names the input."""
        ...
