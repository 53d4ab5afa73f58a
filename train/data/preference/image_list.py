"""Datasets that list single image files: a folder, a JSONL file, HPD."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from hyperalign.errors import HyperAlignError
from train.data.preference.dataset import BadImage, DatasetItem, ImageFile, UnsafeFilter, UnsafeImage
from train.data.prompts import caption_value, json_lines

ENTRIES_PER_UNIT = 1000
"""An interruption costs the work on one unit, a few minutes."""
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
CAPTION_SUFFIXES = (".txt", ".caption", ".json")
"""Of the file beside an image that has its caption; the first that is there counts."""
IMAGE_KEYS = ("image", "file_name")
"""Keys of an image's path in a JSONL file; the second is that of Hugging Face's imagefolder."""
METADATA_FILE = "metadata.jsonl"

Entry = TypeVar("Entry")


@dataclass(frozen=True, slots=True)
class ImageList(Generic[Entry]):
    """A list of entries, each read on its own; a unit is ENTRIES_PER_UNIT of them."""

    name: str
    entries: Sequence[Entry]
    read_entry: Callable[[Entry], DatasetItem]

    def units(self) -> int:
        """Returns the number of units; the last one may be shorter."""
        return -(-len(self.entries) // ENTRIES_PER_UNIT)

    def unit_name(self, unit: int) -> str:
        """Returns the range of entries."""
        first, last = unit * ENTRIES_PER_UNIT, min((unit + 1) * ENTRIES_PER_UNIT, len(self.entries))
        return f"{self.name}[{first}:{last}]"

    def read(self, unit: int) -> Iterator[DatasetItem]:
        """Yields the images of a unit."""
        for entry in self.entries[unit * ENTRIES_PER_UNIT : (unit + 1) * ENTRIES_PER_UNIT]:
            yield self.read_entry(entry)


@dataclass(frozen=True, slots=True)
class CaptionedFile:
    """An image file and its caption."""

    caption: str
    file: Path
    name: str
    unsafe: bool = False
    """Whether the dataset marks it as unsafe."""
    rejected: Path | None = None
    """The image that lost against it, where pairs are read."""


def read_file(entry: CaptionedFile) -> DatasetItem:
    """Reads an image file unless it is unsafe; a file that cannot be read gives a BadImage."""
    if entry.unsafe:
        return UnsafeImage(entry.name)
    try:
        rejected = None if entry.rejected is None else entry.rejected.read_bytes()
        return ImageFile(entry.caption, entry.file.read_bytes(), entry.name, rejected)
    except OSError as error:
        return BadImage(entry.name, f"{error.filename or entry.file} cannot be read: {error.strerror}")


def open_folder(path: Path) -> ImageList[Path]:
    """Returns the images of a folder and its subfolders, captioned by the file of their name beside them.

    That is a `.txt`, a `.caption`, or a `.json` with the caption under one of CAPTION_KEYS.

    Raises:
        HyperAlignError: no image in it.
    """
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise HyperAlignError(
            f"{path} holds no image ({', '.join(IMAGE_SUFFIXES)}). Each needs a caption beside it, in a file "
            f"of the same name: {', '.join(CAPTION_SUFFIXES)}."
        )

    def read(file: Path) -> DatasetItem:
        name = file.relative_to(path).as_posix()
        try:
            return read_file(CaptionedFile(caption_beside(file, name), file, name))
        except HyperAlignError as error:
            return BadImage(name, str(error))

    return ImageList(path.name, files, read)


def caption_beside(image: Path, name: str) -> str:
    """Returns the caption in the file beside an image. Raises HyperAlignError."""
    places = [image.with_suffix(suffix) for suffix in CAPTION_SUFFIXES]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        alike = image.parent.glob(f"{escape(image.stem)}.*")
        others = sorted(other.name for other in alike if other != image)
        raise HyperAlignError(
            f"it has no caption: expected {', '.join(place.name for place in places)} beside it, found "
            f"{', '.join(others) or 'no file of its name'}"
        )
    try:
        text = file.read_text(encoding="utf-8-sig")
        return one_caption(json.loads(text), name, file.name) if file.suffix == ".json" else text
    except (OSError, ValueError) as error:
        raise HyperAlignError(f"its caption {file.name} cannot be read: {error}") from error


def one_caption(row: object, name: str, where: str) -> str:
    """Returns the caption of a string or an object; of a list of captions one that the image's name decides.

    So an image has the same caption in every run, and a dataset shows all kinds of its captions.

    Raises:
        HyperAlignError: no caption, or of another type.
    """
    value = row if isinstance(row, list) else caption_value(row, where)
    captions: list[Any] = cast("list[Any]", value) if isinstance(value, list) else [value]
    if not captions or not all(isinstance(caption, str) for caption in captions):
        raise HyperAlignError(f"{where}: the caption is {value!r}; expected a string or a list of strings.")
    return captions[zlib.crc32(name.encode()) % len(captions)]


def open_imagefolder(
    path: Path, unsafe: UnsafeFilter | None = None, pairs: bool = False
) -> ImageList[CaptionedFile]:
    """Returns the images in the `metadata.jsonl` of a Hugging Face imagefolder, or of its train split.

    Raises:
        HyperAlignError: there is none, or it has a bad line.
    """
    files = [path / METADATA_FILE, path / "train" / METADATA_FILE]
    listing = next((file for file in files if file.is_file()), None)
    if listing is None:
        found = sorted(file.name for file in path.iterdir())[:5] if path.is_dir() else [path.name]
        raise HyperAlignError(
            f"{path} holds {', '.join(found) or 'nothing'}; expected {METADATA_FILE} in it or in its folder "
            'train, with lines of {"file_name": "a.jpg", "text": "..."}.'
        )
    return open_jsonl(listing, unsafe, pairs)


def open_jsonl(
    path: Path, unsafe: UnsafeFilter | None = None, pairs: bool = False
) -> ImageList[CaptionedFile]:
    """Returns the images of a JSONL file with objects {image | file_name, caption | prompt | text}.

    Args:
        path: the file; relative image paths start at its folder.
        unsafe: images that match are skipped; its column is a key of the objects.
        pairs: the objects have the image that lost, too: `rejected`.

    Raises:
        HyperAlignError: a bad line, named by its number, or no line at all.
    """
    entries: list[CaptionedFile] = []
    for number, row in json_lines(path):
        where = f"{path}, line {number}"
        key = IMAGE_KEYS[1] if isinstance(row, dict) and IMAGE_KEYS[1] in row else IMAGE_KEYS[0]
        image = entry_value(row, key, str, where)
        marked = unsafe is not None and unsafe.matches(entry_value(row, unsafe.column, object, where), where)
        name = f"{path.name}:{number}:{image}"
        caption = one_caption(row, image, where)
        rejected = path.parent / entry_value(row, "rejected", str, where) if pairs else None
        entries.append(CaptionedFile(caption, path.parent / image, name, marked, rejected))
    if not entries:
        raise HyperAlignError(f'{path} is empty. Each line should be {{"image": "a.jpg", "caption": "..."}}.')
    return ImageList(path.name, entries, read_file)


def entry_value(row: object, key: str, kind: type[Any], where: str) -> Any:
    """Returns a value of a JSON object. Raises HyperAlignError if it is missing or of another type."""
    if not isinstance(row, dict):
        raise HyperAlignError(f"{where} is a {type(row).__name__}; expected an object with {key!r}.")
    table = cast("dict[str, Any]", row)
    if key not in table:
        raise HyperAlignError(f"{where} has no {key!r}, only {', '.join(table) or 'nothing'}. Add it.")
    if not isinstance(table[key], kind):
        raise HyperAlignError(f"{where}: {key!r} is {table[key]!r}; expected a {kind.__name__}.")
    return table[key]
