"""What `/metrics` says. Knows nothing of what is counted, but its names and labels."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from app.telemetry.batch import Batch
from app.telemetry.series import DriftSeries, ScoreSeries

# Otherwise each counter and histogram has a second series beside it, which nobody asks for.
disable_created_metrics()  # type: ignore[no-untyped-call]

_LOAD_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_PROPAGATION_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0, 1.5, 2.5, 5.0, 10.0, 30.0)
_REQUEST_BUCKETS_S = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.02,
    0.035,
    0.05,
    0.075,
    0.1,
    0.15,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
)
_STAGE_BUCKETS_S = (
    *(0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
_LAG_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_TOKEN_BUCKETS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
_ASKED, _FAILURES = ("/v1/predict", "/v1/embeddings"), ("500", "503", "504")
_REFUSED = frozenset({401, 403, 429})  # in no time: under overload they would hide how long answers take


class Metrics:
    """What `/metrics` says. Safe from every thread; labels are plain words, and the caller keeps them few."""

    def __init__(self, registry: CollectorRegistry | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """`registry`: a new one where none is given, so that no two of these ever meet."""
        self._registry = registry if registry is not None else CollectorRegistry()
        self._clock = clock
        self._contact_s = clock()
        self._add_requests()
        self._add_engine()
        self._add_process()
        self._add_versions()
        self._scores, self._drift = ScoreSeries(), DriftSeries()
        self._add_index()
        self._build = Info("manifold_build", "The software and what it runs on.", registry=self._registry)

    def built(self, facts: Mapping[str, str]) -> None:
        """Says once what runs here: version, model, device and such."""
        self._build.info(dict(facts))

    # -- requests ------------------------------------------------------------------------------------------------------

    def _add_requests(self) -> None:
        counter = partial(Counter, registry=self._registry)
        self._requests = counter("manifold_requests_total", "Requests, by route and status code.", ("route", "code"))
        for route, code in product(_ASKED, _FAILURES):
            self._requests.labels(route, code)  # there from the start, so that the first failure is seen to be one
        self._request_duration = Histogram(
            "manifold_request_duration_seconds",
            "Time from a request's arrival to its answer's first byte, or until its client left, by route. "
            "Without 401, 403 and 429: what is refused before any work.",
            ("route",),
            buckets=_REQUEST_BUCKETS_S,
            registry=self._registry,
        )
        self._rejected = counter(
            "manifold_rejected_total",
            "Requests without an answer: no permit was free (full), draining, or the deadline passed (deadline).",
            ("reason",),
        )
        for reason in ("full", "draining", "deadline"):
            self._rejected.labels(reason)
        self._predictions = counter(
            "manifold_predictions_total",
            "Answers of task versions, by why they were asked and whether they succeeded.",
            ("task", "version", "arm", "outcome"),
        )
        self._arms_seen: set[tuple[str, int, str]] = set()  # task, version, arm
        self._disagreements = counter(
            "manifold_arm_disagreement_total",
            "Texts on which the champion and a version beside it gave different answers.",
            ("task",),
        )
        self._rollbacks = counter(
            "manifold_rollbacks_total", "Returns to an earlier champion or to it alone, by cause.", ("task", "cause")
        )
        self._unwatched = counter(
            "manifold_watch_dropped_total",
            "Answered requests that scores, drift or the prediction log lack: they found no room, or met a fault.",
        )
        self._spans_dropped = counter(
            "manifold_spans_dropped_total",
            "Spans of traces that were lost: no room for them, or the receiver did not take them.",
        )
        self._logged = counter("manifold_prediction_log_rows_total", "Rows that were written to the prediction log.")
        self._log_dropped = counter(
            "manifold_prediction_log_dropped_total",
            "Rows that the prediction log lacks: its disk is full, it or its store is too slow, or an error.",
            ("reason",),
        )
        for reason in ("full", "slow", "store", "error"):
            self._log_dropped.labels(reason)  # there from the start, so that the first loss is seen to be one
        self._cache_hits = counter("manifold_answer_cache_hits_total", "Answers for a text that were in the cache.")
        self._cache_misses = counter(
            "manifold_answer_cache_misses_total", "Answers for a text that were not in the cache, and were computed."
        )
        self._cache_bytes = Gauge(
            "manifold_answer_cache_bytes", "Memory that the cached answers take.", registry=self._registry
        )

    def answered(self, route: str, code: int, duration_s: float) -> None:
        """`route` is the template (`/v1/tasks/{task}`), never the path that was asked for."""
        self._requests.labels(route, str(code)).inc()
        if code not in _REFUSED:
            self._request_duration.labels(route).observe(duration_s)

    def rejected(self, reason: str) -> None:
        self._rejected.labels(reason).inc()

    def predicted(self, task: str, version: int, arm: str, outcome: str, count: int = 1) -> None:
        if (task, version, arm) not in self._arms_seen:
            self._predictions.labels(task, str(version), arm, "failure")
        self._predictions.labels(task, str(version), arm, outcome).inc(count)
        self._arms_seen.add((task, version, arm))  # last: what is counted is known, whatever `forget` does meanwhile

    def unwatched(self, requests: int) -> None:
        self._unwatched.inc(requests)

    def spans_dropped(self, count: int) -> None:
        self._spans_dropped.inc(count)

    def logged(self, rows: int) -> None:
        """Rows that are in the prediction log."""
        self._logged.inc(rows)

    def log_dropped(self, reason: str, rows: int) -> None:
        """Rows that the prediction log lacks."""
        self._log_dropped.labels(reason).inc(rows)

    def looked_up(self, hits: int, misses: int, cache_bytes: int) -> None:
        """Answers that one request found in the cache, those that it had to compute, and what the cache holds now."""
        self._cache_hits.inc(hits)
        self._cache_misses.inc(misses)
        self._cache_bytes.set(cache_bytes)

    def disagreed(self, task: str, count: int = 1) -> None:
        self._disagreements.labels(task).inc(count)

    def rolled_back(self, task: str, cause: str) -> None:
        self._rollbacks.labels(task, cause).inc()

    # -- the engine ----------------------------------------------------------------------------------------------------

    def _add_engine(self) -> None:
        histogram = partial(Histogram, registry=self._registry)
        self._stages = histogram(
            "manifold_stage_duration_seconds",
            "Time of a stage: of a request (tokenize, queue) or of a batch (collate, forward, heads).",
            ("stage",),
            buckets=_STAGE_BUCKETS_S,
        )
        self._batch_rows = histogram("manifold_batch_rows", "Rows of a batch.", buckets=_ROW_BUCKETS)
        self._batch_tokens = histogram("manifold_batch_tokens", "Padded tokens of a batch.", buckets=_TOKEN_BUCKETS)
        counter = partial(Counter, registry=self._registry)
        self._passes = counter(
            "manifold_passes_total",
            "Bare forwards of the encoder that a task's answers cost, its part of them.",
            ("task",),
        )
        self._device_time = counter(
            "manifold_device_seconds_total",
            "The device's time that a task version used: its part of each batch, by rows x tokens.",
            ("task", "version"),
        )
        self._timed: set[tuple[str, int]] = set()  # task, version

    def staged(self, stage: str, duration_s: float) -> None:
        self._stages.labels(stage).observe(duration_s)

    def ran(self, report: Batch) -> None:
        """One batch of the engine."""
        for stage, duration_s in (
            ("collate", report.collate_s),
            ("forward", report.forward_s),
            ("heads", report.heads_s),
        ):
            self.staged(stage, duration_s)
        self._batch_rows.observe(report.rows)
        self._batch_tokens.observe(report.tokens)
        for (task, version), share in report.shares.items():
            if version == 0:  # it is being checked, and not live yet
                continue
            self._passes.labels(task).inc(share * report.passes)
            self._device_time.labels(task, str(version)).inc(share * report.forward_s)
            self._timed.add((task, version))

    def watch(self, queue_rows: Callable[[], int], device_bytes: Callable[[], int] | None) -> None:
        """What is read when somebody asks. `device_bytes`: None where the device has no memory of its own."""
        gauge = Gauge("manifold_queue_rows", "Rows that wait for a batch.", registry=self._registry)
        gauge.set_function(queue_rows)
        if device_bytes is not None:
            memory = Gauge("manifold_device_memory_bytes", "Memory taken on the device.", registry=self._registry)
            memory.set_function(device_bytes)

    # -- the process ---------------------------------------------------------------------------------------------------

    def _add_process(self) -> None:
        ProcessCollector(registry=self._registry)
        self._lag = Histogram(
            "manifold_event_loop_lag_seconds",
            "How late the event loop woke for what it had to do at a set time.",
            buckets=_LAG_BUCKETS_S,
            registry=self._registry,
        )

    def lagged(self, duration_s: float) -> None:
        self._lag.observe(duration_s)

    # -- versions ------------------------------------------------------------------------------------------------------

    def _add_versions(self) -> None:
        self._residents = Gauge(
            "manifold_prefixes_resident", "Task versions that are loaded and live.", registry=self._registry
        )
        self._load_duration = Histogram(
            "manifold_prefix_load_duration_seconds",
            "Time to fetch, check and load a task version.",
            buckets=_LOAD_BUCKETS_S,
            registry=self._registry,
        )
        self._load_failures = Counter(
            "manifold_prefix_load_failures_total",
            "Task versions that could not be served, by reason.",
            ("reason",),
            registry=self._registry,
        )
        self._unserved = Gauge(
            "manifold_versions_unserved",
            "Live versions of the index that this server cannot serve now, by task.",
            ("task",),
            registry=self._registry,
        )
        self._told_unserved: set[str] = set()

    def loaded(self, duration_s: float) -> None:
        self._load_duration.observe(duration_s)

    def load_failed(self, reason: str) -> None:
        self._load_failures.labels(reason).inc()

    def unserved(self, counts: Mapping[str, int]) -> None:
        """By live task: how many of its live versions are not served. Of other tasks nothing is said any more."""
        for task in self._told_unserved - counts.keys():
            self._unserved.remove(task)
        for task, count in counts.items():
            self._unserved.labels(task).set(count)
        self._told_unserved = set(counts)

    def forget(self, task: str, version: int) -> None:
        """Drops what was counted of a version. To be called once nothing can answer with it any more."""
        labels = {"task": task, "version": str(version)}
        seen = list(self._arms_seen)  # at once: others add to it meanwhile
        self._arms_seen.difference_update(arm for arm in seen if arm[:2] == (task, version))
        self._timed.discard((task, version))
        self._predictions.remove_by_labels(labels)
        self._device_time.remove_by_labels(labels)
        self.no_scores(task, version)
        self.no_drift(task, version)

    @property
    def counted(self) -> set[tuple[str, int]]:
        """(task, version) of all whose answers, or time, are counted."""
        arms, timed = list(self._arms_seen), list(self._timed)  # at once: others add to them meanwhile
        return {(task, version) for task, version, _ in arms} | set(timed)

    def forget_task(self, task: str) -> None:
        """Drops what was counted of a task as a whole. To be called once none of its versions is loaded any more."""
        for counted in (self._passes, self._disagreements, self._rollbacks):
            counted.remove_by_labels({"task": task})

    def scored(self, task: str, version: int, labels: Sequence[str], scores: NDArray[np.floating[Any]]) -> None:
        """`scores` [texts, labels] of texts that a version answered: nan where a text has none."""
        self._scores.add(task, version, labels, scores)

    def no_scores(self, task: str, version: int) -> None:
        """A version's scores are not counted any more."""
        self._scores.forget(task, version)

    def drifted(self, task: str, version: int, found: Mapping[str, tuple[float, float]]) -> None:
        """By kind: how far the last texts are from the baseline (PSI), and how likely by chance (p-value)."""
        self._drift.set(task, version, found)

    def no_drift(self, task: str, version: int) -> None:
        """Nothing is said any more of how a version's texts drift."""
        self._drift.forget(task, version)

    # -- the index -----------------------------------------------------------------------------------------------------

    def _add_index(self) -> None:
        gauge = partial(Gauge, registry=self._registry)
        self._index_up = gauge("manifold_index_up", "1 while the version index answers, else 0.")
        staleness = gauge("manifold_index_staleness_seconds", "Time since the version index last answered.")
        staleness.set_function(lambda: max(0.0, self._clock() - self._contact_s))
        self._generation = gauge("manifold_generation", "Generation of the version index that is served.")
        self._propagation = Histogram(
            "manifold_swap_propagation_seconds",
            "Time from a change in the version index until it is served here.",
            buckets=_PROPAGATION_BUCKETS_S,
            registry=self._registry,
        )

    def index_answered(self) -> None:
        self._contact_s = self._clock()
        self._index_up.set(1)

    def index_lost(self, staleness_s: float) -> None:
        """`staleness_s`: how long ago it last answered; it grows from there by itself."""
        self._contact_s = self._clock() - staleness_s
        self._index_up.set(0)

    def following(self, generation: int, residents: int) -> None:
        self._generation.set(generation)
        self._residents.set(residents)

    def propagated(self, duration_s: float) -> None:
        self._propagation.observe(duration_s)

    # -- what is read --------------------------------------------------------------------------------------------------

    def render(self) -> tuple[bytes, str]:
        """All of it in Prometheus' text format, and its content type."""
        series = self._scores.render() + self._drift.render()
        return generate_latest(self._registry) + series.encode(), CONTENT_TYPE_PLAIN_0_0_4
