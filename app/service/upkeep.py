"""Once a second: hands what was compared to the index, and ends canaries that went past a gate.

Runs on a thread of its own; no request ever waits for it. Knows nothing of how answers are made.
"""

from __future__ import annotations

import logging

from app.errors import NotFoundError, UnavailableError
from app.registry.comparison import Comparisons
from app.registry.index import Index
from app.service.experiment import Recorder, flush
from app.service.gates import Trip, find_trips
from app.service.hot_swap import Follower
from app.service.rounds import Rounds
from app.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)

ACTOR = "gate"
_EVERY_S = 1.0


class Upkeep:
    def __init__(
        self,
        recorder: Recorder,
        comparisons: Comparisons,
        index: Index,
        follower: Follower,
        metrics: Metrics,
        feedback_window_s: float,
    ) -> None:
        """`feedback_window_s`: how long compared answers wait for an outcome."""
        self._recorder, self._comparisons, self._index = recorder, comparisons, index
        self._follower, self._metrics = follower, metrics
        self._feedback_window_s = max(1, round(feedback_window_s))
        self._rounds = Rounds("upkeep", _EVERY_S, self.once)

    def start(self) -> None:
        self._rounds.start()

    def close(self) -> None:
        """What was counted last is handed over first."""
        self._rounds.close()

    def once(self) -> None:
        try:
            batch = flush(self._recorder, self._comparisons, self._feedback_window_s)
            for pair, figures in batch.figures.items() if batch is not None else ():
                self._metrics.disagreed(pair.task, figures.disagreed)
            self._watch_gates()
        except UnavailableError as error:
            logger.debug("what was compared waits: %s", error)  # the follower says that the index is gone
        except Exception:  # the thread must outlive whatever one round brings
            logger.exception("counting what was compared failed; it is tried again")

    def _watch_gates(self) -> None:
        tasks = self._follower.catalog.snapshot.view.tasks.values()
        for trip in find_trips(tasks, self._comparisons.read_pairs):
            self._end(trip)

    def _end(self, trip: Trip) -> None:
        try:
            ended = self._index.trip_gate(ACTOR, trip.task, trip.expected, trip.figures, trip.reason)
        except NotFoundError:  # the index lost the task a moment ago
            return
        if ended:
            logger.warning("the canary of %s is over, the champion answers alone: %s", trip.task, trip.reason)
            self._metrics.rolled_back(trip.task, ACTOR)
            self._follower.sync()
