"""Charts as inline SVG: lines with bands, and stacked bars. Colours are classes, so that the page's theme decides them.

What the pointer shows stands as JSON in the attribute `data-chart`. Knows numbers and labels, nothing of runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import final

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 230, 54, 10, 10, 26
"""Of the drawing, and the margins that hold the axes' numbers."""
COLORS = 8
"""Colours of the page, used in turn; the last one is grey."""
NEUTRAL = COLORS - 1
"""Colour of what belongs to no curve."""
POINTS = 600
"""Most points of a line that are drawn; of more, each stretch keeps its least and its greatest."""
BARS = 60
"""Most bars of a stack; more steps are averaged."""


@final
@dataclass(frozen=True, slots=True)
class Line:
    """One curve; NaN is a gap."""

    label: str
    steps: Sequence[int]
    values: Sequence[float]
    color: int = 0
    dashed: bool = False
    spread: Sequence[float] = ()
    """Half the height of a band around the curve; empty for none."""


@final
@dataclass(frozen=True, slots=True)
class Level:
    """A horizontal dotted line, such as a target."""

    label: str
    value: float
    color: int = 0


@final
@dataclass(frozen=True, slots=True)
class Layer:
    """One part of a stack: a value for each step."""

    label: str
    values: Sequence[float]


@final
@dataclass(frozen=True, slots=True)
class _Frame:
    """From steps and values to places in the drawing."""

    x: tuple[float, float]
    y: tuple[float, float]

    def across(self, step: float) -> float:
        low, high = self.x
        return LEFT + (step - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def down(self, value: float) -> float:
        low, high = self.y
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def line_chart(title: str, lines: Sequence[Line], levels: Sequence[Level] = ()) -> str:
    """An SVG of curves over steps; lines without a finite value are left out."""
    drawn = [thinned(line) for line in lines if any(map(math.isfinite, line.values))]
    frame = _Frame(_limits_of_steps([s for line in drawn for s in line.steps]),
                   limits([*_extent(drawn), *(level.value for level in levels)]))
    body = [_axes(frame), *(_band(line, frame) for line in drawn if len(line.spread)),
            *(_curve(line, frame) for line in drawn), *(_level(level, frame) for level in levels)]
    hover = [{"label": line.label, "color": line.color % COLORS, "steps": list(line.steps),
              "values": [_short(v) for v in line.values]} for line in drawn]
    hover += [{"label": level.label, "color": level.color % COLORS, "steps": [frame.x[0]],
               "values": [_short(level.value)]} for level in levels]
    return _svg(title, "".join(body), hover, frame)


def stacked_chart(title: str, steps: Sequence[int], layers: Sequence[Layer]) -> str:
    """An SVG of stacked bars over steps; more than `BARS` steps are averaged in equal stretches."""
    n, bars_in_all = len(steps), min(BARS, len(steps))
    cuts = [range(i * n // bars_in_all, (i + 1) * n // bars_in_all) for i in range(bars_in_all)]
    heights = [[sum(layer.values[i] for i in cut) / len(cut) for cut in cuts] for layer in layers]
    gap = steps[1] - steps[0] if len(steps) > 1 else 1
    frame = _Frame((steps[0] - gap / 2, steps[-1] + gap / 2), limits([0.0, *map(sum, zip(*heights))]))
    edges = [steps[cut[0]] - gap / 2 for cut in cuts] + [steps[-1] + gap / 2]
    bars, below = [], [0.0] * len(cuts)
    for color, layer_heights in enumerate(heights):
        for i, height in enumerate(layer_heights):
            left, right = frame.across(edges[i]), frame.across(edges[i + 1])
            top, bottom = frame.down(below[i] + height), frame.down(below[i])
            bars.append(f'<rect class="c{color % COLORS} bar" x="{left:.1f}" y="{top:.1f}" '
                        f'width="{max(right - left - 0.6, 0.4):.1f}" height="{bottom - top:.2f}"/>')
            below[i] += height
    centres = [steps[cut[len(cut) // 2]] for cut in cuts]
    hover = [{"label": layer.label, "color": color % COLORS, "steps": centres, "values": [_short(v) for v in column]}
             for color, (layer, column) in enumerate(zip(layers, heights))]
    return _svg(title, _axes(frame) + "".join(bars), hover, frame)


def thinned(line: Line) -> Line:
    """At most about `POINTS` points of a line: the least and the greatest of each stretch, the first and the last.

    >>> len(thinned(Line("a", range(10_000), [float(i % 7) for i in range(10_000)])).steps) <= POINTS + 2
    True
    """
    n = len(line.steps)
    if n <= POINTS:
        return line
    kept = {0, n - 1}
    for k in range(POINTS // 2):
        stretch = [i for i in range(k * n * 2 // POINTS, (k + 1) * n * 2 // POINTS) if math.isfinite(line.values[i])]
        if stretch:
            kept |= {min(stretch, key=line.values.__getitem__), max(stretch, key=line.values.__getitem__)}
    chosen = sorted(kept)
    return Line(line.label, [line.steps[i] for i in chosen], [line.values[i] for i in chosen], line.color, line.dashed,
                [line.spread[i] for i in chosen] if len(line.spread) else ())


def limits(values: Sequence[float]) -> tuple[float, float]:
    """The range of an axis that holds all finite values, with some air; it begins at 0 rather than just below.

    >>> limits([1.0, 1.0])
    (0.9, 1.1)
    """
    finite = [v for v in values if math.isfinite(v)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    air = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    return (0.0 if low >= 0 and low - air < 0 else low - air), high + air


def ticks(low: float, high: float, most: int = 5, whole: bool = False) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) inside a range, about `most` of them.

    >>> ticks(0.0, 1.05)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= 0.75 * rough)
    step = max(step, 1.0) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def _limits_of_steps(steps: Sequence[int]) -> tuple[float, float]:
    low, high = (min(steps), max(steps)) if steps else (0, 1)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _extent(lines: Sequence[Line]) -> Iterator[float]:
    for line in lines:
        yield from line.values
        yield from (v + sign * s for v, s in zip(line.values, line.spread) for sign in (-1, 1))


def _axes(frame: _Frame) -> str:
    parts, right, foot = [], WIDTH - RIGHT, HEIGHT - BOTTOM
    for value in ticks(*frame.y):
        y = frame.down(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text class="tick end" x="{LEFT - 6}" y="{y + 3.5:.1f}">{_number(value)}</text>')
    for step in ticks(*frame.x, most=6, whole=True):
        x = frame.across(step)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{foot}" y2="{foot + 4}"/>'
                     f'<text class="tick middle" x="{x:.1f}" y="{foot + 16}">{_number(step)}</text>')
    return "".join(parts) + f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{foot}" y2="{foot}"/>'


def _curve(line: Line, frame: _Frame) -> str:
    kind = f"c{line.color % COLORS} curve{' dashed' if line.dashed else ''}"
    pieces = [[(frame.across(line.steps[i]), frame.down(line.values[i])) for i in piece] for piece in _pieces(line)]
    paths = "".join("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in piece) for piece in pieces if len(piece) > 1)
    alone = pieces if len(line.steps) <= 25 else [piece for piece in pieces if len(piece) == 1]
    dots = "".join(f'<circle class="c{line.color % COLORS} dot" cx="{x:.1f}" cy="{y:.1f}" r="2.2"/>'
                   for piece in alone for x, y in piece)
    return (f'<path class="{kind}" d="{paths}"/>' if paths else "") + dots


def _band(line: Line, frame: _Frame) -> str:
    shapes = []
    for piece in _pieces(line):
        spread = [line.spread[i] if math.isfinite(line.spread[i]) else 0.0 for i in piece]
        upper = [(line.steps[i], line.values[i] + s) for i, s in zip(piece, spread)]
        lower = [(line.steps[i], line.values[i] - s) for i, s in zip(piece, spread)]
        points = " ".join(f"{frame.across(x):.1f},{frame.down(y):.1f}" for x, y in [*upper, *reversed(lower)])
        shapes.append(f'<polygon class="c{line.color % COLORS} band" points="{points}"/>')
    return "".join(shapes)


def _level(level: Level, frame: _Frame) -> str:
    y = frame.down(level.value)
    return (f'<line class="c{level.color % COLORS} curve dotted" x1="{LEFT}" x2="{WIDTH - RIGHT}" '
            f'y1="{y:.1f}" y2="{y:.1f}"/>')


def _pieces(line: Line) -> list[list[int]]:
    """Stretches of a line without a gap, as indices."""
    finite = groupby(range(len(line.values)), key=lambda i: math.isfinite(line.values[i]))
    return [list(indices) for there, indices in finite if there]


def _number(value: float) -> str:
    """A tick's number: `20k`, `0.05`, `1e-05`."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if abs(value) >= 1e4 else f"{value:g}"


def _short(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _svg(title: str, body: str, hover: Sequence[object], frame: _Frame) -> str:
    data = escape(json.dumps({"x": frame.x, "left": LEFT, "right": WIDTH - RIGHT, "lines": hover},
                             separators=(",", ":")))
    return (f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" data-chart="{data}">'
            f'{body}<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg>')
