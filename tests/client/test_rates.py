"""Rates and quantiles as Prometheus computes them, also where a server was started again in between."""

from __future__ import annotations

from math import inf

import pytest

from app.client.rates import Between, Scrape, interpolated
from app.telemetry.exposition import Samples


def samples(started: float | None = 1.0, **families: dict[str, float]) -> Samples:
    """Series by name, with the label `a` alone; the label may be empty."""
    found = {name: {frozenset({("a", label)}): value for label, value in by.items()} for name, by in families.items()}
    return found if started is None else {**found, "process_start_time_seconds": {frozenset(): started}}


def between(before: Samples, after: Samples) -> Between:
    return Between(Scrape(10.0, before), Scrape(14.0, after))


def histogram(*counts: float) -> Samples:
    """Cumulative counts below 1, 2 and 4 seconds, and of all."""
    bounds = ("1.0", "2.0", "4.0", "+Inf")
    found = {frozenset({("le", bound)}): count for bound, count in zip(bounds, counts, strict=True)}
    return {"h_bucket": found, "h_count": {frozenset(): counts[-1]}, "h_sum": {frozenset(): 2.0 * counts[-1]}}


def test_a_rate_is_what_was_counted_over_the_time_in_between() -> None:
    seen = between(samples(c={"x": 5, "y": 1}), samples(c={"x": 13, "y": 1, "new": 2}))
    assert seen.rate("c") == 10 / 4
    assert (seen.rate("c", a="x"), seen.rate("c", a="y"), seen.rate("c", a="new")) == (2.0, 0.0, 0.5)
    assert seen.increases("c", "a") == {("x",): 8.0, ("y",): 0.0, ("new",): 2.0}


def test_what_is_not_there_is_not_zero() -> None:
    seen = between(samples(c={"x": 5}), samples(c={"x": 5}))
    assert seen.rate("c", a="gone") is None and seen.rate("other") is None and seen.gauge("other") is None
    assert seen.mean("h") is None and seen.quantile(0.5, "h") is None
    first = Between(None, Scrape(10.0, samples(c={"x": 5})))
    assert first.rate("c") is None and first.quantile(0.5, "h") is None and first.gauge("c") == 5


def test_after_a_restart_only_what_the_new_process_counted_is_told() -> None:
    before = {**samples(1.0, c={"x": 1000}), **histogram(0, 900, 1000, 1000)}
    after = {**samples(2.0, c={"x": 2000}), **histogram(4, 4, 4, 4)}  # it counted more by now than the old one
    seen = between(before, after)
    assert seen.rate("c") == 2000 / 4
    assert seen.quantile(0.5, "h") == 0.5 and seen.mean("h") == 2.0


def test_a_counter_that_fell_began_anew_where_no_start_is_told() -> None:
    before = {**samples(None, c={"x": 1000}), **histogram(0, 900, 1000, 1000)}
    seen = between(before, {**samples(None, c={"x": 6}), **histogram(4, 4, 4, 4)})
    assert seen.rate("c") == 6 / 4
    assert seen.quantile(0.5, "h") == 0.5


def test_the_quantile_is_of_what_came_in_between() -> None:
    seen = between(histogram(100, 100, 100, 100), histogram(100, 110, 110, 110))
    assert seen.quantile(0.5, "h") == 1.5
    assert between(histogram(1, 2, 3, 3), histogram(1, 2, 3, 3)).quantile(0.5, "h") is None  # nothing came


@pytest.mark.parametrize(
    ("q", "counts", "value"),
    [
        (0.5, (10, 10, 10, 10), 0.5),  # the first bucket begins at 0
        (0.5, (0, 10, 10, 10), 1.5),
        (0.99, (50, 90, 100, 100), 3.8),
        (0.5, (5, 5, 10, 10), 1.0),  # at the very end of the first
        (0.99, (10, 20, 30, 90), 4.0),  # past the last bound: that bound
        (1.0, (0, 10, 10, 10), 2.0),
    ],
)
def test_a_quantile_is_interpolated_in_its_bucket(q: float, counts: tuple[float, ...], value: float) -> None:
    found = interpolated(q, dict(zip((1.0, 2.0, 4.0, inf), counts, strict=True)))
    assert found == pytest.approx(value)


def test_the_largest_gauge_stands_for_its_place() -> None:
    found = {"g": {frozenset({("task", "spam"), ("kind", kind)}): psi for kind, psi in (("a", 0.1), ("b", 0.4))}}
    assert Between(None, Scrape(0.0, found)).gauges("g", "task") == {("spam",): 0.4}
