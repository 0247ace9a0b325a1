"""The plots of an experiment's page, as SVG. Knows its numbers, and nothing of the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from xml.etree.ElementTree import Element, SubElement, tostring

from app.learning.experiment_numbers import BEST_SINGLE, Story, heads_of, show_size
from app.learning.experiment_plan import BARE, CEILING, COMBINATION, READOUTS, SHARED, TOGETHER, WHOLE

_LINES = (BARE, BEST_SINGLE, COMBINATION, SHARED, WHOLE)
# Okabe & Ito's colours, which the colour-blind can tell apart
_COLOURS = {
    BARE: "#555555",
    BEST_SINGLE: "#e69f00",
    COMBINATION: "#0072b2",
    SHARED: "#009e73",
    WHOLE: "#d55e00",
    CEILING: "#cc79a7",
}
_PANEL = (60.0, 40.0, 300.0, 220.0)  # left, top, width, height


@dataclass(frozen=True, slots=True)
class _Scale:
    low: float
    high: float
    start: float  # pixels
    stop: float

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)


def targets_plot(story: Story) -> str:
    plan = story.plan
    names = [*_LINES, *([CEILING] if plan.with_ceiling else [])]
    left, top, width, height = _PANEL
    svg = _svg(2 * (left + width) + 30, top + height + 60 + 18 * math.ceil(len(names) / 3))
    every = [v for n in _LINES for r in READOUTS for size in plan.sizes for v in story.average(n, r, size)]
    if plan.with_ceiling:
        every += [v for size in plan.sizes for v in story.average(CEILING, "", size)]
    y = _scale(every, top + height, top)
    for index, readout in enumerate(READOUTS):
        start = left + index * (left + width)
        x = _Scale(0, max(1, len(plan.sizes) - 1), start + 30, start + width - 30)
        _frame(svg, start, y, f"{heads_of(readout)}: mean score over targets")
        for place, size in enumerate(plan.sizes):
            _text(svg, show_size(size), x.at(place), top + height + 18, "middle")
        for nudge, name in enumerate(names):
            values = [story.average(name, readout, size) for size in plan.sizes]
            _series(svg, [(x.at(i) + 3 * (nudge - 2), v) for i, v in enumerate(values)], y, _COLOURS[name])
    _legend(svg, names, top + height + 45)
    return tostring(svg, encoding="unicode") + "\n"


def update_plot(story: Story) -> str:
    """Tokens through the backbone, on a logarithmic scale, against the score with most examples."""
    size = story.plan.sizes[-1]
    left, top, width, height = _PANEL
    svg = _svg(2 * (left + width) + 30, top + height + 80)
    every = [v for name in TOGETHER for readout in READOUTS for v in story.average(name, readout, size)]
    y = _scale(every, top + height, top)
    costs = {name: math.log10(max(1.0, story.cost(name, lambda o: o.tokens))) for name in TOGETHER}
    low, high = math.floor(min(costs.values())), math.floor(max(costs.values())) + 1
    for index, readout in enumerate(READOUTS):
        start = left + index * (left + width)
        x = _Scale(low, high, start + 15, start + width - 15)
        _frame(svg, start, y, f"{heads_of(readout)}: mean score over targets, {show_size(size)}")
        for power in range(low, high + 1):
            _text(svg, f"{10**power:,}", x.at(power), top + height + 18, "middle")
        _text(svg, "tokens through the backbone to take the source in", start + width / 2, top + height + 36, "middle")
        for name in TOGETHER:
            _series(svg, [(x.at(costs[name]), story.average(name, readout, size))], y, _COLOURS[name])
    _legend(svg, TOGETHER, top + height + 62)
    return tostring(svg, encoding="unicode") + "\n"


def _svg(width: float, height: float) -> Element:
    box = f"0 0 {width:g} {height:g}"
    style = "font-family: sans-serif; font-size: 11px"
    svg = Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "viewBox": box, "width": f"{width:g}", "style": style})
    SubElement(svg, "rect", {"width": "100%", "height": "100%", "fill": "#ffffff"})
    return svg


def _scale(values: Sequence[float], start: float, stop: float) -> _Scale:
    """From the tenth below to the tenth above, where there is that much between."""
    step = 0.1 if max(values) - min(values) > 0.1 else 0.02
    low, high = math.floor(min(values) / step) * step, math.ceil(max(values) / step) * step
    return _Scale(low, max(high, low + step), start, stop)


def _frame(svg: Element, left: float, y: _Scale, title: str) -> None:
    width = _PANEL[2]
    _text(svg, title, left, y.stop - 14, "start")
    for index in range(6):
        value = y.low + (y.high - y.low) * index / 5
        _line(svg, [(left, y.at(value)), (left + width, y.at(value))], "#dddddd", 1)
        _text(svg, f"{value:.3f}", left - 6, y.at(value) + 4, "end")


def _series(svg: Element, points: Sequence[tuple[float, Sequence[float]]], y: _Scale, colour: str) -> None:
    """A line through means, each with a bar of one standard deviation to each side."""
    _line(svg, [(x, y.at(mean(values))) for x, values in points], colour, 2)
    for x, values in points:
        middle, spread = mean(values), stdev(values) if len(values) > 1 else 0.0
        _line(svg, [(x, y.at(middle - spread)), (x, y.at(middle + spread))], colour, 1)
        SubElement(svg, "circle", {"cx": f"{x:.1f}", "cy": f"{y.at(middle):.1f}", "r": "3.5", "fill": colour})


def _legend(svg: Element, names: Sequence[str], top: float) -> None:
    for index, name in enumerate(names):
        x, y = _PANEL[0] + 220 * (index % 3), top + 18 * (index // 3)
        _line(svg, [(x, y - 4), (x + 18, y - 4)], _COLOURS[name], 3)
        _text(svg, name, x + 24, y, "start")


def _line(svg: Element, points: Sequence[tuple[float, float]], colour: str, width: float) -> None:
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    SubElement(svg, "polyline", {"points": places, "fill": "none", "stroke": colour, "stroke-width": f"{width:g}"})


def _text(svg: Element, text: str, x: float, y: float, anchor: str) -> None:
    attributes = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor, "fill": "#333333"}
    SubElement(svg, "text", attributes).text = text
