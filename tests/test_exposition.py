"""What is read of `/metrics` is what is written there."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from app.telemetry.exposition import read_exposition
from app.telemetry.metrics import Metrics


def test_counters_gauges_and_buckets_are_found_by_name_and_labels() -> None:
    metrics = Metrics(CollectorRegistry())
    metrics.predicted('odd "name"\n', 3, "champion", "success", 2)
    metrics.staged("queue", 0.003)
    metrics.following(17, 8)
    found = read_exposition(metrics.render()[0].decode())
    labels = {("task", 'odd "name"\n'), ("version", "3"), ("arm", "champion"), ("outcome", "success")}
    failed = labels - {("outcome", "success")} | {("outcome", "failure")}
    assert found["manifold_predictions_total"] == {frozenset(labels): 2.0, frozenset(failed): 0.0}
    assert found["manifold_generation"] == {frozenset(): 17.0}
    assert found["manifold_stage_duration_seconds_bucket"][frozenset({("stage", "queue"), ("le", "+Inf")})] == 1.0
    assert found["manifold_stage_duration_seconds_sum"] == {frozenset({("stage", "queue")}): 0.003}


@pytest.mark.parametrize("text", ["<html>\n", "a one\n", "a{\n"])
def test_what_is_no_exposition_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        read_exposition(text)
