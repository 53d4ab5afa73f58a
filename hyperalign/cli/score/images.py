"""Images in folders: which there are, and how they become tensors and thumbnails."""

from __future__ import annotations

import base64
import io
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ...errors import HyperAlignError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
DAMAGED = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, struct.error,
    Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow's decoders raise when they meet damaged files."""
THUMBNAIL_QUALITY = 80


@dataclass(frozen=True, slots=True)
class BadImage:
    """An image that was left out, and why."""

    name: str
    reason: str


def list_images(folder: Path) -> list[str]:
    """Returns the images below a folder, as sorted paths relative to it with forward slashes.

    Raises HyperAlignError when there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise HyperAlignError(f"There is no folder {folder}; give one that holds images.")
    relative = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    names = [
        path.as_posix()
        for path in relative
        if path.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in path.parts)
    ]
    if not names:
        raise HyperAlignError(
            f"There is no image below {folder}; expected files ending in {', '.join(SUFFIXES)}."
        )
    return sorted(names)


def open_rgb(path: Path) -> Image.Image:
    """Returns an image as a viewer shows it: upright, in RGB, transparency laid on white.

    Raises one of `DAMAGED` on a file that cannot be decoded.
    """
    with Image.open(path) as opened:
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
    except DAMAGED as error:
        return BadImage(name, f"it cannot be decoded ({type(error).__name__}: {error})")
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1)


def thumbnail(folder: Path, name: str, side: int) -> str | BadImage:
    """Returns an image of at most `side` pixels as the data URI of a JPEG."""
    try:
        image = open_rgb(folder / name)
    except DAMAGED as error:
        return BadImage(name, f"it cannot be decoded ({type(error).__name__}: {error})")
    image.thumbnail((side, side))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=THUMBNAIL_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
