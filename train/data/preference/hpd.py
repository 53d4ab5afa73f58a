"""HPDv2 and HPDv3: pairs of images of one prompt in a JSON file, images in train.tar or an unpacked folder.

The loading script of HPDv2 is not run; only its two files are read.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

from hyperalign.errors import HyperAlignError
from train.data.preference.dataset import BadImage, DatasetItem, ImageFile, UnsafeFilter, UnsafeImage
from train.data.preference.image_list import CaptionedFile, ImageList, entry_value, read_file
from train.data.preference.tar_index import TarIndex
from train.data.prompts import json_list

LISTINGS = ("train.json", "all.json")
"""Of HPDv2 and HPDv3, and all annotated pairs of HPDv3."""


def open_hpd(path: Path, unsafe: UnsafeFilter | None = None, pairs: bool = False) -> ImageList[CaptionedFile]:
    """Returns the preference images of HPD; an image that won several pairs of a prompt is listed once.

    Args:
        path: the folder with the JSON file, or that file; train.tar, the folder train/ or the images'
            own folders beside it.
        unsafe: the winner of a pair that matches is skipped; its column is a key of the pairs.
        pairs: every pair is listed, with both of its images.

    Raises:
        HyperAlignError: a file is missing, still compressed, or not of that form.
    """
    names = [path / name for name in LISTINGS] if path.is_dir() else [path]
    listing = next((name for name in names if name.is_file()), names[0])
    if not listing.is_file():
        raise HyperAlignError(
            f"There is no {listing}. Put the train.json of HPDv2 or HPDv3 there, the images beside it."
        )
    rows = json_list(listing)
    if not rows:
        raise HyperAlignError(f"{listing} holds no pair. Download it again.")
    won: dict[Choice, bool] = {}  # whether the winner won an unsafe pair
    for number, row in enumerate(rows, 1):
        where = f"{listing}, entry {number}"
        choice = _choice(row, where)
        marked = unsafe is not None and unsafe.matches(entry_value(row, unsafe.column, object, where), where)
        if choice is not None:
            choice = choice if pairs else choice._replace(rejected="")
            won[choice] = won.get(choice, False) or marked
    if not won:
        raise HyperAlignError(f"{listing} holds no pair with one preference image. Download it again.")
    root = listing.parent
    for folder in (root / "train", root):
        entries = [choice.entry(folder, bad) for choice, bad in won.items()]
        if any(entry.file.is_file() for entry in entries[:100]):
            return ImageList(listing.name, entries, read_file)
    tar = root / "train.tar"
    if tar.is_file():
        entries = [choice.entry(Path(), bad) for choice, bad in won.items()]
        return ImageList(listing.name, entries, _tar_reader(TarIndex(tar)))
    packed = root / "train.tar.gz"
    if packed.is_file():
        raise HyperAlignError(
            f"{packed} is compressed, so single images cannot be read from it. Unpack it first: "
            f"`gunzip {packed}` leaves train.tar, which is enough."
        )
    raise HyperAlignError(
        f"{root} holds neither train.tar nor the images that {listing.name} names, such as "
        f"{next(iter(won)).file}. Download HPDv2's train.tar.gz there and gunzip it, or unpack the images "
        "of HPDv3 there."
    )


class Choice(NamedTuple):
    """A pair's prompt and files."""

    prompt: str
    file: str
    rejected: str
    """Empty where only the winners are listed."""

    def entry(self, folder: Path, unsafe: bool) -> CaptionedFile:
        """Returns the pair, or its winner, as files in a folder."""
        rejected = folder / self.rejected if self.rejected else None
        name = f"{self.file} over {self.rejected}" if self.rejected else self.file
        return CaptionedFile(self.prompt, folder / self.file, name, unsafe, rejected)


def _choice(row: object, where: str) -> Choice | None:
    """Returns a pair's prompt, preference image and other image; None for a tie."""
    prompt = entry_value(row, "prompt", str, where)
    if isinstance(row, dict) and "path1" in row:
        return _choice_v3(cast("dict[str, Any]", row), prompt, where)
    choice: list[Any] = entry_value(row, "human_preference", list, where)
    # the dataset card names file_path; train.json has also been published with image_path
    key = "image_path" if isinstance(row, dict) and "image_path" in row else "file_path"
    files: list[Any] = entry_value(row, key, list, where)
    if len(files) != len(choice) or not all(isinstance(file, str) for file in files):
        raise HyperAlignError(f"{where}: {key} {files!r} and human_preference {choice!r} do not match.")
    if choice.count(1) != 1:
        return None
    winner = choice.index(1)
    return Choice(prompt, files[winner], files[winner - 1])


def _choice_v3(row: dict[str, Any], prompt: str, where: str) -> Choice | None:
    """HPDv3 has the preferred image as path1; `choice_dist`, where it is known, are the votes for both."""
    preferred, other, votes = (row.get(key) for key in ("path1", "path2", "choice_dist"))
    if not isinstance(preferred, str) or not isinstance(other, str):
        raise HyperAlignError(f"{where}: path1 is {preferred!r} and path2 {other!r}; expected two files.")
    tie = isinstance(votes, list) and len(set(cast("list[Any]", votes))) == 1
    return None if tie else Choice(prompt, preferred, other)


def _tar_reader(index: TarIndex) -> Callable[[CaptionedFile], DatasetItem]:
    def read(entry: CaptionedFile) -> DatasetItem:
        if entry.unsafe:
            return UnsafeImage(entry.name)
        try:
            rejected = None if entry.rejected is None else index.read(entry.rejected.as_posix())
            return ImageFile(entry.caption, index.read(entry.file.as_posix()), entry.name, rejected)
        except OSError as error:
            return BadImage(entry.name, f"it cannot be read from {index.path.name}: {error}")

    return read
