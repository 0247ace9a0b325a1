"""Small charts as SVG: numbers in, markup out. Knows geometry; nothing of tasks or pages.

Colours and letters are the page's own: every shape carries a class. Nothing is drawn of numbers that are not finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, SubElement, tostring

_LEFT, _RIGHT, _TOP, _BOTTOM = 44.0, 12.0, 26.0, 40.0  # margins around a plot
_LABEL_GAP = 14.0  # between the baselines of two numbers
_LABEL_OFFSET = 15.0  # from a dot to its number
_CLUSTER = 46.0  # dots that are nearer to each other share a column of numbers


_STYLE = """
svg { background: #fff; font: 11.5px sans-serif; }
text { fill: #555; } .middle { text-anchor: middle; } .end { text-anchor: end; }
polyline { fill: none; } .grid { stroke: #ddd; } .axis { stroke: #888; } .leader { stroke: #888; stroke-width: .7; }
.line { stroke: #4269d0; stroke-width: 1.8; opacity: .6; } .band { fill: #4269d0; opacity: .15; }
.dot { fill: #fff; stroke: #4269d0; stroke-width: 1.8; } .dot.chosen { fill: #d0552b; stroke: #d0552b; }
.number { fill: #111; } .number.chosen { font-weight: 700; }
"""


@dataclass(frozen=True, slots=True)
class Mark:
    """One numbered dot."""

    number: int
    x: float
    y: float
    chosen: bool = False


@dataclass(frozen=True, slots=True)
class Bubble:
    x: float
    y: float
    count: int


@dataclass(frozen=True, slots=True)
class _Axis:
    """Values from `low` to `high` lie at pixels from `start` to `stop`."""

    name: str
    low: float
    high: float
    start: float
    stop: float
    whole: bool = False  # ticks at whole numbers alone

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)

    @property
    def step(self) -> float:
        """1, 2 or 5 times a power of ten, for about five ticks."""
        rough = (self.high - self.low) / 5
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough * (1 - 1e-9))
        return max(1.0, step) if self.whole else step

    def ticks(self) -> list[tuple[float, str]]:
        step = self.step
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        first, last = math.ceil(self.low / step - 1e-6), math.floor(self.high / step + 1e-6)
        return [(n * step, f"{n * step:.{digits}f}") for n in range(first, last + 1)]


def curve(marks: Sequence[Mark], tolerance: float | None, x_name: str, y_name: str, wanted: float | None = None) -> str:
    """Dots of quality (up) against cost (right), the best quality at each cost, and the band that counts as equal to
    what is `wanted` (None: the best)."""
    marks = [mark for mark in marks if math.isfinite(mark.x) and math.isfinite(mark.y)]
    if not marks:
        return ""
    width, height = 460.0, 300.0
    best = max(mark.y for mark in marks) if wanted is None else wanted
    floor = best if tolerance is None else best - tolerance
    low_x, high_x = _widened([mark.x for mark in marks], 0.5)
    low_y, high_y = _widened([floor, *(mark.y for mark in marks)], 0.01)
    x = _Axis(x_name, low_x, high_x, _LEFT + 16, width - _RIGHT - 34)
    y = _Axis(y_name, low_y, high_y, height - _BOTTOM - 14, _TOP + 14)
    svg = _svg("curve", (width, height), f"{y_name} against {x_name}", _told(marks, x_name, y_name))
    if tolerance is not None:
        top, bottom = y.at(best), y.at(floor)
        _shape(svg, "rect", "band", x=_LEFT, y=top, width=width - _RIGHT - _LEFT, height=bottom - top)
    _axes(svg, x, y, (_LEFT, width - _RIGHT), (_TOP, height - _BOTTOM))
    _path(svg, "line", _stairs([(x.at(mark.x), y.at(mark.y)) for mark in marks]))
    for mark, (label_x, label_y) in _labelled(marks, x, y):
        kind = " chosen" if mark.chosen else ""
        _path(svg, "leader", [(x.at(mark.x), y.at(mark.y)), (label_x - 2, label_y)])
        _text(svg, f"number{kind}", str(mark.number), label_x, label_y + 4)
    for mark in sorted(marks, key=lambda mark: mark.chosen):
        _shape(svg, "circle", "dot chosen" if mark.chosen else "dot", cx=x.at(mark.x), cy=y.at(mark.y), r=4.5)
    return tostring(svg, encoding="unicode")


def standalone(svg: str) -> str:
    """A chart as a file of its own, with letters and colours that a page would give it."""
    head, _, rest = svg.partition(">")
    head = head.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg" width="690"', 1)
    return f"{head}><style>{_STYLE}</style>{rest}\n" if svg else ""


def reliability(bubbles: Sequence[Bubble]) -> str:
    """How often scores of a confidence are right; on the diagonal they are what they say."""
    bubbles = [bubble for bubble in bubbles if math.isfinite(bubble.x) and math.isfinite(bubble.y)]
    if not bubbles:
        return ""
    width, height = 320.0, 300.0
    x = _Axis("confidence", 0.0, 1.0, _LEFT, width - _RIGHT)
    y = _Axis("share that is right", 0.0, 1.0, height - _BOTTOM, _TOP)
    told = "; ".join(f"at {b.x:.2f} {b.y:.2f} of {b.count} are right" for b in bubbles)
    svg = _svg("reliability", (width, height), "Share that is right against confidence", told)
    _axes(svg, x, y, (x.start, x.stop), (y.stop, y.start))
    _path(svg, "diagonal", [(x.start, y.start), (x.stop, y.stop)])
    places = [(x.at(bubble.x), y.at(bubble.y)) for bubble in bubbles]
    _path(svg, "line", places)
    most = max(1, *(bubble.count for bubble in bubbles))
    for (cx, cy), bubble in zip(places, bubbles, strict=True):
        _shape(svg, "circle", "dot", cx=cx, cy=cy, r=2.5 + 6 * math.sqrt(bubble.count / most))
    return tostring(svg, encoding="unicode")


def line(name: str, points: Sequence[tuple[float, float]], y_name: str, marked: float | None = None) -> str:
    """Values by epochs done; the one at `marked` stands out. `name` is unique on the page."""
    points = [point for point in points if math.isfinite(point[1])]
    if not points:
        return ""
    width, height = 320.0, 210.0
    low_x, high_x = _widened([number for number, _ in points], 1.0)
    low_y, high_y = _widened([value for _, value in points], 0.01)
    x = _Axis("epoch", low_x, high_x, _LEFT + 10, width - _RIGHT - 10, whole=True)
    y = _Axis(y_name, low_y, high_y, height - _BOTTOM - 8, _TOP + 8)
    told = "; ".join(f"{number}: {value:.3f}" for number, value in points)
    svg = _svg(name, (width, height), f"{y_name} by epoch", told)
    _axes(svg, x, y, (_LEFT, width - _RIGHT), (_TOP, height - _BOTTOM))
    places = [(x.at(number), y.at(value)) for number, value in points]
    _path(svg, "line", places)
    for (cx, cy), (number, _) in zip(places, points, strict=True):
        chosen = number == marked
        _shape(svg, "circle", "dot chosen" if chosen else "dot", cx=cx, cy=cy, r=4.5 if chosen else 2.5)
    return tostring(svg, encoding="unicode")


def scatter(points: Sequence[tuple[float, float]], x_name: str, y_name: str) -> str:
    """Values found against values that are right, and the diagonal on which they agree."""
    points = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if not points:
        return ""
    width, height = 320.0, 300.0
    low, high = _widened([value for point in points for value in point], 1e-6)
    x = _Axis(x_name, low, high, _LEFT + 6, width - _RIGHT - 6)
    y = _Axis(y_name, low, high, height - _BOTTOM - 6, _TOP + 6)
    svg = _svg("scatter", (width, height), f"{y_name} against {x_name}", f"{len(points)} texts")
    _axes(svg, x, y, (_LEFT, width - _RIGHT), (_TOP, height - _BOTTOM))
    _path(svg, "diagonal", [(x.start, y.start), (x.stop, y.stop)])
    for given, found in points:
        _shape(svg, "circle", "small", cx=x.at(given), cy=y.at(found), r=2.2)
    return tostring(svg, encoding="unicode")


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """For ascending places the nearest ones in [low, high] that lie `gap` apart, or evenly where it is too narrow."""
    gap = min(gap, (high - low) / max(1, len(wanted) - 1))
    placed: list[float] = []
    for place in wanted:
        placed.append(max(place, placed[-1] + gap if placed else low))
    limit = high
    for index in reversed(range(len(placed))):
        placed[index] = min(placed[index], limit)
        limit = placed[index] - gap
    return placed


def _labelled(marks: Sequence[Mark], x: _Axis, y: _Axis) -> Iterable[tuple[Mark, tuple[float, float]]]:
    """Where each dot's number stands: right of its cluster, no number on another."""
    for cluster in _clusters(marks, x):
        column = max(x.at(mark.x) for mark in cluster) + _LABEL_OFFSET
        ordered = sorted(cluster, key=lambda mark: (y.at(mark.y), mark.number))
        rows = spread([y.at(mark.y) for mark in ordered], _LABEL_GAP, _TOP + 6, y.start)
        yield from ((mark, (column, row)) for mark, row in zip(ordered, rows, strict=True))


def _clusters(marks: Sequence[Mark], x: _Axis) -> list[list[Mark]]:
    clusters: list[list[Mark]] = []
    for mark in sorted(marks, key=lambda mark: mark.x):
        if clusters and x.at(mark.x) - x.at(clusters[-1][-1].x) < _CLUSTER:
            clusters[-1].append(mark)
        else:
            clusters.append([mark])
    return clusters


def _stairs(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Corners of the line along the best dot so far, from left to right; pixels count downwards."""
    corners: list[tuple[float, float]] = []
    for x, y in sorted(places):
        if not corners:
            corners.append((x, y))
        elif y < corners[-1][1]:
            corners += [(x, corners[-1][1]), (x, y)]
    return [*corners, (max(x for x, _ in places), corners[-1][1])]


def _told(marks: Sequence[Mark], x_name: str, y_name: str) -> str:
    told = (f"{m.number}{' (chosen)' if m.chosen else ''}: {y_name} {m.y:.3f} at {m.x:.2f} {x_name}" for m in marks)
    return "; ".join(told)


def _widened(values: Sequence[float], least: float) -> tuple[float, float]:
    """The range of values, at least so wide around its middle."""
    low, high = min(values), max(values)
    missing = max(0.0, least - (high - low)) / 2
    return low - missing, high + missing


def _svg(name: str, size: tuple[float, float], title: str, description: str) -> Element:
    names = f"{name}-title", f"{name}-desc"
    box = f"0 0 {size[0]:g} {size[1]:g}"
    svg = Element("svg", {"viewBox": box, "role": "img", "aria-labelledby": " ".join(names), "class": f"chart {name}"})
    for tag, identity, text in zip(("title", "desc"), names, (title, description), strict=True):
        SubElement(svg, tag, {"id": identity}).text = text
    return svg


def _axes(svg: Element, x: _Axis, y: _Axis, across: tuple[float, float], down: tuple[float, float]) -> None:
    """Grid, ticks and names; the plot reaches over the pixels `across` and `down`."""
    for value, text in y.ticks():
        _path(svg, "grid", [(across[0], y.at(value)), (across[1], y.at(value))])
        _text(svg, "tick end", text, across[0] - 6, y.at(value) + 4)
    for value, text in x.ticks():
        _path(svg, "grid", [(x.at(value), down[1]), (x.at(value), down[1] + 4)])
        _text(svg, "tick middle", text, x.at(value), down[1] + 16)
    _path(svg, "axis", [(across[0], down[1]), (across[1], down[1])])
    _text(svg, "name middle", x.name, sum(across) / 2, down[1] + 34)
    _text(svg, "name", y.name, 2, 13)


def _path(svg: Element, kind: str, places: Sequence[tuple[float, float]]) -> None:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    SubElement(svg, "polyline", {"class": kind, "points": points})


def _shape(svg: Element, tag: str, kind: str, **numbers: float) -> None:
    SubElement(svg, tag, {"class": kind} | {name: f"{number:.1f}" for name, number in numbers.items()})


def _text(svg: Element, kind: str, text: str, x: float, y: float) -> None:
    SubElement(svg, "text", {"class": kind, "x": f"{x:.1f}", "y": f"{y:.1f}"}).text = text
