"""Images in folders: their names, and those that were skipped."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ...errors import HyperAlignError
from ...image_files import BadImage

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")


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
