"""Image files as a viewer shows them, as tensors, and as small copies in a page."""

from __future__ import annotations

import base64
import io
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from PIL import Image, ImageOps
from torch import Tensor

DECODING_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, struct.error,
    Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow's decoders raise on damaged files."""

THUMBNAIL_QUALITY = 80


@dataclass(frozen=True, slots=True)
class BadImage:
    """An image that was skipped, and why."""

    name: str
    reason: str


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


def decode(folder: Path, name: str) -> Tensor | BadImage:
    """Returns an image as bytes (3, H, W)."""
    try:
        image = open_rgb(folder / name)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    except DECODING_ERRORS as error:
        return BadImage(name, f"it cannot be decoded ({type(error).__name__}: {error})")
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1)


def thumbnail(folder: Path, name: str, side: int) -> str | BadImage:
    """Returns an image, scaled down to at most `side` pixels, as the data URI of a JPEG."""
    try:
        image = open_rgb(folder / name)
    except DECODING_ERRORS as error:
        return BadImage(name, f"it cannot be decoded ({type(error).__name__}: {error})")
    return data_uri(image, "jpeg", THUMBNAIL_QUALITY, side)


def data_uri(image: Image.Image, file_format: str, quality: int, side: int) -> str:
    """Returns an image as a data URI, scaled down to at most `side` pixels, without its metadata."""
    image.info = {key: value for key, value in image.info.items() if key == "icc_profile"}
    image.thumbnail((side, side))
    stream = io.BytesIO()
    image.save(stream, file_format, quality=quality)
    return f"data:image/{file_format};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
