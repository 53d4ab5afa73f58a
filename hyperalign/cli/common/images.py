"""Images in folders: their names, their pixels as tensors, and small copies as data URIs."""

from __future__ import annotations

import base64
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ...errors import HyperAlignError
from ...image_files import DECODING_ERRORS, open_rgb

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
THUMBNAIL_QUALITY = 80


@dataclass(frozen=True, slots=True)
class BadImage:
    """An image that was skipped, and why."""

    name: str
    reason: str


def print_skipped(images: Sequence[BadImage]) -> None:
    """Lists skipped images on standard error."""
    for image in images:
        print(f"skipped {image.name}: {image.reason}", file=sys.stderr)


def list_images(folder: Path) -> list[str]:
    """Returns the images below a folder, as sorted paths relative to it with forward slashes.

    Raises HyperAlignError if there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise HyperAlignError(f"There is no folder {folder}; give a folder of images.")
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
