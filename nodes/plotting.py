"""A supersampled canvas with lines, text, axes and colour scales, shared by all plots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..hyperalign.conditioning import percent
from .drawing import DARK, LIGHT, to_tensor

Colour = tuple[int, int, int]
Point = tuple[float, float]
Box = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels of the finished image like all coordinates here."""
INSIDE, LINE, FAINT = (39, 39, 42), (82, 82, 91), (175, 175, 184)
BLUE, YELLOW, PINK, GREEN = (56, 189, 248), (250, 204, 21), (244, 114, 182), (74, 222, 128)
SCALE_STOPS = ((42, 16, 84), (62, 74, 137), (38, 130, 142), (53, 183, 121), (253, 231, 37))
"""From low to high, with rising lightness, so that the order survives grey prints and colour blindness."""
FACTOR = 2
"""Supersampling factor, for smooth lines."""


class Canvas:
    """A dark image to draw on."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._image = Image.new("RGB", (width * FACTOR, height * FACTOR), DARK)
        self._pen = ImageDraw.Draw(self._image)

    def finished(self) -> Tensor:
        """Returns the image, (1, H, W, 3)."""
        return to_tensor(self._image.resize((self.width, self.height), Image.Resampling.LANCZOS))[None]

    def text(self, at: Point, text: str, colour: Colour = LIGHT, size: int = 13, anchor: str = "lm") -> float:
        """Writes text and returns its width."""
        font = ImageFont.load_default(size * FACTOR)
        self._pen.text(_larger(at), text, fill=colour, font=font, anchor=anchor)
        return font.getlength(text) / FACTOR

    def box(self, box: Box, fill: Colour, outline: Colour | None = None) -> None:
        """Fills a rectangle, its right and bottom edge excluded."""
        left, top, right, bottom = (round(side * FACTOR) for side in box)
        self._pen.rectangle((left, top, right - 1, bottom - 1), fill=fill, outline=outline)

    def line(self, points: Sequence[Point], colour: Colour, width: float = 2) -> None:
        """Draws straight lines through points."""
        if len(points) > 1:
            places = [_larger(point) for point in points]
            self._pen.line(places, fill=colour, width=round(width * FACTOR), joint="curve")

    def dashes(self, start: Point, end: Point, colour: Colour, dash: float = 5) -> None:
        """Draws a dashed line."""
        length = math.dist(start, end)
        for place in range(int(length / (2 * dash)) + 1):
            ends = (min(2 * place * dash, length), min((2 * place + 1) * dash, length))
            first, last = (
                [s + (e - s) * distance / length for s, e in zip(start, end, strict=True)]
                for distance in ends
            )
            self.line([(first[0], first[1]), (last[0], last[1])], colour, 1)

    def polygon(self, points: Sequence[Point], fill: Colour) -> None:
        """Fills a polygon."""
        if len(points) > 2:
            self._pen.polygon([_larger(point) for point in points], fill=fill)

    def dot(self, at: Point, radius: float, fill: Colour, outline: Colour | None = None) -> None:
        """Draws a disc."""
        x, y = at
        corners = (*_larger((x - radius, y - radius)), *_larger((x + radius, y + radius)))
        self._pen.ellipse(corners, fill=fill, outline=outline, width=FACTOR)


class Axis:
    """A scale from values to pixels."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high = low, high
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        """Returns the pixel of a value."""
        return self._start + (self._end - self._start) * (value - self.low) / (self.high - self.low)


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Returns round numbers that span a range with about `count` steps; at least two numbers."""
    span = max(high - low, 1e-9 * max(abs(high), abs(low)), 1e-12)
    raw = span / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [place * step for place in range(first, max(last, first + 1) + 1)]


def tick_text(value: float, step: float) -> str:
    """Returns a tick's label with as many decimals as its neighbours need."""
    if step >= 1e5 or (value != 0 and step < 1e-4):
        return f"{value:.2g}"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if abs(step * 10**decimals - round(step * 10**decimals)) > 1e-6:  # 0.25 needs one more
        decimals += 1
    return f"{value + 0.0:.{decimals}f}"


def mixed(first: Colour, second: Colour, fraction: float) -> Colour:
    """Returns a colour between two."""
    red, green, blue = (round(a + (b - a) * fraction) for a, b in zip(first, second, strict=True))
    return red, green, blue


def scale_colour(value: float) -> Colour:
    """Returns the colour of a value in [0, 1]."""
    place = min(max(value, 0.0), 1.0) * (len(SCALE_STOPS) - 1)
    index = min(int(place), len(SCALE_STOPS) - 2)
    return mixed(SCALE_STOPS[index], SCALE_STOPS[index + 1], place - index)


def _larger(point: Point) -> Point:
    return point[0] * FACTOR, point[1] * FACTOR


def shares_text(shares: Mapping[str, float]) -> str:
    """Returns what the weights of several images depend on, in words; nothing for one image."""
    if not shares:
        return ""
    names = {"same": "the same for all", "prompt": "by image", "time": "by time", "interaction": "by both"}
    parts = (f"{percent(shares[part])} {name}" for part, name in names.items())
    return f"Energy of the weights: {', '.join(parts)}"
