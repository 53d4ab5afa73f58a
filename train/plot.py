"""One curve as an image, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from hyperalign.files import replacing

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 900, 480, 90, 60, 64, 30
INK, CURVE, MARK, FAINT = "#222222", "#1f6fb2", "#c8452c", "#dddddd"


def plot_curve(
    times: Sequence[float], distances: Sequence[float], key_times: Sequence[float], path: Path
) -> None:
    """Writes the relative distances (log scale) over u from 1 to 0, key times marked, as a PNG."""
    low = math.floor(math.log10(max(min(distances), 1e-6)))
    high = math.ceil(math.log10(max(distances)))
    high = max(high, low + 1)
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)

    def place(u: float, distance: float) -> tuple[float, float]:
        x = LEFT + (1.0 - u) * (WIDTH - LEFT - RIGHT)
        share = (math.log10(max(distance, 1e-6)) - low) / (high - low)
        return x, HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)

    for power in range(low, high + 1):
        _, y = place(0.0, 10.0**power)
        draw.line([(LEFT, y), (WIDTH - RIGHT, y)], fill=FAINT)
        draw.text((LEFT - 8, y), f"{10.0**power:g}", fill=INK, font=font, anchor="rm")
    for tenth in range(0, 11, 2):
        x, y = place(tenth / 10, 10.0**low)
        draw.text((x, y + 8), f"{tenth / 10:.1f}", fill=INK, font=font, anchor="mt")
    for u in key_times:
        x, _ = place(u, 10.0**low)
        draw.line([(x, TOP), (x, HEIGHT - BOTTOM)], fill=MARK, width=2)
        draw.text((x, TOP - 6), f"{u:.3f}", fill=MARK, font=font, anchor="mb")
    points = [place(u, d) for u, d in zip(times, distances, strict=True)]
    draw.line(points, fill=CURVE, width=3)
    for x, y in points:
        draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=CURVE)
    middle = (LEFT + WIDTH - RIGHT) / 2
    draw.text((middle, HEIGHT - 24), "time u (1 is noise, 0 the image)", fill=INK, font=font, anchor="mt")
    draw.text((12, 10), "relative distance of successive one-step predictions", fill=INK, font=font)
    with replacing(path) as partial:
        image.save(partial, "PNG")
