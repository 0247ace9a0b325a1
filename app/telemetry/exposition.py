"""Reads what a server's `/metrics` says, as a scraper does. Knows no metric by name, and nothing of time."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families

Labels = frozenset[tuple[str, str]]
Samples = Mapping[str, Mapping[Labels, float]]  # value by the sample's name, then by its labels


def read_exposition(text: str) -> Samples:
    """Raises ValueError where it is not Prometheus' text format."""
    found: dict[str, dict[Labels, float]] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found.setdefault(sample.name, {})[frozenset(sample.labels.items())] = float(sample.value)
    except (KeyError, IndexError) as error:  # the parser has no error of its own
        raise ValueError(f"it ends too soon: {error!r}") from error
    return found
