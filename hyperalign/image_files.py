"""Image files as a viewer shows them: for folders that are scored and for preference datasets alike."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageOps

DECODING_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, struct.error,
    Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow's decoders raise on damaged files."""


def open_rgb(file: Path | BinaryIO) -> Image.Image:
    """Returns an image upright and in RGB, transparent parts on white, 16 bits of grey as 8.

    Raises one of `DECODING_ERRORS` on a file that cannot be decoded.
    """
    with Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip instead of scale
            image = image.point(lambda value: value / 257).convert("L")
        if not image.has_transparency_data:
            return image.convert("RGB")
        layers = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")
