"""Image files to upright RGB images."""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image

from hyperalign.image_files import DECODING_ERRORS, open_rgb
from train.data.preference.dataset import BadImage, ImageFile


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """A preference image in RGB, upright."""

    caption: str
    image: Image.Image
    name: str
    rejected: Image.Image | None = None
    """The image that lost against it."""


def decode(file: ImageFile) -> DecodedImage | BadImage:
    """Returns the image upright and in RGB, or why there is none."""
    if not file.caption.strip():
        return BadImage(file.name, "its caption is empty")
    try:
        image = open_rgb(io.BytesIO(file.data))
        rejected = None if file.rejected is None else open_rgb(io.BytesIO(file.rejected))
    except DECODING_ERRORS as error:
        return BadImage(file.name, f"it cannot be decoded: {type(error).__name__}: {error}")
    return DecodedImage(file.caption.strip(), image, file.name, rejected)
