"""The demo's image: prompts as rows, methods as columns, scores under each image."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from scripts.generation import METHODS, SEEDS, Request
from scripts.measure import Scored

TILE = 192
GAP = 12
LABELS = 200
UNDER = 26
HEAD = 64
INK, RIGHT, WRONG = (32, 33, 36), (24, 128, 56), (179, 38, 30)
TITLES = {
    "base": "base model", "static": "static LoRA", "hyperalign-i": "HyperAlign-I",
    "hyperalign-p": "HyperAlign-P", "hyperalign-s": "HyperAlign-S",
}  # fmt: skip


def save_grid(scored: Sequence[Scored], path: Path) -> None:
    """Saves a grid of the first seed's images of every prompt and method."""
    shown = {(s.image.request, s.image.method): s for s in scored if s.image.seed == SEEDS[0]}
    requests = list(dict.fromkeys(request for request, _ in shown))
    width = LABELS + len(METHODS) * (TILE + GAP) + GAP
    height = HEAD + len(requests) * (TILE + UNDER + GAP) + GAP
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    note = f"One prompt a row, seed {SEEDS[0]}; under each image its reward and the detector's result."
    draw.text((GAP, GAP), note, INK, ImageFont.load_default(15))
    for column, method in enumerate(METHODS):
        centre = (_left(column) + TILE // 2, HEAD - 20)
        draw.text(centre, TITLES[method], INK, ImageFont.load_default(18), anchor="mm")
    for row, request in enumerate(requests):
        top = HEAD + row * (TILE + UNDER + GAP)
        label = "\n".join(line for text in _label(request) for line in textwrap.wrap(text, 20))
        draw.multiline_text((GAP, top + TILE // 2), label, INK, ImageFont.load_default(18), anchor="lm")
        for column, method in enumerate(METHODS):
            _place(sheet, draw, shown[request, method], (_left(column), top))
    sheet.save(path)


def _label(request: Request) -> list[str]:
    """Returns the prompt and, in a wording with a palette of its own, what it asks for."""
    asked = request.content.phrase()
    return [request.prompt] if asked in request.prompt else [request.prompt, f"({asked})"]


def _left(column: int) -> int:
    return LABELS + GAP + column * (TILE + GAP)


def _place(sheet: Image.Image, draw: ImageDraw.ImageDraw, scored: Scored, corner: tuple[int, int]) -> None:
    image = Image.open(scored.image.path).convert("RGB").resize((TILE, TILE), Image.Resampling.LANCZOS)
    sheet.paste(image, corner)
    left, top = corner
    draw.rectangle((left, top, left + TILE - 1, top + TILE - 1), outline=(218, 220, 224))
    verdict, color = ("right", RIGHT) if scored.correct else ("wrong", WRONG)
    centre = (left + TILE // 2, top + TILE + UNDER // 2)
    draw.text(
        centre, f"reward {scored.reward:.2f}, {verdict}", color, ImageFont.load_default(16), anchor="mm"
    )
