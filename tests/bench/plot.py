"""Small line plots as SVG, so that a report needs no plotting library. Knows points and axes only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_WIDTH, _HEIGHT = 560, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 44, 44
_COLOURS = ("#0b6e99", "#c2571a", "#3f7d20", "#7b3fa0", "#8a6d00")


@dataclass(frozen=True)
class Axis:
    label: str
    is_log: bool = False
    lowest: float | None = None  # of a linear axis; unset: a little below the data

    def span(self, values: Sequence[float]) -> tuple[float, float]:
        low, high = min(values), max(values)
        if self.is_log:
            return low, high if high > low else 2 * low
        low = self.lowest if self.lowest is not None else low - 0.05 * (high - low)
        return low, high + (0.05 * (high - low) or 1.0)

    def ticks(self, low: float, high: float) -> list[float]:
        if self.is_log:
            powers = range(math.ceil(math.log2(low) - 1e-9), math.floor(math.log2(high) + 1e-9) + 1)
            step = max(1, math.ceil(len(powers) / 8))
            return [2.0**power for power in powers[::step]]
        rough = (high - low) / 5
        size = 10 ** math.floor(math.log10(rough))
        step_size = next(m * size for m in (1, 2, 5, 10) if m * size >= rough)
        first = math.ceil(low / step_size)
        return [i * step_size for i in range(first, math.floor(high / step_size) + 1)]


def write_plot(
    path: Path, title: str, x: Axis, y: Axis, series: Mapping[str, tuple[Sequence[float], Sequence[float]]]
) -> None:
    """`series`: name → xs, ys."""
    x_low, x_high = x.span([v for xs, _ in series.values() for v in xs])
    y_low, y_high = y.span([v for _, ys in series.values() for v in ys])

    def across(value: float) -> float:
        return _LEFT + _share(value, x_low, x_high, x.is_log) * (_WIDTH - _LEFT - _RIGHT)

    def up(value: float) -> float:
        return _HEIGHT - _BOTTOM - _share(value, y_low, y_high, y.is_log) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        'font-size="11"><rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="{_LEFT}" y="16" font-size="13" font-weight="bold">{title}</text>',
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">{x.label}</text>',
        f'<text x="14" y="{(_TOP + _HEIGHT - _BOTTOM) / 2}" text-anchor="middle" '
        f'transform="rotate(-90 14 {(_TOP + _HEIGHT - _BOTTOM) / 2})">{y.label}</text>',
    ]
    for tick in x.ticks(x_low, x_high):
        at = f"{across(tick):.1f}"
        parts.append(f'<line x1="{at}" x2="{at}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{at}" y="{_HEIGHT - _BOTTOM + 14}" text-anchor="middle">{tick:,g}</text>')
    for tick in y.ticks(y_low, y_high):
        at = f"{up(tick):.1f}"
        parts.append(f'<line y1="{at}" y2="{at}" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{float(at) + 4:.1f}" text-anchor="end">{tick:,g}</text>')
    legend_x = float(_LEFT)
    for number, (name, (xs, ys)) in enumerate(series.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        points = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in zip(xs, ys, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{legend_x}" y="34" fill="{colour}">{name}</text>')
        legend_x += 6.2 * len(name) + 16
    path.write_text("\n".join([*parts, "</svg>"]) + "\n")


def _share(value: float, low: float, high: float, is_log: bool) -> float:
    if is_log:
        return math.log(value / low) / math.log(high / low)
    return (value - low) / (high - low)
