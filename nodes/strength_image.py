"""The preview of a strength curve."""

from __future__ import annotations

from collections.abc import Iterator

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..hyperalign.strength import GROUPS, StrengthCurve
from .drawing import DARK, LIGHT, to_tensor

Colour = tuple[int, int, int]
WIDTH, HEIGHT = 512, 320
LEFT, TOP, RIGHT, BOTTOM = 48, 36, 492, 270
INSIDE, LINE, FAINT = (39, 39, 42), (82, 82, 91), (161, 161, 170)
COLOURS = ((56, 189, 248), (250, 204, 21), (244, 114, 182))
"""Of the early, middle and late blocks; the colour-blind tell them apart too."""
SCALE = 3
"""Drawn larger and shrunk, for smooth lines."""
MANY = 33
"""From how many values on a list is drawn without dots."""


def image(curve: StrengthCurve) -> Tensor:
    """Returns the curve of each group of blocks over the run, (1, H, W, 3)."""
    canvas = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), DARK)
    _Plot(curve, ImageDraw.Draw(canvas)).draw()
    return to_tensor(canvas.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS))[None]


class _Plot:
    def __init__(self, curve: StrengthCurve, pen: ImageDraw.ImageDraw) -> None:
        self._curve = curve
        self._pen = pen
        heights = [value * factor for value in curve.values for factor in curve.groups]
        self._low, self._high = min(0.0, *heights), max(1.0, *heights)

    def draw(self) -> None:
        """Draws axes, legend and lines."""
        self._axes()
        lines = list(self._lines())
        for place, (name, factor, colour) in enumerate(lines):
            self._text(LEFT + (RIGHT - LEFT) / len(lines) * place, 18, f"{name} x {factor:.3g}", colour, "lm")
            self._line(self._points(factor), colour, 3)
            if len(self._curve.values) < MANY:
                self._dots(factor, colour)

    def _axes(self) -> None:
        start, end = self._curve.window
        corners = self._x(start), self._y(self._high), self._x(end), self._y(self._low)
        self._pen.rectangle([SCALE * corner for corner in corners], fill=INSIDE)
        shown: list[float] = []
        for level in (0.0, 1.0, self._high, self._low):
            if all(abs(self._y(level) - self._y(other)) > 14 for other in shown):
                shown.append(level)
                self._line([(0.0, level), (1.0, level)], LINE, 1)
                self._text(LEFT - 8, self._y(level), f"{level:.3g}", FAINT, "rm")
        for percent in (0.0, 0.25, 0.5, 0.75, 1.0):
            self._text(self._x(percent), BOTTOM + 8, f"{percent:.0%}", FAINT, "mt")
        self._text((LEFT + RIGHT) / 2, HEIGHT - 13, "strength over the run, from noise to image", FAINT, "mm")

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

    def _points(self, factor: float) -> list[tuple[float, float]]:
        """Returns a line over the whole run, on 0 outside the window."""
        start, end = self._curve.window
        inside = [start + (end - start) * i / 240 for i in range(241)]
        before = [(0.0, 0.0), (start, 0.0)] if start > 0.0 else []
        after = [(end, 0.0), (1.0, 0.0)] if end < 1.0 else []
        return [*before, *((percent, factor * self._curve.at(percent)) for percent in inside), *after]

    def _dots(self, factor: float, colour: Colour) -> None:
        start, end = self._curve.window
        for index, value in enumerate(self._curve.values):
            percent = start + (end - start) * index / max(len(self._curve.values) - 1, 1)
            x, y = self._x(percent), self._y(factor * value)
            self._pen.ellipse([SCALE * corner for corner in (x - 4, y - 4, x + 4, y + 4)], fill=colour)

    def _x(self, percent: float) -> float:
        return LEFT + (RIGHT - LEFT) * percent

    def _y(self, strength: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (strength - self._low) / (self._high - self._low)

    def _line(self, points: list[tuple[float, float]], colour: Colour, width: int) -> None:
        places = [(SCALE * self._x(percent), SCALE * self._y(strength)) for percent, strength in points]
        self._pen.line(places, fill=colour, width=SCALE * width, joint="curve")

    def _text(self, x: float, y: float, text: str, colour: Colour, anchor: str) -> None:
        font = ImageFont.load_default(13 * SCALE)
        self._pen.text((SCALE * x, SCALE * y), text, fill=colour, font=font, anchor=anchor)
