"""Every error that Manifold raises on purpose. No status codes here: `app.api.errors` has the one table.

ManifoldError
├── MalformedError          the request itself is broken or empty
├── TooLargeError           body or batch over its limit
├── UnservableError         well-formed, but this cannot be answered
│   ├── TokenizationError   too long for the model, or nothing the model can read
│   └── ArtifactError       an artifact with faults, all of them listed
├── NotFoundError           no such task, version or model
├── UnauthorizedError       no key, or one that is not known
├── ForbiddenError          the key lacks a role, or the rule of two people says no
├── ConflictError           somebody else changed it first, or its state does not allow it
├── OverloadedError         no permit free
├── UnavailableError        not ready, draining, or the engine is dead
├── DeadlineError           the deadline passed first
├── EngineError             ours: a batch or a task failed
├── BackboneError           a model that cannot be served
├── SettingsError           a setting that cannot work
└── DataError               training data that cannot be used
"""

from __future__ import annotations

from collections.abc import Sequence


class ManifoldError(Exception):
    """The root. `str(error)` is one sentence that says what is wrong and, where it can, what to do."""


class MalformedError(ManifoldError):
    pass


class TooLargeError(ManifoldError):
    pass


class UnservableError(ManifoldError):
    pass


class TokenizationError(UnservableError):
    pass


class ArtifactError(UnservableError):
    """`faults` lists every fault found in the artifact, a sentence each."""

    def __init__(self, name: str, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        super().__init__(f"artifact {name} cannot be served: " + "; ".join(self.faults))


class NotFoundError(ManifoldError):
    pass


class UnauthorizedError(ManifoldError):
    pass


class ForbiddenError(ManifoldError):
    pass


class ConflictError(ManifoldError):
    """`generation` is the index's present one, where it is known."""

    def __init__(self, message: str, generation: int | None = None) -> None:
        self.generation = generation
        super().__init__(message)


class OverloadedError(ManifoldError):
    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class UnavailableError(ManifoldError):
    pass


class DeadlineError(ManifoldError):
    pass


class EngineError(ManifoldError):
    pass


class BackboneError(ManifoldError):
    pass


class SettingsError(ManifoldError):
    pass


class DataError(ManifoldError):
    pass
