"""Image files to upright RGB images."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass

from PIL import Image, ImageOps

from train.data.preference.dataset import BadImage, ImageFile

DECODING_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, struct.error,
    Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow's decoders raise when a file is damaged."""


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """A preference image in RGB, upright."""

    caption: str
    image: Image.Image
    name: str


def decode(file: ImageFile) -> DecodedImage | BadImage:
    """Returns the image upright and in RGB, transparency composited on white."""
    if not file.caption.strip():
        return BadImage(file.name, "its caption is empty")
    try:
        with Image.open(io.BytesIO(file.data)) as opened:
            image = _on_white(ImageOps.exif_transpose(opened))
    except DECODING_ERRORS as error:
        return BadImage(file.name, f"it cannot be decoded: {type(error).__name__}: {error}")
    return DecodedImage(file.caption.strip(), image, file.name)


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    layers = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")
