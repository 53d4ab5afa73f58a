"""HPDv2: pairs of images of one prompt in train.json, images in train.tar or an unpacked folder.

The loading script of the dataset is not run; only its two files are read.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hyperalign.errors import HyperAlignError
from train.data.preference.dataset import BadImage, DatasetItem, ImageFile, UnsafeFilter, UnsafeImage
from train.data.preference.image_list import CaptionedFile, ImageList, entry_value, read_file
from train.data.preference.tar_index import TarIndex
from train.data.prompts import json_list


def open_hpd(path: Path, unsafe: UnsafeFilter | None = None) -> ImageList[CaptionedFile]:
    """Returns the preference images of HPDv2; an image that won several pairs of a prompt is listed once.

    Args:
        path: the folder with train.json, or train.json itself; train.tar or the folder train/ beside it.
        unsafe: the winner of a pair that matches is skipped; its column is a key of train.json.

    Raises:
        HyperAlignError: a file is missing, still compressed, or not of that form.
    """
    listing = path / "train.json" if path.is_dir() else path
    if not listing.is_file():
        raise HyperAlignError(f"There is no {listing}. Put HPDv2's train.json there, train.tar beside it.")
    rows = json_list(listing)
    if not rows:
        raise HyperAlignError(f"{listing} holds no pair. Download it again.")
    winners: dict[tuple[str, str], bool] = {}  # by prompt and file: whether it won an unsafe pair
    for number, row in enumerate(rows, 1):
        where = f"{listing}, entry {number}"
        winner = _winner(row, where)
        marked = unsafe is not None and unsafe.matches(entry_value(row, unsafe.column, object, where), where)
        if winner is not None:
            winners[winner] = winners.get(winner, False) or marked
    if not winners:
        raise HyperAlignError(f"{listing} holds no pair with one preference image. Download it again.")
    root = listing.parent
    for folder in (root / "train", root):
        entries = [CaptionedFile(text, folder / file, file, bad) for (text, file), bad in winners.items()]
        if any(entry.file.is_file() for entry in entries[:100]):
            return ImageList(listing.name, entries, read_file)
    tar = root / "train.tar"
    if tar.is_file():
        entries = [CaptionedFile(text, tar, file, bad) for (text, file), bad in winners.items()]
        return ImageList(listing.name, entries, _tar_reader(TarIndex(tar)))
    packed = root / "train.tar.gz"
    if packed.is_file():
        raise HyperAlignError(
            f"{packed} is compressed, so single images cannot be read from it. Unpack it first: "
            f"`gunzip {packed}` leaves train.tar, which is enough."
        )
    raise HyperAlignError(
        f"{root} holds neither train.tar nor the images that {listing.name} names. Download HPDv2's "
        "train.tar.gz there and gunzip it."
    )


def _winner(row: object, where: str) -> tuple[str, str] | None:
    """Returns prompt and file of a pair's preference image; None for a tie."""
    prompt = entry_value(row, "prompt", str, where)
    choice: list[Any] = entry_value(row, "human_preference", list, where)
    # the dataset card names file_path; train.json has also been published with image_path
    key = "image_path" if isinstance(row, dict) and "image_path" in row else "file_path"
    files: list[Any] = entry_value(row, key, list, where)
    if len(files) != len(choice) or not all(isinstance(file, str) for file in files):
        raise HyperAlignError(f"{where}: {key} {files!r} and human_preference {choice!r} do not match.")
    return (prompt, files[choice.index(1)]) if choice.count(1) == 1 else None


def _tar_reader(index: TarIndex) -> Callable[[CaptionedFile], DatasetItem]:
    def read(entry: CaptionedFile) -> DatasetItem:
        if entry.unsafe:
            return UnsafeImage(entry.name)
        try:
            return ImageFile(entry.caption, index.read(entry.name), entry.name)
        except OSError as error:
            return BadImage(entry.name, f"it cannot be read from {index.path.name}: {error}")

    return read
