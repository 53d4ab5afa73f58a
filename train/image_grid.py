"""Images of a run: validation prompts with captions."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from hyperalign.files import replacing
from train.sampling import SampledImages

SCALE = 2
SIDE = 256
CAPTION = 26
COLUMNS = 6


def save_grid(samples: SampledImages, path: Path, rows: int = 4) -> None:
    """Writes one captioned PNG with the first image of each prompt."""
    count = min(len(samples.prompts), rows * COLUMNS)
    side = min(SIDE, samples.images.shape[-1] * SCALE)
    sheet = Image.new("RGB", (COLUMNS * side, -(-count // COLUMNS) * (side + CAPTION)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for index in range(count):
        pixels = (samples.images[index, 0] * 255).round().byte().permute(1, 2, 0).numpy()
        x, y = index % COLUMNS * side, index // COLUMNS * (side + CAPTION)
        sheet.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC), (x, y + CAPTION))
        for line, text in enumerate(_wrapped(samples.prompts[index])):
            draw.text((x + 2, y + 1 + 12 * line), text, fill="black", font=font)
    with replacing(path) as partial:
        sheet.save(partial, "PNG")


def _wrapped(text: str, width: int = 24) -> list[str]:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) + 1 > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines[:2]
