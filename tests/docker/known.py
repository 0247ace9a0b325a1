"""What rules, dashboards and the autoscaler may ask for: the metrics that telemetry has, and those that it will have.

The one list of names in these tests. What is read from `Metrics()` needs no line here.
"""

from __future__ import annotations

import re

from app.telemetry.metrics import Metrics

# A bare `Metrics()` lacks these: they exist once something runs, or are not written yet.
PLANNED = {
    "manifold_request_duration_seconds": "histogram",
    "manifold_stage_duration_seconds": "histogram",
    "manifold_passes_total": "counter",
    "manifold_batch_rows": "histogram",
    "manifold_batch_tokens": "histogram",
    "manifold_queue_rows": "gauge",
    "manifold_rejected_total": "counter",
    "manifold_device_seconds_total": "counter",
    "manifold_device_memory_bytes": "gauge",
    "manifold_event_loop_lag_seconds": "histogram",
    # prometheus_client's process collector
    "process_resident_memory_bytes": "gauge",
    "process_start_time_seconds": "gauge",
    "process_cpu_seconds_total": "counter",
}
PROMETHEUS_OWN = {"up", "ALERTS"}
LABELS = {
    *("route", "code", "stage", "task", "version", "arm", "outcome", "label", "reason", "cause", "kind", "le"),
    *("device", "job", "instance", "alertname", "alertstate"),
}


def kinds() -> dict[str, str]:
    """Kind by metric, as telemetry writes them; planned ones where it does not yet."""
    body, _ = Metrics().render()
    return PLANNED | dict(re.findall(r"^# TYPE (\w+) (\w+)$", body.decode(), re.MULTILINE))


def series() -> set[str]:
    """The names that a query can ask for."""
    names = set(PROMETHEUS_OWN)
    for name, kind in kinds().items():
        names |= {f"{name}_{part}" for part in ("bucket", "sum", "count")} if kind == "histogram" else {name}
    return names
