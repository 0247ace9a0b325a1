"""Everything that a running server holds, handed to the endpoints as one object. Decides whether it is ready."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from app.config import Settings
from app.errors import UnavailableError
from app.service.access import Access
from app.service.admission import Admission
from app.service.catalog import Catalog
from app.service.drift import DriftPort
from app.service.hot_swap import IndexHealth
from app.service.inference import InferenceService
from app.service.ports import EnginePort, RolloutPort
from app.service.why import Why
from app.telemetry.metrics import Metrics
from app.telemetry.tracing import Tracing


@dataclass(slots=True)
class Runtime:
    settings: Settings
    engine: EnginePort
    catalog: Catalog
    inference: InferenceService
    admission: Admission
    rollout: RolloutPort
    access: Access
    why: Why
    drift: DriftPort
    metrics: Metrics
    traces: Tracing
    index_health: Callable[[], IndexHealth]
    abandon: Callable[[], None]  # what must be done even where the process ends at once
    close: Callable[[], None]

    def check_live(self) -> None:
        """Raises UnavailableError where only a restart helps."""
        if not self.engine.alive:
            raise UnavailableError("the engine is dead: restart this server")

    def check_ready(self) -> None:
        """Raises UnavailableError where new requests should go elsewhere. A forward succeeded before we exist."""
        self.check_live()
        if self.admission.is_draining:
            raise UnavailableError("the server is shutting down")
