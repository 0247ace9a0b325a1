"""What a request cost and how long its stages took. Knows nothing of how either is shown."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Usage:
    tokens: int  # of all inputs, special tokens counted
    rows: int  # trunks and branches that ran
    passes: float  # bare forwards of the backbone that they cost, summed over the inputs
    cached: int  # answers that came from the cache and cost nothing


@dataclass(frozen=True, slots=True)
class Timings:
    tokenization_s: float
    queue_s: float
    inference_s: float


def to_ms(duration_s: float) -> float:
    """To the microsecond. `round(…, 3)` writes the number out and reads it again: four times as long."""
    return round(1e6 * duration_s) / 1e3
