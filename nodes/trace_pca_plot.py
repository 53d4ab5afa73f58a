"""The plot of a PCA of traces: one panel per step, all in the same plane."""

from __future__ import annotations

import colorsys
import math

from torch import Tensor

from ..hyperalign.trace_pca import Spread
from .drawing import DARK
from .plotting import FAINT, INSIDE, LINE, Axis, Canvas, Colour, shares_text, tick_text, ticks

COLUMNS, SIDE = 3, 280
LEFT, HEAD, GAP, FOOT = 74, 116, 44, 76
COLOURS: tuple[Colour, ...] = (
    (56, 189, 248), (250, 204, 21), (244, 114, 182), (74, 222, 128), (251, 146, 60), (167, 139, 250),
    (248, 250, 252), (45, 212, 191),
)  # fmt: skip


def trace_pca_plot(spread: Spread) -> Tensor:
    """Returns the scatter plots of the weights at each step as one image (1, H, W, 3)."""
    panels = len(spread.evaluations)
    columns, rows = min(COLUMNS, panels), math.ceil(panels / COLUMNS)
    width = max(LEFT + columns * (SIDE + 18) + 10, 640)
    canvas = Canvas(width, HEAD + rows * (SIDE + GAP) - GAP + FOOT)
    count = len(set(spread.traces))
    canvas.text((16, 24), "PCA of the generated weights", size=20)
    facts = f"{len(spread.traces)} samples from {count} {'traces' if count > 1 else 'trace'}, on their two principal components"
    canvas.text((16, 50), facts, FAINT, 14)
    canvas.text((16, 70), shares_text(spread.shares), FAINT, 13)
    (low_x, high_x), (low_y, high_y) = _range(spread.places_SN2[..., 0]), _range(spread.places_SN2[..., 1])
    for panel in range(panels):
        left = LEFT + panel % COLUMNS * (SIDE + 18)
        top = HEAD + panel // COLUMNS * (SIDE + GAP)
        x, y = Axis(low_x, high_x, left, left + SIDE), Axis(low_y, high_y, top + SIDE, top)
        _panel(canvas, spread, panel, x, y)
        title = f"evaluation {spread.evaluations[panel] + 1}, u {spread.times[panel]:.2f}"
        canvas.text((left, top - 13), title, size=13)
        canvas.text((left + SIDE, top - 13), f"spread {spread.spreads[panel]:.2f}", FAINT, 13, "rm")
        if panel % COLUMNS == 0:
            _labels_y(canvas, y, left)
        if panel + COLUMNS >= panels:
            _labels_x(canvas, x, top + SIDE)
    _foot(canvas, spread, count)
    return canvas.finished()


def _panel(canvas: Canvas, spread: Spread, panel: int, x: Axis, y: Axis) -> None:
    left, right, top, bottom = x(x.low), x(x.high), y(y.high), y(y.low)
    canvas.box((left, top, right, bottom), INSIDE)
    for level in _inner(x):
        canvas.line([(x(level), top), (x(level), bottom)], LINE, 1)
    for level in _inner(y):
        canvas.line([(left, y(level)), (right, y(level))], LINE, 1)
    colours = _colours(len(set(spread.traces)))
    radius = 5 if len(spread.traces) <= 40 else 3.5
    for trace, (first, second) in zip(spread.traces, spread.places_SN2[panel].tolist(), strict=True):
        canvas.dot((x(first), y(second)), radius, colours[trace], DARK)


def _labels_x(canvas: Canvas, x: Axis, bottom: float) -> None:
    levels = _inner(x)
    for level in levels:
        canvas.text((x(level), bottom + 13), tick_text(level, levels[1] - levels[0]), FAINT, 12, "mm")


def _labels_y(canvas: Canvas, y: Axis, left: float) -> None:
    levels = _inner(y)
    for level in levels:
        canvas.text((left - 8, y(level)), tick_text(level, levels[1] - levels[0]), FAINT, 12, "rm")


def _foot(canvas: Canvas, spread: Spread, count: int) -> None:
    first, second = (f"{part:.0%}" for part in spread.explained)
    text = f"horizontal: PC 1, {first} of the variance      vertical: PC 2, {second}"
    canvas.text((LEFT, canvas.height - 40), text, FAINT, 13)
    at = float(LEFT)
    for place, colour in enumerate(_colours(count)):
        if not 1 < count <= len(COLOURS):
            break
        canvas.dot((at + 5, canvas.height - 16), 5, colour, DARK)
        at += canvas.text((at + 15, canvas.height - 16), f"trace {place + 1}", FAINT, 13) + 36


def _range(values: Tensor) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    margin = max(0.06 * (high - low), 1e-6)
    return low - margin, high + margin


def _inner(axis: Axis) -> list[float]:
    levels = ticks(axis.low, axis.high, 5)
    return [level for level in levels if axis.low <= level <= axis.high]


def _colours(count: int) -> list[Colour]:
    """Returns a colour per trace: from a palette for few, evenly spaced hues for many."""
    if count <= len(COLOURS):
        return [*COLOURS[:count]]
    shades = (colorsys.hls_to_rgb(0.85 * place / count, 0.65, 0.8) for place in range(count))
    return [(round(255 * r), round(255 * g), round(255 * b)) for r, g, b in shades]
