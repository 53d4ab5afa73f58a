"""The preview of a strength curve."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ..hyperalign.strength import GROUPS, StrengthCurve
from .drawing import LIGHT
from .plotting import BLUE, FAINT, INSIDE, LINE, PINK, YELLOW, Axis, Canvas, Colour, Point

WIDTH, HEIGHT = 512, 320
LEFT, TOP, RIGHT, BOTTOM = 48, 36, 492, 270
COLOURS = (BLUE, YELLOW, PINK)
"""Of the early, middle and late blocks; also distinguishable with colour blindness."""
LEAST_LABEL_GAP = 14
"""Least distance in pixels between two labels of the vertical axis."""
MOST_DOTS = 32
"""A curve of more values is plotted without a dot for each."""
SEGMENTS = 240
"""Straight lines that make up an eased curve."""


def strength_plot(curve: StrengthCurve) -> Tensor:
    """Returns the strength of each group of blocks over sampling as one image (1, H, W, 3)."""
    plot = _Plot(curve)
    plot.axes()
    plot.curves()
    return plot.canvas.finished()


class _Plot:
    def __init__(self, curve: StrengthCurve) -> None:
        self.canvas = Canvas(WIDTH, HEIGHT)
        self._curve = curve
        heights = [value * factor for value in curve.values for factor in curve.groups]
        self._x = Axis(0.0, 1.0, LEFT, RIGHT)
        self._y = Axis(min(0.0, *heights), max(1.0, *heights), BOTTOM, TOP)

    def axes(self) -> None:
        """Draws the window, the levels and the percents."""
        x, y = self._x, self._y
        start, end = self._curve.window
        self.canvas.box((x(start), y(y.high), x(end), y(y.low)), INSIDE)
        shown: list[float] = []
        for level in (0.0, 1.0, y.high, y.low):
            if all(abs(y(level) - y(other)) > LEAST_LABEL_GAP for other in shown):
                shown.append(level)
                self.canvas.line([(LEFT, y(level)), (RIGHT, y(level))], LINE, 1)
                self.canvas.text((LEFT - 8, y(level)), f"{level:.3g}", FAINT, anchor="rm")
        for percent in (0.0, 0.25, 0.5, 0.75, 1.0):
            self.canvas.text((x(percent), BOTTOM + 8), f"{percent:.0%}", FAINT, anchor="mt")
        middle = (LEFT + RIGHT) / 2, HEIGHT - 13
        self.canvas.text(middle, "strength during sampling, from pure noise to image", FAINT, anchor="mm")

    def curves(self) -> None:
        """Draws the legend and a line for each group."""
        lines = list(self._lines())
        for place, (name, factor, colour) in enumerate(lines):
            left = LEFT + (RIGHT - LEFT) / len(lines) * place
            self.canvas.text((left, 18), f"{name} x {factor:.3g}", colour)
            self.canvas.line(self._points(factor), colour, 3)
            if len(self._curve.values) <= MOST_DOTS:
                self._dots(factor, colour)

    def _lines(self) -> Iterator[tuple[str, float, Colour]]:
        """Yields name, factor and colour of each line; groups with the same factor share one."""
        groups = list(zip(GROUPS, self._curve.groups, COLOURS, strict=True))
        for factor in dict.fromkeys(self._curve.groups):
            names = [name for name, other, _ in groups if other == factor]
            colour = next(colour for _, other, colour in groups if other == factor)
            if len(names) == len(GROUPS):
                yield "all blocks", factor, LIGHT
            else:
                yield f"{' and '.join(names)} blocks", factor, colour

    def _points(self, factor: float) -> list[Point]:
        """Returns a line over the whole of sampling, at 0 outside the window."""
        start, end = self._curve.window
        inside = [start + (end - start) * i / SEGMENTS for i in range(SEGMENTS + 1)]
        before = [(0.0, 0.0), (start, 0.0)] if start > 0.0 else []
        after = [(end, 0.0), (1.0, 0.0)] if end < 1.0 else []
        curve = ((percent, factor * self._curve.at(percent)) for percent in inside)
        return [(self._x(percent), self._y(strength)) for percent, strength in (*before, *curve, *after)]

    def _dots(self, factor: float, colour: Colour) -> None:
        start, end = self._curve.window
        for index, value in enumerate(self._curve.values):
            percent = start + (end - start) * index / max(len(self._curve.values) - 1, 1)
            self.canvas.dot((self._x(percent), self._y(factor * value)), 4, colour)
